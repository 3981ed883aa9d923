"""Rotary position embedding, with every scaling that Llama, Mistral, Qwen2 and Qwen3 configurations can name.

Some scalings (``dynamic``, ``longrope``) look at the length of the text. A token's key is rotated once, when it enters the
pool, so its length must be a function of the request alone, never of how a step was composed: it is
``max(position + 1, prompt length)``. That is what a model sees that reads the whole prompt at once and then one token at a
time, and it is the same for chunked, batched, and recomputed prompts.

Sources: Su et al., "RoFormer" (2021); bloc97, "NTK-aware scaled RoPE" (2023); Peng et al., "YaRN" (2023); Ding et al.,
"LongRoPE" (2024); the Llama 3.1 model card. Names and defaults of the values are Hugging Face's.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Float, Int

from jaxpaged.config import ModelConfig
from jaxpaged.state import StepInputs

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")


class Rotation(NamedTuple):
    """Cosines and sines of a step's tokens, shared by all layers; scaled by the attention factor.

    Attributes:
        cos, sin: float32 [T, 1, D / 2].
    """

    cos: Float[Array, "T 1 D/2"]
    sin: Float[Array, "T 1 D/2"]


def rotation(config: ModelConfig, positions: Int[Array, " T"], lengths: Int[Array, " T"]) -> Rotation:
    """Returns the rotation of each token.

    Args:
        config: Head dimension, base and scaling.
        positions: Position of each token.
        lengths: Length of the text that each token belongs to, where the scaling asks for it (see the module).
    """
    angles = positions.astype(jnp.float32)[:, None] * _frequencies_of(config, lengths)  # [T, D / 2]
    factor = attention_factor(config)
    return Rotation((jnp.cos(angles) * factor)[:, None], (jnp.sin(angles) * factor)[:, None])


def text_lengths(inputs: StepInputs) -> Int[Array, " T"]:
    """Returns for each token the length of the text that scalings by length go by: what it can see, but at least the prompt."""
    rows = jnp.searchsorted(inputs.cu_q_lens, jnp.arange(inputs.num_tokens), side="right", method="compare_all") - 1  # [T]
    return jnp.maximum(inputs.positions + 1, inputs.prompt_lens.at[rows].get(mode="clip"))


def rotate(x: Float[Array, "T H D"], rotation: Rotation) -> Float[Array, "T H D"]:
    """Rotates each pair (i, i + D/2) of each head, in float32."""
    half = x.shape[-1] // 2
    left, right = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([left * rotation.cos - right * rotation.sin, right * rotation.cos + left * rotation.sin], axis=-1)
    return turned.astype(x.dtype)


def inverse_frequencies(config: ModelConfig, length: int = 0) -> npt.NDArray[np.float32]:
    """Returns the angle per position of each pair of a head, float32 [D / 2], for a text of ``length`` tokens."""
    scaling, base = config.rope_scaling, config.rope_theta
    if scaling.kind == "dynamic":
        base *= _dynamic_stretch(config, max(length, config.max_position_embeddings))
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    inverse = np.asarray(base**-exponents)
    if scaling.kind == "linear":
        inverse = inverse / scaling.get("factor")
    elif scaling.kind == "yarn":
        inverse = _yarn(config, inverse)
    elif scaling.kind == "llama3":
        inverse = _llama3(config, inverse)
    elif scaling.kind == "longrope":
        is_long = length > scaling.get("original_max_position_embeddings")
        inverse = inverse / np.asarray(scaling.get("long_factor" if is_long else "short_factor"))
    elif scaling.kind == "proportional":
        turning = int(scaling.get("partial_rotary_factor", 1.0) * config.head_dim // 2)
        inverse = np.where(np.arange(len(inverse)) < turning, inverse / scaling.get("factor", 1.0), 0.0)
    return inverse.astype(np.float32)


def attention_factor(config: ModelConfig) -> float:
    """Returns what cosines and sines are multiplied by, so that scores keep their spread over a longer context."""
    scaling = config.rope_scaling
    if scaling.kind not in ("yarn", "longrope"):
        return 1.0
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)
    factor = _stretch(config)
    if scaling.kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(scaling.get("original_max_position_embeddings"))) if factor > 1 else 1.0
    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all_dim)
    return _yarn_scale(factor, 1.0)


def _frequencies_of(config: ModelConfig, lengths: Int[Array, " T"]) -> Float[Array, "#T D/2"]:
    """Returns the inverse frequencies of each token's length; one row for all where the length does not matter."""
    if config.rope_scaling.kind == "longrope":
        original = config.rope_scaling.get("original_max_position_embeddings")
        short, long = inverse_frequencies(config), inverse_frequencies(config, original + 1)
        return jnp.where(lengths[:, None] > original, long, short)
    if config.rope_scaling.kind == "dynamic":
        base = config.rope_theta * _dynamic_stretch(config, jnp.maximum(lengths, config.max_position_embeddings).astype(jnp.float32))  # [T]
        exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
        return base[:, None] ** -exponents
    return jnp.asarray(inverse_frequencies(config))[None]


def _dynamic_stretch(config: ModelConfig, length: Any) -> Any:
    """Returns what the base is multiplied by for a text of ``length`` tokens, at least the trained context; numbers or arrays."""
    factor, dim = config.rope_scaling.get("factor"), config.head_dim
    return (factor * length / config.max_position_embeddings - (factor - 1)) ** (dim / (dim - 2))


def _stretch(config: ModelConfig) -> float:
    """Returns the ratio of the stretched to the trained context."""
    given = config.rope_scaling.get("factor")
    return given if given is not None else config.max_position_embeddings / config.rope_scaling.get("original_max_position_embeddings")


def _yarn(config: ModelConfig, inverse: npt.NDArray) -> npt.NDArray:
    """Interpolates slow pairs, leaves fast ones, and blends linearly between the two turning counts beta_fast and beta_slow."""
    scaling, dim = config.rope_scaling, config.head_dim
    original = scaling.get("original_max_position_embeddings")

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_that_turns(scaling.get("beta_fast") or 32), pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    interpolated = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return inverse / _stretch(config) * interpolated + inverse * (1 - interpolated)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(config: ModelConfig, inverse: npt.NDArray) -> npt.NDArray:
    """Divides long wavelengths by the factor, leaves short ones, and blends between."""
    scaling = config.rope_scaling
    factor, low, high = scaling.get("factor"), scaling.get("low_freq_factor"), scaling.get("high_freq_factor")
    turns = scaling.get("original_max_position_embeddings") * inverse / (2 * math.pi)  # over the trained context
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return inverse / factor * (1 - kept) + inverse * kept
