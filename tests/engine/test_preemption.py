"""Which way out of preemption is cheaper, by measured costs."""

import pytest

from jaxpaged.engine.preemption import PreemptionCost


def test_the_cheaper_one_is_preferred():
    cost = PreemptionCost()
    cost.moved(10, 1.0)
    cost.computed(100, 1.0)
    assert cost.prefers_swap(num_tokens=11, num_pages=1)
    assert not cost.prefers_swap(num_tokens=10, num_pages=1)
    assert not cost.prefers_swap(num_tokens=10, num_pages=2)


def test_nothing_known_means_computing_again():
    cost = PreemptionCost()
    assert not cost.prefers_swap(10**9, 1)
    cost.computed(100, 1.0)
    assert not cost.prefers_swap(10**9, 1)
    cost.moved(0, 0.0)  # no host memory
    assert not cost.prefers_swap(10**9, 1)


def test_the_cost_of_a_token_follows_the_steps():
    cost = PreemptionCost()
    cost.computed(100, 1.0)
    for _ in range(60):
        cost.computed(100, 2.0)
    assert cost.seconds_per_token == pytest.approx(0.02, rel=0.01)
    cost.computed(0, 1.0)
    cost.computed(10, 0.0)
    assert cost.seconds_per_token == pytest.approx(0.02, rel=0.01)
