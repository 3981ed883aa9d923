"""Beam searches over a model made of a hash, in plain Python: random settings, and a driver. ``make_beam_goldens.py`` runs the same ones
through transformers."""

import dataclasses
import hashlib
import math
import random
import struct

from jaxpaged.scheduling.beams import BeamSearch, Hypothesis
from jaxpaged.scheduling.plan import BeamCandidate

VOCAB = 61


@dataclasses.dataclass(frozen=True)
class Setting:
    """One search over one made-up model."""

    seed: int
    prompt: tuple[int, ...]
    width: int
    max_tokens: int
    stops: tuple[int, ...]
    length_penalty: float
    early_stopping: bool | str
    min_tokens: int
    stop_bonus: float


def make_setting(seed: int) -> Setting:
    """Returns settings that differ in everything; about half of the searches end before ``max_tokens``."""
    rng = random.Random(seed)
    width, max_tokens = rng.randint(2, 8), rng.randint(1, 14)
    return Setting(
        seed,
        tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))),
        width,
        max_tokens,
        tuple(rng.sample(range(VOCAB), rng.choice([0, 1, 1, 1, 2, 3]))),
        rng.choice([-2.0, -0.5, 0.0, 0.6, 1.0, 1.0, 1.7, 3.0]),
        rng.choice([True, False, "never"]),
        rng.choice([0, 0, 0, rng.randint(0, max_tokens)]),
        rng.uniform(-1.0, 3.0),
    )


def logits(setting: Setting, tokens: tuple[int, ...]) -> list[float]:
    """Returns what the made-up model says after some tokens, prompt included."""
    digest = hashlib.sha256(f"{setting.seed}/{tokens}".encode()).digest()
    rng = random.Random(digest)
    values = [rng.gauss(0.0, 1.5) for _ in range(VOCAB)]
    for stop in setting.stops:
        values[stop] += setting.stop_bonus
    return values


def float32(value: float) -> float:
    """Rounds as the device does."""
    (rounded,) = struct.unpack("f", struct.pack("f", value))
    return rounded


def search(setting: Setting, n: int) -> tuple[Hypothesis, ...]:
    """Runs a search to its end."""
    beams = BeamSearch(
        width=setting.width,
        max_tokens=setting.max_tokens,
        stop_token_ids=setting.stops,
        length_penalty=setting.length_penalty,
        early_stopping=setting.early_stopping,
        min_tokens=setting.min_tokens,
    )
    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    while not beams.done:
        candidates = []
        for parent, (output, score) in enumerate(live):
            values = logits(setting, setting.prompt + output)
            norm = math.log(sum(map(math.exp, values)))
            candidates += [BeamCandidate(parent, token, float32(score + float32(value - norm))) for token, value in enumerate(values)]
        candidates.sort(key=lambda each: (-each.score, each.parent, each.token_id))
        count = setting.width * max(2, 1 + len(setting.stops))
        chosen = beams.advance([output for output, _ in live], candidates[:count])
        live = [((*live[each.parent][0], each.token_id), each.score) for each in chosen]
        assert bool(live) != beams.done
    return beams.results(n)
