"""The engine's thread: streams, cancelling, disconnects, draining, death; with a fake device that takes its time."""

import asyncio
import dataclasses
import gc
import threading
import time

import pytest
from engine_fakes import make
from fakes import DeviceFault, FakeRunner, first_cell, golden_beams, golden_tokens
from server_fakes import byte_tokenizer, model_config

from jaxpaged.config import EngineConfig
from jaxpaged.engine import async_engine as module
from jaxpaged.engine import recovery
from jaxpaged.engine.async_engine import AsyncEngine
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.startup import LoadedEngine
from jaxpaged.engine.status import EngineInfo, EngineStatus
from jaxpaged.errors import ConfigError, EngineStopped, GenerationError, QueueFull, RequestError
from jaxpaged.scheduling.request import FinishReason
from jaxpaged.scheduling.scheduler import Scheduler

VOCAB, PAGES, SEQS, WAITING = 50, 400, 8, 20


class SlowRunner(FakeRunner):
    """A fake device whose steps take ``step_s`` seconds; ``gate`` cleared makes them hang."""

    def __init__(self, step_s=0.001, **more):
        super().__init__(PAGES, 4, vocab_size=VOCAB, **more)
        self.step_s = step_s
        self.gate = threading.Event()
        self.gate.set()
        self.num_steps = 0

    def complete(self, handle):
        self.gate.wait()
        time.sleep(self.step_s)
        self.num_steps += 1
        return super().complete(handle)


def loader(runner, *, before=lambda progress: None, max_waiting=WAITING):
    def load(config, progress):
        before(progress)
        scheduler = Scheduler(
            num_pages=PAGES,
            page_size=4,
            max_num_seqs=SEQS,
            max_num_batched_tokens=32,
            max_model_len=512,
            token_buckets=(1, 2, 4, 8, 16, 32),
            max_waiting=max_waiting,
        )
        info = EngineInfo(
            model_name="fake",
            model_config=model_config(),
            tokenizer=byte_tokenizer(),
            max_model_len=512,
            max_request_tokens=512,
            num_pages=PAGES,
            page_size=4,
            max_num_seqs=SEQS,
            max_num_batched_tokens=32,
            max_waiting=max_waiting,
            token_buckets=(1, 2, 4, 8, 16, 32),
            eos_token_ids=(),
        )
        return LoadedEngine(Engine(scheduler, runner), info)

    return load


class Served:
    """An AsyncEngine for the length of a ``with`` block; afterwards nothing may be left."""

    def __init__(self, runner, *, clean=True, **more):
        self.runner, self.clean = runner, clean
        self.engine = AsyncEngine(EngineConfig(), load=loader(runner, **more))

    async def __aenter__(self):
        self.engine.start(asyncio.get_running_loop())
        await self.engine.wait_ready()
        return self.engine

    async def __aexit__(self, kind, error, trace):
        if self.clean and kind is None:
            await eventually(lambda: not self.engine._engine.has_work)
            self.engine._engine.check()
            assert self.engine.stats().pages_used == 0
        self.engine.stop()
        assert not self.engine._thread.is_alive()


