"""Golden bodies and event streams: what a client reads, to the letter."""

import asyncio
import dataclasses
import json

import pytest
from server_fakes import FakeAsyncEngine, byte_tokenizer, replace_info
from server_harness import GOOD, events_of

from jaxpaged.config import TINY_MODEL, ServerConfig
from jaxpaged.engine.output import TokenText
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.server.generate import _EventWriter
from jaxpaged.server.render import Choice, Label, Renderer, Usage

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
# The scripted model says the prompt again: <|im_start|>user\nhi<|im_end|>, where im_end ends it.
REPLY = "user\nhi"


def stable(body):
    assert body["id"].startswith(("chatcmpl-", "cmpl-"))
    assert isinstance(body["created"], int)
    return {key: value for key, value in body.items() if key not in ("id", "created", "system_fingerprint")}


def usage(prompt, completion, cached=0):
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def test_chat(client):
    answer = client.post("/v1/chat/completions", CHAT)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["id"] == "chatcmpl-" + answer.headers["x-request-id"]
    assert stable(answer.json()) == {
        "object": "chat.completion",
        "model": "echo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": REPLY, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": usage(21, 9),
    }


def test_chat_stream(client):
    answer = client.post("/v1/chat/completions", CHAT | {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    events = events_of(answer.text)
    assert events[-1] == "[DONE]"
    assert len({(event["id"], event["created"]) for event in events[:-1]}) == 1
    chunk = {"object": "chat.completion.chunk", "model": "echo", "usage": None}
    piece = {"index": 0, "logprobs": None, "finish_reason": None}
    assert [stable(event) for event in events[:-1]] == [
        chunk | {"choices": [piece | {"delta": {"role": "assistant", "content": ""}}]},
        chunk | {"choices": [piece | {"delta": {"content": "u"}}]},
        chunk | {"choices": [piece | {"delta": {"content": "s"}}]},
        chunk | {"choices": [piece | {"delta": {}, "finish_reason": "length", "stop_reason": None}]},
        chunk | {"choices": [], "usage": usage(21, 3)},
    ]


def test_stream_without_usage_has_no_usage_field(client):
    events = events_of(client.post("/v1/chat/completions", CHAT | {"stream": True}).text)
    assert all("usage" not in event for event in events[:-1])
    assert all(event["choices"] for event in events[:-1])


def test_continuous_usage(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = events_of(client.post("/v1/completions", {"model": "echo", "prompt": "hello", "stream": True, "stream_options": options}).text)
    assert [event["usage"]["completion_tokens"] for event in events[:-1]] == [1, 2, 3, 4, 5, 5, 5]


def test_usage_can_be_forced_by_the_operator(make_client):
    client = make_client(config=ServerConfig(enable_force_include_usage=True))
    events = events_of(client.post("/v1/chat/completions", CHAT | {"stream": True}).text)
    assert events[-2]["usage"]["prompt_tokens"] == 21
    assert "usage" in client.post("/v1/chat/completions", CHAT).json()


def test_completion(client):
    answer = client.post("/v1/completions", {"model": "echo", "prompt": "hello", "max_tokens": 3})
    assert stable(answer.json()) == {
        "object": "text_completion",
        "model": "echo",
        "choices": [{"index": 0, "text": "hel", "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        "usage": usage(5, 3),
    }


def test_completion_has_sixteen_tokens_by_default_or_what_fits(client):
    assert client.post("/v1/completions", {"model": "echo", "prompt": "x" * 30}).json()["usage"]["completion_tokens"] == 16
    assert client.post("/v1/completions", {"model": "echo", "prompt": "x" * 508}).json()["usage"]["completion_tokens"] == 4


def test_all_forms_of_prompt_give_the_same(client):
    ids = client.engine.info.tokenizer.encode("hey")
    for prompt, count in (("hey", 1), (["hey"], 1), (ids, 1), ([ids], 1), (["hey", "hey"], 2), ([ids, ids, ids], 3)):
        answer = client.post("/v1/completions", {"model": "echo", "prompt": prompt}).json()
        assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(i, "hey") for i in range(count)]
        assert answer["usage"]["prompt_tokens"] == 3 * count


def test_several_prompts_and_samples(client):
    body = {"model": "echo", "prompt": ["abc", "de"], "n": 2, "echo": True}
    answer = client.post("/v1/completions", body).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, "abcabc"), (1, "abcabc"), (2, "dede"), (3, "dede")]
    assert answer["usage"] == usage(5, 10)
    texts = dict.fromkeys(range(4), "")
    for event in events_of(client.post("/v1/completions", body | {"stream": True}).text)[:-1]:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == {0: "abcabc", 1: "abcabc", 2: "dede", 3: "dede"}


def test_chat_samples_interleave_by_index(client):
    events = events_of(client.post("/v1/chat/completions", CHAT | {"stream": True, "n": 3}).text)[:-1]
    for index in range(3):
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in own) == REPLY
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
    assert {event["choices"][0]["index"] for event in events[:6]} == {0, 1, 2}


BEST = {0: -0.5, 1: -0.1, 2: -0.9, 3: -0.2}


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", {"prompt": ["hey", "you"]}), ("/v1/chat/completions", CHAT)])
def test_the_best_of_several_come_first_and_all_are_counted(client, path, body):
    client.engine.logprob = BEST.get
    body = {"model": "echo", "n": 3, "best_of": 4, "max_tokens": 3, **body}
    plain = client.post(path, body).json()
    num_prompts = len(body.get("prompt", [0]))
    assert [choice["index"] for choice in plain["choices"]] == list(range(3 * num_prompts))
    assert all(choice["logprobs"] is None for choice in plain["choices"])
    assert plain["usage"]["completion_tokens"] == 4 * 3 * num_prompts
    shown = client.post(path, body | ({"logprobs": 1} if "prompt" in body else {"logprobs": True})).json()
    for number, choice in enumerate(shown["choices"]):
        found = choice["logprobs"].get("token_logprobs") or [entry["logprob"] for entry in choice["logprobs"]["content"]]
        assert found == [(-0.1, -0.2, -0.5)[number % 3]] * 3


def test_best_of_counts_by_token_and_what_failed_comes_last(client):
    client.engine.logprob = {0: -1.0, 1: -0.1, 2: -0.4}.get
    client.engine.fail_at, client.engine.fail_index = (1, "numerical_error"), 1
    body = {"model": "echo", "prompt": "hello", "best_of": 3, "logprobs": 0}
    answer = client.post("/v1/completions", body).json()
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [-0.4] * 5
    client.refused(client.post("/v1/completions", body | {"n": 3}), 500, code="numerical_error")


def test_a_stop_string_ends_one_of_the_samples_of_best_of_in_the_engine_too(client):
    answer = client.post("/v1/completions", {"model": "echo", "prompt": "hello", "best_of": 2, "stop": "ll"}).json()
    assert [(choice["text"], choice["stop_reason"]) for choice in answer["choices"]] == [("he", "ll")]
    assert [index for _, index in client.engine.aborted] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 8


def test_prompt_logprobs_are_the_prompts_whichever_sample_is_best(client):
    client.engine.logprob = BEST.get
    body = {"model": "echo", "prompt": "hey", "echo": True, "logprobs": 1, "best_of": 4, "n": 2, "max_tokens": 1}
    for choice in client.post("/v1/completions", body).json()["choices"]:
        assert choice["logprobs"]["tokens"] == ["h", "e", "y", "h"]


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", {"prompt": ["hello", "you"]}), ("/v1/chat/completions", CHAT)])
def test_beams_come_best_first_and_those_not_returned_are_not_counted(client, path, body):
    more = {"use_beam_search": True, "n": 2, "beam_width": 4, "length_penalty": 0.5, "early_stopping": "never", "max_tokens": 3}
    answer = client.post(path, {"model": "echo", **body, **more}).json()
    texts = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in answer["choices"]]
    assert texts == (["hel", "he", "you", "yo"] if "prompt" in body else ["us", "u"])
    assert answer["usage"]["completion_tokens"] == (10 if "prompt" in body else 5)
    params = client.engine.submitted[-1].params
    assert (params.use_beam_search, params.num_sequences, params.n) == (True, 4, 2)
    assert (params.length_penalty, params.early_stopping) == (0.5, "never")


