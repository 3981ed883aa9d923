"""What the arguments of ragged paged attention must look like, checked at trace time.

Only shapes, dtypes and static options can be checked under ``jax.jit``; the values of ``kv_lens``, ``block_tables`` and
``cu_q_lens`` are the caller's promise.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

KV_DTYPES = ("float32", "bfloat16", "float16")


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
    _require_array("q", q, (None, None, None), "[T, H, D]", KV_DTYPES)
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
    for argument, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            _require(jnp.shape(scale) == (), argument, _describe(scale), "a scalar, or None")
