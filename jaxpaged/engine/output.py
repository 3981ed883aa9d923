"""From the engine's token events to what a client reads: text deltas, stop strings, log-probabilities with text, the best of several."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxpaged.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from jaxpaged.scheduling.plan import TokenEvent, TokenLogprobs
from jaxpaged.scheduling.request import FinishReason, Request

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say (vLLM's number)."""


@dataclasses.dataclass(frozen=True)
class TokenText:
    """A token with its log-probability, as clients see it.

    Attributes:
        token_id: Its id.
        text: Its text; a token that is part of a character shows replacement characters.
        bytes: The bytes it stands for, exactly.
        logprob: Log-probability in the model's own distribution; finite.
        rank: 1 for the most likely.
        top: The most likely tokens, best first (their ``top`` is empty).
        offset: Of an output's token: characters of the output's text before its own, counting text that is held back or cut off.
    """

    token_id: int
    text: str
    bytes: bytes
    logprob: float
    rank: int
    top: tuple[TokenText, ...] = ()
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class PromptText:
    """A prompt as ``echo`` repeats it: the text that stands before the output's, from the same decoding as the output's.

    Attributes:
        text: Of all its tokens, special ones too, but of those that the tokenizer itself has put around a text. A character that the prompt
            leaves half-finished belongs to the output.
        offsets: For each token, the characters of ``text`` before its own.
    """

    text: str
    offsets: tuple[int, ...]

    @classmethod
    def decode(cls, token_ids: Sequence[int], tokenizer: Tokenizer, *, added: tuple[int, int] = (0, 0)) -> PromptText:
        """Decodes a prompt.

        Args:
            token_ids: Of the prompt.
            tokenizer: Turns ids into text.
            added: How many of the first and of the last tokens the tokenizer has put around the text.
        """
        detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
        first, behind = added[0], len(token_ids) - added[1]
        parts, offsets, num_chars = [], [], 0
        for position, token_id in enumerate(token_ids):
            offsets.append(num_chars)
            if first <= position < behind:
                parts.append(detokenizer.push(token_id))
                num_chars += len(parts[-1])
        return cls("".join(parts), tuple(offsets))


