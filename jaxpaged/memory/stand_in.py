"""A device that is none: answers plans with the workload's tokens, and beam searches with made-up candidates.

What beams share depends on how often their search drops some and forks others, so on how likely the next tokens are. Here the
probabilities of the next token are broken off a stick of length 1: token i takes the share 1 - U_i ** (1 / theta) of what is left, with
U_i uniform (the GEM distribution: Griffiths, Engen, McCloskey; see Pitman, Combinatorial Stochastic Processes, 2006). Its one parameter
fixes the mean entropy, the harmonic number H(theta) in nats: at theta 1 the mean entropy is 1 nat and the most likely token has a
probability of 0.62 on average, but now it is near 1 and now 0.2, as in text.

Beams are nearly the same text, so mostly they go on alike: with the probability ``likeness`` the beams of a search all have the same next
probabilities in a step, else each has its own. If they always had the same, beams that once fell behind would hardly ever catch up
and the few that lead would fork seldom, so little would be shared; independent beams overtake each other often. No beam is
preferred but by its score. docs/memory.md shows what follows for several values, and what the packaged model's own beams share.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Mapping

from jaxpaged.memory.workloads import STOP_TOKEN, VOCAB_SIZE, Call
from jaxpaged.scheduling.plan import INVALID_TOKEN, BeamCandidate, StepPlan, StepResult, Work

_STRIDE = 7919
"""Sample i of a call says the call's words shifted by i times this, so that samples differ."""


def theta_of_entropy(entropy: float) -> float:
    """Returns the parameter whose harmonic number is ``entropy``, in nats.

    For real theta, H(theta) = psi(theta + 1) + gamma, here by the series sum of theta / (k (k + theta)), its tail by an integral.
    """
    low, high = 0.0, math.exp(entropy + 1)
    for _ in range(60):
        theta = (low + high) / 2
        low, high = (theta, high) if _harmonic(theta) < entropy else (low, theta)
    return high


def _harmonic(theta: float) -> float:
    terms = 1000
    tail = math.log1p(theta / (terms + 0.5))
    return sum(theta / (k * (k + theta)) for k in range(1, terms + 1)) + tail


class StandIn:
    """Answers plans in the order in which they were made.

    Args:
        calls: The call of each request, by the request's id.
        entropy: Mean entropy of the next token where beams are searched, in nats.
        likeness: Probability that the beams of a search have the same next probabilities, in [0, 1].
        seed: Of the beams' candidates.
    """

    def __init__(self, calls: Mapping[str, Call], *, entropy: float, likeness: float, seed: int) -> None:
        self._calls = calls
        self._theta = theta_of_entropy(entropy)
        self._likeness = likeness
        self._rng = random.Random(seed)

    def answer(self, plan: StepPlan) -> StepResult:
        """Returns the result of a step."""
        scores: dict[str, list[float]] = {}
        for work in plan.work:
            if work.beam_score is not None:
                scores.setdefault(work.sequence.request.id, []).append(work.beam_score)
        widths = {work.sequence.request.id: work.sequence.request.params.num_sequences for work in plan.work}
        beams = {name: self._candidates(each, 2 * widths[name]) for name, each in scores.items()}
        return StepResult([self._token(work) for work in plan.work], beams=beams)

    def _token(self, work: Work) -> int:
        """The call's own token for the first sample, another for each of its siblings; the last stops them all. Beams do not care."""
        if not work.samples:
            return INVALID_TOKEN
        output = self._calls[work.sequence.request.id].output
        if work.num_output >= len(output) - 1:
            return STOP_TOKEN
        shifted = output[work.num_output] - 1 + work.sequence.index * _STRIDE
        return shifted % (VOCAB_SIZE - 1) + 1

    def _candidates(self, scores: list[float], count: int) -> tuple[BeamCandidate, ...]:
        """Returns the ``count`` best of all ways to go on with beams of these scores."""
        best: list[tuple[float, int, int]] = []
        alike = self._rng.random() < self._likeness
        stick = _Stick(self._rng, self._theta)
        for parent, score in enumerate(scores):
            if parent and not alike:
                stick = _Stick(self._rng, self._theta)
            place = 0
            while len(best) < count or score + stick.left(place) > best[0][0]:
                candidate = (score + stick.logprob(place), -parent, -stick.first_token - place)
                if len(best) < count:
                    heapq.heappush(best, candidate)
                else:
                    heapq.heappushpop(best, candidate)
                place += 1
        return tuple(BeamCandidate(-parent, -token_id, score) for score, parent, token_id in sorted(best, reverse=True))


class _Stick:
    """Next tokens and their log-probabilities, in no order, broken off as they are asked for."""

    def __init__(self, rng: random.Random, theta: float) -> None:
        self.first_token = rng.randrange(STOP_TOKEN + 1, VOCAB_SIZE // 2)
        self._rng = rng
        self._theta = theta
        self._left = [0.0]
        self._logprobs: list[float] = []

    def left(self, place: int) -> float:
        """Returns the logarithm of what is left before piece ``place`` is broken off."""
        while len(self._left) <= place:
            self.logprob(len(self._left) - 1)
        return self._left[place]

    def logprob(self, place: int) -> float:
        """Returns the logarithm of piece ``place``."""
        while len(self._logprobs) <= place:
            kept = math.log(1 - self._rng.random()) / self._theta
            self._logprobs.append(self._left[-1] + math.log(-math.expm1(kept) or 5e-324))
            self._left.append(self._left[-1] + kept)
        return self._logprobs[place]
