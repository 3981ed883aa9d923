import dataclasses
import gc

import jax
import numpy as np
import pytest
from engine_fakes import BUCKETS, HOST_PAGES, SMALL, make, prompts, run

from jaxpaged import LLM
from jaxpaged.engine.preemption import PreemptionCost
from jaxpaged.scheduling.plan import INVALID_TOKEN, PageCopy, StepPlan, Transfer, Work
from jaxpaged.scheduling.request import Group, Sequence
from jaxpaged.state import StepInputs


def test_the_pool_is_updated_in_place(small):
    """No program holds scratch memory or a copy of the size of the pool, and the pool's buffers stay where they are."""
    runner = small.runner
    for bucket in BUCKETS:
        program = runner._programs[bucket]
        assert program.memory_analysis().temp_size_in_bytes < runner.pool.num_bytes / 4
        shape = runner.pool.layers[0].kv.shape
        copies = [line for line in program.as_text().splitlines() if " copy(" in line and f"[{','.join(map(str, shape))}]" in line]
        assert not copies
    run(small.engine(), [make("a", [5, 6, 7])])
    before = [layer.kv.unsafe_buffer_pointer() for layer in runner.pool.layers]
    scheduler = small.scheduler()
    scheduler.add(make("b", [5, 6, 7]))
    plan = scheduler.schedule()
    scheduler.commit(plan, runner.dispatch(plan).read())
    assert [layer.kv.unsafe_buffer_pointer() for layer in runner.pool.layers] == before


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_nothing_is_compiled_once_ready(small, mode):
    """Across prefill chunks, decodes, all sampling options, log-probabilities, forks, beams, aborts, preemptions and swaps."""
    compiled = []
    listener = lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None  # noqa: E731
    rng = np.random.default_rng(0)
    run(small.engine(), [make("first", [3, 4])])
    engine = small.engine(num_pages=13, num_host_pages=HOST_PAGES if mode == "swap" else 0, preemption_mode=mode)
    before = small.runner.compilations_after_ready
    options = [
        {},
        {"temperature": 0.0},
        {"top_k": 5, "top_p": 0.8, "min_p": 0.01},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": {5: 3.0}, "bad_token_ids": [7]},
        {"allowed_token_ids": [5, 6, 7], "min_tokens": 3, "stop_token_ids": [5]},
        {"logprobs": 5, "prompt_logprobs": 2},
        {"n": 3},
        {"use_beam_search": True, "beam_width": 3},
    ]
    texts = [text[:24] for text in prompts(18, rng)]
    requests = [make(str(i), prompt, **options[i % len(options)]) for i, prompt in enumerate(texts)]
    jax.clear_caches()  # programs are ours to keep, not JAX's to have at hand
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        run(engine, requests)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.memory.num_copies > 0
    assert (engine.scheduler.num_swaps > 0) == (mode == "swap")
    assert compiled == []
    assert small.runner.compilations_after_ready == before


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("async_depth", [0, 1])
def test_sharing_swapping_and_the_prefix_cache_change_no_token(small, mode, async_depth):
    """Of requests with common beginnings in a small pool, against each of them alone in an empty one."""
    rng = np.random.default_rng(7)
    common = rng.integers(3, 2000, 20).tolist()
    options = [{"temperature": 0.0}, {"n": 3}, {"use_beam_search": True, "beam_width": 2, "n": 2}, {"n": 2, "top_p": 0.9}, {"logprobs": 2}]
    texts = [common[: int(rng.integers(9, 20))] + rng.integers(3, 2000, int(rng.integers(0, 6))).tolist() for _ in range(15)]
    requests = [make(str(i), text, seed=i, max_tokens=24, **options[i % len(options)]) for i, text in enumerate(texts)]
    alone = {}
    for request in requests:
        alone |= run(small.engine(enable_prefix_caching=False, async_depth=0), [request])
    engine = small.engine(num_pages=15, num_host_pages=HOST_PAGES, preemption_mode=mode, async_depth=async_depth)
    assert run(engine, requests) == alone
    scheduler = engine.scheduler
    assert scheduler.num_preemptions > 0 and scheduler.memory.num_copies > 0 and scheduler.memory.prefix_hits > 0
    assert (scheduler.num_swaps > 0) == (mode == "swap")


