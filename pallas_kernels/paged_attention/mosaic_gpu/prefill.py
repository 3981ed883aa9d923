"""Ragged prefill attention over pages for Hopper: rows of any number of query tokens, chunks of a longer context included.

On an H200 the causal prefill of 8,192 tokens (32 and 8 heads of 128) takes 945 us, 582 TFLOP/s; other shapes were never timed, and what is
said of the parts is derived, not measured, unless it names a card.

The shape is FlashAttention-3's (arXiv 2407.08608) as Pallas can write it; jax's ``attention_mgpu.py`` and tokamax's sm90 kernel showed how
two warpgroups take turns at the tensor cores through one barrier. Both read contiguous keys of equally long rows; pages, ragged rows, and
the hygiene that a shared pool needs are this kernel's own.

**Work.** A thread block has two compute warpgroups of 64 query tokens each and a memory warpgroup that feeds them with K and V. Both see
the same keys: of two heads of one kv head and the same 64 tokens where a kv head has an even number of query heads, else of one head and
128 tokens in a row. Two heads are preferred since short rows then leave no warpgroup idle and both end at the same key. A *unit* is such a
pair. Units are numbered kv head by kv head, so that those that run at one time read the same pages, from the L2 cache; within a row the
last tile comes first, since it sees the most keys. The grid has a thread block for each unit of a row that fills the step; one fits on a
multiprocessor at a time, and the hardware hands out the next to whoever is free, which balances a causal triangle better than a fixed
share each (8k tokens on an H100: 4 % faster than eight blocks a multiprocessor, 13 % faster than one). Many short rows have more units:
then a thread block with more than one fetches the next one's queries and keys while it finishes the last. Blocks without a unit zero the
tokens that belong to no row.

**Pages.** A K/V tile is a run of positions, whatever the page size: it is filled by copies of the longest multiple of 8 tokens that divides
a page and fits a tile, one TMA copy for each of K and V, straight from the interleaved pool. If such copies do not fill a tile of
``block_kv`` rows (pages of 40: three in 128) the rest is masked. Positions behind the row's last page read that page again: its lines are
at hand.

**Narrow pages.** Pages of float8 or int8 come into two buffers of their own, one for K and one for V, and the memory warpgroup widens each
tile to the queries' dtype into the rings, exactly, while the next one is on its way. A scale of all keys goes into the scores' factor and
one of all values into the last division; scales per token come beside their tiles and multiply scores and probabilities, so that nothing is
rounded twice. That is about 256 numbers a thread and tile of 128 keys at D = 128, some 1000 instructions, in the time of a tile's products
(about 3500 clocks).

**Masks.** Tiles wholly behind the last query or wholly before the window are not fetched; only tiles on an edge compute a mask. Value rows
behind ``kv_lens`` are zeroed in shared memory by the memory warpgroup before the compute warpgroups see them, since a probability of 0
times NaN is NaN. Masked keys may be NaN: a select drops their scores.

**Ragged rows.** Swizzled TMA tiles are 8 tokens high and start at multiples of 8, so a tile starts at the multiple of 8 at or before its
row's first token, and the last tile of the array is moved back to end with it. A tile that a row fills is stored by one copy; the tokens of
a tile at a row's start or end are copied one by one, ``D / 64`` lines of 128 bytes each, so that no other row's tokens are touched. That is
2 of 128 tiles of a row of 8192 tokens. Padded tiles and a gather afterwards would write, read and write all outputs: three times the bytes.
The log-sums do go that way (4 bytes a token and head; XLA drops the gather where nobody asks for them).

**Same bits in any batch.** Tiles of keys start at multiples of their size in the row's positions, each query row of a product depends on
that row alone, and a tile without a visible key changes nothing. So a token's result does not depend on where its row lies, on its place in
a tile, on other rows, or on how the prompt was cut into chunks.

**Arithmetic.** A unit does ``4 * 128 * D`` FLOP for each key it reads of ``4 * D`` bytes: 128 FLOP a byte, as FlashAttention-3. An H100 can
do about 300 for each byte from memory, so a kernel near its peak lives on the L2 cache: the ``G / 2`` units of a kv head and tile, and the
tiles of a row, run side by side. A multiprocessor does 16 exponentials a clock, so at D = 128 they take half as long as the products; the
turns hide them behind the other warpgroup's products. The soft cap costs two more such operations: tanh from exp2 and the square of a
reciprocal root, since the hardware's tanh is off by 2^-11, too much for a cap of 50.

| D | Q | K and V | outputs | lines | shared memory | accumulator, scores, probabilities in registers |
|---|---|---|---|---|---|---|
| 64 | 16 KiB | 4 stages x 2 x 16 KiB | 16 KiB | 16 KiB | 177 KiB | 32, 64, 32 of 224 |
| 128 | 32 KiB | 2 stages x 2 x 32 KiB | 32 KiB | 16 KiB | 209 KiB | 64, 64, 32 of 224 |
| 256 | 64 KiB | 2 stages x 2 x 32 KiB | in Q's | 16 KiB | 209 KiB | 128, 32, 16 of 224 |

Over narrow pages the outputs lie in Q's place from D = 128 on, to leave room for the buffers, at D = 256 K and V have one stage, and
compute warpgroups have 208 (216 at D = 256) registers.

As ptxas of CUDA 13 reports for jax 0.10.2: 168 registers at launch, which the warpgroups then trade, and no spills, but for D = 256 over
narrow pages (4 to 52 bytes). At D = 256 a loop over units would keep the addresses of its epilogue in registers and spill 8 bytes, so there
each unit has its thread block.

What jax's interpreter cannot show: that a wgmma is done before its operands are overwritten. K, V and queries are given back only after the
accumulator was read, which waits for it. jax's own kernel refuses causal masks under CUDA 12.8.0 to 12.9.1, whose ptxas miscompiles them;
whether this kernel is hit is not known. It was compiled with CUDA 13.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Num

LOG2E = math.log2(math.e)

ROWS = 64
"""Query tokens of a warpgroup's tile: the M of wgmma."""

_MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM)."""

_LANES = 64
"""Numbers of a 128-byte line of bf16 or fp16: the width of the swizzled tiles in shared memory."""

_IDS_AHEAD = 2
"""Page ids that the memory warpgroup holds in registers."""

_NO_KEY = -1e30
"""Maximum of no scores; finite, so that the difference of two is not NaN."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Static sizes of the kernel.

    The result's bits depend on ``block_kv`` only.

    Attributes:
        block_kv: Keys of a K/V tile in shared memory, a multiple of 64.
        stages: Tiles of K and of V in flight.
        separate_out: Whether the outputs have a buffer of their own, so that the next queries are fetched while they are stored.
        loops: Whether a thread block serves several units, if there are more than thread blocks; else there is one for each unit.
        num_ctas: Thread blocks that share the units, each taking every ``num_ctas``-th; None for as many as one row that fills
            the step has units. Only where it loops.
        compute_registers: Registers of a thread of a compute warpgroup. Twice these and once the next may come to 504.
        memory_registers: Registers of a thread of the memory warpgroup.
        p_smem: Whether the probabilities go through shared memory and the sums through a second accumulator, as jax's interpreter wants.
    """

    block_kv: int = 128
    stages: int = 2
    separate_out: bool = True
    loops: bool = True
    num_ctas: int | None = None
    compute_registers: int = 224
    memory_registers: int = 56
    p_smem: bool = False


class PrefillItems(NamedTuple):
    """The query tiles of a step, each row's last tile first, since the last ones see the most keys; and the same in pairs.

    Attributes:
        rows: Row of each tile.
        tiles: Number of each tile in its row.
        pair_rows: Row of each pair of tiles.
        pair_tiles: Number of the first tile of each pair, an even one.
        counts: How many tiles and pairs there are; what lies behind them is padding.
        first_slots: Each row's first place in the kernel's log-sums.
    """

    rows: Int[Array, " I"]
    tiles: Int[Array, " I"]
    pair_rows: Int[Array, " I"]
    pair_tiles: Int[Array, " I"]
    counts: Int[Array, " 2"]
    first_slots: Int[Array, " S"]


def default_tiling(head_dim: int, kv_itemsize: int = 2) -> Tiling:
    """Returns the sizes for a head dimension and the bytes of a stored number."""
    if kv_itemsize == 1:
        if head_dim <= 64:
            return Tiling(stages=4, compute_registers=208, memory_registers=88)
        if head_dim <= 128:
            return Tiling(separate_out=False, compute_registers=208, memory_registers=88)
        return Tiling(block_kv=64, stages=1, separate_out=False, loops=False, compute_registers=216, memory_registers=72)
    if head_dim <= 64:
        return Tiling(stages=4)
    if head_dim <= 128:
        return Tiling()
    return Tiling(block_kv=64, separate_out=False, loops=False)


def prefill_items(
    cu_q_lens: Int[Array, " S+1"],
    first_row: int | Int[Array, ""],
    end_row: int | Int[Array, ""],
    *,
    num_tokens: int,
    tiling: Tiling | None = None,
) -> PrefillItems:
    """Returns the query tiles of the rows from ``first_row`` to ``end_row``: once a step, for all layers.

    A tile starts at a multiple of 8 tokens, as swizzled TMA copies must, so a row's first tile may begin with up to 7 tokens of the row
    before it. Hence a row of n tokens has at most (n + 70) / 64 tiles.

    Args:
        cu_q_lens: Running sum of the rows' tokens.
        first_row: The first row to serve.
        end_row: One past the last row to serve.
        num_tokens: T, the size of the array of queries.
        tiling: Not needed: a tile is 64 tokens in every tiling.
    """
    del tiling
    num_rows = cu_q_lens.shape[0] - 1
    capacity = num_tokens // ROWS + num_rows + num_rows // 8 + 1
    row = jnp.arange(num_rows, dtype=jnp.int32)
    start, end = cu_q_lens[:-1], cu_q_lens[1:]
    tiles = (end - start // 8 * 8 + ROWS - 1) // ROWS
    tiles = jnp.where((row >= first_row) & (row < end_row) & (end > start), tiles, 0)

    def listed(numbers: Int[Array, " S"]) -> tuple[Int[Array, " I"], Int[Array, " I"], Int[Array, ""]]:
        ends = jnp.cumsum(numbers, dtype=jnp.int32)
        item = jnp.arange(capacity, dtype=jnp.int32)
        rows = jnp.searchsorted(ends, item, side="right", method="compare_all").astype(jnp.int32)
        rows = jnp.minimum(rows, num_rows - 1)
        return rows, jnp.maximum(ends[rows] - 1 - item, 0), ends[-1]

    rows, numbers, num_tiles = listed(tiles)
    pair_rows, pairs, num_pairs = listed((tiles + 1) // 2)
    first_slots = jnp.cumsum(tiles, dtype=jnp.int32) - tiles
    return PrefillItems(rows, numbers, pair_rows, 2 * pairs, jnp.stack([num_tiles, num_pairs]), first_slots)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known when the kernel is built, and what follows from it."""

    num_tokens: int
    num_rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: Any
    kv_dtype: Any
    token_scales: bool
    capacity: int
    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None
    tiling: Tiling

    @property
    def num_ctas(self) -> int:
        """Thread blocks of the grid: no more than there can be units, of which a list of ``capacity`` tiles or pairs has room.

        Where blocks loop it is the units of one row that fills the step, at least a block for each multiprocessor. So a prefill's units
        are handed out by the hardware one by one, while a step of single tokens, which has none, does not start thousands for nothing.
        """
        most = self.capacity * self.units_per_item * self.num_kv_heads
        if not self.tiling.loops:
            return most
        tiles = -(-self.num_tokens // ROWS)
        full = (tiles if self.paired_heads else -(-tiles // 2)) * self.units_per_item * self.num_kv_heads
        return min(most, self.tiling.num_ctas or max(_MULTIPROCESSORS, full))

    @property
    def cleared_heads(self) -> int:
        """Heads of a token that are zeroed at once, so that each of 128 threads has as many numbers."""
        return 1 if self.head_dim % 128 == 0 else 2

    @property
    def clears_padding(self) -> bool:
        """Whether the kernel zeroes the tokens of no row."""
        return self.num_heads % self.cleared_heads == 0

    @property
    def fetched_rows(self) -> int:
        """Query tokens that are fetched for a tile: all there are, if a tile is more. What lies behind them is never stored."""
        return min(ROWS, self.num_tokens)

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def paired_heads(self) -> bool:
        """Whether a unit is two heads of one tile, not one head of two tiles."""
        return self.group % 2 == 0

    @property
    def units_per_item(self) -> int:
        """Units of a tile, or pair of tiles, and kv head."""
        return self.group // 2 if self.paired_heads else self.group

    @property
    def copy_tokens(self) -> int:
        """Tokens of one TMA copy."""
        step = 32 if self.token_scales else 8  # copies of scales start at multiples of 128 bytes in shared memory
        return max(n for n in range(step, min(self.page_size, self.tiling.block_kv) + 1, step) if self.page_size % n == 0)

    @property
    def copies(self) -> int:
        """Copies of a K/V tile."""
        return self.tiling.block_kv // self.copy_tokens

    @property
    def tile_tokens(self) -> int:
        """Positions of a K/V tile: at most ``block_kv``."""
        return self.copies * self.copy_tokens

    @property
    def narrow(self) -> bool:
        """Whether pages are narrower than queries, so that the memory warpgroup widens them."""
        return self.kv_dtype != self.dtype

    @property
    def arrivals(self) -> int:
        """Arrivals that make a tile complete: its copies', or the memory warpgroup's and its scales'."""
        return (1 + self.copies * self.token_scales) if self.narrow else self.copies


class _Refs(NamedTuple):
    """The arrays in global memory; ``rows`` and ``tiles`` are those of single tiles or of pairs."""

    q: Any
    kv: Any
    kv_lens: Any
    tables: Any
    cu_q_lens: Any
    rows: Any
    tiles: Any
    counts: Any
    first_slots: Any
    sinks: Any
    factors: Any
    scales: Any
    out: Any
    lse: Any


class _Smem(NamedTuple):
    """Buffers in shared memory; q, out, line, lse and p have one part for each compute warpgroup, k and v one for each stage."""

    q: Any
    k: Any
    v: Any
    out: Any
    line: Any
    lse: Any
    p: Any
    raw: Any
    scales: Any


class _Barriers(NamedTuple):
    """Who waits for whom.

    Attributes:
        q_full: Queries have come; one for each compute warpgroup.
        q_free: Both compute warpgroups are done with their queries.
        k_full: A stage's keys have come.
        v_full: A stage's values have come and are clean; the last one is for values that the memory warpgroup has yet to clean.
        k_free: Both compute warpgroups are done with a stage's keys.
        v_free: The same for its values.
        turn: The compute warpgroups' turns at the tensor cores.
        raw_full: A tile that is to be widened has come; one for K and one for V.
    """

    q_full: Any
    q_free: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    turn: Any
    raw_full: Any


class _Unit(NamedTuple):
    """What one thread block does at a time: one kv head's keys for a tile of two heads, or for two tiles of one head.

    Attributes:
        row: The row.
        slot: Slot of the first tile's log-sums.
        kv_head: The key/value head.
        head: The first query head.
        nominal: First token of the first tile; it may lie before the row's start.
        start: The row's first token.
        end: One past the row's last token.
        kv_len: Keys of the row.
        lower: First K/V tile.
        upper: One past the last K/V tile.
    """

    row: Any
    slot: Any
    kv_head: Any
    head: Any
    nominal: Any
    start: Any
    end: Any
    kv_len: Any
    lower: Any
    upper: Any


class _Tile(NamedTuple):
    """A warpgroup's part of a unit.

    Attributes:
        base: The first token that is fetched.
        first: The first token that is the tile's own.
        head: The query head.
        slot: Slot of the log-sums.
    """

    base: Any
    first: Any
    head: Any
    slot: Any


def _i32(x: int) -> Any:
    """Returns a typed constant: ``lax`` does not promote."""
    return jnp.int32(x)


def _units_per_kv_head(plan: _Plan, refs: _Refs) -> Any:
    return refs.counts[0 if plan.paired_heads else 1] * _i32(plan.units_per_item)


def _unit(plan: _Plan, refs: _Refs, index: Any) -> _Unit:
    """Returns the ``index``-th unit of the grid."""
    per_head = _units_per_kv_head(plan, refs)
    kv_head = lax.div(index, per_head)
    rest = index - kv_head * per_head
    item = lax.div(rest, _i32(plan.units_per_item))
    part = rest - item * _i32(plan.units_per_item)
    row, number = refs.rows[item], refs.tiles[item]
    start, end = refs.cu_q_lens[row], refs.cu_q_lens[row + 1]
    kv_len = refs.kv_lens[row]
    nominal = start - lax.rem(start, _i32(8)) + number * ROWS
    stop = jnp.minimum(nominal + (ROWS if plan.paired_heads else 2 * ROWS), end)
    upper = lax.div(jnp.maximum(stop + kv_len - end, 0) + (plan.tile_tokens - 1), _i32(plan.tile_tokens))
    lower = _i32(0)
    if plan.sliding_window is not None:
        oldest = jnp.maximum(nominal, start) + kv_len - end - (plan.sliding_window - 1)
        lower = lax.div(jnp.maximum(oldest, 0), _i32(plan.tile_tokens))
    return _Unit(
        row=row,
        slot=refs.first_slots[row] + number,
        kv_head=kv_head,
        head=kv_head * plan.group + (2 * part if plan.paired_heads else part),
        nominal=nominal,
        start=start,
        end=end,
        kv_len=kv_len,
        lower=lower,
        upper=jnp.maximum(upper, lower + 1),  # a row without keys has a tile too, so that every unit is alike
    )


def _tile(plan: _Plan, unit: _Unit, wg: Any) -> _Tile:
    """Returns the part of warpgroup ``wg``; fetching stays within the array."""
    nominal = unit.nominal if plan.paired_heads else unit.nominal + wg * ROWS
    return _Tile(
        base=jnp.minimum(nominal, _i32(plan.num_tokens - plan.fetched_rows)),
        first=jnp.maximum(nominal, unit.start),
        head=unit.head + wg if plan.paired_heads else unit.head,
        slot=unit.slot if plan.paired_heads else unit.slot + wg,
    )


def _fetch(plan: _Plan, refs: _Refs, smem: _Smem, bars: _Barriers, cta: Any) -> None:
    """The memory warpgroup: fetches queries and pages."""
    stages = plan.tiling.stages
    if not plan.narrow:
        _clear_unused_rows(plan, smem)

    def unit_body(is_first: Any, unit: _Unit, ring: Any) -> Any:
        @pl.when(jnp.logical_not(is_first))
        def _() -> None:
            plgpu.barrier_wait(bars.q_free)

        for w in range(2):
            tile = _tile(plan, unit, w)
            source = refs.q.at[pl.ds(pl.multiple_of(tile.base, 8), plan.fetched_rows), tile.head]
            plgpu.copy_gmem_to_smem(source, smem.q.at[w, pl.ds(0, plan.fetched_rows)], bars.q_full.at[w])

        stream = _stream_widened if plan.narrow else _stream
        stream(plan, refs, smem, bars, unit, ring)
        return ring + unit.upper - unit.lower

    units, tiles = _loop_over_units(plan, refs, cta, unit_body)

    # What was freed is seen before the barriers go.
    def drain(place: Any, _: Any) -> None:
        slot = lax.rem(place, _i32(stages))
        plgpu.barrier_wait(bars.k_free.at[slot])
        plgpu.barrier_wait(bars.v_free.at[slot])

    lax.fori_loop(jnp.maximum(tiles - stages, 0), tiles, drain, None)

    @pl.when(units > 0)
    def _() -> None:
        plgpu.barrier_wait(bars.q_free)


def _stream(plan: _Plan, refs: _Refs, smem: _Smem, bars: _Barriers, unit: _Unit, ring: Any) -> None:
    """Fetches a unit's K and V into the rings, of which ``ring`` tiles were used before."""
    stages = plan.tiling.stages

    def tile_body(i: Any, ids: tuple[Any, ...]) -> tuple[Any, ...]:
        place = ring + i - unit.lower
        slot = lax.rem(place, _i32(stages))
        next_ids = _page_ids(plan, refs, unit, i + 1)

        @pl.when(place >= stages)
        def _() -> None:
            plgpu.barrier_wait(bars.k_free.at[slot])

        _copy_tile(plan, refs, unit, i, ids, 0, smem.k, slot, bars.k_full.at[slot])

        @pl.when(place >= stages)
        def _() -> None:
            plgpu.barrier_wait(bars.v_free.at[slot])

        full = jnp.where((i + 1) * plan.tile_tokens <= unit.kv_len, slot, _i32(stages))
        _copy_tile(plan, refs, unit, i, ids, 1, smem.v, slot, bars.v_full.at[full])
        return next_ids

    lax.fori_loop(unit.lower, unit.upper, tile_body, _page_ids(plan, refs, unit, unit.lower))
    left = unit.kv_len - (unit.upper - 1) * plan.tile_tokens

    # Only a last tile can reach beyond the row's keys. Here, and not in the loop, there are registers left for it.
    @pl.when(left < plan.tile_tokens)
    def _() -> None:
        slot = lax.rem(ring + unit.upper - unit.lower - 1, _i32(stages))
        plgpu.barrier_wait(bars.v_full.at[stages])
        _clear_rows(plan, smem.v.at[slot], left)
        plgpu.commit_smem()
        for _c in range(plan.copies):
            plgpu.barrier_arrive(bars.v_full.at[slot])


def _stream_widened(plan: _Plan, refs: _Refs, smem: _Smem, bars: _Barriers, unit: _Unit, ring: Any) -> None:
    """The same with pages narrower than the queries: what has come is widened while the next is on its way."""
    stages = plan.tiling.stages
    rings = ((smem.k, bars.k_full, bars.k_free), (smem.v, bars.v_full, bars.v_free))

    def fetch(i: Any, which: int, ids: tuple[Any, ...]) -> None:
        _copy_tile(plan, refs, unit, i, ids, which, smem.raw, which, bars.raw_full.at[which])

    first_ids = _page_ids(plan, refs, unit, unit.lower)
    for which in range(2):
        fetch(unit.lower, which, first_ids)

    def tile_body(i: Any, ids: tuple[Any, ...]) -> tuple[Any, ...]:
        place = ring + i - unit.lower
        slot = lax.rem(place, _i32(stages))
        next_ids = _page_ids(plan, refs, unit, i + 1)
        for which, (tiles, full, free) in enumerate(rings):
            plgpu.barrier_wait(bars.raw_full.at[which])
            pl.when(place >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            if plan.token_scales:
                plgpu.commit_smem()  # the scales that were here were read by ordinary loads
                _copy_scales(plan, refs, unit, i, ids, which, smem.scales.at[which], slot, full.at[slot])
            left = jnp.minimum(unit.kv_len - i * plan.tile_tokens, plan.tile_tokens) if which == 1 else None
            _widen(plan, smem.raw, which, tiles, slot, left)
            plgpu.commit_smem()
            plgpu.barrier_arrive(full.at[slot])
            pl.when(i + 1 < unit.upper)(functools.partial(fetch, i + 1, which, next_ids))
        return next_ids

    lax.fori_loop(unit.lower, unit.upper, tile_body, first_ids)


def _widen(plan: _Plan, raw: Any, source: Any, tiles: Any, slot: Any, left: Any | None) -> None:
    """Writes a tile in the queries' dtype; of float8, which has a NaN, the rows from ``left`` on become zero."""
    layout = plgpu.Layout.WGMMA_8BIT
    for r in range(0, plan.tiling.block_kv, _LANES):
        for c in range(0, plan.head_dim, _LANES):
            here = (pl.ds(r, _LANES), pl.ds(c, _LANES))
            numbers = plgpu.layout_cast(raw[source, *here], layout)
            if plan.kv_dtype == jnp.float8_e4m3fn:
                numbers = numbers.astype(jnp.float16)
                if plan.dtype == jnp.bfloat16:
                    numbers = numbers.astype(jnp.float32)
            numbers = numbers.astype(plan.dtype)
            if left is not None and plan.kv_dtype == jnp.float8_e4m3fn:
                rows = plgpu.broadcasted_iota(jnp.int32, numbers.shape, 0, layout=layout)
                numbers = jnp.where(rows + r < left, numbers, jnp.zeros_like(numbers))
            tiles[slot, *here] = numbers


def _copy_scales(
    plan: _Plan, refs: _Refs, unit: _Unit, i: Any, ids: tuple[Any, ...], which: int, target: Any, slot: Any, barrier: Any
) -> None:
    """Starts the copies of the scales of a tile's tokens."""

    def start(c: Any, page: Any) -> None:
        source = refs.scales[which].at[page, unit.kv_head, _tokens_in_page(plan, i, c)]
        plgpu.copy_gmem_to_smem(source, target.at[slot, pl.ds(c * plan.copy_tokens, plan.copy_tokens)], barrier)

    _for_copies(plan, refs, unit, i, ids, start)


def _page_id(plan: _Plan, refs: _Refs, unit: _Unit, i: Any, copy: Any) -> Any:
    """Returns the page of a tile's ``copy``-th part; behind the row's last page, that one again, whose lines are at hand."""
    place = lax.div(i * plan.tile_tokens + copy * plan.copy_tokens, _i32(plan.page_size))
    last = lax.div(jnp.maximum(unit.kv_len - 1, 0), _i32(plan.page_size))
    return refs.tables[unit.row, jnp.minimum(place, last)]


def _page_ids(plan: _Plan, refs: _Refs, unit: _Unit, i: Any) -> tuple[Any, ...]:
    """Reads the ids of a tile's first pages ahead of time; reading one brings its neighbours into the L1 cache."""
    return tuple(_page_id(plan, refs, unit, i, _i32(c)) for c in range(min(plan.copies, _IDS_AHEAD)))


def _copy_tile(
    plan: _Plan, refs: _Refs, unit: _Unit, i: Any, ids: tuple[Any, ...], which: int, target: Any, slot: Any, barrier: Any
) -> None:
    """Starts the copies of a K (0) or V (1) tile, each of which arrives at ``barrier`` once."""

    def start(c: Any, page: Any) -> None:
        source = refs.kv.at[page, _tokens_in_page(plan, i, c), 2 * unit.kv_head + which]
        plgpu.copy_gmem_to_smem(source, target.at[slot, pl.ds(c * plan.copy_tokens, plan.copy_tokens)], barrier)

    _for_copies(plan, refs, unit, i, ids, start)


def _tokens_in_page(plan: _Plan, i: Any, copy: Any) -> Any:
    offset = lax.rem(i * plan.tile_tokens + copy * plan.copy_tokens, _i32(plan.page_size))
    return pl.ds(pl.multiple_of(offset, 8), plan.copy_tokens)


def _for_copies(plan: _Plan, refs: _Refs, unit: _Unit, i: Any, ids: tuple[Any, ...], start: Any) -> None:
    """Calls ``start(copy, page)`` for each copy of a tile, of which ``ids`` are the first pages."""
    for c, page in enumerate(ids):
        start(c, page)
    if plan.copies > len(ids):
        lax.fori_loop(len(ids), plan.copies, lambda c, _: start(c, _page_id(plan, refs, unit, i, c)), None)


def _loop_over_units(plan: _Plan, refs: _Refs, cta: Any, body: Any) -> tuple[Any, Any]:
    """Runs ``body(is_first, unit, tiles so far)`` for the thread block's units; returns how many there were, and their tiles."""
    units = _units_per_kv_head(plan, refs) * _i32(plan.num_kv_heads)
    ctas = plan.num_ctas
    if not plan.tiling.loops:
        mine = (cta < units).astype(jnp.int32)
        return mine, lax.cond(mine > 0, lambda: body(True, _unit(plan, refs, cta), _i32(0)), lambda: _i32(0))
    mine = lax.div(jnp.maximum(units - cta + (ctas - 1), 0), _i32(ctas))
    return mine, lax.fori_loop(0, mine, lambda j, ring: body(j == 0, _unit(plan, refs, cta + j * ctas), ring), _i32(0))


def _clear_rows(plan: _Plan, tile: Any, first: Any) -> None:
    """Zeroes the rows of a V tile from ``first`` on: a probability of 0 does not keep a NaN out of the sum."""
    for r in range(0, plan.tiling.block_kv, _LANES):

        @pl.when(first < r + _LANES)
        def _(r: int = r) -> None:
            for c in range(0, plan.head_dim, _LANES):
                part = tile.at[pl.ds(r, _LANES), pl.ds(c, _LANES)]
                rows = plgpu.broadcasted_iota(jnp.int32, (_LANES, _LANES), 0, layout=plgpu.Layout.WGMMA)
                part[...] = jnp.where(rows + r < first, part[...], jnp.zeros((), plan.dtype))


def _clear_unused_rows(plan: _Plan, smem: _Smem) -> None:
    """Zeroes, once, the rows of the V tiles that no copy fills."""
    if plan.tile_tokens == plan.tiling.block_kv:
        return
    zeros = plgpu.layout_cast(jnp.zeros((_LANES, _LANES), plan.dtype), plgpu.Layout.WGMMA)
    for stage in range(plan.tiling.stages):
        for r in range(plan.tile_tokens // _LANES * _LANES, plan.tiling.block_kv, _LANES):
            for c in range(0, plan.head_dim, _LANES):
                smem.v[stage, pl.ds(r, _LANES), pl.ds(c, _LANES)] = zeros
    plgpu.commit_smem()


def _attend(plan: _Plan, refs: _Refs, smem: _Smem, bars: _Barriers, cta: Any, wg: Any) -> None:
    """A compute warpgroup: online softmax over its tile's keys, in base 2 and float32."""
    stages, block_kv, dim = plan.tiling.stages, plan.tiling.block_kv, plan.head_dim
    shape = (ROWS, block_kv)
    q_smem, out_smem, line_smem, lse_smem = smem.q.at[wg], smem.out.at[wg], smem.line.at[wg], smem.lse.at[wg]

    def take_turn() -> None:
        plgpu.barrier_arrive(bars.turn)
        plgpu.barrier_wait(bars.turn)

    def unit_body(_: Any, unit: _Unit, ring: Any) -> Any:
        tile = _tile(plan, unit, wg)
        position = tile.base + unit.kv_len - unit.end  # of the tile's first row
        plgpu.barrier_wait(bars.q_full.at[wg])
        scale = plan.sm_scale * LOG2E
        if refs.factors is not None:
            scale = refs.factors[0] * scale

        def tile_body(i: Any, carry: Any) -> Any:
            acc, top, total = carry
            slot = lax.rem(ring + i - unit.lower, _i32(stages))
            plgpu.barrier_wait(bars.k_full.at[slot])

            def scores(ref: Any) -> Any:
                plgpu.wgmma(ref, q_smem, smem.k.at[slot].T)
                take_turn()
                return ref[...]

            s = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
            if plan.token_scales:
                s = s * _of_keys(smem.scales[0, slot], shape)
            plgpu.barrier_arrive(bars.k_free.at[slot])
            if plan.tiling.separate_out:
                pl.when(i == unit.upper - 1)(functools.partial(plgpu.barrier_arrive, bars.q_free))
            s, factor = _capped(plan, s, scale)
            s = _mask(plan, s, position - i * plan.tile_tokens)
            new_top = jnp.maximum(top, s.max(axis=1) * factor)
            decay = jnp.exp2(top - new_top)
            p = jnp.exp2(s * factor - lax.broadcast_in_dim(new_top, shape, [0]))
            acc = acc * lax.broadcast_in_dim(decay, (ROWS, dim), [0])
            total = total * decay + p.sum(axis=1)
            if plan.token_scales:
                plgpu.barrier_wait(bars.v_full.at[slot])
                p = jnp.where(p > 0, p * _of_keys(smem.scales[1, slot], shape), 0.0)  # scales of no key may be NaN
            p = p.astype(plan.dtype)
            if plan.tiling.p_smem:
                smem.p[wg] = p
                plgpu.commit_smem()
            plgpu.barrier_arrive(bars.turn)
            if not plan.token_scales:
                plgpu.barrier_wait(bars.v_full.at[slot])
            plgpu.barrier_wait(bars.turn)
            acc = _add_values(acc, smem.p.at[wg] if plan.tiling.p_smem else p, smem.v.at[slot], in_place=not plan.tiling.p_smem)
            plgpu.barrier_arrive(bars.v_free.at[slot])
            return acc, new_top, total

        pl.when(wg == 1)(take_turn)
        zeros = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), plgpu.Layout.WGMMA)
        acc, top, total = lax.fori_loop(unit.lower, unit.upper, tile_body, (zeros, _of_rows(_NO_KEY), _of_rows(0.0)))
        # Within the unit: a turn left over would wait for the other's next unit, whose queries may wait for this one's outputs.
        pl.when(wg == 0)(take_turn)
        acc, lse = _finish(refs, tile, acc, top, total)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem[...] = acc.astype(plan.dtype)
        lse_smem[...] = lse
        plgpu.commit_smem()
        _store(plan, refs, tile, unit.end, out_smem, line_smem, lse_smem)
        if not plan.tiling.separate_out:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(bars.q_free)

        return ring + unit.upper - unit.lower

    _loop_over_units(plan, refs, cta, unit_body)
    plgpu.wait_smem_to_gmem(0)


def _clear_padding(plan: _Plan, refs: _Refs, place: Any) -> None:
    """Zeroes the tokens behind the last row; ``place`` is the warpgroup's among all. Mostly it is thread blocks without units that do."""
    shape = (plan.cleared_heads, plan.head_dim)
    numbers = math.prod(shape) // 128
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=numbers)
    zeros = plgpu.layout_cast(jnp.zeros(shape, plan.dtype), layout)
    blocks = plan.num_heads // plan.cleared_heads
    first = refs.cu_q_lens[plan.num_rows]

    def clear(i: Any, _: Any) -> None:
        index = place + i * _i32(2 * plan.num_ctas)
        token = first + lax.div(index, _i32(blocks))
        refs.out[token, pl.ds(lax.rem(index, _i32(blocks)) * plan.cleared_heads, plan.cleared_heads)] = zeros

    left = (plan.num_tokens - first) * blocks - place
    lax.fori_loop(0, lax.div(jnp.maximum(left, 0) + (2 * plan.num_ctas - 1), _i32(2 * plan.num_ctas)), clear, None)


def _add_values(acc: Any, p: Any, v: Any, *, in_place: bool) -> Any:
    """Returns ``acc + p @ v``."""
    if in_place:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, p, v))(plgpu.ACC.init(acc))

    def product(ref: Any) -> Any:
        plgpu.wgmma(ref, p, v)
        return ref[...]

    return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))


