"""The HTTP/1.1 reader, with the limits that uvicorn leaves open.

httptools accepts heads of any length for any time. Here a head has 10 s and 24 KiB, a request with two framings
(Content-Length and Transfer-Encoding, or several of one) is refused, and a client that stops reading its answer is cut off.
Refusals are OpenAI-shaped and close the connection, so that nothing behind them is parsed as another request.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from jaxpaged.server.answers import Problem, encode
from jaxpaged.server.gate import MAX_HEADER_BYTES, MAX_HEADERS, MAX_URL_BYTES

MAX_HEAD_BYTES = MAX_HEADER_BYTES + MAX_URL_BYTES
"""Longest request line and headers together."""


class GuardedProtocol(HttpToolsProtocol):
    """One connection.

    Attributes:
        HEAD_TIMEOUT_S: A request's head must be complete this long after the connection opened (or its first byte came).
        STALL_TIMEOUT_S: A client that reads nothing for this long, with its buffer full, is cut off.
    """

    HEAD_TIMEOUT_S: ClassVar[float] = 10.0
    STALL_TIMEOUT_S: ClassVar[float] = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refusal: Problem | None = None
        self._in_head = True
        self._completed = False
        self._header_bytes = 0
        self._pending_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the clock of the first head."""
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clocks."""
        self._cancel_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Counts the bytes, and the seconds, of a head that is not complete yet."""
        self._completed = False
        super().data_received(data)
        if not self._in_head or self._completed or self.transport.is_closing():
            return
        self._pending_bytes += len(data)
        if self._pending_bytes > MAX_HEAD_BYTES:
            self._refusal = _HEAD_TOO_LARGE
            self.send_400_response("")
        elif self._head_timer is None:
            self._start_head_timer()

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
        """Refuses a request whose body could be read in two ways, then starts it."""
        self._in_head = False
        self._stop_head_timer()
        # llhttp refuses these itself as configured today; a proxy in front of us may read them differently, so we do not rely on it.
        names = [name for name, _ in self.headers if name in (b"content-length", b"transfer-encoding")]
        if len(names) > 1:
            self._refuse(Problem(400, "a request has one Content-Length or one Transfer-Encoding", "invalid_framing"))
        if any(value.strip().lower() != b"chunked" for name, value in self.headers if name == b"transfer-encoding"):
            self._refuse(Problem(400, "the only Transfer-Encoding is chunked", "invalid_framing"))
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next byte belongs to the next head."""
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
        problem = self._refusal or Problem(400, "not a valid HTTP request", "invalid_http")
        self._cancel_timers()
        if self._answering:
            if self.pipeline or self.cycle.response_started:
                # Another answer is under way on this connection; a second one would corrupt it.
                self.transport.close()
                return
            self.cycle.disconnected = True  # the body of this very request is malformed: nobody waits for its answer
            self.cycle.message_event.set()
        body = encode(problem.body())
        head = b"content-type: application/json\r\ncontent-length: %d\r\nx-request-id: %s\r\nconnection: close\r\n\r\n" % (
            len(body),
            uuid.uuid4().hex.encode(),
        )
        self.transport.write(STATUS_LINE[problem.status] + head + body)
        self.transport.close()

    @property
    def _answering(self) -> bool:
        """Whether an earlier request of this connection is still being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, problem: Problem) -> None:
        """Leaves the parser; httptools passes the exception on as a parser error, which ends in ``send_400_response``."""
        self._refusal = problem
        raise ValueError(problem.code)

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
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


_HEAD_TOO_LARGE = Problem(431, f"at most {MAX_HEADERS} headers of together {MAX_HEADER_BYTES} bytes", "headers_too_large")