def test_a_late_compilation_is_counted_and_named(small, caplog, monkeypatch):
    runner = small.runner
    program = runner._programs[BUCKETS[0]]
    small.engine()

    def compile_something(bucket):
        jax.jit(lambda x: x * 3 + bucket).lower(np.float32(0)).compile()
        return program

    monkeypatch.setattr(runner, "_compile", compile_something)
    monkeypatch.setattr(runner, "compilations_after_ready", 0)
    monkeypatch.delitem(runner._programs, BUCKETS[0])
    scheduler = small.scheduler()
    scheduler.add(make("a", [3], max_tokens=2))
    for _ in range(2):
        plan = scheduler.schedule()
        scheduler.commit(plan, runner.dispatch(plan).read())
    assert runner.compilations_after_ready == 1
    assert f"bucket {BUCKETS[0]}" in caplog.text


def test_reset_gives_an_empty_pool_that_works(small):
    engine = small.engine()
    expected = run(engine, [make("a", range(3, 40))])
    for layer in small.runner._pool.layers:
        layer.kv.delete()  # what a failed step does to a donated pool
    with pytest.raises(RuntimeError):
        scheduler = small.scheduler()
        scheduler.add(make("a", [3]))
        small.runner.dispatch(scheduler.schedule()).read()
    small.runner.reset()
    assert run(small.engine(), [make("a", range(3, 40))]) == expected


def test_logprobs_are_read_where_asked_and_match_the_tokens(small):
    engine = small.engine()
    engine.add(make("plain", [3, 4, 5], temperature=0.0, max_tokens=3))
    engine.add(make("asked", [3, 4, 5], temperature=0.0, max_tokens=3, logprobs=3, prompt_logprobs=1))
    events = {"plain": [], "asked": []}
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
    assert not any(event.logprobs or event.prompt_logprobs for event in events["plain"])
    entries = [entry for event in events["asked"] for entry in event.logprobs]
    assert [entry.token_id for entry in entries] == [i for event in events["asked"] for i in event.token_ids]
    for entry in entries:
        assert entry.rank == 1 and len(entry.top) == 3
        assert entry.top[0] == (entry.token_id, pytest.approx(entry.logprob))
        assert entry.top[0][1] >= entry.top[1][1] >= entry.top[2][1]
    prompt_entries = [entry for event in events["asked"] for entry in event.prompt_logprobs]
    assert [entry.token_id for entry in prompt_entries] == [4, 5]
    assert all(len(entry.top) == 1 and entry.logprob <= entry.top[0][1] for entry in prompt_entries)


def test_padding_steps_change_no_page(small):
    runner = small.runner
    run(small.engine(), [make("a", range(3, 30))])
    before = [np.asarray(layer.kv).copy() for layer in runner.pool.layers]
    for bucket in BUCKETS:
        inputs = runner._padding(bucket)
        assert isinstance(inputs, StepInputs)
        assert (np.asarray(runner._run(inputs).tokens) == INVALID_TOKEN).all()
    for old, layer in zip(before, runner.pool.layers, strict=True):
        np.testing.assert_array_equal(old, np.asarray(layer.kv))


# ------------------------------------------------------------------------------------------- pages that are copied and moved


def make_sequence(request, index=0, **more):
    return Sequence(Group(request), index, **more)


def plan_of(*rows, **more):
    total = sum(row.num_new_tokens for row in rows)
    bucket = next(bucket for bucket in BUCKETS if bucket >= total)
    return StepPlan(1, rows, total, bucket, min(bucket, 4), **more)


