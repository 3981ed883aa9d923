"""The one door to ``pallas_kernels``: write a layer's new keys and values into its pages, then attend through block tables."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpaged.state import StepInputs
from pallas_kernels.kv_write import write_kv_pages
from pallas_kernels.paged_attention import ragged_paged_attention

IMPLEMENTATIONS = ("auto", "xla")


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
    """

    positions: Int[Array, " T"]
    kv_lens: Int[Array, " S"]
    block_tables: Int[Array, "S P"]
    cu_q_lens: Int[Array, " S+1"]
    distribution: Int[Array, " 3"]
    write_pages: Int[Array, " T"]
    write_offsets: Int[Array, " T"]


def attention_metadata(inputs: StepInputs, *, num_pages: int, page_size: int) -> AttentionMetadata:
    """Returns the attention metadata of a step.

    Args:
        inputs: The step's inputs.
        num_pages: Pages of the pool, the null page included.
        page_size: Token positions in a page.
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
    )


def paged_attention(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    pages: Float[Array, "N B 2K D"],
    metadata: AttentionMetadata,
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "T H D"], Float[Array, "N B 2K D"]]:
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
        implementation: ``auto`` takes the fastest for the platform; or one of ``IMPLEMENTATIONS`` by name.

    Returns:
        Outputs in q's dtype (zeros for padding tokens), and the pages.

    Raises:
        ValueError: A shape, dtype or option does not fit.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: must be one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    new = jnp.stack([k, v], axis=2).reshape(k.shape[0], 2 * k.shape[1], k.shape[2])
    pages = write_kv_pages(pages, new, metadata.write_pages, metadata.write_offsets)
    out = ragged_paged_attention(
        q,
        pages,
        metadata.kv_lens,
        metadata.block_tables,
        metadata.cu_q_lens,
        metadata.distribution,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        implementation="xla",
    )
    return out, pages