@dataclasses.dataclass(frozen=True)
class Delta:
    """News of one sample of a request, ready to be rendered.

    Attributes:
        index: Which of the request's ``n`` samples.
        text: New text; may be empty while a stop string or half a character is held back.
        token_ids: New tokens.
        logprobs: One per new token where the request asked for them; else empty.
        prompt_logprobs: Of the prompt's tokens from the second on, as they become known; there may be very many, so who shows them calls
            ``describe_token``.
        finish_reason: ``stop``, ``length``, ``abort`` or ``error``; the delta that carries it is the sample's last.
        stop_reason: The stop string or stop token id of the request's own that ended it.
        error, error_code: Set when ``finish_reason`` is ``error``.
        cumulative_logprob: Sum of the log-probabilities of all its tokens, where it decided that the sample is returned: a beam, or one of
            the best of several. Else None.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenText, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    error_code: str | None = None
    cumulative_logprob: float | None = None


class OutputProcessor:
    """Turns the events of one request into deltas; keep one per request.

    Text is held back only while it may still become a stop string or the rest of a character. A token that ends its sample is
    among the ids and the log-probabilities, and in the text only with ``include_stop_str_in_output``. Events that arrive after a
    sample has ended here (the engine runs one step ahead), and those of beams that are not returned, give None. Where the client
    wants the prompt alone (``max_tokens`` 0), the one token that the engine generates is dropped.

    Args:
        request: Whose events.
        tokenizer: Turns ids into text.

    Attributes:
        num_prompt_tokens, num_output_tokens: For ``usage``; the output counts all samples, with ``best_of`` those too that are
            not returned, and the beams that are returned.
        num_cached_tokens: How many of the prompt's tokens were found in the prefix cache.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        params = request.params
        self.num_prompt_tokens = len(request.prompt)
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self._n = params.n
        self._tokenizer = tokenizer
        self._show_logprobs = params.logprobs is not None
        self._prompt_alone = params.max_tokens == 0
        self._samples = [_Sample(request, tokenizer) for _ in range(params.n if params.use_beam_search else params.num_sequences)]
        self._kept: list[list[Delta]] | None = [[] for _ in self._samples] if len(self._samples) > params.n else None

    @property
    def finished(self) -> bool:
        """Whether all samples of the request have ended."""
        return all(sample.finished for sample in self._samples)

    def process(self, event: TokenEvent) -> Delta | None:
        """Returns what the event says of its sample, or None if nothing. Which of it the client gets to see, and when, says ``release``.

        A delta with ``finish_reason`` set where ``event.finish_reason`` is None means that a stop string matched: the
        caller then aborts that sample in the engine (``abort(request.id, index)``).
        """
        self.num_cached_tokens = max(self.num_cached_tokens, event.num_cached_tokens)
        if event.index >= len(self._samples):
            return None
        sample = self._samples[event.index]
        if sample.finished:
            return None
        if self._prompt_alone:
            event = _without_output(event)
        text, offsets, taken, stop = sample.push(event.token_ids, event.finish_reason)
        self.num_output_tokens += taken
        reason: str | None = None if event.finish_reason is None else str(event.finish_reason)
        stop_reason: int | str | None = event.stop_reason
        if stop is not None:
            reason, stop_reason = str(FinishReason.STOP), stop
        sample.finished = reason is not None
        return Delta(
            index=event.index,
            text=text,
            token_ids=event.token_ids[:taken],
            logprobs=tuple(
                describe_token(entry, self._tokenizer, offset) for entry, offset in zip(event.logprobs[:taken], offsets, strict=False)
            ),
            prompt_logprobs=event.prompt_logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            error=event.error if stop is None else None,
            error_code=event.error_code if stop is None else None,
            cumulative_logprob=event.cumulative_logprob,
        )

    def release(self, delta: Delta) -> Sequence[Delta]:
        """Returns what the client gets to see, now that ``process`` returned ``delta``: that, but with ``best_of`` nothing for a long time.

        The n samples with the best mean log-probability per token come when all have ended: whole, best first, numbered from 0.
        """
        if self._kept is None:
            return (delta,)
        self._kept[delta.index].append(delta)
        if not self.finished:
            return ()
        whole = [self._joined(deltas) for deltas in self._kept]
        prompt_logprobs = max((sample.prompt_logprobs for sample in whole), key=len)
        best = sorted(whole, key=_mean_logprob, reverse=True)[: self._n]
        return [
            dataclasses.replace(
                sample,
                index=index,
                logprobs=sample.logprobs if self._show_logprobs else (),
                prompt_logprobs=prompt_logprobs if index == 0 else (),
            )
            for index, sample in enumerate(best)
        ]

    def _joined(self, deltas: Sequence[Delta]) -> Delta:
        logprobs = tuple(entry for delta in deltas for entry in delta.logprobs)
        return dataclasses.replace(
            deltas[-1],
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
            logprobs=logprobs,
            prompt_logprobs=tuple(entry for delta in deltas for entry in delta.prompt_logprobs),
            cumulative_logprob=sum(entry.logprob for entry in logprobs),
        )


def describe_token(entry: TokenLogprobs, tokenizer: Tokenizer, offset: int = 0) -> TokenText:
    """Returns a token and the most likely ones at its position with their text, as clients see them."""

    def one(token_id: int, logprob: float, rank: int, top: tuple[TokenText, ...] = (), offset: int = 0) -> TokenText:
        finite = max(logprob, LEAST_LOGPROB) if logprob == logprob else LEAST_LOGPROB
        return TokenText(token_id, tokenizer.token_text(token_id), tokenizer.token_bytes(token_id), finite, rank, top, offset)

    top = tuple(one(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, start=1))
    return one(entry.token_id, entry.logprob, entry.rank, top, offset)


def _without_output(event: TokenEvent) -> TokenEvent:
    """Returns what an event says of the prompt."""
    reason = FinishReason.LENGTH if event.finish_reason is FinishReason.STOP else event.finish_reason
    score = None if event.cumulative_logprob is None else 0.0
    return dataclasses.replace(event, token_ids=(), logprobs=(), finish_reason=reason, stop_reason=None, cumulative_logprob=score)


