"""What the arguments of ragged paged attention must look like, checked at trace time.

Only shapes, dtypes and static options can be checked under ``jax.jit``; the values of ``kv_lens``, ``block_tables`` and
``cu_q_lens`` are the caller's promise.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels.kv_write.quantize import BITS_OF

Q_DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = (*Q_DTYPES, "float8_e4m3fn", "int8", *BITS_OF)


def _require(condition: bool, argument: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{argument} is {value}: must be {allowed}")


def _describe(array: Any) -> str:
    return f"{jnp.result_type(array)}{list(jnp.shape(array))}"


def _require_array(argument: str, array: Any, shape: tuple[int | None, ...], names: str, dtypes: tuple[str, ...]) -> None:
    """Requires ``array`` to have one of ``dtypes`` and the given shape, in which None allows any size."""
    actual = jnp.shape(array)
    fits = len(actual) == len(shape) and all(want is None or got == want for got, want in zip(actual, shape, strict=True))
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    _require(fits, argument, _describe(array), f"{names}, here [{sizes}]")
    _require(str(jnp.result_type(array)) in dtypes, argument, _describe(array), " or ".join(dtypes))


def check_arguments(
    q: Any,
    kv_pages: Any,
    kv_lens: Any,
    block_tables: Any,
    cu_q_lens: Any,
    distribution: Any,
    *,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Any,
    k_scale: Any,
    v_scale: Any,
) -> None:
    """Raises ValueError, naming the argument, its shape and what is allowed, if these cannot go together.

    The arguments are those of ``ragged_paged_attention``.
    """
    _require_array("q", q, (None, None, None), "[T, H, D]", Q_DTYPES)
    _require_array("kv_pages", kv_pages, (None, None, None, None), "[N, B, 2K, D]", KV_DTYPES)
    num_q_heads, head_dim = q.shape[1:]
    num_pages, page_size, num_kv, kv_head_dim = kv_pages.shape
    _require(min(num_pages, page_size, num_kv) > 0, "kv_pages", _describe(kv_pages), "of a size above 0 on each axis")
    _require(kv_head_dim == head_dim, "kv_pages", _describe(kv_pages), f"[N, B, 2K, D] with q's D, here {head_dim}")
    _require(num_kv % 2 == 0, "kv_pages", _describe(kv_pages), "[N, B, 2K, D]: K and V interleave, so axis 2 is even")
    num_kv_heads = num_kv // 2
    _require(
        num_q_heads > 0 and num_q_heads % num_kv_heads == 0, "q", _describe(q), f"[T, H, D] with H a multiple of K, here {num_kv_heads}"
    )

    _require_array("kv_lens", kv_lens, (None,), "[S]", ("int32",))
    num_rows = kv_lens.shape[0]
    _require_array("block_tables", block_tables, (num_rows, None), "[S, P]", ("int32",))
    _require(block_tables.shape[1] > 0, "block_tables", _describe(block_tables), "[S, P] with P above 0")
    _require_array("cu_q_lens", cu_q_lens, (num_rows + 1,), "[S + 1]", ("int32",))
    _require_array("distribution", distribution, (3,), "[3]", ("int32",))

    if sliding_window is not None:
        _require(
            isinstance(sliding_window, int) and sliding_window > 0,
            "sliding_window",
            repr(sliding_window),
            "a whole number above 0, or None",
        )
    if soft_cap is not None:
        _require(soft_cap > 0, "soft_cap", repr(soft_cap), "above 0, or None")
    if sinks is not None:
        _require_array("sinks", sinks, (num_q_heads,), "[H]", ("float32",))
    _check_scales(kv_pages, k_scale, v_scale)


def _check_scales(kv_pages: Any, k_scale: Any, v_scale: Any) -> None:
    num_pages, page_size, num_kv, _ = kv_pages.shape
    per_token = (num_pages, num_kv // 2, page_size)
    for argument, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if kv_pages.dtype == jnp.int8:
            _require(scale is not None, argument, "None", f"float32 [N, K, B] for int8 pages, here {list(per_token)}, or a scalar")
        if scale is not None and jnp.shape(scale) != ():
            _require_array(argument, scale, per_token, "a scalar, None, or [N, K, B]", ("float32",))
    _require(
        k_scale is None or v_scale is None or jnp.ndim(k_scale) == jnp.ndim(v_scale),
        "v_scale", _describe(v_scale) if v_scale is not None else "None", "of k_scale's shape: both scalars or both [N, K, B]",
    )  # fmt: skip


def check_new_tokens(q: Any, kv: Any, kv_pages: Any, page_ids: Any, offsets: Any) -> None:
    """Raises ValueError, naming the argument, if these new tokens cannot be written to these pages.

    The arguments are those of ``ragged_paged_attention_update``; ``q`` and ``kv_pages`` are checked already.
    """
    num_tokens = q.shape[0]
    _require_array("kv", kv, (num_tokens, *kv_pages.shape[2:]), "[T, 2K, D]", Q_DTYPES)
    _require_array("page_ids", page_ids, (num_tokens,), "[T]", ("int32",))
    _require_array("offsets", offsets, (num_tokens,), "[T]", ("int32",))
