"""What the scheduler promises, one promise a test. Every call is followed by every check of ``simulation.World``."""

from __future__ import annotations

import itertools
import time

import pytest
from fakes import golden_tokens
from scheduling.simulation import VOCAB, World, make_request, make_scheduler

from jaxpaged.errors import ConfigError, QueueFull, RequestError
from jaxpaged.scheduling.faults import MAX_FAULTS
from jaxpaged.scheduling.plan import StepResult
from jaxpaged.scheduling.request import FinishReason
from jaxpaged.scheduling.scheduler import Scheduler


def rows(plan) -> list[tuple[str, int]]:
    """The plan as (request, tokens) pairs."""
    return [(work.sequence.request.id, work.num_new_tokens) for work in plan.work]


def names(sequences) -> list[str]:
    return [sequence.request.id for sequence in sequences]


def finish_reasons(world: World) -> dict[str, FinishReason]:
    return {name: sample.end.finish_reason for (name, _), sample in world.samples.items()}


# ---------------------------------------------------------------------------------------------------------------- batching


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_every_sample_gets_the_models_tokens(depth):
    world = World(make_scheduler(), depth=depth)
    for i in range(5):
        world.add(make_request(f"r{i}", 5 + 9 * i, 12, seed=i, n=1 + i % 3))
    world.drain()
    for (_, index), sample in world.samples.items():
        assert sample.received == golden_tokens(sample.request, index, VOCAB)
    assert len(world.samples) == 9
    assert set(finish_reasons(world).values()) == {FinishReason.LENGTH}


def test_prefill_chunks_and_decodes_share_one_budget():
    world = World(make_scheduler(max_num_batched_tokens=8), depth=0)
    world.add(make_request("a", 5, 9))
    world.add(make_request("b", 20, 9))
    plans = [world.dispatch()]
    world.commit()
    world.add(make_request("c", 3, 9))
    for _ in range(3):
        plans.append(world.dispatch())
        world.commit()
    assert [rows(plan) for plan in plans] == [
        [("a", 5), ("b", 3)],
        [("a", 1), ("b", 7)],
        [("a", 1), ("b", 7)],
        [("a", 1), ("b", 3), ("c", 3)],
    ]
    assert [work.samples for plan in plans for work in plan.work] == [True, False, True, False, True, False, True, True, True]


def test_single_token_rows_come_first_and_sizes_are_compiled_ones():
    world = World(make_scheduler(max_num_batched_tokens=16, long_prefill_token_threshold=5), depth=0)
    world.add(make_request("long", 40, 2))
    world.add(make_request("short", 1, 9))
    world.dispatch()
    world.commit()
    plan = world.dispatch()
    assert rows(plan) == [("short", 1), ("long", 5)]
    assert (plan.num_tokens, plan.num_decode, plan.token_bucket, plan.slot_bucket) == (6, 1, 8, 4)


def test_a_decode_never_waits_behind_prompts():
    world = World(make_scheduler(max_num_batched_tokens=8, long_prefill_token_threshold=4), depth=0)
    world.add(make_request("a", 30, 2))
    world.add(make_request("b", 2, 9))
    world.add(make_request("c", 30, 2))
    for _ in range(4):
        plan = world.dispatch()
        world.commit()
        assert dict(rows(plan))["a"] == 4
    world.scheduler.max_chunk = 8  # as if an elder that had to wait came back and could use the whole budget
    plan = world.dispatch()
    assert rows(plan) == [("b", 1), ("c", 1), ("a", 6)]
    world.commit()
    world.drain()


def test_at_depth_one_the_token_is_fed_back_on_the_device():
    world = World(make_scheduler(), depth=1)
    world.add(make_request("a", 3, 4))
    first, second = world.dispatch(), world.dispatch()
    assert first.work[0].token_ids() == [0, 8, 18]
    assert second.work[0].token_ids() == [-1]
    assert (first.work[0].new_slot, second.work[0].new_slot) == (True, False)
    world.commit()
    assert second.work[0].token_ids() == world.samples["a", 0].golden[:1]
    world.drain()


def test_no_step_is_spent_beyond_max_tokens():
    world = World(make_scheduler(), depth=1)
    world.add(make_request("a", 3, 5))
    world.drain()
    assert world.num_steps == 5


def test_min_tokens_counts_pending_tokens():
    world = World(make_scheduler(), depth=1)
    world.add(make_request("a", 3, 5))
    plans = [world.dispatch(), world.dispatch()]
    assert [plan.work[0].num_output for plan in plans] == [0, 1]
    world.drain()


