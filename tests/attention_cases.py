"""Pools, tables and queries for the kernel tests, with NaN wherever nothing may be read; and ways to run each implementation.

On a CPU the kernels of other platforms run in the interpreters of their languages. Where jax's default device is a GPU or a TPU, its own
kernels are compiled and run on it, and those of other platforms are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import ragged_paged_attention
from pallas_kernels.paged_attention.dispatch import implementations_on, sibling

TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-3, "float16": 3e-3}
"""Relative root mean square error allowed on inputs that are rounded to the dtype."""

LSE_TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-3, "float16": 2e-3}
"""Absolute error allowed of log-sums."""


@dataclasses.dataclass
class Case:
    """Arguments of one call; ``kv_pages`` (or the scales of int8 pages) hold NaN outside of what the rows own."""

    q: np.ndarray
    kv_pages: np.ndarray
    kv_lens: np.ndarray
    block_tables: np.ndarray
    cu_q_lens: np.ndarray
    distribution: np.ndarray
    k_scale: np.ndarray | None = None
    v_scale: np.ndarray | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.q, self.kv_pages, self.kv_lens, self.block_tables, self.cu_q_lens, self.distribution)

    @property
    def scales(self) -> dict[str, Any]:
        return {} if self.k_scale is None else {"k_scale": self.k_scale, "v_scale": self.v_scale}

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
    kv_dtype: str | None = None,
    seed: int = 0,
) -> Case:
    """Rows in the order given (single-token rows first); numbers are rounded to the dtypes, so that the reference sees the same."""
    rng = np.random.default_rng(seed)
    rows = num_rows or len(q_lens)
    tokens = num_tokens or max(1, sum(q_lens))
    pages_of = [-(-length // page_size) for length in kv_lens]
    width = table_width or max(1, *pages_of)
    num_pages = 1 + sum(pages_of) + spare_pages
    ids = 1 + rng.permutation(num_pages - 1)
    owned = np.zeros((num_pages, page_size), bool)
    tables = np.zeros((rows, width), np.int32)
    taken = 0
    for row, (length, count) in enumerate(zip(kv_lens, pages_of, strict=True)):
        tables[row, :count] = ids[taken : taken + count]
        taken += count
        positions = np.arange(length)
        owned[tables[row, positions // page_size], positions % page_size] = True
    q = rng.normal(size=(tokens, num_q_heads, head_dim)).astype(np.float32)
    q[sum(q_lens) :] = np.nan
    pages, k_scale, v_scale = _fill_pages(rng, owned, num_kv_heads, head_dim, kv_dtype or dtype)
    singles = next((i for i, n in enumerate(q_lens) if n != 1), len(q_lens))
    lens = np.zeros(rows, np.int32)
    lens[: len(kv_lens)] = kv_lens
    cu = np.full(rows + 1, sum(q_lens), np.int32)
    cu[: len(q_lens) + 1] = np.concatenate([[0], np.cumsum(q_lens)])
    distribution = np.array([singles, singles, len(q_lens)], np.int32)
    return Case(np.asarray(jnp.asarray(q, dtype)), pages, lens, tables, cu, distribution, k_scale, v_scale)


def _fill_pages(
    rng: np.random.Generator, owned: np.ndarray, num_kv_heads: int, head_dim: int, dtype: str
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Returns pages and scales: normal numbers where a row owns the token, NaN elsewhere (int8 has none, so its scales do)."""
    num_pages, page_size = owned.shape
    shape = (num_pages, page_size, 2 * num_kv_heads, head_dim)
    if dtype == "int8":
        pages = rng.integers(-127, 128, size=shape, dtype=np.int8)
        scales = rng.uniform(0.005, 0.03, size=(2, num_pages, num_kv_heads, page_size)).astype(np.float32)
        k_scale, v_scale = np.where(owned[:, None, :], scales, np.nan).astype(np.float32)
        return pages, k_scale, v_scale
    pages = np.where(owned[:, :, None, None], rng.normal(size=shape).astype(np.float32), np.nan)
    pages = np.asarray(jnp.asarray(pages, jnp.float32).astype(dtype))
    if dtype == "float8_e4m3fn":
        return pages, np.float32(0.7), np.float32(1.3)
    return pages, None, None


# ----------------------------------------------------------------------------------------------------- the implementations