def _of_rows(x: Any) -> Any:
    """Returns a number for each row of a tile, laid out as a product's row sums."""
    return plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _of_keys(x: Any, shape: tuple[int, int]) -> Any:
    """Repeats a number for each key over the rows of scores."""
    return lax.broadcast_in_dim(plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(0)), shape, [1])


def _mask(plan: _Plan, s: Any, position: Any) -> Any:
    """Drops the scores of keys that a query does not see; ``position`` is the first query's, counted from the first key."""
    block_kv, window = plan.tiling.block_kv, plan.sliding_window

    def masked(s: Any) -> Any:
        row = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA)
        column = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
        behind = position + row - column
        seen = behind >= 0
        if window is not None:
            seen = seen & (behind < window)
        if plan.tile_tokens != block_kv:
            seen = seen & (column < plan.tile_tokens)
        return jnp.where(seen, s, -jnp.inf)

    if plan.tile_tokens != block_kv:
        return masked(s)
    on_edge = position < block_kv - 1
    if window is not None:
        on_edge = on_edge | (position + (ROWS - 1) >= window)
    return lax.cond(on_edge, masked, lambda s: s, s)


def _finish(refs: _Refs, tile: _Tile, acc: Any, top: Any, total: Any) -> tuple[Any, Any]:
    """Returns outputs and log-sums, 0 and -inf for queries without a key, sink or not."""
    some = total > 0
    if refs.sinks is not None:
        sink = _of_rows(refs.sinks[tile.head])
        new_top = jnp.maximum(top, sink)
        decay = jnp.exp2(top - new_top)
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
        total = total * decay + jnp.exp2(sink - new_top)
        top = new_top
    total = jnp.where(some, total, 1.0)
    inverse = 1.0 / total
    if refs.factors is not None:
        inverse = inverse * refs.factors[1]
    lse = jnp.where(some, top * (1 / LOG2E) + jnp.log(total), -jnp.inf)
    return acc * lax.broadcast_in_dim(inverse, acc.shape, [0]), lse


