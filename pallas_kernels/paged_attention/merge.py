"""Merging the attention of the same queries over two disjoint sets of keys, as cascades and context parallelism need it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_attention_states(
    out_a: Float[Array, "T H D"], lse_a: Float[Array, "T H"], out_b: Float[Array, "T H D"], lse_b: Float[Array, "T H"]
) -> tuple[Float[Array, "T H D"], Float[Array, "T H"]]:
    """Returns outputs (in ``out_a``'s dtype) and float32 log-sums of attention over both sets of keys.

    Each side weighs as the exponential of its log-sum (the merge of FlashAttention's blocks, arXiv 2205.14135; FlashInfer calls
    it a state). A side that summed nothing, with a log-sum of -inf, leaves the other's bits as they are.

    Args:
        out_a: Outputs over one set of keys.
        lse_a: float32, their log-sums.
        out_b: Outputs over the other set.
        lse_b: float32, their log-sums.
    """
    top = jnp.maximum(lse_a, lse_b)
    base = jnp.where(top == -jnp.inf, 0.0, top)
    weight_a, weight_b = jnp.exp(lse_a - base), jnp.exp(lse_b - base)
    total = weight_a + weight_b
    share_a, share_b = (jnp.where(total > 0, w / jnp.where(total > 0, total, 1), 0)[..., None] for w in (weight_a, weight_b))
    # A side without keys may hold anything, so it is left out and not only multiplied by zero.
    parts = [jnp.where(share > 0, out.astype(jnp.float32) * share, 0) for out, share in ((out_a, share_a), (out_b, share_b))]
    return (parts[0] + parts[1]).astype(out_a.dtype), base + jnp.log(total)
