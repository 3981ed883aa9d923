"""The fuzzer's own judgement, and a few hundred of its requests against the application over the scripted engine."""

import argparse
import asyncio
import json
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest
from server_fakes import FakeAsyncEngine
from server_harness import InlinePool

from jaxpaged.config import ServerConfig
from jaxpaged.server.app import create_app

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import fuzz_api
from trials.mutants import SEEDS, Mutant, make_mutant

ID = {"x-request-id": "0" * 32}


def error(**changes):
    fields = {"message": "m", "type": "t", "param": None, "code": "c"} | changes
    return json.dumps({"error": {key: value for key, value in fields.items() if value != "absent"}})


def test_a_number_makes_the_same_request_again_and_others_make_others():
    mutants = [make_mutant(3, number) for number in range(400)]
    assert mutants == [make_mutant(3, number) for number in range(400)]
    assert len(set(mutants)) > 300
    assert mutants != [make_mutant(4, number) for number in range(400)]
    assert {mutant.path for mutant in mutants} >= {path for path, _ in SEEDS}
    assert Counter(mutant.method for mutant in mutants).most_common(1)[0][0] == "POST"


def judged(status, text, headers=ID, method="POST", kind="application/json"):
    answer = httpx.Response(status, text=text, headers={**headers, "content-type": kind})
    return fuzz_api.judge(Mutant(method, "/tokenize", "application/json", b"{}"), answer, fuzz_api.Tally())


@pytest.mark.parametrize(
    ("status", "text", "more"),
    [
        (500, error(), {}),
        (503, error(), {}),
        (400, error(code="absent"), {}),
        (400, error(message=""), {}),
        (400, error(message="x" * 1001), {}),
        (400, '{"detail": "no"}', {}),
        (404, "Not Found", {}),
        (400, error(message='File "/a/b.py", line 3'), {}),
        (200, '{"prompt": "Traceback (most recent call last)"}', {}),
        (200, "{", {}),
        (200, "[1]", {}),
        (200, "{}", {"headers": {}}),
        (200, 'data: {"a": 1}\n\n', {"kind": "text/event-stream"}),
        (200, "", {"kind": "text/event-stream"}),
        (200, "data: x\n\ndata: [DONE]\n\n", {"kind": "text/event-stream"}),
    ],
)
def test_what_is_wrong_is_called_wrong(status, text, more):
    assert judged(status, text, **more) is not None


@pytest.mark.parametrize(
    ("status", "text", "more"),
    [
        (400, error(), {}),
        (429, error(param="n"), {}),
        (405, "", {"method": "HEAD"}),
        (200, '{"prompt": ""}', {}),
        (200, 'data: {"a": 1}\n\n: ping\n\ndata: [DONE]\n\n', {"kind": "text/event-stream"}),
    ],
)
def test_what_is_right_is_called_right(status, text, more):
    assert judged(status, text, **more) is None


def test_the_application_takes_it(capsys):
    """The whole trial, small: nothing is answered wrongly, and requests of every kind were made."""
    application = create_app(FakeAsyncEngine(), ServerConfig(served_model_name=("tiny",)), InlinePool())
    transport = httpx.ASGITransport(application, raise_app_exceptions=False)
    args = argparse.Namespace(count=300, clients=4, seed=5, timeout=60.0)

    async def trial():
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await fuzz_api.run(client, args)

    tally = asyncio.run(trial())
    assert tally.failures == []
    assert sum(tally.answers.values()) == 300
    assert {status for _, status in tally.answers} >= {200, 400, 404, 405, 415}
    assert {"invalid_json", "invalid_value", "unsupported_parameter", "missing_required_parameter"} <= set(tally.codes)


def test_a_server_that_fails_is_found_out():
    engine = FakeAsyncEngine()
    engine.fail_at = (0, "internal_error")
    transport = httpx.ASGITransport(create_app(engine, ServerConfig(served_model_name=("tiny",)), InlinePool()), raise_app_exceptions=False)
    args = argparse.Namespace(count=100, clients=2, seed=0, timeout=60.0)

    async def trial():
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await fuzz_api.run(client, args)

    tally = asyncio.run(trial())
    assert tally.num_failures > 5
    assert "500" in tally.failures[0] and "--only" in tally.failures[0]
