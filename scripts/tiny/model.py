"""The tiny model for training: a Llama with grouped-query attention as a small flax module, and its Hugging Face files.

Parameters are float32 (bfloat16 is slow on a CPU); the exported file is bfloat16. The engine has its own, paged model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from tiny import tokenizer as tok


@dataclass(frozen=True)
class Config:
    """The shape of the model."""

    vocab: int = 2048
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    head: int = 32
    mlp: int = 512
    theta: float = 10000.0
    eps: float = 1e-5


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding, in the two-halves form that Hugging Face uses."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * theta ** (-jnp.arange(half) / half)
    cos, sin, left, right = jnp.cos(angles), jnp.sin(angles), x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


class Attention(nnx.Module):
    """Causal attention in which a few query heads share one head of keys and values."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.config = config
        kv = config.kv_heads * config.head
        self.q_proj = linear(config.hidden, config.heads * config.head, rngs)
        self.k_proj = linear(config.hidden, kv, rngs)
        self.v_proj = linear(config.hidden, kv, rngs)
        self.o_proj = linear(config.heads * config.head, config.hidden, rngs, zero=True)

    def __call__(self, x: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        """What each position gathers: `x` and the result are [batch, length, hidden], `mask` [batch, length, length]."""
        config, (batch, length, _) = self.config, x.shape
        q = rotate(self.q_proj(x).reshape(batch, length, config.heads, -1), positions, config.theta)
        k = rotate(self.k_proj(x).reshape(batch, length, config.kv_heads, -1), positions, config.theta)
        v = self.v_proj(x).reshape(batch, length, config.kv_heads, -1)
        q = q.reshape(batch, length, config.kv_heads, -1, config.head)
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * config.head**-0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e9), -1)
        out = jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(batch, length, -1)
        return self.o_proj(out)


class Layer(nnx.Module):
    """One pre-norm transformer layer with a SwiGLU feed-forward part."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.input_layernorm = nnx.RMSNorm(config.hidden, epsilon=config.eps, rngs=rngs)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = nnx.RMSNorm(config.hidden, epsilon=config.eps, rngs=rngs)
        self.gate_proj = linear(config.hidden, config.mlp, rngs)
        self.up_proj = linear(config.hidden, config.mlp, rngs)
        self.down_proj = linear(config.mlp, config.hidden, rngs, zero=True)

    def __call__(self, x: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        """The residual stream after this layer."""
        x = x + self.self_attn(self.input_layernorm(x), positions, mask)
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(jax.nn.silu(self.gate_proj(y)) * self.up_proj(y))


class Tiny(nnx.Module):
    """The language model; input and output embeddings are tied."""

    def __init__(self, config: Config, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.config = config
        self.embed_tokens = nnx.Embed(config.vocab, config.hidden, embedding_init=nnx.initializers.normal(0.05), rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.hidden, epsilon=config.eps, rngs=rngs)

    def __call__(self, ids: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        """Logits of every position, [batch, length, vocab]."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, positions, mask)
        return self.embed_tokens.attend(self.norm(x))


def linear(inputs: int, outputs: int, rngs: nnx.Rngs, zero: bool = False) -> nnx.Linear:
    """A projection without bias. The ones that write to the residual stream start at zero."""
    init = nnx.initializers.zeros if zero else nnx.initializers.normal(inputs**-0.5)
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)


def hf_tensors(model: Tiny) -> dict[str, np.ndarray]:
    """The parameters under their Hugging Face names, in bfloat16 and with kernels as [outputs, inputs]."""
    tensors = {"model.embed_tokens.weight": model.embed_tokens.embedding, "model.norm.weight": model.norm.scale}
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = getattr(layer, norm).scale
        for part, owner, names in (("self_attn", layer.self_attn, "qkvo"), ("mlp", layer, ("gate", "up", "down"))):
            for name in names:
                tensors[f"{prefix}{part}.{name}_proj.weight"] = getattr(owner, f"{name}_proj").kernel[...].T
    return {k: np.ascontiguousarray(np.asarray(v[...]).astype(ml_dtypes.bfloat16)) for k, v in tensors.items()}


def save_model(model: Tiny, folder: Path, max_length: int) -> None:
    """Write model.safetensors, config.json and generation_config.json."""
    config = model.config
    save_file(hf_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    ids = {"bos_token_id": tok.ENDOFTEXT, "eos_token_id": [tok.IM_END, tok.ENDOFTEXT], "pad_token_id": tok.ENDOFTEXT}
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head,
        "hidden_act": "silu",
        "max_position_embeddings": max_length,
        "rms_norm_eps": config.eps,
        "rope_theta": config.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.theta},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(shape | ids, indent=2) + "\n")
    sampling = {"do_sample": True, "temperature": 0.3, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(ids | sampling, indent=2) + "\n")
