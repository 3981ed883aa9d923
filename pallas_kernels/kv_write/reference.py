"""Writing new keys and values into pages, in NumPy, one token after the other: the meaning of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pallas_kernels.kv_write.quantize import value_dtype


def _store(values: NDArray[np.float32], dtype: np.dtype) -> NDArray[Any]:
    """Returns float32 numbers as a float pool stores them."""
    number = value_dtype(dtype)
    if number.name == "float8_e4m3fn":
        values = np.clip(values, -448, 448)
    return values.astype(number).view(dtype)


def write_kv_pages(kv_pages: Any, kv: Any, page_ids: Any, offsets: Any, *, k_scale: Any = None, v_scale: Any = None) -> NDArray[Any]:
    """Returns a copy of the pool with the tokens written; arguments as in ``pallas_kernels.kv_write.write_kv_pages``."""
    pages, new = np.array(kv_pages), np.array(kv, np.float32)
    for first, scale in ((0, k_scale), (1, v_scale)):
        if scale is not None:
            new[:, first::2] /= np.float32(scale)
    for token, (page, offset) in enumerate(zip(np.asarray(page_ids), np.asarray(offsets), strict=True)):
        if page < pages.shape[0]:
            pages[page, offset] = _store(new[token], pages.dtype)
    return pages


def write_quantized_kv_pages(
    kv_pages: Any, k_scale: Any, v_scale: Any, kv: Any, page_ids: Any, offsets: Any
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
    """Returns copies with the tokens written; arguments as in ``pallas_kernels.kv_write.write_quantized_kv_pages``."""
    pages, scales, new = np.array(kv_pages), (np.array(k_scale), np.array(v_scale)), np.asarray(kv, np.float32)
    for token, (page, offset) in enumerate(zip(np.asarray(page_ids), np.asarray(offsets), strict=True)):
        if page >= pages.shape[0]:
            continue
        for axis in range(pages.shape[2]):
            values = new[token, axis]
            scale = np.abs(values).max() / np.float32(127) if np.isfinite(values).all() else np.float32(np.nan)
            pages[page, offset, axis] = np.clip(np.round(values / scale), -127, 127) if scale > 0 else 0
            scales[axis % 2][page, axis // 2, offset] = scale
    return pages, *scales
