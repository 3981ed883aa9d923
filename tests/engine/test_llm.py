import concurrent.futures
import dataclasses
import math
import threading

import pytest
from engine_fakes import SMALL

from jaxpaged import LLM, BeamSearchParams, ConfigError, RequestError, RequestOutput, SamplingParams
from jaxpaged.config import EngineConfig
from jaxpaged.engine.startup import LoadedEngine
from jaxpaged.errors import EngineStopped, GenerationError

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def text_of(outputs):
    return [output.outputs[0].text for output in outputs]


def test_every_kind_of_prompt(small):
    llm = small.llm
    ids = llm.get_tokenizer().encode("the cat sat")
    expected = text_of(llm.generate("the cat sat", GREEDY, use_tqdm=False))
    assert len(expected) == 1
    for prompts in (
        "the cat sat",
        ["the cat sat"],
        {"prompt": "the cat sat"},
        {"prompt_token_ids": ids},
        ids,
        [ids],
        [{"prompt_token_ids": ids}],
    ):
        assert text_of(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected
    assert text_of(llm.generate(["the cat sat", ids, {"prompt": "the cat sat"}], GREEDY, use_tqdm=False)) == expected * 3


def test_outputs_have_vllms_shape(small):
    llm = small.llm
    params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=2, prompt_logprobs=1, n=2)
    (output,) = llm.generate(["the cat sat"], params, use_tqdm=False)
    assert isinstance(output, RequestOutput) and output.finished and output.prompt == "the cat sat"
    assert output.prompt_token_ids == llm.get_tokenizer().encode("the cat sat")
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token_id, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert token_id in entry and min(value.rank for value in entry.values()) == 1
    assert [completion.index for completion in output.outputs] == [0, 1]
    for completion in output.outputs:
        assert len(completion.token_ids) == len(completion.logprobs) == 5
        chosen = [entry[token_id] for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True)]
        assert completion.cumulative_logprob == pytest.approx(sum(value.logprob for value in chosen))
        assert all(value.rank == 1 and value.logprob < 0 for value in chosen)
        assert (completion.finish_reason, completion.stop_reason) == ("length", None)
        assert completion.text == llm.get_tokenizer().decode(completion.token_ids)
    metrics = output.metrics
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time
    plain = llm.generate("the cat sat", GREEDY, use_tqdm=False)[0]
    assert plain.prompt_logprobs is None and plain.outputs[0].logprobs is None and plain.outputs[0].cumulative_logprob is None


def test_the_best_of_several_by_mean_log_probability(small):
    prompts, common = ["the cat sat", "once upon"], {"seed": 11, "max_tokens": 9}
    every = small.llm.generate(prompts, SamplingParams(n=4, logprobs=0, **common), use_tqdm=False)
    best = small.llm.generate(prompts, SamplingParams(n=2, best_of=4, **common), use_tqdm=False)
    shown = small.llm.generate(prompts, SamplingParams(n=2, best_of=4, logprobs=1, **common), use_tqdm=False)
    for all_four, two, with_logprobs in zip(every, best, shown, strict=True):
        ranked = sorted(all_four.outputs, key=lambda output: output.cumulative_logprob / len(output.token_ids), reverse=True)
        assert [output.token_ids for output in two.outputs] == [output.token_ids for output in ranked[:2]]
        assert [output.text for output in two.outputs] == [output.text for output in ranked[:2]]
        assert [output.cumulative_logprob for output in two.outputs] == pytest.approx([o.cumulative_logprob for o in ranked[:2]], abs=1e-4)
        assert [output.index for output in two.outputs] == [0, 1]
        assert all(output.logprobs is None for output in two.outputs)
        assert all(len(output.logprobs) == len(output.token_ids) for output in with_logprobs.outputs)


