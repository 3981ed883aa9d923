"""A model that ``jaxpaged chat`` loads into its own process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sys
import threading
from collections.abc import AsyncGenerator, Generator, Iterator
from typing import Any

from jaxpaged.commands.talker import Message, Piece
from jaxpaged.config import EngineConfig
from jaxpaged.engine.admission import make_params, make_request
from jaxpaged.engine.async_engine import AsyncEngine
from jaxpaged.engine.output import OutputProcessor
from jaxpaged.engine.progress import make_progress
from jaxpaged.engine.status import EngineInfo
from jaxpaged.errors import ConfigError, EngineStopped, GenerationError
from jaxpaged.flags import INTERRUPTED

_STOP_S = 2.0
"""Seconds that the engine's thread gets to end; one that is compiling does not notice sooner, and the process need not wait for it."""


class LocalModel:
    """A model in this process. Its event loop has a thread of its own, so that Ctrl-C reaches the main thread, whatever it waits for.

    Args:
        loop: Runs, in another thread; the engine delivers to it.
        engine: Ready.
        info: What is fixed about it.
        sampling: Request fields that hold for each answer.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, engine: AsyncEngine, info: EngineInfo, sampling: dict[str, Any]) -> None:
        self._loop = loop
        self._engine = engine
        self._info = info
        self._sampling = sampling
        self._count = 0

    @property
    def introduction(self) -> str:
        """Name, device and context."""
        info = self._info
        return f"{info.model_name} on {info.platform}, context {info.max_model_len} tokens, ready in {info.load_s:.1f} s"

    def answer(self, messages: list[Message]) -> Generator[Piece, None, None]:
        """Yields the answer piece by piece."""
        pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        making = asyncio.run_coroutine_threadsafe(self._make(messages, pieces), self._loop)
        try:
            while (piece := pieces.get()) is not None:
                yield piece
            making.result()
        finally:
            making.cancel()

    async def _make(self, messages: list[Message], pieces: queue.SimpleQueue[Piece | None]) -> None:
        """Makes an answer and hands it over; cancelling ends it."""
        try:
            async with contextlib.aclosing(self._pieces(messages)) as made:
                async for piece in made:
                    pieces.put(piece)
        finally:
            pieces.put(None)

    async def _pieces(self, messages: list[Message]) -> AsyncGenerator[Piece, None]:
        info = self._info
        self._count += 1
        ids = info.tokenizer.apply_chat_template(messages)
        request = make_request(ids, make_params(self._sampling, info), info, request_id=f"chat-{self._count}", prompt_param="messages")
        output = OutputProcessor(request, info.tokenizer)
        stream = self._engine.submit(request)
        num_tokens = 0
        try:
            async for event in stream:
                delta = output.process(event)
                for shown in () if delta is None else output.release(delta):
                    if shown.error is not None:
                        raise GenerationError(shown.error)
                    num_tokens += len(shown.token_ids)
                    yield Piece(shown.text, num_tokens if shown.finish_reason is not None else None)
                    if shown.finish_reason is not None:
                        return
        finally:
            stream.close()


@contextlib.contextmanager
def load_model(config: EngineConfig, sampling: dict[str, Any]) -> Iterator[LocalModel]:
    """Loads a model, and frees it at the end.

    Raises:
        ConfigError: It cannot be loaded.
    """
    engine = AsyncEngine(config, progress=make_progress())
    with _running_loop() as loop:
        try:
            engine.start(loop)
            info = asyncio.run_coroutine_threadsafe(engine.wait_ready(), loop).result()
            yield LocalModel(loop, engine, info, sampling)
        except EngineStopped as error:
            raise ConfigError(str(error)) from error
        except KeyboardInterrupt:
            engine.stop(_STOP_S)
            if engine.status.state not in ("stopped", "failed"):
                _leave()
            raise
        finally:
            engine.stop(_STOP_S)


@contextlib.contextmanager
def _running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Runs an event loop in a thread; in the end its tasks are cancelled and it is closed."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="jaxpaged-chat", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_end_tasks(), loop).result(_STOP_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_STOP_S)
        if not thread.is_alive():
            loop.close()


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _leave() -> None:
    """Ends the process at once: the engine's thread is deep in a compilation, and an orderly exit would wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)
