"""Text to token ids and back, over a Hugging Face fast tokenizer; no torch, no remote code, no network once loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Tokenizer:
    """A tokenizer that several threads may use at once.

    Attributes:
        vocab_size: Number of ids the tokenizer knows; the model's may be larger (padded) and is what requests are checked against.
        bos_token, eos_token: Spelling of the special tokens, or None.
        eos_token_id: Id of the end-of-sequence token, or None.
        has_chat_template: Whether ``apply_chat_template`` works without a template of the request's own.
    """

    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    eos_token_id: int | None
    has_chat_template: bool

    @classmethod
    def load(cls, path: str | Path, *, chat_template: str | Path | None = None) -> Tokenizer:
        """Loads from a local directory.

        Raises:
            CheckpointError: Files are missing or damaged, or the tokenizer has no fast form.
        """
        raise NotImplementedError

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of ``text``; special tokens spelled in it count as such (as vLLM does for raw prompts)."""
        raise NotImplementedError

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of ``token_ids``; ids the tokenizer does not know give nothing."""
        raise NotImplementedError

    def token_text(self, token_id: int) -> str:
        """Returns one token as shown in log-probability answers (replacement characters for partial ones)."""
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the exact bytes one token stands for."""
        raise NotImplementedError

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Renders a conversation in the sandboxed template and returns its ids.

        Special tokens spelled in the text of a message become ordinary text, never special tokens.

        Raises:
            RequestError: There is no template, or it rejects the conversation (400 with its message).
        """
        raise NotImplementedError
