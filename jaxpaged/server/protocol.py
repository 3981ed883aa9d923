"""From a JSON object to a checked call: every rule that needs no model.

What comes out is frozen and complete; what depends on the model (vocabulary, context length) is checked by
``engine.admission`` once the prompt is tokenised.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpaged.errors import RequestError
from jaxpaged.scheduling.fields import SAMPLING_FIELDS
from jaxpaged.server.fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    DETOKENIZE_FIELDS,
    MAX_IDS,
    MAX_MESSAGES,
    MAX_PROMPTS,
    TOKENIZE_FIELDS,
    BodyField,
)

_SAMPLING_NAMES = frozenset(spec.name for spec in SAMPLING_FIELDS)
_TOKEN_ID_KEY = re.compile(r"(?:0|[1-9][0-9]{0,9})")
_SHOWN_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,64}")
_STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")
_ROLES = ("developer", "system", "user", "assistant")
_MESSAGE_KEYS_WITHOUT_EFFECT = frozenset({"name", "refusal", "annotations"})
_MESSAGE_KEYS_UNSUPPORTED = ("tool_calls", "tool_call_id", "function_call", "audio", "reasoning_content", "reasoning")

Message = Mapping[str, str]
Prompt = str | tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationCall:
    """A checked body of /v1/chat/completions or /v1/completions.

    Attributes:
        model: As the client wrote it.
        sampling: The sampling fields that the client gave, under ``SamplingParams``' names.
        messages: The conversation; None for completions. Each message has exactly ``role`` and ``content``.
        prompts: Texts or token ids; empty for chat.
        stream: Whether to answer with events; ``include_usage`` and ``continuous_usage`` say what counts they carry.
        truncate_prompt_tokens: Keep only this many last tokens of each prompt; None for all.
        want_prompt_logprobs: Whether the client asked to see them itself (``echo`` needs them too).
        ignored: Names of fields that nobody defines.
    """

    model: str
    sampling: Mapping[str, Any]
    messages: tuple[Message, ...] | None = None
    prompts: tuple[Prompt, ...] = ()
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    want_prompt_logprobs: bool = False
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    ignored: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        """Whether this is a chat completion."""
        return self.messages is not None

    @property
    def prompt_param(self) -> str:
        """Name of the field that holds the prompt."""
        return "messages" if self.is_chat else "prompt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeCall:
    """A checked body of /tokenize: ``prompt`` or ``messages``."""

    model: str | None
    prompt: str | None
    messages: tuple[Message, ...] | None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False
    ignored: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetokenizeCall:
    """A checked body of /detokenize."""

    model: str | None
    tokens: tuple[int, ...]
    ignored: tuple[str, ...] = ()


def parse_chat(body: Mapping[str, Any]) -> GenerationCall:
    """Checks the body of POST /v1/chat/completions.

    Raises:
        RequestError: Names the field, the value and what is allowed.
    """
    values, ignored = _read(body, CHAT_FIELDS)
    messages, more_ignored = _parse_messages(values["messages"])
    if values.get("continue_final_message"):
        if values.get("add_generation_prompt"):
            raise _bad("continue_final_message and add_generation_prompt exclude each other", "continue_final_message")
        if messages[-1]["role"] != "assistant":
            raise _bad("continue_final_message needs a last message from the assistant", "continue_final_message")
    logprobs, top = values.pop("logprobs", None), values.pop("top_logprobs", None)
    if top and not logprobs:
        raise _bad("top_logprobs needs logprobs to be true", "top_logprobs")
    sampling = _sampling(values)
    if logprobs:
        sampling["logprobs"] = top or 0
    if values.get("max_completion_tokens") is not None:
        sampling["max_tokens"] = values["max_completion_tokens"]
    return GenerationCall(
        messages=messages,
        sampling=sampling,
        continue_final_message=values.get("continue_final_message", False),
        add_generation_prompt=values.get("add_generation_prompt", not values.get("continue_final_message", False)),
        **_common(values),
        ignored=(*ignored, *more_ignored),
    )


def parse_completion(body: Mapping[str, Any]) -> GenerationCall:
    """Checks the body of POST /v1/completions.

    Raises:
        RequestError: Names the field, the value and what is allowed.
    """
    values, ignored = _read(body, COMPLETION_FIELDS)
    prompts = _parse_prompts(values["prompt"])
    sampling = _sampling(values)
    most = max(("n", "best_of", "beam_width"), key=lambda name: sampling.get(name, 1))
    if len(prompts) * sampling.get(most, 1) > MAX_PROMPTS:
        raise _bad(f"prompts times {most} must be at most {MAX_PROMPTS}; got {len(prompts)} times {sampling[most]}", most)
    echo = values.get("echo", False)
    if echo and sampling.get("logprobs") is not None:
        sampling.setdefault("prompt_logprobs", sampling["logprobs"])
    return GenerationCall(
        prompts=prompts,
        sampling=sampling,
        echo=echo,
        add_special_tokens=values.get("add_special_tokens", True),
        **_common(values),
        ignored=ignored,
    )


def parse_tokenize(body: Mapping[str, Any]) -> TokenizeCall:
    """Checks the body of POST /tokenize.

    Raises:
        RequestError: Names the field, the value and what is allowed.
    """
    values, ignored = _read(body, TOKENIZE_FIELDS)
    prompt, messages = values.get("prompt"), None
    if (prompt is None) == (values.get("messages") is None):
        raise _bad("give either prompt or messages", "prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise _bad(f"prompt must be a string; got {_shown(prompt)}", "prompt")
    if prompt is None:
        messages, more_ignored = _parse_messages(values["messages"])
        ignored = (*ignored, *more_ignored)
    continued = values.get("continue_final_message", False)
    return TokenizeCall(
        model=values.get("model"),
        prompt=prompt,
        messages=messages,
        add_special_tokens=values.get("add_special_tokens", True),
        add_generation_prompt=values.get("add_generation_prompt", not continued),
        continue_final_message=continued,
        return_token_strs=values.get("return_token_strs", False),
        ignored=ignored,
    )


def parse_detokenize(body: Mapping[str, Any]) -> DetokenizeCall:
    """Checks the body of POST /detokenize.

    Raises:
        RequestError: Names the field, the value and what is allowed.
    """
    values, ignored = _read(body, DETOKENIZE_FIELDS)
    tokens = values["tokens"]
    if not isinstance(tokens, list) or len(tokens) > MAX_IDS or not all(_is_id(item) for item in tokens):
        raise _bad(f"tokens must be a list of at most {MAX_IDS} integers in [0, vocabulary); got {_shown(tokens)}", "tokens")
    return DetokenizeCall(model=values.get("model"), tokens=tuple(tokens), ignored=ignored)


def shown_names(names: Sequence[str], most: int = 16) -> str:
    """Joins field names for a header; a name that is not plain ASCII is shown as ``?``."""
    shown = [name if _SHOWN_NAME.fullmatch(name) else "?" for name in names[:most]]
    return ", ".join(shown + [f"and {len(names) - most} more"] * (len(names) > most))


def _read(body: Mapping[str, Any], fields: Sequence[BodyField]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the known fields that are not null, each checked alone, and the names of the others."""
    known = {field.name: field for field in fields}
    values = {name: value for name, value in body.items() if name in known and value is not None}
    for field in fields:
        if field.required and field.name not in values:
            raise RequestError(f"{field.name} is required: {field.type}", param=field.name, code="missing_required_parameter")
    if "logit_bias" in values:
        values["logit_bias"] = _parse_bias(values["logit_bias"])
    for name, value in values.items():
        known[name].check(value)
    return values, tuple(name for name in body if name not in known)