async def eventually(condition, timeout_s=10.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


def expected_tokens(request):
    return golden_tokens(request, 0, VOCAB, first=first_cell(request))


async def tokens_of(stream):
    return [token async for event in stream for token in event.token_ids]


def test_many_streams_at_once_get_their_own_tokens():
    async def main():
        async with Served(SlowRunner()) as engine:
            requests = [make(f"r{i}", range(i % 7 + 1), seed=i, max_tokens=5 + i) for i in range(24)]
            results = await asyncio.gather(*(tokens_of(engine.submit(request)) for request in requests))
            for request, tokens in zip(requests, results, strict=True):
                assert tokens == expected_tokens(request)
            assert engine.stats().finished == {"length": 24}

    asyncio.run(main())


def test_one_call_into_the_loop_per_step():
    async def main():
        async with Served(SlowRunner()) as engine:
            calls = []
            engine._call = lambda function, *args, call=engine._call: (calls.append(function), call(function, *args))
            streams = [engine.submit(make(f"r{i}", [1, 2], max_tokens=30)) for i in range(8)]
            results = await asyncio.gather(*map(tokens_of, streams))
            assert sum(map(len, results)) == 240
            assert len(calls) <= engine._engine.telemetry.steps + 8

    asyncio.run(main())


def test_n_samples_share_a_stream():
    async def main():
        async with Served(SlowRunner()) as engine:
            ends = [event.index async for event in engine.submit(make("a", [1], n=3, max_tokens=4)) if event.finish_reason]
            assert sorted(ends) == [0, 1, 2]

    asyncio.run(main())


def test_beams_come_at_once_and_end_the_stream():
    async def main():
        async with Served(SlowRunner()) as engine:
            request = make("a", [1, 2, 3], use_beam_search=True, n=2, beam_width=4, max_tokens=6)
            events = [event async for event in engine.submit(request)]
            expected = golden_beams(request, VOCAB, first=first_cell(request))
            assert [event.index for event in events] == [0, 1, 2, 3]
            assert [event.token_ids for event in events] == [hypothesis.tokens for hypothesis in expected[:2]] + [(), ()]
            assert [event.cumulative_logprob for event in events[:2]] == [hypothesis.cumulative_logprob for hypothesis in expected[:2]]
            assert engine.stats().generation_tokens == sum(len(hypothesis.tokens) for hypothesis in expected[:2])

    asyncio.run(main())


def test_the_prefix_cache_is_parted_by_tenant_and_can_be_reset():
    async def main():
        async with Served(SlowRunner()) as engine:
            names = iter(range(100))

            async def cached(tenant):
                request = dataclasses.replace(make(f"r{next(names)}", range(14), max_tokens=3), tenant=tenant)
                events = [event async for event in engine.submit(request)]
                assert [token for event in events for token in event.token_ids] == expected_tokens(request)
                return {event.num_cached_tokens for event in events}

            assert [await cached(tenant) for tenant in ("a", "a", "b", "a", "b")] == [{0}, {12}, {0}, {12}, {12}]
            assert engine.stats().prefix_cache_hits == 36 and engine.stats().prefix_cache_queries == 70
            assert engine.stats().pages_cached > 0
            await engine.reset_prefix_cache()
            assert engine.stats().pages_cached == 0
            assert [await cached(tenant) for tenant in ("a", "b", "a")] == [{0}, {0}, {12}]
            await engine.reset_prefix_cache("a")
            assert engine.stats().pages_cached > 0
            assert [await cached(tenant) for tenant in ("a", "b", "a")] == [{0}, {12}, {12}]

    asyncio.run(main())


def test_a_reset_while_requests_run_changes_no_token():
    async def main():
        async with Served(SlowRunner()) as engine:
            requests = [make(f"r{i}", range(10 + i), max_tokens=30) for i in range(6)]
            running = [asyncio.create_task(tokens_of(engine.submit(request))) for request in requests]
            for _ in range(5):
                await asyncio.sleep(0.005)
                await asyncio.gather(engine.reset_prefix_cache(), engine.reset_prefix_cache())
            for request, tokens in zip(requests, await asyncio.gather(*running), strict=True):
                assert tokens == expected_tokens(request)

    asyncio.run(main())


def test_a_reset_that_cannot_be_done_says_so():
    async def main():
        runner = SlowRunner()
        engine = AsyncEngine(EngineConfig(), load=loader(runner))
        with pytest.raises(EngineStopped):
            await engine.reset_prefix_cache()
        engine.start(asyncio.get_running_loop())
        await engine.wait_ready()
        runner.gate.clear()  # the thread hangs in a step, so that it never comes to the reset
        stream = engine.submit(make("a", [1], max_tokens=50))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(engine.reset_prefix_cache())
        left = asyncio.create_task(engine.reset_prefix_cache())
        await asyncio.sleep(0.05)
        left.cancel()
        engine._stopping.set()
        runner.gate.set()
        with pytest.raises(EngineStopped):
            await waiting
        with pytest.raises(EngineStopped):
            await tokens_of(stream)
        engine.stop()
        with pytest.raises(EngineStopped):
            await engine.reset_prefix_cache()

    asyncio.run(main())


@pytest.mark.parametrize("how", ["cancel", "close", "drop", "break"])
def test_leaving_a_stream_frees_its_pages_within_two_steps(how):
    async def main():
        runner = SlowRunner(step_s=0.005)
        async with Served(runner) as engine:
            stream = engine.submit(make("a", range(30), max_tokens=400))
            other = engine.submit(make("b", [1], max_tokens=100))
            await anext(stream)
            seen = runner.num_steps
            if how == "cancel":
                task = asyncio.create_task(tokens_of(stream))
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif how == "close":
                stream.close()
                stream.close()
                with pytest.raises(StopAsyncIteration):
                    await anext(stream)
            elif how == "break":
                async for _ in stream:
                    break
                stream.close()
            if how == "drop":
                del stream
                gc.collect()
            before = runner.num_steps
            await eventually(lambda: engine.status.running == 1)
            assert runner.num_steps - max(seen, before) <= 2
            assert len(await tokens_of(other)) == 100
            assert engine.stats().finished == {"abort": 1, "length": 1}

    asyncio.run(main())


def test_a_request_that_waits_is_aborted_too():
    async def main():
        async with Served(SlowRunner()) as engine:
            running = [engine.submit(make(f"r{i}", [1], max_tokens=50)) for i in range(SEQS)]
            waiting = engine.submit(make("w", [1], max_tokens=50))
            await waiting.accepted()
            engine.abort("w")
            (event,) = [event async for event in waiting]
            assert event.finish_reason is FinishReason.ABORT
            engine.abort("w")
            engine.abort("nobody")
            await asyncio.gather(*map(tokens_of, running))

    asyncio.run(main())


def test_refusals_come_before_the_first_event():
    async def main():
        runner = SlowRunner()
        async with Served(runner, max_waiting=2) as engine:
            with pytest.raises(RequestError) as caught:
                engine.submit(make("long", range(500), max_tokens=13))
            assert caught.value.code == "context_length_exceeded"
            runner.gate.clear()
            streams = [engine.submit(make(f"r{i}", [1])) for i in range(SEQS + 2)]
            engine._engine.scheduler.retry_after_s = lambda: 17
            for refused in range(1, 4):
                with pytest.raises(QueueFull) as full:
                    engine.submit(make("full", [1]))
                assert full.value.retry_after_s == 17
                assert engine.stats().refused == refused
            with pytest.raises(RequestError):
                engine.submit(make("r0", [1]))
            runner.gate.set()
            await asyncio.gather(*map(tokens_of, streams))
            assert len(await tokens_of(engine.submit(make("again", [1])))) == 12

    asyncio.run(main())


def test_the_schedulers_own_refusal_reaches_the_stream():
    """n samples count one by one there, so the request's thread knows better than the loop's."""

    async def main():
        runner = SlowRunner()
        async with Served(runner, max_waiting=2) as engine:
            runner.gate.clear()
            first = [engine.submit(make(f"a{i}", [1], n=5, max_tokens=3)) for i in range(2)]
            for stream in first:
                await stream.accepted()
            second = engine.submit(make("b", [1]))
            runner.gate.set()
            with pytest.raises(QueueFull):
                await second.accepted()
            with pytest.raises(QueueFull):
                await anext(second)
            for stream in first:
                await tokens_of(stream)
            assert engine.stats().refused == 1

    asyncio.run(main())


def test_draining_lets_requests_finish_and_takes_no_more():
    async def main():
        async with Served(SlowRunner()) as engine:
            task = asyncio.create_task(tokens_of(engine.submit(make("a", [1], max_tokens=40))))
            await asyncio.sleep(0.01)
            drain = asyncio.create_task(engine.drain(10.0))
            await asyncio.sleep(0)
            assert engine.status.state == "draining"
            with pytest.raises(EngineStopped):
                engine.submit(make("b", [1]))
            await drain
            assert len(await task) == 40

    asyncio.run(main())


def test_draining_aborts_what_does_not_finish_in_time():
    async def main():
        async with Served(SlowRunner(step_s=0.01)) as engine:
            task = asyncio.create_task(tokens_of(engine.submit(make("a", [1], max_tokens=400))))
            await asyncio.sleep(0.05)
            await engine.drain(0.05)
            assert 0 < len(await task) < 100
            assert engine.stats().finished == {"abort": 1}

    asyncio.run(main())


def test_stopping_ends_open_streams():
    async def main():
        async with Served(SlowRunner(), clean=False) as engine:
            stream = engine.submit(make("a", [1], max_tokens=400))
            await anext(stream)
            engine.stop()
            with pytest.raises(EngineStopped):
                await tokens_of(stream)
            assert engine.status.state == "stopped"
            with pytest.raises(EngineStopped):
                engine.submit(make("b", [1]))
            engine.stop()

    asyncio.run(main())


def test_a_dying_thread_ends_every_stream():
    async def main():
        async with Served(SlowRunner(), clean=False) as engine:
            streams = [engine.submit(make(f"r{i}", [1], max_tokens=400)) for i in range(12)]
            await anext(streams[0])
            engine._engine.scheduler.schedule = lambda: 1 // 0  # a bug of ours
            last = [event async for event in streams[0]][-1]  # the first in line is blamed, until it shows that it is not alone
            assert last.error_code == "internal_error"
            for stream in streams[1:]:
                with pytest.raises(EngineStopped, match="ZeroDivisionError"):
                    await asyncio.wait_for(tokens_of(stream), 5)
            assert engine.status.state == "failed" and "ZeroDivisionError" in engine.status.detail
            with pytest.raises(EngineStopped):
                engine.submit(make("b", [1]))

    asyncio.run(main())


def test_failed_steps_show_as_recovering_and_streams_go_on():
    async def main():
        states = []
        runner = SlowRunner()
        runner.fails = lambda plan: plan.step in (5, 8)
        async with Served(runner) as engine:
            reset = runner.reset
            runner.reset = lambda: (states.append(engine.status.state), reset())
            request = make("a", [1, 2, 3], max_tokens=30)
            assert await tokens_of(engine.submit(request)) == expected_tokens(request)
            assert states == ["recovering", "recovering"]
            assert engine.status.state == "ready"

    asyncio.run(main())


@pytest.mark.parametrize("n", [1, 2])
def test_clients_that_leave_requests_that_break_steps_end_nothing(n):
    """Again and again on an idle server, and one sample of two by a stop string; in the end it is ready and serves."""

    async def main():
        runner = SlowRunner()
        runner.fails = lambda plan: any(work.sequence.request.id.startswith("bad") for work in plan.work)
        async with Served(runner) as engine:
            for i in range(8):
                before = engine.stats().recoveries
                stream = engine.submit(make(f"bad{i}", [1, 2], n=n, max_tokens=30))
                await eventually(lambda before=before: engine.stats().recoveries >= before + 2)
                engine.abort(f"bad{i}", 0, reason=FinishReason.STOP)
                stream.close()
                await eventually(lambda: engine.status.ready and not engine._engine.has_work)
            request = make("good", [1, 2, 3], max_tokens=30)
            assert await tokens_of(engine.submit(request)) == expected_tokens(request)
            assert engine.stats().recoveries >= 16

    asyncio.run(main())


def broken_runner(*, resets):
    """A device whose fifth step fails, and as many resets after it."""
    runner = SlowRunner()
    runner.fails = lambda plan: plan.step == 5
    left, reset = [resets], runner.reset

    def failing():
        left[0] -= 1
        if left[0] >= 0:
            raise DeviceFault("gone")
        reset()

    runner.reset = failing
    return runner


def test_a_device_that_is_gone_fails_the_engine(monkeypatch):
    monkeypatch.setattr(recovery, "RESET_PAUSES_S", (0.01, 0.02))

    async def main():
        async with Served(broken_runner(resets=3), clean=False) as engine:
            with pytest.raises(EngineStopped, match="gone"):
                await tokens_of(engine.submit(make("a", [1], max_tokens=30)))
            assert engine.status.state == "failed"

    asyncio.run(main())


def test_while_the_device_is_away_aborts_are_taken_and_no_client_is_needed_to_be_ready_again(monkeypatch):
    monkeypatch.setattr(recovery, "RESET_PAUSES_S", (0.3,))

    async def main():
        async with Served(broken_runner(resets=1)) as engine:
            stream = engine.submit(make("a", [1], max_tokens=30))
            await eventually(lambda: engine.status.state == "recovering")
            assert not engine.status.ready
            engine.abort("a")
            await tokens_of(stream)
            assert engine.status.state == "recovering" and engine.status.running == engine.status.waiting == 0
            await eventually(lambda: engine.status.ready)
            request = make("b", [1, 2, 3], max_tokens=30)
            assert await tokens_of(engine.submit(request)) == expected_tokens(request)

    asyncio.run(main())


def test_stopping_does_not_wait_for_a_device_that_is_away(monkeypatch):
    monkeypatch.setattr(recovery, "RESET_PAUSES_S", (600.0,))

    async def main():
        async with Served(broken_runner(resets=1), clean=False) as engine:
            stream = engine.submit(make("a", [1], max_tokens=30))
            await eventually(lambda: engine.status.state == "recovering")
            started = time.monotonic()
            engine.stop()
            assert time.monotonic() - started < 5 and engine.status.state == "stopped"
            with pytest.raises(EngineStopped):
                await tokens_of(stream)

    asyncio.run(main())


def test_a_client_that_never_reads_is_ended(monkeypatch, caplog):
    monkeypatch.setattr(module, "MAX_UNREAD_EVENTS", 50)
    monkeypatch.setattr(module, "SLOW_READER_S", 0.05)

    async def main():
        async with Served(SlowRunner()) as engine:
            slow = engine.submit(make("slow", [1], max_tokens=400), is_blocked=lambda: True)
            other = engine.submit(make("other", [1], max_tokens=80))
            task = asyncio.create_task(tokens_of(other))
            await eventually(lambda: slow.ended)
            with pytest.raises(GenerationError) as caught:
                await tokens_of(slow)
            assert caught.value.code == "slow_reader"
            assert len(await task) == 80
            await eventually(lambda: engine.stats().finished == {"abort": 1, "length": 1})
            assert len(slow._unread) == 0  # not even what came between its end and the abort

    asyncio.run(main())
    (record,) = [record for record in caplog.records if "too slowly" in record.getMessage()]
    assert "request slow " in record.getMessage()


@pytest.mark.parametrize("blocked", [False, True])
def test_a_loop_that_stands_still_ends_nobody(monkeypatch, caplog, blocked):
    """Whether or not its client was behind at that moment: as soon as the loop turns again, the reader reads."""
    monkeypatch.setattr(module, "MAX_UNREAD_EVENTS", 20)
    monkeypatch.setattr(module, "SLOW_READER_S", 0.05)

    async def main():
        async with Served(SlowRunner()) as engine:
            waits = [False]
            stream = engine.submit(make("a", [1], n=8, max_tokens=60), is_blocked=lambda: waits[0])
            count = 0
            async for event in stream:
                count += len(event.token_ids)
                if count % 100 == 0:
                    waits[0] = blocked
                    time.sleep(0.2)  # something else keeps the event loop
                    await asyncio.sleep(0)  # all news of that time is delivered at once
                    waits[0] = False
            assert count == 8 * 60
            assert engine.stats().finished == {"length": 8}

    asyncio.run(main())
    assert not [record for record in caplog.records if "too slowly" in record.getMessage()]


def test_a_reader_that_catches_up_in_time_is_not_ended(monkeypatch):
    monkeypatch.setattr(module, "MAX_UNREAD_EVENTS", 20)
    monkeypatch.setattr(module, "SLOW_READER_S", 0.2)

    async def main():
        async with Served(SlowRunner()) as engine:
            waits = [True]
            request = make("a", [1], max_tokens=200)
            stream = engine.submit(request, is_blocked=lambda: waits[0])
            await eventually(lambda: len(stream._unread) > 40)
            waits[0] = False
            assert await tokens_of(stream) == expected_tokens(request)

    asyncio.run(main())


def test_status_shows_progress_and_a_stalled_step():
    async def main():
        times = [0.0]
        runner = SlowRunner()
        engine = AsyncEngine(EngineConfig(), load=loader(runner), clock=lambda: times[0])
        assert not engine.status.ready and engine.status.state == "loading"
        engine.start(asyncio.get_running_loop())
        await engine.wait_ready()
        engine._engine._clock = engine._engine.telemetry._clock = lambda: times[0]
        engine._engine.progress_at = 0.0
        assert engine.status.ready and engine.status.last_step_age_s == 0
        times[0] = 1000.0
        assert engine.status.ready  # idle for long is fine
        runner.gate.clear()
        stream = engine.submit(make("a", [1]))
        await stream.accepted()
        assert engine.status.ready
        times[0] = 1029.0
        assert engine.status.ready
        times[0] = 1031.0
        assert engine.status.stalled and not engine.status.ready and engine.status.state == "ready"
        runner.gate.set()
        await tokens_of(stream)
        assert engine.status.ready
        engine.stop()

    asyncio.run(main())


def test_a_long_step_is_not_a_stall_when_steps_are_long():
    assert not EngineStatus("ready", last_step_age_s=60.0, step_p99_s=7.0).stalled
    assert EngineStatus("ready", last_step_age_s=60.0, step_p99_s=5.0).stalled


def test_loading_shows_progress_and_errors_as_they_are():
    async def main():
        seen = []

        def before(progress):
            progress.begin("weights", 200, "bytes")
            progress.advance(100)
            seen.append(engine.status)
            progress.end("done")
            progress.begin("programs", 12, "programs")
            progress.advance(9)
            seen.append(engine.status)
            raise ConfigError("the model does not fit")

        engine = AsyncEngine(EngineConfig(), load=loader(SlowRunner(), before=before))
        engine.start(asyncio.get_running_loop())
        with pytest.raises(ConfigError, match="does not fit"):
            await engine.wait_ready()
        assert [(status.state, status.detail) for status in seen] == [
            ("loading", "loading weights, 50 %"),
            ("compiling", "loading or compiling programs, 9/12"),
        ]
        assert engine.status.state == "failed" and engine.status.detail == "the model does not fit"
        with pytest.raises(EngineStopped):
            engine.submit(make("a", [1]))
        engine.stop()

    asyncio.run(main())


def test_stopping_ends_the_loading():
    async def main():
        reached = threading.Event()

        def before(progress):
            progress.begin("programs", 1000, "programs")
            for done in range(1000):
                time.sleep(0.01)
                reached.set()
                progress.advance(done)

        engine = AsyncEngine(EngineConfig(), load=loader(SlowRunner(), before=before))
        engine.start(asyncio.get_running_loop())
        await asyncio.to_thread(reached.wait)
        started = time.monotonic()
        engine.stop()
        assert time.monotonic() - started < 5
        assert engine.status.state == "stopped"
        with pytest.raises(EngineStopped):
            await engine.wait_ready()

    asyncio.run(main())


def test_the_invariants_are_checked_once_per_idle_spell(monkeypatch):
    monkeypatch.setattr(module, "_IDLE_CHECK_S", 0.02)

    async def main():
        async with Served(SlowRunner(), clean=False) as engine:
            checks = []
            engine._engine.check = lambda: checks.append(1)
            await tokens_of(engine.submit(make("a", [1])))
            await eventually(lambda: checks)
            await asyncio.sleep(0.1)
            assert len(checks) == 1
            await tokens_of(engine.submit(make("b", [1])))
            await eventually(lambda: len(checks) == 2)

    asyncio.run(main())


def test_two_hundred_random_disconnects_leave_nothing():
    async def main():
        async with Served(SlowRunner(step_s=0.0005), max_waiting=500) as engine:

            async def client(number):
                stream = engine.submit(make(f"r{number}", range(number % 40 + 1), max_tokens=30, n=1 + number % 3))
                try:
                    count = 0
                    async for _ in stream:
                        count += 1
                        if count > number % 17:
                            return
                finally:
                    stream.close()

            tasks = [asyncio.create_task(client(number)) for number in range(200)]
            for number, task in enumerate(tasks):
                if number % 5 == 0:
                    await asyncio.sleep(0.001)
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await eventually(lambda: not engine._engine.has_work)
            assert engine._num_open() == 0
            assert sum(engine.stats().finished.values()) == sum(1 + number % 3 for number in range(200))

    asyncio.run(main())
