"""Token embedding, and the projection back to the vocabulary."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpaged.layers.linear import project


class Embedding(nnx.Module):
    """A table of one vector per token, ``[V, E]``."""

    def __init__(self, vocab_size: int, features: int, *, dtype: str, matrix_dtype: str) -> None:
        self.weight = nnx.Param(jnp.zeros((vocab_size, features), matrix_dtype), init="normal")
        self.dtype = dtype

    def __call__(self, tokens: Int[Array, " T"]) -> Float[Array, "T E"]:
        """Returns the vectors of tokens; the host guarantees that ids are in [0, V)."""
        return self.weight[...].at[tokens].get(mode="clip").astype(self.dtype)

    def logits(self, hidden: Float[Array, "R E"]) -> Float[Array, "R V"]:
        """Returns float32 scores of every token: the products with its vector, summed in float32."""
        return project(hidden, self.weight[...], dtype=jnp.float32)
