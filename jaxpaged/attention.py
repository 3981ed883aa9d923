"""The one door to ``pallas_kernels``: what a backend wants of the pool and of a step, and attention of one layer through its pages.

A backend is an implementation of ``pallas_kernels.paged_attention``, named as there; ``auto`` is the fastest for jax's default device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpaged.config import ModelConfig
from jaxpaged.errors import ConfigError
from jaxpaged.state import KVPages, PagePool, StepInputs, init_pool
from pallas_kernels.page_copy import copy_first_pages
from pallas_kernels.paged_attention import implementations_on, make_work_list, ragged_paged_attention_update, resolve, storage_head_dim

_CPU_STORES_AS = {"float8_e4m3fn": "uint8", "bfloat16": "uint16"}
"""Dtypes of which a CPU's pool holds the bits: XLA:CPU would widen the whole pool for each write."""


def resolve_backend(asked: str, device: jax.Device) -> str:
    """Returns the attention backend for a device.

    Args:
        asked: ``auto`` or a name.
        device: Where the engine runs.

    Raises:
        ConfigError: It cannot run there; says what can.
    """
    names = implementations_on(device)
    if asked == "auto":
        return names[0]
    if asked not in names:
        capability = getattr(device, "compute_capability", None)
        kind = f"{device.platform}:{device.device_kind}" + (f" (compute capability {capability})" if capability else "")
        raise ConfigError(f"--attention-backend {asked} cannot run on {kind}; here run: auto, {', '.join(names)}")
    return asked


def make_pool(
    config: ModelConfig, num_pages: int, page_size: int, dtype: DTypeLike | None = None, *, implementation: str = "auto"
) -> PagePool:
    """Returns a pool of zeros, laid out as a backend wants it; any other backend can read it too.

    Args:
        config: Gives the layers, K/V heads and head dimension.
        num_pages: N, the null page included.
        page_size: B, token positions in a page.
        dtype: Of the keys and values; default the model's.
        implementation: The backend.
    """
    name = str(jnp.dtype(dtype or config.dtype))
    if resolve(implementation) == "xla" and jax.default_backend() == "cpu":
        name = _CPU_STORES_AS.get(name, name)
    return init_pool(config, num_pages, page_size, name, head_dim=storage_head_dim(config.head_dim, implementation))


def page_bytes(config: ModelConfig, page_size: int, dtype: DTypeLike | None = None, *, implementation: str = "auto") -> int:
    """Returns the bytes of one page in all layers of ``make_pool``'s pool: what is padded, and scales, included."""
    return jax.eval_shape(lambda: make_pool(config, 1, page_size, dtype, implementation=implementation)).num_bytes


def copy_shared_pages(pool: PagePool, inputs: StepInputs) -> PagePool:
    """Copies the pages that a step must not write to because others read them too, in all layers; the first thing that a step does.

    Args:
        pool: Pages; donated to the step, so that the copies are made in place.
        inputs: Says which; none at all costs the look at their number.
    """
    return copy_first_pages(pool, inputs.copy_sources, inputs.copy_destinations, inputs.num_copies[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """What attention needs to know of a step; built once, shared by all layers.

    Attributes:
        positions: int32 [T], position of each token in its sequence.
        kv_lens: int32 [S], tokens of each row's sequence, this step's included; 0 for padding rows.
        block_tables: int32 [S, P], page ids of each row.
        cu_q_lens: int32 [S + 1], running sum of the rows' new tokens.
        distribution: int32 [3], ends of the row regions: single-token rows, a kernel's choice, all rows in use.
        write_pages: int32 [T], page that each token's K and V go to; N for padding tokens, which are not written.
        write_offsets: int32 [T], position within that page.
        work: How the backend cuts the rows into pieces, if it wants to know before the first layer.
    """

    positions: Int[Array, " T"]
    kv_lens: Int[Array, " S"]
    block_tables: Int[Array, "S P"]
    cu_q_lens: Int[Array, " S+1"]
    distribution: Int[Array, " 3"]
    write_pages: Int[Array, " T"]
    write_offsets: Int[Array, " T"]
    work: Any = None


def attention_metadata(inputs: StepInputs, *, num_pages: int, page_size: int, implementation: str = "auto") -> AttentionMetadata:
    """Returns the attention metadata of a step.

    Args:
        inputs: The step's inputs.
        num_pages: Pages of the pool, the null page included.
        page_size: Token positions in a page.
        implementation: The backend that will attend.

    Raises:
        ValueError: There is no such backend.
    """
    tokens = jnp.arange(inputs.num_tokens, dtype=jnp.int32)
    rows = jnp.searchsorted(inputs.cu_q_lens, tokens, side="right", method="compare_all").astype(jnp.int32) - 1
    in_use = tokens < inputs.cu_q_lens[-1]
    rows = jnp.clip(rows, 0, inputs.num_rows - 1)
    columns = jnp.clip(inputs.positions // page_size, 0, inputs.table_width - 1)
    return AttentionMetadata(
        positions=inputs.positions,
        kv_lens=inputs.kv_lens,
        block_tables=inputs.block_tables,
        cu_q_lens=inputs.cu_q_lens,
        distribution=inputs.distribution,
        write_pages=jnp.where(in_use, inputs.block_tables[rows, columns], num_pages),
        write_offsets=inputs.positions % page_size,
        work=make_work_list(
            inputs.kv_lens,
            inputs.cu_q_lens,
            inputs.distribution,
            num_tokens=inputs.num_tokens,
            page_size=page_size,
            table_width=inputs.table_width,
            implementation=implementation,
        ),
    )


def paged_attention(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    pages: KVPages,
    metadata: AttentionMetadata,
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "T H D"], KVPages]:
    """Writes the step's keys and values of one layer into its pages, then attends to them.

    Args:
        q: Queries, rotated.
        k: Keys, rotated.
        v: Values.
        pages: The layer's pages; donated to the step, so that the write is in place.
        metadata: The step's ``attention_metadata``.
        sm_scale: Multiplies the scores.
        sliding_window: Number of positions a query sees, its own included; None for all.
        soft_cap: Bounds the scores to ``soft_cap * tanh(score / soft_cap)``; None for no cap.
        implementation: The backend, the one that the metadata was made for.

    Returns:
        Outputs in q's dtype (zeros for padding tokens), and the pages.

    Raises:
        ValueError: A shape, dtype or option does not fit.
    """
    head_dim = q.shape[2]
    new = jnp.stack([k, v], axis=2).reshape(k.shape[0], 2 * k.shape[1], head_dim)
    out, *written = ragged_paged_attention_update(
        _pad_heads(q, pages),
        _pad_heads(new, pages),
        pages.kv,
        metadata.kv_lens,
        metadata.block_tables,
        metadata.cu_q_lens,
        metadata.distribution,
        metadata.write_pages,
        metadata.write_offsets,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        k_scale=pages.k_scale,
        v_scale=pages.v_scale,
        implementation=implementation,
        work=metadata.work,
    )
    return out[..., :head_dim], KVPages(*written)


def _pad_heads(x: Float[Array, "T H D"], pages: KVPages) -> Float[Array, "T H E"]:
    """Pads heads with zeros to the pages' head dimension; zeros change neither a score nor the part of an output that is kept."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, max(0, pages.kv.shape[3] - x.shape[2]))))
