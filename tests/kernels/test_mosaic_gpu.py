"""The Hopper decode kernel: in jax's interpreter against the reference, with seeded faults, and lowered for CUDA. No GPU is needed.

The interpreter simulates TMA, barriers and warpgroups, and looks for races between them. It sees an await left out (below), and hangs on a
wrong number of arrivals. It cannot see a tile given back, or queries overwritten, before the product that reads them is done, since it
runs a wgmma at once: that order stands on reading the code.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import LSE_TOLERANCE, SUBJECTS, TOLERANCE, _interpreter, make_case, relative_rms, run_reference

from pallas_kernels.paged_attention import mosaic_gpu
from pallas_kernels.paged_attention.mosaic_gpu import decode, tilings, work_list

SCALE = 0.17
NO_INTERPRETER = SUBJECTS["mosaic_gpu"].no_interpreter()
interpreted = pytest.mark.skipif(NO_INTERPRETER is not None, reason=NO_INTERPRETER or "")


def tiling_of(case, **sizes):
    tiling = tilings.decode_tiling(case.q.shape[2], case.q.dtype.itemsize, case.kv_pages.dtype.itemsize)
    return dataclasses.replace(tiling, interpretable=True, **{"num_ctas": 2, "combine_unroll": 2, **sizes})


@functools.cache
def jitted(module, tiling, page_size, static):
    def call(arrays, sinks, scales):
        q, kv_pages, kv_lens, tables, _, distribution = arrays
        items = work_list.decode_items(kv_lens, distribution[0], page_size=page_size, table_width=tables.shape[1])
        options = {"sliding_window": None, "soft_cap": None, **dict(static), **scales}
        sinks = None if sinks is None else sinks * decode.LOG2E
        return module.decode_attention(q, kv_pages, tables, items, sm_scale=SCALE, sinks=sinks, tiling=tiling, **options)

    return jax.jit(call)


def run(case, module=decode, tiling=None, sinks=None, **static):
    """Returns float32 outputs and log-sums of the kernels alone, and asserts that they have no race."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    interpret_pallas_call.reset_gpu_interpret_mode_state()
    call = jitted(module, tiling or tiling_of(case), case.kv_pages.shape[1], tuple(static.items()))
    scales = {"k_scale": case.k_scale, "v_scale": case.v_scale}
    with _interpreter("mosaic_gpu"):
        out, lse = call(tuple(map(jnp.asarray, case.arguments)), sinks, scales)
        out, lse = np.asarray(out, np.float32), np.asarray(lse)
    assert not interpret_pallas_call.get_races().races_found
    return out, lse


def some_sinks(case):
    return np.linspace(-1, 2, case.q.shape[1], dtype=np.float32)


# name: (contexts, make_case's options, the call's options). Splits have 256 tokens.
CASES = {
    "pages of a tile, three splits": ([250, 64, 600], {"page_size": 64, "head_dim": 128, "num_q_heads": 4}, {}),
    "small pages, window, sinks": ([33, 1, 129, 300], {"page_size": 16}, {"sliding_window": 70, "sinks": True}),
    "large pages, soft cap": ([127, 129, 300], {"page_size": 128, "num_q_heads": 4, "num_kv_heads": 1}, {"soft_cap": 5.0}),
    "page and tile share eight tokens": ([100, 23], {"page_size": 24}, {"sliding_window": 30}),
    "float16, an odd number of heads": ([70, 257], {"page_size": 64, "num_q_heads": 9, "num_kv_heads": 3, "dtype": "float16"}, {}),
    "wide heads": ([70], {"page_size": 64, "head_dim": 256, "num_q_heads": 2, "num_kv_heads": 1}, {"soft_cap": 5.0}),
    "float8": ([100, 65], {"page_size": 64, "kv_dtype": "float8_e4m3fn"}, {"sliding_window": 50}),
    "int8": ([100, 65], {"page_size": 32, "kv_dtype": "int8"}, {"sinks": True}),
}


