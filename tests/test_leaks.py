"""The check after each test: it sees an idle engine that holds a page, a place or a slot."""

import pytest
from fakes import FakeRunner
from leaks import check_idle_engines, watch
from scheduling.simulation import make_request, make_scheduler

from jaxpaged.engine.engine import Engine
from jaxpaged.scheduling.pages import InvariantError


@pytest.fixture
def engine():
    watch()
    scheduler = make_scheduler(num_host_pages=3)
    engine = Engine(scheduler, FakeRunner(scheduler.pages.num_pages, scheduler.page_size))
    engine.add(make_request("a", 9, 3))
    while engine.has_work:
        engine.step()
    return engine


def test_an_engine_that_is_idle_and_holds_nothing_passes(engine):
    assert engine.scheduler.pages.num_cached > 0
    assert check_idle_engines() >= 1


@pytest.mark.parametrize("pool", ["pages", "slots", "host"])
def test_whatever_leaks_is_seen(engine, pool):
    scheduler = engine.scheduler
    leaking = {"pages": scheduler.pages, "slots": scheduler.slots, "host": scheduler.memory.host.pages}[pool]
    table = leaking.take(1)
    with pytest.raises((InvariantError, AssertionError)):
        check_idle_engines()
    leaking.release(table)
    check_idle_engines()


def test_an_engine_at_work_is_left_alone(engine):
    engine.add(make_request("b", 9, 3))
    engine.step()
    assert engine.scheduler.pages.num_used > 0
    check_idle_engines()
    while engine.has_work:
        engine.step()
