"""From a JSON object to a checked call: every rule that needs no model.

What comes out is frozen and complete; what depends on the model (vocabulary, context length) is checked by
``engine.admission`` once the prompt is tokenised.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpaged.engine.conversation import RESERVED_TEMPLATE_KEYS
from jaxpaged.errors import RequestError
from jaxpaged.scheduling.fields import SAMPLING_FIELDS, asks_for_nothing
from jaxpaged.server.fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    DETOKENIZE_FIELDS,
    MAX_IDS,
    MAX_LABEL_CHARS,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_TEMPLATE_KWARGS,
    MAX_TEMPLATE_KWARGS_BYTES,
    MAX_TOOLS,
    STREAM_OPTION_NAMES,
    TOKENIZE_FIELDS,
    BodyField,
)

_SAMPLING_NAMES = frozenset(spec.name for spec in SAMPLING_FIELDS)
_TOKEN_ID_KEY = re.compile(r"(?:0|[1-9][0-9]{0,9})")
_SHOWN_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,64}")
_INDEX = re.compile(r"\[[0-9]+\]")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_ROLES = ("developer", "system", "user", "assistant", "tool", "function")
_MAY_SAY_NOTHING = ("assistant", "tool", "function")
_MESSAGE_KEYS_WITHOUT_EFFECT = frozenset({"refusal", "annotations"})
_MESSAGE_KEYS_OF_ROLES: Mapping[str, tuple[str, ...]] = {
    "tool_calls": ("assistant",),
    "function_call": ("assistant",),
    "reasoning_content": ("assistant",),
    "reasoning": ("assistant",),
    "tool_call_id": ("tool", "function"),
    "audio": (),
}

Message = Mapping[str, Any]
Prompt = str | tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationCall:
    """A checked body of /v1/chat/completions or /v1/completions.

    Attributes:
        model: As the client wrote it.
        sampling: The sampling fields that the client gave, under ``SamplingParams``' names.
        messages: The conversation; None for completions. Each message has ``role``, ``content`` and what templates may show beside:
            ``name``, ``tool_calls``, ``function_call``, ``tool_call_id``, ``reasoning_content``, ``reasoning``.
        tools: Functions for the chat template to show; None for none.
        chat_template_kwargs: Variables for the chat template.
        prompts: Texts or token ids; empty for chat.
        stream: Whether to answer with events; ``include_usage`` and ``continuous_usage`` say what counts they carry.
        want_prompt_logprobs: Whether the client asked to see them itself (``echo`` needs them too).
        ignored: Names of fields that nobody defines.
        spellings: What the client called some of the sampling fields, by their names in ``sampling``.
    """

    model: str
    sampling: Mapping[str, Any]
    messages: tuple[Message, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompts: tuple[Prompt, ...] = ()
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    want_prompt_logprobs: bool = False
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    ignored: tuple[str, ...] = ()
    spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        """Whether this is a chat completion."""
        return self.messages is not None

    @property
    def prompt_param(self) -> str:
        """Name of the field that holds the prompt."""
        return "messages" if self.is_chat else "prompt"

    def in_the_clients_words(self, error: RequestError) -> RequestError:
        """Returns an error about the sampling fields that names those that the client sent."""
        message = re.sub(r"\w+", lambda word: self.spellings.get(word[0], word[0]), str(error))
        return RequestError(message, param=self.spellings.get(error.param or "", error.param), code=error.code, status=error.status)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeCall:
    """A checked body of /tokenize: ``prompt`` or ``messages``."""

    model: str | None
    prompt: str | None
    messages: tuple[Message, ...] | None
    tools: tuple[Mapping[str, Any], ...] | None = None
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
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
    if not asks_for_nothing(values.get("tools")) and values.get("tool_choice") != "none":
        raise RequestError(
            'tools is supported with tool_choice "none" only: this server does not read tool calls from the output',
            param="tools",
            code="unsupported_parameter",
        )
    sampling, spellings = _sampling(values), {}
    if logprobs:
        sampling["logprobs"] = top or 0
    if top:
        spellings["logprobs"] = "top_logprobs"
    if values.get("max_completion_tokens") is not None:
        sampling["max_tokens"] = values["max_completion_tokens"]
        spellings["max_tokens"] = "max_completion_tokens"
    return GenerationCall(
        messages=messages,
        tools=_parse_tools(values.get("tools")),
        chat_template_kwargs=_parse_template_kwargs(values.get("chat_template_kwargs")),
        sampling=sampling,
        continue_final_message=values.get("continue_final_message", False),
        add_generation_prompt=values.get("add_generation_prompt", not values.get("continue_final_message", False)),
        **_common(values),
        ignored=(*ignored, *more_ignored),
        spellings=spellings,
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
    spellings = {}
    if echo and "logprobs" in sampling and "prompt_logprobs" not in sampling:
        sampling["prompt_logprobs"] = sampling["logprobs"]
        spellings["prompt_logprobs"] = "logprobs"
    return GenerationCall(
        prompts=prompts,
        sampling=sampling,
        echo=echo,
        add_special_tokens=values.get("add_special_tokens", True),
        **_common(values),
        ignored=ignored,
        spellings=spellings,
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
        tools=_parse_tools(values.get("tools")),
        chat_template_kwargs=_parse_template_kwargs(values.get("chat_template_kwargs")),
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
        values[name] = value = _whole_numbers(value) if known[name].takes_integers else value
        known[name].check(value)
    return values, tuple(name for name in body if name not in known)


def _whole_numbers(value: Any) -> Any:
    """Returns a number, or the numbers in lists, as integers where they are: 5.0 is 5, as JSON has only one kind of number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list) and any(isinstance(item, float | list) for item in value):
        return [_whole_numbers(item) for item in value]
    return value


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
        "return_token_ids": values.get("return_token_ids", False),
        "return_tokens_as_token_ids": values.get("return_tokens_as_token_ids", False),
    }


