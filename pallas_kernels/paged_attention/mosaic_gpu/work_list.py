"""The work list of a step: which splits of which rows there are, built on the device once and shared by all layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

SMALLEST_SPLIT = 256
"""Tokens of a split; a multiple of every tile."""

MOST_SPLITS = 64
"""Splits of a row that fills its table. It bounds the partial results of a step: rows * splits * heads * head dimension * 4 bytes."""


class DecodeItems(NamedTuple):
    """The splits of the single-token rows, row by row, each row's in order of position.

    Attributes:
        rows: Row of each item; what lies behind the last item is padding.
        starts: First position of each item.
        kv_lens: Tokens of each item's row, so that a block learns all about an item in one round trip to memory.
        first: Each row's first item, and at the end the number of items.
    """

    rows: Int[Array, " W"]
    starts: Int[Array, " W"]
    kv_lens: Int[Array, " W"]
    first: Int[Array, " S+1"]


class WorkList(NamedTuple):
    """What both kernels walk along.

    Attributes:
        decode: Items of the rows with one token.
        prefill: Items of the other rows, or None where a step cannot have any.
    """

    decode: DecodeItems
    prefill: Any


def split_tokens(page_size: int, table_width: int) -> int:
    """Returns the tokens of a split: a function of static sizes alone, so that a row is split alike in every batch."""
    split = SMALLEST_SPLIT
    while split * MOST_SPLITS < page_size * table_width:
        split *= 2
    return split


def decode_items(kv_lens: Int[Array, " S"], num_rows: Int[Array, ""], *, page_size: int, table_width: int) -> DecodeItems:
    """Returns the splits of the first ``num_rows`` rows; a row without keys has none.

    A search in the running sum finds the row of an item: one comparison for each doubling of the rows, not one for each row.
    """
    capacity = kv_lens.shape[0]
    split = split_tokens(page_size, table_width)
    index = jnp.arange(capacity * -(-page_size * table_width // split), dtype=jnp.int32)
    in_use = jnp.arange(capacity, dtype=jnp.int32) < num_rows
    counts = jnp.where(in_use, (kv_lens + (split - 1)) // split, 0)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    rows = jnp.minimum(jnp.searchsorted(ends, index, side="right", method="scan_unrolled"), capacity - 1).astype(jnp.int32)
    return DecodeItems(rows, (index - first[rows]) * split, kv_lens[rows], first)