def test_cached_prompt_tokens_are_told_and_change_nothing(small):
    llm, ids = small.llm, list(range(100, 130))
    llm.reset_prefix_cache()
    first, second = (llm.generate([ids], GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 24)
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    llm.reset_prefix_cache()
    assert llm.generate([ids], GREEDY, use_tqdm=False)[0].num_cached_tokens == 0


def test_more_prompts_than_fit_at_once_keep_their_order(small):
    prompts = [f"story number {i}" for i in range(30)]
    outputs = small.llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert text_of(outputs) == [
        text for p in prompts for text in text_of(small.llm.generate(p, SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False))
    ]


def test_one_set_of_parameters_per_prompt(small):
    params = [SamplingParams(max_tokens=3), SamplingParams(max_tokens=6)]
    outputs = small.llm.generate(["a", "b"], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 6]
    with pytest.raises(RequestError):
        small.llm.generate(["a", "b", "c"], params, use_tqdm=False)
    for wrong in ([{"temperature": 0.0}], [BeamSearchParams(beam_width=2, max_tokens=2)]):
        with pytest.raises(RequestError, match="must be SamplingParams; got"):
            small.llm.generate(["a"], wrong, use_tqdm=False)


def test_a_stop_string_ends_the_computing_too(small):
    llm = small.llm
    free = llm.generate("the cat", SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True), use_tqdm=False)[0].outputs[0]
    stop = llm.get_tokenizer().decode(free.token_ids[2:4]).strip()
    assert stop
    before = llm.get_metrics()
    (output,) = llm.generate("the cat", SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, stop=[stop]), use_tqdm=False)
    completion = output.outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.text == free.text[: free.text.index(stop)]
    after = llm.get_metrics()
    assert after.generation_tokens - before.generation_tokens <= len(completion.token_ids) + 2
    assert after.finished["stop"] == before.finished.get("stop", 0) + 1


def test_chat(small):
    messages = [{"role": "user", "content": "hello"}]
    (output,) = small.llm.chat(messages, GREEDY, use_tqdm=False)
    assert output.prompt.endswith("assistant\n") and "hello" in output.prompt
    assert len(small.llm.chat([messages, messages], GREEDY, use_tqdm=False)) == 2
    text = small.llm.get_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == output.prompt
    assert text_of(small.llm.generate(text, GREEDY, use_tqdm=False)) == text_of([output])
    (unbounded,) = small.llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True), use_tqdm=False)
    assert len(unbounded.outputs[0].token_ids) == small.info.max_model_len - len(unbounded.prompt_token_ids)
    with pytest.raises(RequestError):
        small.llm.chat(messages, GREEDY, use_tqdm=False, chat_template="{{ raise_exception('no') }}")


def test_the_models_defaults_apply_when_no_parameters_are_given(small):
    assert small.llm.get_default_sampling_params().temperature == small.info.default_sampling["temperature"]
    assert len(small.llm.generate("a", use_tqdm=False)[0].outputs[0].token_ids) <= 16


def test_a_bad_prompt_stops_all_before_anything_runs(small):
    before = small.llm.get_metrics().steps
    for bad in ({"text": "x"}, [1, 99999], [], "x " * 500):
        with pytest.raises(RequestError):
            small.llm.generate(["fine", bad], GREEDY, use_tqdm=False)
    assert small.llm.get_metrics().steps == before


def test_more_sequences_than_the_pool_holds_stop_all_before_anything_runs(small):
    engine, before = small.engine(num_pages=9), small.llm.get_metrics().steps
    small.llm._engine, real = engine, small.llm._engine
    try:
        fits, too_much = SamplingParams(n=4, max_tokens=11), SamplingParams(n=4, max_tokens=20)
        with pytest.raises(RequestError, match="4 sequences"):
            small.llm.generate([[5, 6, 7]] * 2, [fits, too_much], use_tqdm=False)
        assert engine.stats().steps == 0
        assert len(small.llm.generate([[5, 6, 7]], fits, use_tqdm=False)[0].outputs) == 4
    finally:
        small.llm._engine = real
    assert small.llm.get_metrics().steps == before


