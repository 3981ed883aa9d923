"""The Hopper prefill kernel: under jax's Mosaic-GPU interpreter against float64, and lowered for CUDA on a machine without it.

The interpreter has no clock for wgmma: that a buffer is not refilled while a product still reads it is not proven here.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import LSE_TOLERANCE, SUBJECTS, TOLERANCE, _interpreter, make_case, relative_rms, run_reference

from pallas_kernels.paged_attention.mosaic_gpu import prefill

NO_INTERPRETER = SUBJECTS["mosaic_gpu"].no_interpreter()
interpreted = pytest.mark.skipif(NO_INTERPRETER is not None, reason=NO_INTERPRETER or "")
SOURCE = Path(prefill.__file__).read_text()
SINKS = np.linspace(-1, 3, 2, dtype=np.float32)


def call(module, case, *, sinks=None, k_scale=None, v_scale=None, num_ctas=None, **options):
    """Attends the rows that the case's distribution gives to a prefill, with outputs and log-sums of the others as they come."""
    tiling = module.default_tiling(case.q.shape[2], case.kv_pages.dtype.itemsize)
    tiling = dataclasses.replace(tiling, p_smem=True, loops=tiling.loops or num_ctas is not None, num_ctas=num_ctas or 2)

    def attend(q, kv_pages, kv_lens, tables, cu_q_lens, distribution, values):
        rows = (distribution[0], distribution[2])
        items = module.prefill_items(cu_q_lens, *rows, num_tokens=q.shape[0], tiling=tiling)
        return module.prefill_attention(q, kv_pages, kv_lens, tables, cu_q_lens, *rows, items, tiling=tiling, **options, **values)

    values = {"sinks": None if sinks is None else sinks * prefill.LOG2E, "k_scale": k_scale, "v_scale": v_scale}
    values = {name: jnp.asarray(value, jnp.float32) for name, value in values.items() if value is not None}
    return jax.jit(attend)(*map(jnp.asarray, case.arguments), values)


def interpret(module, case, **options):
    """Returns outputs and log-sums as NumPy arrays; fails where the interpreter sees a race."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    interpret_pallas_call.reset_gpu_interpret_mode_state()
    with _interpreter("mosaic_gpu"):
        out, lse = call(module, case, **options)
        out, lse = np.asarray(out.astype(jnp.float32)), np.asarray(lse)
    assert not interpret_pallas_call.get_races().races_found
    return out, lse


def case_of(q_lens, kv_lens, **sizes):
    defaults = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 64, "dtype": "bfloat16", "num_tokens": 64}
    return make_case(q_lens, kv_lens, **(defaults | sizes))


def own(case):
    """Returns the tokens of the rows that a prefill attends."""
    return slice(int(case.cu_q_lens[case.distribution[0]]), case.num_used)


CASES = {
    "rows of any length, chunks, single tokens": ([1, 70, 1, 9], [40, 130, 33, 9], {"num_tokens": 96, "num_rows": 6}, {}),
    "window, sinks": ([1, 50, 3], [20, 210, 140], {}, {"sliding_window": 50, "sinks": SINKS}),
    "soft cap, fp16, page 64": ([60, 3], [250, 3], {"page_size": 64, "dtype": "float16"}, {"soft_cap": 3.0}),
    "odd group, page 40": ([1, 80, 3], [40, 130, 3], {"num_q_heads": 3, "page_size": 40, "num_tokens": 88}, {}),
    "head dimension 256": ([1, 20], [4, 90], {"head_dim": 256}, {}),
    "head dimension 256, several units a block": ([70], [70], {"head_dim": 256, "num_tokens": 70}, {"num_ctas": 1}),
    "head dimension 128, page 256": ([20, 28], [300, 28], {"head_dim": 128, "page_size": 256, "num_tokens": 50}, {}),
    "page 8, scales, two kv heads": (
        [20, 28],
        [90, 28],
        {"page_size": 8, "num_q_heads": 4, "num_kv_heads": 2},
        {"k_scale": 0.5, "v_scale": 2.0},
    ),
    "float8, more tiles than stages": ([3, 10], [700, 10], {"kv_dtype": "float8_e4m3fn", "page_size": 40}, {}),
    "int8, head dimension 128, window": (
        [70],
        [300],
        {"kv_dtype": "int8", "page_size": 32, "head_dim": 128, "num_tokens": 72},
        {"sliding_window": 270},
    ),
}


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name):
    q_lens, kv_lens, sizes, options = CASES[name]
    case = case_of(q_lens, kv_lens, **sizes)
    options = case.scales | options
    out, lse = interpret(prefill, case, sm_scale=0.125, **options)
    options.pop("num_ctas", None)
    want, want_lse = run_reference(case, sm_scale=0.125, return_lse=True, **options)
    tokens = own(case)
    assert not out[case.num_used :].any()
    dtype = str(case.q.dtype)
    assert relative_rms(out[tokens], want[tokens]) < TOLERANCE[dtype]
    np.testing.assert_allclose(lse[tokens], want_lse[tokens], atol=LSE_TOLERANCE[dtype])


@interpreted
def test_a_row_has_the_same_bits_alone_elsewhere_and_in_chunks():
    """The batch shifts the row's tokens by a number that is no multiple of 8, and its pages lie elsewhere."""
    whole = case_of([40], [100])
    batch = case_of([1, 13, 40], [9, 30, 100], spare_pages=9, seed=1)
    pages, q = batch.kv_pages.copy(), batch.q.copy()
    pages[batch.block_tables[2, :7]] = whole.kv_pages[whole.block_tables[0, :7]]
    q[14:54] = whole.q[:40]
    batch = dataclasses.replace(batch, kv_pages=pages, q=q)
    chunk = dataclasses.replace(whole, q=np.roll(whole.q, -27, axis=0), cu_q_lens=np.array([0, 13], np.int32))
    alone, _ = interpret(prefill, whole, sm_scale=0.125)
    among, _ = interpret(prefill, batch, sm_scale=0.125)
    last, _ = interpret(prefill, chunk, sm_scale=0.125)
    np.testing.assert_array_equal(among[14:54], alone[:40])
    np.testing.assert_array_equal(last[:13], alone[27:40])