def make(name):
    lens, shape, options = CASES[name]
    case = make_case([1] * len(lens), lens, **{"dtype": "bfloat16", "head_dim": 64, **shape})
    sinks = some_sinks(case) if options.get("sinks") else None
    return case, {**options, "sinks": sinks}


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name):
    case, options = make(name)
    out, lse = run(case, **options)
    want, want_lse = run_reference(case, sm_scale=SCALE, return_lse=True, **options)
    assert relative_rms(out, want) <= TOLERANCE[str(case.q.dtype)]
    assert np.abs(lse - want_lse).max() <= LSE_TOLERANCE[str(case.q.dtype)]


EDGES = [1, 15, 16, 17, 255, 256, 257, 512, 513]


@interpreted
@pytest.mark.parametrize("window", [None, 256])
def test_contexts_at_the_edges_of_pages_tiles_and_splits(window):
    case = make_case([1] * len(EDGES), EDGES, num_q_heads=2, num_kv_heads=1, head_dim=64, page_size=16, dtype="bfloat16")
    out, lse = run(case, sliding_window=window)
    want, want_lse = run_reference(case, sm_scale=SCALE, return_lse=True, sliding_window=window)
    assert relative_rms(out, want) <= TOLERANCE["bfloat16"]
    assert np.abs(lse - want_lse).max() <= LSE_TOLERANCE[str(case.q.dtype)]


@interpreted
def test_a_rows_bits_depend_on_the_row_alone():
    lens = [300, 70, 0, 260]
    case = make_case([1] * 4, lens, num_q_heads=4, num_kv_heads=2, head_dim=64, page_size=16, dtype="bfloat16")
    sinks = some_sinks(case)
    out, lse = run(case, sinks=sinks)
    assert not out[2].any()
    assert (lse[2] == -np.inf).all()

    order = np.random.default_rng(3).permutation(len(case.kv_pages))
    place = np.argsort(order).astype(np.int32)
    moved = dataclasses.replace(case, kv_pages=case.kv_pages[order], block_tables=place[case.block_tables])
    assert np.array_equal(run(moved, sinks=sinks)[0], out)

    last = [3, 2, 1, 0]
    turned = dataclasses.replace(case, q=case.q[last], kv_lens=case.kv_lens[last], block_tables=case.block_tables[last])
    assert np.array_equal(run(turned, sinks=sinks)[0][last], out)

    alone = dataclasses.replace(case, distribution=np.array([1, 1, 1], np.int32))
    alone_out, alone_lse = run(alone, sinks=sinks)
    assert np.array_equal(alone_out[0], out[0])
    assert not alone_out[1:].any()
    assert (alone_lse[1:] == -np.inf).all()


@interpreted
@pytest.mark.parametrize("sizes", [{"compute_warpgroups": 1, "num_ctas": 3, "stages": 3}, {"combine_unroll": 8}])
def test_the_tiling_changes_at_most_the_order_of_the_merge(sizes):
    case, options = make("small pages, window, sinks")
    out = run(case, **options)[0]
    other = run(case, tiling=tiling_of(case, **sizes), **options)[0]
    assert np.abs(other - out).max() <= (1e-2 if "combine_unroll" in sizes else 0)


@interpreted
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_single_tokens_and_chunks_in_one_call(kv_dtype):
    heads = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 64, "dtype": "bfloat16", "kv_dtype": kv_dtype}
    case = make_case([1, 1, 9], [70, 17, 30], page_size=32, num_tokens=16, num_rows=5, **heads)
    arrays = tuple(map(jnp.asarray, case.arguments))
    work = mosaic_gpu.make_work_list(*arrays[2:3], *arrays[4:], num_tokens=16, page_size=32, table_width=case.block_tables.shape[1])
    attend = functools.partial(mosaic_gpu.ragged_paged_attention, sm_scale=SCALE, return_lse=True, tiling=mosaic_gpu.INTERPRETABLE)
    with _interpreter("mosaic_gpu"):
        out, lse = (np.asarray(x, np.float32) for x in attend(*arrays, work=work, **case.scales))
    want, want_lse = run_reference(case, sm_scale=SCALE, return_lse=True)
    used = case.num_used
    assert relative_rms(out[:used], want[:used]) <= TOLERANCE["bfloat16"]
    assert np.abs(lse[:used] - want_lse[:used]).max() <= LSE_TOLERANCE[str(case.q.dtype)]
    assert not out[used:].any()
    assert (lse[used:] == -np.inf).all()


