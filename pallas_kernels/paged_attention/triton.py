"""Ragged paged attention in Pallas-Triton, for NVIDIA GPUs from Ampere on.

Three kernels, on one layout of the work:

- Rows of a single token (decode): a program serves one *split* of a row, a run of ``split_tokens`` keys, for the query heads of one
  key/value head, and writes its maximum, sum and unnormalised output as float32. What a split is depends on the width of the block
  table alone, so a row's bits do not depend on the batch.
- Other rows: a program serves ``query_block`` tokens of one row times the query heads of one key/value head, so that keys and values
  are read once for all of them.
- A last kernel sums up the splits of each single-token row, adds the sinks, and writes into the output of the one before.

Which row and which part of it a program serves stands in a work list, built once a step on the device (``make_work_list``). The grid
is static; programs beyond the list's end stop at once. Keys are gathered by pointer, token by token through the block table, so the
tile of a loop iteration and the page of the pool are chosen apart from each other.

The form of the work follows vLLM's unified Triton attention (vllm-project/vllm, vllm/v1/attention/ops/triton_unified_attention.py;
arXiv 2511.11581), the loop is FlashAttention-2's (arXiv 2307.08691), splits are those of Flash-Decoding (Dao et al. 2023), with a
fixed size rather than a fixed number (thinking-machines-lab/batch_invariant_ops).

What limits it: a decode row of length L reads ``2 * L * K * D`` numbers of keys and values once, and does ``4 * L * H * D``
operations: with G query heads a key/value head that is G operations a byte in bfloat16, far under what any of these GPUs needs to be
bound by arithmetic, so decode is bound by memory. The partial results of a split are ``4 * (D + 2) * H`` bytes, written and read,
beside the ``4 * split * K * D`` that it reads: 1.6 % each way at G = 4 and 256 tokens. A prompt of L tokens does
``2 * L * L * H * D`` operations on the causal half, and each program reads its keys from the L2 cache: ``query_block * G`` operations a
byte, bound by arithmetic.

What it does not do well: a short chunk of a long context is one program a key/value head and block, which walks through all of the
context (only single-token rows are split); each step launches the kernel for other rows even if there are none, and its programs stop
at once; the memory for partial results is that of ``min(S, T)`` rows of full block tables, ``MAX_SPLITS`` each at most.

Pallas-Triton uses neither TMA nor warps of different roles, so ``mosaic_gpu`` comes first on Hopper. Upstream has deprecated it (from
jax 0.11 on, a DeprecationWarning where a call is lowered, which Python hides by default), so it is used in this file alone. The kernels
are compiled for sm_80 and sm_89 by ``tests/kernels/compile_triton.py`` and for sm_90 by ``scripts/compile_check.py``, run in Pallas'
interpreter, and were tested and timed on an H100 and an H200 (docs/kernels.md); never on Ampere or Ada.

float8_e4m3fn is widened by integer operations, on all GPUs: Triton converts it from compute capability 8.9 on only, and for which
device a call will be lowered cannot be asked here. It takes about five integer operations a number, where a conversion takes half of
one.
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
from jaxtyping import Array, Float, Int, Num

try:
    from jax.experimental.pallas import triton as pltriton
except ImportError:  # upstream announced that it will go
    pltriton = None

QUERY_BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Query tokens of a block of other rows, of which a call uses one size: about the tiling's rows divided by the group."""

SPLIT_TOKENS = 256
"""Keys of a split, where a block table holds no more than ``MAX_SPLITS`` of them."""

MAX_SPLITS = 64
"""Most splits of a row: bounds the memory for partial results. Splits grow with the block table instead."""

MAX_HEADS = 32
"""Most query heads of one program, where the tiling's rows allow them; a larger group is served by several."""

_LOG2E = math.log2(math.e)
_LN2 = math.log(2.0)
_NO_KEY = -1e30
"""Maximum of no scores; finite, so that the difference of two is not NaN."""

_FP8_FACTOR = 256.0
"""What a float8_e4m3fn's bits, read as float16, lack: the exponents' biases are 7 and 15."""

