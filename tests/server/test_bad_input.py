"""What the table cannot say: rules between fields, prompts, messages, models, sizes, media types, routes."""

import copy
import dataclasses
import time

import pytest
from server_fakes import VOCAB, FakeAsyncEngine, replace_info
from server_harness import events_of

from jaxpaged.config import ServerConfig
from jaxpaged.server.fields import MAX_MESSAGES, MAX_PROMPTS, MAX_TEMPLATE_KWARGS, MAX_TEMPLATE_KWARGS_BYTES, MAX_TOOLS

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"model": "echo", "prompt": "hi", "max_tokens": 2}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def said(**message):
    return {"messages": [message]}


CHAT_CASES = {
    "no messages": ({"messages": []}, "messages"),
    "too many messages": ({"messages": [{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1)}, "messages"),
    "messages are text": ({"messages": "hi"}, "messages"),
    "messages are an object": ({"messages": {"role": "user", "content": "x"}}, "messages"),
    "message is text": ({"messages": ["hi"]}, "messages[0]"),
    "message is null": ({"messages": [None]}, "messages[0]"),
    "no role": (said(content="x"), "messages[0].role"),
    "unknown role": (said(role="robot", content="x"), "messages[0].role"),
    "role in the wrong case": (said(role="User", content="x"), "messages[0].role"),
    "role is a number": (said(role=1, content="x"), "messages[0].role"),
    "role is a list": (said(role=["user"], content="x"), "messages[0].role"),
    "no content": (said(role="user"), "messages[0].content"),
    "content null": (said(role="user", content=None), "messages[0].content"),
    "content a number": (said(role="user", content=5), "messages[0].content"),
    "content an empty list": (said(role="user", content=[]), "messages[0].content"),
    "content an object": (said(role="user", content={"type": "text", "text": "x"}), "messages[0].content"),
    "part is text": (said(role="user", content=["x"]), "messages[0].content[0]"),
    "part without type": (said(role="user", content=[{"text": "x"}]), "messages[0].content[0]"),
    "image part": (said(role="user", content=[{"type": "image_url", "image_url": {"url": "http://x/"}}]), "messages[0].content[0].type"),
    "audio part": (said(role="user", content=[{"type": "text", "text": "x"}, {"type": "input_audio"}]), "messages[0].content[1].type"),
    "part with a number": (said(role="user", content=[{"type": "text", "text": 5}]), "messages[0].content[0].text"),
    "part without text": (said(role="user", content=[{"type": "text"}]), "messages[0].content[0].text"),
    "tool calls that the template leaves out": (said(role="assistant", tool_calls=[CALL]), "messages[0].tool_calls"),
    "function call that the template leaves out": (said(role="assistant", function_call=CALL["function"]), "messages[0].function_call"),
    "reasoning that the template leaves out": (said(role="assistant", content="x", reasoning="y"), "messages[0].reasoning"),
    "tool calls of a user": (said(role="user", content="x", tool_calls=[CALL]), "messages[0].tool_calls"),
    "reasoning of a tool": (said(role="tool", content="x", reasoning_content="y"), "messages[0].reasoning_content"),
    "a user's tool_call_id": (said(role="user", content="x", tool_call_id="1"), "messages[0].tool_call_id"),
    "tool_call_id is a number": (said(role="tool", content="x", tool_call_id=1), "messages[0].tool_call_id"),
    "name is a number": (said(role="user", content="x", name=1), "messages[0].name"),
    "name is 4 KB": (said(role="user", content="x", name="x" * 4096), "messages[0].name"),
    "reasoning is a list": (said(role="assistant", content="x", reasoning_content=["y"]), "messages[0].reasoning_content"),
    "tool calls are an object": (said(role="assistant", tool_calls=CALL), "messages[0].tool_calls"),
    "too many tool calls": (said(role="assistant", tool_calls=[CALL] * (MAX_TOOLS + 1)), "messages[0].tool_calls"),
    "reasoning of the wrong kind": (said(role="assistant", content="x", reasoning=[]), "messages[0].reasoning"),
    "an empty function call": (said(role="assistant", content="x", function_call={}), "messages[0].function_call.name"),
    "content an empty object": (said(role="assistant", content={}), "messages[0].content"),
    "a call is text": (said(role="assistant", tool_calls=[CALL, "f"]), "messages[0].tool_calls[1]"),
    "a call of another type": (said(role="assistant", tool_calls=[CALL | {"type": "custom"}]), "messages[0].tool_calls[0].type"),
    "a call's id is a number": (said(role="assistant", tool_calls=[CALL | {"id": 1}]), "messages[0].tool_calls[0].id"),
    "a call without function": (said(role="assistant", tool_calls=[{"id": "1"}]), "messages[0].tool_calls[0].function"),
    "a call without name": (
        said(role="assistant", tool_calls=[{"function": {"arguments": "{}"}}]),
        "messages[0].tool_calls[0].function.name",
    ),
    "an empty name": (said(role="assistant", function_call={"name": ""}), "messages[0].function_call.name"),
    "arguments are a list": (said(role="assistant", function_call={"name": "f", "arguments": [1]}), "messages[0].function_call.arguments"),
    "audio answer": (said(role="assistant", content="x", audio={"id": "1"}), "messages[0].audio"),
    "second message": ({"messages": [{"role": "user", "content": "x"}, {"role": "x"}]}, "messages[1].role"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs"),
    "top_logprobs with false": ({"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
    "continue a user's message": ({"continue_final_message": True}, "continue_final_message"),
    "continue and start": ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    "logprobs as a number": ({"logprobs": 5}, "logprobs"),
    "tools": ({"tools": [TOOL]}, "tools"),
    "tools of one's own choice": ({"tools": [TOOL], "tool_choice": "auto"}, "tools"),
    "a tool that must be called": ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
    "tools are an empty object": ({"tools": {}}, "tools"),
    "variables are an empty list": ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    "tools are an object": ({"tools": TOOL, "tool_choice": "none"}, "tools"),
    "too many tools": ({"tools": [TOOL] * (MAX_TOOLS + 1), "tool_choice": "none"}, "tools"),
    "a tool is text": ({"tools": ["f"], "tool_choice": "none"}, "tools[0]"),
    "a tool of another type": ({"tools": [TOOL, TOOL | {"type": "custom"}], "tool_choice": "none"}, "tools[1]"),
    "a tool without function": ({"tools": [{"type": "function"}], "tool_choice": "none"}, "tools[0]"),
    "a tool without name": ({"tools": [{"type": "function", "function": {}}], "tool_choice": "none"}, "tools[0].function.name"),
    "parameters are text": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}], "tool_choice": "none"},
        "tools[0].function.parameters",
    ),
    "variables are text": ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
    "variables are a list": ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    "a variable that is ours": ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    "a special token": ({"chat_template_kwargs": {"eos_token": "x"}}, "chat_template_kwargs"),
    "a variable that is no name": ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
    "too many variables": ({"chat_template_kwargs": {f"v{i}": i for i in range(MAX_TEMPLATE_KWARGS + 1)}}, "chat_template_kwargs"),
    "variables too large": ({"chat_template_kwargs": {"x": "x" * MAX_TEMPLATE_KWARGS_BYTES}}, "chat_template_kwargs"),
}

