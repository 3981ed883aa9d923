"""From the body of a call to requests of the engine: all the work whose time and memory depend on what a client sent.

Pure functions of a ``Job`` and an ``EngineInfo``. What is small and needs no text is done where the call arrives; the rest is done in a
process that can be ended (``text_pool``), since a hostile template, pattern or body would keep the event loop, or the lock that
Python's threads share, for as long as it likes.
"""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxpaged.engine.admission import make_params, make_request
from jaxpaged.engine.output import PromptText
from jaxpaged.engine.status import EngineInfo
from jaxpaged.errors import RequestError
from jaxpaged.scheduling.request import Request, SamplingParams
from jaxpaged.server.answers import encode
from jaxpaged.server.body import parse_json_object
from jaxpaged.server.protocol import (
    DetokenizeCall,
    GenerationCall,
    Prompt,
    TokenizeCall,
    parse_chat,
    parse_completion,
    parse_detokenize,
    parse_tokenize,
    shown_names,
)

DEFAULT_COMPLETION_TOKENS = 16
"""``max_tokens`` of a completion that names none, as in OpenAI's API."""

MAX_MASK_IDS = 2**20
"""Most token ids in the masks of a call: ids times prompts, since each request brings its masks to the device."""

MAX_PROMPT_LOGPROBS = 2**19
"""Most log-probabilities of prompt tokens in one answer: choices times prompt tokens times candidates. One entry takes about 80 bytes."""

MAYBE_QUICK = frozenset({"/v1/completions"})
"""Routes that take token ids for prompts, so that a small body may be quick to prepare, see ``is_quick``."""

QUICK_PROMPTS = 64
"""Most prompts of a call that is prepared at once."""

Call = GenerationCall | TokenizeCall | DetokenizeCall

PARSERS: Mapping[str, Callable[[dict[str, Any]], Call]] = {
    "/v1/chat/completions": parse_chat,
    "/v1/completions": parse_completion,
    "/tokenize": parse_tokenize,
    "/detokenize": parse_detokenize,
}
"""What checks the body of each route that takes one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be made of a body.

    Attributes:
        path: The route.
        body: Raw bytes, or what they were found to say.
        request_id: Of the call; its requests are named after it.
        tenant: Whose call it is.
    """

    path: str
    body: bytes | Call
    request_id: str = ""
    tenant: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedPrompt:
    """One prompt of a generation call.

    Attributes:
        request: Complete but for its prompt.
        token_ids: The prompt, packed, since it may be long and travels between processes.
        echo: The prompt as it is repeated, if it is.
        first_token: Text of its first token, which has no log-probability; for ``echo``.
    """

    request: Request
    token_ids: array.array[int]
    echo: PromptText | None = None
    first_token: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedGeneration:
    """A generation call, ready to be submitted.

    Attributes:
        call: What the answer needs to know of it; its messages, prompts and sampling fields are left out.
        params: Of all its requests.
        prompts: At least one.
        ignored: Names of what had no effect, for a header; empty if all had.
    """

    call: GenerationCall
    params: SamplingParams
    prompts: tuple[PreparedPrompt, ...]
    ignored: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedAnswer:
    """The whole answer to a call that needs no engine.

    Attributes:
        call: What the answer needs to know of it; its prompt, messages and tokens are left out.
        body: JSON.
        ignored: Names of what had no effect, for a header; empty if all had.
    """

    call: TokenizeCall | DetokenizeCall
    body: bytes
    ignored: str


Prepared = PreparedGeneration | PreparedAnswer


def parse(path: str, raw: bytes) -> Call:
    """Returns what a body says.

    Raises:
        RequestError: It is not JSON, or a field does not fit.
    """
    return PARSERS[path](parse_json_object(raw))


def prepare(job: Job, info: EngineInfo) -> Prepared:
    """Does a job.

    Raises:
        RequestError: The body does not fit the route or the model.
    """
    call = parse(job.path, job.body) if isinstance(job.body, bytes) else job.body
    match call:
        case GenerationCall():
            try:
                return _generation(call, info, job)
            except RequestError as error:
                raise call.in_the_clients_words(error) from error
        case TokenizeCall():
            asked = dataclasses.replace(call, prompt=None, messages=None, tools=None, chat_template_kwargs={}, ignored=())
            return PreparedAnswer(call=asked, body=_tokenize(call, info), ignored=_ignored(call, info))
        case DetokenizeCall():
            asked_text = dataclasses.replace(call, tokens=(), ignored=())
            return PreparedAnswer(call=asked_text, body=_detokenize(call, info), ignored=shown_names(call.ignored))


def is_quick(call: Call) -> bool:
    """Whether a small body is prepared at once: it has few prompts, and no text becomes token ids, or token ids text."""
    if not isinstance(call, GenerationCall) or call.is_chat or call.echo or len(call.prompts) > QUICK_PROMPTS:
        return False
    return not any(isinstance(prompt, str) for prompt in call.prompts)