# -------------------------------------------------------------------------------------------------------------- admission


@pytest.mark.parametrize(("num_pages", "page_size", "max_model_len"), [*itertools.product((2, 3, 9), (1, 2, 4, 8), (5, 10_000))])
def test_what_can_never_fit_is_refused_and_what_fits_finishes(num_pages, page_size, max_model_len):
    bound = min((num_pages - 1) * page_size, max_model_len)
    scheduler = make_scheduler(num_pages=num_pages, page_size=page_size, max_model_len=max_model_len)
    assert scheduler.max_request_tokens == bound
    world = World(scheduler)
    for total in (bound - 1, bound, bound + 1):
        for prompt in {1, total // 2, total - 1}:
            if 0 < prompt < total:
                taken = world.add(make_request(f"{total}/{prompt}", prompt, total - prompt))
                assert taken == (total <= bound)
    world.drain()


def test_a_refusal_says_how_much_is_possible():
    with pytest.raises(RequestError, match=r"at most 16 tokens.*asked for 17 \(10 in the prompt, 7") as error:
        make_scheduler(num_pages=5, page_size=4).add(make_request("a", 10, 7))
    assert error.value.code == "context_length_exceeded"


def test_a_full_queue_refuses_and_estimates_when_to_come_back():
    now = [100.0]
    scheduler = make_scheduler(max_num_seqs=2, max_waiting=1, clock=lambda: now[0])
    world = World(scheduler, depth=0)
    for name in "abc":
        assert world.add(make_request(name, 3, 3))
    assert not world.add(make_request("d", 3, 3))
    for _ in range(3):
        now[0] += 10
        world.step()
    assert world.add(make_request("d", 3, 3))  # a and b finished at 130 s
    assert world.add(make_request("e", 3, 3))
    now[0] += 30
    with pytest.raises(QueueFull) as error:
        scheduler.add(make_request("f", 3, 3))
    assert error.value.retry_after_s == 15
    world.drain()


def test_hours_of_idleness_do_not_make_a_place_free_later():
    now = [0.0]
    scheduler = make_scheduler(max_num_seqs=2, max_waiting=1, clock=lambda: now[0])
    world = World(scheduler, depth=0)
    for name in "ab":
        world.add(make_request(name, 3, 1))
        world.drain()
        now[0] += 3600
    for name in "cde":
        world.add(make_request(name, 3, 9))
    assert scheduler.retry_after_s() == 1
    now[0] += 7
    assert scheduler.retry_after_s() == 7  # nobody has finished so far
    scheduler.abort("d")
    now[0] += 2
    assert scheduler.retry_after_s() == 2
    now[0] += 3600
    assert scheduler.retry_after_s() == 60


def test_a_caller_with_a_bug_is_told():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3, 3))
    for wrong in (make_request("a", 3, 3), make_request("b", 0, 3)):
        with pytest.raises(ValueError, match=wrong.id):
            scheduler.add(wrong)
    assert scheduler.num_waiting == 1
    with pytest.raises(ValueError, match="request c: max_tokens"):
        make_request("c", 3, None)


def test_impossible_options_are_refused():
    with pytest.raises(ConfigError, match="max_num_seqs"):
        make_scheduler(max_num_seqs=8, max_num_batched_tokens=7)
    with pytest.raises(ConfigError, match="largest token bucket"):
        Scheduler(num_pages=9, page_size=4, max_num_seqs=2, max_num_batched_tokens=8, max_model_len=99, token_buckets=(1, 4))


def test_the_first_in_line_blocks_those_behind_it():
    world = World(make_scheduler(num_pages=9, page_size=4), depth=0)
    world.add(make_request("a", 20, 6))
    world.step()
    world.add(make_request("large", 20, 4))
    world.add(make_request("small", 1, 1))
    while "large" in names(world.scheduler.waiting):
        assert "small" in names(world.scheduler.waiting)
        world.step()
    world.drain()


# ------------------------------------------------------------------------------------------------------------- preemption


@pytest.mark.parametrize("depth", [0, 1])
def test_the_youngest_is_preempted_and_first_to_come_back(depth):
    world = World(make_scheduler(num_pages=9, page_size=2), depth=depth)
    for name in "abc":
        world.add(make_request(name, 3, 9))
    world.add(make_request("d", 3, 9))
    while not world.scheduler.num_preemptions:
        assert names(world.scheduler.waiting)[-1:] == ["d"] or not world.scheduler.waiting
        world.step()
    assert names(world.scheduler.waiting)[-1] == "d"
    assert names([*world.scheduler.running, *world.scheduler.waiting]) == ["a", "b", "c", "d"]
    world.drain()


