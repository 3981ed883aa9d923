"""Ragged paged attention for TPUs (Pallas, Mosaic): compiled for v5e, v6e and tpu7x, never run on one.

Two kernels share one stream of pages. ``kv_lens``, the block tables and the ranges of rows are scalars in SMEM; the pool stays in HBM,
and a kernel copies the pages that a row needs into VMEM, one block of pages ahead of the block it computes on, across rows and grid
steps. Softmax maximum, sum and output sum are float32, whatever the pool is.

* Single-token rows: one grid step serves a few rows one after the other, all heads of a row at once. The first step also writes the new
  tokens of ``ragged_paged_attention_update``, HBM to HBM into the aliased pool, before anything is fetched; up to 16 tokens that follow
  each other in a page are one copy. The second kernel reads the pool that the first returns, so chunks see their own tokens.
* Other rows: one grid step serves a block of the flat query tokens, whichever rows they are of, row by row; a row's queries that see
  nothing of a block of keys are left out 16 tokens at a time or more. Runs only if there is such a row.

What a row sees is cut into blocks at fixed positions, so its bits depend on its own keys and the static shapes only.

Budget of VMEM, of which the kernels may use 48 MiB (tpu7x has 64 MiB, v5e and v6e 128 MiB): a token of 8 key/value heads of 128 in
bfloat16 is 4 KiB, so a block of 512 tokens takes 2 MiB and its two slots 4 MiB. The first kernel adds the scores, ``[K * G, 512]``
float32, 0.1 MiB at G = 4. The second holds, for 256 query tokens of 32 heads, q and out of 2 MiB each, twice, and 4 MiB each of output
sum, maximum and total: 20 MiB, the most that the default tiling allows. Of HBM, a decode step reads K and V once, and a chunk reads
those of its row once for each 256 query tokens (at 32 heads), so 1024 queries of a key/value head share each key.

Block tables lie in SMEM, 1 MiB: 256 rows of 960 pages fit. Larger ones go to the XLA implementation, with a warning.

The layout of the pool, the copies one block ahead and the strided loads through 32-bit words are ideas of the ragged paged attention of
jax (``jax/experimental/pallas/ops/tpu/ragged_paged_attention``) and of vllm-project/tpu-inference
(``tpu_inference/kernels/ragged_paged_attention/v3``), which also fuses the write; the online softmax is that of Milakov and Gimelshein
(arXiv 1805.02867) and FlashAttention (arXiv 2205.14135).
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.kv_write.quantize import to_storage
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.tpu.kernels import CallOptions, attend_blocks, attend_single_tokens
from pallas_kernels.paged_attention.tpu.pages import LANES, WRITE_RUN, PageShape

VMEM_LIMIT_BYTES = 48 * 1024 * 1024
"""What both kernels may take of VMEM: the default of 16 MiB is too little, tpu7x has 64 MiB, v5e and v6e have 128 MiB."""

_SUBLANES = 8

_MOST_TOKEN_BYTES = 32 * 1024
"""Keys and values of one token: two slots of the smallest block of 256 then take 16 MiB."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How much one iteration looks at; numbers of tokens.

    Attributes:
        single_rows: Single-token rows of one grid step.
        single_block: KV block of the single-token rows.
        query_block: Query tokens of one grid step for the other rows.
        query_part: Query tokens of one product; divides ``query_block``.
        block: KV block of the other rows.
    """

    single_rows: int
    single_block: int
    query_block: int
    query_part: int
    block: int


def _power_below(x: int) -> int:
    """Returns the greatest power of two up to x, and 1 below 1."""
    return 1 << max(0, x.bit_length() - 1)


def _clamp(x: int, low: int, high: int) -> int:
    return max(low, min(x, high))


def default_tiling(
    num_tokens: int, num_q_heads: int, q_itemsize: int, kv_shape: tuple[int, ...], kv_itemsize: int, table_width: int
) -> Tiling:
    """Returns the tiling of a call, from shapes alone.

    KV blocks depend on the pool's shape and the width of the block tables only, so that a row's result does not depend on its batch.

    Args:
        num_tokens: T.
        num_q_heads: H.
        q_itemsize: Bytes of one number of the queries.
        kv_shape: Shape of the pool.
        kv_itemsize: Bytes of one number of the pool.
        table_width: P.
    """
    _, page_size, num_kv, head_dim = kv_shape
    group = 2 * num_q_heads // num_kv
    longest = _power_below(2 * table_width * page_size - 1)
    fitting = _power_below(2 * 1024 * 1024 // (num_kv * head_dim * kv_itemsize))
    single_block = max(page_size, LANES, min(_clamp(fitting, 256, 2048), longest))
    block = max(page_size, LANES, min(_clamp(fitting, 256, 512), longest))
    # A query's head takes a row of q and of out, twice each, of the sum, and two rows of lanes for maximum and total.
    row_bytes = head_dim * (4 * q_itemsize + 4) + 2 * LANES * 4
    most_rows = min(1024, 20 * 1024 * 1024 // (row_bytes * num_kv // 2))
    query_block = max(16, min(_power_below(most_rows // group), 256, _power_below(2 * num_tokens - 1)))
    query_part = max(16, min(_power_below(256 // group), query_block))
    return Tiling(min(8, num_tokens), single_block, query_block, query_part, block)


def storage_head_dim(head_dim: int) -> int:
    """Returns the head dimension that the pool should have: whole lanes."""
    return -(-head_dim // LANES) * LANES


def make_work_list(
    kv_lens: Int[Array, " S"],
    cu_q_lens: Int[Array, " S+1"],
    distribution: Int[Array, " 3"],
    *,
    num_tokens: int,
    page_size: int,
    table_width: int,
) -> None:
    """Returns None: the list of rows by query block is a few integer operations, which XLA shares between the layers of a step."""


SMEM_BYTES = 1000 * 1024
"""What the scalars of a call may take of SMEM, which has 1 MiB."""


def tables_too_large(num_tokens: int, num_rows: int, table_width: int) -> str | None:
    """Returns why block tables and the other scalars of a call cannot be served, or None; a row more counts five, a token three."""
    size = 4 * (num_rows * (table_width + 5) + 3 * num_tokens)
    return f"block tables of {num_rows} by {table_width} take {size} bytes of the {SMEM_BYTES} of SMEM" if size > SMEM_BYTES else None


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
    """Returns why these arguments cannot be served, or None; looks at shapes and dtypes only.

    Args:
        q: Queries.
        kv_pages: The pool.
        sliding_window: As in ``ragged_paged_attention``.
        soft_cap: As in ``ragged_paged_attention``.
        sinks: As in ``ragged_paged_attention``.
        k_scale: As in ``ragged_paged_attention``.
        v_scale: As in ``ragged_paged_attention``.
    """
    del sliding_window, soft_cap, sinks
    _, page_size, num_kv, head_dim = kv_pages.shape
    dtype = jnp.dtype(kv_pages.dtype)
    scaled = any(scale is not None and jnp.ndim(scale) == 3 for scale in (k_scale, v_scale))
    if str(q.dtype) not in ("float32", "bfloat16"):
        return f"queries of {q.dtype} (float32 and bfloat16 are)"
    if str(dtype) not in ("float32", "bfloat16", "int8", "float8_e4m3fn"):
        return f"pages of {dtype} (float32, bfloat16, int8 and float8_e4m3fn are)"
    if head_dim % LANES:
        return f"head dimension {head_dim} is not a multiple of {LANES}"
    if page_size & (page_size - 1) or not 8 <= page_size <= 256:
        return f"page size {page_size} is not a power of two from 8 to 256"
    if scaled and page_size % LANES:
        return f"scales per token with a page size of {page_size}, not a multiple of {LANES}"
    packing = 4 // dtype.itemsize
    if num_kv * head_dim * dtype.itemsize > _MOST_TOKEN_BYTES:
        return f"{num_kv // 2} key/value heads of {head_dim} in {dtype} are too much for VMEM"
    if num_kv % packing or (num_kv // packing not in (1, 2, 4) and num_kv // packing % _SUBLANES):
        return f"{num_kv // 2} key/value heads of {dtype} do not fill whole tiles"
    return None


def list_pairs(
    cu_q_lens: Int[Array, " S+1"], distribution: Int[Array, " 3"], num_tokens: int, query_block: int
) -> dict[str, Int[Array, " _"]]:
    """Lists which rows, single-token ones left out, have tokens in which query block, in order of tokens.

    Returns:
        ``pair_row`` and ``pair_block``, of static length; ``pair_start``: for each query block its first pair, and the number of pairs.
    """
    num_rows = cu_q_lens.shape[0] - 1
    num_blocks = -(-num_tokens // query_block)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    start, end = cu_q_lens[:-1], cu_q_lens[1:]
    first_block = start // query_block
    served = (row >= distribution[0]) & (row < distribution[2]) & (end > start)
    count = jnp.where(served, (end - 1) // query_block - first_block + 1, 0)
    ends = jnp.cumsum(count, dtype=jnp.int32)
    pair = jnp.arange(num_blocks + num_rows, dtype=jnp.int32)
    pair_row = jnp.minimum(jnp.sum(ends[None, :] <= pair[:, None], axis=1, dtype=jnp.int32), num_rows - 1)
    pair_block = jnp.where(pair < ends[-1], first_block[pair_row] + pair - (ends - count)[pair_row], num_blocks)
    block = jnp.arange(num_blocks + 1, dtype=jnp.int32)
    pair_start = jnp.sum(pair_block[None, :] < block[:, None], axis=1, dtype=jnp.int32)
    return {"pair_row": pair_row, "pair_block": pair_block, "pair_start": pair_start}


def _list_writes(page_ids: Int[Array, " T"], offsets: Int[Array, " T"], num_pages: int) -> dict[str, Int[Array, " _"]]:
    """Pads the cells of new tokens to whole runs and says which runs follow each other in one page."""
    padding = (0, -page_ids.shape[0] % WRITE_RUN)
    page_ids = jnp.pad(page_ids, padding, constant_values=num_pages)
    offsets = jnp.pad(offsets, padding)
    by_run, offset = page_ids.reshape(-1, WRITE_RUN), offsets.reshape(-1, WRITE_RUN)
    same_page = jnp.all((by_run == by_run[:, :1]) & (by_run < num_pages), axis=1)
    in_order = jnp.all(offset - jnp.arange(WRITE_RUN, dtype=jnp.int32) == offset[:, :1], axis=1)
    return {"page_ids": page_ids, "offsets": offsets, "runs": (same_page & in_order).astype(jnp.int32)}


def _is_per_token(scale: Any) -> bool:
    return scale is not None and jnp.ndim(scale) == 3


def _scalar(scale: Any) -> Any:
    return 1.0 if scale is None or _is_per_token(scale) else scale


def _page_scales(k_scale: Any, v_scale: Any, shape: tuple[int, ...]) -> dict[str, Array]:
    """Returns scales per token and head by name; ones for the side that has none; nothing if neither has."""
    if not (_is_per_token(k_scale) or _is_per_token(v_scale)):
        return {}
    ones = functools.partial(jnp.ones, shape, jnp.float32)
    return {
        "k_scales": k_scale if _is_per_token(k_scale) else ones(),
        "v_scales": v_scale if _is_per_token(v_scale) else ones(),
    }


@dataclasses.dataclass(frozen=True)
class _Call:
    """What both kernels share; arrays by name, see ``kernels``."""

    common: dict[str, Array]
    options: CallOptions
    tiling: Tiling
    interpret: Any
    compiler_params: Any


def _attend_single_tokens(
    call: _Call, q: Float[Array, "T H D"], sinks: Float[Array, " H"] | None, num_rows: Int[Array, ""], writes: dict[str, Array]
) -> tuple[Float[Array, "T H D"], Float[Array, "T H"] | None, Float[Array, "N B 2K D"] | None]:
    """Returns outputs and log-sums of the single-token rows (zeros and -inf elsewhere) and the pool if something was to write."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, group = call.options.pages.num_kv_heads, call.options.group
    rows = min(call.common["kv_lens"].shape[0], num_tokens)
    padded_rows = -(-rows // call.tiling.single_rows) * call.tiling.single_rows
    padded_group = -(-group // _SUBLANES) * _SUBLANES
    by_head = q[:rows].reshape(rows, num_kv_heads, group, head_dim)
    by_head = jnp.pad(by_head, ((0, padded_rows - rows), (0, 0), (0, padded_group - group), (0, 0)))
    inputs = call.common | writes | {"num_rows": num_rows.reshape(1), "q": by_head.reshape(padded_rows, -1, head_dim)}
    if sinks is not None:
        by_head = jnp.pad(sinks.reshape(num_kv_heads, group), ((0, 0), (0, padded_group - group)))
        inputs["sinks"] = jnp.broadcast_to(by_head.reshape(-1, 1), (num_kv_heads * padded_group, LANES))
    pages = dataclasses.replace(call.options.pages, block=call.tiling.single_block)
    results = attend_single_tokens(
        inputs,
        options=dataclasses.replace(call.options, pages=pages, group=padded_group, write=bool(writes)),
        rows_per_step=call.tiling.single_rows,
        interpret=call.interpret,
        compiler_params=call.compiler_params,
    )

    def by_token(x: Array, fill: float) -> Array:
        x = x.reshape(padded_rows, num_kv_heads, padded_group, -1)[:rows, :, :group].reshape(rows, num_q_heads, -1)
        return jnp.pad(x, ((0, num_tokens - rows), (0, 0), (0, 0)), constant_values=fill)

    lse = by_token(results["lse"][..., :1], -jnp.inf)[..., 0] if "lse" in results else None
    return by_token(results["out"], 0), lse, results.get("written_pool")


def _attend_blocks(
    call: _Call, q: Float[Array, "T H D"], sinks: Float[Array, " H"] | None, pairs: dict[str, Array]
) -> tuple[Float[Array, "T H D"], Float[Array, "T H"] | None]:
    """Returns outputs and log-sums of the rows in ``pairs``; zeros and -inf elsewhere."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, group = call.options.pages.num_kv_heads, call.options.group
    padding = -num_tokens % call.tiling.query_block
    by_head = jnp.pad(q.reshape(num_tokens, num_kv_heads, group, head_dim), ((0, padding), (0, 0), (0, 0), (0, 0)))
    inputs = call.common | pairs | {"q": by_head.transpose(1, 0, 2, 3).reshape(num_kv_heads, -1, head_dim)}
    if sinks is not None:
        repeated = jnp.tile(sinks.reshape(num_kv_heads, group), (1, call.tiling.query_part))
        inputs["sinks"] = jnp.broadcast_to(repeated[..., None], (*repeated.shape, LANES))
    results = attend_blocks(
        inputs,
        options=call.options,
        query_block=call.tiling.query_block,
        query_part=call.tiling.query_part,
        interpret=call.interpret,
        compiler_params=call.compiler_params,
    )

    def by_token(x: Array) -> Array:
        return x.reshape(num_kv_heads, -1, group, x.shape[-1]).transpose(1, 0, 2, 3).reshape(-1, num_q_heads, x.shape[-1])[:num_tokens]

    return by_token(results["out"]), by_token(results["lse"][..., :1])[..., 0] if "lse" in results else None


def _attend(
    q: Float[Array, "T H D"],
    kv_pages: Float[Array, "N B 2K D"],
    kv_lens: Int[Array, " S"],
    block_tables: Int[Array, "S P"],
    cu_q_lens: Int[Array, " S+1"],
    distribution: Int[Array, " 3"],
    writes: dict[str, Array],
    *,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " H"] | None,
    k_scale: Any,
    v_scale: Any,
    return_lse: bool,
    tiling: Tiling | None,
    interpret: Any,
) -> tuple[Float[Array, "T H D"], Float[Array, "T H"] | None, Float[Array, "N B 2K D"] | None]:
    reason = unsupported(q, kv_pages, k_scale=k_scale, v_scale=v_scale)
    if reason is not None:
        raise ValueError(f"the TPU kernel does not serve {reason}")
    num_tokens, num_q_heads, head_dim = q.shape
    num_pages, page_size, num_kv, _ = kv_pages.shape
    num_rows, table_width = block_tables.shape
    reason = tables_too_large(num_tokens, num_rows, table_width)
    if reason is not None:
        # The dispatcher asks about q and the pool alone, so this falls here, in its words.
        warnings.warn(f"paged attention: 'tpu' cannot serve this call ({reason}); 'xla' serves it", RuntimeWarning, stacklevel=3)
        if writes:
            kv_pages = kv_pages.at[writes["page_ids"][:num_tokens], writes["offsets"][:num_tokens]].set(writes["kv"], mode="drop")
        out, lse = xla.ragged_paged_attention(
            q, kv_pages, kv_lens, block_tables, cu_q_lens, distribution, sm_scale=sm_scale, sliding_window=sliding_window,
            soft_cap=soft_cap, sinks=sinks, k_scale=k_scale, v_scale=v_scale, return_lse=True,
        )  # fmt: skip
        return out, lse, kv_pages
    tiling = tiling or default_tiling(num_tokens, num_q_heads, q.dtype.itemsize, kv_pages.shape, kv_pages.dtype.itemsize, table_width)
    scales = _page_scales(k_scale, v_scale, (num_pages, num_kv // 2, page_size))
    pages = PageShape(
        num_pages=num_pages, page_size=page_size, num_kv_heads=num_kv // 2, head_dim=head_dim, dtype=str(kv_pages.dtype),
        table_width=table_width, block=tiling.block, scaled=bool(scales),
    )  # fmt: skip
    options = CallOptions(
        pages=pages, group=2 * num_q_heads // num_kv, exact=q.dtype == jnp.float32 or kv_pages.dtype == jnp.float32,
        sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks is not None, return_lse=return_lse, write=False,
    )  # fmt: skip
    factors = jnp.stack([jnp.asarray(x, jnp.float32) for x in (sm_scale * _scalar(k_scale), _scalar(v_scale))])
    common = {"kv_lens": kv_lens, "tables": block_tables.reshape(-1), "factors": factors, "pool": kv_pages, **scales}
    compiler_params = pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT_BYTES)
    call = _Call(common, options, tiling, interpret, compiler_params)

    # One token in one row is a single-token row, however it is announced, so there is no second kernel to compile.
    only_single = num_tokens == 1 and num_rows == 1
    num_singles = jnp.minimum(cu_q_lens[1], distribution[2]) if only_single else distribution[0]
    out, lse, written_pool = _attend_single_tokens(call, q, sinks, num_singles, writes)
    if only_single:
        return out, lse, written_pool
    if written_pool is not None:
        call = dataclasses.replace(call, common=common | {"pool": written_pool})
    pairs = list_pairs(cu_q_lens, distribution, num_tokens, tiling.query_block)

    def with_others() -> tuple[Array, Array | None]:
        others = _attend_blocks(call, q, sinks, pairs | {"cu_q_lens": cu_q_lens})
        is_single = jnp.arange(num_tokens) < num_singles
        return jax.tree.map(lambda a, b: jnp.where(is_single.reshape(-1, *[1] * (a.ndim - 1)), a, b), (out, lse), others)

    out, lse = lax.cond(pairs["pair_start"][-1] > 0, with_others, lambda: (out, lse))
    return out, lse, written_pool


_STATIC = ("sm_scale", "sliding_window", "soft_cap", "return_lse", "tiling", "interpret")


# Jitted, so that a model's layers share one trace; XLA inlines the calls.
@functools.partial(jax.jit, static_argnames=_STATIC)
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
    k_scale: float | Float[Array, ...] | None = None,
    v_scale: float | Float[Array, ...] | None = None,
    return_lse: bool = False,
    work: None = None,
    tiling: Tiling | None = None,
    interpret: Any = False,
) -> Float[Array, "T H D"] | tuple[Float[Array, "T H D"], Float[Array, "T H"]]:
    """Attends on a TPU; arguments as in ``pallas_kernels.paged_attention.ragged_paged_attention``.

    Args:
        q: Queries.
        kv_pages: The pool of the layer.
        kv_lens: Tokens of each row.
        block_tables: Page ids of each row.
        cu_q_lens: Running sum of the rows' new tokens.
        distribution: The three regions of rows.
        sm_scale: Multiplies the scores.
        sliding_window: Positions that a query sees.
        soft_cap: Bound of the scores.
        sinks: One score per query head without a value.
        k_scale: Scalar, or float32 ``[N, K, B]``.
        v_scale: Scalar, or float32 ``[N, K, B]``.
        return_lse: Whether to return log-sums.
        work: None, what ``make_work_list`` returns.
        tiling: Block sizes; None for ``default_tiling``.
        interpret: As in ``pl.pallas_call``, for tests.

    Raises:
        ValueError: ``unsupported`` gives a reason.
    """
    out, lse, _ = _attend(
        q, kv_pages, kv_lens, block_tables, cu_q_lens, distribution, {}, sm_scale=sm_scale, sliding_window=sliding_window,
        soft_cap=soft_cap, sinks=sinks, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse, tiling=tiling, interpret=interpret,
    )  # fmt: skip
    return (out, lse) if return_lse else out


@functools.partial(jax.jit, static_argnames=_STATIC)
def ragged_paged_attention_update(
    q: Float[Array, "T H D"],
    kv: Float[Array, "T 2K D"],
    kv_pages: Float[Array, "N B 2K D"],
    kv_lens: Int[Array, " S"],
    block_tables: Int[Array, "S P"],
    cu_q_lens: Int[Array, " S+1"],
    distribution: Int[Array, " 3"],
    page_ids: Int[Array, " T"],
    offsets: Int[Array, " T"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    k_scale: float | Float[Array, ...] | None = None,
    v_scale: float | Float[Array, ...] | None = None,
    return_lse: bool = False,
    work: None = None,
    tiling: Tiling | None = None,
    interpret: Any = False,
) -> tuple[Any, Float[Array, "N B 2K D"]]:
    """Writes the new tokens ``kv`` to their pages, then attends; the pool is written in place where the caller donates it.

    Args:
        q: Queries.
        kv: New keys and values, K of head k at ``2k`` and V at ``2k + 1`` of axis 1; divided by scalar scales and rounded to the
            pool's dtype; int8 for an int8 pool.
        kv_pages: The pool of the layer.
        kv_lens: Tokens of each row, new ones included.
        block_tables: Page ids of each row.
        cu_q_lens: Running sum of the rows' new tokens.
        distribution: The three regions of rows.
        page_ids: Page of each new token; N or more for tokens that are not written.
        offsets: Place of each new token in its page. No two tokens name the same cell.
        sm_scale: Multiplies the scores.
        sliding_window: Positions that a query sees.
        soft_cap: Bound of the scores.
        sinks: One score per query head without a value.
        k_scale: Scalar, or float32 ``[N, K, B]`` with the scales of the new tokens in.
        v_scale: Scalar, or float32 ``[N, K, B]`` with the scales of the new tokens in.
        return_lse: Whether to return log-sums.
        work: None, what ``make_work_list`` returns.
        tiling: Block sizes; None for ``default_tiling``.
        interpret: As in ``pl.pallas_call``, for tests.

    Returns:
        What ``ragged_paged_attention`` returns, and the pool.

    Raises:
        ValueError: ``unsupported`` gives a reason, or floats are to be written to an int8 pool.
    """
    if kv_pages.dtype != jnp.int8:
        kv = to_storage(kv, kv_pages.dtype, *(None if _is_per_token(scale) else scale for scale in (k_scale, v_scale)))
    elif kv.dtype != jnp.int8:
        raise ValueError(f"kv is {kv.dtype}: must be int8 like the pool, quantised with the scales of its tokens")
    writes = {"kv": kv, **_list_writes(page_ids, offsets, kv_pages.shape[0])}
    out, lse, written_pool = _attend(
        q, kv_pages, kv_lens, block_tables, cu_q_lens, distribution, writes, sm_scale=sm_scale, sliding_window=sliding_window,
        soft_cap=soft_cap, sinks=sinks, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse, tiling=tiling, interpret=interpret,
    )  # fmt: skip
    return (out, lse) if return_lse else out, written_pool