def _mean_logprob(sample: Delta) -> float:
    """Returns what the best of several samples are chosen by; one that failed, was aborted or has no tokens comes last."""
    if sample.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH) or not sample.logprobs:
        return float("-inf")
    return (sample.cumulative_logprob or 0.0) / len(sample.logprobs)


class _Sample:
    """Text of one sample: detokenizing and stop strings."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        params = request.params
        self.finished = False
        self._detokenizer: IncrementalDetokenizer | None = None
        if params.detokenize:
            self._detokenizer = IncrementalDetokenizer(tokenizer, request.prompt, skip_special_tokens=params.skip_special_tokens)
        self._include_stop = params.include_stop_str_in_output
        self._stops = StopStrings(params.stop, include=self._include_stop) if params.stop else None
        self._tells_offsets = params.logprobs is not None or params.best_of is not None  # whose tokens come with log-probabilities
        self._min_tokens = params.min_tokens
        self._num_tokens = 0  # counted where a stop string is looked for
        self._num_chars = 0

    def push(self, token_ids: Sequence[int], end: FinishReason | None) -> tuple[str, list[int], int, str | None]:
        """Returns the text to send, where each token's text begins, how many tokens count, and the stop string that ended the sample.

        Where they begin is counted for requests whose tokens come with log-probabilities.

        Args:
            token_ids: New tokens.
            end: Why the engine ended the sample with the last of them, if it did; it stops at nothing but stop tokens.
        """
        if self._detokenizer is None:
            return "", [0] * len(token_ids), len(token_ids), None
        parts: list[str] = []
        offsets: list[int] = []
        shown = token_ids if end is None or self._include_stop or end is not FinishReason.STOP else token_ids[:-1]
        for taken, token_id in enumerate(shown, start=1):
            piece = self._detokenizer.push(token_id)
            if self._tells_offsets:
                offsets.append(self._num_chars)
                self._num_chars += len(piece)
            if self._stops is None:
                parts.append(piece)
                continue
            self._num_tokens += 1
            text, stop = self._stops.push(piece, may_stop=self._num_tokens > self._min_tokens)
            parts.append(text)
            if stop is not None:
                return "".join(parts), offsets, taken, stop
        if end is not None:
            offsets.append(self._num_chars)  # of a token that is not in the text
            parts.append(("" if self._stops is None else self._stops.flush()) + self._detokenizer.flush())
        return "".join(parts), offsets, len(token_ids), None


class StopStrings:
    """Finds the first place where a text ends with one of some strings, however the text is cut into pieces.

    The match is the one that is complete first; of several that end at the same character, the longest. What comes before it
    has been returned by then; text that may still grow into a match is held back.

    Args:
        strings: Stop strings, none empty.
        include: Whether the match itself belongs to the text.
    """

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        self._strings = tuple(strings)
        self._include = include
        self._longest = max(map(len, strings), default=0)
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Takes the next piece.

        Args:
            text: The piece.
            may_stop: Whether a match may end in this piece (``min_tokens`` has been reached).

        Returns:
            Text that can be sent, and the stop string that matched; after a match nothing must be pushed.
        """
        if not self._strings:
            return text, None
        held, self._held = self._held + text, ""
        if may_stop and (match := self._first_match(held, len(held) - len(text))):
            end, stop = match
            return held[: end if self._include else end - len(stop)], stop
        keep = self._possible_start(held)
        self._held = held[keep:]
        return held[:keep], None

    def flush(self) -> str:
        """Returns the text that was held back; call at the end of the output."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str, new_from: int) -> tuple[int, str] | None:
        """Returns end and string of the match that ends first beyond ``new_from``, the longest of several."""
        best: tuple[int, int, str] | None = None
        for stop in self._strings:
            at = text.find(stop, max(0, new_from - len(stop) + 1))
            if at >= 0 and (best is None or (at + len(stop), -len(stop)) < best[:2]):
                best = (at + len(stop), -len(stop), stop)
        return (best[0], best[2]) if best else None

    def _possible_start(self, text: str) -> int:
        """Returns the first index from which the rest of ``text`` is a proper beginning of a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._strings):
                return start
        return len(text)
