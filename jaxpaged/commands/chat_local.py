"""A model that ``jaxpaged chat`` loads into its own process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Generator, Iterator
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
    """A model in this process. Its event loop runs while an answer is made and rests while a person types, so Ctrl-C means either.

    Args:
        runner: Runs the loop that the engine delivers to.
        engine: Ready.
        info: What is fixed about it.
        sampling: Request fields that hold for each answer.
    """

    def __init__(self, runner: asyncio.Runner, engine: AsyncEngine, info: EngineInfo, sampling: dict[str, Any]) -> None:
        self._runner = runner
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
        pieces = self._pieces(messages)
        try:
            while (piece := self._runner.run(_next(pieces))) is not None:
                yield piece
        finally:
            self._runner.run(_close(pieces))

    async def _pieces(self, messages: list[Message]) -> AsyncIterator[Piece]:
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
    with asyncio.Runner() as runner:
        try:
            engine.start(runner.get_loop())
            yield LocalModel(runner, engine, runner.run(engine.wait_ready()), sampling)
        except EngineStopped as error:
            raise ConfigError(str(error)) from error
        except KeyboardInterrupt:
            engine.stop(_STOP_S)
            if engine.status.state not in ("stopped", "failed"):
                _leave()
            raise
        finally:
            engine.stop(_STOP_S)


def _leave() -> None:
    """Ends the process at once: the engine's thread is deep in a compilation, and an orderly exit would wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


async def _next(pieces: AsyncIterator[Piece]) -> Piece | None:
    return await anext(pieces, None)


async def _close(pieces: Any) -> None:
    await pieces.aclose()
