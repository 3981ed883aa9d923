"""Ragged paged attention in plain XLA operations: online softmax over chunks of pages, correct on every platform.

Single-token rows are served in blocks of rows, sorted by length so that a block's rows end together; the other rows are served one
block of query tokens at a time. Both loops have trip counts known on the device only, so the cost follows the contexts and not the
padded sizes, and the temporary memory is that of one chunk of one block whatever the width of the block tables. A row's result
does not depend on the rows beside it: a chunk that a row does not reach changes none of its bits.

The algorithm is the online softmax of Milakov and Gimelshein (arXiv 1805.02867) as used by FlashAttention (arXiv 2205.14135);
state and sums are float32. The shapes are chosen for XLA:CPU, which has no other implementation. What was measured on two cores:

- A gather is as fast as memory only where its innermost run is long enough to be vectorised (64 numbers are not). So with few
  queries K and V of a head are gathered together, as one run of ``2 * D`` numbers, and the queries are zero in V's half.
- With few queries a product is twice as fast with the keys on its left side.
- Products do not use a second core. A gather does, but then half of what the product reads lies in the other core's cache, and the
  two together are slower than on one core. So chunks are gathered into a scratch array row by row, which XLA keeps on one core.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from pallas_kernels.kv_write.quantize import from_storage

Scale = float | Float[Array, ""] | Float[Array, "N K B"]

QUERY_BLOCK = 128
"""Query tokens of one row that are served together."""

FEW_QUERIES = 16
"""Up to this many queries a key/value head, K and V stay together in the products."""

_TPU_LANES = 128

_NO_KEY = -1e30
"""Maximum of no scores; finite, so that the difference of two is not NaN."""


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How much one iteration looks at.

    Attributes:
        rows: Most single-token rows that are served together.
        chunk_tokens: Key positions, rounded up to whole pages.
        scratch_bytes: Limit for the keys and values of one iteration; fewer rows, but two, are served together where they are more.
        by_row: Whether to gather several rows into a scratch array one by one.
        together: Whether to gather K and V of a head as one run where queries are few. A TPU keeps the last two axes in tiles of
            8 x 128, so that it would copy the whole pool to see such runs.
    """

    rows: int
    chunk_tokens: int
    scratch_bytes: int
    by_row: bool
    together: bool

    def pages(self, page_size: int) -> int:
        """Returns the pages of a chunk."""
        return max(1, -(-self.chunk_tokens // page_size))


_CPU_SINGLE = _Tiling(rows=4, chunk_tokens=64, scratch_bytes=512 * 1024, by_row=True, together=True)
_ACCELERATOR = _Tiling(rows=64, chunk_tokens=256, scratch_bytes=256 * 1024 * 1024, by_row=False, together=False)
_OTHER = _Tiling(rows=1, chunk_tokens=256, scratch_bytes=0, by_row=False, together=False)


@dataclasses.dataclass(frozen=True)
class _Options:
    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None
    sinks: Float[Array, "K G"] | None
    k_scale: Scale | None
    v_scale: Scale | None


def _per_token(scale: Scale | None) -> bool:
    return jnp.ndim(scale) == 3 if scale is not None else False


def _whole(scale: Scale | None) -> float | Float[Array, ""]:
    """Returns the scale that all tokens share."""
    return 1.0 if scale is None or _per_token(scale) else scale


def _gather_scales(scale: Float[Array, "N K B"], page_ids: Int[Array, "W n"]) -> Float[Array, "W K 1 C"]:
    """Returns the scales of all tokens of some pages; those that a row does not own may be NaN."""
    found = jnp.moveaxis(scale.at[page_ids].get(mode="clip"), 1, 2)  # [W, K, n, B]
    return found.reshape(*found.shape[:2], 1, -1)


def _gather_runs(
    kv_pages: Num[Array, "N B 2K D"], tokens: Int[Array, "W C"], in_use: Bool[Array, "W C"], *, width: int, first: int = 0
) -> Float[Array, "W K C width"]:
    """Returns, of each head of some tokens, a run of ``width`` numbers as float32; zeros where not ``in_use``, be it NaN there.

    Args:
        kv_pages: The pool of the layer.
        tokens: Page id times page size plus offset.
        in_use: Whether the row owns the token.
        width: ``2 * D`` for K and V side by side, or ``D`` for one of them.
        first: With ``width`` D, 0 for K and 1 for V.
    """
    num_kv, head_dim = kv_pages.shape[2:]
    runs_per_token = num_kv * head_dim // width
    heads = jnp.arange(first, runs_per_token, 2 * head_dim // width, dtype=jnp.int32)
    runs = kv_pages.reshape(-1, width).at[tokens[:, None] * runs_per_token + heads[:, None]].get(mode="clip")
    runs = jnp.where(in_use[:, None, :, None], runs, 0)
    return from_storage(runs).astype(jnp.float32)


def _fill_by_row(
    scratch: Float[Array, "W K C 2D"], kv_pages: Num[Array, "N B 2K D"], tokens: Int[Array, "W C"], in_use: Bool[Array, "W C"]
) -> Float[Array, "W K C 2D"]:
    """Overwrites the scratch array with keys and values, one row after the other."""

    def fill(row: Array, scratch: Array) -> Array:
        row_tokens, row_in_use = (lax.dynamic_slice_in_dim(x, row, 1) for x in (tokens, in_use))
        runs = _gather_runs(kv_pages, row_tokens, row_in_use, width=scratch.shape[3])
        return lax.dynamic_update_slice_in_dim(scratch, runs, row, 0)

    return lax.fori_loop(0, scratch.shape[0], fill, scratch)


def _add_sinks(
    top: Float[Array, "W K Q"], total: Float[Array, "W K Q"], acc: Float[Array, "W K Q D"], sinks: Float[Array, "K Q"], sees: Any
) -> tuple[Float[Array, "W K Q"], Float[Array, "W K Q"], Float[Array, "W K Q D"]]:
    """Adds the sinks to the sums of queries that see anything."""
    new_top = jnp.maximum(top, sinks)
    decay = jnp.exp(top - new_top)
    return new_top, jnp.where(sees, total * decay + jnp.exp(sinks - new_top), 0), acc * decay[..., None]


def _attend(
    q: Float[Array, "W M H D"],
    positions: Int[Array, "W M"],
    table: Int[Array, "W P"],
    kv_pages: Num[Array, "N B 2K D"],
    options: _Options,
    tiling: _Tiling,
    scratch: Float[Array, "W K C 2D"] | None = None,
) -> tuple[Float[Array, "W M H D"], Float[Array, "W M H"], Float[Array, "W K C 2D"] | None]:
    """Attends M queries of each of W rows to the row's pages.

    Args:
        q: Queries.
        positions: Position of each query, -1 for queries that see nothing.
        table: Page ids of the rows, P a multiple of the pages of a chunk.
        kv_pages: The pool of the layer.
        options: Options of the call.
        tiling: How much to look at at once.
        scratch: Array to gather into row by row, of any content, with few queries; None to gather all rows at once.

    Returns:
        Outputs and log-sums, float32, 0 and -inf for queries that see nothing; and the scratch array.
    """
    rows, block, num_q_heads, head_dim = q.shape
    page_size, num_kv_heads = kv_pages.shape[1], kv_pages.shape[2] // 2
    group = num_q_heads // num_kv_heads
    num_queries = block * group
    pages_per_chunk = tiling.pages(page_size)
    chunk = pages_per_chunk * page_size
    few = tiling.together and num_queries <= FEW_QUERIES

    k_scale, v_scale = options.k_scale, options.v_scale
    scale = options.sm_scale * _whole(k_scale)
    queries = q.astype(jnp.float32).reshape(rows, block, num_kv_heads, group, head_dim).transpose(0, 2, 1, 3, 4) * scale
    queries = queries.reshape(rows, num_kv_heads, num_queries, head_dim)
    if few:
        queries = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, head_dim)))
    query_positions = jnp.repeat(positions, group, axis=1)[:, None, :, None]  # [W, 1, M * G, 1]
    last = positions.max(axis=1, keepdims=True)
    first = jnp.zeros_like(last)  # [W, 1], the first position that a query of the row sees
    if options.sliding_window is not None:
        earliest = jnp.min(jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
        first = jnp.maximum(earliest - options.sliding_window + 1, 0)
    first_chunk = jnp.min(first) // chunk

    def visit(index: Array, state: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
        top, total, acc, scratch = state
        ids = lax.dynamic_slice_in_dim(table, index * pages_per_chunk, pages_per_chunk, axis=1)
        tokens = (ids[:, :, None] * page_size + jnp.arange(page_size, dtype=jnp.int32)).reshape(rows, chunk)
        where = index * chunk + jnp.arange(chunk, dtype=jnp.int32)
        in_use = (where >= first) & (where <= last)  # pages before the window may be another row's by now
        if few:
            if scratch is None:
                keys = values = _gather_runs(kv_pages, tokens, in_use, width=2 * head_dim)
            else:
                keys = values = scratch = _fill_by_row(scratch, kv_pages, tokens, in_use)
            scores = jnp.einsum("wkcd,wkmd->wkcm", keys, queries, precision="highest")
            scores = lax.optimization_barrier(scores).transpose(0, 1, 3, 2)  # without it XLA swaps the product's sides back
        else:
            keys = _gather_runs(kv_pages, tokens, in_use, width=head_dim)
            values = _gather_runs(kv_pages, tokens, in_use, width=head_dim, first=1)
            scores = jnp.einsum("wkmd,wkcd->wkmc", queries, keys, precision="highest")
        if _per_token(k_scale):
            scores *= _gather_scales(k_scale, ids)
        if options.soft_cap is not None:
            scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
        seen = where <= query_positions
        if options.sliding_window is not None:
            seen &= where > query_positions - options.sliding_window
        scores = jnp.where(seen, scores, _NO_KEY)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0)
        decay = jnp.exp(top - new_top)
        total = total * decay + weights.sum(-1)
        if _per_token(v_scale):
            weights = jnp.where(seen, weights * _gather_scales(v_scale, ids), 0)
        acc = acc * decay[..., None] + jnp.einsum("wkmc,wkcd->wkmd", weights, values, precision="highest")
        return new_top, total, acc, scratch

    zero = jnp.zeros((rows, num_kv_heads, num_queries), jnp.float32)
    init = (zero + _NO_KEY, zero, jnp.zeros(queries.shape, jnp.float32), scratch)
    top, total, acc, scratch = lax.fori_loop(first_chunk, jnp.max(last) // chunk + 1, visit, init)
    acc = acc[..., -head_dim:]
    if options.sinks is not None:
        sinks = jnp.tile(options.sinks, (1, block))
        top, total, acc = _add_sinks(top, total, acc, sinks, query_positions[..., 0] >= 0)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = acc / total[..., None] * _whole(v_scale)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))

    def by_token(x: Array) -> Array:
        x = x.reshape(rows, num_kv_heads, block, group, *x.shape[3:])
        return jnp.moveaxis(x, 2, 1).reshape(rows, block, num_q_heads, *x.shape[4:])

    return by_token(out), by_token(lse), scratch