def decode(runner, request, pages, *, after, **more):
    """Computes a prompt on its pages, then ``after`` says on which others it goes on and what happens before; returns the logprobs."""
    runner.reset()
    sequence = make_sequence(request, slot=0, page_ids=list(pages))
    count = len(request.prompt)
    runner.dispatch(plan_of(Work(sequence, 0, count, True, True, 0))).read()
    sequence.page_ids = list(after)
    sequence.tokens.append(7)
    return runner.dispatch(plan_of(Work(sequence, count, 1, True, False, 1), **more)).read()


def test_a_reset_runs_the_program_that_failed_on_padding(small, monkeypatch):
    runner, tried = small.runner, []
    runner.reset()
    run = runner._run
    monkeypatch.setattr(runner, "_run", lambda inputs: (tried.append((inputs.num_tokens, int(inputs.flags.sum()))), run(inputs))[1])
    runner.reset()
    assert tried == [(BUCKETS[0], 0)]
    for bucket, others in ((BUCKETS[2], BUCKETS[1]), (BUCKETS[1], BUCKETS[0])):
        sequence = Sequence(Group(make("a", range(3, 3 + bucket))), slot=0, page_ids=[4, 5])
        plans = [StepPlan(1, (Work(sequence, 0, count, False, True, 0),), count, count, min(count, 4)) for count in (bucket, others)]
        runner.dispatch(plans[1]).read()
        for plan in plans:
            runner.dispatch(plan)
        runner.reset()
        assert tried[-1] == (bucket, 0)
    runner.reset()
    assert tried[-1] == (BUCKETS[0], 0)


def test_pages_that_moved_to_the_host_and_back_or_were_copied_hold_the_same(small):
    request = make("a", range(3, 16), temperature=0.0, logprobs=3)
    expected = decode(small.runner, request, [4, 5], after=[4, 5])
    away, back = [Transfer(True, 4, HOST_PAGES), Transfer(True, 5, 1)], [Transfer(False, 900, HOST_PAGES), Transfer(False, 3, 1)]
    overwritten = [Transfer(False, 4, 1), Transfer(False, 5, HOST_PAGES)]
    assert decode(small.runner, request, [4, 5], after=[900, 3], transfers=(*away, *back, *overwritten)) == expected
    assert decode(small.runner, request, [4, 5], after=[4, 9], copies=(PageCopy(5, 9),)) == expected
    moved_then_copied = {"transfers": (*away, *back), "copies": (PageCopy(3, 77),)}
    assert decode(small.runner, request, [4, 5], after=[900, 77], **moved_then_copied) == expected
    wrong = decode(small.runner, request, [4, 5], after=[900, 3])  # what nobody has put there
    assert wrong.logprobs[0].logprob != expected.logprobs[0].logprob


def test_moves_of_all_sizes_copies_and_beams_compile_nothing(small):
    compiled = []
    listener = lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None  # noqa: E731
    runner, request = small.runner, make("a", [5], temperature=0.0, use_beam_search=True, beam_width=4)
    runner.reset()
    beams = [make_sequence(request, index, slot=index, page_ids=[index + 1]) for index in range(4)]
    before = runner.compilations_after_ready
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for count in (1, 3, 4, 15, 21, 64):
            moves = tuple(Transfer(to_host, 100 + i, 1 + i) for to_host in (True, False) for i in range(count))
            rows = [Work(beam, 0, 1, True, True, 0, beam_score=-1.0) for beam in beams]
            runner.dispatch(plan_of(*rows, transfers=moves, copies=(PageCopy(50, 51),))).read()
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []
    assert runner.compilations_after_ready == before


