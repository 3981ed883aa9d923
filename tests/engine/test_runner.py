import jax
import numpy as np
import pytest
from engine_fakes import BUCKETS, make, prompts, run

from jaxpaged.scheduling.plan import INVALID_TOKEN
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


def test_nothing_is_compiled_once_ready(small, monkeypatch):
    """Across prefill chunks, decodes, all sampling options, log-probabilities, aborts and preemptions."""
    compiled = []
    listener = lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None  # noqa: E731
    rng = np.random.default_rng(0)
    run(small.engine(), [make("first", [3, 4])])
    engine = small.engine(num_pages=9)
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
    ]
    requests = [make(str(i), prompt, **options[i % len(options)]) for i, prompt in enumerate(prompts(16, rng))]
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        run(engine, requests)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert engine.scheduler.num_preemptions > 0
    assert compiled == []
    assert small.runner.compilations_after_ready == before


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
