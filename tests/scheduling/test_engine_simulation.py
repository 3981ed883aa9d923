"""2,000 random worlds around the engine (see engine_simulation.py), and more among the slow tests."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter

import pytest
from scheduling.engine_simulation import Rates, simulate_engine

BLOCK = 100
FAST_BLOCKS, SLOW_BLOCKS = 20, 100


@pytest.fixture(autouse=True)
def quiet():
    """The engine logs each of some ten thousand failures."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def run_block(block: int) -> None:
    totals: Counter[str] = Counter()
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        totals.update(dataclasses.asdict(simulate_engine(seed)))
    # The worlds are worth something only if what is to be tested happens in them.
    least = {
        "finished": 300,
        "aborted": 100,
        "errors": 20,
        "invalid": 2,
        "failures": 200,
        "unplanned": 5,
        "left_accused": 50,
        "restarts": 5,
        "away": 20,
        "gave_up": 1,
    }
    assert {name: totals[name] for name, count in least.items() if totals[name] < count} == {}


@pytest.mark.parametrize("block", range(FAST_BLOCKS))
def test_random_worlds(block):
    run_block(block)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(FAST_BLOCKS, SLOW_BLOCKS))
def test_more_random_worlds(block):
    run_block(block)


def test_whoever_breaks_steps_and_leaves_breaks_nothing_else():
    """Nothing else fails, every request breaks steps, and every client leaves sooner or later: the engine goes on."""
    worlds = {"rates": Rates(), "poisoned": 1.0, "impatience": 0.4, "num_requests": 30}
    assert sum(simulate_engine(seed, **worlds).left_accused for seed in range(40)) > 400
