"""From the bytes of a request body to a JSON object, distrusting every byte.

``json.loads`` alone accepts NaN, keeps the last of two equal keys, guesses UTF-16, makes strings that cannot be encoded
again, and can be driven into deep recursion. Each of these has taken a server down somewhere; here each is a 400.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from starlette.types import Receive, Scope

from jaxpaged.errors import QueueFull, RequestError
from jaxpaged.server.answers import ClientGone

MAX_DEPTH = 32
"""Deepest nesting of arrays and objects in a body."""

MAX_NUMBER_DIGITS = 400
"""Longest run of digits in a number; beyond it Python's conversion is quadratic or refuses."""

BODY_S = 60.0
"""Seconds a client may take for the body."""

OWNERS = 4
"""Who has a key, or an address, of his own gets no more than this part of the bodies that are held at once."""

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NOT_A_BRACKET = bytes(byte for byte in range(256) if byte not in b"[]{}")
_ONE_BRACKET = bytes.maketrans(b"{}", b"[]")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class BodyBudget:
    """How many bytes of bodies the server holds at once, over all connections.

    Small bodies always pass, and nobody who sends large ones can keep others from sending theirs.

    Args:
        max_bytes: Most of them; beyond it further bodies are refused until others have been prepared. One owner gets a quarter.
        free_bytes: The first bytes of every body, which are not counted.
    """

    def __init__(self, max_bytes: int, *, free_bytes: int = 0) -> None:
        self._max_bytes = max_bytes
        self._free_bytes = free_bytes
        self._held: collections.Counter[str] = collections.Counter()

    @property
    def held_bytes(self) -> int:
        """Bytes that are counted now."""
        return self._held.total()

    @contextlib.contextmanager
    def account(self, owner: str) -> Iterator[Callable[[int], None]]:
        """Yields a function that takes bytes from the budget; all are given back at the end.

        Args:
            owner: Whose body it is.

        Raises:
            QueueFull: From that function, when the budget, or the owner's part of it, is spent.
        """
        size = own = 0

        def take(count: int) -> None:
            nonlocal size, own
            size += count
            more = max(0, size - self._free_bytes) - own
            if more and (self.held_bytes + more > self._max_bytes or self._held[owner] + more > self._max_bytes // OWNERS):
                raise QueueFull("too many large requests are arriving; try again later", retry_after_s=1)
            own += more
            self._held[owner] += more

        try:
            yield take
        finally:
            self._held[owner] -= own
            if not self._held[owner]:
                del self._held[owner]


async def read_body(scope: Scope, receive: Receive, max_bytes: int, take: Callable[[int], None]) -> bytes:
    """Reads a request body while its size is still allowed.

    Args:
        scope: Of the request.
        receive: Of the request.
        max_bytes: Most bytes; a longer body is refused as soon as that is known, declared or not.
        take: Told of the bytes as they come, see ``BodyBudget``.

    Raises:
        RequestError: 408, 413 or 415.
        QueueFull: From ``take``.
        ClientGone: The client closed the connection.
    """
    headers = dict(scope["headers"])
    _check_type(headers.get(b"content-type", b""), headers.get(b"content-encoding", b"identity"))
    declared = headers.get(b"content-length", b"0")
    if not declared.isdigit() or len(declared) > 20 or int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                take(len(message.get("body", b"")))
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError:
        raise RequestError("the request body did not arrive in time", code="request_timeout", status=408) from None
    return bytes(body)


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


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(f"the request body is larger than {max_bytes} bytes", code="request_too_large", status=413)


def _check_type(content_type: bytes, encoding: bytes) -> None:
    kind, _, parameters = content_type.decode("latin-1").lower().partition(";")
    kind = kind.strip()
    if kind != "application/json" and not re.fullmatch(r"application/[a-z0-9.-]+\+json", kind):
        raise RequestError("the Content-Type must be application/json", code="unsupported_media_type", status=415)
    if "charset" in parameters and not re.search(r"charset=\"?utf-?8\"?", parameters):
        raise RequestError("the charset must be utf-8", code="unsupported_media_type", status=415)
    if encoding.strip().lower() != b"identity":
        raise RequestError("a compressed body is not supported", code="unsupported_media_type", status=415)


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
