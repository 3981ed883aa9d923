"""Self-attention over the page pool: project, normalise, rotate, attend, project back."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxpaged.attention import AttentionMetadata, paged_attention
from jaxpaged.config import ModelConfig
from jaxpaged.layers.linear import Linear
from jaxpaged.layers.norm import RMSNorm
from jaxpaged.layers.rope import Rotation, rotate
from jaxpaged.state import KVPages


class AttentionBlock(nnx.Module):
    """Grouped-query attention of one layer.

    What differs between families comes from the configuration: biases, the sliding window of this layer, and RMSNorm of
    each query and key head before the rotation (``qk_norm``).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        parts = (heads * dim, kv_heads * dim, kv_heads * dim)
        dtypes = {"dtype": config.dtype, "matrix_dtype": config.matrix_dtype}
        self.qkv = Linear(config.hidden_size, parts, bias=config.qkv_bias, **dtypes)
        self.output = Linear(heads * dim, (config.hidden_size,), bias=config.output_bias, **dtypes)
        self.q_norm = RMSNorm(dim, eps=config.rms_norm_eps, dtype=config.dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, eps=config.rms_norm_eps, dtype=config.dtype) if config.qk_norm else None
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, dim
        self.window = config.window[layer]

    def __call__(
        self, x: Float[Array, "T E"], pages: KVPages, rotation: Rotation, metadata: AttentionMetadata, *, attention: str
    ) -> tuple[Float[Array, "T E"], KVPages]:
        """Returns the block's output without the residual, and the layer's pages with the new keys and values in them."""
        heads, kv_heads, dim = self.num_heads, self.num_kv_heads, self.head_dim
        qkv = self.qkv(x).reshape(x.shape[0], heads + 2 * kv_heads, dim)  # [T, H + 2K, D]
        if self.q_norm is None or self.k_norm is None:
            qk = rotate(qkv[:, : heads + kv_heads], rotation)
        else:
            qk = jnp.concatenate([self.q_norm(qkv[:, :heads]), self.k_norm(qkv[:, heads : heads + kv_heads])], axis=1)
            qk = rotate(qk, rotation)
        out, pages = paged_attention(
            qk[:, :heads],
            qk[:, heads:],
            qkv[:, heads + kv_heads :],
            pages,
            metadata,
            sm_scale=dim**-0.5,
            sliding_window=self.window,
            implementation=attention,
        )
        return self.output(out.reshape(x.shape[0], heads * dim)), pages