def _check_streamable(values: Mapping[str, Any]) -> None:
    """Refuses to stream what is not known before the end."""
    if values.get("prompt_logprobs") is not None:
        raise _bad("prompt_logprobs cannot be streamed", "prompt_logprobs")
    if values.get("use_beam_search"):
        raise _bad("use_beam_search cannot be streamed: no text is decided before the search has ended", "use_beam_search")


def _parse_stream_options(options: object, stream: bool) -> Mapping[str, bool]:
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise _bad(f"stream_options must be an object of booleans; got {_shown(options)}", "stream_options")
    for name in STREAM_OPTION_NAMES:
        if not isinstance(options.get(name), bool | None):
            raise _bad(f"stream_options.{name} must be true or false; got {_shown(options[name])}", f"stream_options.{name}")
    wanted = {name: True for name in STREAM_OPTION_NAMES if options.get(name)}
    if wanted and not stream:
        raise _bad("stream_options needs stream to be true", "stream_options")
    return wanted


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
    if role not in _ROLES:
        raise _bad(f"{where}.role must be one of {', '.join(_ROLES)}; got {_shown(role)}", f"{where}.role")
    parsed: dict[str, Any] = {"role": "system" if role == "developer" else role}
    parsed["content"] = _parse_content(message.get("content"), f"{where}.content", may_be_empty=role in _MAY_SAY_NOTHING)
    for key, value in message.items():
        if key in ("role", "content") or key in _MESSAGE_KEYS_WITHOUT_EFFECT:
            continue
        if key != "name" and key not in _MESSAGE_KEYS_OF_ROLES:
            ignored[f"messages.{key}"] = None
        elif value is not None:
            found = _parse_message_key(key, value, role, f"{where}.{key}", ignored)
            if not asks_for_nothing(found):
                parsed[key] = found
    return parsed


def _parse_message_key(key: str, value: object, role: str, where: str, ignored: dict[str, None]) -> object:
    """Returns the value of a key that only some messages have; whether the model's template shows it is seen where the template is."""
    roles = _MESSAGE_KEYS_OF_ROLES.get(key)
    if roles is not None and role not in roles:
        if asks_for_nothing(value):
            return None
        if not roles:
            raise RequestError(f"{where} is not supported by this server", param=where, code="unsupported_parameter")
        raise _bad(f"{where} belongs to messages of role {' or '.join(roles)} only, not {role}", where)
    match key:
        case "tool_calls":
            if not isinstance(value, list) or len(value) > MAX_TOOLS:
                raise _bad(f"{where} must be a list of at most {MAX_TOOLS} calls; got {_shown(value)}", where)
            return [_parse_call(call, f"{where}[{i}]", ignored) for i, call in enumerate(value)]
        case "function_call":
            return _parse_function(value, where, ignored)
        case "reasoning_content" | "reasoning":
            if not isinstance(value, str):
                raise _bad(f"{where} must be a string; got {_shown(value)}", where)
            return value
        case _:
            return _parse_label(value, where)