def test_a_preempted_sequence_keeps_the_token_in_flight():
    world = World(make_scheduler(num_pages=7, page_size=2), depth=1)
    for name in "ab":
        world.add(make_request(name, 3, 9))
    while not world.scheduler.num_preemptions:
        world.step()
    victim = world.scheduler.waiting[0]
    assert victim.request.id == "b"
    known = victim.num_output
    if victim.num_pending:
        world.commit()
        assert victim.num_output == known + 1
    world.drain()


def test_deferred_pages_are_waited_for_and_nobody_else_is_preempted():
    """Pages of a preempted sequence come back when its step is complete; until then the need is covered (vllm-ascend #16315)."""
    scheduler = make_scheduler(num_pages=9, page_size=2, max_num_seqs=4)
    scheduler.headroom = 0
    world = World(scheduler, depth=1)
    for name in "abcd":
        world.add(make_request(name, 3, 12))
    for _ in range(100):
        free, deferred, before = scheduler.pages.num_free, scheduler.pages.num_deferred, scheduler.num_preemptions
        world.dispatch()
        if scheduler.num_preemptions > before:
            break
        if len(world.handles) > 1:
            world.commit()
    assert (free, deferred) == (0, 0)
    assert scheduler.num_preemptions == before + 1  # a needs one page; c's or d's come back with the step in flight
    assert scheduler.pages.num_deferred > 0
    while scheduler.pages.num_deferred:
        assert scheduler.num_preemptions == before + 1
        world.commit()
    world.drain()


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_later_arrivals_delay_nobody_beyond_the_bound(depth):
    """``World`` holds every sequence to the fairness bound; here, with a flood of young ones behind an old one and few pages."""
    world = World(make_scheduler(num_pages=9, page_size=4, max_num_seqs=4, max_num_batched_tokens=8), depth=depth)
    world.add(make_request("old", 12, 20))
    for i in range(60):
        world.add(make_request(f"young{i}", 1 + i % 9, 1 + i % 23, seed=i))
        world.step()
        world.step()
    world.drain()
    old = next(iter(world.samples.values()))
    assert old.received == old.golden


def test_the_oldest_is_never_preempted():
    world = World(make_scheduler(num_pages=9, page_size=2), depth=1)
    for i in range(12):
        world.add(make_request(f"r{i}", 3, 12, seed=i))
    oldest: set[int] = set()
    while world.scheduler.has_work:
        if world.scheduler.running:
            oldest.add(world.scheduler.running[0].order)
        before = {s.order: s.num_preemptions for s in world.scheduler.live_sequences()}
        head = min(before)
        world.step()
        after = {s.order: s.num_preemptions for s in world.scheduler.live_sequences()}
        assert after.get(head, before[head]) == before[head]
    assert world.scheduler.num_preemptions > 0
    world.drain()


# ------------------------------------------------------------------------------------------------------------ the step fence


def test_pages_and_slot_of_a_finished_sequence_stay_until_its_last_step_is_complete():
    scheduler = make_scheduler(num_pages=9, page_size=4, max_num_seqs=1)
    world = World(scheduler, depth=1)
    golden = golden_tokens(make_request("a", 5, 9), 0, VOCAB)
    world.add(make_request("a", 5, 9, eos=(golden[0],)))
    world.add(make_request("b", 5, 9, seed=1))
    world.dispatch()
    world.dispatch()
    world.commit()  # a ends here, and is in the next step already
    assert scheduler.num_running == 0
    assert scheduler.pages.num_deferred == 2
    assert scheduler.slots.num_deferred == 1
    assert world.dispatch() is None
    world.commit()
    assert scheduler.num_pages_in_use == 0
    assert rows(world.dispatch()) == [("b", 5)]
    world.drain()


def test_the_host_costs_little_per_step():
    """schedule and commit of 64 decodes: 0.2 ms where this was written; the best of many steps, so that a busy machine does not matter."""
    scheduler = make_scheduler(num_pages=4096, page_size=16, max_num_seqs=64, max_num_batched_tokens=512)
    for i in range(80):
        scheduler.add(make_request(f"r{i}", 4, 200, eos=(1, 2)))
    best = 1.0
    for _ in range(120):
        started = time.perf_counter()
        plan = scheduler.schedule()
        scheduler.commit(plan, StepResult([0] * len(plan.work)))
        best = min(best, time.perf_counter() - started) if plan.num_tokens == 64 else best
    assert best < 1e-3


