"""The raw bytes of a body: whatever they are, an object or a 400."""

import contextlib
import gc
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.errors import QueueFull, RequestError
from jaxpaged.server.body import MAX_DEPTH, OWNERS, BodyBudget, parse_json_object

REFUSED = {
    "empty": (b"", "invalid_json"),
    "blank": (b" \n", "invalid_json"),
    "not json": (b"hello", "invalid_json"),
    "trailing garbage": (b"{} {}", "invalid_json"),
    "trailing comma": (b'{"a": 1,}', "invalid_json"),
    "comment": (b'{"a": 1} // x', "invalid_json"),
    "single quotes": (b"{'a': 1}", "invalid_json"),
    "byte order mark": (b"\xef\xbb\xbf{}", "invalid_json"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "invalid_json"),
    "utf-16 without mark": ('{"a": 1}'.encode("utf-16-le"), "invalid_json"),
    "utf-32": ('{"a": 1}'.encode("utf-32"), "invalid_json"),
    "invalid utf-8": (b'{"a": "\xff"}', "invalid_json"),
    "overlong utf-8": (b'{"a": "\xc0\xaf"}', "invalid_json"),
    "raw surrogate": (b'{"a": "\xed\xa0\x80"}', "invalid_json"),
    "NaN": (b'{"a": NaN}', "invalid_json"),
    "Infinity": (b'{"a": [Infinity]}', "invalid_json"),
    "-Infinity": (b'{"a": -Infinity}', "invalid_json"),
    "too large a float": (b'{"a": 1e999}', "invalid_json"),
    "too long an integer": (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json"),
    "too long a float": (b'{"a": 0.' + b"9" * 5000 + b"}", "invalid_json"),
    "equal keys": (b'{"a": 1, "a": 1}', "invalid_json"),
    "equal keys inside": (b'{"a": [{"b": 1, "b": 2}]}', "invalid_json"),
    "equal keys by escape": (b'{"a": 1, "\\u0061": 1}', "invalid_json"),
    "high surrogate": (b'{"a": "\\ud800"}', "invalid_unicode"),
    "low surrogate": (b'{"a": ["x\\udfff"]}', "invalid_unicode"),
    "surrogates in the wrong order": (b'{"a": "\\udc00\\ud800"}', "invalid_unicode"),
    "surrogate in a key": (b'{"\\ud800": 1}', "invalid_unicode"),
    "array": (b"[]", "invalid_json"),
    "string": (b'"x"', "invalid_json"),
    "null": (b"null", "invalid_json"),
    "number": (b"1", "invalid_json"),
    "true": (b"true", "invalid_json"),
    "unclosed": (b'{"a": 1', "invalid_json"),
    "unclosed string": (b'{"a": "', "invalid_json"),
    "mismatched brackets": (b'{"a": [}]', "invalid_json"),
    "control character": (b'{"a": "\x00"}', "invalid_json"),
    "bad escape": (b'{"a": "\\x"}', "invalid_json"),
    "too deep in arrays": (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "invalid_json"),
    "too deep in objects": (b'{"a": ' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "invalid_json"),
    "a million deep": (b"[" * 10**6, "invalid_json"),
    "a million deep and back": (b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}", "invalid_json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    raw, code = REFUSED[name]
    with pytest.raises(RequestError) as caught:
        parse_json_object(raw)
    assert (caught.value.status, caught.value.code) == (400, code)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "raw",
    [
        b"{}",
        b' {"a": 1} \n',
        b'{"a": "\\ud83d\\ude00"}',
        b'{"a": "\\\\ud800"}',
        b'{"a": "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["}',
        b'{"a": "\\"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["}',
        b'{"a": -0.0, "b": 5e-324, "c": 1e308, "d": 9223372036854775808}',
        b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}",
        b'{"a": [' + b"[]," * 5000 + b"[]]}",
    ],
)
def test_accepted_as_json_says(raw):
    assert parse_json_object(raw) == json.loads(raw)


@given(
    st.dictionaries(
        st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=8)
    )
)
@settings(max_examples=100, deadline=None)
def test_round_trip(content):
    assert parse_json_object(json.dumps(content, ensure_ascii=False).encode()) == content


@given(st.binary(max_size=64) | st.text('{}[]",:\\u0123456789dD89abtrue eE.-+', max_size=64).map(str.encode))
@settings(max_examples=400, deadline=None)
def test_any_bytes_are_an_object_or_a_400(raw):
    try:
        assert isinstance(parse_json_object(raw), dict)
    except RequestError as error:
        assert error.status == 400


@pytest.mark.parametrize(
    "piece", [b'\\"', b"[", b"]", b"{", b'"', b"\\", b"[],", b'{"a":', b"1,"], ids=lambda piece: piece.decode().replace("\\", "backslash")
)
def test_time_is_linear(piece):
    """Twice the bytes must not take four times the time; the quadratic cases of naive scanners are all here."""

    def seconds(count):
        raw = b'{"a": "' + piece * count if piece in (b'\\"', b"\\") else b'{"a": [' + piece * count
        best = 9.0
        for _ in range(4):
            gc.collect()
            gc.disable()  # its passes over a growing heap are not ours to measure
            began = time.thread_time()
            with pytest.raises(RequestError):
                parse_json_object(raw)
            best = min(best, time.thread_time() - began)
            gc.enable()
        return best

    count = 200_000 // len(piece)
    assert seconds(4 * count) < 12 * max(seconds(count), 1e-3)


def test_the_budget_of_bodies_is_shared_by_owners():
    budget = BodyBudget(400, free_bytes=10)
    with contextlib.ExitStack() as stack:
        takes = {owner: stack.enter_context(budget.account(owner)) for owner in "abcde"}
        takes["a"](60)
        takes["a"](50)
        assert budget.held_bytes == 100  # the first ten are free
        with pytest.raises(QueueFull):
            takes["a"](1)
        another = stack.enter_context(budget.account("a"))
        another(10)
        with pytest.raises(QueueFull):
            another(1)
        for owner in "bcd":
            takes[owner](110)
        assert budget.held_bytes == 400 == 100 * OWNERS
        with pytest.raises(QueueFull):
            takes["e"](11)
        stack.enter_context(budget.account("e"))(10)
    assert budget.held_bytes == 0
    with budget.account("a") as take:
        take(110)
