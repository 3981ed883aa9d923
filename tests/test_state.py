"""StepInputs: what researchers pack is what the engine builds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxpaged.engine.batch import BatchBuilder
from jaxpaged.scheduling.plan import StepPlan, Work
from jaxpaged.scheduling.request import Group, Request, SamplingParams, Sequence
from jaxpaged.state import RowFlag, StepInputs

VIEWS = ["tokens", "positions", "targets", "kv_lens", "prompt_lens", "slots", "flags", "top_k", "seed_low", "seed_high"]
VIEWS += ["beam_index", "copy_sources", "copy_destinations", "cu_q_lens", "distribution", "num_copies", "block_tables"]


def make_work(slot: int, prompt: list[int], computed: int, pages: list[int], params: SamplingParams, seed: int) -> Work:
    request = Request(id=f"r{slot}", prompt=tuple(prompt), params=params, seed=seed)
    sequence = Sequence(Group(request), num_computed=computed, page_ids=pages, slot=slot)
    return Work(sequence, computed, len(prompt) - computed, samples=True, new_slot=True, num_output=0)


@pytest.mark.parametrize("size", [(9, 3, 4), (16, 8, 4)])
@pytest.mark.parametrize(
    "params",
    [SamplingParams(temperature=0.0), SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, logprobs=2, prompt_logprobs=1)],
)
def test_pack_and_the_engine_fill_the_same_arrays(size: tuple[int, int, int], params: SamplingParams) -> None:
    num_tokens, num_rows, width = size
    prompts, computed = [[7, 8, 9, 10, 11], [5], [1, 2, 3, 4, 5, 6, 7, 8, 9]], [4, 0, 2]
    pages, seeds = [[3, 1], [9], [4, 8, 2]], [5, -1, 2**63 - 1]
    work = tuple(make_work(i, prompts[i], computed[i], pages[i], params, seeds[i]) for i in range(3))
    plan = StepPlan(step=1, work=work, num_tokens=9, token_bucket=num_tokens, slot_bucket=num_rows)
    built = BatchBuilder(page_size=4, table_width=width, max_num_seqs=8).build(plan)

    packed = StepInputs.pack(
        prompts,
        page_ids=pages,
        page_size=4,
        num_computed=computed,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seeds=seeds,
        logprobs=params.logprobs is not None,
        prompt_logprobs=params.prompt_logprobs is not None,
        num_tokens=num_tokens,
        num_rows=num_rows,
        table_width=width,
        max_num_seqs=8,
    )

    for field in (*(name for name in VIEWS if name != "flags"), "floats"):
        np.testing.assert_array_equal(getattr(packed, field), getattr(built, field), err_msg=field)
    nothing_follows = ~int(RowFlag.PROMPT_LOGPROBS)  # the engine saves itself a look at rows whose prompt ends before
    np.testing.assert_array_equal(packed.flags & nothing_follows, built.flags & nothing_follows)
    assert (packed.num_tokens, packed.num_rows, packed.table_width) == (built.num_tokens, built.num_rows, built.table_width)


def test_pack_takes_natural_sizes() -> None:
    packed = StepInputs.pack([[1, 2, 3], [4, 5]], page_ids=[[1], [2]], page_size=4)
    assert (packed.num_tokens, packed.num_rows, packed.table_width) == (5, 2, 1)
    assert packed.tokens.tolist() == [1, 2, 3, 4, 5]
    assert packed.positions.tolist() == [0, 1, 2, 0, 1]
    assert packed.cu_q_lens.tolist() == [0, 3, 5]
    assert packed.distribution.tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"page_ids": [[1]]},
        {"page_ids": [[1], [2]]},
        {"page_ids": [[1, 3], [0]]},
        {"num_computed": [5, 0]},
        {"num_computed": [0]},
        {"num_computed": [-1, 0]},
        {"num_tokens": 6},
        {"num_rows": 1},
        {"table_width": 1},
        {"prompts": [[1, 2, 3, 4, 5], []]},
    ],
)
def test_pack_refuses_what_does_not_fit(change: dict[str, object]) -> None:
    good = {"prompts": [[1, 2, 3, 4, 5], [6, 7]], "page_ids": [[1, 3], [2]], "page_size": 4}
    StepInputs.pack(**good)
    with pytest.raises(ValueError, match=r"page|fit"):
        StepInputs.pack(**(good | change))


def test_the_views_cover_the_arrays_without_overlap() -> None:
    inputs = StepInputs.zeros(5, 3, 2, max_num_seqs=4)
    inputs = dataclasses.replace(inputs, ints=np.arange(len(inputs.ints), dtype=np.int32))
    assert [int(i) for name in VIEWS for i in np.ravel(getattr(inputs, name))] == list(range(len(inputs.ints)))