def test_usage_is_reported():
    scheduler = make_scheduler(num_pages=9, page_size=4)
    world = World(scheduler, depth=1)
    world.add(make_request("a", 8, 9))
    world.dispatch()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_in_flight, scheduler.has_work) == (1, 0, 1, True)
    assert (scheduler.num_pages_in_use, scheduler.kv_usage) == (2, 0.25)
    world.drain()
    assert (scheduler.kv_usage, scheduler.has_work) == (0.0, False)


# --------------------------------------------------------------------------------------------------------------- how it ends


def test_stop_tokens_end_a_sequence_after_min_tokens():
    golden = golden_tokens(make_request("x", 5, 20), 0, VOCAB)
    token = next(token for token in golden if golden.count(token) > 1)
    first = golden.index(token)
    second = golden.index(token, first + 1)
    world = World(make_scheduler(max_num_seqs=6), depth=1)
    world.add(make_request("eos", 5, 20, eos=(token,)))
    world.add(make_request("own", 5, 20, stop_token_ids=[token]))
    world.add(make_request("ignored", 5, 20, eos=(token,), ignore_eos=True))
    world.add(make_request("exactly", 5, 20, eos=(token,), min_tokens=first))
    world.add(make_request("later", 5, 20, eos=(token,), min_tokens=first + 1))
    world.add(make_request("both", 5, second + 1, stop_token_ids=[token], min_tokens=first + 1))
    world.drain()
    ends = {name: (len(sample.received), sample.end.finish_reason, sample.end.stop_reason) for (name, _), sample in world.samples.items()}
    assert ends == {
        "eos": (first + 1, FinishReason.STOP, None),
        "own": (first + 1, FinishReason.STOP, token),
        "ignored": (20, FinishReason.LENGTH, None),
        "exactly": (first + 1, FinishReason.STOP, None),
        "later": (second + 1, FinishReason.STOP, None),
        "both": (second + 1, FinishReason.STOP, token),
    }


def test_a_nan_ends_its_own_sequence_alone():
    world = World(make_scheduler(), invalid=lambda sequence, num_output: sequence.request.id == "bad" and num_output == 3)
    for name in ("good", "bad", "fine"):
        world.add(make_request(name, 5, 9))
    world.drain()
    end = world.samples["bad", 0].end
    assert (end.finish_reason, end.error_code) == (FinishReason.ERROR, "numerical_error")
    assert end.token_ids == ()
    assert len(world.samples["bad", 0].received) == 3
    assert finish_reasons(world)["good"] is finish_reasons(world)["fine"] is FinishReason.LENGTH


def test_logprobs_ride_along_and_prompt_logprobs_come_once():
    """Also when the prompt is computed twice, in chunks of another size (``World`` checks content and order)."""
    scheduler = make_scheduler(num_pages=9, page_size=2, max_num_batched_tokens=5)
    world = World(scheduler, depth=1)
    for name in "abc":
        world.add(make_request(name, 6, 9, logprobs=1, prompt_logprobs=1))
    world.drain()
    assert scheduler.num_preemptions > 0
    assert [sample.prompt_logprobs for sample in world.samples.values()] == [5, 5, 5]


@pytest.mark.parametrize("depth", [0, 1])
def test_abort_at_every_moment(depth):
    """Whatever the moment, everything of it is given back, its neighbours' tokens are right, and a second abort does nothing."""
    for moment in range(45):
        world = World(make_scheduler(num_pages=9, page_size=2, max_num_batched_tokens=6), depth=depth)
        for i in range(4):
            world.add(make_request(f"r{i}", 3 + i, 8 - i, seed=i, n=1 + i % 2))
        for call in range(moment):
            if call % 2 == 0:
                world.dispatch()
            elif len(world.handles) > depth:
                world.commit()
        target = f"r{moment % 4}"
        world.abort(target)
        assert world.scheduler.abort(target) == []
        world.drain()


def test_abort_of_an_unknown_request_does_nothing():
    assert make_scheduler().abort("nobody") == []


def test_abort_ends_all_samples():
    world = World(make_scheduler())
    world.add(make_request("a", 5, 9, n=3))
    world.step()
    world.abort("a")
    assert finish_reasons(world) == {"a": FinishReason.ABORT}
    world.drain()


def test_one_sample_can_be_aborted():
    world = World(make_scheduler())
    world.add(make_request("a", 5, 9, n=3))
    world.step()
    world.abort("a", 1)
    world.drain()
    assert [world.samples["a", i].end.finish_reason for i in range(3)] == [FinishReason.LENGTH, FinishReason.ABORT, FinishReason.LENGTH]


