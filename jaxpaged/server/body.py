"""From the bytes of a request body to a JSON object, distrusting every byte.

``json.loads`` alone accepts NaN, keeps the last of two equal keys, guesses UTF-16, makes strings that cannot be encoded
again, and can be driven into deep recursion. Each of these has taken a server down somewhere; here each is a 400.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from jaxpaged.errors import RequestError

MAX_DEPTH = 32
"""Deepest nesting of arrays and objects in a body."""

MAX_NUMBER_DIGITS = 400
"""Longest run of digits in a number; beyond it Python's conversion is quadratic or refuses."""

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NOT_A_BRACKET = bytes(byte for byte in range(256) if byte not in b"[]{}")
_ONE_BRACKET = bytes.maketrans(b"{}", b"[]")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """Parses a request body.

    Args:
        raw: The whole body, already bounded in size by whoever read it.

    Returns:
        The top-level object. Every string in it is valid Unicode, every number finite.

    Raises:
        RequestError: ``invalid_json`` or ``invalid_unicode``; never another exception, whatever the bytes are.
    """
    if not raw.strip():
        raise RequestError("the request body is empty; send a JSON object", code="invalid_json")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the request body is not valid UTF-8 (byte {error.start})", code="invalid_json") from None
    _check_depth(raw)
    try:
        content = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite_float, parse_int=_bounded_int
        )
    except json.JSONDecodeError as error:
        raise RequestError(f"the request body is not valid JSON: {error.msg} (character {error.pos})", code="invalid_json") from None
    except RecursionError:
        raise RequestError(f"the request body nests deeper than {MAX_DEPTH}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise RequestError(f"the request body must be a JSON object, not {_json_type(content)}", code="invalid_json")
    if _SURROGATE_ESCAPE.search(raw):
        _check_unicode(content)
    return content


def _check_depth(raw: bytes) -> None:
    """Raises if brackets outside of strings nest deeper than MAX_DEPTH; linear, without recursion.

    Each pass over the brackets removes exactly the innermost level, so that what is left after MAX_DEPTH passes is too deep
    (or unbalanced, which the parser words better).
    """
    brackets = _STRING.sub(b"", raw).translate(_ONE_BRACKET, _NOT_A_BRACKET)
    for _ in range(MAX_DEPTH):
        if b"[]" not in brackets:
            break
        brackets = brackets.replace(b"[]", b"")
    if b"[]" in brackets or len(brackets) > MAX_DEPTH:
        raise RequestError(f"the request body nests deeper than {MAX_DEPTH}, or its brackets do not match", code="invalid_json")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise RequestError("the request body has an object with two equal keys", code="invalid_json")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(f"{name} is not JSON", code="invalid_json")


def _finite_float(digits: str) -> float:
    if len(digits) > MAX_NUMBER_DIGITS:
        raise RequestError(f"the request body has a number of more than {MAX_NUMBER_DIGITS} characters", code="invalid_json")
    number = float(digits)
    if not math.isfinite(number):
        raise RequestError("the request body has a number too large for a 64-bit float", code="invalid_json")
    return number


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_NUMBER_DIGITS:
        raise RequestError(f"the request body has a number of more than {MAX_NUMBER_DIGITS} characters", code="invalid_json")
    return int(digits)


def _check_unicode(content: dict[str, Any]) -> None:
    """Raises if any string or key holds half of a surrogate pair (it could not be encoded again)."""
    todo: list[Any] = [content]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                raise RequestError("the request body has a string with half of a surrogate pair", code="invalid_unicode") from None
        elif isinstance(item, dict):
            todo.extend(item)
            todo.extend(item.values())
        elif isinstance(item, list):
            todo.extend(item)


def _json_type(content: object) -> str:
    names: dict[type, str] = {list: "an array", str: "a string", bool: "a boolean", type(None): "null", int: "a number", float: "a number"}
    return names.get(type(content), "something else")
