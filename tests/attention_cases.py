"""Pools, tables and queries for the kernel tests, with NaN wherever nothing may be read."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import ragged_paged_attention


@dataclasses.dataclass
class Case:
    """Arguments of one call; ``kv_pages`` holds NaN outside of what the rows own."""

    q: np.ndarray
    kv_pages: np.ndarray
    kv_lens: np.ndarray
    block_tables: np.ndarray
    cu_q_lens: np.ndarray
    distribution: np.ndarray

    @property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def num_used(self) -> int:
        return int(self.cu_q_lens[-1])


def make_case(
    q_lens: list[int],
    kv_lens: list[int],
    *,
    num_q_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    page_size: int = 16,
    num_tokens: int | None = None,
    num_rows: int | None = None,
    table_width: int | None = None,
    spare_pages: int = 5,
    dtype: str = "float32",
    seed: int = 0,
) -> Case:
    """Rows in the order given (single-token rows first); numbers are rounded to ``dtype``, so that the reference sees the same."""
    rng = np.random.default_rng(seed)
    rows = num_rows or len(q_lens)
    tokens = num_tokens or max(1, sum(q_lens))
    pages_of = [-(-length // page_size) for length in kv_lens]
    width = table_width or max(1, *pages_of)
    num_pages = 1 + sum(pages_of) + spare_pages
    ids = 1 + rng.permutation(num_pages - 1)
    pages = np.full((num_pages, page_size, 2 * num_kv_heads, head_dim), np.nan, np.float32)
    tables = np.zeros((rows, width), np.int32)
    taken = 0
    for row, (length, count) in enumerate(zip(kv_lens, pages_of, strict=True)):
        tables[row, :count] = ids[taken : taken + count]
        taken += count
        for position in range(length):
            pages[tables[row, position // page_size], position % page_size] = rng.normal(size=pages.shape[2:])
    q = rng.normal(size=(tokens, num_q_heads, head_dim)).astype(np.float32)
    q[sum(q_lens) :] = np.nan
    singles = next((i for i, n in enumerate(q_lens) if n != 1), len(q_lens))
    lens = np.zeros(rows, np.int32)
    lens[: len(kv_lens)] = kv_lens
    cu = np.full(rows + 1, sum(q_lens), np.int32)
    cu[: len(q_lens) + 1] = np.concatenate([[0], np.cumsum(q_lens)])
    rounded = [np.asarray(jnp.asarray(x, dtype)) for x in (q, pages)]
    return Case(rounded[0], rounded[1], lens, tables, cu, np.array([singles, singles, len(q_lens)], np.int32))


@functools.cache
def _jitted(static: tuple[tuple[str, Any], ...], traced: tuple[str, ...]) -> Any:
    options = dict(static)

    def call(arguments: tuple[Any, ...], values: tuple[Any, ...]) -> Any:
        return ragged_paged_attention(*arguments, **options, **dict(zip(traced, values, strict=True)))

    return jax.jit(call)


def run_xla(case: Case, **options: Any) -> Any:
    """Calls the XLA implementation under jit; returns NumPy arrays."""
    traced = {name: jnp.asarray(options.pop(name)) for name in ("sinks", "k_scale", "v_scale") if options.get(name) is not None}
    call = _jitted(tuple(sorted(options.items())), tuple(traced))
    out = call(tuple(jnp.asarray(a) for a in case.arguments), tuple(traced.values()))
    return jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32)), out)


def run_reference(case: Case, **options: Any) -> Any:
    return ragged_paged_attention(*case.arguments, **options, implementation="reference")


def relative_rms(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
