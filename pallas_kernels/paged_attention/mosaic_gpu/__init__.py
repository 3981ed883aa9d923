"""Ragged paged attention for Hopper in Mosaic GPU: split-KV decode for single-token rows, a tiled kernel for the others.

``decode.py`` and ``prefill.py`` hold the kernels, ``work_list.py`` what they walk along, ``tilings.py`` the decode kernel's sizes. The
tests interpret it on a CPU, and on a Hopper GPU compile and run it (H100 and H200, jax 0.11.2); docs/kernels.md has the times.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.paged_attention.mosaic_gpu.decode import LOG2E, decode_attention, query_rows
from pallas_kernels.paged_attention.mosaic_gpu.prefill import Tiling as PrefillTiling
from pallas_kernels.paged_attention.mosaic_gpu.prefill import default_tiling as prefill_tiling
from pallas_kernels.paged_attention.mosaic_gpu.prefill import prefill_attention, prefill_items
from pallas_kernels.paged_attention.mosaic_gpu.tilings import QUERY_ROWS, DecodeTiling, decode_tiling
from pallas_kernels.paged_attention.mosaic_gpu.work_list import WorkList, decode_items

_QUERY_DTYPES = ("bfloat16", "float16")
_NARROW_DTYPES = ("float8_e4m3fn", "int8")


class Tilings(NamedTuple):
    """Sizes of both kernels, for tests and tuning.

    Attributes:
        decode: None for what the table says.
        prefill: None for what the table says.
        interpretable: Whether to change them so that jax's interpreter can run them, with two blocks.
    """

    decode: DecodeTiling | None = None
    prefill: PrefillTiling | None = None
    interpretable: bool = False


DEFAULT_TILINGS = Tilings()
INTERPRETABLE = Tilings(interpretable=True)


def _sizes(tiling: Tilings, head_dim: int, itemsize: int, kv_itemsize: int) -> tuple[DecodeTiling, PrefillTiling]:
    decode = tiling.decode or decode_tiling(head_dim, itemsize, kv_itemsize)
    prefill = tiling.prefill or prefill_tiling(head_dim, kv_itemsize)
    if tiling.interpretable:
        decode = dataclasses.replace(decode, interpretable=True, num_ctas=2, combine_unroll=2)
        prefill = dataclasses.replace(prefill, p_smem=True, num_ctas=2)
    return decode, prefill


def storage_head_dim(head_dim: int) -> int:
    """Returns the head dimension that a pool should have: wgmma's tiles are swizzled 64 numbers wide."""
    return -(-head_dim // 64) * 64


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
    """Returns why these kernels cannot serve such a call, judged by shapes and dtypes, or None."""
    del sliding_window, soft_cap, sinks
    dtype, kv_dtype = str(jnp.result_type(q)), str(jnp.result_type(kv_pages))
    page_size, num_kv, head_dim = kv_pages.shape[1:]
    group = q.shape[1] * 2 // num_kv
    by_token = [scale is not None and jnp.ndim(scale) == 3 for scale in (k_scale, v_scale)]
    reasons = (
        (dtype not in _QUERY_DTYPES, f"queries of {dtype}: tensor cores take bfloat16 and float16"),
        (kv_dtype not in (dtype, *_NARROW_DTYPES), f"pages of {kv_dtype} under queries of {dtype}"),
        (head_dim % 64 > 0 or head_dim > 256, f"head dimension {head_dim} is not a multiple of 64 up to 256"),
        (page_size % 8 > 0, f"pages of {page_size} tokens are not a multiple of 8"),
        (query_rows(group) > QUERY_ROWS, f"{group} query heads a key/value head do not fit in {QUERY_ROWS} rows"),
        (by_token[0] != by_token[1], "scales per token for only one of keys and values"),
        (any(by_token) and kv_dtype not in _NARROW_DTYPES, f"scales per token over pages of {kv_dtype}"),
        (any(by_token) and page_size % 32 > 0, f"scales per token of pages of {page_size} tokens: a copy needs a multiple of 32"),
    )
    return next((reason for applies, reason in reasons if applies), None)


def make_work_list(
    kv_lens: Int[Array, " S"],
    cu_q_lens: Int[Array, " S+1"],
    distribution: Int[Array, " 3"],
    *,
    num_tokens: int,
    page_size: int,
    table_width: int,
) -> WorkList:
    """Returns the splits of the single-token rows and the query tiles of the others: once a step, for all layers."""
    num_singles = _num_singles(cu_q_lens, distribution, num_tokens)
    decode = decode_items(kv_lens, num_singles, page_size=page_size, table_width=table_width)
    if _has_only_singles(cu_q_lens, num_tokens):
        return WorkList(decode, None)
    prefill = prefill_items(cu_q_lens, num_singles, distribution[2], num_tokens=num_tokens, tiling=None)
    return WorkList(decode, prefill)


def _within(indices: Int[Array, " *shape"], highest: int) -> Int[Array, " *shape"]:
    """Returns what kernels index with, kept within bounds and, what matters more, in a buffer of its own.

    XLA hands a slice to a kernel where it lies in the larger array (seen with jax 0.11.2), and Mosaic GPU refuses an operand that does
    not begin at a multiple of 256 bytes. What was computed begins there.
    """
    return jnp.clip(indices, 0, highest)


def _has_only_singles(cu_q_lens: Int[Array, " S+1"], num_tokens: int) -> bool:
    """Returns whether the shapes tell that there is one token in one row, however it is announced."""
    return num_tokens == 1 and cu_q_lens.shape[0] == 2


def _num_singles(cu_q_lens: Int[Array, " S+1"], distribution: Int[Array, " 3"], num_tokens: int) -> Int[Array, ""]:
    if _has_only_singles(cu_q_lens, num_tokens):
        return jnp.minimum(cu_q_lens[1], distribution[2])
    return distribution[0]


# Jitted, so that a model's layers share one trace; XLA inlines the calls.
@functools.partial(jax.jit, static_argnames=("sm_scale", "sliding_window", "soft_cap", "return_lse", "tiling"))
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
    tiling: Tilings = DEFAULT_TILINGS,
) -> Float[Array, "T H D"] | tuple[Float[Array, "T H D"], Float[Array, "T H"]]:
    """Attends on a Hopper GPU; arguments as in ``pallas_kernels.paged_attention.ragged_paged_attention``, and the kernels' sizes."""
    num_tokens, _, head_dim = q.shape
    widths = {"page_size": kv_pages.shape[1], "table_width": block_tables.shape[1]}
    kv_lens = _within(kv_lens, math.prod(widths.values()))
    block_tables = _within(block_tables, kv_pages.shape[0] - 1)
    cu_q_lens = _within(cu_q_lens, num_tokens)
    sinks = None if sinks is None else sinks * LOG2E
    if work is None:
        work = make_work_list(kv_lens, cu_q_lens, distribution, num_tokens=num_tokens, **widths)
    options = {"sm_scale": sm_scale, "sliding_window": sliding_window, "soft_cap": soft_cap, "sinks": sinks}
    options |= {"k_scale": k_scale, "v_scale": v_scale}
    sizes = _sizes(tiling, head_dim, q.dtype.itemsize, kv_pages.dtype.itemsize)
    singles = decode_attention(q, kv_pages, block_tables, work.decode, **options, tiling=sizes[0])
    num_singles = _num_singles(cu_q_lens, distribution, num_tokens)
    if work.prefill is None:
        others = (jnp.zeros(q.shape, q.dtype), jnp.full(q.shape[:2], -jnp.inf, jnp.float32))
    else:
        rows = (num_singles, distribution[2], work.prefill)
        others = prefill_attention(q, kv_pages, kv_lens, block_tables, cu_q_lens, *rows, **options, tiling=sizes[1])
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = token[: kv_lens.shape[0]]
    place = jnp.where(row < num_singles, row, row + num_tokens)

    def merge(single: Array, other: Array) -> Array:
        """Puts row t in the place of token t where rows are single tokens: a scatter, which writes these alone."""
        return other.at[place].set(single[: row.shape[0]], mode="drop", unique_indices=True)

    out = merge(singles[0], others[0])
    if not return_lse:
        return out
    lse = jnp.where((token < cu_q_lens[-1])[:, None], others[1], -jnp.inf)
    return out, merge(singles[1], lse)