def test_the_models_sampling_defaults_do_not_keep_anybody_from_beam_search(client):
    replace_info(client.engine, default_sampling={"temperature": 0.6, "top_p": 0.9, "top_k": 5, "max_tokens": 2})
    answer = client.post("/v1/completions", {"model": "echo", "prompt": "hello", "use_beam_search": True})
    assert answer.status_code == 200, answer.text
    client.post("/v1/completions", {"model": "echo", "prompt": "hello"})
    assert [request.params.temperature for request in client.engine.submitted] == [1.0, 0.6]


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", {"model": "echo", "prompt": ["hey", "hey you"]}), ("/v1/chat/completions", CHAT)]
)
def test_cached_tokens_are_counted_whole_and_streamed(client, path, body):
    client.engine.caching = True
    expected = [3, 2 + 6] if "prompt" in body else [0, 20]
    streaming = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    assert [client.post(path, body).json()["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)] == expected
    assert client.post("/reset_prefix_cache", {}).json() == {"status": "ok", "reset": "all"}
    for cached in expected:
        events = events_of(client.post(path, body | streaming).text)[:-1]
        counts = [event["usage"]["prompt_tokens_details"]["cached_tokens"] for event in events]
        assert counts[-1] == cached and counts == sorted(counts)
    assert client.engine.num_resets == 1


def test_chat_logprobs(client):
    body = CHAT | {"max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    logprobs = client.post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]
    assert [entry["token"] for entry in logprobs["content"]] == ["<|im_start|>", "u"]
    first = logprobs["content"][1]
    assert first["bytes"] == [117]
    assert first["logprob"] == -0.5
    assert [(top["logprob"], sorted(top)) for top in first["top_logprobs"]] == [
        (-0.5, ["bytes", "logprob", "token"]),
        (-1.5, ["bytes", "logprob", "token"]),
    ]
    streamed = []
    for event in events_of(client.post("/v1/chat/completions", body | {"stream": True}).text)[:-1]:
        streamed += (event["choices"][0]["logprobs"] or {"content": []})["content"]
    assert streamed == logprobs["content"]
    without = client.post("/v1/chat/completions", CHAT | {"max_tokens": 2, "logprobs": True}).json()["choices"][0]["logprobs"]
    assert [entry["top_logprobs"] for entry in without["content"]] == [[], []]


def test_completion_logprobs_with_echo(client):
    body = {"model": "echo", "prompt": "hey", "max_tokens": 2, "logprobs": 2, "echo": True}
    choice = client.post("/v1/completions", body).json()["choices"][0]
    assert choice["text"] == "heyhe"
    assert choice["logprobs"]["tokens"] == ["h", "e", "y", "h", "e"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"] == [
        None,
        {"e": -0.5, "f": -1.5},
        {"y": -0.5, "z": -1.5},
        {"h": -0.5, "i": -1.5},
        {"e": -0.5, "f": -1.5},
    ]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    streamed = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    text = ""
    for event in events_of(client.post("/v1/completions", body | {"stream": True}).text)[:-1]:
        text += event["choices"][0]["text"]
        for name, values in (event["choices"][0]["logprobs"] or {}).items():
            streamed[name] += values
    assert (text, streamed) == ("heyhe", choice["logprobs"])


ECHOED = {
    "words": ("hey you", {}),
    "an emoji": ("a🙂b日", {}),
    "half a character": (lambda encode: encode("a🙂")[:3], {}),
    "ids of special tokens": (lambda encode: encode("<|endoftext|>hi<|im_start|>you<|im_end|>"), {"ignore_eos": True}),
    "special tokens in a text": ("<|im_start|>hé<|im_end|>", {"ignore_eos": True}),
    "special tokens shown": ("<|im_start|>hé<|im_end|>", {"ignore_eos": True, "skip_special_tokens": False}),
    "a stop string": ("one 🙂 two", {"stop": "🙂 t"}),
    "a stop string that is kept": ("one 🙂 two", {"stop": "🙂 t", "include_stop_str_in_output": True}),
    "several": ("a🙂", {"n": 3}),
    "the best of several": ("a🙂", {"best_of": 3, "n": 2}),
    "several prompts": (lambda encode: [encode("a🙂"), encode("日")[:2]], {"n": 2}),
    "the last of it": ("🙂🙂🙂", {"truncate_prompt_tokens": 6}),
    "the prompt alone": ("a🙂b", {"max_tokens": 0}),
}


@pytest.mark.parametrize("echo", [True, False])
@pytest.mark.parametrize(("prompt", "more"), ECHOED.values(), ids=ECHOED)
def test_text_offsets_are_where_the_tokens_text_begins(client, prompt, more, echo):
    """In streams as in whole answers: offsets never fall, and the text from there on is what the tokens from there on say."""
    tokenizer = client.engine.info.tokenizer
    prompt = prompt if isinstance(prompt, str) else prompt(tokenizer.encode)
    body = {"model": "echo", "prompt": prompt, "echo": echo, "logprobs": 0, "max_tokens": 40, "return_token_ids": True, **more}
    choices = client.post("/v1/completions", body).json()["choices"]
    for choice in choices:
        offsets, ids = choice["logprobs"]["text_offset"], (choice["prompt_token_ids"] if echo else []) + choice["token_ids"]
        assert offsets == sorted(offsets) and len(offsets) == len(ids) == len(choice["logprobs"]["tokens"])
        for token_id, offset, end in zip(ids, offsets, [*offsets[1:], None][: len(ids)], strict=True):
            own, piece = tokenizer.token_text(token_id), choice["text"][offset:end]
            # Nothing where it is left out, or cut off with a stop string; half a character that it ends shows before it.
            assert "\ufffd" in own or piece.lstrip("\ufffd") in (own, "")
    if "best_of" not in more:
        streamed = {}
        for event in events_of(client.post("/v1/completions", body | {"stream": True}).text)[:-1]:
            for piece in event["choices"]:
                seen = streamed.setdefault(piece["index"], {"text": "", "text_offset": [], "tokens": []})
                seen["text"] += piece["text"]
                for name in ("text_offset", "tokens"):
                    seen[name] += (piece["logprobs"] or {name: []})[name]
        assert [streamed[choice["index"]] for choice in choices] == [
            {"text": choice["text"], **{name: choice["logprobs"][name] for name in ("text_offset", "tokens")}} for choice in choices
        ]


def test_offsets_behind_an_emoji_and_behind_special_tokens(client):
    body = {"model": "echo", "logprobs": 0, "echo": True, "max_tokens": 2}
    choice = client.post("/v1/completions", body | {"prompt": "a🙂b"}).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("a🙂ba\ufffd", [0, 1, 1, 1, 1, 2, 3, 4])
    choice = client.post("/v1/completions", body | {"prompt": "<|im_start|>a"}).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("<|im_start|>aa", [0, 12, 13, 13])
    choice = client.post("/v1/completions", body | {"prompt": "<|im_start|>a", "skip_special_tokens": False}).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("<|im_start|>a<|im_start|>a", [0, 12, 13, 25])


def test_echo_is_the_same_with_and_without_logprobs(client):
    for prompt, more in ECHOED.values():
        if isinstance(prompt, str) and "best_of" not in more:
            body = {"model": "echo", "prompt": prompt, "echo": True, **more}
            texts = [
                [choice["text"] for choice in client.post("/v1/completions", body | asked).json()["choices"]]
                for asked in ({}, {"logprobs": 1})
            ]
            assert texts[0] == texts[1]
            if "truncate_prompt_tokens" not in more:
                assert all(text.startswith(prompt) for text in texts[0])


def test_the_chosen_token_is_always_among_the_top_ones(client):
    label = Label(id="x", created=0, model="m", fingerprint="f")
    best = TokenText(1, "a", b"a", -0.1, 1)
    chosen = TokenText(2, "b", b"b", -3.0, 7, (best,))
    choice = Choice(index=0, text=["b"], logprobs=[chosen], finish_reason="stop")
    body = json.loads(
        Renderer(label=label, tokenizer=client.engine.info.tokenizer, chat=False, want_logprobs=True).answer([choice], Usage.of(1, 1, 0))
    )
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.1, "b": -3.0}]


def test_what_lm_eval_sends(client):
    ids = client.engine.info.tokenizer.encode("hello there")
    body = {"model": "echo", "prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    logprobs = client.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(ids) + 1
    assert all(max(top.values()) == value for top, value in zip(logprobs["top_logprobs"][1:], logprobs["token_logprobs"][1:], strict=True))


def test_prompt_logprobs(client):
    text = client.post("/v1/completions", {"model": "echo", "prompt": "hey", "prompt_logprobs": 1}).json()["choices"][0]
    ids = client.engine.info.tokenizer.encode("hey")
    assert text["prompt_logprobs"] == [None] + [
        {str(i): {"logprob": -0.5, "rank": 1, "decoded_token": t}} for i, t in zip(ids[1:], "ey", strict=True)
    ]
    chat = client.post("/v1/chat/completions", CHAT | {"prompt_logprobs": 0}).json()
    assert len(chat["prompt_logprobs"]) == 21
    assert (
        "prompt_logprobs"
        not in client.post("/v1/completions", {"model": "echo", "prompt": "x", "echo": True, "logprobs": 1}).json()["choices"][0]
    )


def test_token_ids(client):
    ids = client.engine.info.tokenizer.encode("hey")
    body = {"model": "echo", "prompt": "hey", "return_token_ids": True}
    choice = client.post("/v1/completions", body).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids, ids)
    events = events_of(client.post("/v1/completions", body | {"stream": True}).text)[:-1]
    assert events[0]["choices"][0]["prompt_token_ids"] == ids
    assert [i for event in events for i in event["choices"][0].get("token_ids", [])] == ids
    chat = client.post("/v1/chat/completions", CHAT | {"return_token_ids": True}).json()
    assert len(chat["prompt_token_ids"]) == 21
    assert len(chat["choices"][0]["token_ids"]) == 9
    names = client.post("/v1/completions", {"model": "echo", "prompt": "hey", "logprobs": 1, "return_tokens_as_token_ids": True}).json()
    assert names["choices"][0]["logprobs"]["tokens"] == [f"token_id:{i}" for i in ids]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client, stream):
    def run(**body):
        answer = client.post("/v1/completions", {"model": "echo", "prompt": "one two three", "stream": stream, **body})
        if not stream:
            return (
                answer.json()["choices"][0]["text"],
                answer.json()["choices"][0]["stop_reason"],
                answer.json()["usage"]["completion_tokens"],
            )
        events = events_of(answer.text)[:-1]
        return "".join(event["choices"][0]["text"] for event in events), events[-1]["choices"][0]["stop_reason"], None

    assert run(stop="two")[:2] == ("one ", "two")
    assert run(stop=["xx", "e t", "two"])[:2] == ("on", "e t")
    assert run(stop="two", include_stop_str_in_output=True)[:2] == ("one two", "two")
    assert run(stop="zzz")[:2] == ("one two three", None)
    assert run(stop="threes")[:2] == ("one two three", None)  # held back to the end, then given
    assert run(stop_token_ids=client.engine.info.tokenizer.encode("t"))[0] == "one "
    assert run(stop="e", min_tokens=6)[:2] == ("one two thr", "e")
    assert not client.engine.running


