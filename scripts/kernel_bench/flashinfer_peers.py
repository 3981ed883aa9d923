"""FlashInfer's paged decode and prefill. Needs flashinfer and torch with CUDA; its pages hold K and V in two halves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flashinfer
import numpy as np
import torch

from kernel_bench.cases import Data
from kernel_bench.contenders import Contender
from kernel_bench.timing import queued_seconds

_WORKSPACE_BYTES = 256 * 2**20


def contenders() -> Iterator[Contender]:
    """Returns the one contender."""
    yield Contender("FlashInfer", _run)


def _run(data: Data) -> tuple[Any, float]:
    case = data.case
    q = torch.from_dlpack(data.q)
    pools = [torch.from_dlpack(pool) for pool in data.pools]
    layers = [torch.stack([pool[:, :, ::2], pool[:, :, 1::2]], dim=1) for pool in pools]  # [N, 2, B, K, D]
    pages_of = -(-data.lens // case.page_size)
    tables = np.asarray(data.tables[1])
    indices = torch.tensor(np.concatenate([tables[row, :count] for row, count in enumerate(pages_of)]), dtype=torch.int32, device="cuda")
    starts = torch.tensor(np.append(0, pages_of.cumsum()), dtype=torch.int32, device="cuda")
    last = torch.tensor((data.lens - 1) % case.page_size + 1, dtype=torch.int32, device="cuda")
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    heads = (case.num_q_heads, case.num_kv_heads, case.head_dim, case.page_size)
    if case.decodes:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(starts, indices, last, *heads, q_data_type=q.dtype, kv_data_type=q.dtype, sm_scale=case.sm_scale)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        q_starts = torch.arange(case.rows + 1, dtype=torch.int32, device="cuda") * case.q_len
        wrapper.plan(q_starts, starts, indices, last, *heads, causal=True, q_data_type=q.dtype, sm_scale=case.sm_scale)

    def walk(layers: list[torch.Tensor]) -> torch.Tensor:
        out = q
        for layer in layers:
            out = wrapper.run(out, layer)
        return out

    first = walk(layers[:1]).float().cpu().numpy()
    return first, queued_seconds(lambda: walk(layers), lambda _: torch.cuda.synchronize()) / len(layers)
