"""A matrix multiplication with an optional bias; several projections of one input may share it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Linear(nnx.Module):
    """Maps the last axis from ``in_features`` to the concatenation of ``out_features``.

    The weight is stored ``[out, in]`` as in checkpoints: no transpose at load, and on a CPU each output reads one
    contiguous row. Projections of the same input (q, k and v; gate and up) are one weight, whose rows are theirs in order.
    """

    def __init__(self, in_features: int, out_features: tuple[int, ...], *, bias: bool, dtype: str) -> None:
        self.weight = nnx.Param(jnp.zeros((sum(out_features), in_features), dtype), init="normal", parts=out_features)
        self.bias = nnx.Param(jnp.zeros(sum(out_features), dtype), init="normal", parts=out_features) if bias else None

    def __call__(self, x: Float[Array, "T I"]) -> Float[Array, "T O"]:
        """Returns the projections side by side, in the input's dtype."""
        out = jax.lax.dot_general(x, self.weight[...], (((1,), (1,)), ((), ())))
        return out if self.bias is None else out + self.bias[...]
