"""Pages between HBM and VMEM inside a TPU kernel: fetched two blocks at a time, cleaned, split into heads, written.

A KV block is a run of ``block`` token positions of one row, ``block / B`` pages, in one of two VMEM slots. While one is computed on,
the pages of the next are on their way, across rows and grid steps. Of a block only the pages that some query sees are fetched; what
the other positions hold (an older block, or whatever VMEM held at first, NaN included) is overwritten with zeros, so that a product
with a zero weight is a zero.

A head's keys and values lie ``2K`` rows apart. TPUs load every n-th row only of 32-bit words and 128 lanes, hence a view of the block
as words (rows of one lane chunk, each word one row of float32, or two of bfloat16, which are a key and its value, or four of 8 bits).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128

_ZERO_RUN = 16
"""Tokens zeroed by one store; divides every block."""

WRITE_RUN = 16
"""New tokens that one copy writes if they follow each other in a page."""

_WRITES_IN_FLIGHT = 8
"""Groups of ``WRITE_RUN`` tokens whose copies run at the same time."""


def divide(x: Any, by: int) -> Any:
    """Returns ``x // by`` for scalars and vectors that are not negative."""
    return lax.div(x, jnp.full(jnp.shape(x), by, jnp.int32))


def divide_up(x: Any, by: int) -> Any:
    """Returns ``ceil(x / by)`` for scalars that are not negative."""
    return divide(x + (by - 1), by)


@dataclasses.dataclass(frozen=True)
class PageShape:
    """Static facts about the pool and its blocks.

    Attributes:
        num_pages: N.
        page_size: B.
        num_kv_heads: K.
        head_dim: D, a multiple of 128.
        dtype: Name of the pool's dtype.
        table_width: P.
        block: Tokens of a KV block, a multiple of B.
        scaled: Whether there are scales per token and head.
        views: Whether to read heads through views of 32-bit words, as a TPU must. The interpreter that looks for races has no such views.
    """

    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    table_width: int
    block: int
    scaled: bool
    views: bool = True

    @property
    def pages_per_block(self) -> int:
        """Pages of a KV block."""
        return self.block // self.page_size

    @property
    def chunks(self) -> int:
        """Runs of 128 lanes in a head."""
        return self.head_dim // LANES

    @property
    def packing(self) -> int:
        """Numbers in a 32-bit word."""
        return 4 // jnp.dtype(self.dtype).itemsize

    def scratch(self) -> list[Any]:
        """Returns the scratch shapes that ``PageStream`` takes."""
        shapes = [pltpu.VMEM((2, self.chunks, self.block, 2 * self.num_kv_heads, LANES), self.dtype)]
        if self.scaled:
            shapes += [pltpu.VMEM((2, self.pages_per_block, self.num_kv_heads, self.page_size), jnp.float32)] * 2
        return [*shapes, pltpu.SemaphoreType.DMA((2,))]


@dataclasses.dataclass(frozen=True)
class Span:
    """What a group of queries of one row sees: positions ``low:high`` of row ``row``; all traced scalars. ``index`` names the group."""

    index: Any
    row: Any
    low: Any
    high: Any


