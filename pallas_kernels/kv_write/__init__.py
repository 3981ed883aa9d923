"""Writing a step's new keys and values into pages. ``reference.py`` is the meaning, the siblings have its signatures."""

from __future__ import annotations

import types
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Num

from pallas_kernels.kv_write import reference, xla

IMPLEMENTATIONS = {"reference": reference, "xla": xla}

KV_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "uint8", "uint16")
"""Of pools without a scale per token; the unsigned integers hold the bits of float8_e4m3fn and of bfloat16."""


def write_kv_pages(
    kv_pages: Num[Array, "N B 2K D"],
    kv: Float[Array, "T 2K D"],
    page_ids: Int[Array, " T"],
    offsets: Int[Array, " T"],
    *,
    k_scale: float | Float[Array, ""] | None = None,
    v_scale: float | Float[Array, ""] | None = None,
    implementation: str = "xla",
) -> Num[Array, "N B 2K D"]:
    """Writes token t's keys and values to ``kv_pages[page_ids[t], offsets[t]]``.

    Args:
        kv_pages: The pool of one layer, of one of ``KV_DTYPES``; donate it to write in place.
        kv: K of head k at ``2k`` and V at ``2k + 1`` of axis 1; divided by its scale and rounded to the pool's dtype. What is
            too large for e4m3 becomes its largest number, 448; NaN stays NaN.
        page_ids: int32. Padding tokens carry an id of N or more and are not written. Never negative: -1 would mean the last page.
        offsets: int32, position within the page, ``0 <= offset < B``. No two tokens name the same cell.
        k_scale: Scalar that whoever reads multiplies stored keys with; None for 1.
        v_scale: The same of values.
        implementation: One of ``IMPLEMENTATIONS``.

    Returns:
        The pool with the tokens written.

    Raises:
        ValueError: A shape or dtype does not fit; the message names the argument.
    """
    module = _checked(implementation, kv_pages, kv, page_ids, offsets)
    if str(kv_pages.dtype) not in KV_DTYPES:
        hint = "; write_quantized_kv_pages writes int8" if kv_pages.dtype == jnp.int8 else ""
        raise ValueError(f"kv_pages is {_describe(kv_pages)}: must be {' or '.join(KV_DTYPES)}{hint}")
    for argument, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None and jnp.shape(scale) != ():
            raise ValueError(f"{argument} is {_describe(scale)}: must be a scalar, or None")
    return module.write_kv_pages(kv_pages, kv, page_ids, offsets, k_scale=k_scale, v_scale=v_scale)


def write_quantized_kv_pages(
    kv_pages: Int8[Array, "N B 2K D"],
    k_scale: Float[Array, "N K B"],
    v_scale: Float[Array, "N K B"],
    kv: Float[Array, "T 2K D"],
    page_ids: Int[Array, " T"],
    offsets: Int[Array, " T"],
    *,
    implementation: str = "xla",
) -> tuple[Int8[Array, "N B 2K D"], Float[Array, "N K B"], Float[Array, "N K B"]]:
    """Writes token t to ``kv_pages[page_ids[t], offsets[t]]`` as int8, with one scale for its keys and one for its values in each head.

    A scale is the largest magnitude divided by 127. Where a number is NaN or infinite the scale is NaN, so that the fault shows in
    the sequence that it belongs to, as it would in a float pool. A token's scales of a head lie beside those of its neighbours in
    the page, so that a kernel fetches a page's scales of one head in one piece.

    Args:
        kv_pages: The pool of one layer, int8; donate it and its scales to write in place.
        k_scale: float32, what stored keys are multiplied with, by page, head and position in the page.
        v_scale: The same of values.
        kv: As in ``write_kv_pages``.
        page_ids: As there.
        offsets: As there.
        implementation: As there.

    Returns:
        The pool, ``k_scale`` and ``v_scale`` with the tokens written.

    Raises:
        ValueError: A shape or dtype does not fit; the message names the argument.
    """
    module = _checked(implementation, kv_pages, kv, page_ids, offsets)
    if kv_pages.dtype != jnp.int8:
        raise ValueError(f"kv_pages is {_describe(kv_pages)}: must be int8")
    num_pages, page_size, num_kv, _ = kv_pages.shape
    shape = (num_pages, num_kv // 2, page_size)
    for argument, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if jnp.shape(scale) != shape or jnp.result_type(scale) != jnp.float32:
            raise ValueError(f"{argument} is {_describe(scale)}: must be float32 [N, K, B], here {list(shape)}")
    return module.write_quantized_kv_pages(kv_pages, k_scale, v_scale, kv, page_ids, offsets)


def _describe(array: Any) -> str:
    return f"{jnp.result_type(array)}{list(jnp.shape(array))}"


def _checked(implementation: str, kv_pages: Any, kv: Any, page_ids: Any, offsets: Any) -> types.ModuleType:
    """Returns the module of an implementation.

    Raises:
        ValueError: There is none, or an argument that both writes share does not fit.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: must be one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if kv_pages.ndim != 4 or kv_pages.shape[2] % 2:
        raise ValueError(f"kv_pages is {_describe(kv_pages)}: must be [N, B, 2K, D]")
    if kv.ndim != 3 or kv.shape[1:] != kv_pages.shape[2:]:
        raise ValueError(f"kv is {_describe(kv)}: must be [T, 2K, D], here [any, {kv_pages.shape[2]}, {kv_pages.shape[3]}]")
    for argument, array in (("page_ids", page_ids), ("offsets", offsets)):
        if jnp.shape(array) != kv.shape[:1] or jnp.result_type(array) != jnp.int32:
            raise ValueError(f"{argument} is {_describe(array)}: must be int32 [T], here [{kv.shape[0]}]")
    return IMPLEMENTATIONS[implementation]
