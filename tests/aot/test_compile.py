"""Every kernel and the whole engine step at every bucket compile for TPUs and GPUs, in the memory they may use, and no page is copied."""

from __future__ import annotations

import types

import pytest
from compile_targets.table import MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, STEP_MODELS, rows
from compile_targets.targets import TARGETS

from jaxpaged.config import EngineConfig
from jaxpaged.engine import startup
from jaxpaged.scheduling.buckets import token_buckets

_ALL_BUCKETS_FIRST = ("v5e", "H200")
_FIRST_BUCKETS = (1, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS)


def _marked(row):
    """A third of the time goes to steps that differ from others by the bucket or the chip's generation alone: these are the rest."""
    rest = row.program == "step" and row.target not in _ALL_BUCKETS_FIRST and row.step_tokens not in _FIRST_BUCKETS
    return pytest.param(row, id=str(row), marks=[pytest.mark.aot_rest] if rest else [])


@pytest.mark.aot
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("row", [_marked(row) for row in rows()])
def test_row(row, compiled):
    missing = TARGETS[row.target].missing()
    if missing:
        pytest.skip(missing)
    result = compiled(row)
    assert not result.problems, "; ".join(result.problems)


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
