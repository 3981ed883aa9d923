"""Workloads: who asks what, and how long the answers turn out; read from a file or made up from a name and a seed.

A file is JSON: ``{"name": ..., "requests": [{"prompt_token_ids": [...], "max_tokens": n}, ...]}``; each request is answered with
``max_tokens`` tokens, as ``scripts/bench.py`` has it.

Lengths are log-normal with sigma 1 (the logarithm's standard deviation), which has the long tail of real traffic. The means of ``alpaca``
(19.31 prompt and 58.45 output tokens) and ``sharegpt`` (161.31 and 337.99) are those of section 6.1 of the PagedAttention paper
(arXiv 2309.06180); the traces themselves are not here. ``chat`` has medians of 160 and 200 tokens, each at most 768.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

from jaxpaged.config import suggest
from jaxpaged.errors import ConfigError

STOP_TOKEN = 0
"""Ends every made-up answer; no made-up token besides it has this id."""

VOCAB_SIZE = 50_000
_SIGMA = 1.0


@dataclasses.dataclass(frozen=True)
class Call:
    """One request and its answer.

    Attributes:
        prompt: Token ids.
        output: Token ids of the answer; the last ends it.
        after: Place in the workload of the call that must be answered before this one is made (an earlier turn); None: made at once.
    """

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    after: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are stored in the end: the last token's never are."""
        return len(self.prompt) + len(self.output) - 1


@dataclasses.dataclass(frozen=True)
class Workload:
    """Calls in the order in which they are made."""

    name: str
    calls: tuple[Call, ...]

    def repeated_tokens(self) -> int:
        """Counts prompt tokens that continue, from its first token on, a text of an earlier call: the most that a prefix cache can find."""
        seen: set[int] = set()
        count = 0
        for call in self.calls:
            key = 0
            keys = [key := hash((key, token)) for token in call.prompt + call.output]
            prompt_keys = keys[: len(call.prompt) - 1]
            count += next((i for i, each in enumerate(prompt_keys) if each not in seen), len(prompt_keys))
            seen.update(keys)
        return count


def load_workload(workload: str, *, num_requests: int, seed: int, max_model_len: int) -> Workload:
    """Returns a workload.

    Args:
        workload: A key of ``WORKLOADS``, or a file.
        num_requests: Calls to make up.
        seed: Of lengths and tokens.
        max_model_len: Longest context; made-up prompts and answers have at most half of it.

    Raises:
        ConfigError: There is neither such a name nor such a file, or the file is not as described above.
    """
    rng = random.Random(seed)
    if workload in WORKLOADS:
        return Workload(workload, tuple(WORKLOADS[workload](rng, num_requests, max_model_len)))
    path = Path(workload).expanduser()
    if not path.is_file():
        raise ConfigError(f"workload: {workload!r} is no file and no name{suggest(workload, WORKLOADS)}; names are {', '.join(WORKLOADS)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"workload: {path} cannot be read as JSON ({error})") from error
    requests = content.get("requests") if isinstance(content, dict) else None
    if not isinstance(requests, list) or not requests:
        raise ConfigError(f"workload: {path} must hold an object with a list of requests, at least one")
    return Workload(str(content.get("name") or path.stem), tuple(_read_call(rng, index, each) for index, each in enumerate(requests)))


def _read_call(rng: random.Random, index: int, request: object) -> Call:
    where = f"workload: requests[{index}]"
    if not isinstance(request, dict):
        raise ConfigError(f"{where} must be an object; got {request!r:.60}")
    prompt, length = request.get("prompt_token_ids"), request.get("max_tokens")
    if not isinstance(prompt, list) or not prompt or not all(type(token) is int and token >= 0 for token in prompt):
        raise ConfigError(f"{where}.prompt_token_ids must be a list of token ids, at least one; got {prompt!r:.60}")
    if type(length) is not int or length < 1:
        raise ConfigError(f"{where}.max_tokens must be an integer, at least 1; got {length!r:.60}")
    return Call(tuple(prompt), _answer(rng, length))


def _tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.choices(range(STOP_TOKEN + 1, VOCAB_SIZE), k=count))


