"""Copying pages in XLA: a gather and a scatter of whole pages, or one page after the other; in place when the pool is donated."""

from __future__ import annotations

from typing import TypeVar

import jax
from jax import lax
from jaxtyping import Array, Int, Num

_Pages = TypeVar("_Pages")


def copy_pages(kv_pages: Num[Array, "N ..."], src: Int[Array, " M"], dst: Int[Array, " M"]) -> Num[Array, "N ..."]:
    """Returns the pool with the pages copied; arguments as in ``pallas_kernels.page_copy.copy_pages``."""
    return kv_pages.at[dst].set(kv_pages.at[src].get(mode="clip"), mode="drop", unique_indices=True)


def copy_first_pages(pages: _Pages, src: Int[Array, " M"], dst: Int[Array, " M"], count: Int[Array, ""]) -> _Pages:
    """Copies the first ``count`` pairs of pages, one after the other, in all arrays of a tree.

    For a count that only the device knows, often 0, and pages too large to gather M of them: it holds one page beside the pool and does
    nothing beyond the count.

    Args:
        pages: Arrays with pages on their first axes. Donate them to copy in place.
        src: int32, page ids; none of the first ``count`` may be among the destinations.
        dst: int32, page ids.
        count: How many pairs are copied.
    """

    def copy(i: Array, pages: _Pages) -> _Pages:
        def move(array: Array) -> Array:
            return lax.dynamic_update_index_in_dim(array, lax.dynamic_index_in_dim(array, src[i], 0), dst[i], 0)

        moved: _Pages = jax.tree.map(move, pages)
        return moved

    copied: _Pages = lax.fori_loop(0, count, copy, pages)
    return copied
