"""Static sizes of the Hopper decode kernel, and the shared memory they take."""

from __future__ import annotations

import dataclasses

QUERY_ROWS = 64
"""Rows of the product with the keys: the M of wgmma. The query heads of one key/value head fill the first few."""

SHARED_MEMORY = 232_448
"""Bytes that one block may have on an H100 or H200."""


@dataclasses.dataclass(frozen=True)
class DecodeTiling:
    """How the decode kernel divides its work.

    Attributes:
        block_kv: Keys of a tile in shared memory; a multiple of 64.
        stages: Tiles of each compute warpgroup that are there or under way.
        compute_warpgroups: Warpgroups that compute, each on an item of its own, so that one's softmax overlaps the other's products.
        out_columns: Columns of an item's output that are staged in shared memory at a time, or None for all.
        registers: Registers a thread of a compute and of the memory warpgroup asks for; None to leave what it is launched with.
        num_ctas: Thread blocks of the persistent grid; one fits on a multiprocessor, of which an H100 and an H200 have 132.
        combine_unroll: Splits of a row whose partial results the second kernel loads together.
        interpretable: Whether the probabilities go through shared memory and the sums through a second accumulator, as jax's
            interpreter of these kernels wants. For tests: it costs registers and time.
    """

    block_kv: int = 64
    stages: int = 2
    compute_warpgroups: int = 2
    out_columns: int | None = None
    registers: tuple[int, int] | None = (232, 40)
    num_ctas: int = 132
    combine_unroll: int = 8
    interpretable: bool = False


def shared_memory(tiling: DecodeTiling, head_dim: int, itemsize: int, kv_itemsize: int) -> int:
    """Returns the bytes of shared memory that a compute warpgroup's buffers take, barriers and padding left out.

    These are the queries, the outputs as float32 with their log-sums and the ring of K and V tiles; if the pages are narrower than the
    queries, also two float32 scales a token, and one tile each of K and of V widened.
    """
    tile = tiling.block_kv * head_dim
    narrow = kv_itemsize < itemsize
    ring = tiling.stages * 2 * (tile * kv_itemsize + (tiling.block_kv * 4 if narrow else 0))
    widened = 2 * tile * itemsize if narrow else 0
    return QUERY_ROWS * (head_dim * itemsize + (tiling.out_columns or head_dim) * 4 + 4) + ring + widened


def decode_tiling(head_dim: int, itemsize: int, kv_itemsize: int) -> DecodeTiling:
    """Returns the tiling for a head dimension and the bytes of a query's and a key's number: a table, never a query of the device.

    Two compute warpgroups where their accumulators and buffers fit, else one with all registers; then as many stages, up to four,
    as fit beside 1 KiB for barriers and alignment. Outputs of narrow pages leave in pieces, which makes room for the widened tiles.
    """
    wide = head_dim > 128
    pieces = 64 if kv_itemsize < itemsize else None
    tiling = DecodeTiling(compute_warpgroups=1 if wide else 2, out_columns=pieces, registers=None if wide else (232, 40))
    for stages in (4, 3, 2):
        fitting = dataclasses.replace(tiling, stages=stages)
        if fitting.compute_warpgroups * shared_memory(fitting, head_dim, itemsize, kv_itemsize) + 1024 <= SHARED_MEMORY:
            return fitting
    raise ValueError(f"head_dim is {head_dim}: no tiling fits in shared memory")