def test_a_failed_step_forgets_what_was_on_its_way_to_the_host(small):
    runner, request = small.runner, make("a", [5, 6], temperature=0.0)
    runner.reset()
    sequence = make_sequence(request, slot=0, page_ids=[1])
    work = Work(sequence, 0, 2, True, True, 0)
    runner.dispatch(plan_of(work, transfers=(Transfer(True, 1, 1),))).read()
    for layer in runner._pool.layers:
        layer.kv.delete()
    with pytest.raises(RuntimeError):
        runner.dispatch(plan_of(work, transfers=(Transfer(True, 1, 1),))).read()
    runner.reset()
    assert not runner._host._leaving
    runner.dispatch(plan_of(work, transfers=(Transfer(True, 1, 1),))).read()


def test_a_place_that_does_not_exist_fails_the_step(small):
    small.runner.reset()
    work = Work(make_sequence(make("a", [5]), slot=0, page_ids=[1]), 0, 1, True, True, 0)
    with pytest.raises(ValueError, match="places"):
        small.runner.dispatch(plan_of(work, transfers=(Transfer(True, 1, HOST_PAGES + 1),)))


def test_beams_are_read_by_request_and_only_theirs(small):
    small.runner.reset()
    wide = make("wide", [5, 6], temperature=0.0, use_beam_search=True, beam_width=3)
    plain = make("plain", [5, 6], temperature=0.0, logprobs=20)
    rows = [make_sequence(wide, index, slot=index, page_ids=[index + 1]) for index in range(3)]
    other = make_sequence(plain, slot=3, page_ids=[9])
    for sequence, token in zip((*rows, other), (7, 8, 9, 8), strict=True):
        sequence.tokens[:] = [token]
    scores = [-1.25, -1.0, -3.0]
    works = [Work(sequence, 0, 1, True, True, 0, beam_score=score) for sequence, score in zip(rows, scores, strict=True)]
    result = small.runner.dispatch(plan_of(*works, Work(other, 0, 1, True, True, 0))).read()
    assert list(result.beams) == ["wide"]
    best = result.beams["wide"]
    assert len(best) == 20
    assert [candidate.score for candidate in best] == sorted((candidate.score for candidate in best), reverse=True)
    assert {candidate.parent for candidate in best} <= {0, 1, 2}
    of_second = [(candidate.token_id, candidate.score) for candidate in best if candidate.parent == 1]
    assert of_second == [(token, float(np.float32(-1.0) + np.float32(p))) for token, p in result.logprobs[3].top[: len(of_second)]]
    assert of_second and [entry is None for entry in result.logprobs] == [True, True, True, False]
    alone = small.runner.dispatch(plan_of(dataclasses.replace(works[1], beam_score=None))).read()
    assert alone.beams == {}


def test_the_runner_knows_what_moving_and_computing_cost(small, monkeypatch):
    cost = small.runner.preemption
    assert cost.seconds_per_page > 0 and cost.seconds_per_token > 0
    assert small.runner.num_programs == len(BUCKETS) + 1 + 2 * 3  # steps, writing a slot, moves
    seen = PreemptionCost()
    monkeypatch.setattr(small.runner, "preemption", seen)
    run(small.engine(), [make("short", [5] * 5, max_tokens=3)])
    assert seen.seconds_per_token is None  # too little in a step to tell what a token costs in a full one
    run(small.engine(), [make("long", [5] * 40, max_tokens=3)])
    assert seen.seconds_per_token > 0


# ------------------------------------------------------------------------------------------------------- what a runner leaves


def device_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("closed", [False, True])
def test_memory_comes_back_from_engines_that_are_dropped(closed):
    """Weights and pages of three engines in a row, each of which has served; nothing of the process holds a runner."""
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 4, "token_buckets": (4,), "num_pages": 9, "compilation_cache_dir": ""}
    before = device_bytes()
    for _ in range(3):
        llm = LLM(load_format="dummy", hf_overrides=SMALL, show_progress=False, warmup=False, **options)
        assert llm.generate([[5, 6]], use_tqdm=False)[0].outputs[0].token_ids
        assert device_bytes() > before + 2**20
        if closed:
            llm.close()
        del llm
        assert device_bytes() == before
