"""Offline generation: a list of prompts in, a list of outputs out. Names, arguments and results as vLLM's ``LLM``."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from jaxpaged.config import EngineConfig, make_config
from jaxpaged.engine.admission import check_params, make_params, make_request
from jaxpaged.engine.output import Delta, OutputProcessor, TokenText, describe_token
from jaxpaged.engine.progress import Progress, make_progress
from jaxpaged.engine.startup import load_engine
from jaxpaged.engine.status import EngineInfo
from jaxpaged.engine.telemetry import EngineStats
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.errors import EngineStopped, GenerationError, RequestError
from jaxpaged.scheduling.request import FinishReason, Request, SamplingParams

Prompt = str | Mapping[str, Any] | Sequence[int]
"""Text, ``{"prompt": text}``, ``{"prompt_token_ids": ids}``, or token ids."""

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Logprob:
    """A token's log-probability at one position.

    Attributes:
        logprob: In the model's own distribution.
        rank: 1 for the most likely.
        decoded_token: Its text.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: Which of the ``n``.
        text: What was generated, without the stop token or stop string unless ``include_stop_str_in_output``.
        token_ids: The same as ids, the stop token included.
        cumulative_logprob: Sum over the tokens; None unless log-probabilities were asked for or decided which ones are returned
            (``best_of``, beam search).
        logprobs: Per token, by id: the token and the most likely ones.
        finish_reason: ``stop``, ``length``, ``abort`` or ``error``.
        stop_reason: Stop string or stop token id that ended it; None for the end-of-sequence token.
    """

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclasses.dataclass
class RequestMetrics:
    """Moments of a request, in seconds of the monotonic clock."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclasses.dataclass
class RequestOutput:
    """All about one prompt.

    Attributes:
        request_id: Unique within the ``LLM``.
        prompt: Its text; None if it was given as ids.
        prompt_token_ids: Its ids.
        prompt_logprobs: Per prompt token, by id, None for the first; None unless asked for.
        outputs: ``n`` completions, in order of index.
        finished: Always true in what ``generate`` returns.
        metrics: When what happened.
        num_cached_tokens: Tokens of the prompt whose keys and values were in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """What ``LLM.beam_search`` takes, under vLLM's names; the fields are those of ``SamplingParams``.

    Attributes:
        beam_width: Beams that are kept, and returned.
        temperature: There for vLLM's sake; only 0 is taken.
        early_stopping: ``True``, ``False`` or ``"never"``, as in transformers.
        include_stop_str_in_output: Keep the token that ended a beam in its text.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    include_stop_str_in_output: bool = False

    def sampling_params(self) -> SamplingParams:
        """Returns the same for ``LLM.generate``."""
        return SamplingParams(use_beam_search=True, n=self.beam_width, **dataclasses.asdict(self))


@dataclasses.dataclass
class BeamSearchSequence:
    """One beam, under vLLM's names.

    Attributes:
        tokens: Prompt and output.
        text: The text of both, without the token that ended it unless ``include_stop_str_in_output``.
        cum_logprob: Sum of the log-probabilities of the output's tokens.
        finish_reason: ``stop`` or ``length``.
        stop_reason: The id of the request's own that ended it.
    """

    tokens: list[int]
    text: str
    cum_logprob: float
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclasses.dataclass
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


