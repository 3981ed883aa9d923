"""Llama 2, 3, 3.1, 3.2 and what shares their architecture (``LlamaForCausalLM``); the other families build on this file.

Source: Touvron et al., "Llama 2" (2023); Grattafiori et al., "The Llama 3 herd of models" (2024).
"""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from jaxpaged.attention import AttentionMetadata, attention_metadata
from jaxpaged.config import ModelConfig
from jaxpaged.layers.attention_block import AttentionBlock
from jaxpaged.layers.embed import Embedding
from jaxpaged.layers.mlp import GatedMLP
from jaxpaged.layers.norm import RMSNorm
from jaxpaged.layers.rope import Rotation, rotation, text_lengths
from jaxpaged.models import hf_config
from jaxpaged.models.family import Family, WeightTable
from jaxpaged.models.hf_config import HFConfig
from jaxpaged.state import KVPages, PagePool, StepInputs


class DecoderLayer(nnx.Module):
    """Attention, then the feed-forward block, each normalised before and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        dtypes = {"dtype": config.dtype, "matrix_dtype": config.matrix_dtype}
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=config.dtype)
        self.attention = AttentionBlock(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=config.dtype)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, **dtypes)

    def __call__(
        self, x: Float[Array, "T E"], pages: KVPages, rotation: Rotation, metadata: AttentionMetadata, *, attention: str
    ) -> tuple[Float[Array, "T E"], KVPages]:
        """Returns the residual stream after this layer, and the layer's pages with the new keys and values."""
        out, pages = self.attention(self.attention_norm(x), pages, rotation, metadata, attention=attention)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), pages


class Decoder(nnx.Module):
    """Embedding, layers, final norm, and the projection to the vocabulary (the embedding's own table where tied)."""

    def __init__(self, config: ModelConfig) -> None:
        dtypes = {"dtype": config.dtype, "matrix_dtype": config.matrix_dtype}
        self.embed = Embedding(config.vocab_size, config.hidden_size, **dtypes)
        self.layers = nnx.List([DecoderLayer(config, layer) for layer in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=config.dtype)
        self.head = None if config.tie_word_embeddings else Embedding(config.vocab_size, config.hidden_size, **dtypes)
        self.config = config

    def __call__(self, inputs: StepInputs, pool: PagePool, *, attention: str) -> tuple[Float[Array, "T E"], PagePool]:
        """Returns the hidden state of each token after the final norm, and the pool with the step's keys and values."""
        metadata = attention_metadata(inputs, num_pages=pool.num_pages, page_size=pool.page_size, implementation=attention)
        turns = rotation(self.config, inputs.positions, text_lengths(inputs))
        x = self.embed(inputs.tokens)
        layers = []
        for layer, pages in zip(self.layers, pool.layers, strict=True):
            x, written = layer(x, pages, turns, metadata, attention=attention)
            layers.append(written)
        return self.norm(x), PagePool(tuple(layers))

    def logits(self, hidden: Float[Array, "R E"]) -> Float[Array, "R V"]:
        """Returns float32 scores of every token."""
        return (self.embed if self.head is None else self.head).logits(hidden)


WEIGHTS: WeightTable = {
    "embed.weight": ("model.embed_tokens.weight",),
    "layers.*.attention_norm.weight": ("model.layers.*.input_layernorm.weight",),
    "layers.*.attention.qkv.weight": tuple(f"model.layers.*.self_attn.{name}_proj.weight" for name in "qkv"),
    "layers.*.attention.qkv.bias": tuple(f"model.layers.*.self_attn.{name}_proj.bias" for name in "qkv"),
    "layers.*.attention.output.weight": ("model.layers.*.self_attn.o_proj.weight",),
    "layers.*.attention.output.bias": ("model.layers.*.self_attn.o_proj.bias",),
    "layers.*.mlp_norm.weight": ("model.layers.*.post_attention_layernorm.weight",),
    "layers.*.mlp.gate_up.weight": ("model.layers.*.mlp.gate_proj.weight", "model.layers.*.mlp.up_proj.weight"),
    "layers.*.mlp.gate_up.bias": ("model.layers.*.mlp.gate_proj.bias", "model.layers.*.mlp.up_proj.bias"),
    "layers.*.mlp.down.weight": ("model.layers.*.mlp.down_proj.weight",),
    "layers.*.mlp.down.bias": ("model.layers.*.mlp.down_proj.bias",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
}


def config_from_hf(hf: HFConfig) -> ModelConfig:
    """Reads config.json with the defaults of ``transformers.LlamaConfig``.

    Raises:
        ConfigError: A value is out of range or not supported.
    """
    shape = hf_config.shape(
        hf,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        max_position_embeddings=2048,
    )
    bias = hf_config.boolean(hf, "attention_bias", False)
    return ModelConfig(
        architecture="LlamaForCausalLM",
        **shape,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=hf_config.boolean(hf, "mlp_bias", False),
        window=(None,) * shape["num_layers"],
    )


FAMILY = Family("LlamaForCausalLM", config_from_hf, Decoder, WEIGHTS)
