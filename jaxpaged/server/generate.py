"""Answers one generation call, whole or as a stream.

Everything that can fail for the client's sake or for want of room fails before the first byte, with a status of its own. From
the first byte on, a failure is an ``error`` event and a closed connection without ``[DONE]``.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from starlette.types import Receive, Scope, Send

from jaxpaged.engine.async_engine import AsyncEngine, RequestStream
from jaxpaged.engine.output import Delta, OutputProcessor
from jaxpaged.engine.status import EngineInfo
from jaxpaged.errors import GenerationError
from jaxpaged.scheduling.plan import TokenEvent
from jaxpaged.scheduling.request import FinishReason, Request
from jaxpaged.server.answers import ClientGone, Unavailable, describe, encode
from jaxpaged.server.calls import Call
from jaxpaged.server.gate import log_fault
from jaxpaged.server.protocol import GenerationCall
from jaxpaged.server.render import Choice, Renderer, Usage

logger = logging.getLogger(__name__)

PING_S = 15.0
"""Seconds without a byte after which a stream gets a comment line, so that proxies keep it open."""

EVENTS_AT_ONCE = 64
"""Events of a call that are handled before the event loop turns again."""

RENDERED_AT_ONCE = 4096
"""Token ids and log-probabilities that are rendered in the event loop; what has more of them is rendered in a thread."""

SENT_AT_ONCE = 2**20
"""Bytes of a whole answer that are handed to the connection before it says that it takes more."""

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Generation:
    """The answer to one call, as an ASGI response.

    Args:
        engine: Where requests go.
        info: Of the loaded engine.
        asked: The checked body.
        requests: One per prompt.
        choices: ``n`` per prompt, in order.
        renderer: Makes the bytes.
        call: Its entry in the books.
        timeout_s: The operator's limit; None for none.
        headers: To send along.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        info: EngineInfo,
        asked: GenerationCall,
        requests: Sequence[Request],
        choices: Sequence[Choice],
        renderer: Renderer,
        call: Call,
        *,
        timeout_s: float | None,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        self._engine = engine
        self._asked = asked
        self._requests = requests
        self._outputs = [OutputProcessor(request, info.tokenizer) for request in requests]
        self._choices = choices
        self._renderer = renderer
        self._call = call
        self._timeout_s = timeout_s
        self._headers = list(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the call to its end.

        Raises:
            JaxpagedError: Before the first byte only; the caller turns it into a status.
        """
        writer = _EventWriter(send, self._headers)
        watch = asyncio.create_task(self._watch(receive, writer if self._asked.stream else None))
        streams: list[RequestStream] = []
        try:
            async with self._call.limit(self._timeout_s):
                for request in self._requests:
                    streams.append(self._engine.submit(request, is_blocked=writer.is_blocked))
                for stream in streams:
                    await stream.accepted()
                if self._asked.stream:
                    await self._send_stream(streams, writer)
                else:
                    body = await self._whole(streams)
            watch.cancel()
            if self._asked.stream:
                await writer.end()
            else:
                await _send_whole(send, body, self._headers)
        except ClientGone:
            pass
        except Exception as error:
            if not writer.started:
                raise
            problem = describe(error, self._call.id)
            if problem.code == "internal_error" and not isinstance(error, GenerationError):
                log_fault(error, self._call.id)
            watch.cancel()
            with contextlib.suppress(Exception):
                await writer.write(b"data: " + encode(problem.body()) + b"\n\n")
                await writer.end()
        finally:
            watch.cancel()
            for stream in streams:
                stream.close()

    async def _watch(self, receive: Receive, writer: _EventWriter | None) -> None:
        """Ends the call when the client goes away, and keeps a silent stream alive."""
        while True:
            try:
                message = await asyncio.wait_for(receive(), PING_S / 3)
            except TimeoutError:
                if writer is not None and writer.silent_s >= PING_S:
                    await writer.write(b": ping\n\n")
                continue
            if message["type"] == "http.disconnect":
                self._call.end(ClientGone())
                return

    async def _whole(self, streams: Sequence[RequestStream]) -> bytes:
        async with contextlib.aclosing(self._deltas(streams)) as deltas:
            async for choice, delta in deltas:
                choice.add(delta)
        self._share_prompt_logprobs()
        amount = sum(_amount(choice) for choice in self._choices)
        return await _aside(amount, functools.partial(self._renderer.answer, self._choices, self._usage()))

    async def _send_stream(self, streams: Sequence[RequestStream], writer: _EventWriter) -> None:
        renderer, usage = self._renderer, None
        async with contextlib.aclosing(self._deltas(streams)) as deltas:
            async for choice, delta in deltas:
                choice.prompt_logprobs.extend(delta.prompt_logprobs)
                if not choice.started and not delta.token_ids and delta.finish_reason is None:
                    continue
                if self._asked.continuous_usage:
                    usage = self._usage()
                events = b""
                if not choice.started:
                    choice.started = True
                    self._share_prompt_logprobs()
                    events = await _aside(_amount(choice), functools.partial(renderer.first, choice, usage))
                events += renderer.next(choice, delta, usage)
                if events:
                    await writer.write(events)
        await writer.write((renderer.usage(self._usage()) if self._asked.include_usage else b"") + b"data: [DONE]\n\n")

    async def _deltas(self, streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[Choice, Delta], None]:
        """Yields each choice's news as it comes, until all are finished.

        Raises:
            GenerationError: A sample ended by a fault.
            Unavailable: The engine ended a sample without being asked by us.
        """
        n = len(self._choices) // len(streams)
        async with contextlib.aclosing(_merge(streams)) as events:
            num_events = 0
            async for i, event in events:
                num_events += 1
                if num_events % EVENTS_AT_ONCE == 0:  # events that wait are read without a pause
                    await asyncio.sleep(0)
                output, request = self._outputs[i], self._requests[i]
                delta = output.process(event)
                if delta is None:
                    continue
                if delta.finish_reason is not None and event.finish_reason is None:
                    self._engine.abort(request.id, event.index, reason=FinishReason.STOP)
                for shown in output.release(delta):
                    if shown.finish_reason == "error":
                        raise GenerationError(shown.error or "", code=shown.error_code or "internal_error")
                    if shown.finish_reason == "abort":
                        raise Unavailable("the engine ended this request")
                    yield self._choices[i * n + shown.index], shown
                if delta.finish_reason is not None and all(output.finished for output in self._outputs):
                    return

    def _share_prompt_logprobs(self) -> None:
        """Gives all choices of a prompt its log-probabilities, whichever sample brought them."""
        n = len(self._choices) // len(self._requests)
        for first in range(0, len(self._choices), n):
            siblings = self._choices[first : first + n]
            longest = max((choice.prompt_logprobs for choice in siblings), key=len)
            for choice in siblings:
                if len(choice.prompt_logprobs) < len(longest):
                    choice.prompt_logprobs = list(longest)

    def _usage(self) -> Usage:
        outputs = self._outputs
        return Usage.of(
            sum(output.num_prompt_tokens for output in outputs),
            sum(output.num_output_tokens for output in outputs),
            sum(output.num_cached_tokens for output in outputs),
        )

    def summary(self) -> str:
        """Says what happened in ids, counts and seconds, for the log; never text."""
        usage = self._usage()
        seconds = time.monotonic() - self._call.started_s
        tokens = f"{usage.prompt_tokens} prompt + {usage.completion_tokens} output tokens"
        return f"request {self._call.id}: {len(self._choices)} choices, {tokens}, {seconds:.3f} s"


class _EventWriter:
    """Sends server-sent events; the response begins with the first of them."""

    def __init__(self, send: Send, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._headers = headers
        self._last_s = time.monotonic()
        self._busy = False
        self.started = False

    @property
    def silent_s(self) -> float:
        """Seconds since the last byte was handed over; 0 while some are on their way."""
        return 0.0 if self._busy else time.monotonic() - self._last_s

    def is_blocked(self) -> bool:
        """Whether it waits for the client to take what was sent."""
        return self._busy

    async def write(self, events: bytes) -> None:
        """Sends whole events; waits while the client's buffer is full."""
        self._busy = True
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": [*_STREAM_HEADERS, *self._headers]})
        await self._send({"type": "http.response.body", "body": events, "more_body": True})
        self._last_s = time.monotonic()
        self._busy = False

    async def end(self) -> None:
        """Ends the response."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _amount(choice: Choice) -> int:
    """Returns about how many values the rendering of a choice touches."""
    prompt = sum(1 + len(entry.top) for entry in choice.prompt_logprobs)
    return prompt + len(choice.prompt_token_ids) + len(choice.token_ids) + sum(1 + len(token.top) for token in choice.logprobs)


async def _aside(amount: int, render: Callable[[], bytes]) -> bytes:
    """Renders in a thread if there is much to render, and else at once, which is faster."""
    return render() if amount <= RENDERED_AT_ONCE else await asyncio.to_thread(render)


async def _send_whole(send: Send, body: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    for start in range(0, len(body) - SENT_AT_ONCE, SENT_AT_ONCE):
        await send({"type": "http.response.body", "body": body[start : start + SENT_AT_ONCE], "more_body": True})
    rest = (len(body) - 1) // SENT_AT_ONCE * SENT_AT_ONCE
    await send({"type": "http.response.body", "body": body[rest:], "more_body": False})


async def _merge(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, TokenEvent], None]:
    """Yields the events of all streams as they come, each with its stream's place."""
    if len(streams) == 1:
        async for event in streams[0]:
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, TokenEvent | Exception | None]] = asyncio.Queue(maxsize=len(streams))

    async def pump(i: int, stream: RequestStream) -> None:
        try:
            async for event in stream:
                await queue.put((i, event))
            await queue.put((i, None))
        except Exception as error:
            await queue.put((i, error))

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            i, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield i, item
    finally:
        for task in tasks:
            task.cancel()
