"""Attention over two disjoint sets of keys, merged, is attention over all of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import make_case, run_reference, run_xla

from pallas_kernels.paged_attention import merge_attention_states


def reference(out_a, lse_a, out_b, lse_b):
    """The meaning, in float64, one token and head at a time."""
    out, lse = np.zeros(out_a.shape), np.full(lse_a.shape, -np.inf)
    for at in np.ndindex(lse_a.shape):
        sides = [(np.float64(log[at]), np.float64(side[at])) for log, side in ((lse_a, out_a), (lse_b, out_b)) if log[at] > -np.inf]
        if sides:
            top = max(log for log, _ in sides)
            total = sum(np.exp(log - top) for log, _ in sides)
            out[at] = sum(np.exp(log - top) * side for log, side in sides) / total
            lse[at] = top + np.log(total)
    return out, lse


def make_states(dtype="float32"):
    rng = np.random.default_rng(0)
    outs = rng.normal(size=(2, 30, 4, 16)).astype(np.float32)
    logs = rng.normal(size=(2, 30, 4)).astype(np.float32) * 40
    logs[0, :5], logs[1, 3:9] = -np.inf, -np.inf
    outs[0, :5], outs[1, 3:9] = np.nan, np.inf  # a side without keys may hold anything
    outs = jnp.asarray(outs, dtype)
    return outs[0], jnp.asarray(logs[0]), outs[1], jnp.asarray(logs[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_agrees_with_the_reference(dtype):
    states = make_states(dtype)
    out, lse = jax.jit(merge_attention_states)(*states)
    want, want_lse = reference(*(np.asarray(x.astype(jnp.float32)) for x in states))
    assert out.dtype == dtype
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(out.astype(jnp.float32), want, rtol=0.01 if dtype == "bfloat16" else 1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6, atol=1e-6)
    assert (lse[3:5] == -jnp.inf).all() and not np.asarray(out[3:5]).any()


def test_a_side_without_keys_leaves_the_others_bits():
    out_a, lse_a, out_b, lse_b = make_states()
    for out, lse in (merge_attention_states(out_a, lse_a, out_b, lse_b), merge_attention_states(out_b, lse_b, out_a, lse_a)):
        assert np.array_equal(out[:3], out_b[:3]) and np.array_equal(lse[:3], lse_b[:3])
        assert np.array_equal(out[5:9], out_a[5:9]) and np.array_equal(lse[5:9], lse_a[5:9])


@pytest.mark.parametrize("split", [1, 16, 50, 99])
@pytest.mark.parametrize("run", [run_xla, run_reference])
def test_two_key_ranges_merged_are_the_whole(run, split):
    """Decodes of 100 keys and fewer; the first side sees the first keys, the second the rest, as its own sequence of pages."""
    lens = np.array([100, 80, 40], np.int32)
    case = make_case([1, 1, 1], lens.tolist(), page_size=1)
    first = dataclasses.replace(case, kv_lens=np.minimum(lens, split).astype(np.int32))
    rest = np.roll(case.block_tables, -split, axis=1)
    second = dataclasses.replace(case, kv_lens=lens - first.kv_lens, block_tables=rest)
    states = [jnp.asarray(x, jnp.float32) for part in (first, second) for x in run(part, sm_scale=0.17, return_lse=True)]
    out, lse = merge_attention_states(*states)
    want, want_lse = run_reference(case, sm_scale=0.17, return_lse=True)
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-6, atol=2e-6)