def _capped(plan: _Plan, s: Any, scale: Any) -> tuple[Any, Any]:
    """Returns scores and the factor that takes them to base 2."""
    if plan.soft_cap is None:
        return (s, scale) if plan.sm_scale > 0 else (s * scale, 1.0)
    power = jnp.exp2(s * (scale * (2.0 / plan.soft_cap)))
    root = lax.rsqrt(1.0 + power)
    return (plan.soft_cap * LOG2E) * (1.0 - 2.0 * (root * root)), 1.0


def _store(plan: _Plan, refs: _Refs, tile: _Tile, end: Any, out_smem: Any, line_smem: Any, lse_smem: Any) -> None:
    """Stores a tile's own tokens, and no others."""
    low = tile.first - tile.base
    high = jnp.minimum(end - tile.base, ROWS)

    if plan.fetched_rows == ROWS:

        @pl.when((low == 0) & (high == ROWS))
        def _() -> None:
            plgpu.copy_smem_to_gmem(out_smem, refs.out.at[pl.ds(pl.multiple_of(tile.base, 8), ROWS), tile.head])

    @pl.when((low < high) & ((low > 0) | (high < ROWS)))
    def _() -> None:
        for c in range(0, plan.head_dim, _LANES):
            line_smem[...] = out_smem[:, pl.ds(c, _LANES)]
            plgpu.commit_smem()

            def row_body(r: Any, _: Any, c: int = c) -> None:
                row = refs.out.at[pl.ds(tile.base + r, 1), tile.head, pl.ds(c, _LANES)]
                plgpu.copy_smem_to_gmem(line_smem.at[pl.ds(r, 1)], row)

            lax.fori_loop(low, high, row_body, None)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(low < high)
    def _() -> None:
        plgpu.copy_smem_to_gmem(lse_smem, refs.lse.at[tile.head, tile.slot])


