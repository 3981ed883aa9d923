"""The Triton kernels: in Pallas' interpreter against the reference, with seeded faults, and lowered for CUDA. No GPU is needed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
import types
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from attention_cases import LSE_TOLERANCE, TOLERANCE, make_case, relative_rms, run_reference
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.paged_attention import triton

SCALE = 0.17
SMALL = triton.Tiling(single_tile=32, single_warps=4, single_stages=2, single_programs=6, rows=16, tile=16, warps=4, stages=2)
"""Many programs with little to do: several turns, several blocks a row."""


@functools.cache
def jitted(module, tiling, static):
    function = functools.partial(
        module.ragged_paged_attention, sm_scale=SCALE, return_lse=True, interpret=True, tiling=tiling, **dict(static)
    )
    # what is looked at is the kernels' arithmetic, not how fast XLA makes the interpreter
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def run(case, *, module=triton, tiling=SMALL, sinks=None, work=None, **static):
    """Returns float32 outputs and log-sums."""
    traced = {name: jnp.asarray(value) for name, value in {**case.scales, "sinks": sinks}.items() if value is not None}
    call = jitted(module, tiling, tuple(static.items()))
    out, lse = call(*map(jnp.asarray, case.arguments), **traced, work=work)
    return np.asarray(out.astype(jnp.float32)), np.asarray(lse)


def check(case, dtype="float32", sinks=None, **options):
    out, lse = run(case, sinks=sinks, **options)
    options.pop("tiling", None)
    want, want_lse = run_reference(case, sm_scale=SCALE, sinks=sinks, return_lse=True, **options)
    used = case.num_used
    assert np.isfinite(out).all()
    assert relative_rms(out[:used], want[:used]) <= TOLERANCE[dtype]
    keyless = np.repeat(case.kv_lens == 0, np.diff(case.cu_q_lens))
    np.testing.assert_allclose(lse[:used][~keyless], want_lse[:used][~keyless], rtol=0, atol=LSE_TOLERANCE[dtype])
    assert (lse[:used][keyless] == -np.inf).all()  # the reference counts the sink of a token without a key
    assert not out[used:].any()
    assert (lse[used:] == -np.inf).all()


def some_sinks(case):
    return np.linspace(-1, 2, case.q.shape[1], dtype=np.float32)


Q_LENS = [1, 1, 1, 1, 1, 1, 1, 7, 1, 40, 2]
KV_LENS = [1, 255, 256, 257, 33, 600, 0, 7, 90, 171, 34]


# a page is smaller than a tile, or a whole number of tiles
@pytest.mark.parametrize(("page_size", "group"), [(8, 5), (64, 1)])
def test_many_splits_and_blocks(page_size, group):
    case = make_case(Q_LENS, KV_LENS, num_q_heads=2 * group, head_dim=24, page_size=page_size, num_tokens=64, num_rows=14, dtype="bfloat16")
    check(case, "bfloat16", sinks=some_sinks(case), soft_cap=5.0, sliding_window=None if group == 1 else 200)


def test_a_group_of_more_heads_than_a_program_takes():
    case = make_case([1, 1, 5], [30, 300, 20], num_q_heads=2 * 67, num_kv_heads=2, head_dim=16, num_tokens=8)
    check(case, sinks=some_sinks(case))


def test_more_splits_than_the_last_kernel_takes_at_once_and_positions_beyond_32768():
    case = make_case([1, 1, 2], [33_001, 32_769, 32_770], num_q_heads=2, num_kv_heads=1, head_dim=16, page_size=64)
    tiling = dataclasses.replace(SMALL, single_tile=256, tile=256)
    assert triton.split_tokens(64, case.block_tables.shape[1]) == 1024
    check(case, tiling=tiling)


def common_case(q_lens, kv_lens):
    """Cases of the same shapes, so that one compiled program serves several tests."""
    pages = sum(-(-length // 16) for length in kv_lens)
    sizes = {"num_q_heads": 4, "head_dim": 16, "num_tokens": 128, "num_rows": 14, "table_width": 44}
    return make_case(q_lens, kv_lens, **sizes, spare_pages=150 - pages)


def one_row(case, q, length, table, *, is_single=False):
    """The case of a single row, in the shapes of ``case``."""
    queries, tables, kv_lens = np.full_like(case.q, np.nan), np.zeros_like(case.block_tables), np.zeros_like(case.kv_lens)
    queries[: len(q)], tables[0], kv_lens[0] = q, table, length
    cu_q_lens = np.array([0] + [len(q)] * len(kv_lens), np.int32)
    distribution = np.array([is_single, is_single, 1], np.int32)
    return dataclasses.replace(case, q=queries, block_tables=tables, kv_lens=kv_lens, cu_q_lens=cu_q_lens, distribution=distribution)


WINDOW = 37  # in the middle of pages and tiles


def test_bits_do_not_depend_on_rows_beside_nor_on_the_work_list():
    case = common_case(Q_LENS, KV_LENS)
    out, lse = run(case, sliding_window=WINDOW)
    sizes = {"num_tokens": 128, "page_size": 16, "table_width": 44}
    work = triton.make_work_list(*map(jnp.asarray, (case.kv_lens, case.cu_q_lens, case.distribution)), **sizes)
    assert np.array_equal(out, run(case, sliding_window=WINDOW, work=work)[0])
    for row, length in enumerate(KV_LENS):
        start, end = case.cu_q_lens[row], case.cu_q_lens[row + 1]
        alone = one_row(case, case.q[start:end], length, case.block_tables[row], is_single=row < case.distribution[0])
        got, got_lse = run(alone, sliding_window=WINDOW)
        assert np.array_equal(got[: end - start], out[start:end])
        assert np.array_equal(got_lse[: end - start], lse[start:end])


def test_bits_do_not_depend_on_chunks():
    whole = common_case([100], [100])
    want = run(whole, sliding_window=WINDOW)[0]
    for start, end in ((0, 3), (3, 70), (70, 100)):
        part = one_row(whole, whole.q[start:end], end, whole.block_tables[0])
        assert np.array_equal(run(part, sliding_window=WINDOW)[0][: end - start], want[start:end])


def test_pages_before_the_window_may_be_gone():
    case = common_case([1, 1, 20], [300, 700, 100])
    tables = case.block_tables.copy()
    spare = np.setdiff1d(np.arange(len(case.kv_pages)), case.block_tables)[0]
    assert np.isnan(case.kv_pages[spare]).all()
    for row, first_seen in enumerate((300 - WINDOW, 700 - WINDOW, 80 - WINDOW + 1)):
        tables[row, : first_seen // 16] = spare
    check(dataclasses.replace(case, block_tables=tables), sliding_window=WINDOW)


def items_of(case, block):
    """The work list's meaning, in Python: rows of splits, rows of blocks."""
    singles, _, rows = case.distribution
    split = triton.split_tokens(case.kv_pages.shape[1], case.block_tables.shape[1])
    splits = [row for row in range(singles) for _ in range(0, case.kv_lens[row], split)]
    blocks = [row for row in range(singles, rows) for _ in range(case.cu_q_lens[row], case.cu_q_lens[row + 1], block)]
    return splits, blocks + [len(case.kv_lens)] * len(range(case.num_used, len(case.q), block))