_COMBINED_SPLITS = 16


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of the two attention kernels.

    Attributes:
        single_tile: Keys of an iteration for single-token rows.
        single_warps: Warps of such a program.
        single_stages: Stages of its software pipeline.
        single_programs: Most such programs, over all key/value heads; each goes on to a next split until none is left.
        rows: Query rows (tokens times heads) of a program for other rows, rounded to what the group allows.
        tile: Keys of an iteration for these.
        warps: Warps of such a program.
        stages: Stages of its software pipeline.
    """

    single_tile: int
    single_warps: int
    single_stages: int
    single_programs: int
    rows: int
    tile: int
    warps: int
    stages: int


# By the head dimension, rounded up to a power of two, and the bits of what the pool stores (32 where the products are of float32).
TILINGS = {
    (64, 16): Tiling(64, 4, 3, 4096, 128, 64, 8, 3),
    (128, 16): Tiling(64, 4, 3, 4096, 128, 32, 8, 3),
    (256, 16): Tiling(32, 4, 3, 4096, 64, 32, 8, 3),
    (64, 8): Tiling(64, 4, 3, 4096, 128, 64, 8, 3),
    (128, 8): Tiling(64, 8, 3, 4096, 128, 32, 8, 3),
    (256, 8): Tiling(32, 8, 3, 4096, 64, 32, 8, 3),
    (64, 32): Tiling(32, 4, 2, 4096, 32, 32, 8, 2),
    (128, 32): Tiling(32, 8, 2, 4096, 16, 32, 4, 2),
    (256, 32): Tiling(32, 8, 2, 4096, 16, 16, 8, 2),
}
"""None takes more than the 99 KiB of shared memory that sm_89 has. Compiled for sm_80, sm_89 and sm_90, those of 16 and 8 bits spill no
registers at the shapes of the compile checks; those of 32 bits spill up to some tens of bytes at a few shapes."""


class WorkList(NamedTuple):
    """Which programs serve which part of which row; a pytree that all layers of a step share.

    Attributes:
        split_rows: The row of each split of the single-token rows, in order.
        first_split: Number of splits before each row's, and in all.
        block_rows: For each size of a block, the row of each block of query tokens of the other rows, in order. Row S is the
            padding behind the last row.
        first_block: For each of them, the number of blocks before each row's, and in all.
    """

    split_rows: Int[Array, " W"]
    first_split: Int[Array, " S+1"]
    block_rows: tuple[Int[Array, " _"], ...]
    first_block: tuple[Int[Array, " S+2"], ...]


class _Arrays(NamedTuple):
    """What both attention kernels read; references inside of them."""

    item_rows: Any
    first_item: Any
    kv_lens: Any
    tables: Any
    cu_q_lens: Any
    q: Any
    kv: Any
    k_scalar: Any
    v_scalar: Any
    k_scales: Any
    v_scales: Any
    sinks: Any


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Everything about a call that is static."""

    num_tokens: int
    num_q_heads: int
    head_dim: int
    num_kv_heads: int
    page_size: int
    num_rows: int
    table_width: int
    out_dtype: str
    score_dtype: str
    value_dtype: str
    is_fp8: bool
    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None
    max_heads: int

    @property
    def padded_dim(self) -> int:
        return pl.next_power_of_2(self.head_dim)

    @property
    def group(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def programs_per_kv_head(self) -> int:
        return pl.cdiv(self.group, self.max_heads)

    @property
    def heads(self) -> int:
        """Query heads of a program."""
        return pl.cdiv(self.group, self.programs_per_kv_head)

    @property
    def head_programs(self) -> int:
        return self.num_kv_heads * self.programs_per_kv_head

    @property
    def split(self) -> int:
        return split_tokens(self.page_size, self.table_width)

    @property
    def results(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        rows = self.num_tokens * self.num_q_heads
        return jax.ShapeDtypeStruct((rows, self.head_dim), self.out_dtype), jax.ShapeDtypeStruct((rows,), jnp.float32)


def split_tokens(page_size: int, table_width: int) -> int:
    """Returns the number of keys of a split: a function of the longest context alone."""
    return max(SPLIT_TOKENS, pl.next_power_of_2(pl.cdiv(page_size * table_width, MAX_SPLITS)))


def storage_head_dim(head_dim: int) -> int:
    """Returns the head dimension to allocate pages with: any will do, loads are masked."""
    return head_dim


def unsupported(
    q: Any,
    kv_pages: Any,
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
) -> str | None:
    """Returns why a call cannot be served, for people, or None if it can."""
    del sliding_window, soft_cap, sinks, k_scale, v_scale
    if pltriton is None:
        return f"jax {jax.__version__} has no Pallas-Triton any more"
    head_dim = q.shape[2]
    if head_dim > 256:
        return f"head dimension {head_dim} is above 256"
    if head_dim < 16:
        return f"head dimension {head_dim} is under the 16 of a tensor core's product"
    size = math.prod(kv_pages.shape)
    if jnp.dtype(kv_pages.dtype).itemsize == 1 and 2**31 < size <= 2**32:
        # Pallas-Triton takes 32-bit offsets up to 4 GiB, and they are signed
        return "an 8-bit pool of 2 to 4 GiB a layer is beyond Pallas-Triton's offsets"
    return None


def _items(counts: Int[Array, " R"], capacity: int) -> tuple[Int[Array, " capacity"], Int[Array, " R+1"]]:
    """Returns the row of each item and the items before each row, for rows of ``counts`` items."""
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    rows = jnp.searchsorted(ends, jnp.arange(capacity, dtype=jnp.int32), side="right", method="compare_all").astype(jnp.int32)
    return jnp.minimum(rows, counts.shape[0] - 1), jnp.concatenate([jnp.zeros(1, jnp.int32), ends])


def make_work_list(
    kv_lens: Int[Array, " S"],
    cu_q_lens: Int[Array, " S+1"],
    distribution: Int[Array, " 3"],
    *,
    num_tokens: int,
    page_size: int,
    table_width: int,
    query_blocks: tuple[int, ...] = QUERY_BLOCKS,
) -> WorkList:
    """Returns how a step's rows are cut into pieces; inside of ``jax.jit``, what no layer uses is not computed.

    Args:
        kv_lens: As in ``ragged_paged_attention``.
        cu_q_lens: As there.
        distribution: As there.
        num_tokens: T.
        page_size: B.
        table_width: P.
        query_blocks: Sizes of blocks to make lists for; a list that is shared has all of them.
    """
    num_rows = kv_lens.shape[0]
    split = split_tokens(page_size, table_width)
    index = jnp.arange(num_rows, dtype=jnp.int32)
    splits = jnp.where(index < distribution[0], (kv_lens + split - 1) // split, 0)
    max_singles = min(num_rows, num_tokens)
    split_rows, first_split = _items(splits, max_singles * pl.cdiv(page_size * table_width, split))
    is_other = (index >= distribution[0]) & (index < distribution[2])
    lengths = jnp.where(is_other, jnp.diff(cu_q_lens), 0)
    lengths = jnp.concatenate([lengths, num_tokens - cu_q_lens[-1:]])
    # every row but a full block may end in a part of one
    blocks = [_items((lengths + size - 1) // size, num_tokens // size + min(num_rows, num_tokens) + 1) for size in query_blocks]
    return WorkList(split_rows, first_split, *map(tuple, zip(*blocks, strict=True)))


def _iota(size: int) -> Int[Array, " size"]:
    return lax.iota(jnp.int32, size)


def _widen(stored: Num[Array, "C D"], shape: _Shape, dtype: str) -> Num[Array, "C D"]:
    """Returns stored keys or values as ``dtype``; those of float8_e4m3fn lack ``_FP8_FACTOR``."""
    if not shape.is_fp8:
        return stored.astype(dtype)
    # seeeemmm to s0eeeemmm0000000: a float16 of the same fields; then what was NaN gets all of the exponent's bits
    bits = (stored.astype(jnp.int16) << jnp.int16(7)) & jnp.int16(~0x4000)
    bits = bits | ((bits + jnp.int16(0x80)) & jnp.int16(0x4000))
    half = lax.bitcast_convert_type(bits, jnp.float16)
    return half if dtype == "float16" else half.astype(jnp.float32).astype(dtype)


def _factor(scalar: Any, shape: _Shape) -> Any:
    """Returns what stored numbers, as ``_widen`` returns them, are multiplied with: of all tokens, in a reference or None."""
    factor = _FP8_FACTOR if shape.is_fp8 else 1.0
    return factor if scalar is None else factor * scalar[0]


def _dot(x: Num[Array, "M C"], y: Num[Array, ...], contract: int) -> Float[Array, "M _"]:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, y, (((1,), (contract,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _scores(products: Float[Array, "M C"], factor: Any, shape: _Shape) -> Float[Array, "M C"]:
    """Returns scores in units of log 2, for exp2: products times ``factor``, capped."""
    if shape.soft_cap is None:
        return products * (factor * _LOG2E)
    # tanh(x) is 1 - 2 / (exp(2 x) + 1), which ends in 1 and -1 for x of any size
    grown = jnp.exp2(products * (factor * (2 * _LOG2E / shape.soft_cap)))
    return (shape.soft_cap * _LOG2E) * (1 - 2 / (grown + 1))


@dataclasses.dataclass(frozen=True)
class _Program:
    """What a program knows once it knows its row."""

    arrays: _Arrays
    shape: _Shape
    tile: int
    row: Any
    kv_head: Any
    q: Any
    positions: Any  # [M, 1], or a scalar for single-token rows
    low: Any  # first key that any of the queries sees
    end: Any  # the key behind the last one that any of them sees

    def visit(self, index: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        """Returns the maximum, sum and output with one tile of keys more."""
        top, total, acc = state
        arrays, shape = self.arrays, self.shape
        where = index * self.tile + _iota(self.tile)
        in_use = where < self.end
        if shape.sliding_window is not None:
            in_use &= where >= self.low
        pages, offsets = self._places(index, where, in_use)
        tokens = (pages * shape.page_size + offsets) * (2 * shape.num_kv_heads) + 2 * self.kv_head
        keys = _widen(self._load(tokens, in_use), shape, shape.score_dtype)
        scores = _dot(self.q, keys, 1)
        if arrays.k_scales is not None:
            scores = scores * self._load_scale(arrays.k_scales, pages, offsets, in_use)[None, :]
        scores = _scores(scores, shape.sm_scale * _factor(arrays.k_scalar, shape), shape)
        # no position is at or behind the end, but those of queries that nobody asked for
        seen = where[None, :] <= self.positions
        if shape.sliding_window is not None:
            seen &= where[None, :] > self.positions - shape.sliding_window
        scores = jnp.where(seen, scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_top[:, None])
        decay = jnp.exp2(top - new_top)
        total = total * decay + jnp.sum(weights, axis=1)
        if arrays.v_scales is not None:
            weights = weights * self._load_scale(arrays.v_scales, pages, offsets, in_use)[None, :]
        values = _widen(self._load(tokens + 1, in_use), shape, shape.value_dtype)
        acc = acc * decay[:, None] + _dot(weights.astype(shape.value_dtype), values, 0)
        return new_top, total, acc

    def _places(self, index: Any, where: Any, in_use: Any) -> tuple[Any, Any]:
        """Returns page ids and offsets of a tile's tokens; 0 where not in use."""
        page_size, first = self.shape.page_size, self.row * self.shape.table_width
        if page_size % self.tile == 0:  # one page
            start = index * self.tile
            page = self.arrays.tables[first + lax.div(start, page_size)]
            return page, lax.rem(start, page_size) + _iota(self.tile)
        slots = self.arrays.tables.at[first + lax.div(where, jnp.int32(page_size))]
        return pltriton.load(slots, mask=in_use, other=0), lax.rem(where, jnp.int32(page_size))

    def _load(self, tokens: Any, in_use: Any) -> Any:
        """Loads keys or values of a tile, with zeros where not in use: 0 times NaN would be NaN."""
        dims = _iota(self.shape.padded_dim)
        mask = jnp.broadcast_to(in_use[:, None], (self.tile, self.shape.padded_dim))
        if self.shape.padded_dim != self.shape.head_dim:
            mask &= (dims < self.shape.head_dim)[None, :]
        return pltriton.load(self.arrays.kv.at[tokens[:, None], dims[None, :]], mask=mask, other=0)

    def _load_scale(self, scale: Any, pages: Any, offsets: Any, in_use: Any) -> Any:
        slots = (pages * self.shape.num_kv_heads + self.kv_head) * self.shape.page_size + offsets
        return pltriton.load(scale.at[slots], mask=in_use, other=0.0)


def _load_queries(q_ref: Any, rows: Any, valid: Any, shape: _Shape) -> Any:
    dims = _iota(shape.padded_dim)
    mask = valid[:, None] & (dims < shape.head_dim)[None, :]
    return pltriton.load(q_ref.at[rows[:, None], dims[None, :]], mask=mask, other=0).astype(shape.score_dtype)


def _store_rows(ref: Any, rows: Any, values: Any, valid: Any, width: int) -> None:
    dims = _iota(values.shape[1])
    mask = valid[:, None] & (dims < width)[None, :]
    pltriton.store(ref.at[rows[:, None], dims[None, :]], values, mask=mask)


def _start(rows: int, shape: _Shape) -> tuple[Any, Any, Any]:
    return jnp.full(rows, _NO_KEY, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((rows, shape.padded_dim), jnp.float32)


def _program_heads(shape: _Shape, program: Any) -> tuple[Any, Any, Any]:
    """Returns a program's key/value head, its first query head, and how many it has."""
    parts = shape.programs_per_kv_head
    kv_head = lax.div(program, jnp.int32(parts))
    part_start = lax.rem(program, jnp.int32(parts)) * shape.heads
    return kv_head, kv_head * shape.group + part_start, jnp.minimum(shape.heads, shape.group - part_start)


def _single_kernel(arrays: _Arrays, top_ref: Any, total_ref: Any, acc_ref: Any, *, shape: _Shape, tile: int, programs: int) -> None:
    """Attends one query token of each of some rows to one split of its keys."""
    kv_head, first_head, num_heads = _program_heads(shape, pl.program_id(0))
    first_item = pl.program_id(1)
    rows = max(16, pl.next_power_of_2(shape.heads))
    heads = first_head + _iota(rows)
    valid = _iota(rows) < num_heads
    num_items = arrays.first_item[shape.num_rows]

    def serve(turn: Any, carry: None) -> None:
        item = first_item + turn * programs
        row = arrays.item_rows[item]
        start = (item - arrays.first_item[row]) * shape.split
        kv_len = arrays.kv_lens[row]
        low = jnp.int32(0) if shape.sliding_window is None else jnp.maximum(kv_len - shape.sliding_window, 0)
        first = jnp.maximum(start, low)
        end = jnp.minimum(start + shape.split, kv_len)

        @pl.when(first < end)  # else the split lies before the window, and nobody will ask for it
        def _() -> None:
            q = _load_queries(arrays.q, row * shape.num_q_heads + heads, valid, shape)
            program = _Program(arrays, shape, tile, row, kv_head, q, kv_len - 1, low, end)
            end_tile = lax.div(end + (tile - 1), jnp.int32(tile))
            top, total, acc = lax.fori_loop(lax.div(first, jnp.int32(tile)), end_tile, program.visit, _start(rows, shape))
            places = item * shape.num_q_heads + heads
            pltriton.store(top_ref.at[places], top, mask=valid)
            pltriton.store(total_ref.at[places], total, mask=valid)
            _store_rows(acc_ref, places, acc, valid, shape.padded_dim)

    turns = lax.div(num_items - first_item + (programs - 1), jnp.int32(programs))
    lax.fori_loop(0, turns, serve, None)


def _finish(top: Any, total: Any, acc: Any, sink: Any, v_scale: Any) -> tuple[Any, Any]:
    """Returns outputs and log-sums; 0 and -inf where there was no key. ``acc`` has one axis more than the others, or as many."""
    empty = total == 0
    if sink is not None:
        sink = sink * _LOG2E
        new_top = jnp.maximum(top, sink)
        decay = jnp.exp2(top - new_top)
        total = total * decay + jnp.exp2(sink - new_top)
        acc = acc * (decay[:, None] if jnp.ndim(decay) else decay)
        top = new_top
    total = jnp.where(empty, 1.0, total)
    inverse = jnp.where(empty, 0.0, v_scale / total)
    out = acc * (inverse[:, None] if jnp.ndim(inverse) else inverse)
    return out, jnp.where(empty, -jnp.inf, (top + jnp.log2(total)) * _LN2)


def _other_kernel(arrays: _Arrays, out_ref: Any, lse_ref: Any, *, shape: _Shape, query_block: int, tile: int) -> None:
    """Attends a block of query tokens of one row to the row's keys."""
    kv_head, first_head, num_heads = _program_heads(shape, pl.program_id(0))
    num_items = arrays.first_item[shape.num_rows + 1]
    item = num_items - 1 - pl.program_id(1)  # a row's last blocks have the most to do, so they start first

    @pl.when(item >= 0)
    def _() -> None:
        row = arrays.item_rows[item]
        is_row = row < shape.num_rows
        kv_len = pltriton.load(arrays.kv_lens.at[row], mask=is_row, other=0)
        start = arrays.cu_q_lens[row]
        row_end = pltriton.load(arrays.cu_q_lens.at[row + 1], mask=is_row, other=shape.num_tokens)
        start_token = start + (item - arrays.first_item[row]) * query_block
        end_token = jnp.minimum(start_token + query_block, row_end)

        rows = max(16, pl.next_power_of_2(query_block * shape.heads))
        tokens = start_token + lax.div(_iota(rows), jnp.int32(shape.heads))
        head = lax.rem(_iota(rows), jnp.int32(shape.heads))
        valid = (tokens < end_token) & (head < num_heads)
        places = tokens * shape.num_q_heads + first_head + head
        before = kv_len - row_end  # a token's position, less its index; below minus that for a row without keys
        first_position = start_token + before
        low = jnp.int32(0) if shape.sliding_window is None else jnp.maximum(first_position - shape.sliding_window + 1, 0)
        end = jnp.where(is_row, jnp.maximum(end_token + before, 0), 0)
        q = _load_queries(arrays.q, places, valid, shape)
        program = _Program(arrays, shape, tile, row, kv_head, q, (tokens + before)[:, None], low, end)

        end_tile = lax.div(end + (tile - 1), jnp.int32(tile))
        top, total, acc = lax.fori_loop(lax.div(low, jnp.int32(tile)), end_tile, program.visit, _start(rows, shape))
        sink = None
        if arrays.sinks is not None:
            sink = pltriton.load(arrays.sinks.at[first_head + head], mask=head < num_heads, other=0.0)
        out, lse = _finish(top, total, acc, sink, _factor(arrays.v_scalar, shape))
        _store_rows(out_ref, places, out.astype(shape.out_dtype), valid, shape.head_dim)
        pltriton.store(lse_ref.at[places], lse, mask=valid)


def _combine_kernel(inputs: tuple[Any, ...], out_in: Any, lse_in: Any, out_ref: Any, lse_ref: Any, *, shape: _Shape) -> None:
    """Sums up the splits of one row and query head; writes where the row's token stands."""
    del out_in, lse_in  # the same memory as out_ref and lse_ref
    top_ref, total_ref, acc_ref, first_split, kv_lens, distribution, v_scalar, sinks = inputs
    head, row = pl.program_id(0), pl.program_id(1)

    @pl.when(row < distribution[0])
    def _() -> None:
        base = first_split[row]
        count = first_split[row + 1] - base
        first = 0
        if shape.sliding_window is not None:
            first = lax.div(jnp.maximum(kv_lens[row] - shape.sliding_window, 0), jnp.int32(shape.split))

        def add(turn: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            top, total, acc = state
            splits = first + turn * _COMBINED_SPLITS + _iota(_COMBINED_SPLITS)
            valid = splits < count
            places = (base + splits) * shape.num_q_heads + head
            tops = pltriton.load(top_ref.at[places], mask=valid, other=_NO_KEY)
            totals = pltriton.load(total_ref.at[places], mask=valid, other=0.0)
            dims = _iota(shape.padded_dim)
            mask = jnp.broadcast_to(valid[:, None], (_COMBINED_SPLITS, shape.padded_dim))
            accs = pltriton.load(acc_ref.at[places[:, None], dims[None, :]], mask=mask, other=0.0)
            new_top = jnp.maximum(top, jnp.max(tops, axis=0))
            weights, decay = jnp.exp2(tops - new_top), jnp.exp2(top - new_top)
            total = total * decay + jnp.sum(totals * weights, axis=0)
            return new_top, total, acc * decay + jnp.sum(accs * weights[:, None], axis=0)

        turns = lax.div(count - first + (_COMBINED_SPLITS - 1), jnp.int32(_COMBINED_SPLITS))
        init = (jnp.float32(_NO_KEY), jnp.float32(0), jnp.zeros(shape.padded_dim, jnp.float32))
        top, total, acc = lax.fori_loop(0, turns, add, init)
        out, lse = _finish(top, total, acc, None if sinks is None else sinks[head], _factor(v_scalar, shape))
        dims = _iota(shape.padded_dim)
        place = row * shape.num_q_heads + head
        pltriton.store(out_ref.at[jnp.broadcast_to(place, dims.shape), dims], out.astype(shape.out_dtype), mask=dims < shape.head_dim)
        lse_ref[place] = lse


def _product_dtypes(q_dtype: Any, kv_dtype: Any) -> tuple[str, str]:
    """Returns what scores and outputs are computed from. 8-bit numbers are exact in both 16-bit types.

    Weights times a token's scale may be far from 1, so that with 8-bit values they are bfloat16 even if q is float16.
    """
    q_dtype, kv_dtype = jnp.dtype(q_dtype), jnp.dtype(kv_dtype)
    if kv_dtype.itemsize > 1:
        common = str(jnp.promote_types(q_dtype, kv_dtype))
        return common, common
    return str(q_dtype), "float32" if q_dtype == jnp.float32 else "bfloat16"


def _split_scale(scale: Any) -> tuple[Float[Array, " 1"] | None, Float[Array, " _"] | None]:
    """Returns a scale of all tokens and the scales of single tokens, of which one or both are None."""
    if scale is None:
        return None, None
    flat = jnp.asarray(scale, jnp.float32).reshape(-1)
    return (flat, None) if jnp.ndim(scale) == 0 else (None, flat)


def choose_tiling(head_dim: int, q_dtype: Any, kv_dtype: Any) -> Tiling:
    """Returns the tiling for a head dimension and dtypes."""
    is_float32 = _product_dtypes(q_dtype, kv_dtype)[0] == "float32"
    return TILINGS[max(64, pl.next_power_of_2(head_dim)), 32 if is_float32 else 8 * jnp.dtype(kv_dtype).itemsize]


def _query_block(rows: int, heads: int) -> int:
    """Returns the largest block that fits into ``rows`` with ``heads`` rows a token."""
    return max(size for size in QUERY_BLOCKS if size == 1 or size * heads <= rows)


# Jitted, so that a model's layers share one trace; XLA inlines the calls.
@functools.partial(jax.jit, static_argnames=("sm_scale", "sliding_window", "soft_cap", "return_lse", "interpret", "tiling"))
def ragged_paged_attention(
    q: Float[Array, "T H D"],
    kv_pages: Num[Array, "N B 2K D"],
    kv_lens: Int[Array, " S"],
    block_tables: Int[Array, "S P"],
    cu_q_lens: Int[Array, " S+1"],
    distribution: Int[Array, " 3"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    k_scale: float | Float[Array, ""] | Float[Array, "N K B"] | None = None,
    v_scale: float | Float[Array, ""] | Float[Array, "N K B"] | None = None,
    return_lse: bool = False,
    work: WorkList | None = None,
    interpret: bool = False,
    tiling: Tiling | None = None,
) -> Float[Array, "T H D"] | tuple[Float[Array, "T H D"], Float[Array, "T H"]]:
    """Attends with Triton kernels; arguments as in ``pallas_kernels.paged_attention.ragged_paged_attention``, and two more.

    Args:
        q: As there, and so are the others that are not named here.
        kv_pages: As there.
        kv_lens: As there.
        block_tables: As there.
        cu_q_lens: As there.
        distribution: As there.
        sm_scale: As there.
        sliding_window: As there.
        soft_cap: As there.
        sinks: As there.
        k_scale: As there.
        v_scale: As there.
        return_lse: As there.
        work: As there.
        interpret: Whether to run in Pallas' interpreter, on any platform.
        tiling: Sizes to use; None for those of the table.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    num_pages, page_size, num_kv, _ = kv_pages.shape
    num_rows, table_width = block_tables.shape
    tiling = tiling or choose_tiling(head_dim, q.dtype, kv_pages.dtype)
    is_fp8 = kv_pages.dtype == jnp.float8_e4m3fn
    score_dtype, value_dtype = _product_dtypes(q.dtype, kv_pages.dtype)
    shape = _Shape(
        num_tokens, num_q_heads, head_dim, num_kv // 2, page_size, num_rows, table_width, str(q.dtype), score_dtype, value_dtype, is_fp8,
        float(sm_scale), sliding_window, soft_cap, min(MAX_HEADS, tiling.rows),
    )  # fmt: skip
    query_block = _query_block(tiling.rows, shape.heads)
    blocks_index = QUERY_BLOCKS.index(query_block)
    if work is None:
        sizes = {"num_tokens": num_tokens, "page_size": page_size, "table_width": table_width}
        work = make_work_list(kv_lens, cu_q_lens, distribution, **sizes, query_blocks=(query_block,))
        blocks_index = 0

    pool = lax.bitcast_convert_type(kv_pages, jnp.int8) if is_fp8 else kv_pages
    k_scalar, k_scales = _split_scale(k_scale)
    v_scalar, v_scales = _split_scale(v_scale)
    arrays = _Arrays(
        item_rows=work.split_rows,
        first_item=work.first_split,
        kv_lens=kv_lens,
        tables=block_tables.reshape(-1),
        cu_q_lens=None,
        q=q.reshape(num_tokens * num_q_heads, head_dim),
        kv=pool.reshape(num_pages * page_size * num_kv, head_dim),
        k_scalar=k_scalar,
        v_scalar=v_scalar,
        k_scales=k_scales,
        v_scales=v_scales,
        sinks=None,
    )
    items = {"item_rows": work.block_rows[blocks_index], "first_item": work.first_block[blocks_index]}
    results = _attend_blocks(arrays._replace(**items, cu_q_lens=cu_q_lens, sinks=sinks), shape, tiling, query_block, interpret)
    partials = _attend_splits(arrays, shape, tiling, interpret)
    inputs = (*partials, work.first_split, kv_lens, distribution, v_scalar, sinks)
    out, lse = _combine_splits(inputs, results, shape, interpret)
    out = out.reshape(q.shape)
    return (out, lse.reshape(num_tokens, num_q_heads)) if return_lse else out


def _attend_blocks(arrays: _Arrays, shape: _Shape, tiling: Tiling, query_block: int, interpret: bool) -> tuple[Array, Array]:
    """Returns outputs ``[T * H, D]`` and log-sums of the other rows and the padding; those of single-token rows are undefined."""
    return pl.pallas_call(
        functools.partial(_other_kernel, shape=shape, query_block=query_block, tile=tiling.tile),
        out_shape=shape.results,
        grid=(shape.head_programs, arrays.item_rows.shape[0]),
        compiler_params=pltriton.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="paged_attention_blocks",
    )(arrays)


def _attend_splits(arrays: _Arrays, shape: _Shape, tiling: Tiling, interpret: bool) -> tuple[Array, Array, Array]:
    """Returns maximum, sum ``[W * H]`` and unnormalised output ``[W * H, D]`` of each split, undefined beyond the list's end."""
    num_items = arrays.item_rows.shape[0]
    programs = min(num_items, max(1, tiling.single_programs // shape.head_programs))
    number = jax.ShapeDtypeStruct((num_items * shape.num_q_heads,), jnp.float32)
    return pl.pallas_call(
        functools.partial(_single_kernel, shape=shape, tile=tiling.single_tile, programs=programs),
        out_shape=(number, number, jax.ShapeDtypeStruct((*number.shape, shape.padded_dim), jnp.float32)),
        grid=(shape.head_programs, programs),
        compiler_params=pltriton.CompilerParams(num_warps=tiling.single_warps, num_stages=tiling.single_stages),
        interpret=interpret,
        name="paged_attention_splits",
    )(arrays)


def _combine_splits(inputs: tuple[Any, ...], results: tuple[Array, Array], shape: _Shape, interpret: bool) -> tuple[Array, Array]:
    """Returns ``results`` with those of the single-token rows, in the same memory."""
    num_inputs = len(jax.tree.leaves(inputs))
    return pl.pallas_call(
        functools.partial(_combine_kernel, shape=shape),
        out_shape=shape.results,
        grid=(shape.num_q_heads, min(shape.num_rows, shape.num_tokens)),
        input_output_aliases={num_inputs: 0, num_inputs + 1: 1},
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="paged_attention_combine",
    )(inputs, *results)
