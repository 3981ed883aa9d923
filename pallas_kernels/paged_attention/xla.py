"""Ragged paged attention in plain XLA operations: online softmax over chunks of pages, correct on every platform.

Single-token rows are served in blocks of rows, sorted by length so that a block's rows end together; the other rows are served one
block of query tokens at a time. Both loops have trip counts known on the device only, so the cost follows the contexts and not the
padded sizes, and the temporary memory is that of one chunk of one block whatever the width of the block tables. A row's result
does not depend on the rows beside it: a chunk that a row does not reach changes none of its bits.

The algorithm is the online softmax of Milakov and Gimelshein (arXiv 1805.02867) as used by FlashAttention (arXiv 2205.14135);
state and sums are float32. The shapes are chosen for XLA:CPU, which has no other implementation (measured on two cores):
a gather is as fast as memory only where its innermost run is long enough to be vectorised, so K and V of a head are gathered
together, as one run of ``2 * D`` numbers; and a product is fastest with the keys on its left side. With few queries it costs
less to multiply the pair [K, V] with queries that are zero in V's half than to pull K and V apart.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

CHUNK_TOKENS = 128
"""Key positions that one iteration looks at, rounded up to whole pages."""

ROW_BLOCK = 8
"""Single-token rows that are served together."""

QUERY_BLOCK = 64
"""Query tokens of one row that are served together."""

FEW_QUERIES = 16
"""Up to this many queries a key/value head, K and V stay together in the products."""

_NO_KEY = -1e30
"""Maximum of no scores; finite, so that the difference of two is not NaN."""


@dataclasses.dataclass(frozen=True)
class _Options:
    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None
    sinks: Float[Array, "K G"] | None
    k_scale: float | Float[Array, ""] | None
    v_scale: float | Float[Array, ""] | None


def _pages_per_chunk(page_size: int) -> int:
    return max(1, -(-CHUNK_TOKENS // page_size))


def _gather_chunk(kv_pages: Float[Array, "N B 2K D"], ids: Int[Array, "W n"], in_use: Bool[Array, "W C"]) -> Float[Array, "W K C 2D"]:
    """Returns keys and values of some pages as float32, each head's side by side; zeros where not ``in_use``, be it NaN there."""
    num_pages, page_size, num_kv, head_dim = kv_pages.shape
    num_kv_heads = num_kv // 2
    runs = kv_pages.reshape(num_pages * page_size * num_kv_heads, 2 * head_dim)
    tokens = (ids[:, :, None] * page_size + jnp.arange(page_size, dtype=jnp.int32)).reshape(ids.shape[0], 1, -1)
    indices = tokens * num_kv_heads + jnp.arange(num_kv_heads, dtype=jnp.int32)[:, None]
    return jnp.where(in_use[:, None, :, None], runs.at[indices].get(mode="clip"), 0).astype(jnp.float32)


