"""A scripted engine for the server's tests: no scheduler, no device, but the real tokenizer, admission and output code."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable

import tokenizers
import transformers

from jaxpaged.config import MAX_LOGPROBS, ModelConfig
from jaxpaged.engine.status import EngineInfo, EngineStatus
from jaxpaged.engine.telemetry import EngineStats
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.errors import ConfigError, EngineStopped, QueueFull
from jaxpaged.scheduling.plan import TokenEvent, TokenLogprobs
from jaxpaged.scheduling.request import FinishReason, Request

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB = 264  # a few ids more than the tokenizer knows, as padded vocabularies have


def byte_tokenizer(template: str = TEMPLATE) -> Tokenizer:
    """One token per byte, and three special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[2], chat_template=template)
    return Tokenizer(hf)


def model_config() -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
    )


class FakeStream(AsyncIterator[TokenEvent]):
    """Plays one request: its own prompt back, token by token, each sample in turn."""

    def __init__(self, engine: FakeAsyncEngine, request: Request) -> None:
        self._engine = engine
        self.request = request
        self._events = engine.beams(request) if request.params.use_beam_search else engine.script(request)
        self._pending: dict[int, bool] = dict.fromkeys(range(request.params.num_sequences), True)

    async def accepted(self) -> None:
        await asyncio.sleep(0)
        if self._engine.refuse_late:
            self.close()
            raise QueueFull("the queue is full", retry_after_s=3)

    async def __anext__(self) -> TokenEvent:
        await self._engine.beat()
        while True:
            if self._engine.state in ("stopped", "failed"):
                raise EngineStopped("the engine is stopped")
            if not any(self._pending.values()):
                self.close()
                raise StopAsyncIteration
            event = next(self._events)
            if not self._pending[event.index]:
                continue
            self._engine.emitted += 1
            if event.finish_reason is not None:
                self._pending[event.index] = False
            return event

    def close(self) -> None:
        self._engine.running.pop(self.request.id, None)

    def abort(self, index: int | None) -> None:
        for i in self._pending if index is None else (index,):
            self._pending[i] = False