# --- Seeded faults

SOURCE = Path(decode.__file__).read_text()
# name: (text, its replacement)
MUTANTS = {
    "last token dropped": ("seen = positions < item.end", "seen = positions < item.end - 1"),
    "window too wide": ("item.kv_len - plan.sliding_window)\n    return", "item.kv_len - plan.sliding_window - 1)\n    return"),
    "window's first tokens skipped": ("oldest - _remainder(oldest, plan.chunk)", "oldest + plan.chunk - _remainder(oldest, plan.chunk)"),
    "splits overlap": ("end = jnp.minimum(start + plan.split, kv_len)", "end = kv_len"),
    "keys as values": ("tokens, 2 * item.head + which]", "tokens, 2 * item.head]"),
    "tail of V not cleared": ("pl.when(in_use < plan.tiling.block_kv)", "pl.when(in_use < 0)"),
    "old sums not rescaled": ("total = total * decay + p.sum(axis=1)", "total = total + p.sum(axis=1)"),
    "last split left out": ("jnp.where(split < count, x, -jnp.inf)", "jnp.where(split < count - 1, x, -jnp.inf)"),
    "sink counted without rescaling": ("jnp.exp2(sink - top)", "jnp.exp2(sink)"),
    "offset within the page lost": ("_remainder(position, plan.page_size)", "_remainder(position, plan.chunk)"),
}


@functools.cache
def fault_case():
    """One row of two splits and one that ends within a tile: two heads, a window, sinks, pages larger than a tile."""
    case = make_case([1, 1], [300, 70], num_q_heads=2, num_kv_heads=1, head_dim=64, page_size=128, dtype="bfloat16")
    return case, {"sliding_window": 200, "sinks": some_sinks(case)}


def error(module):
    case, options = fault_case()
    out = run(case, module, **options)[0]
    return relative_rms(out, run_reference(case, sm_scale=SCALE, **options)) if np.isfinite(out).all() else np.inf


@interpreted
def test_the_unchanged_source_passes_the_case_of_the_faults():
    assert error(decode) <= TOLERANCE["bfloat16"]


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("name", MUTANTS)
def test_fault_is_noticed(name):
    old, new = MUTANTS[name]
    assert SOURCE.count(old) == 1
    module = types.ModuleType(decode.__name__)
    exec(compile(SOURCE.replace(old, new), "mutant", "exec"), module.__dict__)
    assert error(module) > 2 * TOLERANCE["bfloat16"]


# name: (text, what is left of it)
UNAWAITED = {
    "room in the ring": (
        "pl.when(used + tile >= plan.tiling.stages)(functools.partial(plgpu.barrier_wait, ring.free.at[slot]))",
        "pass",
    ),
    "a tile of V": (
        "p = p.astype(plan.v_dtype)\n        plgpu.barrier_wait(ring.full.at[slot])",
        "p = p.astype(plan.v_dtype)",
    ),
    "the store of the item before": ("plgpu.wait_smem_to_gmem(0, wait_read_only=True)\n    shared.lse", "shared.lse"),
}


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("name", UNAWAITED)
def test_an_await_left_out_is_noticed(name):
    old, new = UNAWAITED[name]
    assert SOURCE.count(old) == 1
    module = types.ModuleType(decode.__name__)
    exec(compile(SOURCE.replace(old, new), "mutant", "exec"), module.__dict__)
    case = make_case([1] * 3, [257, 70, 30], num_q_heads=2, num_kv_heads=1, head_dim=64, page_size=64, dtype="bfloat16")
    tiling = tiling_of(case, num_ctas=1, stages=2)  # two items a stream, five tiles in a ring of two
    run(case, tiling=tiling)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
        run(case, module, tiling)


# --- What every jax can check