def _attend(
    q: Float[Array, "W M H D"],
    positions: Int[Array, "W M"],
    table: Int[Array, "W P"],
    kv_pages: Float[Array, "N B 2K D"],
    options: _Options,
) -> tuple[Float[Array, "W M H D"], Float[Array, "W M H"]]:
    """Attends M queries of each of W rows to the row's pages.

    Args:
        q: Queries.
        positions: Position of each query, -1 for queries that see nothing.
        table: Page ids of the rows, P a multiple of the pages of a chunk.
        kv_pages: The pool of the layer.
        options: Options of the call.

    Returns:
        Outputs and log-sums, float32; 0 and -inf for queries that see nothing.
    """
    rows, block, num_q_heads, head_dim = q.shape
    page_size, num_kv_heads = kv_pages.shape[1], kv_pages.shape[2] // 2
    group = num_q_heads // num_kv_heads
    num_queries = block * group
    pages_per_chunk = _pages_per_chunk(page_size)
    chunk = pages_per_chunk * page_size
    few = num_queries <= FEW_QUERIES

    scale = options.sm_scale if options.k_scale is None else options.sm_scale * options.k_scale
    queries = q.astype(jnp.float32).reshape(rows, block, num_kv_heads, group, head_dim).transpose(0, 2, 1, 3, 4) * scale
    queries = queries.reshape(rows, num_kv_heads, num_queries, head_dim)
    if few:
        queries = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, head_dim)))
    query_positions = jnp.repeat(positions, group, axis=1)[:, None, :, None]  # [W, 1, M * G, 1]
    last = positions.max(axis=1, keepdims=True)
    first_chunk = jnp.int32(0)
    if options.sliding_window is not None:
        oldest = jnp.min(jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max)) - options.sliding_window + 1
        first_chunk = jnp.maximum(oldest, 0) // chunk

    def visit(index: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, acc = state
        ids = lax.dynamic_slice_in_dim(table, index * pages_per_chunk, pages_per_chunk, axis=1)
        where = index * chunk + jnp.arange(chunk, dtype=jnp.int32)
        kv = _gather_chunk(kv_pages, ids, where <= last)
        if few:
            scores = jnp.einsum("wkcd,wkmd->wkcm", kv, queries, precision="highest")
            scores = lax.optimization_barrier(scores).transpose(0, 1, 3, 2)  # without it XLA swaps the product's sides back
        else:
            scores = jnp.einsum("wkmd,wkcd->wkmc", queries, kv[..., :head_dim], precision="highest")
        if options.soft_cap is not None:
            scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
        seen = where <= query_positions
        if options.sliding_window is not None:
            seen &= where > query_positions - options.sliding_window
        scores = jnp.where(seen, scores, _NO_KEY)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0)
        decay = jnp.exp(top - new_top)
        values = kv if few else kv[..., head_dim:]
        acc = acc * decay[..., None] + jnp.einsum("wkmc,wkcd->wkmd", weights, values, precision="highest")
        return new_top, total * decay + weights.sum(-1), acc

    zero = jnp.zeros((rows, num_kv_heads, num_queries), jnp.float32)
    init = (zero + _NO_KEY, zero, jnp.zeros(queries.shape, jnp.float32))
    top, total, acc = lax.fori_loop(first_chunk, jnp.max(last) // chunk + 1, visit, init)
    acc = acc[..., -head_dim:]
    if options.sinks is not None:
        sinks = jnp.tile(options.sinks, (1, block))
        new_top = jnp.maximum(top, sinks)
        decay = jnp.exp(top - new_top)
        total = jnp.where(query_positions[..., 0] >= 0, total * decay + jnp.exp(sinks - new_top), 0)
        top, acc = new_top, acc * decay[..., None]
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = acc / total[..., None]
    if options.v_scale is not None:
        out = out * options.v_scale
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))

    def by_token(x: Array) -> Array:
        x = x.reshape(rows, num_kv_heads, block, group, *x.shape[3:])
        return jnp.moveaxis(x, 2, 1).reshape(rows, block, num_q_heads, *x.shape[4:])

    return by_token(out), by_token(lse)


