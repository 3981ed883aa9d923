"""The HTTP/1.1 reader, with the limits that uvicorn leaves open and the rules of RFC 9110 and 9112 that it does not keep.

httptools accepts heads of any length for any time. Here a head has 10 s and 24 KiB, a request with two framings
(Content-Length and Transfer-Encoding, or several of one) is refused, and a client that stops reading its answer is cut off.
Refusals are OpenAI-shaped and close the connection, so that nothing behind them is parsed as another request.

A request to upgrade the connection (``curl --http2``, a WebSocket) is answered as if it had not asked; a client of HTTP/1.0 gets no
chunks; one that closes its half of the connection behind its request still gets the answer.
"""

from __future__ import annotations

import asyncio
import contextvars
import urllib.parse
import uuid
from collections import deque
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from jaxpaged.server.answers import Problem, encode
from jaxpaged.server.callers import Callers
from jaxpaged.server.gate import MAX_HEADER_BYTES, MAX_HEADERS, MAX_URL_BYTES

MAX_HEAD_BYTES = MAX_HEADER_BYTES + MAX_URL_BYTES
"""Longest request line and headers together."""

_EVERY_HEAD = b"HTTP/1.1 "
"""What the head of every answer begins with."""

_PROBES_S = (0.1, 0.4, 1.5, 5.0, 15.0, 60.0, 180.0, 600.0)
"""Seconds between the bytes of ``_EVERY_HEAD`` that are sent ahead, see ``GuardedProtocol.eof_received``."""


