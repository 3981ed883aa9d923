"""Ragged paged attention in float64 NumPy, one query token and head at a time: slow, plain, and the meaning of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pallas_kernels.kv_write.quantize import value_dtype


def _scale_of(scale: Any, page_ids: NDArray[Any], kv_head: int, offsets: NDArray[Any]) -> Any:
    """Returns what the stored numbers of some tokens are multiplied with: one number, or one per token ``[C, 1]``."""
    scale = np.asarray(1.0 if scale is None else scale, np.float64)
    return scale[page_ids, kv_head, offsets][:, None] if scale.ndim else scale


def ragged_paged_attention(
    q: Any,
    kv_pages: Any,
    kv_lens: Any,
    block_tables: Any,
    cu_q_lens: Any,
    distribution: Any,
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    return_lse: bool = False,
    work: None = None,
) -> NDArray[np.float64] | tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns float64 outputs (and log-sums); arguments as in ``pallas_kernels.paged_attention.ragged_paged_attention``.

    Works on concrete arrays only, so it cannot be called under ``jax.jit``.
    """
    q = np.asarray(q, np.float64)
    pages = np.asarray(kv_pages)
    pages = pages.view(value_dtype(pages.dtype))
    kv_lens, block_tables, cu_q_lens = np.asarray(kv_lens), np.asarray(block_tables), np.asarray(cu_q_lens)
    page_size = pages.shape[1]
    heads_per_kv_head = q.shape[1] // (pages.shape[2] // 2)
    out = np.zeros(q.shape)
    lse = np.full(q.shape[:2], -np.inf)
    for row in range(int(distribution[2])):
        start, end = int(cu_q_lens[row]), int(cu_q_lens[row + 1])
        for token in range(start, end):
            position = int(kv_lens[row]) - (end - token)
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            seen = np.arange(first, position + 1)
            if not seen.size:
                continue  # no key: a sink alone sums up to nothing
            page_ids, offsets = block_tables[row, seen // page_size], seen % page_size
            kv = pages[page_ids, offsets].astype(np.float64)
            for head in range(q.shape[1]):
                kv_head = head // heads_per_kv_head
                keys = kv[:, 2 * kv_head] * _scale_of(k_scale, page_ids, kv_head, offsets)
                values = kv[:, 2 * kv_head + 1] * _scale_of(v_scale, page_ids, kv_head, offsets)
                scores = keys @ q[token, head] * sm_scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                sink = np.array([-np.inf if sinks is None else float(sinks[head])])
                top = np.concatenate([scores, sink]).max()
                weights = np.exp(scores - top)
                total = weights.sum() + np.exp(sink[0] - top)
                out[token, head] = weights @ values / total
                lse[token, head] = top + np.log(total)
    return (out, lse) if return_lse else out


def make_work_list(kv_lens: Any, cu_q_lens: Any, distribution: Any, *, num_tokens: int, page_size: int, table_width: int) -> None:
    """Returns None: this implementation walks the rows as they come."""


def storage_head_dim(head_dim: int) -> int:
    """Returns ``head_dim``: any will do."""
    return head_dim
