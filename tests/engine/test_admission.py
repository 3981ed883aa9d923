import dataclasses
import time

import pytest
from server_fakes import byte_tokenizer, model_config

from jaxpaged.engine.admission import check_params, make_params, make_request
from jaxpaged.engine.status import EngineInfo
from jaxpaged.errors import RequestError
from jaxpaged.scheduling.fields import NEUTRAL_PARAMS
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
        admit(info, prompt, prompt_param=prompt_param, **params)
    return caught.value


def admit(info, prompt=(1,), *, prompt_param="prompt", **params):
    made = SamplingParams(**{"max_tokens": 5, **params})
    check_params(made, info)
    return make_request(list(prompt), made, info, request_id="a", prompt_param=prompt_param)


def test_a_request_is_completed(info):
    request = make_request([1, 2, VOCAB - 1], SamplingParams(max_tokens=None), info, request_id="a")
    assert request.prompt == (1, 2, VOCAB - 1)
    assert request.max_tokens == 97 and request.params.max_tokens is None
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
    assert admit(info, **{name: good})
    assert refused(info, **{name: bad}).param == name


def test_masks_that_leave_nothing(info):
    assert refused(info, bad_token_ids=list(range(VOCAB))).param == "bad_token_ids"
    assert refused(info, allowed_token_ids=[3, 4], bad_token_ids=[4, 3]).param == "allowed_token_ids"
    assert admit(info, bad_token_ids=list(range(VOCAB - 1)))
    assert admit(info, allowed_token_ids=[3, 4], bad_token_ids=[4])


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"allowed_token_ids": [1, 2]}, "allowed_token_ids"),  # the model's own ends
        ({"allowed_token_ids": [1, 7, 8], "stop_token_ids": [7, 8]}, "allowed_token_ids"),
        ({"allowed_token_ids": [1, 7, 8], "stop_token_ids": [8], "bad_token_ids": [7]}, "allowed_token_ids"),
        ({"bad_token_ids": [i for i in range(VOCAB) if i not in (2, 7)], "stop_token_ids": [7]}, "bad_token_ids"),
        ({"stop_token_ids": range(VOCAB)}, "stop_token_ids"),
        ({"stop_token_ids": [0, *range(3, VOCAB)], "use_beam_search": True, "n": 2}, "stop_token_ids"),
    ],
)
def test_masks_that_leave_only_ends_need_min_tokens_0(info, params, param):
    params = {name: list(value) if isinstance(value, range) else value for name, value in params.items()}
    error = refused(info, min_tokens=1, **params)
    assert error.param == param and error.status == 400 and "min_tokens (1)" in str(error)
    assert admit(info, **params)


def test_a_beam_search_that_may_find_no_token_to_go_on_with_is_refused(info):
    beams = {"use_beam_search": True, "n": 2, "min_tokens": 1}
    error = refused(info, **beams, stop_token_ids=list(range(10, 28)))  # and the two of the model
    assert error.param == "stop_token_ids" and "fewer than 20" in str(error) and "got 20" in str(error)
    for fine in ({"ignore_eos": True}, {"min_tokens": 0}, {"stop_token_ids": [1, 2, *range(10, 27)] * 2}):
        assert admit(info, **{**beams, "stop_token_ids": list(range(10, 28)), **fine})


def test_ends_that_are_ignored_are_tokens_like_others(info):
    assert admit(info, min_tokens=1, allowed_token_ids=[1, 2], ignore_eos=True)


def test_a_bias_forbids_nothing(info):
    assert admit(info, min_tokens=3, logit_bias={i: -100.0 for i in range(VOCAB) if i not in (1, 2)})


def test_large_masks_are_checked_in_no_time(info):
    """Some 130,000 ids a list, as many as a body may hold: what is done for each of them in Python shows here."""
    most = 2**17
    large = dataclasses.replace(info, model_config=dataclasses.replace(model_config(), vocab_size=most + 8))
    masks = {"allowed_token_ids": list(range(most)), "bad_token_ids": list(range(8, most + 8))}
    params = make_params({**masks, "min_tokens": 2, "max_tokens": 4}, large)
    started = time.perf_counter()
    check_params(params, large)
    assert time.perf_counter() - started < 1.0
    requests = [make_request([5], params, large, request_id=str(i)) for i in range(2000)]
    assert all(request.params is params for request in requests)
    assert time.perf_counter() - started < 2.0


def test_empty_prompt_and_too_many_logprobs(info):
    assert refused(info, []).param == "prompt"
    assert refused(info, logprobs=6).param == "logprobs"
    assert refused(info, prompt_logprobs=6).param == "prompt_logprobs"
    assert admit(info, logprobs=5)