BOTH_CASES = {
    "stream_options without stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "stream_options as a list": ({"stream": True, "stream_options": [1]}, "stream_options"),
    "stream_options as an empty list": ({"stream": True, "stream_options": []}, "stream_options"),
    "stream_options as text": ({"stream": True, "stream_options": "x"}, "stream_options"),
    "include_usage as text": ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    "continuous as a number": ({"stream": True, "stream_options": {"continuous_usage_stats": 1}}, "stream_options.continuous_usage_stats"),
    "prompt_logprobs in a stream": ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    "min_tokens over max_tokens": ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
    "stop id outside of the vocabulary": ({"stop_token_ids": [VOCAB]}, "stop_token_ids"),
    "bias outside of the vocabulary": ({"logit_bias": {str(VOCAB): 1}}, "logit_bias"),
    "allowed id outside of the vocabulary": ({"allowed_token_ids": [VOCAB]}, "allowed_token_ids"),
    "bad id outside of the vocabulary": ({"bad_token_ids": [VOCAB]}, "bad_token_ids"),
    "no id allowed": ({"allowed_token_ids": []}, "allowed_token_ids"),
    "every allowed id is bad": ({"allowed_token_ids": [1, 2], "bad_token_ids": [2, 1]}, "allowed_token_ids"),
    "every id is bad": ({"bad_token_ids": list(range(VOCAB))}, "bad_token_ids"),
    "best_of under n": ({"n": 3, "best_of": 2}, "best_of"),
    "best_of in a stream": ({"n": 2, "best_of": 3, "stream": True}, "best_of"),
    "a beam search in a stream": ({"use_beam_search": True, "stream": True}, "use_beam_search"),
    "beam_width under n": ({"use_beam_search": True, "n": 3, "beam_width": 2}, "beam_width"),
    "more beams than there may be": ({"use_beam_search": True, "n": 11}, "n"),
    "best_of of beams": ({"use_beam_search": True, "best_of": 2}, "best_of"),
    "beam_width alone": ({"beam_width": 2}, "beam_width"),
    "model is a number": ({"model": 5}, "model"),
    "model is 4 KB": ({"model": "x" * 4096}, "model"),
    "model is empty list": ({"model": []}, "model"),
    "max_tokens beyond the context": ({"max_tokens": 100_000}, "max_tokens"),
}

