"""What a family of models is made of; each file beside this one makes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from flax import nnx

from jaxpaged.config import ModelConfig
from jaxpaged.models.hf_config import HFConfig

WeightTable = Mapping[str, tuple[str, ...]]
"""Parameter name -> the checkpoint tensors whose rows it holds, in order; ``*`` stands for the layer in both."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        architecture: Hugging Face's class name.
        config_from_hf: Reads config.json, with the defaults of the family's Hugging Face class; the dtype is the caller's.
        decoder: Makes the module: ``decoder(config)(inputs, pool, attention=...)`` and ``.logits(hidden)``.
        weights: Where the checkpoint keeps each parameter.
    """

    architecture: str
    config_from_hf: Callable[[HFConfig], ModelConfig]
    decoder: Callable[[ModelConfig], nnx.Module]
    weights: WeightTable
