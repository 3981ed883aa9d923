"""Ragged paged attention in plain XLA operations: online softmax over chunks of pages, correct on every platform.

Two loops with trip counts known on the device only: the single-token rows one by one, then the others in blocks of queries.
Each visits the chunks of pages that its queries can see, so the cost follows the contexts and not the padded sizes, and the
temporary memory is that of one chunk and one block whatever the width of the block tables. The algorithm is the online softmax
of Milakov and Gimelshein (arXiv 1805.02867) as used by FlashAttention (arXiv 2205.14135); state and sums are float32.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

CHUNK_TOKENS = 128
"""Key positions that one iteration looks at, rounded up to whole pages."""

QUERY_BLOCK = 64
"""Query tokens of one row that one iteration of the second loop serves."""

_NO_KEY = -1e30
"""Maximum of no scores; finite, so that the difference of two is not NaN."""


@dataclasses.dataclass(frozen=True)
class _Options:
    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None


def _attend_block(q: Array, positions: Array, table: Array, row: Array, kv_pages: Array, options: _Options) -> tuple[Array, Array, Array]:
    """Attends queries of one row to its pages.

    Args:
        q: float32 ``[K, M, D]``.
        positions: int32 ``[M]``, position of each query; -1 for queries that see nothing.
        table: int32 ``[S, P]``, P a multiple of the pages of a chunk.
        row: Row of ``table``.
        kv_pages: ``[N, B, 2K, D]``.
        options: Static options.

    Returns:
        Greatest score ``[K, M]``, sum of the exponentials ``[K, M]`` and weighted values ``[K, M, D]``, float32.
    """
    num_kv_heads, num_queries, head_dim = q.shape
    page_size = kv_pages.shape[1]
    pages_per_chunk = _pages_per_chunk(page_size)
    chunk = pages_per_chunk * page_size
    last = jnp.max(positions)
    first = jnp.int32(0)
    if options.sliding_window is not None:
        oldest = jnp.min(jnp.where(positions >= 0, positions, last)) - options.sliding_window + 1
        first = jnp.maximum(oldest, 0) // chunk

    def visit(index: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, acc = state
        ids = lax.dynamic_slice(table, (row, index * pages_per_chunk), (1, pages_per_chunk))[0]
        kv = kv_pages.at[ids].get(mode="clip").reshape(chunk, num_kv_heads, 2, head_dim)
        where = index * chunk + jnp.arange(chunk, dtype=jnp.int32)
        keys = kv[:, :, 0].transpose(1, 0, 2).astype(jnp.float32)
        values = jnp.where((where <= last)[None, :, None], kv[:, :, 1].transpose(1, 0, 2), 0).astype(jnp.float32)
        scores = jnp.einsum("kmd,kcd->kmc", q, keys, precision="highest") * options.sm_scale
        if options.soft_cap is not None:
            scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
        seen = where[None, :] <= positions[:, None]
        if options.sliding_window is not None:
            seen &= where[None, :] > positions[:, None] - options.sliding_window
        scores = jnp.where(seen[None], scores, _NO_KEY)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(seen[None], jnp.exp(scores - new_top[..., None]), 0)
        decay = jnp.exp(top - new_top)
        acc = acc * decay[..., None] + jnp.einsum("kmc,kcd->kmd", weights, values, precision="highest")
        return new_top, total * decay + weights.sum(-1), acc

    zero = jnp.zeros((num_kv_heads, num_queries), jnp.float32)
    init = (zero + _NO_KEY, zero, jnp.zeros(q.shape, jnp.float32))
    return lax.fori_loop(first, last // chunk + 1, visit, init)


def _pages_per_chunk(page_size: int) -> int:
    return max(1, -(-CHUNK_TOKENS // page_size))


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
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = kv_pages.shape[2] // 2
    group = num_q_heads // num_kv_heads
    options = _Options(sm_scale, sliding_window, soft_cap)
    table = jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % _pages_per_chunk(kv_pages.shape[1]))))
    block = min(QUERY_BLOCK, num_tokens)

    queries = q.astype(jnp.float32) if k_scale is None else q.astype(jnp.float32) * k_scale
    queries = jnp.pad(queries.reshape(num_tokens, num_kv_heads, group, head_dim), ((0, block), (0, 0), (0, 0), (0, 0)))
    state = (
        jnp.full(queries.shape[:3], _NO_KEY, jnp.float32),
        jnp.zeros(queries.shape[:3], jnp.float32),
        jnp.zeros(queries.shape, jnp.float32),
    )

    def serve(size: int, row: Array, token: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        """Attends ``size`` queries of ``row`` from ``token`` on; those that are beyond the row's end come out empty."""
        end = cu_q_lens[row + 1]
        where = token + jnp.arange(size, dtype=jnp.int32)
        positions = jnp.where(where < end, kv_lens[row] - end + where, -1)
        q_block = lax.dynamic_slice_in_dim(queries, token, size).transpose(1, 2, 0, 3).reshape(num_kv_heads, group * size, head_dim)
        parts = _attend_block(q_block, jnp.tile(positions, group), table, row, kv_pages, options)
        parts = [jnp.moveaxis(part.reshape(num_kv_heads, group, size, *part.shape[2:]), 2, 0) for part in parts]
        return tuple(lax.dynamic_update_slice_in_dim(whole, part, token, 0) for whole, part in zip(state, parts, strict=True))

    def serve_row(row: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        start = cu_q_lens[row]
        num_blocks = (cu_q_lens[row + 1] - start + block - 1) // block
        return lax.fori_loop(0, num_blocks, lambda i, state: serve(block, row, start + i * block, state), state)

    # A block may reach into the next row's tokens; that row comes later and writes over it.
    state = lax.fori_loop(0, distribution[0], lambda row, state: serve(1, row, cu_q_lens[row], state), state)
    state = lax.fori_loop(distribution[0], distribution[2], serve_row, state)

    top, total, acc = (part[:num_tokens].reshape(num_tokens, num_q_heads, *part.shape[3:]) for part in state)
    if sinks is not None:
        new_top = jnp.maximum(top, sinks)
        decay = jnp.exp(top - new_top)
        in_use = (jnp.arange(num_tokens) < cu_q_lens[-1])[:, None]
        top, total, acc = new_top, jnp.where(in_use, total * decay + jnp.exp(sinks - new_top), 0), acc * decay[..., None]
    empty = total == 0
    out = acc / jnp.where(empty, 1, total)[..., None]
    if v_scale is not None:
        out = out * v_scale
    out = out.astype(q.dtype)
    if not return_lse:
        return out
    return out, jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1, total)))
