"""Copying whole pages within a pool: how a sequence gets pages of its own before it writes to ones that it shares."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from pallas_kernels.page_copy import reference, xla

__all__ = ["IMPLEMENTATIONS", "copy_first_pages", "copy_pages"]

copy_first_pages = xla.copy_first_pages

IMPLEMENTATIONS = {"reference": reference.copy_pages, "xla": xla.copy_pages}


def copy_pages(
    kv_pages: Num[Array, "N ..."], src: Int[Array, " M"], dst: Int[Array, " M"], *, implementation: str = "xla"
) -> Num[Array, "N ..."]:
    """Copies page ``src[m]`` to page ``dst[m]``. All sources are read before anything is written, so pages may move in a circle.

    Args:
        kv_pages: Any array with pages on its first axis: keys and values, or their scales. Donate it to copy in place.
        src: int32, page ids from 0 to N - 1, as often as one likes.
        dst: int32, page ids. Padding carries N or more and is not copied. Never negative: -1 would mean the last page. No id below
            N twice.
        implementation: One of ``IMPLEMENTATIONS``.

    Returns:
        The array with the pages copied.

    Raises:
        ValueError: A shape or dtype does not fit; the message names the argument.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: must be one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if kv_pages.ndim < 2:
        raise ValueError(f"kv_pages is {kv_pages.dtype}{list(kv_pages.shape)}: must be [N, ...]")
    for argument, array in (("src", src), ("dst", dst)):
        if jnp.ndim(array) != 1 or jnp.shape(array) != jnp.shape(src) or jnp.result_type(array) != jnp.int32:
            raise ValueError(f"{argument} is {jnp.result_type(array)}{list(jnp.shape(array))}: must be int32 [M], src and dst alike")
    return IMPLEMENTATIONS[implementation](kv_pages, src, dst)
