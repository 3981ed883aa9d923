"""Every field of every endpoint, walked along its edges: the cases are made from the same table as the parser."""

import math

import pytest
from server_harness import BODIES

from jaxpaged.scheduling.fields import MAX_STOP_CHARS
from jaxpaged.server.fields import ENDPOINTS, MAX_LABEL_CHARS

WRONG = {
    "int": ["5", 1.5, 1e300, True, [], {}, "", [1], 2**63, -(2**63) - 1, 10**30],
    "float": ["0.5", True, [], {}, "", 10**30],
    "bool": ["true", 0, 1, "", [], {}, 1.0],
    "early_stopping": ["true", "Never", "", 0, 1, 1.0, [], {}],
    "string": [1, True, [], {}, ["x"], 1.5, "x" * (MAX_LABEL_CHARS + 1), "é" * (MAX_LABEL_CHARS + 1)],
    "int_list": ["5", 5, True, {}, [1.5], ["5"], [True], [None], [[1]], [2**31], [-1]],
    "string_list": [5, True, {}, [""], "", [5], [None], [["x"]], "x" * (MAX_STOP_CHARS + 1), ["x" * (MAX_STOP_CHARS + 1)]],
    "bias_map": [
        "x",
        5,
        [],
        [1],
        True,
        {"x": 1},
        {"1.0": 1},
        {"-1": 1},
        {"01": 1},
        {"": 1},
        {"1": "x"},
        {"1": True},
        {"1": None},
        {"9" * 11: 1},
    ],
}
SPECIAL = {"model", "messages", "prompt", "stream_options", "tokens", "tools", "chat_template_kwargs"}
"""Fields with rules of their own; test_bad_input.py has their cases."""


def beyond(spec):
    """Values just outside of the bounds."""
    step = 1 if spec.kind in ("int", "int_list") else 1e-6
    values = []
    if spec.low is not None:
        values.append(spec.low if spec.low_open else spec.low - step)
    if spec.high is not None:
        values.append(spec.high + step)
    values += spec.forbidden
    if spec.kind == "bias_map":
        return [{"1": value} for value in values] + [{str(i): 0 for i in range(spec.max_items + 1)}]
    if spec.kind == "int_list":
        return [[value] for value in values] + [[1] * (spec.max_items + 1)]
    if spec.kind == "string_list":
        return [["x"] * (spec.max_items + 1)]
    return values


def within(spec):
    """Values on the bounds, and ordinary ones; small enough for the scripted engine's context."""
    match spec.kind:
        case "bool":
            return [True, False]
        case "early_stopping":
            return [True, False, "never"]
        case "string":
            return ["", "x" * MAX_LABEL_CHARS, "👍" * MAX_LABEL_CHARS]
        case "string_list":
            return ["x", ["x"], ["x"] * spec.max_items, "👍" * MAX_STOP_CHARS, []]
        case "int_list":
            return [[0], [5, 6, 5]]
        case "bias_map":
            return [{}, {"0": spec.low, "5": spec.high, "6": 0.5}]
    low, high = spec.low, min(spec.high, {"max_tokens": 9, "max_completion_tokens": 9, "min_tokens": 2}.get(spec.name, spec.high))
    if spec.low_open:
        low = math.nextafter(low, math.inf)
    return [low, high] if spec.kind == "int" else [low, high, (low + high) / 2]


def cases():
    for path, fields in ENDPOINTS.items():
        for field in fields:
            if field.spec is None or field.name in SPECIAL:
                continue
            values = WRONG[field.spec.kind] if field.name != "seed" else ["5", 1.5, True]
            for value in [*values, *beyond(field.spec)]:
                yield pytest.param(path, field, value, id=f"{path}-{field.name}-{repr(value)[:30]}")


@pytest.mark.parametrize(("path", "field", "value"), list(cases()))
def test_a_bad_value_is_a_400_that_names_the_field(shared_client, path, field, value):
    error = shared_client.refused(shared_client.post(path, BODIES[path] | {field.name: value}), 400, param=field.name)
    assert field.name in error["message"]
    assert error["type"] == "invalid_request_error"


def good_cases():
    for path, fields in ENDPOINTS.items():
        for field in fields:
            if field.spec is not None and field.name not in SPECIAL:
                for value in [None, *within(field.spec)]:
                    yield pytest.param(path, field, value, id=f"{path}-{field.name}-{repr(value)[:30]}")


