"""Split-KV attention of single-token rows over pages for Hopper, in Mosaic GPU.

Two kernels. The first one attends the splits of the work list, each by one warpgroup, and writes an output and a log-sum of each
in float32; the second one merges a row's splits, always in the same order, and adds the sinks. Since splits have a fixed size in
tokens, a row's bits do not depend on the rows beside it. Splitting along the keys is Flash-Decoding's idea (Dao et al. 2023); the
softmax is the online one of Milakov and Gimelshein (arXiv 1805.02867), the division of labour between warpgroups FlashAttention-3's
(arXiv 2407.08608), as openxla/tokamax (tokamax/_src/ops/attention/pallas_mosaic_gpu_kernel_sm90.py) writes it in Pallas.

The first kernel runs one block on each multiprocessor, for the whole list. A block has one memory warpgroup, which streams pages
into rings of K and V tiles, and one or two compute warpgroups ("streams"), each with an item and a ring of its own:

    memory warpgroup            compute warpgroup, for each tile of its item
    ----------------            --------------------------------------------
    wait until K, V are free    wait for K;  S = Q K^T (wgmma, 64 rows of which the first heads are real);  K is free
    one TMA a page for K        soft cap, mask, online softmax in registers, base 2
    one TMA a page for V        wait for V;  [clear V behind the row's end];  O = O * decay + P V (wgmma);  V is free

Where 64 tokens are several pages there are as many copies, and the barrier counts them; where they are part of a page, part of it
is copied. A page is fetched from the interleaved pool as it lies, ``kv_pages[page, :, 2 * head]``: runs of D numbers, 64 to 512
bytes, which are whole sectors. Pages narrower than the queries (float8, int8) are widened tile by tile through registers into a second
buffer, from which wgmma reads. Copies that lie behind a row's end fetch its last tokens again, so that their number is fixed.

What bounds it: a row of n keys moves 2 * n * K * D * itemsize bytes, and its partial results ceil(n / split) * H * D * 4 bytes
twice, 3 % of that for 4 query heads a key/value head, D 128, bfloat16 and splits of 256, mostly inside the second-level cache. At
4.3 TB/s (an H200's copy rate) a multiprocessor has about 1 us for the 32 KiB of a tile of 64 keys; its products take
64 * 64 * 128 * 2 multiply-adds, a quarter of what wgmma does in that time, with 15/16 of them wasted on empty rows at 4 heads a key/value
head. Two streams leave 64 KiB under way while both compute; about 30 KiB hide 0.7 us of latency at that rate. Measured on an H200 at
32 rows of 4,096 tokens (32 and 8 heads of 128): the first kernel 135 us, which is 91 % of the copy rate, the second 5.

Shared memory of D 128, bfloat16, two streams of two stages: 2 * (queries 16 + outputs 32 + K 32 + V 32) = 224 KiB of 227.
Registers, as ptxas of CUDA 13 reports for jax 0.10.2: 168 a thread at launch, which ``setmaxnreg`` turns into 232 for compute and 40
for memory; up to 255 for D above 128 with one stream. Nothing is spilled, but for 50 to 80 bytes with D 256 over narrow pages.
A tile of 64 keys takes about 420 instructions of each compute warp (D 128, bfloat16).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.paged_attention.mosaic_gpu.tilings import QUERY_ROWS, DecodeTiling
from pallas_kernels.paged_attention.mosaic_gpu.work_list import DecodeItems, split_tokens

LOG2E = math.log2(math.e)

_NO_KEY = -1e30
"""Maximum of no scores; finite, so that the difference of two is not NaN."""

_COLUMNS = 64
"""Numbers of a row that are in registers at once where a tile of V is rewritten: as many as lie together in a swizzled tile."""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static in a call: sizes, dtypes, options and the tiling."""

    group: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    split: int
    num_rows: int
    num_items: int
    flat_queries: int
    sliding_window: int | None
    soft_cap: float | None
    dtype: Any
    kv_dtype: Any
    token_scales: bool
    tiling: DecodeTiling

    @property
    def num_heads(self) -> int:
        return self.group * self.num_kv_heads

    @property
    def chunk(self) -> int:
        """Tokens that one copy fetches: they are consecutive in a page and in a tile, wherever both begin."""
        return math.gcd(self.page_size, self.tiling.block_kv)

    @property
    def copies(self) -> int:
        return self.tiling.block_kv // self.chunk

    @property
    def query_rows(self) -> int:
        """Rows of Q, a token's head each, that are copied for one key/value head, its neighbours' among them."""
        return query_rows(self.group)

    @property
    def widens(self) -> bool:
        return jnp.dtype(self.kv_dtype).itemsize < jnp.dtype(self.dtype).itemsize

    @property
    def v_dtype(self) -> Any:
        """What P and V are multiplied in. Hopper converts float8 to float16 in one instruction, and a probability loses nothing there."""
        return jnp.float16 if self.kv_dtype == jnp.float8_e4m3fn else self.dtype

    @property
    def heads_per_block(self) -> int:
        """Heads that a block of the second kernel merges, so that each of its 128 threads has as many numbers."""
        return 1 if self.head_dim % 128 == 0 else 2

    @property
    def head_blocks(self) -> int:
        return -(-self.num_heads // self.heads_per_block)


def query_rows(group: int) -> int:
    """Returns how many rows of queries hold the ``group`` heads of any key/value head.

    Shared memory is tiled by eight rows, so what is copied begins and ends at multiples of eight heads of the flat queries. The heads
    of a key/value head begin at a multiple of ``group``, and so up to ``8 - gcd(group, 8)`` rows behind a multiple of eight.
    """
    return -(-(group + 8 - math.gcd(group, 8)) // 8) * 8


@dataclasses.dataclass(frozen=True)
class _Refs:
    """Arrays in global memory."""

    q: Any
    kv: Any
    scales: tuple[Any, Any] | None
    rows: Any
    starts: Any
    kv_lens: Any
    first: Any
    table: Any
    factors: Any
    out: Any
    lse: Any


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The tiles of K, or of V, of all streams: stream s owns the slots from ``s * stages``.

    Attributes:
        tiles: As they lie in the pool.
        scales: One number a token, or None.
        widened: One tile a stream in the dtype of the products, or None where ``tiles`` have it.
        full: Barriers that the copies arrive at.
        free: Barriers that the compute warpgroup arrives at when it has read the tile.
    """

    tiles: Any
    scales: Any
    widened: Any
    full: Any
    free: Any


@dataclasses.dataclass(frozen=True)
class _Shared:
    """Buffers and barriers in shared memory; the first axis of each is the stream."""

    q: Any
    q_full: Any
    probabilities: Any
    out: Any
    lse: Any


@dataclasses.dataclass(frozen=True)
class _Item:
    """One split of one row, for one key/value head; without tiles where it lies before the window or does not exist."""

    exists: Any
    index: Any
    row: Any
    head: Any
    kv_len: Any
    begin: Any
    end: Any
    num_tiles: Any


def _divide(x: Any, y: int) -> Any:
    return lax.div(x, jnp.int32(y))


def _remainder(x: Any, y: int) -> Any:
    return lax.rem(x, jnp.int32(y))


def _item(plan: _Plan, refs: _Refs, cta: Any, turn: Any, stream: Any) -> _Item:
    """Returns what a stream serves at a turn. First all blocks' first streams get items, so that few items spread over all blocks."""
    tiling = plan.tiling
    place = cta + tiling.num_ctas * (tiling.compute_warpgroups * turn + stream)
    index = _divide(place, plan.num_kv_heads)
    exists = index < refs.first[plan.num_rows]
    index = jnp.minimum(index, plan.num_items - 1)
    row, start, kv_len = refs.rows[index], refs.starts[index], refs.kv_lens[index]
    begin = start
    if plan.sliding_window is not None:
        oldest = jnp.maximum(kv_len - plan.sliding_window, 0)
        begin = jnp.maximum(start, oldest - _remainder(oldest, plan.chunk))
    end = jnp.minimum(start + plan.split, kv_len)
    num_tiles = _divide(jnp.maximum(end - begin, 0) + (tiling.block_kv - 1), tiling.block_kv)
    return _Item(exists, index, row, _remainder(place, plan.num_kv_heads), kv_len, begin, end, jnp.where(exists, num_tiles, 0))


def _query_block(plan: _Plan, row: Any, head: Any) -> tuple[Any, Any]:
    """Returns the first of the rows of flat queries that are copied for a key/value head, and the place of its own heads in them."""
    first = (row * plan.num_kv_heads + head) * plan.group
    start = jnp.minimum(first - _remainder(first, 8), plan.flat_queries - plan.query_rows)
    return start, first - start


def _turns(plan: _Plan, refs: _Refs, cta: Any) -> Any:
    """Returns how often a block takes items: until its first stream has none."""
    step = plan.tiling.num_ctas * plan.tiling.compute_warpgroups
    left = refs.first[plan.num_rows] * plan.num_kv_heads - cta
    return _divide(jnp.maximum(left, 0) + (step - 1), step)


def _slot(plan: _Plan, stream: Any, tile: Any) -> Any:
    return stream * plan.tiling.stages + _remainder(tile, plan.tiling.stages)


# --- The memory warpgroup


def _fetch_tile(plan: _Plan, refs: _Refs, rings: tuple[_Ring, _Ring], item: _Item, stream: int, used: Any, tile: Any) -> None:
    """Copies a tile of K and one of V; ``used`` is how many tiles the stream had before this item."""
    slot = _slot(plan, stream, used + tile)
    last_chunk = (item.kv_len - 1) - _remainder(item.kv_len - 1, plan.chunk)
    sources = []
    for copy in range(plan.copies):
        position = jnp.minimum(item.begin + (tile * plan.tiling.block_kv + copy * plan.chunk), last_chunk)
        page = refs.table[item.row, _divide(position, plan.page_size)]  # read before the waiting, which hides its latency
        sources.append((page, pl.ds(pl.multiple_of(_remainder(position, plan.page_size), plan.chunk), plan.chunk)))
    for which, ring in enumerate(rings):
        pl.when(used + tile >= plan.tiling.stages)(functools.partial(plgpu.barrier_wait, ring.free.at[slot]))
        for copy, (page, tokens) in enumerate(sources):
            there = pl.ds(copy * plan.chunk, plan.chunk)
            numbers = refs.kv.at[page, tokens, 2 * item.head + which]
            plgpu.copy_gmem_to_smem(numbers, ring.tiles.at[slot, there], ring.full.at[slot])
            if refs.scales is not None:
                scales = refs.scales[which].at[page, item.head, tokens]
                plgpu.copy_gmem_to_smem(scales, ring.scales.at[slot, there], ring.full.at[slot])


def _stream_pages(plan: _Plan, refs: _Refs, rings: tuple[_Ring, _Ring], cta: Any) -> None:
    """Fetches the tiles of all streams' items, a tile of each stream in turn, as their rings have room."""
    streams = range(plan.tiling.compute_warpgroups)

    def serve(turn: Any, used: tuple[Any, ...]) -> tuple[Any, ...]:
        items = [_item(plan, refs, cta, turn, stream) for stream in streams]

        def fetch(tile: Any, _: None) -> None:
            for stream, item in enumerate(items):
                pl.when(tile < item.num_tiles)(functools.partial(_fetch_tile, plan, refs, rings, item, stream, used[stream], tile))

        lax.fori_loop(0, functools.reduce(jnp.maximum, [item.num_tiles for item in items]), fetch, None)
        return tuple(before + item.num_tiles for before, item in zip(used, items, strict=True))

    used = lax.fori_loop(0, _turns(plan, refs, cta), serve, tuple(jnp.int32(0) for _ in streams))
    # The last tiles' barriers are awaited too: the interpreter demands that every arrival is seen.
    for stream in streams:

        def drain(tile: Any, _: None, stream: int = stream) -> None:
            for ring in rings:
                plgpu.barrier_wait(ring.free.at[_slot(plan, stream, tile)])

        lax.fori_loop(jnp.maximum(used[stream] - plan.tiling.stages, 0), used[stream], drain, None)


# --- A compute warpgroup


def _scores(plan: _Plan, item: _Item, first: Any, products: Any, factor: Any, k_scale: Any) -> Any:
    """Returns the scores in base 2, very low where a key does not count. A tanh is written with exp2, which is exact to 1e-7 of the cap."""
    shape = products.shape
    scores = products * factor
    if k_scale is not None:
        scores = scores * lax.broadcast_in_dim(k_scale, shape, [1])
    if plan.soft_cap is not None:
        cap = plan.soft_cap * LOG2E
        scores = cap - (2 * cap) / (1 + jnp.exp2(scores))
    positions = first + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    seen = positions < item.end
    if plan.sliding_window is not None:
        seen = seen & (positions >= item.kv_len - plan.sliding_window)
    return jnp.where(seen, scores, _NO_KEY)


def _widen(plan: _Plan, ring: _Ring, slot: Any, stream: Any, dtype: Any, in_use: Any | None) -> None:
    """Writes a narrow tile in the dtype of the products; float8 may be NaN, so rows from ``in_use`` on become zero."""
    layout = plgpu.Layout.WGMMA_8BIT
    width = _swizzle(plan.head_dim, plan.kv_dtype)
    for start in range(0, plan.head_dim, width):
        columns = pl.ds(start, width)
        numbers = plgpu.layout_cast(ring.tiles[slot, :, columns], layout)
        if plan.kv_dtype == jnp.float8_e4m3fn:
            numbers = numbers.astype(jnp.float16)
            if dtype == jnp.bfloat16:
                numbers = numbers.astype(jnp.float32)
        numbers = numbers.astype(dtype)
        if in_use is not None:
            numbers = _clear(numbers, in_use, layout)
        ring.widened[stream, :, columns] = numbers
    plgpu.commit_smem()


def _clear(numbers: Any, in_use: Any, layout: Any) -> Any:
    rows = plgpu.broadcasted_iota(jnp.int32, numbers.shape, 0, layout=layout)
    return jnp.where(rows < in_use, numbers, jnp.zeros_like(numbers))


def _clear_tail(plan: _Plan, tile: Any, in_use: Any) -> None:
    """Zeroes the rows of V behind a row's end: NaN there would pass a probability of zero."""
    for start in range(0, plan.head_dim, _COLUMNS):
        part = tile.at[:, pl.ds(start, _COLUMNS)]
        part[...] = _clear(plgpu.layout_cast(part[...], plgpu.Layout.WGMMA), in_use, plgpu.Layout.WGMMA)
    plgpu.commit_smem()


def _key_products(plan: _Plan, shared: _Shared, ring: _Ring, slot: Any, stream: Any) -> tuple[Any, Any]:
    """Returns the products of the queries with a tile of K and the keys' scales, and frees the tile."""
    plgpu.barrier_wait(ring.full.at[slot])
    scale = None
    if ring.scales is not None:
        scale = plgpu.layout_cast(ring.scales[slot], plgpu.Layout.WGMMA.reduce(0))
    keys = ring.tiles.at[slot]
    if plan.widens:
        _widen(plan, ring, slot, stream, plan.dtype, None)
        plgpu.barrier_arrive(ring.free.at[slot])
        keys = ring.widened.at[stream]

    def multiply(products: Any) -> Any:
        plgpu.wgmma(products, shared.q.at[stream], keys.T)
        return products[...]

    products = pl.run_scoped(multiply, plgpu.ACC((QUERY_ROWS, plan.tiling.block_kv), jnp.float32))
    if not plan.widens:
        plgpu.barrier_arrive(ring.free.at[slot])
    return products, scale


def _add_values(plan: _Plan, shared: _Shared, ring: _Ring, slot: Any, stream: Any, in_use: Any, p: Any, acc: Any) -> Any:
    """Returns the sums with a tile of V added, and frees the tile; ``in_use`` is how many rows of it the row of the batch owns."""
    if ring.scales is None:
        p = p.astype(plan.v_dtype)
        plgpu.barrier_wait(ring.full.at[slot])
    else:
        plgpu.barrier_wait(ring.full.at[slot])
        layout = plgpu.Layout.WGMMA.reduce(0)
        scale = _clear(plgpu.layout_cast(ring.scales[slot], layout), in_use, layout)
        p = (p * lax.broadcast_in_dim(scale, p.shape, [1])).astype(plan.v_dtype)
    if plan.tiling.interpretable:
        shared.probabilities[stream] = p
        plgpu.commit_smem()
    values = ring.tiles.at[slot]
    if plan.widens:
        _widen(plan, ring, slot, stream, plan.v_dtype, in_use if plan.kv_dtype == jnp.float8_e4m3fn else None)
        plgpu.barrier_arrive(ring.free.at[slot])
        values = ring.widened.at[stream]
    else:
        pl.when(in_use < plan.tiling.block_kv)(lambda: _clear_tail(plan, values, in_use))

    def multiply(sums: Any) -> Any:
        plgpu.wgmma(sums, shared.probabilities.at[stream] if plan.tiling.interpretable else p, values)
        return sums[...] if plan.tiling.interpretable else None

    if plan.tiling.interpretable:
        acc = acc + pl.run_scoped(multiply, plgpu.ACC(acc.shape, jnp.float32))
    else:
        acc = pl.run_state(multiply)(plgpu.ACC.init(acc))
    if not plan.widens:
        plgpu.barrier_arrive(ring.free.at[slot])
    return acc


def _fetch_queries(plan: _Plan, refs: _Refs, shared: _Shared, item: _Item, stream: Any) -> None:
    start, _ = _query_block(plan, item.row, item.head)
    source = refs.q.at[pl.ds(pl.multiple_of(start, 8), plan.query_rows)]
    plgpu.copy_gmem_to_smem(source, shared.q.at[stream, pl.ds(0, plan.query_rows)], shared.q_full.at[stream])


def _store(plan: _Plan, refs: _Refs, shared: _Shared, item: _Item, stream: Any, top: Any, total: Any, acc: Any) -> None:
    """Writes an item's output and log-sum (base 2); only the latter, -inf, where it has no keys."""
    empty = total == 0.0
    divisor = jnp.where(empty, 1.0, total)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    shared.lse[stream] = jnp.where(empty, -jnp.inf, top + jnp.log(divisor) * LOG2E)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared.lse.at[stream, pl.ds(0, plan.query_rows)], refs.lse.at[item.index, item.head])

    @pl.when(item.num_tiles > 0)
    def _() -> None:
        _, offset = _query_block(plan, item.row, item.head)
        heads = pl.ds(item.head * plan.group, plan.group)
        width = plan.tiling.out_columns or plan.head_dim
        share = lax.broadcast_in_dim(refs.factors[1] / divisor, (QUERY_ROWS, width), [0])
        for start in range(0, plan.head_dim, width):
            if start:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            shared.out[stream] = lax.slice(acc, (0, start), (QUERY_ROWS, start + width)) * share
            plgpu.commit_smem()
            there = refs.out.at[item.index, heads, pl.ds(start, width)]
            plgpu.copy_smem_to_gmem(shared.out.at[stream, pl.ds(offset, plan.group)], there)


def _attend(plan: _Plan, refs: _Refs, shared: _Shared, rings: tuple[_Ring, _Ring], cta: Any, stream: Any) -> None:
    """Serves a stream's items."""
    block_kv = plan.tiling.block_kv
    factor = refs.factors[0]

    def vector(value: float) -> Any:
        return plgpu.layout_cast(jnp.full((QUERY_ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

    def serve(turn: Any, used: Any) -> Any:
        item = _item(plan, refs, cta, turn, stream)
        pl.when(item.num_tiles > 0)(lambda: plgpu.barrier_wait(shared.q_full.at[stream]))

        def visit(tile: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            top, total, acc = state
            slot = _slot(plan, stream, used + tile)
            first = item.begin + tile * block_kv
            products, k_scale = _key_products(plan, shared, rings[0], slot, stream)
            scores = _scores(plan, item, first, products, factor, k_scale)
            new_top = jnp.maximum(top, scores.max(axis=1))
            decay = jnp.exp2(top - new_top)
            p = jnp.exp2(scores - lax.broadcast_in_dim(new_top, scores.shape, [0]))
            total = total * decay + p.sum(axis=1)
            acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
            acc = _add_values(plan, shared, rings[1], slot, stream, item.kv_len - first, p, acc)
            return new_top, total, acc

        acc = plgpu.layout_cast(jnp.full((QUERY_ROWS, plan.head_dim), 0.0, jnp.float32), plgpu.Layout.WGMMA)
        top, total, acc = lax.fori_loop(0, item.num_tiles, visit, (vector(_NO_KEY), vector(0.0), acc))
        following = _item(plan, refs, cta, turn + 1, stream)

        @pl.when(following.num_tiles > 0)
        def _() -> None:
            plgpu.commit_smem()  # all warps have read the queries
            _fetch_queries(plan, refs, shared, following, stream)

        pl.when(item.exists)(lambda: _store(plan, refs, shared, item, stream, top, total, acc))
        return used + item.num_tiles

    item = _item(plan, refs, cta, 0, stream)
    pl.when(item.num_tiles > 0)(lambda: _fetch_queries(plan, refs, shared, item, stream))
    lax.fori_loop(0, _turns(plan, refs, cta), serve, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


# --- The first kernel: items


def _swizzle(width: int, dtype: Any) -> int:
    """Returns over how many bytes of a row of ``width`` numbers a buffer is swizzled: 128 where it divides them."""
    itemsize = jnp.dtype(dtype).itemsize
    return 128 if width * itemsize % 128 == 0 and (itemsize > 1 or width <= 128) else 64


def _tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns a buffer in the layout that wgmma reads."""
    itemsize, swizzle = jnp.dtype(dtype).itemsize, _swizzle(shape[-1], dtype)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)))


def _ring_types(plan: _Plan, dtype: Any) -> tuple[Any, ...]:
    """Returns the buffers and barriers of ``_Ring``; ``dtype`` is what its tiles are widened to."""
    streams, block_kv, dim = plan.tiling.compute_warpgroups, plan.tiling.block_kv, plan.head_dim
    slots = streams * plan.tiling.stages
    arrivals = plan.copies * (2 if plan.token_scales else 1)
    return (
        _tiled((slots, block_kv, dim), plan.kv_dtype),
        plgpu.SMEM((slots, block_kv), jnp.float32) if plan.token_scales else None,
        _tiled((streams, block_kv, dim), dtype) if plan.widens else None,
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots),
        plgpu.Barrier(num_barriers=slots),
    )


def _shared_types(plan: _Plan) -> tuple[Any, ...]:
    """Returns the buffers and barriers of ``_Shared``."""
    streams, dim = plan.tiling.compute_warpgroups, plan.head_dim
    return (
        _tiled((streams, QUERY_ROWS, dim), plan.dtype),
        plgpu.Barrier(num_barriers=streams),
        _tiled((streams, QUERY_ROWS, plan.tiling.block_kv), plan.v_dtype) if plan.tiling.interpretable else None,
        plgpu.SMEM((streams, QUERY_ROWS, plan.tiling.out_columns or dim), jnp.float32),
        plgpu.SMEM((streams, QUERY_ROWS), jnp.float32),
    )


def _attend_entry(plan: _Plan, *refs: Any) -> None:
    """The first kernel's body: gives each warpgroup its part."""
    q, kv, *others = refs
    scales = tuple(others[:2]) if plan.token_scales else None
    refs_ = _Refs(q, kv, scales, *others[2 if plan.token_scales else 0 :])
    tiling = plan.tiling

    def body(shared: tuple[Any, ...], keys: tuple[Any, ...], values: tuple[Any, ...]) -> None:
        rings = _Ring(*keys), _Ring(*values)
        cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")

        @pl.when(warpgroup < tiling.compute_warpgroups)
        def _() -> None:
            if tiling.registers is not None:
                plgpu.set_max_registers(tiling.registers[0], action="increase")
            _attend(plan, refs_, _Shared(*shared), rings, cta, warpgroup)

        @pl.when(warpgroup == tiling.compute_warpgroups)
        def _() -> None:
            if tiling.registers is not None:
                plgpu.set_max_registers(tiling.registers[1], action="decrease")
            _stream_pages(plan, refs_, rings, cta)

    buffers = _shared_types(plan), _ring_types(plan, plan.dtype), _ring_types(plan, plan.v_dtype)
    pl.run_scoped(body, *buffers, collective_axes="warpgroup")


def _attend_items(
    plan: _Plan,
    q: Float[Array, "T H D"],
    kv_pages: Num[Array, "N B 2K D"],
    scales: tuple[Array, ...],
    items: DecodeItems,
    block_tables: Int[Array, "S P"],
    factors: Float[Array, " 2"],
) -> tuple[Float[Array, "W Hpad D"], Float[Array, "W K R"]]:
    """Returns the items' outputs and their log-sums in base 2; the output of an item without keys is undefined."""
    queries = q.reshape(-1, plan.head_dim)
    if plan.flat_queries != queries.shape[0]:
        queries = jnp.pad(queries, ((0, plan.flat_queries - queries.shape[0]), (0, 0)))
    return plgpu.kernel(
        functools.partial(_attend_entry, plan),
        out_type=[
            jax.ShapeDtypeStruct((plan.num_items, plan.head_blocks * plan.heads_per_block, plan.head_dim), jnp.float32),
            jax.ShapeDtypeStruct((plan.num_items, plan.num_kv_heads, plan.query_rows), jnp.float32),
        ],
        grid=(plan.tiling.num_ctas,),
        grid_names=("cta",),
        num_threads=plan.tiling.compute_warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="paged_attention_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(queries, kv_pages, *scales, *items, block_tables, factors)


# --- The second kernel: rows


def _spread(plan: _Plan, values: list[Any], layout: Any) -> Any:
    """Returns an array that holds each head's number all over its row."""
    shape = (plan.heads_per_block, plan.head_dim)
    rows = [lax.broadcast_in_dim(value, shape, ()) for value in values]
    if len(rows) == 1:
        return rows[0]
    head = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    return jnp.where(head == 0, rows[0], rows[1])


def _merge_entry(plan: _Plan, partial: Any, partial_lse: Any, first_items: Any, sinks: Any, out: Any, lse: Any) -> None:
    """The second kernel's body: a block merges one or two heads of a row, several splits at a time."""
    unroll = plan.tiling.combine_unroll
    shape = (plan.heads_per_block, plan.head_dim)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=math.prod(shape) // 128)
    spread = functools.partial(_spread, plan, layout=layout)
    row, place = lax.axis_index("row"), lax.axis_index("heads") * plan.heads_per_block
    first = first_items[row]
    count = first_items[row + 1] - first
    heads = [jnp.minimum(place + h, plan.num_heads - 1) for h in range(plan.heads_per_block)]
    kv_heads = [_divide(head, plan.group) for head in heads]
    queries = [
        (kv_head, _query_block(plan, row, kv_head)[1] + _remainder(head, plan.group)) for head, kv_head in zip(heads, kv_heads, strict=True)
    ]
    here = pl.ds(place, plan.heads_per_block)

    def load(split: Any) -> tuple[list[Any], Any]:
        item = first + jnp.minimum(split, count - 1)
        lses = [partial_lse[item, kv_head, query] for kv_head, query in queries]
        return [jnp.where(split < count, x, -jnp.inf) for x in lses], plgpu.layout_cast(partial[item, here], layout)

    def visit(trip: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        tops, totals, acc = state
        parts = [load(trip * unroll + k) for k in range(unroll)]
        new_tops = [functools.reduce(jnp.maximum, [lses[h] for lses, _ in parts], top) for h, top in enumerate(tops)]
        decays = [jnp.exp2(top - new_top) for top, new_top in zip(tops, new_tops, strict=True)]
        totals = [total * decay for total, decay in zip(totals, decays, strict=True)]
        acc = acc * spread(decays)
        for lses, part in parts:
            weights = [jnp.exp2(x - new_top) for x, new_top in zip(lses, new_tops, strict=True)]
            totals = [total + weight for total, weight in zip(totals, weights, strict=True)]
            weight = spread(weights)
            acc = acc + jnp.where(weight > 0, part * weight, 0.0)  # what has no weight may be NaN
        return tuple(new_tops), tuple(totals), acc

    init = (
        tuple(jnp.float32(_NO_KEY) for _ in heads),
        tuple(jnp.float32(0) for _ in heads),
        plgpu.layout_cast(jnp.full(shape, 0.0, jnp.float32), layout),
    )
    tops, totals, acc = lax.fori_loop(0, _divide(count + (unroll - 1), unroll), visit, init)
    shares = []
    for h, head in enumerate(heads):
        seen = totals[h] > 0
        sink = sinks[head]
        top = jnp.maximum(tops[h], sink)
        decay = jnp.exp2(tops[h] - top)
        total = jnp.where(seen, totals[h] * decay + jnp.exp2(sink - top), 1.0)
        shares.append(decay / total)
        lse[row, place + h] = jnp.where(seen, top / LOG2E + jnp.log(total), -jnp.inf)
    out[row, here] = (acc * spread(shares)).astype(plan.dtype)


def _merge_rows(
    plan: _Plan, partial: Float[Array, "W Hpad D"], partial_lse: Float[Array, "W K R"], items: DecodeItems, sinks: Float[Array, " H"]
) -> tuple[Float[Array, "S H D"], Float[Array, "S H"]]:
    """Returns the rows' outputs and log-sums (base e); 0 and -inf for rows without items."""
    num_heads = plan.head_blocks * plan.heads_per_block
    out, lse = plgpu.kernel(
        functools.partial(_merge_entry, plan),
        out_type=[
            jax.ShapeDtypeStruct((plan.num_rows, num_heads, plan.head_dim), plan.dtype),
            jax.ShapeDtypeStruct((plan.num_rows, num_heads), jnp.float32),
        ],
        grid=(plan.num_rows, plan.head_blocks),
        grid_names=("row", "heads"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="paged_attention_merge",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(partial, partial_lse, items.first, sinks)
    return out[:, : plan.num_heads], lse[:, : plan.num_heads]


def decode_attention(
    q: Float[Array, "T H D"],
    kv_pages: Num[Array, "N B 2K D"],
    block_tables: Int[Array, "S P"],
    items: DecodeItems,
    *,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " H"] | None,
    k_scale: Any,
    v_scale: Any,
    tiling: DecodeTiling,
) -> tuple[Float[Array, "S H D"], Float[Array, "S H"]]:
    """Attends token t to the pages of row t, for the rows that have items.

    Args:
        q: Queries; bfloat16 or float16.
        kv_pages: The pool of the layer; q's dtype, float8_e4m3fn or int8.
        block_tables: Page ids of each row.
        items: The work list.
        sm_scale: Multiplies the scores.
        sliding_window: Positions that a query sees, or None.
        soft_cap: Bound of the scores, or None.
        sinks: One more score per head, in base 2, or None.
        k_scale: None, a scalar, or float32 ``[N, K, B]``; ``v_scale`` is of the same kind.
        v_scale: The same of values.
        tiling: Static sizes.

    Returns:
        Outputs in q's dtype and float32 log-sums; 0 and -inf for rows without items or keys.
    """
    page_size, num_kv, head_dim = kv_pages.shape[1:]
    group = q.shape[1] * 2 // num_kv
    token_scales = k_scale is not None and jnp.ndim(k_scale) == 3
    plan = _Plan(
        group=group,
        num_kv_heads=num_kv // 2,
        head_dim=head_dim,
        page_size=page_size,
        split=split_tokens(page_size, block_tables.shape[1]),
        num_rows=items.first.shape[0] - 1,
        num_items=items.rows.shape[0],
        flat_queries=max(-(-q.shape[0] * q.shape[1] // 8) * 8, query_rows(group)),
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        dtype=q.dtype,
        kv_dtype=kv_pages.dtype,
        token_scales=token_scales,
        tiling=tiling,
    )
    # exp2(factor * product) is what the softmax needs; under a soft cap c, exp(2 * score / c).
    factor = sm_scale * (LOG2E if soft_cap is None else 2 * LOG2E / soft_cap)
    scalars = [1.0 if scale is None or token_scales else scale for scale in (k_scale, v_scale)]
    factors = jnp.stack([jnp.float32(factor) * scalars[0], jnp.float32(scalars[1])]).astype(jnp.float32)
    scales = (k_scale, v_scale) if token_scales else ()
    partial, partial_lse = _attend_items(plan, q, kv_pages, scales, items, block_tables, factors)
    return _merge_rows(plan, partial, partial_lse, items, jnp.full(plan.num_heads, -jnp.inf, jnp.float32) if sinks is None else sinks)