# -------------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("times", [1, 3])
def test_the_kth_step_fails(depth, times):
    """Streams go on without a lost or repeated token, whichever step fails, and if its successors fail too."""
    for k in range(1, 30):
        scheduler = make_scheduler(num_pages=17, page_size=2, max_num_batched_tokens=9)
        failing = set(range(k, k + times))
        world = World(scheduler, depth=depth, fails=lambda plan, failing=failing: plan.step in failing)
        for i in range(4):
            world.add(make_request(f"r{i}", 3 + i, 8, seed=i, prompt_logprobs=1))
        world.drain()
        assert set(finish_reasons(world).values()) == {FinishReason.LENGTH}


def test_after_a_failure_no_step_has_two_suspects():
    scheduler = make_scheduler()
    world = World(scheduler, depth=1, fails=lambda plan: plan.step == 3)
    for i in range(4):
        world.add(make_request(f"r{i}", 5, 8, seed=i))
    while not world.num_faults:
        world.step()
    assert [sequence.suspect for sequence in scheduler.waiting] == [True] * 4
    assert scheduler.num_pages_in_use == 0
    world.add(make_request("newcomer", 5, 8))
    while any(sequence.suspect for sequence in scheduler.live_sequences()):
        plan = world.dispatch()
        if plan:
            assert sum(work.sequence.suspect for work in plan.work) <= 1
        if len(world.handles) > 1:
            world.commit()
    assert world.num_faults == 1
    world.drain()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("when", [0, 1, 5])
def test_what_always_fails_ends_alone(depth, when):
    """A request whose every step from its ``when``-th token on fails ends with an error; all others get all their tokens."""

    def fails(plan):
        return any(work.sequence.request.id == "bad" and work.samples and work.num_output >= when for work in plan.work)

    world = World(make_scheduler(), depth=depth, fails=fails)
    for name in ("a", "bad", "b"):
        world.add(make_request(name, 5, 12))
    for i in range(40):  # newcomers keep arriving, also into the steps that fail
        world.add(make_request(f"n{i}", 3, 5, seed=i))
        world.step()
    world.drain()
    ends = finish_reasons(world)
    end = world.samples["bad", 0].end
    assert (end.finish_reason, end.error_code) == (FinishReason.ERROR, "internal_error")
    assert {reason for name, reason in ends.items() if name != "bad"} == {FinishReason.LENGTH}


def test_two_that_always_fail_end_and_nobody_else():
    bad = {"bad1", "bad2"}

    def fails(plan):
        return any(work.sequence.request.id in bad and work.num_output > 1 for work in plan.work)

    world = World(make_scheduler(max_num_seqs=6), fails=fails)
    for name in ("a", "bad1", "b", "bad2", "c"):
        world.add(make_request(name, 5, 12))
    world.drain()
    assert {name for name, reason in finish_reasons(world).items() if reason is FinishReason.ERROR} == bad


def test_a_device_that_always_fails_ends_everything():
    world = World(make_scheduler(), fails=lambda plan: True)
    for name in "abc":
        world.add(make_request(name, 5, 12))
    world.drain()
    assert set(finish_reasons(world).values()) == {FinishReason.ERROR}
    assert world.num_faults == 1 + 3 * MAX_FAULTS


def test_an_unknown_step_failed():
    scheduler = make_scheduler()
    world = World(scheduler, depth=1)
    world.add(make_request("a", 5, 9))
    world.add(make_request("b", 5, 9))
    world.dispatch()
    world.dispatch()
    assert scheduler.recover(None) == []
    world.handles.clear()
    world.device.reset()
    world.num_faults += 1
    assert [sequence.suspect for sequence in scheduler.waiting] == [True, True]
    world.drain()
    assert scheduler.recover(None) == []  # with nothing in flight nobody is suspected


def test_results_that_come_late_twice_or_out_of_order_change_nothing():
    scheduler = make_scheduler()
    world = World(scheduler, depth=1)
    world.add(make_request("a", 5, 9))
    first, second = world.dispatch(), world.dispatch()
    assert scheduler.commit(second, StepResult([7])) == []
    world.commit()
    assert scheduler.commit(first, StepResult([7])) == []
    assert scheduler.num_ignored == 3  # World tries each result a second time, too
    world.drain()


def test_a_result_of_another_size_is_refused():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5, 9))
    plan = scheduler.schedule()
    with pytest.raises(ValueError, match="has 1 rows; its result has 2"):
        scheduler.commit(plan, StepResult([1, 2]))
    scheduler.check()
    assert scheduler.num_in_flight == 1
