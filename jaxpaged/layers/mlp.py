"""The gated feed-forward block."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxpaged.layers.linear import Linear


class GatedMLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))``.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool, dtype: str, matrix_dtype: str) -> None:
        self.gate_up = Linear(hidden_size, (intermediate_size, intermediate_size), bias=bias, dtype=dtype, matrix_dtype=matrix_dtype)
        self.down = Linear(intermediate_size, (hidden_size,), bias=bias, dtype=dtype, matrix_dtype=matrix_dtype)
        self.intermediate_size = intermediate_size

    def __call__(self, x: Float[Array, "T E"]) -> Float[Array, "T E"]:
        """Returns the block's output, without the residual."""
        gate_up = self.gate_up(x)  # [T, 2F]
        return self.down(jax.nn.silu(gate_up[:, : self.intermediate_size]) * gate_up[:, self.intermediate_size :])
