"""Bodies that nobody should send: good ones of every route, changed in a few places. Each is made from its number alone."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from jaxpaged.server.fields import ENDPOINTS

Json = Any

_CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
_TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is a page?"}], "name": "ann"},
    {"role": "assistant", "content": None, "tool_calls": [_CALL], "reasoning_content": ""},
    {"role": "tool", "tool_call_id": "c1", "content": "A run of tokens."},
]
_ASK = [{"role": "user", "content": "What is a page?"}]
_TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}}

_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_STREAM: Json = {"stream": True, "stream_options": {"include_usage": True}}

SEEDS: tuple[tuple[str, Json], ...] = (
    (_CHAT, {"model": "tiny", "messages": _ASK, "max_tokens": 2, "logprobs": True, "top_logprobs": 2, "n": 2, "seed": 1}),
    (_CHAT, {"model": "tiny", "messages": _TALK, "max_completion_tokens": 1, "tools": [_TOOL], "tool_choice": "none"}),
    (_CHAT, {"model": "tiny", "messages": _ASK, "max_tokens": 2, **_STREAM, "chat_template_kwargs": {"enable_thinking": False}}),
    (_CHAT, {"model": "tiny", "messages": _ASK, "max_tokens": 1, "response_format": {"type": "text"}, "return_token_ids": True}),
    (_TEXT, {"model": "tiny", "prompt": "A page", "max_tokens": 2, "echo": True, "logprobs": 1, "temperature": 0}),
    (_TEXT, {"model": "tiny", "prompt": [[5, 6], [7]], "max_tokens": 1, "logit_bias": {"5": 1}, "stop": ["a"], "best_of": 2}),
    (_TEXT, {"model": "tiny", "prompt": ["A", "B"], "max_tokens": 2, **_STREAM, "allowed_token_ids": [5, 6], "min_tokens": 1}),
    (_TEXT, {"model": "tiny", "prompt": [9, 8], "max_tokens": 2, "use_beam_search": True, "beam_width": 2, "length_penalty": 0.5}),
    ("/tokenize", {"model": "tiny", "prompt": "A page", "return_token_strs": True}),
    ("/tokenize", {"messages": _TALK, "add_generation_prompt": True, "tools": [_TOOL]}),
    ("/detokenize", {"model": "tiny", "tokens": [1, 2, 3]}),
    ("/reset_prefix_cache", {}),
)
"""Path and body; good ones for the packaged model."""

_NUMBERS: tuple[Json, ...] = (
    *(0, 1, -1, 2, 3, 127, 128, 129, 255, 256, 1023, 1024, 1025, 2**16, 2**31 - 1, 2**31, 2**32, 2**53 + 1),
    *(2**63 - 1, 2**63, -(2**63), 10**30, 0.0, -0.0, 1.0, 0.5, 1e-9, 5e-324, 1.5, 2.0, 3.5, -2.5, 1e16, 1e308, -1e308),
)
_TEXTS = (
    *("", " ", "a", "\x00", "\ufeff", "\ufffd", "\u202e", "e\u0301", "👩‍👩‍👧", "\U0010ffff", "\ufdd0", "日本語", "a\r\nb: c"),
    *("<|im_end|>", "<|im_start|>system\n", "{{ 7 * 7 }}", "%s%n", "__class__", "null", "true", "NaN", "-1", "1e999"),
    *("user", "tool", "assistant", "none", "auto"),
)
_BYTES = (
    *(b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"\xef\xbb\xbf", b'"', b"{", b"}", b"[", b"]", b",", b":"),
    *(b"NaN", b"Infinity", b"-", b"1e999", b"9" * 500, b"[" * 40, b" " * 100, b"/**/"),
)
_TYPES = (
    *("application/json", "application/json; charset=utf-8", "application/json; charset=utf-16", "application/x+json"),
    *("text/plain", "", "a/b;;"),
)
_METHODS = ("POST", "PUT", "PATCH", "DELETE", "GET", "HEAD", "OPTIONS")
_FIELD_NAMES = tuple(sorted({field.name for fields in ENDPOINTS.values() for field in fields}))
_MOST_TOKENS = 4
_MOST_BYTES = 900_000  # a body beyond the server's bound is cut off while it is sent, which a client may see as a broken connection


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A request.

    Attributes:
        method, path: Of the request line.
        content_type: Header; empty for none.
        body: Raw bytes.
    """

    method: str
    path: str
    content_type: str
    body: bytes


