"""The tiny model for training: a Llama with grouped-query attention as a small flax module, and its Hugging Face files.

Parameters and sums are float32, the factors of products bfloat16; the exported file is bfloat16. The engine has its own, paged model.
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
from safetensors.numpy import load_file, save_file
from tiny import tokenizer as tok
from tiny.flash import attend


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


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel` of numbers rounded to bfloat16, summed in float32; so are the two products of its gradient."""
    return contract(x, kernel, x.ndim - 1, 0)


def contract(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    """One product in bfloat16, summed in float32."""
    numbers = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left.astype(jnp.bfloat16), right.astype(jnp.bfloat16), numbers, preferred_element_type=jnp.float32)


def matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The product, and what its gradient needs."""
    return matmul(x, kernel), (x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))


def matmul_backward(kept: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of both factors."""
    x, kernel = kept
    flat = grad.reshape(-1, grad.shape[-1])
    # XLA moves single numbers to transpose x on a CPU; the product with a unit matrix is exact and takes a tenth of the time.
    turned = contract(jnp.eye(x.shape[-1]), x.reshape(-1, x.shape[-1]), 1, 1)
    return contract(grad, kernel, grad.ndim - 1, 1), contract(turned, flat, 1, 0)


matmul.defvjp(matmul_forward, matmul_backward)


class Linear(nnx.Module):
    """A projection without bias."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs, zero: bool = False) -> None:
        init = nnx.initializers.zeros if zero else nnx.initializers.normal(inputs**-0.5)
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """The projected vectors."""
        return matmul(x, self.kernel[...])


class Attention(nnx.Module):
    """Causal attention in which a few query heads share one head of keys and values."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.config = config
        kv = config.kv_heads * config.head
        self.q_proj = Linear(config.hidden, config.heads * config.head, rngs)
        self.k_proj = Linear(config.hidden, kv, rngs)
        self.v_proj = Linear(config.hidden, kv, rngs)
        self.o_proj = Linear(config.heads * config.head, config.hidden, rngs, zero=True)

    def __call__(self, x: jax.Array, positions: jax.Array, parts: jax.Array) -> jax.Array:
        """What each position gathers: `x` and the result are [rows, length, hidden], the rest [rows, length]."""
        config, (rows, length, _) = self.config, x.shape
        q = rotate(self.q_proj(x).reshape(rows, length, config.heads, -1), positions, config.theta) * config.head**-0.5
        k = rotate(self.k_proj(x).reshape(rows, length, config.kv_heads, -1), positions, config.theta)
        v = self.v_proj(x).reshape(rows, length, config.kv_heads, -1)
        q = q.reshape(rows, length, config.kv_heads, -1, config.head).transpose(0, 2, 3, 1, 4)
        out = attend(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), parts)
        return self.o_proj(out.transpose(0, 3, 1, 2, 4).reshape(rows, length, -1))


class Layer(nnx.Module):
    """One pre-norm transformer layer with a SwiGLU feed-forward part."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.input_layernorm = nnx.RMSNorm(config.hidden, epsilon=config.eps, rngs=rngs)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = nnx.RMSNorm(config.hidden, epsilon=config.eps, rngs=rngs)
        self.gate_proj = Linear(config.hidden, config.mlp, rngs)
        self.up_proj = Linear(config.hidden, config.mlp, rngs)
        self.down_proj = Linear(config.mlp, config.hidden, rngs, zero=True)

    def __call__(self, x: jax.Array, positions: jax.Array, parts: jax.Array) -> jax.Array:
        """The residual stream after this layer."""
        x = x + self.self_attn(self.input_layernorm(x), positions, parts)
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

    def __call__(self, ids: jax.Array, positions: jax.Array, parts: jax.Array, picked: jax.Array) -> jax.Array:
        """Logits [picked, vocab] of the picked positions, numbered over the rows; the other arrays are [rows, length]."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, positions, parts)
        x = self.norm(x.reshape(-1, x.shape[-1])[picked])
        return contract(x, self.embed_tokens.embedding[...], 1, 1)


def parameters(model: Tiny) -> dict[str, nnx.Param]:
    """The parameters under their Hugging Face names."""
    found = {"model.embed_tokens.weight": model.embed_tokens.embedding, "model.norm.weight": model.norm.scale}
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{norm}.weight"] = getattr(layer, norm).scale
        for part, owner, names in (("self_attn", layer.self_attn, "qkvo"), ("mlp", layer, ("gate", "up", "down"))):
            for name in names:
                found[f"{prefix}{part}.{name}_proj.weight"] = getattr(owner, f"{name}_proj").kernel
    return found


def hf_tensors(model: Tiny) -> dict[str, np.ndarray]:
    """The parameters in bfloat16, and with kernels as [outputs, inputs]."""
    arrays = {name: np.asarray(value[...]).astype(ml_dtypes.bfloat16) for name, value in parameters(model).items()}
    return {name: np.ascontiguousarray(x.T if name.endswith("_proj.weight") else x) for name, x in arrays.items()}


def load_model(folder: Path) -> Tiny:
    """The model of a folder that `save_model` wrote."""
    model, stored = Tiny(Config()), load_file(folder / "model.safetensors")
    for name, value in parameters(model).items():
        array = jnp.asarray(stored[name], jnp.float32)
        value[...] = array.T if name.endswith("_proj.weight") else array
    return model


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
