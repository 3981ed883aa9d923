"""PyTorch's scaled_dot_product_attention over keys and values without pages: a lower bound. Needs torch with CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernel_bench.cases import Data
from kernel_bench.contenders import Contender, Unavailable
from kernel_bench.timing import queued_seconds

_BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def contenders() -> Iterator[Contender]:
    """Returns one contender per backend of torch."""
    for name, backend in _BACKENDS.items():
        yield Contender(f"torch {name}, no pages", lambda data, backend=backend: _run(data, backend))


def _run(data: Data, backend: SDPBackend) -> tuple[Any, float]:
    if not torch.cuda.is_available():
        raise Unavailable("this torch has no CUDA device")
    case = data.case
    if data.lens.min() != data.lens.max():
        raise Unavailable("contexts of one length only")
    q = torch.from_dlpack(data.q).reshape(case.rows, case.q_len, case.num_q_heads, case.head_dim).transpose(1, 2)
    layers = [[torch.from_dlpack(x).transpose(1, 2) for x in data.contiguous(pool)] for pool in data.pools]

    def walk(layers: list[list[torch.Tensor]]) -> torch.Tensor:
        out = q
        for k, v in layers:
            out = torch.nn.functional.scaled_dot_product_attention(
                out, k, v, is_causal=not case.decodes, scale=case.sm_scale, enable_gqa=True
            )
        return out

    with sdpa_kernel(backend), torch.inference_mode():
        first = walk(layers[:1]).transpose(1, 2).reshape(data.q.shape).float().cpu().numpy()
        seconds = queued_seconds(lambda: walk(layers), lambda _: torch.cuda.synchronize())
    return first, seconds / len(layers)