class GuardedProtocol(HttpToolsProtocol):
    """One connection.

    Args:
        callers: Whose browsers may read a refusal.

    Attributes:
        HEAD_TIMEOUT_S: A request's head must be complete this long after the connection opened (or its first byte came).
        STALL_TIMEOUT_S: A client that reads nothing for this long, with its buffer full, is cut off.
    """

    HEAD_TIMEOUT_S: ClassVar[float] = 10.0
    STALL_TIMEOUT_S: ClassVar[float] = 30.0

    def __init__(self, *args: Any, callers: Callers, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._callers = callers
        self._refusal: Problem | None = None
        self._in_head = True
        self._completed = False
        self._header_bytes = 0
        self._pending_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None
        self._open: deque[_Cycle] = deque()  # requests without a whole answer, oldest first
        self._half_closed = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the clock of the first head."""
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clocks, and tells every request of this connection that nobody waits for its answer."""
        self._cancel_timers()
        for cycle in self._open:
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keeps the connection until the answer is sent, if the request in front of the client's last byte is whole.

        TCP does not say whether the client has closed its half only, as ``nc -N`` does, or is gone: that shows when something is sent,
        since the machine of one that is gone refuses it. So the first bytes of the answer's head, which are the same for every
        answer, go out ahead, one at a time; in a stream the next events do the same. TLS has no half-closed connections here.

        Returns:
            Whether the connection stays open for writing.
        """
        if self._half_closed:
            return True
        if not self._answering or self.cycle.more_body or self.scheme == "https":
            return False
        self._half_closed = True
        self.cycle.keep_alive = False
        self._probe()
        return True

    def data_received(self, data: bytes) -> None:
        """Parses; counts the bytes, and the seconds, of a head that is not complete yet."""
        self._unset_keepalive_if_required()
        self._completed = False
        try:
            self._parse(memoryview(data))
        except httptools.HttpParserError as error:
            problem = self._refusal or Problem(400, _explain(data, error), "invalid_http")
            self._refusal = problem
            peer = "{}:{}".format(*self.client) if self.client else "a client"
            self.logger.warning("refused a request of %s with %d: %s", peer, problem.status, problem.message)
            self.send_400_response("")
            return
        if not self._in_head or self._completed or self.transport.is_closing():
            return
        self._pending_bytes += len(data)
        if self._pending_bytes > MAX_HEAD_BYTES:
            self._refusal = _HEAD_TOO_LARGE
            self.send_400_response("")
        elif self._head_timer is None:
            self._start_head_timer()

    def _parse(self, data: memoryview) -> None:
        """Feeds the parser, which stops behind the head of a request that asks for an upgrade: its head is read again without that."""
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as stop:
                head = self._head_without_upgrade()
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self.parser.feed_data(head)
                data = data[stop.args[0] :]

    def _head_without_upgrade(self) -> bytes:
        """Returns the head that was just read, without what asks for an upgrade."""
        lines = [b"%s %s HTTP/%s" % (self.scope["method"].encode(), self.url, self.scope["http_version"].encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b", ".join(option for option in map(bytes.strip, value.split(b",")) if option.lower() != b"upgrade")
            if name != b"upgrade" and (name != b"connection" or value):
                lines.append(b"%s: %s" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        """Starts a head."""
        super().on_message_begin()
        self._in_head = True
        self._header_bytes = self._pending_bytes = 0
        self._start_head_timer()

    def on_url(self, url: bytes) -> None:
        """Bounds the request line."""
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._refuse(Problem(414, f"at most {MAX_URL_BYTES} bytes of URL", "url_too_long"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Bounds the headers."""
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value) + 4
        if len(self.headers) > MAX_HEADERS or self._header_bytes > MAX_HEADER_BYTES:
            self._refuse(_HEAD_TOO_LARGE)

    def on_headers_complete(self) -> None:
        """Refuses a request whose body could be read in two ways, then starts it, or queues it behind those before it."""
        self._in_head = False
        self._stop_head_timer()
        self.scope["method"] = self.parser.get_method().decode("ascii")
        self.scope["http_version"] = self.parser.get_http_version()
        if self.scope["method"] == "CONNECT":
            self._refuse(Problem(400, "this server is no proxy: CONNECT has no answer", "invalid_http"))
        if self.parser.should_upgrade():
            return
        # llhttp refuses these itself as configured today; a proxy in front of us may read them differently, so we do not rely on it.
        names = [name for name, _ in self.headers if name in (b"content-length", b"transfer-encoding")]
        if len(names) > 1:
            self._refuse(Problem(400, "a request has one Content-Length or one Transfer-Encoding", "invalid_framing"))
        if any(value.strip().lower() != b"chunked" for name, value in self.headers if name == b"transfer-encoding"):
            self._refuse(Problem(400, "the only Transfer-Encoding is chunked", "invalid_framing"))
        target = httptools.parse_url(self.url)
        self.scope["raw_path"] = target.path
        self.scope["path"] = urllib.parse.unquote(target.path.decode("ascii"))
        self.scope["query_string"] = target.query or b""
        waiting = self._answering
        old = self.scope["http_version"] == "1.0"
        self.cycle = _Cycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue and not old,
            keep_alive=self.parser.should_keep_alive() and not old,
            on_response=self.on_response_complete,
        )
        self._open.append(self.cycle)
        if waiting:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))
            return
        # A context of its own: asyncio may run a callback in that of another request (cpython issue 140947).
        task = self.loop.create_task(self.cycle.run_asgi(self.app), context=contextvars.Context())
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def on_response_complete(self) -> None:
        """Goes on with the next request."""
        self._open.popleft()
        self._stop_probes()
        super().on_response_complete()
        if self._half_closed:
            self._probe()

    def on_message_complete(self) -> None:
        """The next byte belongs to the next head."""
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._in_head = self._completed = True
        self._pending_bytes = 0

    def pause_writing(self) -> None:
        """Gives a client that does not read a last chance."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.STALL_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answers what cannot become a request, and closes."""
        problem = self._refusal or Problem(400, _NOT_HTTP, "invalid_http")
        self._cancel_timers()
        if self._answering:
            if self.pipeline or self.cycle.response_started:
                # Another answer is under way on this connection; a second one would corrupt it.
                self.transport.close()
                return
            self.cycle.disconnected = True  # the body of this very request is malformed: nobody waits for its answer
            self.cycle.message_event.set()
        body = encode(problem.body())
        origins = [value.decode("latin-1") for name, value in self.headers or () if name == b"origin"]
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("x-request-id", uuid.uuid4().hex),
            ("connection", "close"),
            *self._callers.headers(origins[0] if len(origins) == 1 else None),
        ]
        head = "".join(f"{name}: {value}\r\n" for name, value in headers).encode("latin-1")
        self.transport.write(STATUS_LINE[problem.status] + head + b"\r\n" + body)
        self.transport.close()

    @property
    def _answering(self) -> bool:
        """Whether an earlier request of this connection is still being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, problem: Problem) -> None:
        """Leaves the parser; httptools passes the exception on as a parser error, which ends in ``send_400_response``."""
        self._refusal = problem
        raise ValueError(problem.code)

    def _stop_probes(self) -> None:
        if self._probe_timer is not None:
            self._probe_timer.cancel()
            self._probe_timer = None

    def _probe(self) -> None:
        """Sends the next byte of the answer's head ahead; one that cannot be delivered ends the connection, and so the request."""
        cycle = self._open[0] if self._open else None
        if cycle is None or cycle.response_started or cycle.num_sent_ahead == len(_PROBES_S) or self.transport.is_closing():
            return
        at = cycle.num_sent_ahead
        cycle.num_sent_ahead += 1
        self.transport.write(_EVERY_HEAD[at : at + 1])
        self._probe_timer = self.loop.call_later(_PROBES_S[at], self._probe)

    def _start_head_timer(self) -> None:
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(self.HEAD_TIMEOUT_S, self._head_timed_out)

    def _head_timed_out(self) -> None:
        if self._answering:
            self._start_head_timer()
        elif not self.transport.is_closing():
            self._refusal = Problem(408, f"the request's head took longer than {self.HEAD_TIMEOUT_S:g} s", "request_timeout")
            self.send_400_response("")

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _cancel_timers(self) -> None:
        self._stop_head_timer()
        self._stop_probes()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


