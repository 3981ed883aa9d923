"""What is special to the XLA implementation: bounded memory, tilings of platforms, lowering."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import TOLERANCE, make_case, relative_rms, run_reference, run_xla

from pallas_kernels.paged_attention import xla

MIXED = ([1, 1, 1, 1, 1, 1, 7, 1, 40, 130], [1, 64, 65, 200, 33, 130, 7, 90, 171, 130])


def test_many_rows_of_many_lengths():
    case = make_case(*MIXED, num_tokens=200, num_rows=14)
    out, want = run_xla(case, sm_scale=0.17), run_reference(case, sm_scale=0.17)
    assert relative_rms(out[: case.num_used], want[: case.num_used]) <= TOLERANCE["float32"]


def test_pages_before_the_window_may_hold_anything():
    """Rows of one block have windows that start in different chunks, and what lies before a row's own may be another row's by now."""
    q_lens, kv_lens, window = [1, 1, 1, 1, 40], [300, 200, 90, 20, 250], 20
    case = make_case(q_lens, kv_lens)
    pages = case.kv_pages.copy()
    for row, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        pages[case.block_tables[row, : max(0, kv_len - q_len - window + 1) // 16]] = np.nan
    poisoned = dataclasses.replace(case, kv_pages=pages)
    assert np.array_equal(run_xla(case, sm_scale=0.17, sliding_window=window), run_xla(poisoned, sm_scale=0.17, sliding_window=window))


@pytest.mark.parametrize(("dtype", "bits"), [("float8_e4m3fn", "uint8"), ("bfloat16", "uint16")])
def test_bits_are_read_as_the_numbers_they_stand_for(dtype, bits):
    case = make_case([1, 1, 20], [70, 16, 33], kv_dtype=dtype)
    stored = dataclasses.replace(case, kv_pages=case.kv_pages.view(bits))
    out = run_xla(stored, sm_scale=0.17)
    assert np.array_equal(out, run_xla(case, sm_scale=0.17))
    assert relative_rms(out, run_reference(stored, sm_scale=0.17)) <= TOLERANCE["float32"]


def test_one_token_in_one_row_however_it_is_announced():
    case = make_case([1], [40])
    single = run_xla(case, sm_scale=0.17)
    assert np.array_equal(single, run_xla(dataclasses.replace(case, distribution=np.array([0, 0, 1], np.int32)), sm_scale=0.17))


def test_the_tiling_for_accelerators_agrees_too(monkeypatch):
    monkeypatch.setattr(xla, "_CPU_SINGLE", xla._ACCELERATOR)
    case = make_case(*MIXED)
    call = jax.jit(functools.partial(xla.ragged_paged_attention.__wrapped__, sm_scale=0.17))
    out = np.asarray(call(*map(jnp.asarray, case.arguments)))
    assert relative_rms(out, run_reference(case, sm_scale=0.17)) <= TOLERANCE["float32"]


def test_memory_does_not_grow_with_the_table():
    def temp_bytes(table_width, num_tokens=512):
        shapes = [(num_tokens, 8, 64), (4000, 16, 4, 64), (64,), (64, table_width), (65,), (3,)]
        specs = [jax.ShapeDtypeStruct(shape, jnp.float32 if i < 2 else jnp.int32) for i, shape in enumerate(shapes)]
        compiled = jax.jit(functools.partial(xla.ragged_paged_attention, sm_scale=0.1)).lower(*specs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temp_bytes(32), temp_bytes(4096)
    assert large - small <= 4 * (64 * 4096 * 4)  # copies of the table itself: sorted, padded
    assert temp_bytes(128, 8192) <= 8 * (8192 * 8 * 64 * 4)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_for_every_platform(platform):
    case = make_case([1, 1, 9], [30, 50, 20], dtype="bfloat16")
    call = jax.jit(functools.partial(xla.ragged_paged_attention, sm_scale=0.17, sliding_window=7, soft_cap=2.0, return_lse=True))
    lowered = call.trace(*map(jnp.asarray, case.arguments)).lower(lowering_platforms=(platform,))
    assert "stablehlo.while" in lowered.as_text()


def test_a_tpus_pool_has_whole_lanes(monkeypatch):
    assert [xla.storage_head_dim(d) for d in (64, 80, 128)] == [64, 80, 128]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert [xla.storage_head_dim(d) for d in (64, 80, 128, 256)] == [128, 128, 128, 256]
