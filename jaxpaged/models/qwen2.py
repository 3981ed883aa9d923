"""Qwen2 and Qwen2.5 (``Qwen2ForCausalLM``): Llama's decoder with biases on q, k and v, and windows in the upper layers if asked.

Source: Yang et al., "Qwen2 technical report" (2024).
"""

from __future__ import annotations

from jaxpaged.config import ModelConfig
from jaxpaged.models import hf_config, llama
from jaxpaged.models.family import Family
from jaxpaged.models.hf_config import HFConfig


def config_from_hf(hf: HFConfig) -> ModelConfig:
    """Reads config.json with the defaults of ``transformers.Qwen2Config``.

    Raises:
        ConfigError: A value is out of range or not supported.
    """
    shape = hf_config.shape(
        hf,
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=22016,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=32768,
    )
    return ModelConfig(architecture="Qwen2ForCausalLM", **shape, qkv_bias=True, window=hf_config.layer_windows(hf, shape["num_layers"]))


FAMILY = Family("Qwen2ForCausalLM", config_from_hf, llama.Decoder, llama.WEIGHTS)