class _Cycle(RequestResponseCycle):
    """One request and its answer.

    Attributes:
        num_sent_ahead: Bytes of the answer's head that have been sent already.
    """

    num_sent_ahead = 0
    _ends_with_connection = False

    async def send(self, message: Any) -> None:
        """Sends a part of the answer; to a client of HTTP/1.0 without chunks: the body ends with the connection (RFC 9112, 6.3)."""
        if message["type"] == "http.response.start":
            if self.scope["http_version"] == "1.0" and not any(name.lower() == b"content-length" for name, _ in message["headers"]):
                self._ends_with_connection = True
                self.chunked_encoding = False
            transport, self.transport = self.transport, _Rest(self)  # type: ignore[assignment]
            try:
                await super().send(message)
            finally:
                self.transport = transport
            return
        if self._ends_with_connection:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


class _Rest:
    """A transport for the head of an answer that leaves out what has been sent ahead."""

    def __init__(self, cycle: _Cycle) -> None:
        self._cycle = cycle
        self._transport = cycle.transport

    def write(self, data: bytes) -> None:
        self._transport.write(data[self._cycle.num_sent_ahead :])

    def is_closing(self) -> bool:
        return self._transport.is_closing()


def _explain(data: bytes, error: httptools.HttpParserError) -> str:
    """Says in constant words why bytes are not a request."""
    if data.startswith(b"\x16\x03"):
        return "this port speaks plain HTTP, and a client began with TLS; use http:// or start the server with --ssl-certfile"
    if data.startswith(b"PRI * HTTP/2"):
        return "this server speaks HTTP/1.1, and a client began with HTTP/2"
    cause = "" if isinstance(error, httptools.HttpParserCallbackError) else f": {error}"
    return _NOT_HTTP + cause[:80]


_NOT_HTTP = "not a valid HTTP request"
_HEAD_TOO_LARGE = Problem(431, f"at most {MAX_HEADERS} headers of together {MAX_HEADER_BYTES} bytes", "headers_too_large")
