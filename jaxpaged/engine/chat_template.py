"""A model's chat template: Jinja source that turns a conversation into text, rendered in transformers' sandbox."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from jaxpaged.errors import RequestError

MAX_REASON = 300
"""Longest text of a template's own error that a client gets to see, in characters."""


class ChatTemplate:
    """A template and the special tokens that it may write. Holds plain strings, so it can be sent to another process.

    Args:
        source: Jinja source.
        special_tokens: What the template finds under ``bos_token``, ``eos_token`` and the like.

    Attributes:
        source: The same.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """Returns the text of a conversation.

        Nothing bounds its time and memory: the source is the model's or the operator's, and the server renders in a process that it can
        end (``server.text_pool``).

        Args:
            messages: At least one; keys that hold None count as absent.
            add_generation_prompt: Open the assistant's turn at the end.
            continue_final_message: Leave the last message open instead.
            tools: JSON schemas of functions.
            variables: More variables for the template.

        Raises:
            RequestError: The template is not valid Jinja or rejects the conversation; its reason is in the text, cut to ``MAX_REASON``.
        """
        if not messages:
            raise RequestError("messages must hold at least one message", param="messages", code="invalid_messages")
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            (text,), _ = _renderer()(
                conversations=[given],
                tools=None if tools is None else list(tools),
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **{**self._special_tokens, **variables},
            )
        except jinja2.TemplateSyntaxError as error:
            reason = _shortened(f"line {error.lineno}: {error.message}")
            raise RequestError(f"the chat template is not valid: {reason}", param="messages", code="invalid_chat_template") from error
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            reason = _shortened(str(error))
            raise RequestError(f"the chat template rejects these messages: {reason}", param="messages", code="invalid_messages") from error
        return str(text)


@functools.cache
def _renderer() -> Any:
    return import_transformers("transformers.utils.chat_template_utils").render_jinja_template


def import_transformers(name: str = "transformers") -> Any:
    """Imports transformers, or a module of it, on first use: that takes time, and its advice to install torch is of no use here."""
    log = logging.getLogger("transformers")

    def without_advice(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    log.addFilter(without_advice)
    try:
        return importlib.import_module(name)
    finally:
        log.removeFilter(without_advice)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."
