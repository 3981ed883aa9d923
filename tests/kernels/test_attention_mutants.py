"""Seeded faults in the XLA attention: the comparison with the reference must notice each."""

from __future__ import annotations

import functools
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import make_case, relative_rms, run_reference

from pallas_kernels.paged_attention import xla

SOURCE = Path(xla.__file__).read_text()
# name: (case that notices it, text, its replacement)
MUTANTS = {
    "last token dropped": ("plain", "seen = where <= query_positions", "seen = where < query_positions"),
    "window too wide": ("window", "where > query_positions - options.sliding_window", "where >= query_positions - options.sliding_window"),
    "window too narrow": ("window", "query_positions - options.sliding_window", "query_positions - options.sliding_window + 1"),
    "window's first chunk skipped": ("window", "jnp.min(first) // chunk", "jnp.min(first) // chunk + 1"),
    "last chunk skipped": ("plain", "jnp.max(last) // chunk + 1", "jnp.maximum(jnp.max(last) // chunk, 1)"),
    "values from the wrong half": ("plain", "acc = acc[..., -head_dim:]", "acc = acc[..., :head_dim]"),
    "keys as values": ("plain", "width=head_dim, first=1)", "width=head_dim)"),
    "old sums not rescaled": ("plain", "total * decay + weights.sum(-1)", "total + weights.sum(-1)"),
    "old outputs not rescaled": ("plain", "acc = acc * decay[..., None] + jnp.einsum", "acc = acc + jnp.einsum"),
    "page tail not cleared": ("plain", "jnp.where(in_use[:, None, :, None], runs, 0)", "runs"),
    "rows not sorted back": ("plain", "back = jnp.argsort(order)", "back = jnp.arange(capacity)"),
    "offset within the page lost": ("plain", "+ jnp.arange(page_size, dtype=jnp.int32)", "+ jnp.zeros(page_size, jnp.int32)"),
    "sink counted without rescaling": ("window", "jnp.exp(sinks - new_top)", "jnp.exp(sinks)"),
    "the next row's tokens overwritten": ("plain", "mine = (tokens >= start) & (tokens < row_end)", "mine = tokens >= start"),
    "scales of keys forgotten": ("int8", "scores *= _gather_scales", "0 * _gather_scales"),
    "scales of values forgotten": ("int8", "weights * _gather_scales(v_scale, ids)", "weights"),
    "keys' scales for values": ("int8", "weights * _gather_scales(v_scale", "weights * _gather_scales(k_scale"),
    "unowned scales not cleared": (
        "int8",
        "jnp.where(seen, weights * _gather_scales(v_scale, ids), 0)",
        "weights * _gather_scales(v_scale, ids)",
    ),
    "scale forgotten": ("plain", ".transpose(0, 2, 1, 3, 4) * scale", ".transpose(0, 2, 1, 3, 4)"),
}
CASES = {
    "plain": ([1, 1, 1, 1, 1, 20, 30], [64, 200, 65, 30, 129, 20, 300], {}),
    "window": ([1, 1, 30], [100, 200, 30], {"sliding_window": 17, "sinks": np.linspace(-1, 2, 6, dtype=np.float32)}),
    "int8": ([1, 1, 20], [64, 200, 85], {}),
}


def error(source, name):
    """Relative error of a case; infinite where the output is not finite or padding is not zero."""
    module = types.ModuleType(xla.__name__)
    exec(compile(source, "mutant", "exec"), module.__dict__)
    q_lens, kv_lens, options = CASES[name]
    case = make_case(q_lens, kv_lens, num_tokens=64, num_rows=9, kv_dtype="int8" if name == "int8" else None)
    call = jax.jit(functools.partial(module.ragged_paged_attention, sm_scale=0.17, **case.scales, **options))
    out = np.asarray(call(*map(jnp.asarray, case.arguments)))
    sound = np.isfinite(out).all() and not out[case.num_used :].any()
    return relative_rms(out, run_reference(case, sm_scale=0.17, **options)) if sound else np.inf


@pytest.mark.parametrize("name", CASES)
def test_the_unchanged_source_passes(name):
    assert error(SOURCE, name) < 2e-5


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(name):
    case, old, new = MUTANTS[name]
    assert old in SOURCE
    assert error(SOURCE.replace(old, new), case) > 1e-3
