import dataclasses

import pytest
from server_fakes import byte_tokenizer, model_config

from jaxpaged.engine.admission import make_params, make_request
from jaxpaged.engine.status import EngineInfo
from jaxpaged.errors import RequestError
from jaxpaged.scheduling.request import SamplingParams

VOCAB = model_config().vocab_size


@pytest.fixture(scope="module")
def info():
    return EngineInfo(
        model_name="fake",
        model_config=model_config(),
        tokenizer=byte_tokenizer(),
        max_model_len=100,
        max_request_tokens=100,
        num_pages=20,
        page_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        max_waiting=8,
        token_buckets=(32,),
        eos_token_ids=(1, 2, VOCAB + 5),
        default_sampling={"temperature": 0.3, "top_p": 0.9},
        max_logprobs=5,
        seed=7,
    )


def refused(info, prompt=(1,), *, prompt_param="prompt", **params):
    with pytest.raises(RequestError) as caught:
        make_request(list(prompt), SamplingParams(**{"max_tokens": 5, **params}), info, request_id="a", prompt_param=prompt_param)
    return caught.value


def test_a_request_is_completed(info):
    request = make_request([1, 2, VOCAB - 1], SamplingParams(max_tokens=None), info, request_id="a")
    assert request.prompt == (1, 2, VOCAB - 1)
    assert request.params.max_tokens == 97
    assert request.eos_token_ids == (1, 2)  # an id that the model cannot generate ends nothing
    assert request.arrival_s > 0


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"n": 5}, "n"),
        ({"best_of": 5}, "best_of"),
        ({"n": 2, "best_of": 5}, "best_of"),
        ({"use_beam_search": True, "n": 5}, "n"),
        ({"use_beam_search": True, "n": 4, "beam_width": 5}, "beam_width"),
    ],
)
def test_a_request_with_more_sequences_than_a_batch_is_refused(info, params, param):
    error = refused(info, **params)
    assert error.param == param and "4" in str(error) and "5" in str(error)
    fitting = {name: min(value, 4) for name, value in params.items()}
    assert make_request([1], SamplingParams(**fitting), info, request_id="a", tenant="t").tenant == "t"


@pytest.mark.parametrize("num_prompt", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_without_max_tokens_all_sequences_fit_the_pool_together(info, num_prompt, count):
    tight = dataclasses.replace(info, num_pages=14)
    request = make_request([1] * num_prompt, SamplingParams(max_tokens=None, n=count), tight, request_id="a")
    shared = (num_prompt - 1) // 16

    def pages(max_tokens):
        return shared + count * (-(-(num_prompt + max_tokens) // 16) - shared)

    assert pages(request.max_tokens) <= 13
    assert num_prompt + request.max_tokens == 100 or pages(request.max_tokens + 1) > 13


def test_a_beam_search_takes_no_sampling_defaults(info):
    params = make_params({"use_beam_search": True, "n": 2}, info)
    assert (params.temperature, params.top_p) == (1.0, 1.0)
    assert make_params({"use_beam_search": False}, info).temperature == 0.3
    with pytest.raises(RequestError, match="temperature"):
        make_params({"use_beam_search": True, "temperature": 0.3}, info)


@pytest.mark.parametrize("length", [99, 100, 101])
def test_the_contexts_edge(info, length):
    if length < 100:
        assert make_request([1] * length, SamplingParams(max_tokens=1), info, request_id="a").max_tokens == 1
        assert refused(info, [1] * length, max_tokens=2).code == "context_length_exceeded"
    else:
        error = refused(info, [1] * length, max_tokens=None, prompt_param="messages")
        assert error.code == "context_length_exceeded" and error.param == "messages" and error.status == 400
        assert str(length) in str(error) and "100" in str(error)


def test_too_long_names_both_numbers_and_what_would_fit(info):
    error = refused(info, [1] * 40, max_tokens=61)
    assert error.param == "max_tokens"
    for number in ("100", "101", "40", "61", "60"):
        assert number in str(error)


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**31, 2**63, 1.0, True, "1", None])
def test_prompt_ids_outside_the_vocabulary(info, bad):
    error = refused(info, [1, bad])
    assert error.param == "prompt" and str(VOCAB - 1) in str(error)


def test_the_last_ids_of_the_vocabulary_are_the_models_not_the_tokenizers(info):
    assert info.tokenizer.vocab_size < VOCAB
    assert make_request([VOCAB - 1], SamplingParams(max_tokens=1), info, request_id="a")


@pytest.mark.parametrize("name", ["logit_bias", "allowed_token_ids", "bad_token_ids", "stop_token_ids"])
def test_ids_of_masks_outside_the_vocabulary(info, name):
    good, bad = ({VOCAB - 1: 1.0}, {VOCAB: 1.0}) if name == "logit_bias" else ([VOCAB - 1], [VOCAB])
    assert make_request([1], SamplingParams(**{name: good}), info, request_id="a")
    assert refused(info, **{name: bad}).param == name


def test_masks_that_leave_nothing(info):
    assert refused(info, bad_token_ids=list(range(VOCAB))).param == "bad_token_ids"
    assert refused(info, allowed_token_ids=[3, 4], bad_token_ids=[4, 3]).param == "allowed_token_ids"
    assert make_request([1], SamplingParams(bad_token_ids=list(range(VOCAB - 1))), info, request_id="a")
    assert make_request([1], SamplingParams(allowed_token_ids=[3, 4], bad_token_ids=[4]), info, request_id="a")


def test_empty_prompt_and_too_many_logprobs(info):
    assert refused(info, []).param == "prompt"
    assert refused(info, logprobs=6).param == "logprobs"
    assert refused(info, prompt_logprobs=6).param == "prompt_logprobs"
    assert make_request([1], SamplingParams(logprobs=5), info, request_id="a")


def test_min_tokens_beyond_the_context(info):
    assert refused(info, [1] * 90, max_tokens=None, min_tokens=11).param == "min_tokens"


def test_defaults_of_the_model_apply_where_the_request_says_nothing(info):
    params = make_params({"top_p": 0.5, "seed": None}, info)
    assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.3, 0.5, None, None)


def test_seeds(info):
    def seed(request_id, **params):
        return make_request([1], SamplingParams(**params), info, request_id=request_id).seed

    assert seed("a", seed=5) == seed("b", seed=5) == 5
    assert seed("a") == seed("a") != seed("b")
    assert -(2**63) <= seed("a") < 2**63