def _entry(plan: _Plan, has_sinks: bool, has_factors: bool, *refs: Any) -> None:
    """The kernel: allocates shared memory and parts the warpgroups."""
    others = list(refs[9:-2])
    sinks = others.pop(0) if has_sinks else None
    factors = others.pop(0) if has_factors else None
    named = _Refs(*refs[:9], sinks, factors, others, *refs[-2:])
    tiling = plan.tiling
    swizzled = (plgpu.TilingTransform((8, _LANES)), plgpu.SwizzleTransform(128))

    def tile(*shape: int) -> Any:
        return plgpu.SMEM(shape, plan.dtype, transforms=swizzled)

    kv_shape = (tiling.stages, tiling.block_kv, plan.head_dim)
    q_shape = (2, ROWS, plan.head_dim)
    smem = {
        "q": tile(*q_shape),
        "k": tile(*kv_shape),
        "v": tile(*kv_shape),
        "line": plgpu.SMEM((2, ROWS, _LANES), plan.dtype),
        "lse": plgpu.SMEM((2, ROWS), jnp.float32),
    }
    if tiling.separate_out:
        smem["out"] = tile(*q_shape)
    if plan.narrow:
        halved = (plgpu.TilingTransform((8, _LANES)), plgpu.SwizzleTransform(64))
        smem["raw"] = plgpu.SMEM((2, tiling.block_kv, plan.head_dim), plan.kv_dtype, transforms=halved)
    if plan.token_scales:
        smem["scales"] = plgpu.SMEM((2, tiling.stages, tiling.block_kv), jnp.float32)
    if tiling.p_smem:
        smem["p"] = tile(2, ROWS, tiling.block_kv)
    barriers = _Barriers(
        q_full=plgpu.Barrier(num_arrivals=1, num_barriers=2),
        q_free=plgpu.Barrier(num_arrivals=2),
        k_full=plgpu.Barrier(num_arrivals=plan.arrivals, num_barriers=tiling.stages),
        v_full=plgpu.Barrier(num_arrivals=plan.arrivals, num_barriers=tiling.stages + 1),
        k_free=plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
        v_free=plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
        turn=plgpu.Barrier(num_arrivals=2),
        raw_full=plgpu.Barrier(num_arrivals=plan.copies, num_barriers=2),
    )

    def body(buffers: dict[str, Any], bars: _Barriers) -> None:
        buffers = {"out": buffers["q"], "p": None, "raw": None, "scales": None, **buffers}
        scratch = _Smem(**buffers)
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")

        @pl.when(wg < 2)
        def _() -> None:
            plgpu.set_max_registers(tiling.compute_registers, action="increase")
            _attend(plan, named, scratch, bars, cta, wg)
            if plan.clears_padding:
                _clear_padding(plan, named, 2 * cta + wg)

        @pl.when(wg == 2)
        def _() -> None:
            plgpu.set_max_registers(tiling.memory_registers, action="decrease")
            _fetch(plan, named, scratch, bars, cta)

    pl.run_scoped(body, smem, barriers, collective_axes="wg")


