"""Beam search on the host: which beams go on, which have ended, and when no better one can come.

The device proposes the best ways to lengthen the live beams (``StepResult.beams``); this decides. The beams and scores are those of
transformers' ``generate(num_beams=width, do_sample=False)`` (huggingface/transformers, src/transformers/generation/utils.py,
``_beam_search``), whose rules are:

* A beam ends with a stop token, and only if it is among the ``width`` best candidates of its step; one that ends further down is dropped.
  The ``width`` best candidates that do not end go on, so ``width * (1 + number of stop tokens)`` candidates always suffice.
* At ``max_tokens`` the ``width`` best candidates end, whatever their last token.
* An ended beam is worth ``sum of log-probabilities / length ** length_penalty``, where the length counts the generated tokens, the stop
  token included and the prompt not. The ``width`` best of them are kept.
* Once ``width`` have ended, the search is over as soon as the best live beam is worth no more than the worst of them: at the length that it
  has now, or with ``early_stopping="never"`` and a positive penalty at ``max_tokens``, the most it can ever be worth. With
  ``early_stopping=True`` it is over at once.

Two deviations, both where transformers' answer is an accident: values below -1e9 (a penalty far below zero) are compared as they are, and
there are never two beams with the same tokens (transformers makes them up if the vocabulary has fewer than ``2 * width`` tokens).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from collections.abc import Sequence as Seq
from typing import NamedTuple

from jaxpaged.scheduling.plan import BeamCandidate
from jaxpaged.scheduling.request import FinishReason


class Hypothesis(NamedTuple):
    """A beam that has ended.

    Attributes:
        tokens: Its output, the stop token included.
        score: What it is ranked by: ``cumulative_logprob / len(tokens) ** length_penalty``.
        cumulative_logprob: Sum of the log-probabilities of its tokens.
        finish_reason: STOP or LENGTH.
    """

    tokens: tuple[int, ...]
    score: float
    cumulative_logprob: float
    finish_reason: FinishReason


class BeamSearch:
    """The state of one request's search, beside its live beams, which the caller keeps.

    Args:
        width: Beams to keep.
        max_tokens: Most output tokens of a beam.
        stop_token_ids: Ids that end a beam.
        length_penalty: Exponent of the length; positive favours long beams, negative short ones.
        early_stopping: True, False or ``"never"``; see above.
        min_tokens: Stop tokens are no candidates before a beam has this many tokens.

    Attributes:
        done: The search is over; ``results`` holds what it found.
    """

    def __init__(
        self,
        *,
        width: int,
        max_tokens: int,
        stop_token_ids: Collection[int] = (),
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        min_tokens: int = 0,
    ) -> None:
        self.width = width
        self.max_tokens = max_tokens
        self.length_penalty = length_penalty
        self.early_stopping = early_stopping
        self.min_tokens = min_tokens
        self.done = False
        self._stops = frozenset(stop_token_ids)
        self._ended: list[Hypothesis] = []

    def advance(self, outputs: Seq[Seq[int]], candidates: Seq[BeamCandidate]) -> list[BeamCandidate]:
        """Takes one step's candidates.

        Args:
            outputs: Output tokens of each live beam, all of one length, in the order that ``BeamCandidate.parent`` counts in.
            candidates: Best first; ``width * (1 + number of stop tokens)``, or all there are. With fewer, fewer beams may go on.

        Returns:
            The beams of the next step, best first, at most ``width``; none when the search is over.
        """
        if self.done:
            raise ValueError("the search is over")
        length = len(outputs[0]) + 1 if outputs else 1
        allowed = [each for each in candidates if length > self.min_tokens or each.token_id not in self._stops]
        at_limit = length >= self.max_tokens
        self._end([each for each in allowed[: self.width] if at_limit or each.token_id in self._stops], outputs)
        live = [] if at_limit else [each for each in allowed if each.token_id not in self._stops][: self.width]
        self.done = not live or self._is_decided(live[0].score, length)
        return [] if self.done else live

    def results(self, n: int) -> tuple[Hypothesis, ...]:
        """Returns the ``n`` best beams that have ended, best first; fewer if no more were found."""
        return tuple(self._ended[:n])

    def _end(self, ending: Seq[BeamCandidate], outputs: Seq[Seq[int]]) -> None:
        """Takes ended beams in; of equal ones the earlier is the better."""
        for parent, token, cumulative in ending:
            tokens = (*outputs[parent], token) if outputs else (token,)
            reason = FinishReason.STOP if token in self._stops else FinishReason.LENGTH
            self._ended.append(Hypothesis(tokens, self._value(cumulative, len(tokens)), cumulative, reason))
        self._ended.sort(key=lambda hypothesis: -hypothesis.score)
        del self._ended[self.width :]

    def _is_decided(self, best_live: float, length: int) -> bool:
        """Whether nothing better can come, or is waited for."""
        if len(self._ended) < self.width:
            return False
        if self.early_stopping is True:
            return True
        at = self.max_tokens if self.early_stopping == "never" and self.length_penalty > 0 else length
        return self._value(best_live, at) <= self._ended[-1].score

    def _value(self, cumulative: float, length: int) -> float:
        return cumulative / math.pow(length, self.length_penalty)
