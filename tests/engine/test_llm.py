import math

import pytest

from jaxpaged import LLM, ConfigError, RequestError, RequestOutput, SamplingParams

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
