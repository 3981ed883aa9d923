"""What the routes do: from a checked call to the engine and back, and what the server says about itself."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from jaxpaged.config import ServerConfig
from jaxpaged.engine.admission import make_params, make_request
from jaxpaged.engine.async_engine import AsyncEngine
from jaxpaged.engine.output import PromptText
from jaxpaged.engine.status import EngineInfo, EngineStatus
from jaxpaged.errors import RequestError
from jaxpaged.scheduling.request import Request
from jaxpaged.server.answers import ClientGone, RequestTimedOut, Unavailable
from jaxpaged.server.body import BodyBudget, parse_json_object, read_body
from jaxpaged.server.calls import Calls
from jaxpaged.server.generate import Generation
from jaxpaged.server.protocol import (
    DetokenizeCall,
    GenerationCall,
    Message,
    Prompt,
    TokenizeCall,
    shown_names,
)
from jaxpaged.server.render import Choice, Label, Renderer

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

BYTES_PER_TOKEN = 16
"""A prompt with more bytes than this per token of the context is refused before it is tokenised."""

DEFAULT_COMPLETION_TOKENS = 16
"""``max_tokens`` of a completion that names none, as in OpenAI's API."""

SMALL_BODY_BYTES = 32 * 1024
"""Bodies up to this size are parsed in the event loop; larger ones in a thread."""


BODIES_HELD = 64
"""Bodies of the largest allowed size that are held at once while they arrive and are parsed."""


