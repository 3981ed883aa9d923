"""Text to token ids and back, as a tokenizer.json says; no torch, no remote code, no network once loaded.

Decoding works on bytes: each token stands for a fixed byte string, text is their concatenation read as UTF-8. So streaming is
linear in the number of tokens, never shows half a character, and adds up to exactly what decoding all tokens at once gives.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import tokenizers

from jaxpaged.engine.chat_template import ChatTemplate, import_transformers
from jaxpaged.engine.conversation import RESERVED_TEMPLATE_KEYS, TemplateSupport, find_support, fit_messages, needs_support
from jaxpaged.engine.json_files import read_json
from jaxpaged.errors import CheckpointError, ConfigError, JaxpagedError, RequestError

_FILE, _CONFIG, _ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_MOST_ID = 2**22 - 1

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Code points that no text contains; one of them marks the special tokens that a message spells out."""


class Tokenizer:
    """A tokenizer that several threads may use at once: nothing in it changes after loading.

    Args:
        hf: A transformers fast tokenizer, which names the special tokens and has the chat template; it is not kept.
        backend: Encodes and decodes; a copy of ``hf``'s own if None.
        chat_template: Replaces the tokenizer's own template.

    Attributes:
        vocab_size: Number of ids the tokenizer knows; the model's may be larger (padded) and is what requests are checked against.
        bos_token, eos_token: Spelling of the special tokens, or None.
        bos_token_id, eos_token_id: Their ids, or None.

    Raises:
        CheckpointError: It turns ids into text in a way that is not known here.
    """

    def __init__(self, hf: Any, *, backend: tokenizers.Tokenizer | None = None, chat_template: str | None = None) -> None:
        source = chat_template or _default_template(hf)
        self._special_tokens: dict[str, str] = dict(hf.special_tokens_map)
        self._chat_template = None if source is None else ChatTemplate(source, self._special_tokens)
        self._support: TemplateSupport | None = None  # of that template; found when the first conversation needs it
        self._plain = tokenizers.Tokenizer.from_str(hf.backend_tokenizer.to_str()) if backend is None else backend
        _check_ids(self._plain)
        self._plain.no_truncation()
        self._plain.no_padding()
        description = self._plain.to_str()
        self._literal = tokenizers.Tokenizer.from_str(description)
        self._literal.encode_special_tokens = True
        added = self._plain.get_added_tokens_decoder()
        self._special = {token_id: token for token_id, token in added.items() if token.special}
        self._special_by_text = {token.content: token_id for token_id, token in self._special.items()}
        spellings = sorted(self._special_by_text, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")
        self.strips_first_space, self._pieces = _pieces(self._plain, json.loads(description).get("decoder"))
        self.vocab_size = len(self._pieces)
        self.bos_token: str | None = hf.bos_token
        self.eos_token: str | None = hf.eos_token
        self.bos_token_id = self._id_of(self.bos_token)
        self.eos_token_id = self._id_of(self.eos_token)

    @classmethod
    def load(cls, path: str | Path, *, chat_template: str | Path | None = None) -> Tokenizer:
        """Loads from a local directory.

        What tokenizer.json says is what is done, whatever class tokenizer_config.json names: some classes of transformers take the
        vocabulary alone out of the file and make the rest anew, so that a mislabelled tokenizer loses its spaces without a word.

        Args:
            path: Holds tokenizer.json, and tokenizer_config.json with names and the chat template; without the former, what
                transformers can make a fast tokenizer of.
            chat_template: File with a Jinja template to use instead of the tokenizer's.

        Raises:
            CheckpointError: Files are missing or damaged, contradict each other, or the tokenizer has no fast form.
            ConfigError: The template's file cannot be read.
        """
        if not Path(path).is_dir():
            raise CheckpointError(f"tokenizer: {path} is not a directory")
        try:
            template = None if chat_template is None else Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template {chat_template}: {error}") from error
        try:
            if (Path(path) / _FILE).is_file():
                hf, backend = _read_files(Path(path))
                return cls(hf, backend=backend, chat_template=template)
            hf = import_transformers().AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except JaxpagedError:
            raise
        except BaseException as error:  # transformers and tokenizers raise nearly anything on damaged files
            raise CheckpointError(f"tokenizer in {path} cannot be loaded: {_reason(error)}") from error
        wanted = {name for kind, name in getattr(hf, "vocab_files_names", {}).items() if kind != "tokenizer_file"}
        if not getattr(hf, "is_fast", False) or not all((Path(path) / name).is_file() for name in wanted):
            made_of = f", and not all of {', '.join(sorted(wanted))} to make it of" if wanted else ""
            raise CheckpointError(f"tokenizer in {path}: no {_FILE} (a fast tokenizer is needed){made_of}")
        return cls(hf, chat_template=template)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over what another process sent; how special tokens are encoded is not part of a pickled tokenizer."""
        self.__dict__.update(state)
        self._literal.encode_special_tokens = True

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._plain.token_to_id(token)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``apply_chat_template`` works without a template of the request's own."""
        return self._chat_template is not None

    @property
    def chat_template(self) -> str | None:
        """The Jinja source, if there is one."""
        return None if self._chat_template is None else self._chat_template.source

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that ``skip_special_tokens`` leaves out."""
        return frozenset(self._special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of ``text``; special tokens spelled in it count as such, as raw prompts do in vLLM.

        Raises:
            RequestError: The tokenizer gives up on this text.
        """
        return _encode(self._plain, text, add_special_tokens=add_special_tokens)

    def num_added(self) -> tuple[int, int]:
        """Returns how many special tokens ``encode`` puts before and behind a text."""
        plain, whole = self.encode("a", add_special_tokens=False), self.encode("a")
        first = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
        return (0, 0) if first is None else (first, len(whole) - first - len(plain))

    def decode(self, token_ids: int | Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of ``token_ids``, or of one; ids the tokenizer does not know give nothing."""
        token_ids = [token_ids] if isinstance(token_ids, int) else token_ids
        pieces = [self.token_bytes(i) for i in token_ids if not (skip_special_tokens and i in self._special)]
        if pieces and self.strips_first_space:
            pieces[0] = pieces[0].removeprefix(b" ")
        return b"".join(pieces).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the exact bytes one token stands for; none for an unknown id."""
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else b""

    def token_text(self, token_id: int) -> str:
        """Returns one token as shown in log-probability answers (replacement characters for partial ones)."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    @overload
    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tokenize: Literal[True] = True, **options: Any
    ) -> list[int]: ...

    @overload
    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], *, tokenize: bool, **options: Any) -> list[int] | str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> list[int] | str:
        """Renders a conversation in the sandboxed template and returns its ids, or its text.

        Special tokens that a message, a tool or a variable spells out become ordinary text, never special tokens: their spelling is
        broken by a noncharacter while the template runs, and encoded as text afterwards.

        Args:
            messages: Role and content each; content given as text parts is joined. Tool calls, results and reasoning go to a template that
                shows them, see ``conversation.fit_messages``.
            tokenize: Return ids; else the text, in which a special token that a message spells out looks like any other.
            add_generation_prompt: Open the assistant's turn at the end.
            continue_final_message: Leave the last message open instead.
            tools: JSON schemas of functions, for templates that show them.
            chat_template: Jinja source to use instead of the tokenizer's.
            template_kwargs: More variables for the template; names in ``RESERVED_TEMPLATE_KEYS`` are refused.
            **variables: The same, as transformers takes them (``enable_thinking=False``).

        Raises:
            RequestError: There is no template, or it rejects the conversation (with its message), or leaves a part of it out.
        """
        template = self._chat_template if chat_template is None else ChatTemplate(chat_template, self._special_tokens)
        if template is None:
            message = "this model's tokenizer has no chat template: start the server with --chat-template, or use completions"
            raise RequestError(message, param="messages", code="no_chat_template")
        variables |= template_kwargs or {}
        if clash := RESERVED_TEMPLATE_KEYS.intersection(variables):
            raise RequestError(f"chat_template_kwargs must not contain {sorted(clash)[0]!r}", param="chat_template_kwargs")
        support = self._find_support(template) if needs_support(messages) else TemplateSupport(frozenset())
        fitted = [_join_parts(message) for message in fit_messages(messages, support)]
        more = {"tools": list(tools) if tools else None, **variables}
        mark = _unused_noncharacter([fitted, more])
        broken = self._break_values(more, mark)
        try:
            text = template.render(
                [self._break_values(message, mark) for message in fitted],
                tools=broken.pop("tools"),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=broken,
            )
        except RequestError as error:
            raise RequestError(self._plain_text(str(error), mark), param=error.param, code=error.code) from error
        if not tokenize:
            return self._plain_text(text, mark)
        return self._encode_marked(text, mark) if mark in text else self.encode(text, add_special_tokens=False)

    def template_reads(self, name: str) -> bool:
        """Whether the template's source has ``name`` in it; a variable that it does not name has no effect."""
        return re.search(rf"\b{re.escape(name)}\b", self.chat_template or "") is not None

    def _find_support(self, template: ChatTemplate) -> TemplateSupport:
        """Returns what a template shows; the model's own is tried once."""
        if template is self._chat_template and self._support is not None:
            return self._support
        support = find_support(
            lambda messages: template.render(messages, add_generation_prompt=False, continue_final_message=False, tools=None, variables={})
        )
        if template is self._chat_template:
            self._support = support
        return support

    def _break_values(self, given: Mapping[str, Any], mark: str) -> dict[str, Any]:
        """Breaks the values, and leaves the names alone: they are the message's keys and the template's variables."""
        return {key: self._break_special(item, mark) for key, item in given.items()}

    def _break_special(self, value: Any, mark: str) -> Any:
        """Returns a copy in which every special token spelled in a string or a key has ``mark`` after its first character."""
        if isinstance(value, str):
            return self._special_pattern.sub(lambda match: match[0][0] + mark + match[0][1:], value)
        if isinstance(value, Mapping):
            return {self._break_special(key, mark): self._break_special(item, mark) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._break_special(item, mark) for item in value]
        return value

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """Encodes rendered text: special tokens that the template wrote as ids, all that lies between them as plain text."""
        ids: list[int] = []
        at, strip = 0, False
        for match in [*self._special_pattern.finditer(text), None]:
            between = text[at : match.start() if match else None]
            token = self._special[self._special_by_text[match[0]]] if match else None
            between = between.lstrip() if strip else between
            between = between.rstrip() if token is not None and token.lstrip else between
            ids += self._encode_literally(self._plain_text(between, mark), first=not ids)
            if match and token is not None:
                ids.append(self._special_by_text[match[0]])
                at, strip = match.end(), token.rstrip
        return ids

    def _encode_literally(self, text: str, *, first: bool) -> list[int]:
        """Encodes without special tokens; after the first piece also without the space that some tokenizers put in front."""
        if not text:
            return []
        if first or not self.strips_first_space:
            return _encode(self._literal, text)
        lead, ids = _encode(self._literal, "\n"), _encode(self._literal, "\n" + text)
        return ids[len(lead) :] if ids[: len(lead)] == lead else _encode(self._literal, text)

    @staticmethod
    def _plain_text(text: str, mark: str) -> str:
        return text.replace(mark, "")


class IncrementalDetokenizer:
    """Text of a growing list of tokens, a piece at a time.

    What ``push`` and ``flush`` return adds up to the text that follows the prompt's in the decoding of prompt and output
    together; a character that the prompt leaves half-finished counts as output. Linear in the number of tokens.

    Args:
        tokenizer: Gives each token's bytes.
        prompt: Token ids before the output.
        skip_special_tokens: Leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer.strips_first_space
        tail = b""
        for token_id in reversed(prompt):
            if len(tail) >= 4:
                break
            piece = b"" if token_id in self._skipped else tokenizer.token_bytes(token_id)
            tail = piece + tail
        if tail:
            self._at_start = False
            self._utf8.decode(tail)  # leaves an unfinished character, if the prompt ends in one, in the decoder

    def push(self, token_id: int) -> str:
        """Returns the text that one more token completes; may be empty."""
        if token_id in self._skipped:
            return ""
        piece = self._tokenizer.token_bytes(token_id)
        if self._at_start:
            self._at_start = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """Returns what is left at the end: a replacement character for an unfinished one."""
        return self._utf8.decode(b"", final=True)


def _read_files(path: Path) -> tuple[Any, tokenizers.Tokenizer]:
    """Returns who names tokens and has the template, and tokenizer.json as the tokenizers library reads it, with the tokens it lacks.

    Raises:
        CheckpointError: An id is too large, or a file gives a token another id than the one it gets.
    """
    backend = tokenizers.Tokenizer.from_file(str(path / _FILE))
    _check_ids(backend)
    hf = import_transformers().PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    known = backend.get_added_tokens_decoder()
    for token_id, token in sorted(hf.added_tokens_decoder.items()):
        if token_id not in known or known[token_id].special != token.special:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    for file, text, stated in _stated_ids(path):
        if (got := backend.token_to_id(text)) is not None and got != stated:
            raise CheckpointError(f"{path / file}: token {text!r} has id {stated}, but {_FILE} gives it {got}; make them agree")
    return hf, backend


def _stated_ids(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yields file, text and id of the added tokens that the files beside tokenizer.json list."""
    if (path / _CONFIG).is_file():
        for token_id, token in (read_json(path / _CONFIG).get("added_tokens_decoder") or {}).items():
            yield _CONFIG, token["content"], int(token_id)
    if (path / _ADDED).is_file():
        for text, token_id in read_json(path / _ADDED).items():
            yield _ADDED, text, int(token_id)


def _check_ids(tokenizer: tokenizers.Tokenizer) -> None:
    """Refuses ids that no model has: something is kept for each id below the largest, here and where a tokenizer is written as text."""
    last, most = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1], default=("", 0))
    if most > _MOST_ID:
        raise CheckpointError(f"{_FILE}: token {last[:40]!r} has id {most:,}; ids up to {_MOST_ID:,} are supported")


