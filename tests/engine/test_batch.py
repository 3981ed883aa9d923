import dataclasses
import time

import numpy as np

from jaxpaged.engine.batch import BatchBuilder, row_flags, sample_seed
from jaxpaged.scheduling.plan import FEEDBACK, PageCopy, StepPlan, Work
from jaxpaged.scheduling.request import Group, Request, SamplingParams, Sequence
from jaxpaged.state import RowFlag


def make_sequence(request, index=0, **more):
    return Sequence(Group(request), index, **more)


def sequence(slot, prompt, pages, *, index=0, seed=0, eos=(), **params):
    request = Request(id=str(slot), prompt=tuple(prompt), params=SamplingParams(max_tokens=50, **params), seed=seed, eos_token_ids=eos)
    return make_sequence(request, index, slot=slot, page_ids=list(pages))


def work(seq, start, count, *, new=True, samples=None, num_output=0, table_start=0, beam_score=None):
    samples = start + count >= len(seq.tokens) if samples is None else samples
    return Work(seq, start, count, samples, new, num_output, table_start, beam_score)


def plan_of(*rows, bucket=16, slots=4):
    return StepPlan(1, rows, sum(row.num_new_tokens for row in rows), bucket, slots)


def test_a_mixed_step_is_laid_out_as_documented():
    builder = BatchBuilder(page_size=4, table_width=5, max_num_seqs=4)
    decode = sequence(2, [7, 8, 9, 10, 11], [3, 5], seed=5, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1)
    chunk = sequence(0, range(20, 29), [1, 2], temperature=0.0, repetition_penalty=1.5, presence_penalty=0.25, frequency_penalty=-0.5)
    inputs = builder.build(plan_of(work(decode, 4, 1), work(chunk, 2, 5, samples=False)))

    assert inputs.tokens[:6].tolist() == [11, 22, 23, 24, 25, 26]
    assert inputs.positions[:6].tolist() == [4, 2, 3, 4, 5, 6]
    assert inputs.kv_lens.tolist() == [5, 7, 0, 0]
    assert inputs.prompt_lens.tolist() == [5, 9, 0, 0]
    assert inputs.slots.tolist() == [2, 0, 4, 4]  # padding rows have a slot out of range, so that their writes drop
    assert inputs.cu_q_lens.tolist() == [0, 1, 6, 6, 6]
    assert inputs.distribution.tolist() == [1, 1, 2]
    assert inputs.block_tables.tolist() == [[3, 5, 0, 0, 0], [1, 2, 0, 0, 0], [0] * 5, [0] * 5]
    assert inputs.flags.tolist() == [RowFlag.SAMPLES | RowFlag.RANDOM, RowFlag.PENALTIES, 0, 0]
    assert inputs.top_k.tolist() == [7, 0, 0, 0]
    np.testing.assert_allclose(inputs.floats[:, 0], [0.5, 0.9, 0.1, 1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(inputs.floats[:, 1], [0.0, 1.0, 0.0, 1.5, 0.25, -0.5, 0.0])
    assert (inputs.targets == -1).all()


def test_a_token_that_only_the_device_knows_is_fed_back():
    builder = BatchBuilder(page_size=4, table_width=5, max_num_seqs=4)
    seq = sequence(1, [7, 8], [3])
    builder.build(plan_of(work(seq, 0, 2)))
    assert builder.build(plan_of(work(seq, 2, 1, new=False), bucket=1, slots=1)).tokens.tolist() == [FEEDBACK]
    chunk = work(seq, 1, 2, new=False)  # one token known, one not: after a preemption in flight
    assert builder.build(plan_of(chunk, bucket=2, slots=2)).tokens.tolist() == [8, FEEDBACK]


def test_the_block_table_follows_the_pages_and_forgets_the_slot_before():
    builder = BatchBuilder(page_size=4, table_width=5, max_num_seqs=4)
    seq = sequence(1, range(9), [4, 6, 9])
    builder.build(plan_of(work(seq, 0, 9)))
    seq.page_ids.append(2)
    assert builder.build(plan_of(work(seq, 9, 1, new=False))).block_tables[0].tolist() == [4, 6, 9, 2, 0]
    other = sequence(1, [5], [8])
    assert builder.build(plan_of(work(other, 0, 1))).block_tables[0].tolist() == [8, 0, 0, 0, 0]


def test_a_block_table_is_written_from_where_it_changed():
    builder = BatchBuilder(page_size=4, table_width=5, max_num_seqs=4)
    seq = sequence(1, range(17), [4, 6, 9, 2])
    table = lambda **more: builder.build(plan_of(work(seq, 8, 1, **more))).block_tables[0].tolist()  # noqa: E731
    assert table() == [4, 6, 9, 2, 0]
    seq.page_ids[:] = [4, 6, 7, 3, 8]  # a fork's copies, and a page more
    assert table(new=False, table_start=2) == [4, 6, 7, 3, 8]
    seq.page_ids[:2] = [0, 0]  # a sliding window has left them behind
    assert table(new=False, table_start=0) == [0, 0, 7, 3, 8]
    seq.page_ids[3:] = [5]  # a shorter list leaves nothing behind
    assert table(new=False, table_start=3) == [0, 0, 7, 5, 0]
    seq.page_ids[1] = 77
    assert table(new=False, table_start=4) == [0, 0, 7, 5, 0]  # the plan did not say so
    assert table(new=True, table_start=4) == [0, 77, 7, 5, 0]  # whoever takes a slot has a new table


def test_copies_are_passed_on():
    builder = BatchBuilder(page_size=4, table_width=5, max_num_seqs=4)
    plan = plan_of(work(sequence(1, [5], [3]), 0, 1))
    assert builder.build(plan).num_copies.tolist() == [0]
    inputs = builder.build(dataclasses.replace(plan, copies=(PageCopy(7, 3), PageCopy(7, 9))))
    assert inputs.num_copies.tolist() == [2]
    assert inputs.copy_sources[:2].tolist() == [7, 7] and inputs.copy_destinations[:2].tolist() == [3, 9]


def test_beams_have_their_score_and_their_place_and_nothing_is_drawn():
    builder = BatchBuilder(page_size=4, table_width=5, max_num_seqs=8)
    options = {"use_beam_search": True, "beam_width": 3, "n": 1, "temperature": 0.0}
    first = [sequence(slot, [5], [slot + 1], index=slot, **options) for slot in range(3)]
    group = first[0].request
    first = [make_sequence(group, index, slot=index, page_ids=[index + 1]) for index in range(3)]
    other = sequence(4, [6], [5], **options)
    plain = sequence(5, [7], [6], temperature=0.0)
    rows = [
        *(work(seq, 0, 1, beam_score=-1.5 - index) for index, seq in enumerate(first)),
        work(other, 0, 1, beam_score=-7.0),
        work(plain, 0, 1),
    ]
    inputs = builder.build(plan_of(*rows, bucket=8, slots=8))
    beam = RowFlag.SAMPLES | RowFlag.BEAM | RowFlag.LOGPROBS
    assert inputs.flags.tolist() == [beam, beam, beam, beam, RowFlag.SAMPLES, 0, 0, 0]
    assert inputs.beam_index.tolist() == [0, 1, 2, 0, 0, 0, 0, 0]
    assert inputs.beam_score.tolist() == [-1.5, -2.5, -3.5, -7.0, 0, 0, 0, 0]


def test_prompt_targets_are_the_following_prompt_tokens():
    builder = BatchBuilder(page_size=4, table_width=5, max_num_seqs=4)
    seq = sequence(1, range(30, 36), [4, 6], prompt_logprobs=0)
    first = builder.build(plan_of(work(seq, 0, 4)))
    assert first.targets[:6].tolist() == [31, 32, 33, 34, -1, -1]
    last = builder.build(plan_of(work(seq, 4, 2, new=False)))
    assert last.targets[:3].tolist() == [35, -1, -1]
    decode = builder.build(plan_of(work(seq, 6, 1, new=False)))
    assert not decode.flags[0] & RowFlag.PROMPT_LOGPROBS
    assert (decode.targets == -1).all()


def test_stop_ids_are_suppressed_only_before_min_tokens_and_only_if_there_are_some():
    builder = BatchBuilder(page_size=4, table_width=5, max_num_seqs=4)
    with_eos, without = sequence(0, [1], [1], min_tokens=2, eos=(9,)), sequence(1, [1], [2], min_tokens=2)
    for num_output, expected in ((0, True), (1, True), (2, False)):
        rows = work(with_eos, 0, 1, num_output=num_output), work(without, 0, 1, num_output=num_output)
        flags = builder.build(plan_of(*rows)).flags
        assert bool(flags[0] & RowFlag.SUPPRESS_STOP) is expected
        assert not flags[1] & RowFlag.SUPPRESS_STOP


def test_flags_name_what_parameters_need():
    assert row_flags(SamplingParams(temperature=0)) == 0
    assert row_flags(SamplingParams(temperature=1e-6)) == 0
    assert row_flags(SamplingParams(logit_bias={3: 1.0}, temperature=0)) == RowFlag.BIAS
    assert row_flags(SamplingParams(allowed_token_ids=[3], temperature=0)) == RowFlag.BIAS
    assert row_flags(SamplingParams(logprobs=0, prompt_logprobs=3, frequency_penalty=1)) == (
        RowFlag.LOGPROBS | RowFlag.PROMPT_LOGPROBS | RowFlag.PENALTIES | RowFlag.RANDOM
    )


def test_seeds_split_into_halves_and_differ_by_sample():
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 0x89ABCDEF01234567 - 2**64):
        request = Request(id="a", prompt=(1,), params=SamplingParams(), seed=seed)
        low, high = sample_seed(request, 0)
        assert (low % 2**32) + (high % 2**32 << 32) == seed % 2**64
        assert len({sample_seed(request, index) for index in range(128)}) == 128


def test_a_step_of_64_rows_is_built_in_well_under_a_millisecond():
    builder = BatchBuilder(page_size=16, table_width=512, max_num_seqs=64)
    seqs = [sequence(slot, range(100), range(1, 8)) for slot in range(64)]
    builder.build(plan_of(*(work(seq, 99, 1) for seq in seqs), bucket=64, slots=64))
    plan = plan_of(*(work(seq, 100, 1, new=False) for seq in seqs), bucket=64, slots=64)
    times = []
    for _ in range(50):
        started = time.perf_counter()
        builder.build(plan)
        times.append(time.perf_counter() - started)
    assert min(times) < 1e-3