def prefill_attention(
    q: Float[Array, "T H D"],
    kv_pages: Num[Array, "N B 2K D"],
    kv_lens: Int[Array, " S"],
    block_tables: Int[Array, "S P"],
    cu_q_lens: Int[Array, " S+1"],
    first_row: int | Int[Array, ""],
    end_row: int | Int[Array, ""],
    items: PrefillItems,
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    k_scale: float | Float[Array, ""] | Float[Array, "N K B"] | None = None,
    v_scale: float | Float[Array, ""] | Float[Array, "N K B"] | None = None,
    tiling: Tiling | None = None,
) -> tuple[Float[Array, "T H D"], Float[Array, "T H"]]:
    """Attends the tokens of the rows from ``first_row`` to ``end_row``.

    Args:
        q: Query tokens, bfloat16 or float16; D a multiple of 64 up to 256.
        kv_pages: The pool, of q's dtype, float8_e4m3fn or int8; pages of a multiple of 8 tokens, of 32 with scales per token.
        kv_lens: Keys of each row.
        block_tables: Page ids of each row; all of them valid.
        cu_q_lens: Running sum of the rows' tokens.
        first_row: The first row to serve.
        end_row: One past the last row to serve.
        items: What ``prefill_items`` returned for the same rows.
        sm_scale: Multiplies the scores.
        sliding_window: Positions that a query sees.
        soft_cap: Bound of the scores.
        sinks: A score of each head, in base 2, that joins the sum.
        k_scale: What stored keys are multiplied with: a positive scalar, or float32 ``[N, K, B]`` for narrow pages.
        v_scale: The same of values; of the same kind.
        tiling: Sizes; None for the default of D.

    Returns:
        Outputs and log-sums; zeros for tokens behind the last row, and whatever memory held for tokens of rows that are not served.
    """
    del first_row, end_row  # the items know
    num_tokens, num_heads, head_dim = q.shape
    padded = -(-num_tokens // 8) * 8
    if padded != num_tokens:
        q = jnp.pad(q, ((0, padded - num_tokens), (0, 0), (0, 0)))
    token_scales = k_scale is not None and jnp.ndim(k_scale) == 3
    plan = _Plan(
        num_tokens=padded,
        num_rows=kv_lens.shape[0],
        num_heads=num_heads,
        num_kv_heads=kv_pages.shape[2] // 2,
        capacity=items.rows.shape[0],
        head_dim=head_dim,
        page_size=kv_pages.shape[1],
        dtype=q.dtype,
        kv_dtype=kv_pages.dtype,
        token_scales=token_scales,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        tiling=tiling or default_tiling(head_dim, kv_pages.dtype.itemsize),
    )
    operands = [q, kv_pages, kv_lens, block_tables, cu_q_lens]
    operands += [*(items[:2] if plan.paired_heads else items[2:4]), items.counts, items.first_slots]
    if sinks is not None:
        operands.append(sinks)
    has_factors = not token_scales and (k_scale is not None or v_scale is not None)
    if has_factors:
        operands.append(jnp.stack([jnp.asarray(1.0 if s is None else s, jnp.float32) for s in (k_scale, v_scale)]))
    if token_scales:
        operands += [k_scale, v_scale]
    out, lse_tiles = plgpu.kernel(
        functools.partial(_entry, plan, sinks is not None, has_factors),
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((num_heads, plan.capacity, ROWS), jnp.float32),
        ],
        grid=(plan.num_ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        kernel_name="paged_attention_prefill",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)
    if not plan.clears_padding:
        out = jnp.where((jnp.arange(padded) < cu_q_lens[-1])[:, None, None], out, jnp.zeros((), out.dtype))
    return out[:num_tokens], _token_lse(lse_tiles, cu_q_lens, items, num_tokens=num_tokens, padded=padded)


def _token_lse(
    lse_tiles: Float[Array, "H I 64"], cu_q_lens: Int[Array, " S+1"], items: PrefillItems, *, num_tokens: int, padded: int
) -> Float[Array, "T H"]:
    """Takes each token's log-sum from its tile's."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.searchsorted(cu_q_lens[1:], token, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, cu_q_lens.shape[0] - 2)
    aligned = cu_q_lens[row] // 8 * 8
    tile = (token - aligned) // ROWS
    offset = token - jnp.minimum(aligned + tile * ROWS, max(0, padded - ROWS))
    return lse_tiles[:, jnp.clip(items.first_slots[row] + tile, 0, lse_tiles.shape[1] - 1), jnp.clip(offset, 0, ROWS - 1)].T
