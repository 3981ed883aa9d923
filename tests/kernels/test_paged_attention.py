"""Every implementation of paged attention against the float64 reference, and against itself under changes that must not matter."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import make_case, relative_rms, run_reference, run_xla

from pallas_kernels.paged_attention import ragged_paged_attention, xla

TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-3}

# (q heads, kv heads, head dim, page size, window, soft cap, sinks, dtype): each value of a column occurs in the first list, and each
# pair of head dim and page size in both together.
MATRIX = [
    (2, 2, 32, 1, None, None, False, "float32"),
    (6, 2, 32, 8, 1, 5.0, True, "float32"),
    (6, 2, 32, 64, 5, None, True, "float32"),
    (9, 3, 64, 32, 5, None, False, "float32"),
    (8, 1, 64, 8, None, 5.0, False, "bfloat16"),
    (8, 1, 64, 64, 17, 5.0, True, "float32"),
    (8, 1, 80, 1, 5, None, True, "float32"),
    (6, 2, 80, 16, 64, 5.0, False, "float32"),
    (2, 2, 80, 64, None, None, False, "bfloat16"),
    (2, 2, 128, 1, 17, 5.0, False, "float32"),
    (8, 1, 128, 16, None, None, False, "float32"),
    (6, 2, 128, 64, 1, None, False, "float32"),
]
MORE = [
    (8, 1, 32, 16, 17, None, False, "bfloat16"),
    (2, 2, 32, 32, 64, 5.0, False, "float32"),
    (2, 2, 64, 16, 1, None, True, "float32"),
    (6, 2, 64, 1, 64, None, False, "float32"),
    (2, 2, 80, 8, 17, None, False, "float32"),
    (8, 1, 80, 32, 1, None, False, "float32"),
    (6, 2, 128, 8, 64, None, True, "float32"),
    (2, 2, 128, 32, None, None, True, "bfloat16"),
]
MIXED_Q_LENS = [1, 1, 1, 1, 1, 1, 7, 1, 40, 130]
MIXED_KV_LENS = [1, 64, 65, 200, 33, 130, 7, 90, 171, 130]


def assert_close(case, dtype="float32", **options):
    out, lse = run_xla(case, sm_scale=0.17, return_lse=True, **options)
    want, want_lse = run_reference(case, sm_scale=0.17, return_lse=True, **options)
    used = case.num_used
    assert np.isfinite(out).all()
    assert relative_rms(out[:used], want[:used]) <= TOLERANCE[dtype]
    assert np.abs(lse[:used] - want_lse[:used]).max() <= 2e-5
    assert not out[used:].any()
    assert (lse[used:] == -np.inf).all()


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim", "page_size", "window", "soft_cap", "with_sinks", "dtype"),
    [*MATRIX, *(pytest.param(*values, marks=pytest.mark.slow) for values in MORE)],
)
def test_agrees_with_the_reference(q_heads, kv_heads, head_dim, page_size, window, soft_cap, with_sinks, dtype):
    case = make_case(
        MIXED_Q_LENS,
        MIXED_KV_LENS,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        num_tokens=200,
        num_rows=14,
        dtype=dtype,
    )
    sinks = np.random.default_rng(1).normal(size=q_heads).astype(np.float32) if with_sinks else None
    assert_close(case, dtype, sliding_window=window, soft_cap=soft_cap, sinks=sinks)


@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "num_tokens"),
    [
        ([1], [1], 1),
        ([1], [100], 1),
        ([5], [5], 5),
        ([3], [300], 4),
        ([2, 3], [2, 3], 5),
        ([1] * 9, [15, 16, 17, 127, 128, 129, 63, 64, 65], 9),
        ([15, 16, 17], [31, 32, 33], 64),
        ([128, 129], [128, 257], 257),
    ],
)
def test_page_chunk_and_block_edges(q_lens, kv_lens, num_tokens):
    assert_close(make_case(q_lens, kv_lens, num_tokens=num_tokens))


def test_a_single_token_row_may_stand_among_the_others():
    case = make_case([1, 1, 1, 9], [30, 50, 1, 20], num_tokens=16)
    other = dataclasses.replace(case, distribution=np.array([0, 0, 4], np.int32))
    out, want = run_xla(other, sm_scale=0.17), run_reference(case, sm_scale=0.17)
    assert relative_rms(out[: case.num_used], want[: case.num_used]) <= TOLERANCE["float32"]


def test_one_token_in_one_row_however_it_is_announced():
    case = make_case([1], [40])
    single = run_xla(case, sm_scale=0.17)
    assert np.array_equal(single, run_xla(dataclasses.replace(case, distribution=np.array([0, 0, 1], np.int32)), sm_scale=0.17))


def test_a_step_of_padding_alone_gives_zeros():
    case = make_case([], [], num_tokens=8, num_rows=4, table_width=3)
    out, lse = run_xla(case, sm_scale=0.17, return_lse=True)
    assert not out.any()
    assert (lse == -np.inf).all()


def test_key_and_value_scales():
    assert_close(make_case(MIXED_Q_LENS, MIXED_KV_LENS), k_scale=np.float32(1.7), v_scale=np.float32(0.3))


def test_context_beyond_32768_positions():
    assert_close(make_case([1, 2], [33_001, 32_770], num_q_heads=2, num_kv_heads=1, page_size=64), sliding_window=None)
    assert_close(make_case([1, 2], [33_001, 32_770], num_q_heads=2, num_kv_heads=1, page_size=64), sliding_window=100)


def test_chunked_prefill_equals_unchunked():
    whole = make_case([150], [150])
    want = run_xla(whole, sm_scale=0.17)
    for start, end in ((0, 1), (1, 70), (70, 149), (149, 150)):
        part = dataclasses.replace(
            whole,
            q=whole.q[start:end],
            kv_lens=np.array([end], np.int32),
            cu_q_lens=np.array([0, end - start], np.int32),
            distribution=np.array([int(end - start == 1)] * 2 + [1], np.int32),
        )
        np.testing.assert_allclose(run_xla(part, sm_scale=0.17), want[start:end], rtol=2e-5, atol=2e-6)


def test_page_ids_do_not_matter():
    case = make_case(MIXED_Q_LENS, MIXED_KV_LENS)
    order = np.random.default_rng(3).permutation(len(case.kv_pages))
    place = np.argsort(order).astype(np.int32)
    moved = dataclasses.replace(case, kv_pages=case.kv_pages[order], block_tables=place[case.block_tables])
    assert np.array_equal(run_xla(case, sm_scale=0.17), run_xla(moved, sm_scale=0.17))


def test_pages_may_be_shared_and_the_pool_may_grow():
    case = make_case([1, 1], [48, 48])
    shared = dataclasses.replace(case, block_tables=case.block_tables[[0, 0]], q=case.q[[0, 0]])
    out = run_xla(shared, sm_scale=0.17)
    assert np.array_equal(out[0], out[1])
    assert np.array_equal(out[0], run_xla(case, sm_scale=0.17)[0])
    grown = dataclasses.replace(case, kv_pages=np.concatenate([case.kv_pages, np.full_like(case.kv_pages, np.nan)]))
    assert np.array_equal(run_xla(case, sm_scale=0.17), run_xla(grown, sm_scale=0.17))


@pytest.mark.parametrize("window", [None, 20])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(window):
    lens = [5, 300, 17, 64, 129, 1, 250, 80, 33, 190]
    case = make_case([1] * 10, lens, num_tokens=16, num_rows=16)
    together = run_xla(case, sm_scale=0.17, sliding_window=window)
    for row in range(len(lens)):
        tables = np.zeros_like(case.block_tables)
        tables[0] = case.block_tables[row]
        alone = dataclasses.replace(
            case,
            q=np.concatenate([case.q[row : row + 1], np.full_like(case.q[1:], np.nan)]),
            block_tables=tables,
            kv_lens=np.array([lens[row]] + [0] * 15, np.int32),
            cu_q_lens=np.array([0] + [1] * 16, np.int32),
            distribution=np.array([1, 1, 1], np.int32),
        )
        assert np.array_equal(run_xla(alone, sm_scale=0.17, sliding_window=window)[0], together[row])


def test_table_entries_beyond_a_rows_end_may_be_any_page():
    case = make_case(MIXED_Q_LENS, MIXED_KV_LENS, table_width=40)
    tables = case.block_tables.copy()
    rng = np.random.default_rng(5)
    for row, length in enumerate(MIXED_KV_LENS):
        tables[row, -(-length // 16) :] = rng.integers(0, len(case.kv_pages), 40 - -(-length // 16))
    other = dataclasses.replace(case, block_tables=tables)
    assert np.array_equal(run_xla(case, sm_scale=0.17), run_xla(other, sm_scale=0.17))


def test_the_tiling_for_accelerators_agrees_too(monkeypatch):
    monkeypatch.setattr(xla, "_CPU_SINGLE", xla._ACCELERATOR)
    case = make_case(MIXED_Q_LENS, MIXED_KV_LENS)
    call = jax.jit(functools.partial(ragged_paged_attention, sm_scale=0.17))
    out = np.asarray(call(*map(jnp.asarray, case.arguments)))
    assert relative_rms(out, run_reference(case, sm_scale=0.17)) <= TOLERANCE["float32"]


def test_memory_does_not_grow_with_the_table():
    def temp_bytes(table_width, num_tokens=512):
        shapes = [(num_tokens, 8, 64), (4000, 16, 4, 64), (64,), (64, table_width), (65,), (3,)]
        specs = [jax.ShapeDtypeStruct(shape, jnp.float32 if i < 2 else jnp.int32) for i, shape in enumerate(shapes)]
        compiled = jax.jit(functools.partial(ragged_paged_attention, sm_scale=0.1)).lower(*specs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temp_bytes(32), temp_bytes(4096)
    assert large - small <= 4 * (64 * 4096 * 4)  # copies of the table itself: sorted, padded
    assert temp_bytes(128, 8192) <= 8 * (8192 * 8 * 64 * 4)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_for_every_platform(platform):
    case = make_case([1, 1, 9], [30, 50, 20], dtype="bfloat16")
    call = jax.jit(functools.partial(ragged_paged_attention, sm_scale=0.17, sliding_window=7, soft_cap=2.0, return_lse=True))
    lowered = call.trace(*map(jnp.asarray, case.arguments)).lower(lowering_platforms=(platform,))
    assert "stablehlo.while" in lowered.as_text()