@pytest.mark.parametrize("text", ["héllo", "日本語", "a🙂b", "👩‍👩‍👧", "e\u0301", "עברית"])
def test_no_half_characters(client, text):
    events = events_of(client.post("/v1/completions", {"model": "echo", "prompt": text, "max_tokens": 40, "stream": True}).text)[:-1]
    pieces = [event["choices"][0]["text"] for event in events]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    cut = client.post("/v1/completions", {"model": "echo", "prompt": text, "max_tokens": 40, "stop": text[1:]}).json()["choices"][0]
    assert cut["text"] == text[:1]


def test_text_parts_and_the_developer_role(client):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    joined = client.post("/tokenize", {"messages": [{"role": "system", "content": "a\nb"}]}).json()["tokens"]
    assert client.post("/tokenize", {"messages": [{"role": "developer", "content": parts}]}).json()["tokens"] == joined


def test_an_assistants_message_comes_back_as_the_client_got_it(client):
    message = client.post("/v1/chat/completions", CHAT).json()["choices"][0]["message"]
    extra = {"tool_calls": None, "function_call": None, "audio": None, "annotations": [], "name": "x"}
    answer = client.post(
        "/v1/chat/completions", CHAT | {"messages": [*CHAT["messages"], message | extra, {"role": "user", "content": "x"}]}
    )
    assert answer.status_code == 200
    assert "x-jaxpaged-ignored-fields" not in answer.headers
    answer = client.post("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": "x", "mood": "good"}]})
    assert answer.headers["x-jaxpaged-ignored-fields"] == "messages.mood"