class FakeAsyncEngine:
    """What the server needs of ``AsyncEngine``.

    Attributes:
        state, detail, stalled_s: Set by tests; shown by ``status``.
        refuse_late: Whether requests are refused only after they were handed in, as the engine's own thread may.
        max_calls: Requests that may be in flight; beyond them QueueFull.
        step_s: Seconds between two events of a stream; ``gate`` cleared makes all streams wait.
        running: Requests in flight, by id.
        fail_at: Output position at which a request ends with an error, and its code; ``fail_index`` names the sample, None means all.
        logprob: Log-probability of the tokens of each sample, by index.
        caching: Whether it plays a prefix cache.
        num_resets: How often the prefix cache was reset.
    """

    def __init__(self, *, max_model_len: int = 512, max_calls: int = 64, step_s: float = 0.0) -> None:
        self.state = "ready"
        self.detail = ""
        self.stalled_s = 0.0
        self.load_error: str | None = None
        self.fail_after_s: float | None = None
        self.max_calls = max_calls
        self.step_s = step_s
        self.gate = asyncio.Event()
        self.gate.set()
        self.running: dict[str, FakeStream] = {}
        self.submitted: list[Request] = []
        self.emitted = 0
        self.loop: asyncio.AbstractEventLoop | None = None
        self.refuse_late = False
        self.fail_at: tuple[int, str] | None = None
        self.fail_index: int | None = None
        self.logprob: Callable[[int], float] = lambda index: -0.5
        self.caching = False
        self.num_resets = 0
        self.num_refused = 0
        self.aborted: list[tuple[str, int | None]] = []
        self._seen: dict[str, set[tuple[int, ...]]] = {}
        self.reply: Callable[[Request], tuple[int, ...]] = lambda request: request.prompt
        self.info: EngineInfo | None = EngineInfo(
            model_name="echo",
            model_config=model_config(),
            tokenizer=_TOKENIZER,
            max_model_len=max_model_len,
            max_request_tokens=max_model_len,
            num_pages=65,
            page_size=16,
            max_num_seqs=128,
            max_num_batched_tokens=256,
            max_waiting=64,
            token_buckets=(1, 2, 4),
            eos_token_ids=(_TOKENIZER.eos_token_id,),
            max_logprobs=MAX_LOGPROBS,
        )

    @property
    def status(self) -> EngineStatus:
        return EngineStatus(self.state, self.detail, len(self.running), 0, self.stalled_s)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        pass

    async def wait_ready(self) -> EngineInfo:
        if self.load_error is not None:
            raise ConfigError(self.load_error)
        while self.state in ("loading", "compiling"):
            await asyncio.sleep(0.01)
        if self.fail_after_s is not None:
            asyncio.get_running_loop().call_later(self.fail_after_s, setattr, self, "state", "failed")
        return self.info

    async def beat(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self.gate.wait()
        await asyncio.sleep(self.step_s)

    def submit(self, request: Request, *, is_blocked: Callable[[], bool] = lambda: False) -> FakeStream:
        if self.state != "ready":
            raise EngineStopped("secret /home/somebody 0xdeadbeef")
        if len(self.running) >= self.max_calls:
            self.count_refusal()
            raise QueueFull("the queue is full", retry_after_s=7)
        self.submitted.append(request)
        self.running[request.id] = FakeStream(self, request)
        return self.running[request.id]

    async def reset_prefix_cache(self, tenant: str | None = None) -> None:
        self.num_resets += 1
        if tenant is None:
            self._seen.clear()
        else:
            self._seen.pop(tenant, None)

    def num_cached(self, request: Request) -> int:
        """Plays a prefix cache of pages of one token: what the prompt shares with one that its tenant asked before, less its last token."""
        if not self.caching:
            return 0
        seen = self._seen.setdefault(request.tenant, set())
        hits = max((_common(request.prompt, prompt) for prompt in seen), default=0)
        seen.add(request.prompt)
        return min(hits, len(request.prompt) - 1)

    def abort(self, request_id: str, index: int | None = None, *, reason: FinishReason = FinishReason.ABORT) -> None:
        self.aborted.append((request_id, index))
        if request_id in self.running:
            self.running[request_id].abort(index)

    async def drain(self, timeout_s: float) -> None:
        self.state = "draining"

    def stop(self) -> None:
        self.state = "stopped"
        self.gate.set()

    def count_refusal(self) -> None:
        self.num_refused += 1

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.running), num_pages=65, page_size=16, refused=self.num_refused)

    def script(self, request: Request):
        """Yields what is said of the prompt for each sample, the reply's tokens in turn for each, then the end of each."""
        params, cached = request.params, self.num_cached(request)
        reply = self.reply(request)[: request.max_tokens]
        prompt_logprobs = (
            tuple(_logprob(token, params.prompt_logprobs) for token in request.prompt[1:]) if params.prompt_logprobs is not None else ()
        )
        for index in range(params.num_sequences if prompt_logprobs else 0):
            yield TokenEvent(request.id, index, prompt_logprobs=prompt_logprobs)
        for position in itertools.count():
            for index in range(params.num_sequences):
                if self.fail_at is not None and position == self.fail_at[0] and self.fail_index in (None, index):
                    reason, code = FinishReason.ERROR, self.fail_at[1]
                    yield TokenEvent(request.id, index, finish_reason=reason, error="secret text of the fault", error_code=code)
                    continue
                if position >= len(reply):
                    reason = FinishReason.STOP
                    yield TokenEvent(request.id, index, finish_reason=reason, num_cached_tokens=cached)
                    continue
                token = reply[position]
                wanted = params.logprobs is not None or params.best_of is not None
                logprobs = (_logprob(token, params.logprobs, self.logprob(index)),) if wanted else ()
                stopped = token in request.stop_token_ids and position >= params.min_tokens
                last = FinishReason.STOP if stopped else FinishReason.LENGTH if position + 1 == request.max_tokens else None
                own = token if stopped and token in (params.stop_token_ids or ()) else None
                yield TokenEvent(request.id, index, (token,), logprobs, (), last, own, num_cached_tokens=cached)

    def beams(self, request: Request):
        """Yields all beams at once: the reply, shorter by one token for each; then the ends of those that are not returned."""
        reply, cached = self.reply(request)[: request.max_tokens], self.num_cached(request)
        for index in range(request.params.num_sequences):
            tokens = tuple(reply[: max(1, len(reply) - index)]) if index < request.params.n else ()
            logprob = -0.5 * len(tokens) if tokens else None
            reason = FinishReason.LENGTH
            yield TokenEvent(request.id, index, tokens, finish_reason=reason, num_cached_tokens=cached, cumulative_logprob=logprob)


def _logprob(token: int, top: int | None, logprob: float = -0.5) -> TokenLogprobs:
    return TokenLogprobs(token, logprob, 1, tuple(((token + i) % 256, logprob - i) for i in range(top or 0)))


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Returns how many tokens two prompts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


_TOKENIZER = byte_tokenizer()


def replace_info(engine: FakeAsyncEngine, **changes) -> None:
    engine.info = dataclasses.replace(engine.info, **changes)
