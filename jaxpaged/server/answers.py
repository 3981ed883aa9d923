"""JSON answers and error bodies in OpenAI's shape; the one place where an exception becomes a status."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from jaxpaged.errors import EngineStopped, GenerationError, QueueFull, RequestError

RETRY_AFTER_S = 5
"""What a client is told to wait when the server is starting, recovering or draining."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}

encode = msgspec.json.encode


class RequestTimedOut(Exception):
    """The request ran for longer than the operator allows."""


class Unavailable(EngineStopped):
    """The server takes no work now; its text is written for clients (the engine's own may quote internals)."""


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """An error as the client sees it.

    Attributes:
        status: HTTP status.
        message: For people.
        code: For programs.
        param: The field to blame, or None.
        headers: To send along.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Returns OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Returns the whole answer."""
        return json_response(self.body(), self.status, self.headers)


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Returns an answer with a JSON body."""
    return Response(encode(content), status, headers=dict(headers or {}), media_type="application/json")


def describe(error: BaseException, request_id: str) -> Problem:
    """Says what to answer for an exception; anything that was not raised on purpose gives a constant text."""
    match error:
        case RequestError():
            return Problem(error.status, str(error), error.code, error.param)
        case QueueFull():
            return Problem(429, str(error), "queue_full", headers={"retry-after": str(max(1, error.retry_after_s))})
        case EngineStopped():
            text = str(error) if isinstance(error, Unavailable) else "the engine has stopped; try again later"
            return Problem(503, text, "service_unavailable", headers={"retry-after": str(RETRY_AFTER_S)})
        case RequestTimedOut():
            return Problem(504, str(error), "request_timeout")
        case GenerationError(code="slow_reader"):
            return Problem(408, str(error), "slow_reader")
        case GenerationError(code="numerical_error"):
            return Problem(500, f"the model gave no valid number for this request (request {request_id})", "numerical_error")
        case _:
            return Problem(500, f"internal error; the server's log says more under request {request_id}", "internal_error")