WITH_TOOLS = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{% if m.name %} {{ m.name }}{% endif %}{{ '\\n' + m.content }}"
    "{% for call in m.tool_calls %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}-{% endif %}{% endif %}"
)


@pytest.fixture
def tool_client(client):
    replace_info(client.engine, tokenizer=byte_tokenizer(WITH_TOOLS))
    return client


def prompt_of(client, **body):
    """The prompt as /tokenize shows it, which is the prompt that a chat gets."""
    tokens = client.post("/tokenize", body)
    assert tokens.status_code == 200, tokens.text
    chat = {key: value for key, value in body.items() if key != "tools"} | (
        {"tools": body["tools"], "tool_choice": "none"} if "tools" in body else {}
    )
    answer = client.post("/v1/chat/completions", {"model": "echo", "max_tokens": 1, "return_token_ids": True} | chat)
    assert answer.json()["prompt_token_ids"] == tokens.json()["tokens"]
    assert answer.headers.get("x-jaxpaged-ignored-fields") == tokens.headers.get("x-jaxpaged-ignored-fields")
    return client.post("/detokenize", {"tokens": tokens.json()["tokens"]}).json()["prompt"], answer.headers.get("x-jaxpaged-ignored-fields")


def test_a_history_with_tool_calls_reaches_the_template(tool_client):
    messages = [
        {"role": "user", "content": "Ulm?", "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "reasoning_content": "look",
            "tool_calls": [{"id": "c1", "type": "function", "index": 0, "function": {"name": "weather", "arguments": '{"city":"Ulm"}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
    ]
    text, ignored = prompt_of(tool_client, messages=messages)
    assert text == (
        '<|im_start|>user ann\nUlm?<|im_end|>\n<|im_start|>assistant(look)\nweather{"city": "Ulm"}<|im_end|>\n'
        "<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ignored is None
    messages[1]["tool_calls"][0] |= {"mood": 1, "function": messages[1]["tool_calls"][0]["function"] | {"strict": True}}
    assert prompt_of(tool_client, messages=messages) == (text, "messages.tool_calls.mood, messages.tool_calls.function.strict")


def test_tools_stay_in_the_template_where_none_may_be_called(tool_client):
    tool = {"type": "function", "function": {"name": "weather", "description": None, "parameters": {"type": "object"}}}
    text, _ = prompt_of(tool_client, messages=CHAT["messages"], tools=[tool])
    assert text.startswith("tools: " + json.dumps([tool]) + "\n<|im_start|>user\nhi")


def test_variables_reach_the_template_and_those_it_does_not_name_are_listed(tool_client):
    silent = {"chat_template_kwargs": {"enable_thinking": False, "mood": "x"}}
    assert prompt_of(tool_client, messages=CHAT["messages"], **silent) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n-",
        "chat_template_kwargs.mood",
    )
    assert tool_client.engine.submitted[-1].prompt[-1] == tool_client.engine.info.tokenizer.encode("-")[0]


def test_special_tokens_in_a_message_are_text(client):
    tokens = client.post("/tokenize", {"messages": [{"role": "user", "content": "<|im_end|>"}]}).json()
    plain = client.post("/tokenize", {"messages": [{"role": "user", "content": "x" * 10}]}).json()
    assert tokens["count"] == plain["count"]
    assert sum(token == 258 for token in tokens["tokens"]) == 1
    answer = client.post("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": "<|im_start|><|endoftext|><|im_end|>"}]})
    assert answer.status_code == 200


def test_tokenize_and_back(client):
    tokens = client.post("/tokenize", {"model": "echo", "prompt": "héy", "return_token_strs": True}).json()
    assert (tokens["count"], tokens["max_model_len"]) == (4, 512)
    assert len(tokens["token_strs"]) == 4
    assert client.post("/detokenize", {"model": "echo", "tokens": tokens["tokens"]}).json() == {"prompt": "héy"}
    assert client.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_continue_final_message(client):
    messages = [*CHAT["messages"], {"role": "assistant", "content": "so"}]
    tokens = client.post("/tokenize", {"messages": messages, "continue_final_message": True}).json()["tokens"]
    assert client.post("/detokenize", {"tokens": tokens}).json()["prompt"].endswith("assistant\nso")
    assert client.post("/v1/chat/completions", CHAT | {"messages": messages, "continue_final_message": True}).status_code == 200


def test_truncate_prompt_tokens(client):
    body = {"model": "echo", "prompt": "x" * 600 + "abc", "truncate_prompt_tokens": 3}
    answer = client.post("/v1/completions", body).json()
    assert (answer["choices"][0]["text"], answer["usage"]["prompt_tokens"]) == ("abc", 3)
    answer = client.post("/v1/completions", body | {"truncate_prompt_tokens": -1, "max_tokens": 12}).json()
    assert answer["usage"]["prompt_tokens"] == 500 and answer["usage"]["completion_tokens"] == 12
    answer = client.post("/v1/completions", body | {"echo": True, "max_tokens": 1}).json()
    assert answer["choices"][0]["text"] == "abca"  # what the model saw
    chat = {"model": "echo", "messages": [{"role": "user", "content": "y" * 700}], "truncate_prompt_tokens": -1}
    assert client.post("/v1/chat/completions", chat).json()["usage"]["prompt_tokens"] == 511
    for path, asked in (("/v1/completions", body), ("/v1/chat/completions", chat)):
        client.refused(client.post(path, asked | {"truncate_prompt_tokens": 0}), 400, param="truncate_prompt_tokens")


@pytest.mark.parametrize("default", [2, 600])
def test_the_models_max_new_tokens_is_a_bound(client, default):
    replace_info(client.engine, default_sampling={"max_tokens": default})
    long = [{"role": "user", "content": "x" * 480}]
    for body in (CHAT, CHAT | {"messages": long}, CHAT | {"max_completion_tokens": None}, CHAT | {"stream": True}):
        assert client.post("/v1/chat/completions", body).status_code == 200
        request = client.engine.submitted[-1]
        assert request.max_tokens == min(default, 512 - len(request.prompt))
    client.post("/v1/chat/completions", CHAT | {"min_tokens": 5})
    assert client.engine.submitted[-1].max_tokens == max(5, min(default, 512 - 21))
    client.post("/v1/chat/completions", CHAT | {"max_tokens": 7})
    assert client.engine.submitted[-1].max_tokens == 7
    error = client.refused(client.post("/v1/chat/completions", CHAT | {"max_tokens": 500}), 400, param="max_tokens")
    assert "500" in error["message"]


def test_the_sixteen_tokens_of_a_completion_are_a_bound(client):
    for length, more, expected in ((3, {}, 16), (505, {}, 7), (3, {"min_tokens": 30}, 30), (3, {"max_tokens": 40}, 40)):
        assert client.post("/v1/completions", {"model": "echo", "prompt": "x" * length, **more}).status_code == 200
        assert client.engine.submitted[-1].max_tokens == expected


def test_requests_of_a_call_share_its_parameters(client):
    client.post("/v1/completions", {"model": "echo", "prompt": ["x", "y", "z" * 505], "allowed_token_ids": [5, 6]})
    first, second, third = client.engine.submitted
    assert first.params is second.params is third.params
    assert (first.max_tokens, third.max_tokens) == (16, 7)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"allowed_token_ids": [258]}, "allowed_token_ids"),  # <|im_end|>, which ends the output
        ({"allowed_token_ids": [258, 7], "stop_token_ids": [7]}, "allowed_token_ids"),
        ({"bad_token_ids": [i for i in range(264) if i != 258]}, "bad_token_ids"),
        ({"stop_token_ids": list(range(264))}, "stop_token_ids"),
    ],
)
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", {"model": "echo", "prompt": ["a", "b"]}), ("/v1/chat/completions", CHAT)])
def test_masks_that_leave_only_ends_are_refused_with_min_tokens(client, path, body, more, param):
    body = body | {"max_tokens": 4, **more}
    error = client.refused(client.post(path, body | {"min_tokens": 2}), 400, param=param)
    assert "min_tokens (2)" in error["message"]
    assert client.post(path, body | {"min_tokens": 0}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_alone(client, stream):
    body = {"model": "echo", "prompt": ["hey", "you"], "max_tokens": 0, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    n = 1 if stream else 2
    answer = client.post("/v1/completions", body | {"echo": True, "logprobs": 1, "n": n})
    events = events_of(answer.text)[:-1] if stream else [answer.json()]
    choices = [choice for event in events for choice in event["choices"]]
    for index, text in enumerate(["hey"] * n + ["you"] * n):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == text
        assert [token for choice in own for token in (choice["logprobs"] or {}).get("tokens", ())] == list(text)
        assert own[-1]["finish_reason"] == "length"
    assert events[-1]["usage"] == usage(6, 0)
    answer = client.post("/v1/completions", body)
    texts = [choice["text"] for event in (events_of(answer.text)[:-1] if stream else [answer.json()]) for choice in event["choices"]]
    assert set(texts) == {""}
    assert client.post("/v1/chat/completions", CHAT | {"max_tokens": 0}).json()["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_the_token_that_ended_the_answer_is_not_in_its_text(client, stream, include, special):
    """As vLLM: the model's end with skip_special_tokens off, or a token of the request's own; ids and log-probabilities keep it."""
    body = CHAT | {"stream": stream, "skip_special_tokens": False, "include_stop_str_in_output": include, "logprobs": True}
    body |= {"return_token_ids": True} | ({} if special else {"stop_token_ids": [client.engine.info.tokenizer.encode("i")[0]]})
    answer = client.post("/v1/chat/completions", body)
    if stream:
        choices = [choice for event in events_of(answer.text)[:-1] for choice in event["choices"]]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
    else:
        choices = answer.json()["choices"]
        text = choices[0]["message"]["content"]
    end = "<|im_end|>" if special else "i"
    kept = "<|im_start|>user\nhi" if special else "<|im_start|>user\nh"
    assert text == kept + (end if include else "")
    tokens = [entry["token"] for choice in choices for entry in (choice["logprobs"] or {}).get("content", ())]
    assert tokens[-1] == end and choices[-1]["finish_reason"] == "stop"
    assert sum(len(choice.get("token_ids") or ()) for choice in choices) == len(tokens)


def test_models(make_client):
    client = make_client(config=ServerConfig(served_model_name=("big", "org/small")))
    data = client.request("GET", "/v1/models").json()["data"]
    assert [(entry["id"], entry["object"], entry["max_model_len"]) for entry in data] == [
        ("big", "model", 512),
        ("org/small", "model", 512),
    ]
    assert client.request("GET", "/v1/models/org/small").json()["id"] == "org/small"
    assert client.post("/v1/completions", {"model": "org/small", "prompt": "x"}).json()["model"] == "org/small"
    client.refused(client.post("/v1/completions", {"model": "echo", "prompt": "x"}), 404)


def test_defaults_of_the_model_apply_where_the_client_says_nothing(client):
    from server_fakes import replace_info

    replace_info(client.engine, default_sampling={"temperature": 0.25, "top_k": 7})
    client.post("/v1/completions", {"model": "echo", "prompt": "x", "temperature": 0.5})
    params = client.engine.submitted[-1].params
    assert (params.temperature, params.top_k) == (0.5, 7)
    client.post("/v1/completions", {"model": "echo", "prompt": "x", "temperature": None})
    assert client.engine.submitted[-1].params.temperature == 0.25


def test_client_ids_never_reach_the_engine(client):
    client.post("/v1/completions", {"model": "echo", "prompt": "x", "request_id": "mine", "user": "me"}, headers={"x-request-id": "mine"})
    assert "mine" not in client.engine.submitted[-1].id


def test_small_routes(client):
    assert client.request("GET", "/load").json() == {"server_load": 0}
    assert set(client.request("GET", "/version").json()) == {"version"}
    assert client.request("GET", "/livez").json() == {"status": "ok"}
    assert client.request("POST", "/ping").status_code == 200
    health = client.request("GET", "/health").json()
    assert set(health) == {"status", "running", "waiting", "last_step_age_s"}


# ------------------------------------------------------------------------------------------------- what the tokenizer's files say

TINY_VOCAB = 2048


@pytest.fixture
def with_tokenizer(tmp_path, make_client):
    """Makes a client of a server whose tokenizer is the tiny model's with other values in its files."""

    def make(pre_tokenizer, **config):
        for name, more in (("tokenizer.json", {"pre_tokenizer": pre_tokenizer}), ("tokenizer_config.json", config)):
            (tmp_path / name).write_text(json.dumps({**json.loads((TINY_MODEL / name).read_text()), **more}))
        engine = FakeAsyncEngine()
        model = dataclasses.replace(engine.info.model_config, vocab_size=TINY_VOCAB)
        replace_info(engine, tokenizer=Tokenizer.load(tmp_path), model_config=model, eos_token_ids=())
        return make_client(engine)

    return make


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


@pytest.mark.parametrize("label", ["LlamaTokenizerFast", "Qwen2Tokenizer"])
def test_a_mislabelled_tokenizer_loses_nothing_anywhere(with_tokenizer, label):
    digits = {"type": "Digits", "individual_digits": True}
    client = with_tokenizer({"type": "Sequence", "pretokenizers": [digits, {**BYTE_LEVEL, "use_regex": True}]}, tokenizer_class=label)
    text = "two  cats,\n\n 1234 mice "
    whole = client.post("/v1/completions", {**GOOD, "prompt": text, "max_tokens": 99}).json()
    assert whole["choices"][0]["text"] == text
    (*chunks, done) = events_of(client.post("/v1/completions", {**GOOD, "prompt": text, "max_tokens": 99, "stream": True}).text)
    assert ("".join(chunk["choices"][0]["text"] for chunk in chunks), done) == (text, "[DONE]")
    ids = client.post("/tokenize", {"prompt": text}).json()["tokens"]
    assert len(ids) == whole["usage"]["prompt_tokens"]
    assert [client.engine.info.tokenizer.token_text(i) for i in ids if client.engine.info.tokenizer.token_text(i).isdigit()] == list("1234")
    assert client.post("/detokenize", {"tokens": ids}).json()["prompt"] == text
    said = client.post("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": text}], "max_tokens": 99}).json()
    assert text in said["choices"][0]["message"]["content"]