@interpreted
def test_a_row_without_keys_gives_zeros():
    case = case_of([2, 4], [0, 4], table_width=2)
    out, lse = interpret(prefill, dataclasses.replace(case, distribution=np.array([0, 0, 2], np.int32)), sm_scale=0.125, sinks=SINKS)
    assert not out[:2].any()
    assert np.isneginf(lse[:2]).all()
    want = run_reference(case, sm_scale=0.125, sinks=SINKS)
    assert relative_rms(out[2:6], want[2:6]) < TOLERANCE["bfloat16"]


# name: (case that notices it, text, its replacement)
MUTANTS = {
    "last token dropped": ("plain", "seen = behind >= 0", "seen = behind > 0"),
    "window too wide": ("window", "seen & (behind < window)", "seen & (behind <= window)"),
    "window's first tile skipped": ("window", "lower = lax.div(jnp.maximum(oldest, 0)", "lower = 1 + lax.div(jnp.maximum(oldest, 0)"),
    "page tail not cleared": ("plain", "        _clear_rows(plan, smem.v.at[slot], left)\n", ""),
    "page tail not cleared while widening": ("float8", "jnp.where(rows + r < left, numbers, jnp.zeros_like(numbers))", "numbers"),
    "scales of keys for values": ("int8", "_of_keys(smem.scales[1, slot], shape), 0.0)", "_of_keys(smem.scales[0, slot], shape), 0.0)"),
    "pages of a tile mixed up": (
        "plain",
        "place = lax.div(i * plan.tile_tokens + copy * plan.copy_tokens",
        "place = lax.div(i * plan.tile_tokens",
    ),
    "old sums not rescaled": ("plain", "total * decay + p.sum(axis=1)", "total + p.sum(axis=1)"),
    "sink forgotten": ("window", "total = total * decay + jnp.exp2(sink - new_top)", "total = total * decay"),
    "the next row's tokens overwritten": ("plain", "(low == 0) & (high == ROWS)", "low < high"),
    "padding not cleared": ("plain", "left = (plan.num_tokens - first)", "left = 0 * first"),
    "one padding token not cleared": ("plain", "first = refs.cu_q_lens[plan.num_rows]", "first = refs.cu_q_lens[plan.num_rows] + 1"),
}
SMALL = {
    "plain": ([20, 41], [200, 50], {}, {}),
    "window": ([20, 41], [200, 50], {}, {"sliding_window": 17, "sinks": SINKS}),
    "float8": ([10], [50], {"kv_dtype": "float8_e4m3fn"}, {}),
    "int8": ([10], [50], {"kv_dtype": "int8", "page_size": 32}, {}),
}