TEXT_CASES = {
    "empty": ({"prompt": ""}, "prompt"),
    "empty list": ({"prompt": []}, "prompt"),
    "list of an empty list": ({"prompt": [[]]}, "prompt"),
    "list of an empty text": ({"prompt": [""]}, "prompt"),
    "one of two empty": ({"prompt": ["x", ""]}, "prompt"),
    "number": ({"prompt": 5}, "prompt"),
    "object": ({"prompt": {}}, "prompt"),
    "true": ({"prompt": True}, "prompt"),
    "mixed": ({"prompt": ["x", 5]}, "prompt"),
    "mixed lists": ({"prompt": [[1], "x"]}, "prompt"),
    "mixed numbers and lists": ({"prompt": [1, [1]]}, "prompt"),
    "floats": ({"prompt": [1.5]}, "prompt"),
    "digits": ({"prompt": [["1"]]}, "prompt"),
    "booleans": ({"prompt": [True]}, "prompt"),
    "nulls": ({"prompt": [None]}, "prompt"),
    "negative id": ({"prompt": [-1]}, "prompt"),
    "id outside of the vocabulary": ({"prompt": [VOCAB]}, "prompt"),
    "id of 2^31": ({"prompt": [2**31]}, "prompt"),
    "id of 2^63": ({"prompt": [2**63]}, "prompt"),
    "deeper": ({"prompt": [[[1]]]}, "prompt"),
    "too many prompts": ({"prompt": ["x"] * (MAX_PROMPTS + 1)}, "prompt"),
    "too many id lists": ({"prompt": [[1]] * (MAX_PROMPTS + 1)}, "prompt"),
    "too many sequences": ({"prompt": ["x"] * (MAX_PROMPTS // 100), "n": 128}, "n"),
    "too many sequences by best_of": ({"prompt": ["x"] * (MAX_PROMPTS // 100), "n": 2, "best_of": 128}, "best_of"),
    "logprobs as a boolean": ({"logprobs": True}, "logprobs"),
    "ids longer than the context": ({"prompt": [1] * 512}, "prompt"),
    "text longer than the context": ({"prompt": "x" * 600}, "prompt"),
    "text far longer than the context": ({"prompt": "x" * 100_000}, "prompt"),
    "prompt and output longer than the context": ({"prompt": "x" * 500, "max_tokens": 20}, "max_tokens"),
}


def all_cases():
    for path, body, groups in (
        ("/v1/chat/completions", CHAT, (CHAT_CASES, BOTH_CASES)),
        ("/v1/completions", TEXT, (TEXT_CASES, BOTH_CASES)),
    ):
        for group in groups:
            for name, (change, param) in group.items():
                yield pytest.param(path, {**body, **change}, param, id=f"{path}-{name}")


@pytest.mark.parametrize(("path", "body", "param"), list(all_cases()))
def test_refused(shared_client, path, body, param):
    before = len(shared_client.engine.submitted)
    began = time.perf_counter()
    shared_client.refused(shared_client.post(path, body), 400, param=param)
    assert time.perf_counter() - began < 2.0
    assert len(shared_client.engine.submitted) == before
    shared_client.works()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_too_long_says_both_numbers(shared_client, path):
    body = CHAT | {"messages": [{"role": "user", "content": "x" * 600}]} if "chat" in path else TEXT | {"prompt": "x" * 600}
    error = shared_client.refused(shared_client.post(path, body), 400, code="context_length_exceeded")
    assert "512" in error["message"]
    assert "6" in error["message"]


@pytest.mark.parametrize("name", ["Echo", "echo ", "other", "../echo", "/etc/passwd", "echo\n", "x" * 250, ""])
def test_another_model_does_not_exist(shared_client, name):
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", TEXT),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        shared_client.refused(shared_client.post(path, body | {"model": name}), 404, code="model_not_found", param="model")
    if name.strip():
        answer = shared_client.request("GET", f"/v1/models/{name.strip()}x")
        shared_client.refused(answer, 404)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": CHAT["messages"]}, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": CHAT["messages"], "tools": [{}]}, "tools[0]"),
        ("/tokenize", {"messages": CHAT["messages"], "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ("/tokenize", {"messages": [{"role": "assistant", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [VOCAB]}, "tokens"),
        ("/detokenize", {"tokens": [[1]]}, "tokens"),
    ],
)
def test_token_routes(shared_client, path, body, param):
    shared_client.refused(shared_client.post(path, body), 400, param=param)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"nope", "invalid_json"),
        (b"[1]", "invalid_json"),
        (b'{"model": "echo", "model": "echo"}', "invalid_json"),
        (b'{"temperature": NaN}', "invalid_json"),
        (b'{"top_p": 1e999}', "invalid_json"),
        (b'{"prompt": "\\ud800"}', "invalid_unicode"),
        (b'{"stop": ["\\udfff"]}', "invalid_unicode"),
        (b'{"user": "\\ud800"}', "invalid_unicode"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"a":' * 100_000, "invalid_json"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "invalid_json"),
    ],
    ids=lambda item: repr(item)[:20],
)
def test_bodies_that_are_not_json(shared_client, path, raw, code):
    shared_client.refused(shared_client.post(path, raw), 400, code=code)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": ""},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/jsonp"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "application/json", "content-encoding": "br"},
    ],
    ids=str,
)
def test_media_types(shared_client, headers):
    answer = shared_client.request("POST", "/v1/completions", content=b'{"model":"echo","prompt":"ok","max_tokens":2}', headers=headers)
    shared_client.refused(answer, 415, code="unsupported_media_type")


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"', "application/vnd.x+json"]
)
def test_media_types_that_are_json(shared_client, kind):
    content = b'{"model":"echo","prompt":"ok","max_tokens":2}'
    answer = shared_client.request(
        "POST", "/v1/completions", content=content, headers={"content-type": kind, "content-encoding": "identity"}
    )
    assert answer.status_code == 200