@dataclasses.dataclass(frozen=True)
class PageStream:
    """The references of a kernel that KV blocks go through.

    Attributes:
        shape: Static facts.
        tables: Block tables, flat, in SMEM.
        pool: The pool, in HBM.
        scales: Scales of keys and of values in HBM, if there are any.
        buffer: Two slots for blocks.
        scale_buffers: Two slots for scales of keys and of values.
        arrived: A semaphore per slot.
    """

    shape: PageShape
    tables: Any
    pool: Any
    scales: tuple[Any, ...]
    buffer: Any
    scale_buffers: tuple[Any, ...]
    arrived: Any

    def first_block(self, span: Span) -> Any:
        """Returns the first block that holds a position of the span."""
        return divide(span.low, self.shape.block)

    def end_block(self, span: Span) -> Any:
        """Returns the block after the last one; a span without positions still has one block, of zeros."""
        return jnp.maximum(divide_up(span.high, self.shape.block), self.first_block(span) + 1)

    def _copies(self, span: Span, page: Any, place: Any, slot: Any) -> list[Any]:
        shape = self.shape
        page_id = jnp.clip(self.tables[span.row * shape.table_width + page], 0, shape.num_pages - 1)  # a bad id must not hang a TPU
        rows = pl.ds(pl.multiple_of(place * shape.page_size, shape.page_size), shape.page_size)
        copies = []
        for chunk in range(shape.chunks):
            source = self.pool.at[page_id, :, :, pl.ds(chunk * LANES, LANES)] if shape.chunks > 1 else self.pool.at[page_id]
            copies.append(pltpu.make_async_copy(source, self.buffer.at[slot, chunk, rows], self.arrived.at[slot]))
        for source, target in zip(self.scales, self.scale_buffers, strict=True):
            copies.append(pltpu.make_async_copy(source.at[page_id], target.at[slot, place], self.arrived.at[slot]))
        return copies

    def _for_pages(self, span: Span, block: Any, visit: Any) -> None:
        """Calls ``visit(page, place)`` for each page of a block that the span needs; ``place`` counts within the block."""
        base = block * self.shape.block
        first = divide(jnp.maximum(base, span.low), self.shape.page_size)
        end = divide_up(jnp.minimum(base + self.shape.block, span.high), self.shape.page_size)

        def step(page: Any, carry: Any) -> Any:
            visit(page, page - block * self.shape.pages_per_block)
            return carry

        lax.fori_loop(first, end, step, 0)

    def start(self, span: Span, block: Any, slot: Any) -> None:
        """Starts to fetch a block."""

        def visit(page: Any, place: Any) -> None:
            for copy in self._copies(span, page, place, slot):
                copy.start()

        self._for_pages(span, block, visit)

    def finish(self, span: Span, block: Any, slot: Any) -> None:
        """Waits for a block that was started and zeroes the positions outside of the span."""

        def visit(page: Any, place: Any) -> None:
            for copy in self._copies(span, page, place, slot):
                copy.wait()

        self._for_pages(span, block, visit)
        base = block * self.shape.block
        low = jnp.maximum(span.low - base, 0)
        high = jnp.clip(span.high - base, low, self.shape.block)

        @pl.when((low > 0) | (high < self.shape.block))
        def _() -> None:
            self._zero(slot, low, high)

    def _zero(self, slot: Any, low: Any, high: Any) -> None:
        """Zeroes the tokens ``:low`` and ``high:`` of a block."""

        def store(start: Any, count: int) -> None:
            for chunk in range(self.shape.chunks):
                where = self.buffer.at[slot, chunk, pl.ds(start, count)]
                where[...] = jnp.zeros(where.shape, where.dtype)

        def one(token: Any, carry: Any) -> Any:
            store(token, 1)
            return carry

        def run(index: Any, carry: Any) -> Any:
            store(pl.multiple_of(index * _ZERO_RUN, _ZERO_RUN), _ZERO_RUN)
            return carry

        low_run, high_run = divide(low, _ZERO_RUN), divide_up(high, _ZERO_RUN)
        lax.fori_loop(0, low_run, run, 0)
        lax.fori_loop(low_run * _ZERO_RUN, low, one, 0)
        lax.fori_loop(high, high_run * _ZERO_RUN, one, 0)
        lax.fori_loop(high_run, self.shape.block // _ZERO_RUN, run, 0)

    def load(self, slot: Any, head: int, which: int, dtype: Any) -> jax.Array:
        """Returns the keys (``which`` 0) or values (1) of one head in a block: ``[block, D]`` in ``dtype``."""
        row = 2 * head + which
        parts = []
        for chunk in range(self.shape.chunks):
            if self.shape.views:
                parts.append(self._load_words(self.buffer.at[slot, chunk], row).astype(dtype))
            else:
                parts.append(self.buffer[slot, chunk, :, row, :].astype(jnp.float32).astype(dtype))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

    def _load_words(self, block: Any, row: int) -> jax.Array:
        """Returns one row of each token of ``block [block, 2K, 128]`` as float32."""
        shape = self.shape
        packing = shape.packing
        words_per_token = 2 * shape.num_kv_heads // packing
        words = block if packing == 1 else block.bitcast(jnp.int32)
        words = words.reshape(shape.block * words_per_token, LANES)
        word, part = divmod(row, packing)
        stride = words_per_token if words_per_token > 1 else None
        return unpack(words[pl.ds(word, shape.block, stride=stride), :], part, shape.dtype)

    def load_scales(self, slot: Any, head: int, which: int) -> jax.Array | None:
        """Returns the scales ``[1, block]`` of one head's keys or values in a block; None without such."""
        if not self.scale_buffers:
            return None
        pages = [self.scale_buffers[which][slot, page, pl.ds(head, 1), :] for page in range(self.shape.pages_per_block)]
        return jnp.concatenate(pages, axis=1)


def unpack(words: jax.Array, part: int, dtype: str) -> jax.Array:
    """Returns part ``part`` (0 the lowest bits) of 32-bit words as float32; float32 words as they are."""
    if dtype == "float32":
        return words
    if dtype == "bfloat16":
        bits = words << 16 if part == 0 else words & jnp.int32(-65536)
        return lax.bitcast_convert_type(bits, jnp.float32)
    byte = (words << (24 - 8 * part)) >> 24  # an arithmetic shift: sign extended
    if dtype == "int8":
        return byte.astype(jnp.float32)
    # float8_e4m3fn: sign, four bits of exponent with bias 7, three of mantissa; 0x7F is NaN, exponent 0 is m / 8 * 2**-6.
    exponent_and_mantissa = byte & 0x7F
    normal = lax.bitcast_convert_type((exponent_and_mantissa << 20) + ((127 - 7) << 23), jnp.float32)
    tiny = exponent_and_mantissa.astype(jnp.float32) * (2.0**-9)
    size = jnp.where(exponent_and_mantissa < 8, tiny, jnp.where(exponent_and_mantissa == 0x7F, math.nan, normal))
    return jnp.where(byte < 0, -size, size)


def write_new_tokens(kv: Any, pool: Any, page_ids: Any, offsets: Any, runs: Any, written: Any, num_pages: int) -> None:
    """Copies new tokens to their cells, HBM to HBM, and waits for all.

    Args:
        kv: ``[T, 2K, D]`` in HBM.
        pool: ``[N, B, 2K, D]`` in HBM.
        page_ids: In SMEM, padded to a multiple of ``WRITE_RUN`` with N, which is not written.
        offsets: In SMEM, likewise.
        runs: In SMEM: for each ``WRITE_RUN`` tokens whether they follow each other in one page, so that one copy does.
        written: A semaphore.
        num_pages: N.
    """
    groups = runs.shape[0]

    def copy(token: Any, count: int) -> Any:
        page = jnp.clip(page_ids[token], 0, num_pages - 1)
        return pltpu.make_async_copy(kv.at[pl.ds(token, count)], pool.at[page, pl.ds(offsets[token], count)], written)

    def for_copies(group: Any, visit: Any) -> None:
        first = group * WRITE_RUN

        if kv.shape[0] >= WRITE_RUN:

            @pl.when(runs[group] > 0)
            def _() -> None:
                visit(copy(first, WRITE_RUN))

        @pl.when(runs[group] == 0)
        def _() -> None:
            def one(index: Any, carry: Any) -> Any:
                @pl.when(page_ids[first + index] < num_pages)
                def _() -> None:
                    visit(copy(first + index, 1))

                return carry

            lax.fori_loop(0, WRITE_RUN, one, 0)

    def step(group: Any, carry: Any) -> Any:
        @pl.when(group < groups)
        def _() -> None:
            for_copies(group, lambda copy: copy.start())

        @pl.when(group >= _WRITES_IN_FLIGHT)
        def _() -> None:
            for_copies(group - _WRITES_IN_FLIGHT, lambda copy: copy.wait())

        return carry

    lax.fori_loop(0, groups + _WRITES_IN_FLIGHT, step, 0)