@pytest.mark.parametrize(
    ("q_lens", "num_tokens", "num_rows"),
    [([1] * 4, 4, 4), ([1, 1, 2, 2, 2], 8, 5), ([16], 16, 1), ([3] * 5, 16, 9), ([], 8, 2), ([1, 1, 37, 1, 3], 64, 5)],
)
def test_the_work_list_holds_each_split_and_each_block_once(q_lens, num_tokens, num_rows):
    kv_lens = [[256, 1, 257, 900, 512][i % 5] + n - 1 for i, n in enumerate(q_lens)]
    case = make_case(q_lens, kv_lens, num_tokens=num_tokens, num_rows=num_rows, table_width=64, head_dim=16)
    sizes = {"num_tokens": num_tokens, "page_size": 16, "table_width": 64}
    work = triton.make_work_list(*map(jnp.asarray, (case.kv_lens, case.cu_q_lens, case.distribution)), **sizes)
    for index, block in enumerate(triton.QUERY_BLOCKS):
        wanted = items_of(case, block)
        lists = ((work.split_rows, work.first_split), (work.block_rows[index], work.first_block[index]))
        for want, (rows, first) in zip(wanted, lists, strict=True):
            assert first[-1] == len(want) <= len(rows)
            assert rows[: len(want)].tolist() == want
            assert first.tolist() == np.searchsorted(want, np.arange(len(first))).tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_each_float8_number_is_widened_exactly(dtype):
    stored = np.arange(256, dtype=np.uint8).view(np.int8)
    widened = triton._widen(jnp.asarray(stored)[:, None], types.SimpleNamespace(is_fp8=True), dtype)[:, 0]
    want = stored.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert widened.dtype == dtype
    assert np.array_equal(np.asarray(widened.astype(jnp.float32)) * triton._FP8_FACTOR, want, equal_nan=True)