@dataclasses.dataclass(frozen=True)
class Subject:
    """An implementation under test.

    Attributes:
        name: As in ``IMPLEMENTATIONS``.
        head_dim, dtype, page_size: Defaults of its cases, which it serves itself.
    """

    name: str
    head_dim: int = 64
    dtype: str = "float32"
    page_size: int = 16

    @property
    def interpreted(self) -> bool:
        """Whether the default device is not one that it runs on."""
        return self.name not in implementations_on(jax.devices()[0])

    def make_case(self, q_lens: list[int], kv_lens: list[int], **options: Any) -> Case:
        defaults = {"head_dim": self.head_dim, "dtype": self.dtype, "page_size": self.page_size}
        return make_case(q_lens, kv_lens, **{**defaults, **options})

    def missing(self) -> str | None:
        """Returns why it cannot run here."""
        platform = jax.devices()[0].platform
        if self.interpreted and platform != "cpu":
            return f"not one of the implementations for this {platform}"
        if self.interpreted and self.name == "mosaic_gpu" and jax.__version_info__ < (0, 11, 2):
            return "jax has an interpreter for Mosaic GPU from 0.11.2 on"
        return None

    def no_interpreter(self) -> str | None:
        """Returns why it cannot run in the interpreter of its language here."""
        return self.missing() if self.interpreted else "it runs on this device itself"

    def unsupported(self, case: Case, **options: Any) -> str | None:
        """Returns why it hands this case on to another implementation."""
        if self.name in ("xla", "reference"):
            return None
        names = ("sliding_window", "soft_cap", "sinks", "k_scale", "v_scale")
        values = {**dict.fromkeys(names), **case.scales, **options}
        return sibling(self.name).unsupported(jnp.asarray(case.q), jnp.asarray(case.kv_pages), **{k: values[k] for k in names})

    def run(self, case: Case, **options: Any) -> Any:
        """Returns NumPy outputs in float32 (and log-sums, with ``return_lse``)."""
        options = {**case.scales, **options}
        traced = {k: jnp.asarray(v) for k, v in options.items() if k in ("sinks", "k_scale", "v_scale") and v is not None}
        static = tuple(sorted((k, v) for k, v in options.items() if k not in traced and v is not None))
        with _interpreter(self.name):
            out = _jitted(self.name, static)(tuple(jnp.asarray(a) for a in case.arguments), traced)
            return jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32)), out)


SUBJECTS = {
    "xla": Subject("xla", head_dim=32),
    "triton": Subject("triton"),
    "tpu": Subject("tpu", head_dim=128),
    "mosaic_gpu": Subject("mosaic_gpu", dtype="bfloat16"),
}


@functools.cache
def _jitted(name: str, static: tuple[tuple[str, Any], ...]) -> Any:
    module = importlib.import_module(f"pallas_kernels.paged_attention.{name}")
    for_interpreters = {"triton": {"interpret": True}, "mosaic_gpu": {"tiling": getattr(module, "INTERPRETABLE", None)}}
    options = {**dict(static), **(for_interpreters.get(name, {}) if SUBJECTS[name].interpreted else {})}
    function = module.ragged_paged_attention

    def call(arguments: tuple[Any, ...], traced: Mapping[str, Any]) -> Any:
        return function(*arguments, **options, **traced)

    return jax.jit(call)


@contextlib.contextmanager
def _interpreter(name: str) -> Iterator[None]:
    """Runs Pallas kernels of one language on the CPU: DMA, semaphores and barriers are simulated, races looked for."""
    if not SUBJECTS[name].interpreted:
        yield
    elif name == "tpu":
        from jax.experimental.pallas import tpu as pltpu

        with pltpu.force_tpu_interpret_mode(
            pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
        ):
            yield
    elif name == "mosaic_gpu":
        from jax.experimental.pallas import mosaic_gpu as plgpu
        from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

        hopper = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", platform="gpu", num_cores=8))
        with use_abstract_mesh(hopper), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
    else:
        yield


def run_xla(case: Case, **options: Any) -> Any:
    """Calls the XLA implementation under jit; returns NumPy arrays."""
    return SUBJECTS["xla"].run(case, **options)


def run_reference(case: Case, **options: Any) -> Any:
    return ragged_paged_attention(*case.arguments, **{**case.scales, **options}, implementation="reference")


def relative_rms(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


# ---------------------------------------------------------------------------------------------------------- covering shapes


def pairwise(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Returns few combinations in which each pair of values of two columns occurs; the first ones hold the most pairs.

    A greedy cover, without randomness: the next combination starts from a pair that is missing and fills each other column with
    the value that covers the most missing pairs.
    """
    names = list(columns)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(columns[a])), range(len(columns[b])))
    }

    def gain(chosen: Mapping[str, int], name: str, index: int) -> int:
        pairs = (tuple(sorted([(name, index), other], key=lambda x: names.index(x[0]))) for other in chosen.items())
        return sum(pair in missing for pair in pairs)

    rows = []
    while missing:
        chosen = dict(min(missing, key=lambda pair: [(names.index(n), i) for n, i in pair]))
        for name in names:
            if name not in chosen:
                chosen[name] = max(range(len(columns[name])), key=lambda i: (gain(chosen, name, i), -i))
        picked = [(name, chosen[name]) for name in names]
        missing -= set(itertools.combinations(picked, 2))
        rows.append({name: columns[name][chosen[name]] for name in names})
    return rows


def each_value(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the fewest of some combinations, greedily, in which each value of each column occurs."""
    missing = {(name, repr(value)) for row in rows for name, value in row.items()}
    picked = []
    while missing:
        best = max(rows, key=lambda row: sum((name, repr(value)) in missing for name, value in row.items()))
        missing -= {(name, repr(value)) for name, value in best.items()}
        picked.append(best)
    return picked