@pytest.mark.parametrize(("path", "field", "value"), list(good_cases()))
def test_a_good_value_is_accepted(shared_client, path, field, value):
    needs = {
        "top_logprobs": {"logprobs": True},
        "min_tokens": {"max_tokens": 9},
        **{name: {"use_beam_search": True} for name in ("beam_width", "length_penalty", "early_stopping")},
        "continue_final_message": _OPEN if value else _OPEN | {"add_generation_prompt": True},
    }
    body = {k: v for k, v in BODIES[path].items() if k != "prompt" or field.name != "continue_final_message"}
    answer = shared_client.post(path, body | needs.get(field.name, {}) | {field.name: value})
    assert answer.status_code == 200, answer.text
    assert "x-jaxpaged-ignored-fields" not in answer.headers


_OPEN = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "he"}], "add_generation_prompt": False}

UNSUPPORTED = [(path, field) for path, fields in ENDPOINTS.items() for field in fields if field.status == "unsupported"]
NO_EFFECT = [(path, field) for path, fields in ENDPOINTS.items() for field in fields if field.status == "no effect"]


@pytest.mark.parametrize(("path", "field"), UNSUPPORTED, ids=lambda item: item if isinstance(item, str) else item.name)
def test_an_unsupported_field_is_refused_unless_it_asks_for_what_happens_anyway(shared_client, path, field):
    for value in ("x", 5, {"x": 1}, [{"type": "function"}], 0.5):
        answer = shared_client.post(path, BODIES[path] | {field.name: value})
        shared_client.refused(answer, 400, code="unsupported_parameter", param=field.name)
    empty = () if field.empty_asks else ("", [], {}, {"a": None})
    for value in (None, *field.neutral, *empty):
        answer = shared_client.post(path, BODIES[path] | {field.name: value})
        assert answer.status_code == 200, answer.text
        assert "x-jaxpaged-ignored-fields" not in answer.headers


def test_the_empty_schema_asks_for_something(shared_client):
    for path in ("/v1/chat/completions", "/v1/completions"):
        shared_client.refused(shared_client.post(path, BODIES[path] | {"guided_json": {}}), 400, param="guided_json")


NOTHING = [
    {"response_format": {"type": "text", "json_schema": {"name": "x"}}},
    {"stop": []},
    {"logit_bias": {}},
    {"stream_options": {}},
    {"stream_options": {"include_usage": False}},
    {"stream_options": {"include_usage": None, "include_obfuscation": False}},
    {"stream": True, "stream_options": {}},
    {"stop_token_ids": [], "bad_token_ids": []},
    {"priority": 0.0},
]
NOTHING_OF_CHATS = [
    {"tools": []},
    {"tools": [], "tool_choice": "auto"},
    {"tools": None, "tool_choice": "none"},
    {"function_call": "none", "functions": []},
    {"chat_template_kwargs": {}},
    {"chat_template_kwargs": {"enable_thinking": None}},
    {"modalities": ["text"]},
]
EMPTY_PARTS = [
    *({key: None} for key in ("content", "reasoning_content", "reasoning", "tool_calls", "function_call", "audio", "name", "tool_call_id")),
    *({key: ""} for key in ("content", "reasoning_content", "reasoning", "audio", "name", "tool_call_id")),
    *({key: []} for key in ("content", "tool_calls", "audio", "tool_call_id")),
    *({"audio": value} for value in ({}, {"id": None})),
]


@pytest.mark.parametrize("change", NOTHING, ids=str)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_what_asks_for_nothing_is_taken(shared_client, path, change):
    answer = shared_client.post(path, BODIES[path] | change)
    assert answer.status_code == 200, answer.text
    assert "x-jaxpaged-ignored-fields" not in answer.headers


@pytest.mark.parametrize("change", NOTHING_OF_CHATS, ids=str)
def test_what_asks_for_nothing_in_a_chat_is_taken(shared_client, change):
    answer = shared_client.post("/v1/chat/completions", BODIES["/v1/chat/completions"] | change)
    assert answer.status_code == 200, answer.text
    assert "x-jaxpaged-ignored-fields" not in answer.headers
    assert shared_client.post("/tokenize", BODIES["/tokenize"] | {"tools": [], "chat_template_kwargs": {}}).status_code == 200