def test_a_body_may_be_as_large_as_the_limit_and_no_larger(make_client):
    client = make_client(config=ServerConfig(max_body_bytes=4096))
    fits = b'{"model":"echo","prompt":"ok","max_tokens":2}'.ljust(4096)
    assert client.post("/v1/completions", fits).status_code == 200
    answer = client.post("/v1/completions", fits + b" ")
    client.refused(answer, 413, code="request_too_large")
    assert answer.headers["connection"] == "close"

    async def endless():
        for _ in range(100):
            yield b" " * 100

    kind = {"content-type": "application/json"}
    client.refused(client.request("POST", "/v1/completions", content=endless(), headers=kind), 413, code="request_too_large")
    client.refused(client.request("POST", "/v1/completions", content=b"{}", headers=kind | {"content-length": "99999999999"}), 413)
    client.refused(client.request("POST", "/v1/completions", content=b"{}", headers=kind | {"content-length": "-1"}), 413)
    client.works()


ROUTES = {
    "POST": ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/reset_prefix_cache"],
    "GET": ["/v1/models", "/v1/models/echo", "/livez", "/readyz", "/health", "/version", "/load", "/metrics", "/openapi.json"],
}


@pytest.mark.parametrize(("kind", "path"), [(kind, path) for kind, paths in ROUTES.items() for path in paths])
def test_other_methods_are_405_and_say_which(shared_client, kind, path):
    others = {
        "GET": ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"],
        "POST": ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"],
    }
    for method in others[kind]:
        answer = shared_client.request(method, path)
        assert answer.status_code == 405
        assert kind in answer.headers["allow"]
        if method != "HEAD":
            shared_client.refused(answer, 405, code="method_not_allowed")