def _sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in _SAMPLING_NAMES}


def _common(values: Mapping[str, Any]) -> dict[str, Any]:
    stream = values.get("stream", False)
    options = _parse_stream_options(values.get("stream_options"), stream)
    if stream:
        _check_streamable(values)
    return {
        "model": values["model"],
        "stream": stream,
        "include_usage": options.get("include_usage", False),
        "continuous_usage": options.get("include_usage", False) and options.get("continuous_usage_stats", False),
        "want_prompt_logprobs": values.get("prompt_logprobs") is not None,
        "truncate_prompt_tokens": values.get("truncate_prompt_tokens"),
        "return_token_ids": values.get("return_token_ids", False),
        "return_tokens_as_token_ids": values.get("return_tokens_as_token_ids", False),
    }


def _check_streamable(values: Mapping[str, Any]) -> None:
    """Refuses to stream what is not known before the end."""
    if values.get("prompt_logprobs") is not None:
        raise _bad("prompt_logprobs cannot be streamed", "prompt_logprobs")
    if values.get("use_beam_search"):
        raise _bad("use_beam_search cannot be streamed: no text is decided before the search has ended", "use_beam_search")
    if values.get("best_of", 1) > values.get("n", 1):
        raise _bad("best_of above n cannot be streamed: which completions are best is not known before all have ended", "best_of")


def _parse_stream_options(options: object, stream: bool) -> Mapping[str, bool]:
    if options is None:
        return {}
    if not stream:
        raise _bad("stream_options needs stream to be true", "stream_options")
    if not isinstance(options, dict):
        raise _bad(f"stream_options must be an object of booleans; got {_shown(options)}", "stream_options")
    for name in _STREAM_OPTIONS:
        if not isinstance(options.get(name), bool | None):
            raise _bad(f"stream_options.{name} must be true or false; got {_shown(options[name])}", f"stream_options.{name}")
    return {name: options[name] for name in _STREAM_OPTIONS if options.get(name) is not None}


