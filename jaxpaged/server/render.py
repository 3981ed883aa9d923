"""From deltas to OpenAI's objects: whole answers as plain dicts, streamed chunks as msgspec structs (the hot path).

An answer may hold a million log-probabilities. So each token's are encoded by themselves, those of a prompt once for all of its choices:
a thread that renders such an answer never holds the lock of Python's threads for long.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from jaxpaged.engine.output import Delta, PromptText, TokenText, describe_token
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.scheduling.plan import TokenLogprobs
from jaxpaged.server.answers import encode


class _PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    """Token counts; the prompt is counted once however many completions it got."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: _PromptTokensDetails

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
        """Makes the counts, the first two's sum, and how many of the prompt's tokens were in the prefix cache."""
        return cls(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, _PromptTokensDetails(cached_tokens))


class _ChatDelta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class _ChatChoice(msgspec.Struct):
    index: int
    delta: _ChatDelta
    logprobs: Any = None
    finish_reason: str | None = None
    stop_reason: int | str | msgspec.UnsetType | None = msgspec.UNSET
    token_ids: Sequence[int] | msgspec.UnsetType = msgspec.UNSET


class _TextChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: Any = None
    finish_reason: str | None = None
    stop_reason: int | str | msgspec.UnsetType | None = msgspec.UNSET
    token_ids: Sequence[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: Sequence[int] | msgspec.UnsetType = msgspec.UNSET


class _Chunk(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Any]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    prompt_token_ids: Sequence[int] | msgspec.UnsetType = msgspec.UNSET


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """What all chunks of an answer share."""

    id: str
    created: int
    model: str
    fingerprint: str


@dataclasses.dataclass(kw_only=True)
class Choice:
    """One completion as it grows.

    Attributes:
        index: Its place in ``choices``.
        prompt_token_ids: Of its prompt; choices of one prompt have the same tuple.
        echo: The prompt, where it is repeated before the output.
        first_token: Text of the prompt's first token, which has no log-probability; for ``echo``.
        started: Whether its first chunk was sent.
    """

    index: int
    prompt_token_ids: tuple[int, ...] = ()
    echo: PromptText | None = None
    first_token: str = ""
    text: list[str] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenText] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    started: bool = False

    @property
    def echo_text(self) -> str:
        """What stands before the output's text."""
        return "" if self.echo is None else self.echo.text

    def add(self, delta: Delta) -> None:
        """Appends one delta, for an answer that is sent whole."""
        self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.prompt_logprobs.extend(delta.prompt_logprobs)
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


