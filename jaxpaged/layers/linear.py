"""Matrix multiplication with weights as checkpoints store them, and an optional bias."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def project(x: Float[Array, "T I"], weight: Float[Array, "O I"], *, dtype: DTypeLike | None = None) -> Float[Array, "T O"]:
    """Returns ``x @ weight.T``, summed in float32, as ``dtype`` (default that of ``x``).

    A float32 input may meet a bfloat16 weight: then x is split into three bfloat16 terms that add up to it exactly (3 x 8 bits
    of significand), and one bfloat16 multiplication of all three, accumulated in float32, reads the weight once, at two bytes
    an element. Products of bfloat16 numbers are exact in float32, so nothing is lost against a float32 weight.

    Source: the split is that of Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for
    higher-precision computations" (2019); here one operand needs none.
    """
    if x.dtype == jnp.float32 and weight.dtype == jnp.bfloat16:
        count = x.shape[0]
        parts = _times(jnp.concatenate(_three_terms(x)), weight, jnp.float32)  # [3T, O]
        return parts[2 * count :] + parts[count : 2 * count] + parts[:count]  # smallest first
    return _times(x, weight, dtype or x.dtype)


class Linear(nnx.Module):
    """Maps the last axis from ``in_features`` to the concatenation of ``out_features``.

    The weight is stored ``[out, in]`` as in checkpoints: no transpose at load, and on a CPU each output reads one
    contiguous row. Projections of the same input (q, k and v; gate and up) are one weight, whose rows are theirs in order.
    """

    def __init__(self, in_features: int, out_features: tuple[int, ...], *, bias: bool, dtype: str, matrix_dtype: str) -> None:
        self.weight = nnx.Param(jnp.zeros((sum(out_features), in_features), matrix_dtype), init="normal", parts=out_features)
        self.bias = nnx.Param(jnp.zeros(sum(out_features), dtype), init="normal", parts=out_features) if bias else None

    def __call__(self, x: Float[Array, "T I"]) -> Float[Array, "T O"]:
        """Returns the projections side by side, in the input's dtype."""
        out = project(x, self.weight[...])
        return out if self.bias is None else out + self.bias[...]


def _times(x: Float[Array, "T I"], weight: Float[Array, "O I"], dtype: DTypeLike) -> Float[Array, "T O"]:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # or GPU and TPU round to fewer bits
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=dtype)


def _three_terms(x: Float[Array, "T I"]) -> tuple[Array, Array, Array]:
    """Splits float32 into bfloat16 terms, largest first. ``reduce_precision`` rounds where a pair of casts may be optimised away."""
    first = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    second = jax.lax.reduce_precision(x - first, exponent_bits=8, mantissa_bits=7)
    third = x - first - second
    return first.astype(jnp.bfloat16), second.astype(jnp.bfloat16), third.astype(jnp.bfloat16)
