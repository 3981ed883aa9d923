"""Qwen3 (``Qwen3ForCausalLM``): Llama's decoder with RMSNorm over each query and key head, and heads of a size of their own.

Source: Yang et al., "Qwen3 technical report" (2025).
"""

from __future__ import annotations

from jaxpaged.config import ModelConfig
from jaxpaged.models import hf_config, llama
from jaxpaged.models.family import Family, WeightTable
from jaxpaged.models.hf_config import HFConfig

WEIGHTS: WeightTable = {
    **llama.WEIGHTS,
    "layers.*.attention.q_norm.weight": ("model.layers.*.self_attn.q_norm.weight",),
    "layers.*.attention.k_norm.weight": ("model.layers.*.self_attn.k_norm.weight",),
}


def config_from_hf(hf: HFConfig) -> ModelConfig:
    """Reads config.json with the defaults of ``transformers.Qwen3Config``.

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
        head_dim=128,
        max_position_embeddings=32768,
    )
    bias = hf_config.boolean(hf, "attention_bias", False)
    window = hf_config.layer_windows(hf, shape["num_layers"])
    return ModelConfig(architecture="Qwen3ForCausalLM", **shape, qkv_bias=bias, output_bias=bias, qk_norm=True, window=window)


FAMILY = Family("Qwen3ForCausalLM", config_from_hf, llama.Decoder, WEIGHTS)