_PromptsDone = dict[tuple[str, int], Any]
"""What was rendered of the prompts of an answer, by form and by the identity of ``Choice.prompt_token_ids``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Renderer:
    """Renders the answers to one call.

    Attributes:
        label: Id, time, model.
        tokenizer: Names the tokens of prompts.
        chat: Chat completions or completions.
        want_logprobs, want_prompt_logprobs, want_token_ids: What the client asked to see.
        want_usage: Whether a stream's other chunks carry ``usage: null``.
        ids_as_tokens: Name tokens ``token_id:<id>``.
    """

    label: Label
    tokenizer: Tokenizer
    chat: bool
    want_logprobs: bool = False
    want_prompt_logprobs: bool = False
    want_token_ids: bool = False
    want_usage: bool = False
    ids_as_tokens: bool = False

    # ------------------------------------------------------------------------------------------------ whole answers

    def answer(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """Returns the body of an answer that is not streamed."""
        prompts: _PromptsDone = {}
        body: dict[str, Any] = {
            "id": self.label.id,
            "object": "chat.completion" if self.chat else "text_completion",
            "created": self.label.created,
            "model": self.label.model,
            "system_fingerprint": self.label.fingerprint,
            "choices": [self._whole_choice(choice, prompts) for choice in choices],
            "usage": usage,
        }
        if self.chat and self.want_prompt_logprobs:
            body["prompt_logprobs"] = self._prompt_logprobs(choices[0], prompts)
        if self.chat and self.want_token_ids:
            body["prompt_token_ids"] = choices[0].prompt_token_ids
        return encode(body)

    def _whole_choice(self, choice: Choice, prompts: _PromptsDone) -> dict[str, Any]:
        text = "".join(choice.text)
        body: dict[str, Any] = {"index": choice.index}
        if self.chat:
            body["message"] = {"role": "assistant", "content": text, "refusal": None}
            body["logprobs"] = self._chat_logprobs(choice.logprobs) if self.want_logprobs else None
        else:
            body["text"] = choice.echo_text + text
            body["logprobs"] = self._whole_text_logprobs(choice, prompts) if self.want_logprobs else None
            if self.want_prompt_logprobs:
                body["prompt_logprobs"] = self._prompt_logprobs(choice, prompts)
            if self.want_token_ids:
                body["prompt_token_ids"] = choice.prompt_token_ids
        if self.want_token_ids:
            body["token_ids"] = choice.token_ids
        return body | {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}

    # ------------------------------------------------------------------------------------------------ streamed chunks

    def first(self, choice: Choice, usage: Usage | None) -> bytes:
        """Returns the events that open one choice: the role of a chat, the echoed prompt of a completion; else nothing."""
        if self.chat:
            opening = _ChatChoice(choice.index, _ChatDelta(role="assistant", content=""))
            return self._event(opening, usage, choice.prompt_token_ids if self.want_token_ids and choice.index == 0 else msgspec.UNSET)
        if choice.echo is None and not self.want_token_ids:
            return b""
        logprobs = self._echo_logprobs(choice, choice.echo, {}) if self.want_logprobs and choice.echo else None
        opening_text = _TextChoice(choice.index, choice.echo_text, logprobs)
        if self.want_token_ids:
            opening_text.prompt_token_ids = choice.prompt_token_ids
        return self._event(opening_text, usage)

    def next(self, choice: Choice, delta: Delta, usage: Usage | None) -> bytes:
        """Returns the events for one delta: its text, then its end; nothing while all of it is held back."""
        events = b""
        if delta.text or delta.logprobs or (self.want_token_ids and delta.token_ids):
            events = self._event(self._piece(choice, delta), usage)
        if delta.finish_reason is not None:
            last: _ChatChoice | _TextChoice
            last = _ChatChoice(choice.index, _ChatDelta()) if self.chat else _TextChoice(choice.index, "")
            last.finish_reason, last.stop_reason = delta.finish_reason, delta.stop_reason
            events += self._event(last, usage)
        return events

    def usage(self, usage: Usage) -> bytes:
        """Returns the event with the counts and no choices, which ends a stream that asked for it."""
        return b"data: " + encode(self._chunk([], usage)) + b"\n\n"

    def _piece(self, choice: Choice, delta: Delta) -> _ChatChoice | _TextChoice:
        piece: _ChatChoice | _TextChoice
        if self.chat:
            piece = _ChatChoice(choice.index, _ChatDelta(content=delta.text))
            if self.want_logprobs and delta.logprobs:
                piece.logprobs = self._chat_logprobs(delta.logprobs)
        else:
            piece = _TextChoice(choice.index, delta.text)
            if self.want_logprobs and delta.logprobs:
                piece.logprobs = self._text_logprobs(delta.logprobs, len(choice.echo_text))
        if self.want_token_ids:
            piece.token_ids = delta.token_ids
        return piece

    def _event(self, choice: _ChatChoice | _TextChoice, usage: Usage | None, prompt_token_ids: Any = msgspec.UNSET) -> bytes:
        chunk = self._chunk([choice], usage if usage is not None else None if self.want_usage else msgspec.UNSET)
        chunk.prompt_token_ids = prompt_token_ids
        return b"data: " + encode(chunk) + b"\n\n"

    def _chunk(self, choices: list[Any], usage: Usage | msgspec.UnsetType | None) -> _Chunk:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return _Chunk(self.label.id, kind, self.label.created, self.label.model, self.label.fingerprint, choices, usage)

    # ------------------------------------------------------------------------------------------------ log-probabilities

    def _name(self, token: TokenText) -> str:
        return f"token_id:{token.token_id}" if self.ids_as_tokens else token.text

    def _chat_logprobs(self, tokens: Iterable[TokenText]) -> dict[str, Any]:
        entries = (self._chat_token(token) | {"top_logprobs": [self._chat_token(top) for top in token.top]} for token in tokens)
        return {"content": [msgspec.Raw(encode(entry)) for entry in entries]}

    def _chat_token(self, token: TokenText) -> dict[str, Any]:
        return {"token": self._name(token), "logprob": token.logprob, "bytes": list(token.bytes)}

    def _text_logprobs(self, tokens: Sequence[TokenText], behind: int) -> dict[str, list[Any]]:
        """Returns the four parallel lists of the completions API; ``behind`` characters stand before the tokens' own text."""
        lists = self._token_lists(tokens)
        lists["text_offset"] = [behind + token.offset for token in tokens]
        return lists

    def _token_lists(self, tokens: Iterable[TokenText]) -> dict[str, list[Any]]:
        """Returns all of the lists but ``text_offset``; each ``top_logprobs`` holds the token itself too."""
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        for token in tokens:
            top: dict[str, float] = {}
            for candidate in (*token.top, token):
                top.setdefault(self._name(candidate), candidate.logprob)
            lists["tokens"].append(self._name(token))
            lists["token_logprobs"].append(token.logprob)
            lists["top_logprobs"].append(msgspec.Raw(encode(top)))
        return lists

    def _echo_logprobs(self, choice: Choice, echo: PromptText, prompts: _PromptsDone) -> dict[str, list[Any]]:
        """The lists for an echoed prompt; its first token has no probability, since nothing stands before it."""
        key = "echo", id(choice.prompt_token_ids)
        if key not in prompts:
            lists = self._token_lists(describe_token(entry, self.tokenizer) for entry in choice.prompt_logprobs)
            first = f"token_id:{choice.prompt_token_ids[0]}" if self.ids_as_tokens else choice.first_token
            for name, value in (("tokens", first), ("token_logprobs", None), ("top_logprobs", None)):
                lists[name].insert(0, value)
            prompts[key] = lists | {"text_offset": list(echo.offsets)}
        found: dict[str, list[Any]] = prompts[key]
        return found

    def _whole_text_logprobs(self, choice: Choice, prompts: _PromptsDone) -> dict[str, list[Any]]:
        lists = self._text_logprobs(choice.logprobs, len(choice.echo_text))
        if choice.echo is None:
            return lists
        echoed = self._echo_logprobs(choice, choice.echo, prompts)
        return {name: echoed[name] + lists[name] for name in lists}

    def _prompt_logprobs(self, choice: Choice, prompts: _PromptsDone) -> msgspec.Raw:
        """VLLM's form: per position a map of token id to its log-probability, rank and text; null for the first."""
        key = "vllm", id(choice.prompt_token_ids)
        if key not in prompts:
            positions = [b"null", *(encode(self._prompt_position(entry)) for entry in choice.prompt_logprobs)]
            prompts[key] = msgspec.Raw(b"[" + b",".join(positions) + b"]")
        found: msgspec.Raw = prompts[key]
        return found

    def _prompt_position(self, entry: TokenLogprobs) -> dict[str, dict[str, Any]]:
        token = describe_token(entry, self.tokenizer)
        entries: dict[str, dict[str, Any]] = {}
        for candidate in (token, *token.top):
            shown = {"logprob": candidate.logprob, "rank": candidate.rank, "decoded_token": candidate.text}
            entries.setdefault(str(candidate.token_id), shown)
        return entries