@pytest.mark.parametrize(
    ("default", "num_prompt", "params", "expected"),
    [
        (60, 10, {}, 60),
        (60, 50, {}, 50),  # no more than there is room for
        (100, 1, {}, 99),
        (3, 10, {"min_tokens": 20}, 20),  # the client asked for 20, nobody for 3
        (60, 95, {"min_tokens": 5}, 5),
        (60, 10, {"max_tokens": 70}, 70),  # the client's word counts
        (0, 10, {}, 90),  # says nothing
        (60, 10, {"use_beam_search": True, "n": 2}, 60),
        (60, 49, {"n": 4}, 31),  # what the pool holds of four: three shared pages, two more for each
    ],
)
def test_a_default_of_max_tokens_is_a_bound(info, default, num_prompt, params, expected):
    bounded = dataclasses.replace(info, default_sampling={**info.default_sampling, "max_tokens": default}, num_pages=12)
    assert make_request([1] * num_prompt, make_params(params, bounded), bounded, request_id="a").max_tokens == expected


def test_a_default_of_the_callers_own_is_a_bound_too(info):
    def most(num_prompt, **params):
        return make_request([1] * num_prompt, make_params(params, info), info, request_id="a", default_max_tokens=16).max_tokens

    assert [most(10), most(90), most(10, min_tokens=20), most(10, max_tokens=40)] == [16, 10, 20, 40]


def test_max_tokens_beyond_the_context_may_be_cut(info):
    """As vLLM's ``LLM`` does; its server refuses it, and so does ours."""

    def most(num_prompt, **params):
        return make_request([1] * num_prompt, SamplingParams(**params), info, request_id="a", refuse_excess=False).max_tokens

    assert [most(10, max_tokens=91), most(99, max_tokens=500), most(99), most(10, max_tokens=90)] == [90, 1, 1, 90]
    with pytest.raises(RequestError, match="min_tokens 11"):
        most(90, max_tokens=20, min_tokens=11)
    with pytest.raises(RequestError, match="at least one is for the output"):
        most(100, max_tokens=1)


def test_a_prompt_alone(info):
    request = admit(info, [1] * 99, max_tokens=0)
    assert (request.max_tokens, request.params.max_tokens) == (1, 0)  # a token is computed, and dropped
    assert refused(info, [1] * 100, max_tokens=0).code == "context_length_exceeded"
    assert refused(info, max_tokens=0, min_tokens=1).param == "min_tokens"


def test_a_prompt_is_cut_on_the_left(info):
    def kept(length, count, **params):
        return admit(info, range(length), truncate_prompt_tokens=count, **params).prompt

    assert kept(40, 3) == (37, 38, 39)
    assert kept(40, 40) == kept(40, 41) == tuple(range(40))
    assert kept(40, -1) == tuple(range(40))  # has room
    assert kept(200, -1, max_tokens=30) == tuple(range(130, 200))
    assert kept(200, -1, max_tokens=None) == tuple(range(101, 200))
    assert kept(200, -1, max_tokens=None, min_tokens=8) == tuple(range(108, 200))
    assert kept(200, -1, max_tokens=0) == tuple(range(101, 200))
    assert refused(info, range(200), truncate_prompt_tokens=-1, max_tokens=100).param == "max_tokens"
    for bad in (0, -2, 2**31):
        error = refused(info, truncate_prompt_tokens=bad)
        assert error.param == "truncate_prompt_tokens" and "not 0" in str(error)


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


def test_a_script_made_for_vllm_finds_its_parameters():
    params = SamplingParams(seed=None, detokenize=True, logit_bias={5: 1.0}, temperature=None, top_p=None)
    assert (params.temperature, params.top_p, params.max_tokens) == (1.0, 1.0, 16)
    copied = params.clone()
    assert copied == params and copied is not params and copied.logit_bias is not params.logit_bias
    assert dataclasses.replace(copied, n=2).n == 2
    anyway = {"bad_words": [], "flat_logprobs": False, "spaces_between_special_tokens": True, "extra_args": {}, "logits_processors": ()}
    assert SamplingParams(**anyway, structured_outputs=None) == SamplingParams()


@pytest.mark.parametrize(("name", "neutral"), NEUTRAL_PARAMS.items())
def test_what_vllm_has_and_we_lack_is_refused_by_name(name, neutral):
    for value in (None, *neutral):
        assert SamplingParams(**{name: value}) == SamplingParams()
    for value in ("x", 1, ["a"], {"a": 1}, not neutral[0] if neutral and isinstance(neutral[0], bool) else 0.5):
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{name: value})
        assert caught.value.param == name and name in str(caught.value) and caught.value.code == "unsupported_parameter"
    with pytest.raises(TypeError, match="no_such_thing"):
        SamplingParams(no_such_thing=1)


def test_stop_strings_need_text():
    with pytest.raises(RequestError, match="detokenize") as caught:
        SamplingParams(stop=["x"], detokenize=False)
    assert caught.value.param == "stop"
    assert SamplingParams(stop_token_ids=[5], detokenize=False, stop=[])
