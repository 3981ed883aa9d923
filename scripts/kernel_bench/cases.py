"""The shapes that are measured, the aims for them, their data, and the check of a result against the reference."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import reference

LEAST_BYTES_OF_ALL_LAYERS = 512 * 2**20
"""On an accelerator a program walks over as many layers' pages as this takes, several times its largest cache (60 MiB of an H200)."""

_LEAST_LAYERS = 8
"""So that what a step makes once for all layers counts about as little as in a model."""

_CHECKED_TOKENS = 8
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-3, "float16": 3e-3}
"""Relative root mean square against float64, on the same rounded numbers."""

PEER_TOLERANCE = TOLERANCE | {"bfloat16": 1e-2, "float16": 1e-2}
"""The same for others, which may round scores or sums to sixteen bits: wrong is what attends to something else."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        name: For people.
        rows: Sequences.
        q_len: New tokens of each; 1 is decoding, more is the prefill of a whole context.
        shortest, longest: Contexts, drawn between these.
        num_q_heads, num_kv_heads, head_dim: H, K, D.
        page_size: B.
        dtype: Of all arrays.
        aim: What the issue asks for on an H200, for people.
        layers: Layers that a program walks over; 0 for as many as ``LEAST_BYTES_OF_ALL_LAYERS`` takes, and eight at least.
    """

    name: str
    rows: int
    q_len: int
    shortest: int
    longest: int
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64
    dtype: str = "bfloat16"
    aim: str = ""
    layers: int = 0

    @property
    def decodes(self) -> bool:
        """Whether each row has one token."""
        return self.q_len == 1

    @property
    def sm_scale(self) -> float:
        """What scores are multiplied with."""
        return float(self.head_dim**-0.5)


CASES = (
    Case("decode 32 x 4k", 32, 1, 4096, 4096, aim=">= 80 % of copy"),
    Case("decode 1 x 16k", 1, 1, 16384, 16384, aim=">= 1200 GB/s"),
    Case("decode 8 x 512", 8, 1, 512, 512, aim="<= 15 us"),
    Case("prefill 8k", 1, 8192, 8192, 8192, aim=">= 55 % of matmul"),
)
SMALL_CASES = tuple(
    Case(*sizes, num_q_heads=9, num_kv_heads=3, head_dim=64, page_size=16, dtype="float32", layers=4, aim=aim)
    for *sizes, aim in (
        ("decode 1 x 100", 1, 1, 100, 100, ""),
        ("decode 64 x 100-300", 64, 1, 100, 300, ""),
        ("decode 64 x 1k", 64, 1, 1024, 1024, ">= 2 x plain"),
        ("prefill 256", 1, 256, 256, 256, ""),
    )
)


@dataclasses.dataclass(frozen=True)
class Data:
    """A case's arrays.

    Attributes:
        q: ``[T, H, D]``.
        pools: Pages of each layer.
        tables: ``kv_lens``, ``block_tables``, ``cu_q_lens``, ``distribution``.
        lens: Contexts, on the host.
    """

    case: Case
    q: jax.Array
    pools: list[jax.Array]
    tables: tuple[jax.Array, ...]
    lens: np.ndarray

    @property
    def bytes(self) -> int:
        """Bytes that a layer has to move: keys and values once, queries and results once."""
        case, item = self.case, self.q.dtype.itemsize
        return int(self.lens.sum()) * 2 * case.num_kv_heads * case.head_dim * item + 2 * self.q.nbytes

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products, of what causality leaves."""
        first = self.lens - self.case.q_len + 1
        pairs = ((first + self.lens) * self.case.q_len // 2).sum()
        return int(4 * pairs * self.case.num_q_heads * self.case.head_dim)

    def contiguous(self, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns a layer's keys and values without pages, ``[S, C, K, D]`` each."""
        kv = pool[self.tables[1]].reshape(self.case.rows, -1, *pool.shape[2:])
        return kv[:, :, ::2], kv[:, :, 1::2]

    def error(self, out: Any) -> float:
        """Returns a result's relative root mean square error, by the reference on some of its tokens.

        A token of a prefill at position p is a decode with a context of p + 1, so the reference sees single-token rows.
        """
        tokens, want = self._checked
        got = np.asarray(jnp.asarray(out)[tokens].astype(jnp.float32), np.float64)
        return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(np.square(want))))

    @functools.cached_property
    def _checked(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that are checked and their results by the reference, which sees only the pages of their rows."""
        case, rng = self.case, np.random.default_rng(1)
        tokens = np.unique(np.append(rng.integers(0, self.q.shape[0], _CHECKED_TOKENS), self.q.shape[0] - 1))
        rows, count = tokens // case.q_len, len(tokens)
        ids, tables = np.unique(np.asarray(self.tables[1])[rows], return_inverse=True)
        want = reference.ragged_paged_attention(
            np.asarray(self.q[tokens].astype(jnp.float32)),
            np.asarray(self.pools[0][ids].astype(jnp.float32)),
            (self.lens[rows] - case.q_len + tokens % case.q_len + 1).astype(np.int32),
            tables.reshape(count, -1).astype(np.int32),
            np.arange(count + 1, dtype=np.int32),
            np.full(3, count, np.int32),
            sm_scale=case.sm_scale,
        )
        return tokens, want


def make(case: Case) -> Data:
    """Returns a case's arrays: pages in a random order, as after some time of serving."""
    rng = np.random.default_rng(0)
    lens = rng.integers(case.shortest, case.longest + 1, case.rows)
    pages_of = -(-lens // case.page_size)
    ids = 1 + rng.permutation(int(pages_of.sum()))
    tables = np.zeros((case.rows, int(pages_of.max())), np.int32)
    for row, (count, end) in enumerate(zip(pages_of, pages_of.cumsum(), strict=True)):
        tables[row, :count] = ids[end - count : end]
    shape = (len(ids) + 1, case.page_size, 2 * case.num_kv_heads, case.head_dim)
    pool_bytes = int(np.prod(shape)) * jnp.dtype(case.dtype).itemsize
    layers = case.layers or max(_LEAST_LAYERS, -(-LEAST_BYTES_OF_ALL_LAYERS // pool_bytes))
    keys = jax.random.split(jax.random.key(0), layers + 1)
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    singles = case.rows if case.decodes else 0
    return Data(
        case=case,
        q=draw(keys[0], (case.rows * case.q_len, case.num_q_heads, case.head_dim), case.dtype),
        pools=[draw(key, shape, case.dtype) for key in keys[1:]],
        tables=(
            jnp.asarray(lens, jnp.int32),
            jnp.asarray(tables),
            jnp.arange(case.rows + 1, dtype=jnp.int32) * case.q_len,
            jnp.array([singles, singles, case.rows], jnp.int32),
        ),
        lens=lens,
    )
