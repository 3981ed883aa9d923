"""What the routes do: from a checked call to the engine and back, and what the server says about itself."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Sequence

from starlette.types import Receive, Scope, Send

from jaxpaged.config import ServerConfig
from jaxpaged.engine.async_engine import AsyncEngine
from jaxpaged.engine.status import EngineInfo, EngineStatus
from jaxpaged.errors import QueueFull, RequestError
from jaxpaged.scheduling.request import Request, SamplingParams
from jaxpaged.server.answers import ClientGone, RequestTimedOut, Unavailable
from jaxpaged.server.body import BodyBudget, read_body
from jaxpaged.server.calls import Calls
from jaxpaged.server.generate import Generation
from jaxpaged.server.prepare import MAYBE_QUICK, Job, Prepared, PreparedAnswer, PreparedGeneration, is_quick, parse, prepare
from jaxpaged.server.protocol import GenerationCall
from jaxpaged.server.render import Choice, Label, Renderer
from jaxpaged.server.text_pool import SMALL_BODY_BYTES, TextPool

logger = logging.getLogger(__name__)

BODIES_HELD = 64
"""Bodies of the largest allowed size that are held at once while they arrive and are prepared."""

IDS_AT_A_TIME = 2**18
"""Token ids that are unpacked before the event loop turns again; a prompt takes as long as ``IDS_OF_A_PROMPT`` of them, and its own."""

IDS_OF_A_PROMPT = 1000


class Service:
    """The engine as the routes see it.

    Args:
        engine: Loaded or not.
        config: Of the server.
        texts: Prepares calls.
        names: Names of the model that clients may use; default: the model's own.
        version: Of this program.

    Attributes:
        calls: The generation calls in flight.
    """

    def __init__(self, engine: AsyncEngine, config: ServerConfig, texts: TextPool, *, names: Sequence[str] = (), version: str = "") -> None:
        self.engine = engine
        self.config = config
        self.calls = Calls()
        self.version = version
        self.created = int(time.time())
        self._names = tuple(names)
        self._bodies = BodyBudget(BODIES_HELD * config.max_body_bytes, free_bytes=SMALL_BODY_BYTES)
        self._texts = texts

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

    async def prepare(self, scope: Scope, receive: Receive) -> Prepared:
        """Reads a body and makes of it what its route needs; what is not quick is done in another process.

        Raises:
            RequestError: It is too large, not JSON, or a field does not fit.
            QueueFull: Too many large bodies are arriving.
        """
        path, state, owner = scope["path"], scope["state"], _owner(scope)
        with self._bodies.account(owner) as take:
            try:
                raw = await read_body(scope, receive, self.config.max_body_bytes, take)
            except QueueFull:
                self.engine.count_refusal()
                raise
            job = Job(path=path, body=raw, request_id=state["request_id"], tenant=state.get("tenant", ""))
            if path in MAYBE_QUICK and len(raw) <= SMALL_BODY_BYTES:
                call = parse(path, raw)
                info = self.info()
                self.check_model(call.model, info)
                job = dataclasses.replace(job, body=call)
                if is_quick(call):
                    return prepare(job, info)
            info = self.info()
            prepared = await self._texts.run(job, info, size=len(raw), owner=owner)
            self.check_model(prepared.call.model, info)
            return prepared

    async def answer(self, scope: Scope, receive: Receive) -> PreparedAnswer:
        """Answers POST /tokenize and /detokenize, which need no engine."""
        prepared = await self.prepare(scope, receive)
        if not isinstance(prepared, PreparedAnswer):
            raise TypeError(f"{scope['path']} is answered by the engine")
        return prepared

    def close(self) -> None:
        """Gives up what is being prepared; it is of no use to anybody."""
        self._texts.close()

    # -------------------------------------------------------------------------------------------------------- generation

    async def generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one generation call from its body to its last byte.

        Raises:
            JaxpagedError: Before the first byte only.
        """
        request_id: str = scope["state"]["request_id"]
        with self.calls.track(request_id) as call:
            try:
                async with call.limit(self.config.request_timeout):
                    prepared = await self.prepare(scope, receive)
                    if not isinstance(prepared, PreparedGeneration):
                        raise TypeError(f"{scope['path']} is no generation")
                    requests, choices = await _complete(prepared)
                    info = self.info()
            except ClientGone:
                return
            asked = prepared.call
            headers = [(b"x-jaxpaged-ignored-fields", prepared.ignored.encode())] if prepared.ignored else []
            include_usage = asked.include_usage or (asked.stream and self.config.enable_force_include_usage)
            asked = dataclasses.replace(asked, include_usage=include_usage)
            answer = Generation(
                self.engine,
                info,
                asked,
                requests,
                choices,
                self._renderer(asked, prepared.params, info, request_id),
                call,
                timeout_s=_left(self.config.request_timeout, call.started_s),
                headers=headers,
            )
            await answer(scope, receive, send)
            if self.config.log_requests:
                logger.info("%s", answer.summary())

    def _renderer(self, asked: GenerationCall, params: SamplingParams, info: EngineInfo, request_id: str) -> Renderer:
        label = Label(
            id=f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{request_id}",
            created=int(time.time()),
            model=self.check_model(asked.model, info),
            fingerprint=f"jaxpaged-{self.version}",
        )
        return Renderer(
            label=label,
            tokenizer=info.tokenizer,
            chat=asked.is_chat,
            want_logprobs=params.logprobs is not None,
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


def _owner(scope: Scope) -> str:
    """Returns whose large bodies count together: those of a key, or of an address."""
    client = scope.get("client")
    return scope["state"].get("tenant") or (client[0] if client else "")


async def _complete(prepared: PreparedGeneration) -> tuple[list[Request], list[Choice]]:
    """Returns the requests with their prompts, and the choices of the answer."""
    requests, choices, done = [], [], 0
    for i, prompt in enumerate(prepared.prompts):
        token_ids = tuple(prompt.token_ids)
        done += IDS_OF_A_PROMPT + len(token_ids)
        if done > IDS_AT_A_TIME:
            await asyncio.sleep(0)
            done = 0
        requests.append(dataclasses.replace(prompt.request, prompt=token_ids))
        for sample in range(prepared.params.n):
            index = i * prepared.params.n + sample
            choices.append(Choice(index=index, prompt_token_ids=token_ids, echo=prompt.echo, first_token=prompt.first_token))
    return requests, choices