def _answer(rng: random.Random, length: int) -> tuple[int, ...]:
    return (*_tokens(rng, length - 1), STOP_TOKEN)


def _with_mean(rng: random.Random, count: int, mean: float, most: int) -> list[int]:
    """Returns log-normal lengths in [1, most] whose own mean is ``mean``, as closely as whole tokens allow (if ``most`` does)."""
    factors = [rng.lognormvariate(0, _SIGMA) for _ in range(count)]
    low, high = 0.0, float(most)
    for _ in range(60):
        median = (low + high) / 2
        total = sum(_length(median * factor, most) for factor in factors)
        low, high = (median, high) if total < mean * count else (low, median)
    return [_length(high * factor, most) for factor in factors]


def _length(value: float, most: int) -> int:
    return max(1, min(most, math.floor(value + 0.5)))


def _paper(prompt: float, output: float) -> Callable[[random.Random, int, int], list[Call]]:
    def make(rng: random.Random, count: int, max_model_len: int) -> list[Call]:
        most = max_model_len // 2
        lengths = zip(_with_mean(rng, count, prompt, most), _with_mean(rng, count, output, most), strict=True)
        return [Call(_tokens(rng, inputs), _answer(rng, outputs)) for inputs, outputs in lengths]

    return make


def _chat(rng: random.Random, count: int, max_model_len: int) -> list[Call]:
    most = min(768, max_model_len // 2)

    def draw(median: float) -> int:
        return max(4, _length(median * rng.lognormvariate(0, _SIGMA), most))

    lengths = [(draw(160), draw(200)) for _ in range(count)]
    return [Call(_tokens(rng, inputs), _answer(rng, outputs)) for inputs, outputs in lengths]


def _shared_prefix(rng: random.Random, count: int, max_model_len: int) -> list[Call]:
    """256 tokens that all have in common, 16 to 256 of their own, answers of 16 to 128: ratios of that if the context is short."""
    scale = min(1.0, max_model_len / 1024)
    prefix = _tokens(rng, max(1, int(256 * scale)))
    lengths = [(rng.randint(16, 256), rng.randint(16, 128)) for _ in range(count)]
    return [Call(prefix + _tokens(rng, max(1, int(a * scale))), _answer(rng, max(1, int(b * scale)))) for a, b in lengths]


def _multi_turn(rng: random.Random, count: int, max_model_len: int) -> list[Call]:
    """Conversations of five turns behind one system text of 64 tokens; a turn's prompt is all that was said before, and a new message.

    Messages have 40 tokens on average and answers 120, at most four times that. A turn is made as soon as the one before it is answered;
    one that would not fit the context begins a new conversation instead.
    """
    turns = 5
    system = _tokens(rng, min(64, max_model_len // 8))
    messages = iter(_with_mean(rng, count, 40, min(160, max_model_len // 4)))
    answers = iter(_with_mean(rng, count, 120, min(480, max_model_len // 2)))
    latest: list[tuple[int | None, tuple[int, ...]]] = [(None, system)] * -(-count // turns)
    calls: list[Call] = []
    while len(calls) < count:
        for place, (after, text) in enumerate(latest[: count - len(calls)]):
            message, output = _tokens(rng, next(messages)), _answer(rng, next(answers))
            if len(text) + len(message) + len(output) > max_model_len:
                after, text = None, system
            calls.append(Call(text + message, output, after))
            latest[place] = (len(calls) - 1, text + message + output[:-1])
    return calls


WORKLOADS: dict[str, Callable[[random.Random, int, int], list[Call]]] = {
    "alpaca": _paper(19.31, 58.45),
    "chat": _chat,
    "multi-turn": _multi_turn,
    "shared-prefix": _shared_prefix,
    "sharegpt": _paper(161.31, 337.99),
}
"""Workloads by name: each makes calls from a generator, their number, and the longest context."""