def error_of(module, name):
    """Relative error of a small case; infinite where something is not finite, a race is seen, or padding is not zero."""
    q_lens, kv_lens, sizes, options = SMALL[name]
    case = case_of(q_lens, kv_lens, **sizes)
    options = case.scales | options
    try:
        out, _ = interpret(module, case, sm_scale=0.5, **options)
    except AssertionError:
        return np.inf
    except jax.errors.JaxRuntimeError as error:
        assert "RACE DETECTED" in str(error)
        return np.inf
    if out[case.num_used :].any():
        return np.inf
    out = out[: case.num_used]
    want = run_reference(case, sm_scale=0.5, **options)[: case.num_used]
    return relative_rms(out, want) if np.isfinite(out).all() else np.inf


@interpreted
@pytest.mark.parametrize("name", SMALL)
def test_the_unchanged_source_passes(name):
    assert error_of(prefill, name) < TOLERANCE["bfloat16"]


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(name, monkeypatch):
    case, old, new = MUTANTS[name]
    assert SOURCE.count(old) == 1
    module = types.ModuleType("mutant_of_prefill")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(SOURCE.replace(old, new), "mutant", "exec"), module.__dict__)
    assert error_of(module, case) > 1e-2


@pytest.mark.parametrize("seed", range(6))
def test_items_name_each_tile_once(seed):
    rng = np.random.default_rng(seed)
    q_lens = rng.choice([0, 1, 3, 64, 65, 200], size=6)
    cu = np.concatenate([[0], np.cumsum(q_lens)])
    first, end = sorted(rng.integers(0, 7, size=2))
    items = prefill.prefill_items(jnp.asarray(cu, jnp.int32), first, end, num_tokens=int(cu[-1]))
    tiles = [-(-(cu[row + 1] - cu[row] // 8 * 8) // 64) if first <= row < end and q_lens[row] else 0 for row in range(6)]
    num_tiles, num_pairs = map(int, items.counts)
    assert num_tiles <= items.rows.shape[0]
    listed = [(row, tile) for row in range(6) for tile in reversed(range(tiles[row]))]
    assert list(zip(items.rows[:num_tiles].tolist(), items.tiles[:num_tiles].tolist(), strict=True)) == listed
    pairs = [(row, tile) for row, tile in listed if tile % 2 == 0]
    assert list(zip(items.pair_rows[:num_pairs].tolist(), items.pair_tiles[:num_pairs].tolist(), strict=True)) == pairs
    assert items.first_slots.tolist() == np.cumsum([0, *tiles[:-1]]).tolist()


LOWERED = {
    "Llama-3-8B": ((512, 32, 128), 8, 64, {}),
    "Gemma-2-9B": ((512, 16, 256), 8, 16, {"soft_cap": 50.0, "sliding_window": 4096}),
    "Llama-3-8B over float8": ((512, 32, 128), 8, 16, {"kv_dtype": jnp.float8_e4m3fn}),
    "Llama-3-8B over int8": ((512, 32, 128), 8, 64, {"kv_dtype": jnp.int8}),
    "odd group, sinks, fewer tokens than a tile": ((16, 7, 64), 1, 128, {"sinks": True}),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cuda(name):
    (tokens, heads, dim), kv_heads, page, options = LOWERED[name]
    options = {"sinks": False, "kv_dtype": jnp.bfloat16} | options
    has_sinks, kv_dtype = options.pop("sinks"), options.pop("kv_dtype")
    arguments = [
        jax.ShapeDtypeStruct((tokens, heads, dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((64, page, 2 * kv_heads, dim), kv_dtype),
        *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8,), (8, 64), (9,), (3,))),
        jax.ShapeDtypeStruct((heads,), jnp.float32),
        jax.ShapeDtypeStruct((64, kv_heads, page) if kv_dtype == jnp.int8 else (), jnp.float32),
    ]

    def attend(q, kv_pages, kv_lens, tables, cu_q_lens, distribution, sinks, scale):
        rows = (distribution[0], distribution[2])
        items = prefill.prefill_items(cu_q_lens, *rows, num_tokens=tokens)
        extra = ({"sinks": sinks} if has_sinks else {}) | ({} if kv_dtype == jnp.bfloat16 else {"k_scale": scale, "v_scale": scale})
        return prefill.prefill_attention(q, kv_pages, kv_lens, tables, cu_q_lens, *rows, items, sm_scale=0.1, **options, **extra)

    text = jax.jit(attend).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
