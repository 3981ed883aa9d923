"""The soak's own judgement: each thing that may go wrong in half an hour makes it fail, and only that."""

import asyncio
import dataclasses
import random
import sys
from pathlib import Path

import httpx
import pytest
from server_fakes import FakeAsyncEngine
from server_harness import InlinePool

from jaxpaged.config import ServerConfig
from jaxpaged.server.app import create_app

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import soak
from trials.traffic import Tally, Traffic

METRICS = {
    "num_requests_running": 0.0,
    "num_requests_waiting": 0.0,
    "pages{active}": 0.0,
    "pages{cached}": 40.0,
    "pages{free}": soak.NUM_PAGES - 40.0,
    "recompiles_total": 0.0,
    "recoveries_total": 0.0,
    "request_success_total{stop}": 5.0,
    "request_success_total{length}": 4.0,
    "request_success_total{abort}": 1.0,
    "e2e_request_latency_seconds_count": 10.0,
    "generation_tokens_total": 99.0,
    "request_generation_tokens_sum": 99.0,
    "prefix_cache_hits_total": 7.0,
    "prefix_cache_queries_total": 70.0,
    "num_preemptions_total": 3.0,
    "num_swaps_total": 2.0,
    "page_copies_total": 1.0,
}


class FakeServer:
    """What ``check`` asks of a server."""

    exit_code = None

    def __init__(self, memory=2**30, descriptors=14, **changes):
        self._memory, self._descriptors, self._metrics = memory, descriptors, METRICS | changes

    def metrics(self):
        return self._metrics

    def resident_bytes(self):
        return self._memory

    def num_descriptors(self):
        return self._descriptors


def failing(server, failures=(), choices=9):
    tally = Tally()
    tally.choices, tally.cached_tokens = choices, 7
    for failure in failures:
        tally.fail(failure)
    return {what for what, holds, _ in soak.check(server, tally, (2**30, 14)) if not holds}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, set()),
        ({"pages{free}": soak.NUM_PAGES - 41.0}, {"no page is in use, none is lost"}),
        ({"recompiles_total": 1.0}, {"nothing was compiled after ready"}),
        ({"recoveries_total": 1.0}, {"no step failed, no invariant broke"}),
        ({"request_success_total{abort}": 2.0}, {"ends are counted once"}),
        ({"request_generation_tokens_sum": 98.0}, {"tokens are counted once"}),
        ({"prefix_cache_hits_total": 6.0}, {"hits are of texts that were looked up"}),
        ({"num_swaps_total": 0.0}, {"it was under pressure"}),
        ({"memory": 2**30 + soak.MOST_GROWTH + 1}, {"memory is bounded"}),
        ({"descriptors": 15}, {"descriptors are back"}),
    ],
    ids=lambda value: next(iter(value), "well") if isinstance(value, dict) else "",
)
def test_each_fault_fails_its_own_check(changes, found):
    assert failing(FakeServer(**changes)) == found


def test_faults_that_clients_saw_fail_the_soak():
    assert failing(FakeServer(), failures=["another answer"]) == {"every answer is as expected"}
    assert failing(FakeServer(), choices=10) == {"what clients got is counted"}


@pytest.mark.parametrize("value", ["num_requests_running", "pages{active}"])
def test_what_is_never_idle_fails(value, monkeypatch):
    monkeypatch.setattr(soak, "_IDLE_S", 0.0)
    assert failing(FakeServer(**{value: 1.0}))


def run_traffic(engine):
    """Lets a few clients ask a scripted engine for a moment."""
    tally = Tally()

    async def go():
        app = create_app(engine, ServerConfig(api_key=soak.KEYS, served_model_name=("tiny",)), InlinePool())
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=20) as client:
            traffic = Traffic(client, soak.KEYS, random.Random(3), tally, vocab_size=engine.info.model_config.vocab_size)
            await traffic.learn()
            await traffic.run(4, 2.0)
        app.state.service.close()

    asyncio.run(go())
    return tally


def test_clients_find_nothing_wrong_with_a_server_that_is_right():
    tally = run_traffic(FakeAsyncEngine())
    assert tally.failures == []
    assert set(tally.asked) >= {"fixed", "fixed, streamed", "sampled", "long", "left", "bad", "two keys"}


def test_clients_see_answers_that_change_and_a_cache_that_crosses_keys():
    engine = FakeAsyncEngine()
    engine.reply = lambda request: request.prompt[: len(engine.submitted)]
    assert any(failure.startswith("fixed") for failure in run_traffic(engine).failures)
    engine = FakeAsyncEngine()
    engine.caching = True
    engine.num_cached = lambda request: FakeAsyncEngine.num_cached(engine, dataclasses.replace(request, tenant="everybody's"))
    assert any(failure.startswith("two keys") for failure in run_traffic(engine).failures)
