"""Every kernel and the whole engine step compile for TPUs and GPUs, in the memory they may use, and no page is copied."""

from __future__ import annotations

import pytest
from compile_targets.table import MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, STEP_MODELS, rows
from compile_targets.targets import TARGETS

from jaxpaged.scheduling.buckets import token_buckets


@pytest.mark.aot
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("row", rows(), ids=str)
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