class LLM:
    """A model, ready to generate; a context manager that closes itself. Threads may share one: it works for one at a time.

    Args:
        model: A local directory in Hugging Face layout, or a hub id; default: the packaged tiny model.
        show_progress: Whether loading is shown on standard error.
        **options: Any option of ``jaxpaged.config.EngineConfig`` or of what it holds, by its name or an alias.

    Raises:
        ConfigError: An option is unknown or does not fit, or the model cannot be loaded.
    """

    def __init__(self, model: str | None = None, *, show_progress: bool = True, **options: Any) -> None:
        given = {**options, **({} if model is None else {"model": str(model)})}
        self._start(make_config(EngineConfig, given), make_progress() if show_progress else None)

    @classmethod
    def from_config(cls, config: EngineConfig, *, progress: Progress | None = None) -> LLM:
        """Makes an LLM from a configuration that was read elsewhere."""
        self = cls.__new__(cls)
        self._start(config, progress if progress is not None else make_progress())
        return self

    def _start(self, config: EngineConfig, progress: Progress | None) -> None:
        loaded = load_engine(config, progress)
        self.info: EngineInfo = loaded.info
        self._engine = loaded.engine
        self._close = loaded.close
        self._closed = False
        self._turn = threading.RLock()  # and not a Lock: a call from inside a call is an error then, and no deadlock
        self._busy = False
        self._ids = itertools.count()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def default_sampling(self) -> Mapping[str, Any]:
        """Sampling values from the model's generation_config.json."""
        return self.info.default_sampling

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns sampling parameters with the model's own defaults; ``max_tokens`` is 16 where generation_config.json has none."""
        return make_params({"max_tokens": self.info.default_sampling.get("max_tokens") or SamplingParams.max_tokens}, self.info)

    def get_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer."""
        return self.info.tokenizer

    def get_metrics(self) -> EngineStats:
        """Returns a snapshot of all counters, gauges and histograms."""
        return self._engine.stats()

    def reset_prefix_cache(self) -> None:
        """Forgets all keys and values of earlier prompts."""
        with self._working():
            self._engine.reset_prefix_cache()

    def close(self) -> None:
        """Frees the device's memory, once a call in another thread is done. What is closed generates no more; closing it again is fine."""
        with self._turn:
            if not self._closed:
                with self._working():
                    self._closed = True
                    self._close()

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Holds the engine for one call; those of other threads wait.

        Raises:
            EngineStopped: The ``LLM`` is closed, or this thread is in the middle of another call.
        """
        with self._turn:
            if self._closed:
                raise EngineStopped("this LLM is closed; make a new one")
            if self._busy:
                raise EngineStopped("this LLM is in the middle of a call of this very thread")
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes prompts, as many at once as fit.

        Args:
            prompts: One prompt, or a list; each text, token ids, or a dict with ``prompt`` or ``prompt_token_ids``.
            sampling_params: For all prompts, or one each; default: the model's own.
            use_tqdm: Show a bar.

        Returns:
            One output per prompt, in their order.

        Raises:
            RequestError: A prompt or a parameter does not fit; nothing was generated then.
            EngineStopped: The ``LLM`` is closed.
        """
        with self._working():
            items = _as_prompts(prompts)
            params = self._params_for(items, sampling_params or self.get_default_sampling_params())
            jobs = [self._job(*self._encode(item), given, "prompt") for item, given in zip(items, params, strict=True)]
            return self._run(jobs, use_tqdm=use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams | SamplingParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """Finds likely texts; the beams are those of transformers' ``generate(num_beams=...)``.

        Args:
            prompts: As in ``generate``.
            params: For all prompts. With ``SamplingParams``, ``use_beam_search`` must be set, and the best ``n`` beams are returned.
            use_tqdm: Show a bar.

        Raises:
            RequestError: A prompt or a parameter does not fit.
            EngineStopped: The ``LLM`` is closed.
        """
        given = params if isinstance(params, SamplingParams) else params.sampling_params()
        if not given.use_beam_search:
            raise RequestError("beam_search needs params with use_beam_search; generate samples", param="use_beam_search")
        outputs = self.generate(prompts, given, use_tqdm=use_tqdm)
        return [
            BeamSearchOutput([self._beam(output.prompt_token_ids, completion, given) for completion in output.outputs])
            for output in outputs
        ]

    def _beam(self, prompt: list[int], completion: CompletionOutput, params: SamplingParams) -> BeamSearchSequence:
        tokens = prompt + completion.token_ids
        hidden = completion.finish_reason == "stop" and not params.include_stop_str_in_output  # the token that ended it
        shown = tokens[: len(tokens) - hidden] if params.detokenize else []
        return BeamSearchSequence(
            tokens,
            self.info.tokenizer.decode(shown, skip_special_tokens=params.skip_special_tokens),
            completion.cumulative_logprob or 0.0,
            completion.finish_reason,
            completion.stop_reason,
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several.

        Args:
            messages: Each message has ``role`` and ``content``.
            sampling_params: As in ``generate``; default: the model's own, up to the rest of the context.
            use_tqdm: Show a bar.
            chat_template: Jinja source to use instead of the tokenizer's.
            add_generation_prompt: Open the assistant's turn.
            continue_final_message: Continue the last message instead.
            tools: JSON schemas of functions, for templates that show them.
            chat_template_kwargs: More variables for the template.

        Raises:
            RequestError: A conversation does not fit the template or the context.
            EngineStopped: The ``LLM`` is closed.
        """
        with self._working():
            conversations: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
            default = {"max_tokens": self.info.default_sampling.get("max_tokens")}
            params = self._params_for(conversations, sampling_params or make_params(default, self.info))
            jobs = []
            for conversation, given in zip(conversations, params, strict=True):
                ids = self.info.tokenizer.apply_chat_template(
                    conversation,
                    add_generation_prompt=add_generation_prompt and not continue_final_message,
                    continue_final_message=continue_final_message,
                    tools=tools,
                    chat_template=chat_template,
                    template_kwargs=chat_template_kwargs,
                )
                jobs.append(self._job(self.info.tokenizer.decode(ids, skip_special_tokens=False), ids, given, "messages"))
            return self._run(jobs, use_tqdm=use_tqdm)

    def _params_for(self, items: Sequence[Any], params: SamplingParams | Sequence[SamplingParams]) -> Sequence[SamplingParams]:
        """Returns checked parameters, one set for each prompt."""
        each = [params] * len(items) if isinstance(params, SamplingParams) else params
        if len(each) != len(items):
            raise RequestError(f"sampling_params must be one, or one per prompt ({len(items)}); got {len(each)}", param="sampling_params")
        for given in {id(given): given for given in each}.values():
            if not isinstance(given, SamplingParams):
                raise RequestError(f"sampling_params must be SamplingParams; got {type(given).__name__}", param="sampling_params")
            check_params(given, self.info)
        return each

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Returns a prompt's text, if it has one, and its ids."""
        if isinstance(prompt, Mapping):
            if isinstance(prompt.get("prompt_token_ids"), list | tuple):
                return prompt.get("prompt"), list(prompt["prompt_token_ids"])
            if not isinstance(prompt.get("prompt"), str):
                raise RequestError("a prompt given as a dict must have 'prompt' or 'prompt_token_ids'", param="prompt")
            text: str = prompt["prompt"]
            return text, self.info.tokenizer.encode(text)
        if isinstance(prompt, str):
            return prompt, self.info.tokenizer.encode(prompt)
        return None, list(prompt)

    def _job(self, text: str | None, ids: list[int], params: SamplingParams, param: str) -> _Job:
        request = make_request(
            ids,
            params,
            self.info,
            request_id=str(next(self._ids)),
            prompt_param=param,
            default_max_tokens=self.info.max_request_tokens,
            refuse_excess=False,
        )
        self._engine.scheduler.check_size(request)
        return _Job(request, text, self.info.tokenizer)

    def _run(self, jobs: list[_Job], *, use_tqdm: bool) -> list[RequestOutput]:
        """Keeps the engine's queue filled until all jobs are done."""
        by_id = {job.request.id: job for job in jobs}
        to_come = deque(jobs)
        with tqdm(total=len(jobs), desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
            speed = _Speed(bar)
            try:
                while to_come or self._engine.has_work:
                    while to_come and self._engine.scheduler.num_waiting == 0:
                        self._engine.add(to_come.popleft().request)
                    for event in self._engine.step():
                        job = by_id[event.request_id]
                        was_finished = job.finished
                        delta = job.processor.process(event)
                        if delta is None:
                            continue
                        for shown in job.processor.release(delta):
                            job.take(shown)
                        if delta.finish_reason is not None and event.finish_reason is None:
                            self._engine.abort(event.request_id, event.index, reason=FinishReason.STOP)
                        if job.finished and not was_finished:
                            speed.finished(job)
            except BaseException:  # an interrupt may have come in the middle of a step
                self._engine.reset()
                raise
        self._engine.check()
        if unfinished := [job.request.id for job in jobs if not job.finished]:
            raise GenerationError(f"the engine has nothing left to do, but {len(unfinished)} of {len(jobs)} prompts are not finished")
        return [job.output() for job in jobs]


class _Job:
    """One prompt on its way."""

    def __init__(self, request: Request, text: str | None, tokenizer: Tokenizer) -> None:
        self.request = request
        self.processor = OutputProcessor(request, tokenizer)
        self._tokenizer = tokenizer
        self._text = text
        self._completions = [CompletionOutput(index) for index in range(request.params.n)]
        self._texts: list[list[str]] = [[] for _ in self._completions]
        self._prompt_logprobs: list[dict[int, Logprob] | None] = [None]
        self._metrics = RequestMetrics(request.arrival_s)
        if request.params.logprobs is not None:
            for completion in self._completions:
                completion.logprobs, completion.cumulative_logprob = [], 0.0

    @property
    def finished(self) -> bool:
        return self.processor.finished

    def take(self, delta: Delta) -> None:
        """Adds what is new."""
        completion = self._completions[delta.index]
        self._texts[delta.index].append(delta.text)
        completion.token_ids += delta.token_ids
        if completion.logprobs is not None:
            completion.logprobs += [_by_id(entry) for entry in delta.logprobs]
            completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + sum(entry.logprob for entry in delta.logprobs)
        if delta.cumulative_logprob is not None:
            completion.cumulative_logprob = delta.cumulative_logprob
        if delta.index == 0:
            self._prompt_logprobs += [_by_id(describe_token(entry, self._tokenizer)) for entry in delta.prompt_logprobs]
        if delta.token_ids and self._metrics.first_token_time is None:
            self._metrics.first_token_time = time.monotonic()
        if delta.finish_reason is not None:
            completion.finish_reason, completion.stop_reason = delta.finish_reason, delta.stop_reason
            completion.text = "".join(self._texts[delta.index])
        if self.finished:
            self._metrics.finished_time = time.monotonic()

    def output(self) -> RequestOutput:
        """Returns the result."""
        asked = self.request.params.prompt_logprobs is not None
        return RequestOutput(
            self.request.id,
            self._text,
            list(self.request.prompt),
            self._prompt_logprobs if asked else None,
            self._completions,
            self.finished,
            self._metrics,
            self.processor.num_cached_tokens,
        )


class _Speed:
    """Keeps the bar's numbers."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._began = time.monotonic()
        self._inputs = self._outputs = 0

    def finished(self, job: _Job) -> None:
        self._inputs += job.processor.num_prompt_tokens
        self._outputs += job.processor.num_output_tokens
        seconds = max(time.monotonic() - self._began, 1e-9)
        text = f"est. speed input: {self._inputs / seconds:.2f} toks/s, output: {self._outputs / seconds:.2f} toks/s"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(1)


def _by_id(entry: TokenText) -> dict[int, Logprob]:
    """Returns the most likely tokens and the one at the position, by id."""
    tokens: Iterable[TokenText] = (entry, *entry.top)
    return {token.token_id: Logprob(token.logprob, token.rank, token.text) for token in tokens}


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