def _encode(tokenizer: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Returns the ids of ``text``.

    Raises:
        RequestError: The library gave up: the tokenizer's pattern goes back and forth too often over this text, say, or a part of
            the text is not in its vocabulary, which has no token for the unknown.
    """
    try:
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
    except BaseException as error:
        raise RequestError(f"this model's tokenizer cannot encode this text: {_reason(error)}", code="tokenizer_failed") from error


def _reason(error: BaseException) -> str:
    """Returns in one line why a tokenizer failed; what is no failure of its own is raised again.

    A panic of the library's Rust code is no ``Exception``: left alone, it would pass every handler on its way and end the thread.
    """
    if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
        raise error
    return " ".join(str(error).split())[:300] or type(error).__name__


def _default_template(hf: Any) -> str | None:
    template = hf.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _join_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the message with text parts joined, so that no special token can be put together from two of them."""
    content = message.get("content")
    if isinstance(content, list | tuple) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
        return {**message, "content": "".join(part["text"] for part in content)}
    return dict(message)


def _unused_noncharacter(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    for mark in _NONCHARACTERS:
        if mark not in text:
            return mark
    raise RequestError("the messages contain every Unicode noncharacter from U+FDD0 to U+FDEF", param="messages")


def _pieces(tokenizer: tokenizers.Tokenizer, decoder: Mapping[str, Any] | None) -> tuple[bool, list[bytes]]:
    """Returns whether the first token of a text loses a leading space, and the bytes of every id."""
    steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"]: step for step in steps}
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    convert: Callable[[str], bytes]
    if "ByteLevel" in kinds:
        alphabet = _byte_alphabet()
        strips, convert = False, partial(_byte_level_piece, alphabet=alphabet)
    elif "ByteFallback" in kinds or "Metaspace" in kinds:
        strips = "Strip" in kinds or kinds.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
        convert = _sentencepiece_piece
    else:
        raise CheckpointError(
            f"tokenizer.json: decoder {[step['type'] for step in steps]} is not supported; byte-level and SentencePiece are"
        )
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        pieces[token_id] = convert(token)
    for token_id, added in tokenizer.get_added_tokens_decoder().items():
        if "ByteLevel" not in kinds:
            pieces[token_id] = added.content.encode("utf-8")
    return strips, pieces


def _byte_alphabet() -> dict[str, int]:
    """Returns the byte that each character of a byte-level vocabulary stands for: printable Latin-1 is itself, the others follow U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _byte_level_piece(token: str, *, alphabet: Mapping[str, int]) -> bytes:
    try:
        return bytes(alphabet[char] for char in token)
    except KeyError:  # an added token with characters outside the alphabet stands for itself
        return token.encode("utf-8", "replace")


def _sentencepiece_piece(token: str) -> bytes:
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(match[1], 16)])
    return token.replace("\u2581", " ").encode("utf-8", "replace")
