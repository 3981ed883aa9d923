"""Rounding keys and values to what a pool stores: eight bits with a scale, or the pool's float dtype."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Num

INT8_MAX = 127

BITS_OF = {"uint8": "float8_e4m3fn", "uint16": "bfloat16"}
"""Pools of unsigned integers hold the bits of these: XLA:CPU widens a whole pool of the floats themselves for each write to it."""


def value_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype of the numbers in a pool: its own, or the one whose bits it holds."""
    return jnp.dtype(BITS_OF.get(str(jnp.dtype(dtype)), dtype))


def from_storage(stored: Num[Array, "*X"]) -> Num[Array, "*X"]:
    """Returns the numbers in a part of a pool (not of a whole pool: where the pool holds bits, this copies)."""
    dtype = value_dtype(stored.dtype)
    return stored if dtype == stored.dtype else lax.bitcast_convert_type(stored, dtype)


def to_storage(
    kv: Float[Array, "T 2K D"], dtype: DTypeLike, k_scale: float | Float[Array, ""] | None, v_scale: float | Float[Array, ""] | None
) -> Num[Array, "T 2K D"]:
    """Returns keys and values divided by their scales and rounded to a float pool's dtype; e4m3 saturates, and NaN stays NaN."""
    if k_scale is not None or v_scale is not None:
        scales = jnp.stack([jnp.float32(1 if scale is None else scale) for scale in (k_scale, v_scale)])
        kv = kv.astype(jnp.float32) / jnp.tile(scales, kv.shape[1] // 2)[:, None]
    values = value_dtype(dtype)
    if values == jnp.float8_e4m3fn:
        limit = float(jnp.finfo(values).max)
        kv = jnp.clip(kv.astype(jnp.float32), -limit, limit)  # a cast alone makes NaN of what is too large
    kv = kv.astype(values)
    return kv if values == jnp.dtype(dtype) else lax.bitcast_convert_type(kv, dtype)


def quantize_int8(kv: Float[Array, "T 2K D"]) -> tuple[Int8[Array, "T 2K D"], Float[Array, "T K"], Float[Array, "T K"]]:
    """Returns whole numbers from -127 to 127 and the scales of K and V by which they are to be multiplied.

    The largest of a token's numbers in a head becomes 127. Eight bits hold no NaN, so where one of the numbers is NaN or
    infinite the scale is NaN: whoever reads the token sees that something is wrong, and nobody else does.
    """
    kv = kv.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kv), axis=-1)  # NaN if there is one
    scale = jnp.where(jnp.isfinite(largest), largest / INT8_MAX, jnp.nan)  # [T, 2K]
    usable = scale > 0
    whole = jnp.round(kv / jnp.where(usable, scale, 1)[..., None])
    whole = jnp.where(usable[..., None], jnp.clip(whole, -INT8_MAX, INT8_MAX), 0).astype(jnp.int8)
    return whole, scale[:, 0::2], scale[:, 1::2]
