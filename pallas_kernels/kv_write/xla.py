"""Writing new keys and values into pages, in XLA: one scatter of whole token rows, in place when the pool is donated."""

from __future__ import annotations

from jaxtyping import Array, Float, Int, Int8, Num

from pallas_kernels.kv_write.quantize import quantize_int8, to_storage


def _scatter(
    kv_pages: Num[Array, "N B 2K D"], kv: Num[Array, "T 2K D"], page_ids: Int[Array, " T"], offsets: Int[Array, " T"]
) -> Num[Array, "N B 2K D"]:
    return kv_pages.at[page_ids, offsets].set(kv, mode="drop", unique_indices=True)


def write_kv_pages(
    kv_pages: Num[Array, "N B 2K D"],
    kv: Float[Array, "T 2K D"],
    page_ids: Int[Array, " T"],
    offsets: Int[Array, " T"],
    *,
    k_scale: float | Float[Array, ""] | None = None,
    v_scale: float | Float[Array, ""] | None = None,
) -> Num[Array, "N B 2K D"]:
    """Returns the pool with the tokens written; arguments as in ``pallas_kernels.kv_write.write_kv_pages``."""
    return _scatter(kv_pages, to_storage(kv, kv_pages.dtype, k_scale, v_scale), page_ids, offsets)


def write_quantized_kv_pages(
    kv_pages: Int8[Array, "N B 2K D"],
    k_scale: Float[Array, "N K B"],
    v_scale: Float[Array, "N K B"],
    kv: Float[Array, "T 2K D"],
    page_ids: Int[Array, " T"],
    offsets: Int[Array, " T"],
) -> tuple[Int8[Array, "N B 2K D"], Float[Array, "N K B"], Float[Array, "N K B"]]:
    """Returns pool and scales with the tokens written; arguments as in ``pallas_kernels.kv_write.write_quantized_kv_pages``."""
    whole, *new = quantize_int8(kv)
    k_scale, v_scale = (
        scale.at[page_ids, :, offsets].set(part, mode="drop", unique_indices=True)
        for scale, part in zip((k_scale, v_scale), new, strict=True)
    )
    return _scatter(kv_pages, whole, page_ids, offsets), k_scale, v_scale