class Service:
    """The engine as the routes see it.

    Args:
        engine: Loaded or not.
        config: Of the server.
        names: Names of the model that clients may use; default: the model's own.
        version: Of this program.

    Attributes:
        calls: The generation calls in flight.
    """

    def __init__(self, engine: AsyncEngine, config: ServerConfig, *, names: Sequence[str] = (), version: str = "") -> None:
        self.engine = engine
        self.config = config
        self.calls = Calls()
        self.version = version
        self.created = int(time.time())
        self._names = tuple(names)
        self._bodies = BodyBudget(BODIES_HELD * config.max_body_bytes)
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="jaxpaged-text")

    # ------------------------------------------------------------------------------------------------------- about itself

    @property
    def status(self) -> EngineStatus:
        """The engine's status, or ``draining`` while the server waits for its last calls."""
        status = self.engine.status
        return dataclasses.replace(status, state="draining", detail="shutting down") if self.calls.draining else status

    def info(self) -> EngineInfo:
        """Returns what is fixed about the loaded engine.

        Raises:
            Unavailable: It is not loaded yet, or takes no requests.
        """
        status, info = self.status, self.engine.info
        if info is None or status.state in ("loading", "compiling", "draining", "stopped", "failed"):
            raise Unavailable(explain(status))
        return info

    def names(self, info: EngineInfo) -> tuple[str, ...]:
        """Returns the names of the model; answers that are not asked for one use the first."""
        return self._names or (info.model_name,)

    def check_model(self, name: str | None, info: EngineInfo) -> str:
        """Returns the model's name for the answer.

        Raises:
            RequestError: 404, there is no such model.
        """
        names = self.names(info)
        if name is not None and name not in names:
            raise RequestError(
                f"the model {name[:80]!r} does not exist here; GET /v1/models lists what does",
                param="model",
                code="model_not_found",
                status=404,
            )
        return names[0] if name is None else name

    # ------------------------------------------------------------------------------------------------------------- input

    async def read(self, scope: Scope, receive: Receive, parse: Callable[[dict[str, Any]], _T]) -> _T:
        """Reads and checks a body.

        Raises:
            RequestError: It is too large, not JSON, or a field does not fit.
        """
        with self._bodies.account() as take:
            raw = await read_body(scope, receive, self.config.max_body_bytes, take)
            if len(raw) <= SMALL_BODY_BYTES:
                return parse(parse_json_object(raw))
            return await self.in_thread(lambda: parse(parse_json_object(raw)))

    def close(self) -> None:
        """Gives up the threads; what they still do is of no use to anybody."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, work: Callable[[], _T]) -> _T:
        """Runs something that would keep the event loop busy."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def ignored(self, call: GenerationCall | TokenizeCall, info: EngineInfo) -> tuple[str, ...]:
        """Returns the names of what had no effect in a call: fields that nobody defines, variables that the template does not name."""
        unread = (name for name in call.chat_template_kwargs if not info.tokenizer.template_reads(name))
        return (*call.ignored, *(f"chat_template_kwargs.{name}" for name in unread))

    async def tokenize(self, call: TokenizeCall) -> dict[str, Any]:
        """Answers POST /tokenize."""
        info = self.info()
        self.check_model(call.model, info)
        _check_bytes(call.prompt if call.messages is None else call.messages, info)
        ids = await self.in_thread(functools.partial(_encode, call.prompt, call.messages, call, info))
        strings = [info.tokenizer.token_text(token_id) for token_id in ids] if call.return_token_strs else None
        return {"count": len(ids), "max_model_len": info.max_model_len, "tokens": ids, "token_strs": strings}

    async def detokenize(self, call: DetokenizeCall) -> dict[str, Any]:
        """Answers POST /detokenize."""
        info = self.info()
        self.check_model(call.model, info)
        vocab = info.model_config.vocab_size
        if any(token_id >= vocab for token_id in call.tokens):
            raise RequestError(f"tokens must hold ids in [0, {vocab - 1}]; got {max(call.tokens)}", param="tokens")
        text = await self.in_thread(functools.partial(info.tokenizer.decode, call.tokens, skip_special_tokens=False))
        return {"prompt": text}

    # -------------------------------------------------------------------------------------------------------- generation

    async def generate(self, parse: Callable[[dict[str, Any]], GenerationCall], scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one generation call from its body to its last byte.

        Raises:
            JaxpagedError: Before the first byte only.
        """
        request_id: str = scope["state"]["request_id"]
        with self.calls.track(request_id) as call:
            try:
                async with call.limit(self.config.request_timeout):
                    asked = await self.read(scope, receive, parse)
                    info = self.info()
                    name = self.check_model(asked.model, info)
                    requests, choices = await self._admit(asked, info, request_id, scope["state"].get("tenant", ""))
            except ClientGone:
                return
            ignored = self.ignored(asked, info)
            headers = [(b"x-jaxpaged-ignored-fields", shown_names(ignored).encode())] if ignored else []
            include_usage = asked.include_usage or (asked.stream and self.config.enable_force_include_usage)
            asked = dataclasses.replace(asked, include_usage=include_usage)
            answer = Generation(
                self.engine,
                info,
                asked,
                requests,
                choices,
                self._renderer(asked, name, request_id),
                call,
                timeout_s=_left(self.config.request_timeout, call.started_s),
                headers=headers,
            )
            await answer(scope, receive, send)
            if self.config.log_requests:
                logger.info("%s", answer.summary())

    async def _admit(self, asked: GenerationCall, info: EngineInfo, request_id: str, tenant: str) -> tuple[list[Request], list[Choice]]:
        """Tokenises the prompts and checks them against the model."""
        _check_bytes(asked.messages if asked.is_chat else asked.prompts, info)
        if all(isinstance(prompt, tuple) for prompt in asked.prompts) and not asked.is_chat:
            return _make_requests(asked, info, request_id, tenant)
        return await self.in_thread(functools.partial(_make_requests, asked, info, request_id, tenant))

    def _renderer(self, asked: GenerationCall, name: str, request_id: str) -> Renderer:
        label = Label(
            id=f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{request_id}",
            created=int(time.time()),
            model=name,
            fingerprint=f"jaxpaged-{self.version}",
        )
        return Renderer(
            label=label,
            chat=asked.is_chat,
            want_logprobs=asked.sampling.get("logprobs") is not None,
            want_prompt_logprobs=asked.want_prompt_logprobs,
            want_token_ids=asked.return_token_ids,
            want_usage=asked.include_usage,
            ids_as_tokens=asked.return_tokens_as_token_ids,
        )


def explain(status: EngineStatus) -> str:
    """Says why no request is taken, in words that are fit for a client."""
    match status.state:
        case "loading" | "compiling":
            return f"the server is starting: {status.detail or status.state}"
        case "recovering":
            return "the engine is recovering from a fault"
        case "draining" | "stopped":
            return "the server is shutting down"
        case "failed":
            return "the engine has failed; the server's log says why"
        case _:
            return "the engine makes no progress" if status.stalled else "the server is ready"


def _left(timeout_s: float | None, started_s: float) -> float | None:
    if timeout_s is None:
        return None
    left = timeout_s - (time.monotonic() - started_s)
    if left <= 0:
        raise RequestTimedOut(f"the request took longer than {timeout_s:g} s")
    return left


def _check_bytes(content: Sequence[Message] | Sequence[Prompt] | str | None, info: EngineInfo) -> None:
    """Refuses text that cannot fit the context before any work is spent on it."""
    most = BYTES_PER_TOKEN * info.max_model_len
    texts: Sequence[Any] = [content] if isinstance(content, str) else content or ()
    chat = [text["content"] for text in texts if isinstance(text, dict)]
    sizes = [sum(len(text.encode()) for text in chat)] if chat else [len(text.encode()) for text in texts if isinstance(text, str)]
    if any(size > most for size in sizes):
        raise RequestError(
            f"the prompt has {max(sizes)} bytes of text, which cannot fit the model's context length of {info.max_model_len} tokens",
            param="messages" if chat else "prompt",
            code="context_length_exceeded",
        )


def _encode(prompt: Prompt | None, messages: Sequence[Message] | None, call: GenerationCall | TokenizeCall, info: EngineInfo) -> list[int]:
    if isinstance(prompt, tuple):
        return list(prompt)
    if prompt is not None:
        return info.tokenizer.encode(prompt, add_special_tokens=call.add_special_tokens)
    return info.tokenizer.apply_chat_template(
        messages or (),
        add_generation_prompt=call.add_generation_prompt,
        continue_final_message=call.continue_final_message,
        tools=call.tools,
        template_kwargs=call.chat_template_kwargs,
    )


def _make_requests(asked: GenerationCall, info: EngineInfo, request_id: str, tenant: str) -> tuple[list[Request], list[Choice]]:
    params = make_params(asked.sampling, info)
    requests, choices = [], []
    for i, prompt in enumerate(asked.prompts or (None,)):
        ids = _encode(prompt, asked.messages, asked, info)
        request = make_request(
            ids,
            params,
            info,
            request_id=f"{request_id}-{i}",
            prompt_param=asked.prompt_param,
            tenant=tenant,
            default_max_tokens=None if asked.is_chat else DEFAULT_COMPLETION_TOKENS,
        )
        requests.append(request)
        echo = _echo(prompt, asked, request, len(ids), info) if asked.echo else None
        first = info.tokenizer.token_text(request.prompt[0]) if asked.echo else ""
        for sample in range(params.n):
            choice = Choice(index=i * params.n + sample, prompt_token_ids=request.prompt, echo=echo, first_token=first)
            choices.append(choice)
    return requests, choices


def _echo(prompt: Prompt | None, asked: GenerationCall, request: Request, num_ids: int, info: EngineInfo) -> PromptText:
    """Returns the prompt as it is repeated: without what the tokenizer itself has put around a text, and without what was cut off."""
    before, behind = info.tokenizer.num_added() if isinstance(prompt, str) and asked.add_special_tokens else (0, 0)
    cut = num_ids - len(request.prompt)
    return PromptText.decode(request.prompt, info.tokenizer, added=(max(0, before - cut), behind))
