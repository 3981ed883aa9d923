"""Every kernel and the whole engine step at every bucket compile for TPUs and GPUs, in the memory they may use, and no page is copied."""

from __future__ import annotations

import types

import pytest
from compile_targets.table import GEMMA2_9B, LLAMA3_8B, MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, SINKS, STEP_MODELS, rows
from compile_targets.targets import TARGETS

from jaxpaged.config import EngineConfig
from jaxpaged.engine import startup
from jaxpaged.scheduling.buckets import token_buckets

_SAME_GENERATION = {"H100": "H200"}
"""Chips whose machine code is that of another in the table; the rest of the table is compiled for the other at each submission."""

_ALL_MODELS = ("v6e", "H200")
"""Where every submission compiles the kernels for the shapes of all models: elsewhere for those that are another piece of code."""

_OWN_CODE = (LLAMA3_8B.name, GEMMA2_9B.name, SINKS.name)
_FIRST_BUCKETS = (1, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS)


def _only_for_a_release(row):
    """Says whether a row repeats what others show: another number of heads, another bucket, another chip with the same machine code."""
    if row.target in _SAME_GENERATION:
        return not (row.program == "step" and row.model == STEP_MODELS[1].name and row.step_tokens == MAX_NUM_SEQS)
    if row.program == "step":
        return row.step_tokens not in (_FIRST_BUCKETS if row.model == STEP_MODELS[1].name else (MAX_NUM_SEQS,))
    return row.program == "attention" and row.target not in _ALL_MODELS and row.model not in _OWN_CODE


def _marked(row):
    return pytest.param(row, id=str(row), marks=[pytest.mark.aot_rest] if _only_for_a_release(row) else [])


@pytest.mark.aot
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("row", [_marked(row) for row in rows()])
def test_row(row, compiled):
    missing = TARGETS[row.target].missing()
    if missing:
        pytest.skip(missing)
    result = compiled(row)
    assert not result.problems, "; ".join(result.problems)


def test_what_is_left_to_a_release_has_a_likeness_in_each_submission():
    def likeness(row):
        size = row.model if row.program == "step" else row.call
        return (_SAME_GENERATION.get(row.target, row.target), row.program, row.implementation, size, row.kv_dtype)

    kept = [row for row in rows() if not _only_for_a_release(row)]
    assert {likeness(row) for row in rows()} == {likeness(row) for row in kept}
    assert {row.target for row in kept} == set(TARGETS)
    for target in set(TARGETS) - set(_SAME_GENERATION):
        assert {row.step_tokens for row in kept if row.target == target and row.program == "step"} == set(_FIRST_BUCKETS)
    for other, target in _SAME_GENERATION.items():
        described = [TARGETS[name] for name in (other, target)]
        assert len({(chip.platform, chip.topology, chip.implementations, chip.page_size) for chip in described}) == 1


def test_every_bucket_of_every_step_is_in_the_table():
    buckets = token_buckets(MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS)
    steps = {(row.target, row.model, row.step_tokens, row.implementation) for row in rows() if row.program == "step"}
    assert steps == {(t.name, model.name, bucket, t.kernel) for t in TARGETS.values() for model in STEP_MODELS for bucket in buckets}
    assert len(set(rows())) == len(rows())


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_the_table_has_the_engines_defaults(target):
    device = types.SimpleNamespace(platform={"cuda": "gpu"}.get(target.platform, target.platform), compute_capability="9.0")
    sizes = startup._resolve(EngineConfig(model="any"), device)
    assert (sizes.backend, sizes.page_size) == (target.kernel, target.page_size)
    assert (sizes.max_num_seqs, sizes.max_num_batched_tokens) == (MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS)
    assert sizes.token_buckets == token_buckets(MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS)
