"""What every request passes before any route: a name of its own, limits, the host, the origin, the key.

Plain ASGI, default-deny: whatever is not on the short list of open paths needs the key, whether a route exists or not. The
path is the one the router uses (``scope["path"]``), never one rebuilt from headers.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import traceback
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxpaged.server.answers import Problem, describe
from jaxpaged.server.callers import Callers, origin_of
from jaxpaged.server.keys import Keys

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/ping"})
"""Paths that need no key."""

MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 * 1024
MAX_URL_BYTES = 8 * 1024

_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252}))(?::[0-9]{1,5})?")


class Gate:
    """Names each request, refuses malformed ones and those of pages that may not call, and turns what nobody caught into a constant 500.

    Every answer to a page that may call, an error too, has the headers that let the page read it.

    Args:
        app: The next ASGI application.
        callers: Who may call through a browser.
    """

    def __init__(self, app: ASGIApp, *, callers: Callers) -> None:
        self.app = app
        self.callers = callers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = False
        cors = self.callers.headers(origin_of(scope))

        async def send_named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in cors:
                    headers.append(name, value)
            await send(message)

        problem = _check_shape(scope) or self.callers.refuse(scope)
        answer = self.callers.preflight(scope) if problem is None else problem.response()
        if answer is not None:
            await answer(scope, receive, send_named)
            return
        try:
            await self.app(scope, receive, send_named)
        except Exception as error:
            log_fault(error, request_id)
            if not started:
                await describe(error, request_id).response()(scope, receive, send_named)


class RequireKey:
    """Lets only requests with a valid bearer token through, except to ``OPEN_PATHS``, and notes whose they are.

    Requests with the same key are of one tenant (``scope["state"]["tenant"]``) and share the prefix cache. Its name is made from the key
    with a secret of this process, so that nobody can guess it or give it himself, and it says nothing of the key.
    ``scope["state"]["admin"]`` says whether it is an admin's.

    Args:
        app: The next ASGI application.
        keys: Every key that is valid.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys) -> None:
        self.app = app
        known = (*keys.plain, *keys.admin)
        self._digests = [hashlib.sha256(key.encode()).digest() for key in known]
        secret = secrets.token_bytes(32)
        self._tenants = [hmac.new(secret, key.encode(), hashlib.sha256).hexdigest() for key in known]
        self._admins = frozenset(self._tenants[len(keys.plain) :])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        tenant = self._tenant(scope)
        if tenant is not None:
            scope.setdefault("state", {}).update(tenant=tenant, admin=tenant in self._admins)
            await self.app(scope, receive, send)
            return
        problem = Problem(
            401, "a valid API key is needed: Authorization: Bearer <key>", "invalid_api_key", headers={"www-authenticate": "Bearer"}
        )
        await problem.response()(scope, receive, send)

    def _tenant(self, scope: Scope) -> str | None:
        """Returns whose request it is; None without a valid key."""
        values = _values(scope, b"authorization")
        scheme, _, token = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(token.strip()).digest()
        # Every key is compared, so that the time says neither which one matched nor how far.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        found = [tenant for tenant, match in zip(self._tenants, matches, strict=True) if match]
        return found[0] if scheme.lower() == b"bearer" and found else None


def log_fault(error: BaseException, request_id: str) -> None:
    """Logs where an unexpected exception was raised, without its text: that may quote a prompt."""
    frames = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(traceback.extract_tb(error.__traceback__)[-6:]))
    logger.error("request %s failed: %s at %s", request_id, type(error).__name__, frames)


def _check_shape(scope: Scope) -> Problem | None:
    headers = scope["headers"]
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) + 4 for name, value in headers) > MAX_HEADER_BYTES:
        return Problem(431, f"at most {MAX_HEADERS} headers of together {MAX_HEADER_BYTES} bytes", "headers_too_large")
    if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_URL_BYTES:
        return Problem(414, f"at most {MAX_URL_BYTES} bytes of URL", "url_too_long")
    hosts = _values(scope, b"host")
    if len(hosts) != 1 and not (scope.get("http_version") == "1.0" and not hosts):
        return Problem(400, "exactly one Host header is needed", "invalid_host")
    if hosts and not _HOST.fullmatch(hosts[0]):
        return Problem(400, "the Host header is not a host name or address", "invalid_host")
    return None


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]
