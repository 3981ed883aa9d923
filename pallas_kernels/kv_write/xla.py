"""Writing new keys and values into pages, in XLA: one scatter of whole token rows, in place when the pool is donated."""

from __future__ import annotations

from jaxtyping import Array, Float, Int


def write_kv_pages(
    kv_pages: Float[Array, "N B 2K D"], kv: Float[Array, "T 2K D"], page_ids: Int[Array, " T"], offsets: Int[Array, " T"]
) -> Float[Array, "N B 2K D"]:
    """Returns the pool with the tokens written; arguments as in ``pallas_kernels.kv_write.write_kv_pages``."""
    return kv_pages.at[page_ids, offsets].set(kv.astype(kv_pages.dtype), mode="drop", unique_indices=True)
