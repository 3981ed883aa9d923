"""Copying pages in NumPy: the meaning of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def copy_pages(kv_pages: Any, src: Any, dst: Any) -> NDArray[Any]:
    """Returns a copy of the pool with the pages copied; arguments as in ``pallas_kernels.page_copy.copy_pages``."""
    before = np.asarray(kv_pages)
    after = before.copy()
    for source, target in zip(np.asarray(src), np.asarray(dst), strict=True):
        if target < len(after):
            after[target] = before[source]
    return after
