"""Real processes: hostile templates, bodies and tokenizers end in an answer, in bounded time and memory, and harm nobody else."""

import asyncio
import copy
import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from server_fakes import SPECIAL, FakeAsyncEngine

from jaxpaged.engine.chat_template import ChatTemplate
from jaxpaged.errors import ConfigError, EngineStopped, RequestError
from jaxpaged.server import text_pool
from jaxpaged.server.prepare import Job
from jaxpaged.server.text_pool import SMALL_BODY_BYTES, ProcessPool

CHAT = "/v1/chat/completions"
JOB_S = 3.0
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
TRIGGER = "{{% if messages[0].content == '{}' %}}{}{{% endif %}}{{{{ messages[0].content }}}}"


def info_with(template):
    info = FakeAsyncEngine().info
    tokenizer = copy.copy(info.tokenizer)
    tokenizer._chat_template = ChatTemplate(template, {"eos_token": SPECIAL[2]})
    return dataclasses.replace(info, tokenizer=tokenizer)


def on(word, body):
    """A template that does something bad to one message only."""
    return TRIGGER.format(word, body)


class Pool:
    """A pool and the loop that it is used from."""

    def __init__(self, info, **options):
        self.info = info
        self.runner = asyncio.Runner()
        self.runner.run(self._make(options))

    async def _make(self, options):
        self.pool = ProcessPool(2, job_s=JOB_S, **options)
        await self.pool.load(self.info)

    async def ask(self, text, *, path=CHAT, owner="a", size=None, **fields):
        body = {"model": "echo", "messages": [{"role": "user", "content": text}], **fields}
        raw = json.dumps(body).encode()
        return await self.pool.run(
            Job(path=path, body=raw, request_id="r"), self.info, size=len(raw) if size is None else size, owner=owner
        )

    def text(self, content, **options):
        (prompt,) = self.runner.run(self.ask(content, **options)).prompts
        return self.info.tokenizer.decode(prompt.token_ids)

    @property
    def pids(self):
        return [process._process.pid for process in self.pool._all]

    def close(self):
        self.pool.close()
        self.runner.close()


@pytest.fixture
def make_pool():
    made = []

    def make(template="{{ messages[0].content }}"):
        made.append(Pool(info_with(template)))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def gone(pid):
    """Whether a process has ended; one that nobody has waited for counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_call_is_prepared_in_another_process_as_here(make_pool):
    pool = make_pool()
    prepared = pool.runner.run(pool.ask("hello", max_tokens=3, bad_token_ids=[7], temperature=0.0))
    assert prepared.prompts[0].request.max_tokens == 3
    assert prepared.prompts[0].request.id == "r-0"
    assert prepared.params.bad_token_ids == (7,)
    assert pool.info.tokenizer.decode(prepared.prompts[0].token_ids) == "hello"
    with pytest.raises(RequestError, match="temperature") as caught:
        pool.text("hello", temperature=-1)
    assert caught.value.param == "temperature"
    assert pool.text("x" * 100, size=SMALL_BODY_BYTES + 1) == "x" * 100


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (ENDLESS, r"more than 3"),
        ("{{ 'x' * 10**10 }}", "MiB of memory"),
        ("{% set ns = namespace(s='x' * 10**8) %}{% for i in range(99999) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", "takes more"),
        ("{{ raise_exception('x' * 10**7) }}", "rejects these messages: x"),
        ("{{ nothing.of.this }}", "rejects these messages"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "rejects these messages"),
    ],
)
def test_a_hostile_template_ends_one_request(make_pool, body, reason):
    pool = make_pool(on("evil", body))
    began = time.monotonic()
    with pytest.raises(RequestError, match=reason) as caught:
        pool.text("evil")
    assert time.monotonic() - began < 20
    assert len(str(caught.value)) < 400
    assert pool.text("good") == "good"
    assert pool.text("good", size=SMALL_BODY_BYTES + 1) == "good"


def test_small_work_passes_while_large_work_takes_its_time(make_pool):
    pool = make_pool(on("evil", ENDLESS))

    async def scenario():
        evil = [asyncio.create_task(pool.ask("evil", size=SMALL_BODY_BYTES + 1, owner="evil")) for _ in range(3)]
        good = asyncio.create_task(pool.ask("good", size=SMALL_BODY_BYTES + 1, owner="good"))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await pool.ask("small")
        assert time.monotonic() - began < JOB_S / 2
        assert not any(task.done() for task in evil)
        await good  # behind the two that came before it, and not behind all that the other has in line
        assert sum(task.done() for task in evil) == 2
        for task in evil:
            with pytest.raises(RequestError, match=r"more than 3"):
                await task

    pool.runner.run(asyncio.wait_for(scenario(), 60))


def test_who_does_not_wait_any_more_frees_no_process_before_it_is_done(make_pool):
    pool = make_pool(on("evil", ENDLESS))

    async def scenario():
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pool.ask("evil"), 0.1)
        await pool.ask("good")

    pool.runner.run(asyncio.wait_for(scenario(), 60))
    assert pool.text("good") == "good"


def test_a_process_that_somebody_killed_is_replaced(make_pool):
    pool = make_pool()
    before = pool.pids
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not all(map(gone, before)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pool.text("good") == "good"
    assert pool.text("good", size=SMALL_BODY_BYTES + 1) == "good"


def test_a_process_that_dies_over_a_job_that_is_none_of_its_limits_is_asked_again(make_pool):
    pool = make_pool(on("slow", "{% for a in range(20000) %}{% for b in range(100) %}{% endfor %}{% endfor %}"))

    async def scenario():
        asked = asyncio.create_task(pool.ask("slow"))
        await asyncio.sleep(0.1)
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
        return await asked

    (prompt,) = pool.runner.run(asyncio.wait_for(scenario(), 60)).prompts
    assert pool.info.tokenizer.decode(prompt.token_ids) == "slow"
    assert pool.text("good") == "good"


def test_closing_ends_a_process_that_is_busy(make_pool):
    pool = make_pool(on("evil", ENDLESS))

    async def scenario():
        waiting = asyncio.create_task(pool.ask("evil"))
        await asyncio.sleep(0.2)
        pool.pool.close()
        with pytest.raises((EngineStopped, asyncio.CancelledError)):
            await waiting

    before = pool.pids
    began = time.monotonic()
    pool.runner.run(scenario())
    assert time.monotonic() - began < JOB_S
    assert all(map(gone, before))


@pytest.mark.parametrize(
    ("template", "reason"),
    [("{% if %}", "line 1"), ("{{ x | nosuchfilter }}", "nosuchfilter"), (ENDLESS, r"more than 3"), ("{{ 'x' * 10**10 }}", "memory")],
)
def test_a_template_that_cannot_work_ends_the_start(template, reason):
    with pytest.raises(ConfigError, match=reason):
        Pool(info_with(template))


def test_a_process_that_cannot_start_ends_the_start_and_no_template_is_blamed(monkeypatch):
    monkeypatch.setattr(text_pool.sys, "executable", shutil.which("false"))
    with pytest.raises(ConfigError, match="exit code 1 before it was ready"):
        Pool(info_with("{{ messages[0].content }}"))


def test_a_template_that_refuses_the_trial_may_serve_others(make_pool, caplog):
    pool = make_pool("{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}{{ messages[1].content }}")
    assert "system first" in caplog.text
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "good"}]
    (prompt,) = pool.runner.run(pool.ask("", messages=messages)).prompts
    assert pool.info.tokenizer.decode(prompt.token_ids) == "good"