def test_a_tokenizer_that_panics_is_an_error_of_one_request(with_tokenizer):
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    client = with_tokenizer({"type": "Sequence", "pretokenizers": [split, {**BYTE_LEVEL, "use_regex": False}]})
    hostile = "x" * 60
    for _ in range(3):  # more often than there are threads
        for path, body in (
            ("/v1/completions", {**GOOD, "prompt": hostile}),
            ("/v1/completions", {**GOOD, "prompt": ["ok", hostile], "stream": True}),
            ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": hostile}]}),
            ("/tokenize", {"prompt": hostile}),
        ):
            client.refused(client.post(path, body), 400, code="tokenizer_failed")
    client.works()


def test_a_slow_reader_has_an_error_of_its_own(client):
    client.engine.fail_at = (1, "slow_reader")
    answer = client.post("/v1/completions", {"model": "echo", "prompt": "abc", "max_tokens": 3, "stream": True})
    assert answer.status_code == 200
    *_, last = answer.text.strip().split("\n\n")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("slow_reader", "timeout_error")


def test_a_writer_is_blocked_while_its_client_takes_nothing():
    async def main():
        gate, sent = asyncio.Event(), []

        async def send(message):
            await gate.wait()
            sent.append(message["type"])

        writer = _EventWriter(send, [])
        assert not writer.is_blocked()
        writing = asyncio.create_task(writer.write(b"data: 1\n\n"))
        await asyncio.sleep(0)
        assert writer.is_blocked() and writer.silent_s == 0.0
        gate.set()
        await writing
        assert not writer.is_blocked() and sent == ["http.response.start", "http.response.body"]

    asyncio.run(main())


def test_a_stream_tells_the_engine_when_its_client_takes_nothing(client):
    """Or a client that never reads would be kept; a whole answer is never blocked."""
    asked, submit = [], client.engine.submit
    client.engine.submit = lambda request, *, is_blocked: (asked.append(is_blocked), submit(request))[1]
    for stream in (True, False):
        assert client.post("/v1/completions", {"model": "echo", "prompt": "a", "max_tokens": 1, "stream": stream}).status_code == 200
    assert [is_blocked.__func__ for is_blocked in asked] == [_EventWriter.is_blocked] * 2