def test_head_is_answered_where_get_is(shared_client):
    for path in ROUTES["GET"]:
        answer = shared_client.request("HEAD", path)
        assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(
    "path",
    ["/v1", "/v1/", "/v1/embeddings", "/v1/models/", "//v1/models", "/V1/models", "/docs", "/redoc", "/v1/completions/",
     "/metrics/", "/%2e%2e/metrics", "/invocations", "/reset_prefix_cache/", "/v1/models/%00"],
)  # fmt: skip
def test_routes_that_do_not_exist(shared_client, path):
    for method in ("GET", "POST"):
        answer = shared_client.request(method, path)
        assert answer.status_code in (404, 405), answer.text
        shared_client.refused(answer, answer.status_code)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 5}, "n"),
        ({"n": 2, "best_of": 5}, "best_of"),
        ({"use_beam_search": True, "n": 5}, "n"),
        ({"use_beam_search": True, "n": 2, "beam_width": 5}, "beam_width"),
    ],
)
def test_more_sequences_than_a_batch_holds(make_client, path, change, param):
    client = make_client()
    replace_info(client.engine, max_num_seqs=4)
    body = CHAT if "chat" in path else TEXT
    error = client.refused(client.post(path, body | change), 400, param=param)
    assert "4" in error["message"] and "5" in error["message"]
    assert client.post(path, body | {name: min(value, 4) for name, value in change.items()}).status_code == 200


def test_best_of_n_may_be_streamed_where_nothing_is_chosen(shared_client):
    answer = shared_client.post("/v1/completions", TEXT | {"n": 2, "best_of": 2, "stream": True})
    assert {event["choices"][0]["index"] for event in events_of(answer.text)[:-1]} == {0, 1}


def test_no_room_is_429_before_the_first_byte(make_client):
    client = make_client(FakeAsyncEngine(max_calls=1))
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        for stream in (True, False):
            client.engine.max_calls = 0
            answer = client.post(path, body | {"stream": stream})
            client.refused(answer, 429, code="queue_full")
            assert answer.headers["retry-after"] == "7"
            assert answer.headers["content-type"] == "application/json"
    client.engine.max_calls = 2
    client.refused(client.post("/v1/completions", TEXT | {"prompt": ["a", "b", "c"]}), 429)  # the first two are given back
    client.works()


def test_every_refusal_for_want_of_room_is_counted(make_client):
    client = make_client()
    client.engine.max_calls = 0
    for _ in range(3):
        client.refused(client.post("/v1/completions", TEXT), 429, code="queue_full")
    client.engine.max_calls = 1
    client.service._bodies._max_bytes = 0
    large = TEXT | {"prompt": "x" * 200_000}
    for path in ("/v1/completions", "/tokenize"):
        client.refused(client.post(path, large), 429, code="queue_full")
    assert 'jaxpaged:requests_refused_total{engine="0",model_name="echo"} 5.0' in client.request("GET", "/metrics").text


def test_a_refusal_that_comes_late_is_429_all_the_same(make_client):
    client = make_client()
    client.engine.refuse_late = True
    for stream in (True, False):
        answer = client.post("/v1/completions", TEXT | {"stream": stream})
        client.refused(answer, 429, code="queue_full")
        assert answer.headers["retry-after"] == "3"


@pytest.mark.parametrize("state", ["loading", "compiling", "draining", "stopped", "failed"])
def test_not_ready_is_503(make_client, state):
    client = make_client()
    client.engine.state = state
    client.engine.detail = "compiling 9/12" if state == "compiling" else "secret /home/somebody 0xdeadbeef"
    if state in ("loading", "compiling"):
        client.engine.detail = "compiling 9/12"
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", TEXT),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        answer = client.post(path, body)
        client.refused(answer, 503, code="service_unavailable")
        assert int(answer.headers["retry-after"]) > 0
    for path in ("/v1/models", "/v1/models/echo"):
        client.refused(client.request("GET", path), 503)
    client.refused(client.request("POST", "/reset_prefix_cache"), 503)
    assert client.engine.num_resets == 0
    for path in ("/health", "/readyz", "/ping"):
        answer = client.request("GET", path)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == 503
        assert answer.json()["error"]["type"] == "unavailable_error"
        assert "secret" not in answer.text
    if state in ("loading", "compiling"):
        assert client.request("GET", "/health").json()["error"]["message"] == "compiling 9/12"
    assert client.request("GET", "/livez").status_code == 200


def test_what_the_engine_says_when_it_stops_is_not_for_clients(make_client):
    client = make_client()
    client.engine.state = "recovering"
    for stream in (False, True):
        answer = client.post("/v1/completions", TEXT | {"stream": stream})
        client.refused(answer, 503, code="service_unavailable")
        assert "secret" not in answer.text
    assert client.request("GET", "/readyz").status_code == 503