def make_mutant(seed: int, number: int) -> Mutant:
    """Returns the request with this number; the same for the same seed."""
    rng = random.Random(f"{seed}/{number}")
    path, body = copy.deepcopy(rng.choice(SEEDS))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 5))):
        body = _change(rng, body)
    raw = json.dumps(_affordable(body), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 3)):
            raw = _change_bytes(rng, raw)
    raw = raw[:_MOST_BYTES]
    method, kind = "POST", "application/json"
    if rng.random() < 0.03:
        kind = rng.choice(_TYPES)
    if rng.random() < 0.02:
        method = rng.choice(_METHODS)
    if rng.random() < 0.02:
        path = rng.choice((path + "/", path.upper(), path + "?a=b", path[:-1], "/v1", "/v1/models/" + path, "/health", "/v1/responses"))
    return Mutant(method, path, kind, raw)


def _affordable(body: Json) -> Json:
    """Keeps what is valid from generating for long: that is a matter of the soak."""
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens", "n", "best_of"):
            if isinstance(body.get(name), int | float) and not isinstance(body[name], bool) and _MOST_TOKENS < body[name] <= 128:
                body[name] = _MOST_TOKENS
        if "messages" in body and body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
            body["max_tokens"] = 1
    return body


def _value(rng: random.Random, depth: int = 0) -> Json:
    """Returns any JSON value, rather an odd one."""
    match rng.randrange(10 if depth < 3 else 7):
        case 0:
            return None
        case 1:
            return rng.random() < 0.5
        case 2 | 3:
            return rng.choice(_NUMBERS)
        case 4:
            return rng.choice(_TEXTS) * rng.choice((1, 1, 1, 2, 300))
        case 5:
            return rng.choice(_TEXTS)
        case 6:
            return "".join(chr(rng.randrange(1, 0xD800)) for _ in range(rng.randrange(8)))
        case 7:
            return [_value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 5)))]
        case 8:
            return {rng.choice((*_TEXTS, *_FIELD_NAMES)): _value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 5)))}
        case _:
            value: Json = _value(rng, 3)
            for _ in range(rng.choice((1, 5, 31, 40))):
                value = [value] if rng.random() < 0.5 else {"a": value}
            return value


def _places(value: Json) -> Iterator[tuple[Json, Any]]:
    """Yields each container and key (or index) within a value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _change(rng: random.Random, body: Json) -> Json:
    """Returns a body with one change."""
    places = list(_places(body)) if isinstance(body, dict | list) else []
    if not places or rng.random() < 0.02:
        return _value(rng)
    change = rng.choice((_replace, _replace, _delete, _add_field, _add_field, _grow, _wrap, _tweak, _tweak, _swap))
    change(rng, body, *rng.choice(places))
    return body


def _replace(rng: random.Random, body: Json, holder: Json, key: Any) -> None:
    holder[key] = _value(rng)


def _delete(rng: random.Random, body: Json, holder: Json, key: Any) -> None:
    del holder[key]


def _add_field(rng: random.Random, body: Json, holder: Json, key: Any) -> None:
    target = holder if isinstance(holder, dict) and rng.random() < 0.3 else body
    if isinstance(target, dict):
        target[rng.choice((*_FIELD_NAMES, *_FIELD_NAMES, *_TEXTS))] = _value(rng)


def _grow(rng: random.Random, body: Json, holder: Json, key: Any) -> None:
    times = rng.choice((2, 3, 17, 130, 1500))
    value = holder[key]
    if isinstance(value, str | list) and len(value) * times < 20_000:
        holder[key] = value * times
    elif isinstance(value, dict):
        value.update({f"k{i}": i for i in range(times)})


def _wrap(rng: random.Random, body: Json, holder: Json, key: Any) -> None:
    holder[key] = rng.choice(([holder[key]], {"value": holder[key]}, [holder[key]] * 2))


def _tweak(rng: random.Random, body: Json, holder: Json, key: Any) -> None:
    """Changes a value into a near one."""
    value = holder[key]
    if isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, int | float):
        holder[key] = rng.choice((value + 1, value - 1, -value, value * 2, float(value), value + 0.5, str(value)))
    elif isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        holder[key] = value[:at] + rng.choice(_TEXTS) + value[at:]
    elif isinstance(value, list):
        rng.shuffle(value)


def _swap(rng: random.Random, body: Json, holder: Json, key: Any) -> None:
    """Puts a value where another was."""
    other, name = rng.choice(list(_places(body)))
    holder[key] = copy.deepcopy(other[name])


def _change_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Returns raw bytes with one change."""
    at = rng.randrange(len(raw) + 1)
    changes: tuple[Callable[[], bytes], ...] = (
        lambda: raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :],
        lambda: raw[:at] + rng.choice(_BYTES) + raw[at:],
        lambda: raw[:at] + raw[at + rng.randrange(1, 9) :],
        lambda: raw[:at],
        lambda: raw + raw,
        lambda: raw.replace(b",", b"," + raw[1:-1] + b",", 1),  # equal keys
        lambda: raw.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "latin-1")), "replace"),
        lambda: b"",
    )
    return rng.choice(changes)()
