"""Root-mean-square normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """Scales the last axis to unit root mean square, then by a learned weight.

    The mean is taken in float32 whatever the input's dtype, because squares of bfloat16 lose the small entries.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """

    def __init__(self, features: int, *, eps: float, dtype: str) -> None:
        self.weight = nnx.Param(jnp.ones(features, dtype), init="ones")
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows F"]) -> Float[Array, "*rows F"]:
        """Returns the normalised input, in its dtype."""
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype) * self.weight[...]
