"""Mistral 7B and what shares its architecture (``MistralForCausalLM``): Llama's decoder with a sliding window in each layer.

Source: Jiang et al., "Mistral 7B" (2023).
"""

from __future__ import annotations

from jaxpaged.config import ModelConfig
from jaxpaged.models import hf_config, llama
from jaxpaged.models.family import Family
from jaxpaged.models.hf_config import HFConfig


def config_from_hf(hf: HFConfig) -> ModelConfig:
    """Reads config.json with the defaults of ``transformers.MistralConfig`` (a window of 4096 unless it says null).

    Raises:
        ConfigError: A value is out of range or not supported.
    """
    shape = hf_config.shape(
        hf,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    )
    window = hf_config.optional_integer(hf, "sliding_window", 4096)
    return ModelConfig(architecture="MistralForCausalLM", **shape, window=(window,) * shape["num_layers"])


FAMILY = Family("MistralForCausalLM", config_from_hf, llama.Decoder, llama.WEIGHTS)