def test_an_interrupt_leaves_a_working_engine(small, monkeypatch):
    expected = text_of(small.llm.generate("the cat", GREEDY, use_tqdm=False))
    dispatch = small.runner.dispatch

    def interrupted(plan):
        monkeypatch.setattr(small.runner, "dispatch", dispatch)
        raise KeyboardInterrupt

    monkeypatch.setattr(small.runner, "dispatch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small.llm.generate(["a", "b", "c"], GREEDY, use_tqdm=False)
    assert text_of(small.llm.generate("the cat", GREEDY, use_tqdm=False)) == expected


def with_defaults(llm, monkeypatch, **defaults):
    monkeypatch.setattr(llm, "info", dataclasses.replace(llm.info, default_sampling=defaults))


def lengths(outputs):
    return [len(output.outputs[0].token_ids) for output in outputs]


def test_a_default_of_max_tokens_ends_with_the_context(small, monkeypatch):
    llm, room = small.llm, small.info.max_model_len
    with_defaults(llm, monkeypatch, temperature=0.0, max_tokens=room)
    assert llm.get_default_sampling_params().max_tokens == room
    endless = dataclasses.replace(llm.get_default_sampling_params(), ignore_eos=True)
    for prompts in ([[5] * 250], [[5] * 250, [6] * 253]):
        assert lengths(llm.generate(prompts, endless, use_tqdm=False)) == [room - len(prompt) for prompt in prompts]
        assert all(0 < n <= 6 for n in lengths(llm.generate(prompts, use_tqdm=False)))
    (long,) = llm.chat([{"role": "user", "content": "hello " * 20}], use_tqdm=False)
    assert long.outputs[0].finish_reason in ("stop", "length")
    with_defaults(llm, monkeypatch, max_tokens=3)
    assert lengths(llm.chat([{"role": "user", "content": "hello"}], use_tqdm=False))[0] <= 3
    assert lengths(llm.generate([[5, 6]], SamplingParams(max_tokens=None, min_tokens=9, stop_token_ids=[]), use_tqdm=False))[0] >= 9


def test_sixteen_tokens_that_nobody_asked_for_end_with_the_context(small, monkeypatch):
    with_defaults(small.llm, monkeypatch)
    assert lengths(small.llm.generate([[5] * 250, [5] * 255], use_tqdm=False))[1] == 1
    assert lengths(small.llm.generate([[5] * 250], SamplingParams(ignore_eos=True, max_tokens=99), use_tqdm=False)) == [6]
    with pytest.raises(RequestError, match="at least one is for the output"):
        small.llm.generate([[5] * 256], use_tqdm=False)


def test_a_prompt_alone(small):
    ids = list(range(100, 110))
    (output,) = small.llm.generate([ids], SamplingParams(max_tokens=0, prompt_logprobs=1), use_tqdm=False)
    assert len(output.prompt_logprobs) == len(ids)
    assert (output.outputs[0].text, output.outputs[0].token_ids, output.outputs[0].finish_reason) == ("", [], "length")
    (whole,) = small.llm.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=1), use_tqdm=False)
    assert whole.prompt_logprobs == output.prompt_logprobs


def test_a_prompt_is_cut_on_the_left(small):
    params = dataclasses.replace(GREEDY, truncate_prompt_tokens=4)
    (output,) = small.llm.generate([list(range(100, 120))], params, use_tqdm=False)
    assert output.prompt_token_ids == [116, 117, 118, 119]
    (output,) = small.llm.generate([[7] * 1000], dataclasses.replace(GREEDY, truncate_prompt_tokens=-1), use_tqdm=False)
    assert len(output.prompt_token_ids) == small.info.max_model_len - GREEDY.max_tokens


def test_a_stop_token_is_not_in_the_text(small):
    free = small.llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].outputs[0]
    first = free.token_ids[0]
    for include in (False, True):
        params = dataclasses.replace(GREEDY, stop_token_ids=[first], include_stop_str_in_output=include, logprobs=0)
        (found,) = small.llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs
        assert found.text == (small.llm.get_tokenizer().decode([first]) if include else "")
        assert (found.token_ids, len(found.logprobs), found.stop_reason) == ([first], 1, first)


def test_a_beams_text_is_without_its_stop_token(small):
    tokenizer, prompt = small.llm.get_tokenizer(), [5, 6, 7]
    free = SamplingParams(use_beam_search=True, n=2, max_tokens=3)
    stop = small.llm.beam_search([prompt], free)[0].sequences[0].tokens[3]
    ended = 0
    for include in (False, True):
        params = dataclasses.replace(free, stop_token_ids=[stop], include_stop_str_in_output=include)
        for beam in small.llm.beam_search([prompt], params)[0].sequences:
            hidden = beam.finish_reason == "stop" and not include
            ended += beam.finish_reason == "stop"
            assert beam.text == tokenizer.decode(beam.tokens[: len(beam.tokens) - hidden])
    assert ended


def test_without_detokenizing(small):
    (output,) = small.llm.generate([[5, 6, 7]], dataclasses.replace(GREEDY, detokenize=False), use_tqdm=False)
    assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == GREEDY.max_tokens


def test_threads_take_turns(small):
    llm, params = small.llm, dataclasses.replace(GREEDY, ignore_eos=True)
    prompts = [[[5 + i, 6], [7, 8 + i], [9, 10, 11 + i]] for i in range(4)]
    expected = [[output.outputs[0].token_ids for output in llm.generate(each, params, use_tqdm=False)] for each in prompts]
    barrier = threading.Barrier(len(prompts))

    def ask(i):
        barrier.wait(30)
        if i % 2:
            llm.reset_prefix_cache()
        return [output.outputs[0].token_ids for output in llm.generate(prompts[i], params, use_tqdm=False)]

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        for _ in range(3):
            assert list(pool.map(ask, range(len(prompts)), timeout=120)) == expected