def _generation(call: GenerationCall, info: EngineInfo, job: Job) -> PreparedGeneration:
    params = make_params(call.sampling, info)
    if call.stream and (params.best_of or 0) > params.n:
        message = "best_of above n cannot be streamed: which completions are best is not known before all have ended"
        raise RequestError(message, param="best_of")
    _check_amount(call, params)
    prompts = []
    for i, prompt in enumerate(call.prompts or (None,)):
        ids = _encode(prompt, call, info)
        request = make_request(
            ids,
            params,
            info,
            request_id=f"{job.request_id}-{i}",
            prompt_param=call.prompt_param,
            tenant=job.tenant,
            default_max_tokens=None if call.is_chat else DEFAULT_COMPLETION_TOKENS,
        )
        prompts.append(
            PreparedPrompt(
                request=dataclasses.replace(request, prompt=()),
                token_ids=array.array("i", request.prompt),
                echo=_echo(prompt, call, request, len(ids), info) if call.echo else None,
                first_token=info.tokenizer.token_text(request.prompt[0]) if call.echo else "",
            )
        )
    _check_prompt_logprobs(params, [len(prompt.token_ids) for prompt in prompts])
    left_out: dict[str, Any] = {"prompts": (), "tools": None, "chat_template_kwargs": {}, "sampling": {}, "ignored": ()}
    asked = dataclasses.replace(call, messages=() if call.is_chat else None, **left_out)
    return PreparedGeneration(call=asked, params=params, prompts=tuple(prompts), ignored=_ignored(call, info))


def _encode(prompt: Prompt | None, call: GenerationCall | TokenizeCall, info: EngineInfo) -> Sequence[int]:
    if isinstance(prompt, tuple):
        return prompt
    if prompt is not None:
        return info.tokenizer.encode(prompt, add_special_tokens=call.add_special_tokens)
    return info.tokenizer.apply_chat_template(
        call.messages or (),
        add_generation_prompt=call.add_generation_prompt,
        continue_final_message=call.continue_final_message,
        tools=call.tools,
        template_kwargs=call.chat_template_kwargs,
    )


def _echo(prompt: Prompt | None, call: GenerationCall, request: Request, num_ids: int, info: EngineInfo) -> PromptText:
    """Returns the prompt as it is repeated: without what the tokenizer itself has put around a text, and without what was cut off."""
    before, behind = info.tokenizer.num_added() if isinstance(prompt, str) and call.add_special_tokens else (0, 0)
    cut = num_ids - len(request.prompt)
    return PromptText.decode(request.prompt, info.tokenizer, added=(max(0, before - cut), behind))


def _ignored(call: GenerationCall | TokenizeCall, info: EngineInfo) -> str:
    """Names what has no effect in a call: fields that nobody defines, variables that the template does not name."""
    unread = (name for name in call.chat_template_kwargs if not info.tokenizer.template_reads(name))
    return shown_names((*call.ignored, *(f"chat_template_kwargs.{name}" for name in unread)))


def _tokenize(call: TokenizeCall, info: EngineInfo) -> bytes:
    ids = _encode(call.prompt, call, info)
    strings = [info.tokenizer.token_text(token_id) for token_id in ids] if call.return_token_strs else None
    return encode({"count": len(ids), "max_model_len": info.max_model_len, "tokens": ids, "token_strs": strings})


def _detokenize(call: DetokenizeCall, info: EngineInfo) -> bytes:
    vocab = info.model_config.vocab_size
    if call.tokens and max(call.tokens) >= vocab:
        raise RequestError(f"tokens must hold ids in [0, {vocab - 1}]; got {max(call.tokens)}", param="tokens")
    return encode({"prompt": info.tokenizer.decode(call.tokens, skip_special_tokens=False)})


def _check_amount(call: GenerationCall, params: SamplingParams) -> None:
    """Refuses masks that every prompt of a long list would bring to the device anew."""
    names = ("allowed_token_ids", "bad_token_ids", "logit_bias", "stop_token_ids")
    longest = max(names, key=lambda name: len(getattr(params, name) or ()))
    count = sum(len(getattr(params, name) or ()) for name in names)
    if count * len(call.prompts) > MAX_MASK_IDS:
        message = f"token ids in masks times prompts must be at most {MAX_MASK_IDS}; got {count} times {len(call.prompts)}"
        raise RequestError(message, param=longest)


def _check_prompt_logprobs(params: SamplingParams, lengths: Sequence[int]) -> None:
    """Refuses an answer that would repeat many log-probabilities of a prompt in each of many choices."""
    if params.prompt_logprobs is None:
        return
    count = params.n * sum(lengths) * (1 + params.prompt_logprobs)
    if count > MAX_PROMPT_LOGPROBS:
        raise RequestError(
            f"n times prompt tokens times (prompt_logprobs + 1) must be at most {MAX_PROMPT_LOGPROBS}; "
            f"got {params.n} times {sum(lengths)} times {1 + params.prompt_logprobs}",
            param="prompt_logprobs",
        )
