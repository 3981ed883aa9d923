"""From the engine's token events to what a client reads: text deltas, stop strings, log-probabilities with their text."""

from __future__ import annotations

import dataclasses

from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.scheduling.plan import TokenEvent
from jaxpaged.scheduling.request import Request


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
    """

    token_id: int
    text: str
    bytes: bytes
    logprob: float
    rank: int
    top: tuple[TokenText, ...] = ()


@dataclasses.dataclass(frozen=True)
class Delta:
    """News of one sample of a request, ready to be rendered.

    Attributes:
        index: Which of the request's ``n`` samples.
        text: New text; may be empty while a stop string or half a character is held back.
        token_ids: New tokens.
        logprobs: One per new token where the request asked for them; else empty.
        prompt_logprobs: Of the prompt's tokens from the second on, as they become known.
        finish_reason: ``stop``, ``length``, ``abort`` or ``error``; the delta that carries it is the sample's last.
        stop_reason: The stop string or stop token id of the request's own that ended it.
        error, error_code: Set when ``finish_reason`` is ``error``.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenText, ...] = ()
    prompt_logprobs: tuple[TokenText, ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    error_code: str | None = None


class OutputProcessor:
    """Turns the events of one request into deltas; keep one per request.

    Text is held back only while it may still become a stop string or the rest of a character. Events that arrive after a
    sample has ended here (the engine runs one step ahead) give None.

    Attributes:
        finished: Whether all samples of the request have ended.
        num_prompt_tokens, num_output_tokens: For ``usage``; the output counts all samples.
    """

    finished: bool
    num_prompt_tokens: int
    num_output_tokens: int

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        raise NotImplementedError

    def process(self, event: TokenEvent) -> Delta | None:
        """Returns what the event means for the client, or None if nothing.

        A delta with ``finish_reason`` set where ``event.finish_reason`` is None means that a stop string matched: the
        caller then aborts that sample in the engine (``abort(request.id, index)``).
        """
        raise NotImplementedError