def _parse_bias(bias: object) -> object:
    """Turns JSON's string keys into token ids; what is not an object is left for the field's own check to refuse."""
    if not isinstance(bias, dict):
        return bias
    for key in bias:
        if not _TOKEN_ID_KEY.fullmatch(key):
            raise _bad(f"logit_bias must map token ids to numbers; got the key {_shown(key)}", "logit_bias")
    return {int(key): value for key, value in bias.items()}


def _parse_prompts(prompt: object) -> tuple[Prompt, ...]:
    """Returns the prompts as texts or tuples of ids; the four forms that OpenAI knows become one."""
    if isinstance(prompt, str):
        return (_checked_text(prompt),)
    if not isinstance(prompt, list) or not prompt:
        raise _bad_prompt(prompt)
    if all(map(_is_id, prompt)):
        return (_checked_ids(prompt),)
    if len(prompt) > MAX_PROMPTS:
        raise _bad(f"prompt must have at most {MAX_PROMPTS} entries; got {len(prompt)}", "prompt")
    if all(isinstance(item, str) for item in prompt):
        return tuple(_checked_text(item) for item in prompt)
    if all(isinstance(item, list) and item and all(map(_is_id, item)) for item in prompt):
        return tuple(_checked_ids(item) for item in prompt)
    raise _bad_prompt(prompt)


def _checked_text(text: str) -> str:
    if not text:
        raise _bad("prompt must not be empty", "prompt")
    return text


def _checked_ids(ids: list[int]) -> tuple[int, ...]:
    if len(ids) > MAX_IDS:
        raise _bad(f"prompt must have at most {MAX_IDS} token ids; got {len(ids)}", "prompt")
    return tuple(ids)


def _parse_messages(messages: object) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        shown = f"{len(messages)} of them" if isinstance(messages, list) else _shown(messages)
        raise _bad(f"messages must be a list of 1 to {MAX_MESSAGES} messages; got {shown}", "messages")
    ignored: dict[str, None] = {}
    parsed = tuple(_parse_message(message, f"messages[{i}]", ignored) for i, message in enumerate(messages))
    return parsed, tuple(ignored)


def _parse_message(message: object, where: str, ignored: dict[str, None]) -> Message:
    if not isinstance(message, dict):
        raise _bad(f"{where} must be an object with role and content; got {_shown(message)}", where)
    role = message.get("role")
    if role in ("tool", "function"):
        raise RequestError(
            f"{where}.role {role!r} is not supported: this server has no tool calls", param=f"{where}.role", code="unsupported_parameter"
        )
    if role not in _ROLES:
        raise _bad(f"{where}.role must be one of {', '.join(_ROLES)}; got {_shown(role)}", f"{where}.role")
    for key in _MESSAGE_KEYS_UNSUPPORTED:
        if message.get(key) not in (None, []):
            raise RequestError(f"{where}.{key} is not supported by this server", param=f"{where}.{key}", code="unsupported_parameter")
    for key in message:
        if key not in ("role", "content") and key not in _MESSAGE_KEYS_WITHOUT_EFFECT and key not in _MESSAGE_KEYS_UNSUPPORTED:
            ignored[f"messages.{key}"] = None
    content = _parse_content(message.get("content"), f"{where}.content")
    return {"role": "system" if role == "developer" else role, "content": content}


def _parse_content(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise _bad(f"{where} must be a string or a list of text parts; got {_shown(content)}", where)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise _bad(f'{where}[{i}] must be an object {{"type": "text", "text": ...}}; got {_shown(part)}', f"{where}[{i}]")
        if part["type"] != "text":
            raise RequestError(
                f"{where}[{i}].type {_shown(part['type'])} is not supported: only text is",
                param=f"{where}[{i}].type",
                code="unsupported_parameter",
            )
        if not isinstance(part.get("text"), str):
            raise _bad(f"{where}[{i}].text must be a string; got {_shown(part.get('text'))}", f"{where}[{i}].text")
        texts.append(part["text"])
    return "\n".join(texts)


def _is_id(item: object) -> bool:
    return type(item) is int and 0 <= item < 2**31


def _bad(message: str, param: str) -> RequestError:
    return RequestError(message, param=param)


def _bad_prompt(prompt: object) -> RequestError:
    return _bad(
        f"prompt must be a string, a list of token ids in [0, vocabulary), or a list of strings or of lists of them, none empty; "
        f"got {_shown(prompt)}",
        "prompt",
    )


def _shown(value: object) -> str:
    """Shows a value in an error message: its kind for what is long, itself for what is short."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} items"
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