def test_a_call_from_inside_a_call_is_refused(small, monkeypatch):
    """As a signal's handler may make one: it would wait for itself for ever."""
    dispatch, seen = small.runner.dispatch, []

    def dispatch_and_ask(plan):
        if not seen:
            for call in (lambda: small.llm.generate("a", GREEDY, use_tqdm=False), small.llm.reset_prefix_cache, small.llm.close):
                with pytest.raises(EngineStopped, match="in the middle of a call") as caught:
                    call()
                seen.append(caught.value)
        return dispatch(plan)

    monkeypatch.setattr(small.runner, "dispatch", dispatch_and_ask)
    assert len(small.llm.generate(["a", "b"], GREEDY, use_tqdm=False)) == 2
    assert len(seen) == 3


def test_outputs_that_are_not_finished_are_an_error(small, monkeypatch):
    """Whatever took a request away from the engine: nobody gets half an answer for a whole one."""
    dispatch, llm = small.runner.dispatch, small.llm

    def drop(plan):
        llm._engine.abort(plan.work[0].sequence.request.id)
        monkeypatch.setattr(small.runner, "dispatch", dispatch)
        return dispatch(plan)

    monkeypatch.setattr(small.runner, "dispatch", drop)
    with pytest.raises(GenerationError, match="1 of 2 prompts are not finished"):
        llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert len(llm.generate(["a", "b"], GREEDY, use_tqdm=False)) == 2


def test_what_is_closed_says_so(small, monkeypatch):
    closed = []
    llm = LLM.__new__(LLM)
    monkeypatch.setattr("jaxpaged.llm.load_engine", lambda *_: LoadedEngine(small.llm._engine, small.info, lambda: closed.append(1)))
    llm._start(EngineConfig(), None)
    with llm as entered:
        assert entered is llm and len(llm.generate("a", GREEDY, use_tqdm=False)) == 1 and not closed
    llm.close()
    assert closed == [1]
    message = [{"role": "user", "content": "hi"}]
    calls = (
        lambda: llm.generate("a"),
        lambda: llm.generate([]),
        lambda: llm.generate([99999]),
        lambda: llm.chat(message),
        lambda: llm.beam_search("a", BeamSearchParams(beam_width=2, max_tokens=2)),
        llm.reset_prefix_cache,
    )
    for call in calls:
        with pytest.raises(EngineStopped, match="this LLM is closed"):
            call()
    assert llm.get_tokenizer().encode("a") and llm.get_metrics().steps and llm.get_default_sampling_params()


def test_a_bar_shows_the_speed(small, capsys):
    small.llm.generate(["a", "b"], GREEDY)
    shown = capsys.readouterr().err
    assert "Processed prompts: 100%" in shown and "est. speed input:" in shown and "toks/s" in shown


def test_an_empty_list_gives_an_empty_list(small):
    assert small.llm.generate([], GREEDY, use_tqdm=False) == []


def test_unknown_options_are_named():
    with pytest.raises(ConfigError, match="did you mean 'max_model_len'"):
        LLM(max_model_length=5)


def test_logprobs_are_probabilities(small):
    (output,) = small.llm.generate("the", SamplingParams(max_tokens=3, logprobs=20, temperature=1.0), use_tqdm=False)
    for entry in output.outputs[0].logprobs:
        assert 20 <= len(entry) <= 21
        assert 0 < sum(math.exp(value.logprob) for value in entry.values()) <= 1.0001


def test_an_engine_may_tell_more_log_probabilities_than_twenty():
    options = {
        "load_format": "dummy",
        "hf_overrides": SMALL,
        "page_size": 8,
        "num_pages": 33,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 8,
    }
    with LLM(max_logprobs=40, token_buckets=(8,), compilation_cache_dir="", show_progress=False, **options) as llm:
        asked = SamplingParams(temperature=0.0, max_tokens=3, logprobs=40, prompt_logprobs=33)
        (output,) = llm.generate([[5, 6, 7, 8]], asked, use_tqdm=False)
        for entry in output.outputs[0].logprobs:
            assert [value.rank for value in entry.values()] == list(range(1, 41))
            values = [value.logprob for value in entry.values()]
            assert values == sorted(values, reverse=True)
        assert all(33 <= len(entry) <= 34 for entry in output.prompt_logprobs[1:])
        (few,) = llm.generate([[5, 6, 7, 8]], dataclasses.replace(asked, logprobs=5), use_tqdm=False)
        assert [len(entry) for entry in few.outputs[0].logprobs] == [5] * 3
        for name in ("logprobs", "prompt_logprobs"):
            with pytest.raises(RequestError, match="at most 40 here; got 41"):
                llm.generate([[5]], SamplingParams(**{name: 41}), use_tqdm=False)
        assert llm.beam_search([[5, 6]], BeamSearchParams(beam_width=2, max_tokens=3))
    with pytest.raises(ConfigError, match=r"max_logprobs must be in .*256.; got 257"):
        LLM(max_logprobs=257)
