"""Writing a step's new keys and values into pages. ``reference.py`` is the meaning, the siblings have its signature."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.kv_write import reference, xla

IMPLEMENTATIONS = {"reference": reference.write_kv_pages, "xla": xla.write_kv_pages}


def write_kv_pages(
    kv_pages: Float[Array, "N B 2K D"],
    kv: Float[Array, "T 2K D"],
    page_ids: Int[Array, " T"],
    offsets: Int[Array, " T"],
    *,
    implementation: str = "xla",
) -> Float[Array, "N B 2K D"]:
    """Writes token t's keys and values to ``kv_pages[page_ids[t], offsets[t]]``.

    Args:
        kv_pages: The pool of one layer; donate it to write in place.
        kv: K of head k at ``2k`` and V at ``2k + 1`` of axis 1; cast to the pool's dtype.
        page_ids: int32. Padding tokens carry an id of N or more and are not written. Never negative: -1 would mean the last page.
        offsets: int32, position within the page, ``0 <= offset < B``. No two tokens name the same cell.
        implementation: One of ``IMPLEMENTATIONS``.

    Returns:
        The pool with the tokens written.

    Raises:
        ValueError: A shape or dtype does not fit; the message names the argument.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: must be one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if kv_pages.ndim != 4:
        raise ValueError(f"kv_pages is {kv_pages.dtype}{list(kv_pages.shape)}: must be [N, B, 2K, D]")
    if kv.ndim != 3 or kv.shape[1:] != kv_pages.shape[2:]:
        raise ValueError(f"kv is {kv.dtype}{list(kv.shape)}: must be [T, 2K, D], here [any, {kv_pages.shape[2]}, {kv_pages.shape[3]}]")
    for argument, array in (("page_ids", page_ids), ("offsets", offsets)):
        if jnp.shape(array) != kv.shape[:1] or array.dtype != jnp.int32:
            raise ValueError(f"{argument} is {array.dtype}{list(array.shape)}: must be int32 [T], here [{kv.shape[0]}]")
    return IMPLEMENTATIONS[implementation](kv_pages, kv, page_ids, offsets)
