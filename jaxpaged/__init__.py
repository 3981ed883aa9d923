"""jaxpaged: an LLM inference engine on JAX/XLA with a paged KV cache, the same code on NVIDIA GPUs, TPUs and CPUs.

The names below are loaded on first use, so that importing a part (``jaxpaged.scheduling``, say) does not load JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxpaged.version import installed_version

if TYPE_CHECKING:
    from jaxpaged.engine.loading import load_model as load_model
    from jaxpaged.errors import CheckpointError as CheckpointError
    from jaxpaged.errors import ConfigError as ConfigError
    from jaxpaged.errors import EngineStopped as EngineStopped
    from jaxpaged.errors import GenerationError as GenerationError
    from jaxpaged.errors import JaxpagedError as JaxpagedError
    from jaxpaged.errors import QueueFull as QueueFull
    from jaxpaged.errors import RequestError as RequestError
    from jaxpaged.llm import LLM as LLM
    from jaxpaged.llm import BeamSearchParams as BeamSearchParams
    from jaxpaged.llm import CompletionOutput as CompletionOutput
    from jaxpaged.llm import RequestOutput as RequestOutput
    from jaxpaged.scheduling.request import SamplingParams as SamplingParams
    from jaxpaged.state import StepInputs as StepInputs
    from jaxpaged.state import init_pool as init_pool
    from jaxpaged.step import forward_step as forward_step
    from jaxpaged.step import jit_step as jit_step

_HOMES = {
    "LLM": "jaxpaged.llm",
    "RequestOutput": "jaxpaged.llm",
    "CompletionOutput": "jaxpaged.llm",
    "BeamSearchParams": "jaxpaged.llm",
    "SamplingParams": "jaxpaged.scheduling.request",
    "load_model": "jaxpaged.engine.loading",
    "init_pool": "jaxpaged.state",
    "StepInputs": "jaxpaged.state",
    "forward_step": "jaxpaged.step",
    "jit_step": "jaxpaged.step",
    "JaxpagedError": "jaxpaged.errors",
    "ConfigError": "jaxpaged.errors",
    "CheckpointError": "jaxpaged.errors",
    "RequestError": "jaxpaged.errors",
    "QueueFull": "jaxpaged.errors",
    "EngineStopped": "jaxpaged.errors",
    "GenerationError": "jaxpaged.errors",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return installed_version()
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxpaged' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
