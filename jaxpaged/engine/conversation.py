"""Conversations as chat templates take them: tool calls, their results and reasoning, which not every template shows.

A template that does not know a part of a message leaves it out without a word, and the model never learns of it. So a template is
tried on small conversations that have the part, with words that stand nowhere else. What does not come out is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxpaged.errors import RequestError

MAX_DEPTH = 32
"""Deepest nesting of arrays and objects in the arguments of a tool call that a template gets as an object."""

_OF_THE_REQUEST = ("messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message")
_OF_TRANSFORMERS = (
    *("self", "conversation", "conversations", "tokenize", "sanitize_control_tokens", "tokenizer_kwargs", "padding", "truncation"),
    *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "raise_exception", "strftime_now"),
)
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "additional_special_tokens")
RESERVED_TEMPLATE_KEYS = frozenset((*_OF_THE_REQUEST, *_OF_TRANSFORMERS, *_SPECIAL_TOKENS))
"""Variables that a request may not give to the template: its own fields, what the sandbox defines, and the model's special tokens."""

_KEYS = ("tool_calls", "function_call", "reasoning_content")
_ROLES = ("tool", "function")


@dataclasses.dataclass(frozen=True)
class TemplateSupport:
    """What a chat template shows beside ``role`` and ``content``.

    Attributes:
        parts: Keys of a message (``tool_calls``, ``function_call``, ``reasoning_content``) and roles (``tool``, ``function``).
        arguments_as_text: Whether it wants the arguments of a call as JSON text; most take the object and write it themselves.
    """

    parts: frozenset[str]
    arguments_as_text: bool = False


def needs_support(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any message has a part that only some templates show."""
    keys = (*_KEYS, "reasoning")
    return any(message.get("role") in _ROLES or any(message.get(key) for key in keys) for message in messages)


def find_support(render: Callable[[list[dict[str, Any]]], str]) -> TemplateSupport:
    """Finds out what a template shows.

    Args:
        render: Renders a conversation; a RequestError from it means that the template rejects the conversation.
    """
    as_objects = TemplateSupport(_shown_parts(render, {"zqkey": "zqvalue"}))
    if as_objects.parts & {"tool_calls", "function_call"}:
        return as_objects
    as_text = TemplateSupport(_shown_parts(render, '{"zqkey": "zqvalue"}'), arguments_as_text=True)
    return as_text if as_text.parts & {"tool_calls", "function_call"} else as_objects


def fit_messages(messages: Sequence[Mapping[str, Any]], support: TemplateSupport) -> list[dict[str, Any]]:
    """Returns the messages in the form that the template takes.

    Args:
        messages: With the arguments of calls as JSON text, as clients got them, or as objects; none or empty text counts as no arguments,
            and text that is no JSON object stays text.
            ``reasoning`` is another name of ``reasoning_content``. No content counts as empty, except from users and the system.
        support: Of the template.

    Raises:
        RequestError: The template leaves a part out, or arguments are neither text nor an object.
    """
    fitted = []
    for i, message in enumerate(messages):
        role = message.get("role")
        if role in _ROLES and role not in support.parts:
            raise _left_out(f"messages[{i}].role", f" {role!r}")
        for key in (*_KEYS, "reasoning"):
            if message.get(key) and ("reasoning_content" if key == "reasoning" else key) not in support.parts:
                raise _left_out(f"messages[{i}].{key}")
        own = dict(message)
        if thought := message.get("reasoning_content") or message.get("reasoning"):
            own |= {"reasoning_content": thought, "reasoning": thought}
        if role in (*_ROLES, "assistant") and not message.get("content"):
            own["content"] = ""
        if own.get("tool_calls"):
            calls = enumerate(own["tool_calls"])
            own["tool_calls"] = [_fit_call(call, f"messages[{i}].tool_calls[{j}].function", support) for j, call in calls]
        if own.get("function_call"):
            own["function_call"] = _fit_function(own["function_call"], f"messages[{i}].function_call", support)
        fitted.append(own)
    return fitted


def _fit_call(call: Mapping[str, Any], where: str, support: TemplateSupport) -> dict[str, Any]:
    return {**call, "function": _fit_function(call["function"], where, support)}


def _fit_function(function: Mapping[str, Any], where: str, support: TemplateSupport) -> dict[str, Any]:
    given = function.get("arguments")
    arguments = _parse_arguments(given, f"{where}.arguments")
    if not support.arguments_as_text:
        return {**function, "arguments": arguments}
    return {**function, "arguments": given if isinstance(given, str) and given.strip() else json.dumps(arguments, ensure_ascii=False)}


def _parse_arguments(arguments: object, where: str) -> Mapping[str, Any] | str:
    """Returns the arguments of a call as an object; text that is no JSON object (finite numbers, Unicode, bounded depth) as it is.

    Models write broken JSON at times, and a history with it must not end the conversation.
    """
    if arguments is None or isinstance(arguments, Mapping):
        return arguments or {}
    if not isinstance(arguments, str):
        raise RequestError(f"{where} must be a JSON object, or its text", param=where)
    try:
        found = json.loads(arguments) if arguments.strip() else {}
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, Mapping) and _depth(found) <= MAX_DEPTH else arguments


def _depth(value: object) -> int:
    """Returns how deep arrays and objects nest, or a little more than ``MAX_DEPTH``; without recursion."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        inner = [list(item.values()) if isinstance(item, Mapping) else item for item in level if isinstance(item, Mapping | list | tuple)]
        depth += bool(inner)
        level = [item for items in inner for item in items]
    return depth


def _left_out(where: str, shown: str = "") -> RequestError:
    message = f"{where}{shown} is not supported by this model: its chat template leaves it out"
    return RequestError(message, param=where, code="unsupported_parameter")


def _shown_parts(render: Callable[[list[dict[str, Any]]], str], arguments: Mapping[str, str] | str) -> frozenset[str]:
    """Returns the parts whose words come out, where calls have such arguments."""
    function, call_id = {"name": "zqname", "arguments": arguments}, "zq1234567"  # some templates insist on ids of nine characters
    asked = {"role": "user", "content": "zqasked"}
    said = {"role": "assistant", "content": "zqsaid"}
    called = {"role": "assistant", "content": "", "tool_calls": [{"id": call_id, "type": "function", "function": function}]}
    result = {"role": "tool", "content": "zqresult", "tool_call_id": call_id, "name": "zqname"}
    old_called = {"role": "assistant", "content": "", "function_call": function}
    old_result = {"role": "function", "content": "zqresult", "name": "zqname"}
    thought = {"reasoning_content": "zqthought", "reasoning": "zqthought"}
    call_words = ("zqname", "zqkey", "zqvalue")
    trials: dict[str, tuple[tuple[str, ...], list[list[dict[str, Any]]]]] = {
        "tool_calls": (call_words, [[asked, called], [asked, called, result]]),
        "function_call": (call_words, [[asked, old_called], [asked, old_called, old_result]]),
        "reasoning_content": (("zqthought",), [[asked, said | thought], [asked, called | thought, result]]),
        "tool": (("zqresult",), [[asked, called, result], [asked, said, result]]),
        "function": (("zqresult",), [[asked, old_called, old_result], [asked, said, old_result]]),
    }
    return frozenset(part for part, (words, talks) in trials.items() if any(_shows(render, talk, words) for talk in talks))


def _shows(render: Callable[[list[dict[str, Any]]], str], messages: list[dict[str, Any]], words: Sequence[str]) -> bool:
    try:
        text = render(messages)
    except RequestError:
        return False
    return all(word in text for word in words)