@pytest.mark.parametrize(("page_size", "table_width"), [(16, 40), (64, 600)])
def test_the_work_list_covers_each_row_once(page_size, table_width):
    split = work_list.split_tokens(page_size, table_width)
    lens = np.array([0, 1, split, split + 1, page_size * table_width, 0, 77, 5], np.int32)
    items = work_list.decode_items(jnp.asarray(lens), jnp.int32(7), page_size=page_size, table_width=table_width)
    want = [(row, start) for row, length in enumerate(lens[:7]) for start in range(0, length, split)]
    count = int(items.first[-1])
    assert list(zip(items.rows[:count].tolist(), items.starts[:count].tolist(), strict=True)) == want
    assert [items.first[row + 1] - items.first[row] for row in range(8)] == [-(-n // split) for n in [*lens[:7], 0]]
    assert int(items.rows.min()) >= 0
    assert int(items.rows.max()) < 8


def test_splits_are_a_multiple_of_tiles_and_few():
    for page_size in (8, 24, 64, 256):
        for tokens in (64, 4096, 131_072, 1_000_000):
            split = work_list.split_tokens(page_size, tokens // page_size)
            assert split % 64 == 0
            assert split * work_list.MOST_SPLITS >= tokens // page_size * page_size


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("kv_itemsize", [1, 2])
def test_tilings_fit_in_shared_memory(head_dim, kv_itemsize):
    tiling = tilings.decode_tiling(head_dim, 2, kv_itemsize)
    assert tiling.stages >= 2
    assert tiling.compute_warpgroups * tilings.shared_memory(tiling, head_dim, 2, kv_itemsize) < tilings.SHARED_MEMORY


@pytest.mark.parametrize(
    ("q_shape", "kv_shape", "dtypes", "scale_dims", "reason"),
    [
        ((4, 8, 128), (9, 64, 4, 128), ("bfloat16", "bfloat16"), 0, None),
        ((4, 64, 64), (9, 8, 2, 64), ("float16", "float16"), 0, None),
        ((4, 8, 128), (9, 16, 4, 128), ("bfloat16", "float8_e4m3fn"), 0, None),
        ((4, 8, 256), (9, 32, 4, 256), ("bfloat16", "int8"), 3, None),
        ((4, 8, 128), (9, 64, 4, 128), ("float32", "float32"), 0, "queries of float32"),
        ((4, 8, 128), (9, 64, 4, 128), ("bfloat16", "float16"), 0, "pages of float16"),
        ((4, 8, 80), (9, 64, 4, 80), ("bfloat16", "bfloat16"), 0, "head dimension 80"),
        ((4, 8, 512), (9, 64, 4, 512), ("bfloat16", "bfloat16"), 0, "head dimension 512"),
        ((4, 8, 128), (9, 20, 4, 128), ("bfloat16", "bfloat16"), 0, "pages of 20 tokens"),
        ((4, 65, 64), (9, 64, 2, 64), ("bfloat16", "bfloat16"), 0, "65 query heads"),
        ((4, 59, 64), (9, 64, 2, 64), ("bfloat16", "bfloat16"), 0, "59 query heads"),
        ((4, 60, 64), (9, 64, 2, 64), ("bfloat16", "bfloat16"), 0, None),
        ((4, 8, 128), (9, 16, 4, 128), ("bfloat16", "int8"), 3, "scales per token of pages of 16"),
        ((4, 8, 128), (9, 64, 4, 128), ("bfloat16", "bfloat16"), 3, "scales per token over pages of bfloat16"),
    ],
)
def test_says_what_it_cannot_do(q_shape, kv_shape, dtypes, scale_dims, reason):
    q, kv = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip((q_shape, kv_shape), dtypes, strict=True))
    scale = jax.ShapeDtypeStruct((kv_shape[0], kv_shape[2] // 2, kv_shape[1]) if scale_dims else (), jnp.float32)
    answer = mosaic_gpu.unsupported(q, kv, k_scale=scale, v_scale=scale)
    assert answer is None if reason is None else reason in answer


def test_says_when_only_one_of_the_scales_is_per_token():
    q, kv = jax.ShapeDtypeStruct((4, 8, 128), jnp.bfloat16), jax.ShapeDtypeStruct((9, 64, 4, 128), jnp.int8)
    assert "only one" in mosaic_gpu.unsupported(q, kv, k_scale=jax.ShapeDtypeStruct((9, 2, 64), jnp.float32), v_scale=None)


VIEWS = ("slice", "split", "reshape", "squeeze", "dynamic_slice")


def kernel_operands(jaxpr, views):
    """Returns each kernel's operands that XLA may make views of an argument, and which results are such; ``views`` tells of the inputs."""
    is_view = dict(zip(jaxpr.invars, views, strict=True))
    found = []
    for eqn in jaxpr.eqns:
        ins = [not hasattr(x, "val") and is_view.get(x, False) for x in eqn.invars]
        outs = [eqn.primitive.name in VIEWS and ins[0]] * len(eqn.outvars)
        if eqn.primitive.name == "custom_vmap_call":
            found.append([x.aval for x, view in zip(eqn.invars, ins, strict=True) if view])
        elif eqn.primitive.name in ("jit", "pjit"):
            inner, outs = kernel_operands(eqn.params["jaxpr"].jaxpr, ins)
            found += inner
        is_view |= dict(zip(eqn.outvars, outs, strict=True))
    return found, [not hasattr(x, "val") and is_view.get(x, False) for x in jaxpr.outvars]


def test_no_kernel_reads_a_slice_of_the_callers_array():
    """XLA would hand it over where it lies, and Mosaic GPU refuses what does not begin at a multiple of 256 bytes: so it was on an H200."""
    rows, width, heads = 8, 8, 32

    def call(q, kv_pages, ints, all_sinks):
        lens, cu, distribution, table = jnp.split(ints, np.cumsum([rows, rows + 1, 3]))
        table = table.reshape(rows, width)
        return mosaic_gpu.ragged_paged_attention(q, kv_pages, lens, table, cu, distribution, sm_scale=SCALE, sinks=all_sinks[1])

    shapes = [
        ((16, heads, 128), "bfloat16"),
        ((20, 64, 16, 128), "bfloat16"),
        ((2 * rows + 4 + rows * width,), "int32"),
        ((2, heads), "float32"),
    ]
    jaxpr = jax.make_jaxpr(call)(*[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]).jaxpr
    kernels, _ = kernel_operands(jaxpr, [True] * len(shapes))
    assert len(kernels) == 3
    for views in kernels:  # of queries and pages any part begins well
        assert not [view for view in views if view.dtype != jnp.bfloat16]


LOWERED = [
    # (query heads, key/value heads, head dimension, page size, dtype of the pages, options)
    (32, 8, 128, 64, "bfloat16", {}),
    (8, 1, 128, 16, "bfloat16", {}),
    (9, 3, 64, 128, "bfloat16", {"sliding_window": 128}),
    (16, 8, 256, 64, "bfloat16", {"soft_cap": 50.0, "sliding_window": 4096}),
    (32, 8, 128, 64, "float8_e4m3fn", {}),
    (32, 8, 128, 64, "int8", {}),
]


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads", "head_dim", "page_size", "kv_dtype", "options"), LOWERED)
def test_lowers_for_cuda_on_a_cpu(num_q_heads, num_kv_heads, head_dim, page_size, kv_dtype, options):
    rows, width, pages = 4, 8, 20
    shapes = [((rows, num_q_heads, head_dim), "bfloat16"), ((pages, page_size, 2 * num_kv_heads, head_dim), kv_dtype)]
    shapes += [((rows,), "int32"), ((rows, width), "int32"), ((pages, num_kv_heads, page_size), "float32")]
    q, kv_pages, lens, table, scale = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)
    tiling = tilings.decode_tiling(head_dim, 2, kv_pages.dtype.itemsize)

    def call(q, kv_pages, lens, table, scale):
        items = work_list.decode_items(lens, jnp.int32(rows), page_size=page_size, table_width=width)
        all_options = {"sliding_window": None, "soft_cap": None, "sinks": None, **dict.fromkeys(("k_scale", "v_scale"), scale), **options}
        return decode.decode_attention(q, kv_pages, table, items, sm_scale=SCALE, tiling=tiling, **all_options)

    scale = scale if kv_dtype == "int8" else jax.ShapeDtypeStruct((), jnp.float32)
    lowered = jax.jit(call).trace(q, kv_pages, lens, table, scale).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 2