def _attend_single_token_rows(
    q: Float[Array, "T H D"],
    kv_pages: Float[Array, "N B 2K D"],
    kv_lens: Int[Array, " S"],
    table: Int[Array, "S P"],
    cu_q_lens: Int[Array, " S+1"],
    num_rows: Int[Array, ""],
    options: _Options,
) -> tuple[Float[Array, "S H D"], Float[Array, "S H"]]:
    """Attends the first ``num_rows`` rows, of one token each; the results of other rows are undefined but finite."""
    capacity = kv_lens.shape[0]
    block = min(ROW_BLOCK, capacity)
    lens = jnp.where(jnp.arange(capacity) < num_rows, kv_lens, 0)
    order = jnp.argsort(lens, descending=True)
    padding = (0, -capacity % block)
    lens = jnp.pad(lens[order], padding)
    table = jnp.pad(table[order], (padding, (0, 0)))
    queries = jnp.pad(q.at[cu_q_lens[order]].get(mode="clip"), (padding, (0, 0), (0, 0)))

    def serve(index: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        start = index * block
        lens_, table_, queries_ = (lax.dynamic_slice_in_dim(x, start, block) for x in (lens, table, queries))
        parts = _attend(queries_[:, None], lens_[:, None] - 1, table_, kv_pages, options)
        return tuple(lax.dynamic_update_slice_in_dim(x, part[:, 0], start, 0) for x, part in zip(results, parts, strict=True))

    init = (jnp.zeros(queries.shape, jnp.float32), jnp.zeros(queries.shape[:2], jnp.float32))
    out, lse = lax.fori_loop(0, (num_rows + block - 1) // block, serve, init)
    back = jnp.argsort(order)
    return out[back], lse[back]


def _attend_other_rows(
    q: Float[Array, "T H D"],
    kv_pages: Float[Array, "N B 2K D"],
    kv_lens: Int[Array, " S"],
    table: Int[Array, "S P"],
    cu_q_lens: Int[Array, " S+1"],
    first_row: Int[Array, ""],
    end_row: Int[Array, ""],
    options: _Options,
) -> tuple[Float[Array, "T H D"], Float[Array, "T H"]]:
    """Attends the rows from ``first_row`` to ``end_row``; zeros and -inf for the tokens of no such row."""
    num_tokens = q.shape[0]
    block = min(QUERY_BLOCK, num_tokens)

    def serve_row(row: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        row_start, row_end = cu_q_lens[row], cu_q_lens[row + 1]

        def serve(index: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
            start = row_start + index * block
            window = jnp.minimum(start, num_tokens - block)  # the last block of the array reaches back instead of beyond its end
            tokens = window + jnp.arange(block, dtype=jnp.int32)
            mine = (tokens >= start) & (tokens < row_end)
            positions = jnp.where(mine, kv_lens[row] - row_end + tokens, -1)
            queries = lax.dynamic_slice_in_dim(q, window, block)
            parts = _attend(queries[None], positions[None], lax.dynamic_slice_in_dim(table, row, 1), kv_pages, options)
            old = [lax.dynamic_slice_in_dim(x, window, block) for x in results]
            new = [jnp.where(mine.reshape(-1, *[1] * (o.ndim - 1)), part[0], o) for o, part in zip(old, parts, strict=True)]
            return tuple(lax.dynamic_update_slice_in_dim(x, n, window, 0) for x, n in zip(results, new, strict=True))

        return lax.fori_loop(0, (row_end - row_start + block - 1) // block, serve, results)

    init = (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], -jnp.inf, jnp.float32))
    return lax.fori_loop(first_row, end_row, serve_row, init)


def ragged_paged_attention(
    q: Float[Array, "T H D"],
    kv_pages: Float[Array, "N B 2K D"],
    kv_lens: Int[Array, " S"],
    block_tables: Int[Array, "S P"],
    cu_q_lens: Int[Array, " S+1"],
    distribution: Int[Array, " 3"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    k_scale: float | Float[Array, ""] | None = None,
    v_scale: float | Float[Array, ""] | None = None,
    return_lse: bool = False,
) -> Float[Array, "T H D"] | tuple[Float[Array, "T H D"], Float[Array, "T H"]]:
    """Attends in plain XLA operations; arguments as in ``pallas_kernels.paged_attention.ragged_paged_attention``."""
    num_tokens, num_q_heads = q.shape[:2]
    num_kv_heads = kv_pages.shape[2] // 2
    by_kv_head = None if sinks is None else sinks.reshape(num_kv_heads, num_q_heads // num_kv_heads)
    options = _Options(sm_scale, sliding_window, soft_cap, by_kv_head, k_scale, v_scale)
    table = jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % _pages_per_chunk(kv_pages.shape[1]))))

    singles = _attend_single_token_rows(q, kv_pages, kv_lens, table, cu_q_lens, distribution[0], options)
    others = _attend_other_rows(q, kv_pages, kv_lens, table, cu_q_lens, distribution[0], distribution[2], options)

    def merge(single: Array, other: Array) -> Array:
        """Takes token t from row t where rows are single tokens."""
        single = single[:num_tokens]
        single = jnp.pad(single, ((0, num_tokens - single.shape[0]), *[(0, 0)] * (other.ndim - 1)))
        is_single = jnp.arange(num_tokens) < distribution[0]
        return jnp.where(is_single.reshape(-1, *[1] * (other.ndim - 1)), single, other)

    out = merge(singles[0], others[0]).astype(q.dtype)
    return (out, merge(singles[1], others[1])) if return_lse else out