def test_scales_far_from_one_do_not_leave_the_range_of_float16():
    case = make_case([1, 4], [90, 40], head_dim=16, num_tokens=8, dtype="float16", kv_dtype="int8")
    small = dataclasses.replace(case, v_scale=case.v_scale * np.float32(1e-2), k_scale=case.k_scale * np.float32(3))
    check(small, "float16")


@functools.cache
def shapes(head_dim, dtype, kv_dtype, num_pages=64):
    spec = jax.ShapeDtypeStruct
    pages = spec((num_pages, 64, 4, head_dim), kv_dtype)
    tables = [spec(shape, jnp.int32) for shape in ((4,), (4, 8), (5,), (3,))]
    return [spec((16, 6, head_dim), dtype), pages, *tables]


def test_says_what_it_lacks(monkeypatch):
    assert "head dimension 512" in triton.unsupported(*shapes(512, jnp.bfloat16, jnp.bfloat16)[:2])
    assert "head dimension 8 " in triton.unsupported(*shapes(8, jnp.bfloat16, jnp.bfloat16)[:2])
    for head_dim, gib, refused in ((128, 2, False), (128, 3, True), (128, 4, True), (128, 5, False)):
        reason = triton.unsupported(*shapes(head_dim, jnp.bfloat16, jnp.int8, gib * 2**30 // (64 * 4 * head_dim))[:2])
        assert (reason is not None) == refused
    for head_dim in (64, 80, 96, 128, 256):
        for kv_dtype in ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8"):
            assert triton.unsupported(*shapes(head_dim, jnp.bfloat16, jnp.dtype(kv_dtype))[:2]) is None
    monkeypatch.setattr(triton, "pltriton", None)
    assert "has no Pallas-Triton" in triton.unsupported(*shapes(128, jnp.bfloat16, jnp.bfloat16)[:2])


def lower(device_kind, head_dim, dtype, kv_dtype, tiling=None):
    """Lowers for CUDA as on a device; jax before 0.11 takes a Hopper GPU."""
    arguments = shapes(head_dim, dtype, kv_dtype)
    scale = jax.ShapeDtypeStruct((64, 2, 64) if kv_dtype == jnp.int8 else (), jnp.float32)
    traced = {"sinks": jax.ShapeDtypeStruct((6,), jnp.float32), "k_scale": scale, "v_scale": scale}
    call = functools.partial(
        triton.ragged_paged_attention, sm_scale=SCALE, soft_cap=30.0, sliding_window=100, return_lse=True, tiling=tiling
    )
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(device_kind, platform="gpu", num_cores=8))
    with use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return jax.jit(call).trace(*arguments, **traced).lower(lowering_platforms=("cuda",)).as_text()


DTYPES = {32: ("float32", "float32"), 16: ("bfloat16", "bfloat16"), 8: ("bfloat16", "int8")}


@pytest.mark.parametrize(("head_dim", "bits"), triton.TILINGS)
def test_each_tiling_lowers_for_cuda(head_dim, bits):
    dtypes = tuple(map(jnp.dtype, DTYPES[bits]))
    assert triton.choose_tiling(head_dim, *dtypes) is triton.TILINGS[head_dim, bits]
    assert lower("NVIDIA H200", head_dim, *dtypes).count("xla.gpu.triton") == 3


@pytest.mark.parametrize("device_kind", ["NVIDIA A100", "NVIDIA L4"])
def test_float8_lowers_for_gpus_that_cannot_convert_it(device_kind):
    assert lower(device_kind, 80, jnp.dtype("float16"), jnp.dtype("float8_e4m3fn")).count("xla.gpu.triton") == 3


def test_the_pool_is_not_copied():
    text = lower("NVIDIA L4", 128, jnp.dtype("bfloat16"), jnp.dtype("bfloat16"))
    pool = f"tensor<{64 * 64 * 4}x128xbf16>"
    makers = {line.split(" = ")[1].split()[0] for line in text.splitlines() if " = " in line and line.rstrip().endswith(f"-> {pool}")}
    assert makers == {"stablehlo.reshape"}


@pytest.mark.aot
@pytest.mark.parametrize("gpu", ["A100", "L4"])
def test_compiles_for_gpus_before_hopper_without_spills(gpu):
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        pytest.skip("jax's CUDA wheels are not installed")
    command = [sys.executable, str(Path(__file__).with_name("compile_triton.py")), gpu]
    said = subprocess.run(command, check=True, timeout=540, capture_output=True, text=True).stdout
    kernels = [json.loads(line) for line in said.splitlines()]
    assert len(kernels) == 3 * len({kernel["shape"] for kernel in kernels}) >= 24
    assert not [kernel for kernel in kernels if kernel["spilled"]]
    assert max(kernel["temp"] for kernel in kernels) <= 40 * 2**20  # partial results of 64 rows of 8k tokens, 32 heads


def test_importing_it_warns_of_nothing():
    command = [sys.executable, "-W", "error", "-c", "import pallas_kernels.paged_attention.triton"]
    subprocess.run(command, check=True, timeout=120)


SOURCE = Path(triton.__file__).read_text()
# name: (case that notices it, text, its replacement)
MUTANTS = {
    "last token dropped": ("plain", "seen = where[None, :] <= self.positions", "seen = where[None, :] < self.positions"),
    "window too wide": ("window", "where[None, :] > self.positions - shape", "where[None, :] >= self.positions - shape"),
    "keys as values": ("plain", "self._load(tokens + 1, in_use)", "self._load(tokens, in_use)"),
    "page tail not cleared": ("plain", "mask = jnp.broadcast_to(in_use[:, None],", "mask = jnp.broadcast_to(in_use[:, None] | True,"),
    "splits not rescaled": ("plain", "jnp.sum(accs * weights[:, None], axis=0)", "jnp.sum(accs, axis=0)"),
    "last split missed": ("plain", "valid = splits < count", "valid = splits < count - 1"),
    "split before the window summed up": ("window", "splits = first + turn", "splits = turn"),
    "sink missed in the sum of splits": ("window", "None if sinks is None else sinks[head]", "None"),
    "offset within the page lost": ("plain", "lax.rem(where, jnp.int32(page_size))", "where * 0"),
    "the next row's tokens overwritten": (
        "plain",
        "valid = (tokens < end_token) & (head",
        "valid = (tokens < start_token + query_block) & (head",
    ),
}
OPTIONS = {"plain": {}, "window": {"sliding_window": 290}}


@functools.cache
def mutant_case(name):
    # the block of the last row but one ends where the last row starts
    case = make_case([1, 1, 1, 5, 9], [64, 300, 600, 50, 300], head_dim=16, num_tokens=32, num_rows=6)
    return case, some_sinks(case) if name == "window" else None


def error(name, module=triton):
    """Relative error of a case; infinite where the output is not finite or padding is not zero."""
    case, sinks = mutant_case(name)
    out, _ = run(case, module=module, sinks=sinks, **OPTIONS[name])
    sound = np.isfinite(out).all() and not out[case.num_used :].any()
    return (
        relative_rms(out[: case.num_used], run_reference(case, sm_scale=SCALE, sinks=sinks, **OPTIONS[name])[: case.num_used])
        if sound
        else np.inf
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_the_unchanged_source_passes(name):
    assert error(name) < TOLERANCE["float32"]


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(name):
    case, old, new = MUTANTS[name]
    assert SOURCE.count(old) == 1
    module = types.ModuleType(triton.__name__)
    exec(compile(SOURCE.replace(old, new), "mutant", "exec"), module.__dict__)
    assert error(case, module) > 1e-3