def _attend_single_token_rows(
    q: Float[Array, "T H D"],
    kv_pages: Num[Array, "N B 2K D"],
    kv_lens: Int[Array, " S"],
    block_tables: Int[Array, "S P"],
    cu_q_lens: Int[Array, " S+1"],
    num_rows: Int[Array, ""],
    options: _Options,
    tiling: _Tiling,
) -> tuple[Float[Array, "S H D"], Float[Array, "S H"]]:
    """Attends the first ``num_rows`` rows, of one token each; the results of other rows are undefined but finite."""
    capacity = kv_lens.shape[0]
    page_size, num_kv, head_dim = kv_pages.shape[1:]
    chunk = tiling.pages(page_size) * page_size
    block = min(max(2, min(tiling.rows, tiling.scratch_bytes // (chunk * num_kv * head_dim * 4))), capacity)
    lens = jnp.where(jnp.arange(capacity) < num_rows, kv_lens, 0)
    order = jnp.argsort(lens, descending=True)
    padding = (0, -capacity % block)
    lens = jnp.pad(lens[order], padding)
    table = jnp.pad(block_tables[order], (padding, (0, -block_tables.shape[1] % tiling.pages(page_size))))
    queries = jnp.pad(q.at[cu_q_lens[order]].get(mode="clip"), (padding, (0, 0), (0, 0)))

    def serve(index: Array, state: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
        all_out, all_lse, scratch = state
        start = index * block
        lens_, table_, queries_ = (lax.dynamic_slice_in_dim(x, start, block) for x in (lens, table, queries))
        out, lse, scratch = _attend(queries_[:, None], lens_[:, None] - 1, table_, kv_pages, options, tiling, scratch)
        update = lax.dynamic_update_slice_in_dim
        return update(all_out, out[:, 0], start, 0), update(all_lse, lse[:, 0], start, 0), scratch

    group = q.shape[1] * 2 // num_kv
    by_row = tiling.by_row and block > 1 and group <= FEW_QUERIES
    scratch = jnp.zeros((block, num_kv // 2, chunk, 2 * head_dim), jnp.float32) if by_row else None
    init = (jnp.zeros(queries.shape, jnp.float32), jnp.zeros(queries.shape[:2], jnp.float32), scratch)
    out, lse, _ = lax.fori_loop(0, (num_rows + block - 1) // block, serve, init)
    back = jnp.argsort(order)
    return out[back], lse[back]


def _attend_other_rows(
    q: Float[Array, "T H D"],
    kv_pages: Num[Array, "N B 2K D"],
    kv_lens: Int[Array, " S"],
    block_tables: Int[Array, "S P"],
    cu_q_lens: Int[Array, " S+1"],
    first_row: Int[Array, ""],
    end_row: Int[Array, ""],
    options: _Options,
    tiling: _Tiling,
) -> tuple[Float[Array, "T H D"], Float[Array, "T H"]]:
    """Attends the rows from ``first_row`` to ``end_row``; zeros and -inf for the tokens of no such row."""
    num_tokens = q.shape[0]
    block = min(QUERY_BLOCK, num_tokens)
    table = jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % tiling.pages(kv_pages.shape[1]))))

    def serve_row(row: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        row_start, row_end = cu_q_lens[row], cu_q_lens[row + 1]

        def serve(index: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
            start = row_start + index * block
            window = jnp.minimum(start, num_tokens - block)  # the last block of the array reaches back instead of beyond its end
            tokens = window + jnp.arange(block, dtype=jnp.int32)
            mine = (tokens >= start) & (tokens < row_end)
            positions = jnp.where(mine, kv_lens[row] - row_end + tokens, -1)
            queries = lax.dynamic_slice_in_dim(q, window, block)
            parts = _attend(queries[None], positions[None], lax.dynamic_slice_in_dim(table, row, 1), kv_pages, options, tiling)[:2]
            old = [lax.dynamic_slice_in_dim(x, window, block) for x in results]
            new = [jnp.where(mine.reshape(-1, *[1] * (o.ndim - 1)), part[0], o) for o, part in zip(old, parts, strict=True)]
            return tuple(lax.dynamic_update_slice_in_dim(x, n, window, 0) for x, n in zip(results, new, strict=True))

        return lax.fori_loop(0, (row_end - row_start + block - 1) // block, serve, results)

    init = (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], -jnp.inf, jnp.float32))
    return lax.fori_loop(first_row, end_row, serve_row, init)


# Jitted, so that a model's layers share one trace; XLA inlines the calls.
@functools.partial(jax.jit, static_argnames=("sm_scale", "sliding_window", "soft_cap", "return_lse"))
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
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    return_lse: bool = False,
    work: None = None,
) -> Float[Array, "T H D"] | tuple[Float[Array, "T H D"], Float[Array, "T H"]]:
    """Attends in plain XLA operations; arguments as in ``pallas_kernels.paged_attention.ragged_paged_attention``."""
    num_tokens, num_q_heads = q.shape[:2]
    num_kv_heads = kv_pages.shape[2] // 2
    by_kv_head = None if sinks is None else sinks.reshape(num_kv_heads, num_q_heads // num_kv_heads)
    options = _Options(sm_scale, sliding_window, soft_cap, by_kv_head, k_scale, v_scale)
    # One token in one row is a single-token row, however it is announced, so there is no second loop to compile.
    only_single = num_tokens == 1 and kv_lens.shape[0] == 1
    num_singles = jnp.minimum(cu_q_lens[1], distribution[2]) if only_single else distribution[0]
    singles = lax.platform_dependent(
        q, kv_pages, kv_lens, block_tables, cu_q_lens, num_singles,
        cpu=functools.partial(_attend_single_token_rows, options=options, tiling=_CPU_SINGLE),
        default=functools.partial(_attend_single_token_rows, options=options, tiling=_ACCELERATOR),
    )  # fmt: skip
    if only_single:
        others = (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], -jnp.inf, jnp.float32))
    else:
        others = _attend_other_rows(q, kv_pages, kv_lens, block_tables, cu_q_lens, num_singles, distribution[2], options, _OTHER)

    def merge(single: Array, other: Array) -> Array:
        """Takes token t from row t where rows are single tokens."""
        single = single[:num_tokens]
        single = jnp.pad(single, ((0, num_tokens - single.shape[0]), *[(0, 0)] * (other.ndim - 1)))
        is_single = jnp.arange(num_tokens) < num_singles
        return jnp.where(is_single.reshape(-1, *[1] * (other.ndim - 1)), single, other)

    out = merge(singles[0], others[0]).astype(q.dtype)
    return (out, merge(singles[1], others[1])) if return_lse else out


def make_work_list(kv_lens: Any, cu_q_lens: Any, distribution: Any, *, num_tokens: int, page_size: int, table_width: int) -> None:
    """Returns None: this implementation walks the rows as they come."""


def storage_head_dim(head_dim: int) -> int:
    """Returns ``head_dim``, on a TPU rounded up to whole lanes: a pool of narrower heads lies transposed, and each call would copy it."""
    return -(-head_dim // _TPU_LANES) * _TPU_LANES if jax.default_backend() == "tpu" else head_dim
