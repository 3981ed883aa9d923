"""Writing new keys and values into pages, in NumPy: the meaning of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def write_kv_pages(kv_pages: Any, kv: Any, page_ids: Any, offsets: Any) -> NDArray[Any]:
    """Returns a copy of the pool with the tokens written; arguments as in ``pallas_kernels.kv_write.write_kv_pages``."""
    pages = np.array(kv_pages)
    new = np.asarray(kv)
    for token, (page, offset) in enumerate(zip(np.asarray(page_ids), np.asarray(offsets), strict=True)):
        if page < pages.shape[0]:
            pages[page, offset] = new[token].astype(pages.dtype)
    return pages