def test_ready_means_that_steps_make_progress(make_client):
    client = make_client()
    assert client.request("GET", "/readyz").json()["status"] == "ready"
    client.engine.stalled_s = 29.0
    assert client.request("GET", "/readyz").status_code == 200
    client.engine.stalled_s = 31.0
    assert client.request("GET", "/readyz").status_code == 503
    assert client.request("GET", "/livez").status_code == 200


@pytest.mark.parametrize("code", ["numerical_error", "internal_error"])
@pytest.mark.parametrize("position", [0, 3])
def test_a_fault_of_ours(make_client, code, position):
    client = make_client()
    client.engine.fail_at = (position, code)
    body = TEXT | {"prompt": "hello", "max_tokens": 9}
    answer = client.post("/v1/completions", body)
    error = client.refused(answer, 500, code=code)
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in error["message"]
    answer = client.post("/v1/completions", body | {"stream": True})
    if position == 0:
        client.refused(answer, 500, code=code)
    else:
        events = events_of(answer.text)
        assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "hel"
        assert events[-1]["error"]["code"] == code
    client.engine.fail_at = None
    client.works()


def test_an_exception_nobody_expected_is_a_constant_500(make_client, caplog):
    client = make_client()

    def explode(request):
        raise RuntimeError("the prompt was: canary")

    client.engine.reply = explode
    for stream in (False, True):
        answer = client.post("/v1/completions", TEXT | {"prompt": "canary", "stream": stream})
        client.refused(answer, 500, code="internal_error")
        assert "canary" not in answer.text
    assert "RuntimeError" in caplog.text
    assert "canary" not in caplog.text
    client.engine.reply = lambda request: request.prompt
    client.works()


def test_the_operators_time_limit(make_client):
    client = make_client(FakeAsyncEngine(step_s=0.05), ServerConfig(request_timeout=0.3))
    body = TEXT | {"prompt": "x" * 100, "max_tokens": 100}
    client.refused(client.post("/v1/completions", body), 504, code="request_timeout")
    events = events_of(client.post("/v1/completions", body | {"stream": True}).text)
    assert events[-1]["error"]["code"] == "request_timeout"
    assert not client.engine.running
    client.works()


def test_a_limit_on_log_probabilities(make_client):
    client = make_client()
    replace_info(client.engine, max_logprobs=3)
    assert client.post("/v1/completions", TEXT | {"logprobs": 3}).status_code == 200
    client.refused(client.post("/v1/completions", TEXT | {"logprobs": 4}), 400, param="logprobs")


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/v1/chat/completions", {"max_completion_tokens": 600}, "max_completion_tokens", "lower max_completion_tokens to 491"),
        ("/v1/chat/completions", {"max_completion_tokens": 600, "max_tokens": 2}, "max_completion_tokens", "lower max_completion_tokens"),
        ("/v1/chat/completions", {"max_completion_tokens": 5, "min_tokens": 6}, "min_tokens", "exceed max_completion_tokens (5)"),
        ("/v1/chat/completions", {"max_tokens": 600}, "max_tokens", "lower max_tokens to 491"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 4}, "top_logprobs", "top_logprobs must be at most 3 here; got 4"),
        ("/v1/chat/completions", {"logprobs": True, "prompt_logprobs": 4, "top_logprobs": 1}, "prompt_logprobs", "prompt_logprobs must"),
        ("/v1/completions", {"prompt_logprobs": 4, "logprobs": 2, "echo": True}, "prompt_logprobs", "prompt_logprobs must be at most 3"),
        ("/v1/completions", {"prompt": [[5] * 500] * 700, "logprobs": 3, "echo": True, "max_tokens": 1}, "logprobs", "(logprobs + 1)"),
    ],
)
def test_an_error_names_the_field_that_was_sent(make_client, path, body, param, words):
    client = make_client()
    replace_info(client.engine, max_logprobs=3)
    error = client.refused(client.post(path, (CHAT if "chat" in path else TEXT) | body), 400, param=param)
    assert words in error["message"]


def test_a_model_without_chat_template(make_client):
    client = make_client()
    tokenizer = client.engine.info.tokenizer
    plain = copy.copy(tokenizer)
    plain._chat_template = None
    client.engine.info = dataclasses.replace(client.engine.info, tokenizer=plain)
    client.refused(client.post("/v1/chat/completions", CHAT), 400, code="no_chat_template", param="messages")
    client.works()