def _parse_call(call: object, where: str, ignored: dict[str, None]) -> Mapping[str, Any]:
    if not isinstance(call, dict):
        raise _bad(f'{where} must be an object {{"id": ..., "type": "function", "function": ...}}; got {_shown(call)}', where)
    if call.get("type") not in (None, "function"):
        raise RequestError(
            f"{where}.type {_shown(call['type'])} is not supported: only function is", param=f"{where}.type", code="unsupported_parameter"
        )
    for key in call:
        if key not in ("id", "type", "function", "index"):
            ignored[f"messages.tool_calls.{key}"] = None
    name = {} if call.get("id") is None else {"id": _parse_label(call["id"], f"{where}.id")}
    return {**name, "type": "function", "function": _parse_function(call.get("function"), f"{where}.function", ignored)}


def _parse_function(function: object, where: str, ignored: dict[str, None]) -> Mapping[str, Any]:
    """Returns a call's name and arguments; JSON text in the arguments is read where the template is (it may be long)."""
    if not isinstance(function, dict):
        raise _bad(f'{where} must be an object {{"name": ..., "arguments": ...}}; got {_shown(function)}', where)
    arguments = function.get("arguments")
    if not isinstance(arguments, str | dict | None):
        raise _bad(f"{where}.arguments must be a JSON object, or its text; got {_shown(arguments)}", f"{where}.arguments")
    for key in function:
        if key not in ("name", "arguments"):
            ignored[f"{_INDEX.sub('', where)}.{key}"] = None
    return {"name": _parse_label(function.get("name"), f"{where}.name", empty=False), "arguments": arguments}


def _parse_label(value: object, where: str, *, empty: bool = True) -> str:
    if not isinstance(value, str) or len(value) > MAX_LABEL_CHARS or not (value or empty):
        raise _bad(
            f"{where} must be a{'' if empty else ' non-empty'} string of at most {MAX_LABEL_CHARS} characters; got {_shown(value)}", where
        )
    return value


def _parse_tools(tools: object) -> tuple[Mapping[str, Any], ...] | None:
    """Returns the tools as the client gave them, for the template to show; None for none."""
    if tools is None:
        return None
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise _bad(f"tools must be a list of at most {MAX_TOOLS} tools; got {_shown(tools)}", "tools")
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise _bad(f'{where} must be an object {{"type": "function", "function": {{"name": ...}}}}; got {_shown(tool)}', where)
        function = tool["function"]
        _parse_label(function.get("name"), f"{where}.function.name", empty=False)
        for key, kind, shown in (("description", str, "a string"), ("parameters", dict, "an object")):
            if not isinstance(function.get(key), kind | None):
                raise _bad(f"{where}.function.{key} must be {shown}; got {_shown(function[key])}", f"{where}.function.{key}")
    return tuple(tools) or None


def _parse_template_kwargs(given: object) -> Mapping[str, Any]:
    """Returns the template's variables; the body has bounded how deep they nest."""
    where = "chat_template_kwargs"
    if given is None:
        return {}
    if not isinstance(given, dict) or len(given) > MAX_TEMPLATE_KWARGS:
        raise _bad(f"{where} must be an object of at most {MAX_TEMPLATE_KWARGS} names; got {_shown(given)}", where)
    for name in given:
        if not _VARIABLE.fullmatch(name) or name in RESERVED_TEMPLATE_KEYS:
            rule = "is a name that a request may not give to the template" if name in RESERVED_TEMPLATE_KEYS else "is not a variable's name"
            raise _bad(f"{where}: {_shown(name)} {rule}", where)
    if (size := len(json.dumps(given))) > MAX_TEMPLATE_KWARGS_BYTES:
        raise _bad(f"{where} must have at most {MAX_TEMPLATE_KWARGS_BYTES} bytes of JSON; got {size}", where)
    return {} if asks_for_nothing(given) else given


def _parse_content(content: object, where: str, *, may_be_empty: bool) -> str:
    if isinstance(content, str):
        return content
    if may_be_empty and (content is None or content == []):
        return ""
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