@pytest.mark.parametrize("part", EMPTY_PARTS, ids=str)
def test_an_empty_part_of_an_assistants_message_is_no_part(shared_client, part):
    content = {} if "content" in part else {"content": "hm"}
    plain = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content.get("content", "")}]
    expected = shared_client.post("/tokenize", {"messages": plain}).json()
    for message in ({**content, **part}, content):
        answer = shared_client.post("/tokenize", {"messages": [plain[0], {"role": "assistant", **message}]})
        assert answer.status_code == 200, answer.text
        assert answer.json() == expected


@pytest.mark.parametrize("content", [None, "", [], "absent"])
def test_the_result_of_a_tool_may_be_empty(shared_client, content):
    message = {"role": "tool", "tool_call_id": "1"} | ({} if content == "absent" else {"content": content})
    answer = shared_client.post("/v1/chat/completions", BODIES["/v1/chat/completions"] | {"messages": [message]})
    assert answer.status_code == 200, answer.text


GENERATION = [path for path in ENDPOINTS if path.startswith("/v1/")]
ASKING = {"int": 2, "float": 0.5, "int_list": [5], "string_list": ["x"], "bias_map": {"5": 1}, "bool": True, "early_stopping": True}


def with_beams(value):
    """The good fields of one fate beside beam search, with a value that asks for something."""
    for path in GENERATION:
        for field in ENDPOINTS[path]:
            if field.spec is not None and field.spec.goes_with == value:
                yield pytest.param(path, field, ASKING[field.spec.kind], id=f"{path}-{field.name}")


@pytest.mark.parametrize(("path", "field", "value"), list(with_beams("samples")))
def test_a_field_of_sampling_is_refused_in_a_beam_search_unless_it_asks_for_nothing(shared_client, path, field, value):
    error = shared_client.refused(
        shared_client.post(path, BODIES[path] | {"use_beam_search": True, field.name: value}), 400, param=field.name
    )
    assert "use_beam_search" in error["message"]
    if field.name != "allowed_token_ids":
        neutral = field.spec.default if field.spec.default is not None else [] if field.spec.kind.endswith("list") else None
        for asked in (neutral, *field.spec.neutral):
            answer = shared_client.post(path, BODIES[path] | {"use_beam_search": True, field.name: asked})
            assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("path", "field", "value"), list(with_beams("beams")))
def test_a_field_of_beam_search_needs_it(shared_client, path, field, value):
    for extra in ({}, {"use_beam_search": False}):
        error = shared_client.refused(shared_client.post(path, BODIES[path] | extra | {field.name: value}), 400, param=field.name)
        assert "use_beam_search" in error["message"]
    for body in ({"use_beam_search": True, field.name: value}, {field.name: field.spec.default}):
        assert shared_client.post(path, BODIES[path] | body).status_code == 200


@pytest.mark.parametrize(("path", "field"), NO_EFFECT, ids=lambda item: item if isinstance(item, str) else item.name)
def test_a_field_without_effect_changes_nothing(shared_client, path, field):
    plain = _stable(shared_client.post(path, BODIES[path]))
    values = ["x"] if field.spec else [{"a": "b"}, "x", True]
    for value in values:
        answer = shared_client.post(path, BODIES[path] | {field.name: value})
        assert _stable(answer) == plain
        assert "x-jaxpaged-ignored-fields" not in answer.headers


def _stable(answer):
    assert answer.status_code == 200, answer.text
    return {key: value for key, value in answer.json().items() if key not in ("id", "created")}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_required_field_is_named_when_it_is_missing(shared_client, path):
    for field in ENDPOINTS[path]:
        if field.required:
            for body in ({k: v for k, v in BODIES[path].items() if k != field.name}, BODIES[path] | {field.name: None}):
                shared_client.refused(shared_client.post(path, body), 400, code="missing_required_parameter", param=field.name)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_the_table_has_no_field_twice(path):
    names = [field.name for field in ENDPOINTS[path]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", ENDPOINTS)
def test_fields_that_nobody_defines_are_ignored_and_listed(shared_client, path):
    answer = shared_client.post(path, BODIES[path] | {"foo": 1, "x_y-z.1": [2], "bad\r\nname: x": 3, "é": 4})
    assert answer.status_code == 200
    assert answer.headers["x-jaxpaged-ignored-fields"] == "foo, x_y-z.1, ?, ?"
    answer = shared_client.post(path, BODIES[path] | {f"f{i}": i for i in range(100)})
    assert answer.headers["x-jaxpaged-ignored-fields"].endswith("f15, and 84 more")
