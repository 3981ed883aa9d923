"""``jaxpaged chat [MODEL]``: talk in the terminal, with a model loaded here or, with ``--url``, with a running server.

``--quick TEXT`` asks once and ends. An empty line or Ctrl-D ends a conversation, ``/new`` starts another.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Protocol

from jaxpaged.commands.sampling_flags import add_sampling_flags, read_sampling_flags
from jaxpaged.config import EngineConfig
from jaxpaged.engine.admission import make_params, make_request
from jaxpaged.engine.async_engine import AsyncEngine
from jaxpaged.engine.output import OutputProcessor
from jaxpaged.errors import ConfigError, EngineStopped, GenerationError, RequestError
from jaxpaged.flags import Parser, add_options, read_options

Message = dict[str, str]


class Talker(Protocol):
    """Anything that answers a conversation with a stream of text."""

    def answer(self, messages: list[Message]) -> AsyncIterator[str]:
        """Yields the answer's text piece by piece."""
        ...


class LocalModel:
    """A model loaded in this process."""

    def __init__(self, engine: AsyncEngine, sampling: dict[str, Any]) -> None:
        self._engine = engine
        self._sampling = sampling
        self._count = 0

    async def answer(self, messages: list[Message]) -> AsyncIterator[str]:
        """Yields the answer's text piece by piece."""
        info = await self._engine.wait_ready()
        self._count += 1
        ids = info.tokenizer.apply_chat_template(messages)
        request = make_request(ids, make_params(self._sampling, info), info, request_id=f"chat-{self._count}", prompt_param="messages")
        output = OutputProcessor(request, info.tokenizer)
        stream = self._engine.submit(request)
        try:
            async for event in stream:
                delta = output.process(event)
                for shown in () if delta is None else output.release(delta):
                    yield shown.text
                    if shown.error is not None:
                        raise GenerationError(shown.error)
                    if shown.finish_reason is not None:
                        return
        finally:
            stream.close()


class RemoteModel:
    """A server that speaks OpenAI's chat API."""

    def __init__(self, url: str, api_key: str | None, sampling: dict[str, Any]) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._sampling = sampling

    async def answer(self, messages: list[Message]) -> AsyncIterator[str]:
        """Yields the answer's text piece by piece."""
        model = json.load(self._open("/models"))["data"][0]["id"]
        body = {"model": model, "messages": messages, "stream": True, **self._sampling}
        for line in self._open("/chat/completions", body):
            data = line.decode().removeprefix("data: ").strip()
            if not line.startswith(b"data: ") or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise GenerationError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                yield choice["delta"].get("content") or ""

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            return urllib.request.urlopen(urllib.request.Request(self._url + path, data=data, headers=self._headers))
        except urllib.error.HTTPError as error:
            raise RequestError(_server_message(error)) from error
        except (urllib.error.URLError, OSError) as error:
            raise ConfigError(f"--url {self._url}: {getattr(error, 'reason', error)}") from error


def run(argv: Sequence[str]) -> int:
    """Holds one conversation; returns the exit code."""
    parser = Parser(prog="jaxpaged chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = parser.add_argument_group("chat")
    own.add_argument("--quick", dest="own_quick", metavar="TEXT", help="send this message, print the answer, end")
    own.add_argument("--system", dest="own_system", metavar="TEXT", help="system message")
    own.add_argument(
        "--stats", dest="own_stats", action="store_true", help="print time to first piece and pieces per second after each answer"
    )
    own.add_argument("--url", dest="own_url", metavar="URL", help="talk to this server instead of loading a model")
    own.add_argument("--api-key", dest="own_api_key", metavar="TEXT", help="key for --url")
    add_sampling_flags(own)
    add_options(parser, EngineConfig)
    args = parser.parse(argv)
    (config,) = read_options(args, EngineConfig)
    return asyncio.run(_main(args, config))


async def _main(args: argparse.Namespace, config: EngineConfig) -> int:
    sampling = read_sampling_flags(args)
    if args.own_url:
        return await _converse(RemoteModel(args.own_url, args.own_api_key, sampling), args)
    engine = AsyncEngine(config)
    engine.start(asyncio.get_running_loop())
    try:
        info = await engine.wait_ready()
        print(f"{info.model_name} on {info.platform}, context {info.max_model_len} tokens, ready in {info.load_s:.1f} s", file=sys.stderr)
        return await _converse(LocalModel(engine, sampling), args)
    except EngineStopped as error:
        raise ConfigError(str(error)) from error
    finally:
        engine.stop()


async def _converse(talker: Talker, args: argparse.Namespace) -> int:
    opening: list[Message] = [{"role": "system", "content": args.own_system}] if args.own_system else []
    messages = list(opening)
    for text in [args.own_quick] if args.own_quick is not None else _typed():
        if text == "/new":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": text})
        try:
            messages.append({"role": "assistant", "content": await _print_answer(talker, messages, stats=args.own_stats)})
        except (RequestError, GenerationError) as error:
            messages.pop()
            print(f"jaxpaged: {error}", file=sys.stderr)
            if args.own_quick is not None:
                return 1
    return 0


async def _print_answer(talker: Talker, messages: list[Message], *, stats: bool) -> str:
    start = time.perf_counter()
    pieces: list[str] = []
    first = start
    async for piece in talker.answer(messages):
        if not pieces:
            first = time.perf_counter()
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()
    if stats:
        rate = (len(pieces) - 1) / max(time.perf_counter() - first, 1e-9)
        print(f"first piece after {1000 * (first - start):.0f} ms, then {rate:.1f} pieces/s", file=sys.stderr)
    return "".join(pieces)


def _typed() -> Iterator[str]:
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text.strip():
            return
        yield text


def _server_message(error: urllib.error.HTTPError) -> str:
    try:
        return f"{error.code}: {json.load(error)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{error.code}: {error.reason}"
