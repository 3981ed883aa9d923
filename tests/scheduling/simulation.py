"""Whole-scheduler simulation: random worlds, an exact oracle, and every check after every call.

``World`` drives a scheduler as the engine does, with ``fakes.FakeRunner`` as the device (``engine_simulation`` has worlds that drive the
engine itself). After each call it verifies

* the invariants (``Scheduler.check``), by identity of pages and slots;
* the **golden** tokens: an integer hash stands for the model, so any wrong cell, position, slot, order or seed changes them;
* the **canary**: each cell that a running sequence has computed and can still see holds what its own tokens make of it, and so does each
  cell that one has in host memory; free pages and places are poisoned;
* the **isolation**: what stands before the first token is another number for each tenant, so a page of somebody else's shows; and no
  step writes to a page that has another reader, or a key in the prefix cache;
* **liveness**: with nothing in flight and work left there is a plan; and the fairness bound of ``scheduler.py``, step by step;
* the **ledger**: each sequence gets exactly one last event, and the end that is due to it; late results change nothing;
* at the end, the **drain**: no page, slot or sequence is left.

``simulate(seed)`` makes a world from a seed, with few pages, with samples and beams that fork, with and without prefix cache, host memory
and a sliding window, and with aborts, NaN rows, failing steps and requests on which every step fails. To run more than the test does::

    python tests/scheduling/simulation.py --runs 100000 --start 1000000
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fakes import POISON, DeviceFault, FakeHandle, FakeRunner, Violation, cells_of, first_cell, golden_beams, golden_tokens

from jaxpaged.engine.engine import Engine
from jaxpaged.errors import QueueFull, RequestError
from jaxpaged.scheduling.beams import Hypothesis
from jaxpaged.scheduling.buckets import token_buckets
from jaxpaged.scheduling.pages import NULL_PAGE
from jaxpaged.scheduling.plan import StepPlan, TokenEvent
from jaxpaged.scheduling.request import FinishReason, Request, SamplingParams, Sequence, Status
from jaxpaged.scheduling.scheduler import Scheduler

VOCAB = 50
MAX_CALLS = 20_000


@dataclasses.dataclass
class Sample:
    """What the world knows of one sequence, beside the scheduler."""

    request: Request
    index: int
    golden: list[int]
    cells: list[int]
    deadline: int
    beam: Hypothesis | None = None
    received: list[int] = dataclasses.field(default_factory=list)
    end: TokenEvent | None = None
    prompt_logprobs: int = 0
    aborted: bool = False
    stopped: bool = False
    failed_alone: int = 0
    invalid: bool = False


def make_scheduler(
    *,
    num_pages: int = 64,
    page_size: int = 4,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    buckets=None,
    **options,
) -> Scheduler:
    """Makes a scheduler with small defaults."""
    return Scheduler(
        num_pages=num_pages,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=options.pop("max_model_len", 10_000),
        token_buckets=token_buckets(max_num_batched_tokens, max_num_seqs, buckets),
        **options,
    )


def make_request(
    name: str,
    prompt_length: int,
    max_tokens: int,
    *,
    seed: int = 0,
    topic: int | None = None,
    eos: tuple[int, ...] = (),
    tenant: str = "",
    **params,
) -> Request:
    """Makes a request whose prompt follows from its topic, or its seed; prompts of one topic begin alike."""
    base = seed if topic is None else topic
    prompt = tuple((31 * base + 7 * i + i * i) % VOCAB for i in range(prompt_length))
    params = SamplingParams(max_tokens=max_tokens, **params)
    return Request(id=name, prompt=prompt, params=params, eos_token_ids=eos, seed=seed, tenant=tenant)


class World:
    """A scheduler, a fake device, and everything that must be true of the two."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        depth: int = 1,
        fails: Callable[[StepPlan], bool] = lambda plan: False,
        invalid: Callable[[Sequence, int], bool] = lambda sequence, num_output: False,
        max_calls: int = MAX_CALLS,
    ) -> None:
        self.scheduler = scheduler
        self.target: Scheduler | Engine = scheduler
        self.max_calls = max_calls
        self.depth = depth
        self.by_prompt_length = scheduler.memory._by_prompt_length
        self.device = FakeRunner(
            scheduler.pages.num_pages,
            scheduler.page_size,
            vocab_size=VOCAB,
            window=scheduler.memory.sliding_window,
            by_prompt_length=self.by_prompt_length,
            fails=fails,
            invalid=invalid,
        )
        self.handles: list[tuple[StepPlan, FakeHandle]] = []
        self.samples: dict[tuple[str, int], Sample] = {}
        self.num_faults = 0
        self.num_steps = 0
        self.num_restored = 0

    # ------------------------------------------------------------------------------------------------------------ actions

    def add(self, request: Request) -> bool:
        """Adds a request; returns whether it was taken. Refusals must be exactly those that are due."""
        scheduler = self.scheduler
        ahead = sum(self._cost(self.samples[s.request.id, s.index].request) for s in scheduler.live_sequences())
        is_full = scheduler.num_running + scheduler.num_waiting >= scheduler.max_num_seqs + scheduler.max_waiting
        never_fits = self._never_fits(request)
        too_many = request.params.num_sequences > scheduler.max_num_seqs
        try:
            self.target.add(request)
        except RequestError as error:
            require(too_many or (never_fits and error.code == "context_length_exceeded"), "a request that fits was refused")
            return False
        except QueueFull as error:
            require(is_full and 1 <= error.retry_after_s <= 60, "a queue that is not full refused a request")
            return False
        require(not never_fits and not too_many, "a request that can never fit was taken")
        require(not is_full, "a full queue took a request")
        window, first = self.device.window, first_cell(request, self.by_prompt_length)
        beams = golden_beams(request, VOCAB, first=first, window=window) if request.params.use_beam_search else ()
        for index in range(request.params.num_sequences):
            ahead += self._cost(request)
            beam = beams[index] if index < len(beams) else None
            if request.params.use_beam_search:
                golden = list(beam.tokens) if beam else []
            else:
                golden = golden_tokens(request, index, VOCAB, first=first, window=window)
            cells = cells_of(first, [*request.prompt, *golden])
            deadline = scheduler.step + (1 + self.depth) * ahead
            self.samples[request.id, index] = Sample(request, index, golden, cells, deadline, beam)
        self.verify()
        return True

    def _never_fits(self, request: Request) -> bool:
        """Whether a request can never fit: a bound of its own, without a window; with one, at least what fits without fits with it."""
        scheduler, size = self.scheduler, self.scheduler.page_size
        num_prompt, count = len(request.prompt), request.params.num_sequences
        total = num_prompt + request.max_tokens
        shared = (num_prompt - 1) // size
        pages = shared + count * (-(-total // size) - shared)
        never = total > scheduler.max_model_len or pages > scheduler.pages.num_pages - 1
        if self.device.window is None or not never:
            return never
        return total > scheduler.max_model_len or scheduler.memory.worst_case(request) > scheduler.pages.num_pages - 1

    def abort(self, request_id: str, index: int | None = None, **options) -> None:
        """Aborts what is left of a request, or one of its samples; the options are the target's."""
        wanted = [s for s in self.samples.values() if s.request.id == request_id]
        if not any(s.request.params.use_beam_search and s.end is None and s.index == index for s in wanted):
            wanted = [s for s in wanted if index in (None, s.index)]
        for sample in wanted:
            if sample.end is None:
                sample.aborted, sample.stopped = True, options.get("reason") is FinishReason.STOP
        self.receive(self.target.abort(request_id, index, **options))
        require(all(sample.end is not None for sample in wanted), "an aborted sequence lives on")
        self.verify()

    def dispatch(self) -> StepPlan | None:
        """Plans and dispatches a step."""
        before = self._snapshot()
        plan = self.scheduler.schedule()
        self._verify_choice(plan, *before)
        if plan is None:
            require(bool(self.handles) or not self.scheduler.has_work, "nothing is in flight, work is left, and no step is planned")
        else:
            require(not self.handles or plan.step > self.handles[-1][0].step, "steps are numbered out of order")
            require(plan.token_bucket in self.scheduler.token_buckets, "a step has a size that is not compiled")
            self._verify_writes(plan)
            self.handles.append((plan, self.device.dispatch(plan)))
            self.num_steps += 1
            self.num_restored += sum(not transfer.to_host for transfer in plan.transfers)
        self.verify()
        return plan

    def commit(self) -> None:
        """Reads the oldest step and commits or recovers."""
        plan, handle = self.handles.pop(0)
        alive = [work.sequence for work in plan.work if work.sequence.status is not Status.FINISHED]
        spoilt: list[Sequence] = []
        for work in plan.work:
            if self.device.invalid(work.sequence, work.num_output) and work.samples:
                for sequence in work.sequence.group.sequences if work.beam_score is not None else (work.sequence,):
                    self.sample(sequence).invalid = True
                spoilt += [work.sequence] if work.sequence.status is Status.RUNNING else []
        spoilt_pages = {page_id for sequence in spoilt for page_id in sequence.page_ids}
        try:
            result = handle.read()
        except DeviceFault:
            self.num_faults += 1
            if len({sequence.group for sequence in alive}) == 1:
                for sequence in alive[0].group.sequences:
                    self.sample(sequence).failed_alone += 1
            events = self.scheduler.recover(plan)
            self.device.reset()
            self.handles.clear()
            self.receive(events)
            require(self.scheduler.commit(plan, handle.result) == [], "the result of a failed step was applied")
        else:
            self.receive(self.scheduler.commit(plan, result))
            require(not any(map(self.scheduler.pages.is_kept, spoilt_pages)), "a page of a sequence without numbers can still be found")
            require(self.scheduler.commit(plan, result) == [], "a result was applied twice")
        self.verify()

    def step(self) -> None:
        """One turn of the engine's loop."""
        plan = self.dispatch()
        if len(self.handles) > self.depth or (plan is None and self.handles):
            self.commit()

    def drain(self) -> None:
        """Runs until nothing is left, and verifies that nothing is left."""
        for _ in range(self.max_calls):
            if not self.target.has_work:
                break
            self.step()
        require(not self.target.has_work, "the work does not end")
        require(self.scheduler.num_pages_in_use == 0 and self.scheduler.slots.num_used == 0, "pages or slots are left")
        host = self.scheduler.memory.host
        require(host is None or host.pages.num_used == 0, "places in host memory are left")
        for sample in self.samples.values():
            require(sample.end is not None, "a sequence got no last event")
            self._verify_end(sample)

    # ------------------------------------------------------------------------------------------------------------- checks

    def receive(self, events: list[TokenEvent]) -> None:
        """Compares events with the oracle, token by token."""
        for event in events:
            sample = self.samples[event.request_id, event.index]
            require(sample.end is None, "an event came after the last one")
            require(not event.token_ids or not sample.aborted, "an aborted sequence got a token")
            sample.received += event.token_ids
            for entry in event.prompt_logprobs:
                sample.prompt_logprobs += 1
                expected = (sample.request.prompt[sample.prompt_logprobs], -float(sample.prompt_logprobs))
                require((entry.token_id, entry.logprob) == expected, "the prompt's log-probabilities are out of order")
            if sample.request.params.use_beam_search:
                require(event.finish_reason is not None, "a beam was told before the search was over")
            if event.token_ids and not sample.request.params.use_beam_search:
                expected = (
                    () if sample.request.params.logprobs is None else (-float(len(sample.request.prompt) + len(sample.received) - 1),)
                )
                require(tuple(entry.logprob for entry in event.logprobs) == expected, "a token has another row's log-probability")
            require(sample.received == sample.golden[: len(sample.received)], "a token differs from the oracle's")
            if event.finish_reason is not None:
                sample.end = event
                clean = not self.num_faults
                require(not clean or self.scheduler.step <= sample.deadline, "a sequence ended after its fairness bound")

    def verify(self) -> None:
        """Verifies invariants and canary, then poisons what nobody owns."""
        scheduler = self.scheduler
        scheduler.check()
        cells, size = self.device.cells, scheduler.page_size
        leaving = [transfer for transfer in scheduler.memory._transfers if transfer.to_host]  # with the next plan
        returning = [transfer for transfer in scheduler.memory._transfers if not transfer.to_host]
        coming, on_the_way = {transfer.page_id for transfer in returning}, {transfer.host_id for transfer in leaving}
        for sequence in scheduler.live_sequences():
            where, table = (self.device.host, sequence.host_ids) if sequence.host_ids else (cells, sequence.page_ids)
            expected = self._expected_cells(sequence)
            for i, place in enumerate(table):
                count = min(size, min(sequence.num_computed, len(expected)) - i * size)  # a step ahead may run past the end
                if count <= 0:
                    break
                if place != NULL_PAGE and place not in (on_the_way if sequence.host_ids else coming):
                    require(where[place][:count] == expected[i * size : i * size + count], "a cell does not hold what its sequence wrote")
        if not self.num_faults:
            late = (sequence for sequence in scheduler.live_sequences() if scheduler.step > self.sample(sequence).deadline)
            require(next(late, None) is None, "a sequence runs beyond its fairness bound")
        for page_id in set(scheduler.pages._free) - {transfer.page_id for transfer in leaving}:
            cells[page_id] = [POISON] * size
        host = scheduler.memory.host
        for place in self.device.host.keys() - {transfer.host_id for transfer in returning}:
            if host.pages.reference_count(place) == 0 and not host.pages.is_kept(place):
                del self.device.host[place]

    def _expected_cells(self, sequence: Sequence) -> list[int]:
        if sequence.group.beams is None:
            return self.sample(sequence).cells
        return _cells_of(first_cell(sequence.request, self.by_prompt_length), tuple(sequence.tokens))

    def _verify_writes(self, plan: StepPlan) -> None:
        """Verifies that a step writes only pages that nobody else reads and that nobody can find."""
        pages, size = self.scheduler.pages, self.scheduler.page_size
        written = [page for work in plan.work for page in work.sequence.page_ids[work.start // size : -(-work.end // size)]]
        require(len(written) == len(set(written)), "two rows write to one page")
        for work in plan.work:
            for at in range(work.start // size, -(-work.end // size)):
                page_id = work.sequence.page_ids[at]
                require(not pages.is_kept(page_id), "a page that others can find is written")
                readers = [other for other in self.scheduler.running if page_id in other.page_ids and other is not work.sequence]
                # Forks of this very step that found no room for their copy yet read the prompt's cells only.
                safe = all(other.num_computed <= min(other.num_prompt, work.start) for other in readers)
                require(safe, "a page that others read is written")

    def _snapshot(self) -> tuple[int, list[tuple[Sequence, int]]]:
        pages = self.scheduler.pages
        return pages.num_free + pages.num_deferred, [(sequence, len(sequence.page_ids)) for sequence in self.scheduler.running]

    def _verify_choice(self, plan: StepPlan | None, available: int, running: list[tuple[Sequence, int]]) -> None:
        """Verifies that no decode was passed over that needs no page, and nobody preempted whose pages were not needed."""
        scheduler = self.scheduler
        planned = {work.sequence for work in plan.work} if plan else set()
        forking = any(sequence.group.beams is not None or sequence.request.params.n > 1 for sequence, _ in running)
        if forking or scheduler.memory.enable_prefix_caching:
            return  # who shares what decides then; the invariants and the fairness bound are verified all the same
        if scheduler.memory.sliding_window is not None:
            return
        trial = any(sequence.group.num_faults for sequence, _ in running) or any(sequence.group.num_faults for sequence in planned)
        wanted = 0
        for sequence, had in running:
            if sequence in planned:
                wanted += len(sequence.page_ids) - had
            elif sequence.status is Status.RUNNING and sequence.num_total - sequence.num_prompt < sequence.request.max_tokens:
                left = sequence.num_total - sequence.num_computed
                has_room = left == 1 and sequence.num_computed < len(sequence.page_ids) * scheduler.page_size
                require(not has_room or sequence.suspect or trial, "a decode that needs no page was passed over")
                count = min(left, scheduler.max_chunk, scheduler.max_num_batched_tokens)
                wanted += -(-(sequence.num_computed + count) // scheduler.page_size) - had
        victims = [had for sequence, had in running if sequence.status is Status.WAITING]
        # The oldest of the victims was the last to go: without it the pages must not have sufficed.
        require(not victims or wanted > available + sum(victims[1:]), "a sequence was preempted although pages would have come back")

    def sample(self, sequence: Sequence) -> Sample:
        """Returns the world's record of a sequence."""
        return self.samples[sequence.request.id, sequence.index]

    def _cost(self, request: Request) -> int:
        scheduler = self.scheduler
        chunk = min(scheduler.max_num_batched_tokens - scheduler.max_num_seqs + 1, scheduler.max_chunk)
        return -(-(len(request.prompt) + request.max_tokens) // chunk) + request.max_tokens

    def _verify_end(self, sample: Sample) -> None:
        end = sample.end
        assert end is not None
        match end.finish_reason:
            case FinishReason.STOP if sample.stopped:  # by a stop string, as the target was told
                due = not end.token_ids
            case FinishReason.STOP:
                due = sample.received == sample.golden and sample.golden[-1] in sample.request.stop_token_ids
                due = due and (end.stop_reason is not None) == (sample.golden[-1] in sample.request.params.stop_token_ids)
            case FinishReason.LENGTH:
                due = len(sample.received) == sample.request.max_tokens
            case FinishReason.ABORT:
                due = sample.aborted and not sample.stopped
            case FinishReason.ERROR:
                due = sample.invalid if end.error_code == "numerical_error" else sample.failed_alone > 0
            case _:
                due = False
        if sample.beam and not sample.aborted and end.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            due = end.finish_reason is sample.beam.finish_reason and end.cumulative_logprob == sample.beam.cumulative_logprob
            due &= sample.received == sample.golden
        elif sample.request.params.use_beam_search and not sample.beam and end.finish_reason is FinishReason.LENGTH:
            due = not sample.received
        if sample.received and sample.request.params.prompt_logprobs is not None:
            due &= sample.prompt_logprobs == len(sample.request.prompt) - 1
        require(due, f"a sequence ended by {end.finish_reason}, which was not due")


_cells_of = functools.lru_cache(4096)(cells_of)


def require(holds: bool, rule: str) -> None:
    """Raises Violation unless a rule holds."""
    if not holds:
        raise Violation(rule)


# ------------------------------------------------------------------------------------------------------------- random worlds


@dataclasses.dataclass
class Outcome:
    """Figures of one run."""

    steps: int
    finished: int
    preemptions: int
    faults: int
    aborted: int
    swaps: int
    copies: int
    hits: int
    restored: int


def random_scheduler(rng: random.Random, **options) -> Scheduler:
    """Makes a scheduler with few pages; what is not given is drawn."""
    max_num_seqs = rng.choice((1, 2, 3, 5, 8))
    max_num_seqs = options.get("max_num_seqs", max_num_seqs)
    budget = max_num_seqs + rng.choice((0, 1, 4, 11, 40))
    num_pages, page_size = rng.choice((3, 5, 7, 10, 10, 15, 15, 30)), rng.choice((1, 2, 3, 4, 8))
    num_pages, page_size = options.get("num_pages", num_pages), options.get("page_size", page_size)
    sliding_window = rng.choice((None, None, None, None, 2, 3, 6))  # a cell of the fake follows from the one before
    sliding_window = options.get("sliding_window", sliding_window)
    longest = 10_000 if sliding_window is None else min(150, 2 * num_pages * page_size)  # a window lets in texts longer than the pool
    drawn = {
        "num_pages": num_pages,
        "page_size": page_size,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": budget,
        "max_model_len": rng.choice((longest, longest, 20)),
        "buckets": rng.choice((None, None, (budget,), {1, (budget + 1) // 2, budget})),
        "long_prefill_token_threshold": rng.choice((0, 0, 1, 2, 5)),
        "max_waiting": rng.choice((1024, 1024, 3)),
        "enable_prefix_caching": rng.random() < 0.6,
        "num_host_pages": (num_host_pages := rng.choice((0, 0, 2, 6, 20))),
        "preemption_mode": rng.choice(("auto", "recompute", "swap")) if num_host_pages else "recompute",
        "prefers_swap": lambda num_tokens, num_pages: num_tokens % 2 == 0,
        "sliding_window": sliding_window,
        "cache_by_prompt_length": rng.random() < 0.1,
        "clock": lambda: 0.0,
    }
    scheduler = make_scheduler(**drawn | options)
    scheduler.headroom = rng.choice((0, 0, 1))
    return scheduler


def simulate(
    seed: int,
    *,
    mutate: Callable[[Scheduler], None] = lambda scheduler: None,
    num_requests: int = 16,
    max_calls: int = MAX_CALLS,
    beams: float = 0.2,
    samples: tuple[int, ...] = (1, 1, 1, 2, 3),
    fault_rate: float | None = None,
    depth: int | None = None,
    **options,
) -> Outcome:
    """Runs a random world to its end.

    Args:
        seed: Decides everything that is not given.
        mutate: Plants a bug in the scheduler.
        num_requests: Requests that arrive.
        max_calls: Calls after which a world that does not end is given up.
        beams: Share of the requests that are beam searches.
        samples: What each other request's ``n`` is drawn from.
        fault_rate: Share of the steps that fail; drawn by default.
        depth: Steps dispatched ahead; drawn by default.
        **options: Options of the scheduler that are not drawn.

    Raises:
        AssertionError: A check failed (``Violation``, ``InvariantError``), or anything else that the bug raised.
    """
    rng = random.Random(seed)
    scheduler = random_scheduler(rng, **options)
    mutate(scheduler)
    drawn_rate = rng.choice((0.0, 0.0, 0.0, 0.02))
    fault_rate = drawn_rate if fault_rate is None else fault_rate
    abort_rate = rng.choice((0.0, 0.03, 0.2))
    arrival_rate = rng.choice((0.1, 0.4, 0.9))
    poison = {f"r{rng.randrange(num_requests)}"} if rng.random() < 0.2 else set()
    broken = {f"r{rng.randrange(num_requests)}"} if rng.random() < 0.2 else set()
    poison_from = rng.randrange(6)

    def fails(plan: StepPlan) -> bool:
        poisoned = (work for work in plan.work if work.sequence.request.id in poison)
        return rng.random() < fault_rate or any(work.samples and work.num_output >= poison_from for work in poisoned)

    def invalid(sequence: Sequence, num_output: int) -> bool:
        return sequence.request.id in broken and num_output == 2

    drawn_depth = rng.choice((0, 1, 1, 2, 3))
    depth = drawn_depth if depth is None else depth
    world = World(scheduler, depth=depth, fails=fails, invalid=invalid, max_calls=max_calls)
    growth = rng.choice((0.0, 0.5, 1.0))
    left = [_random_request(rng, i, scheduler, growth, beams, samples) for i in reversed(range(num_requests))]
    reset_rate = rng.choice((0.0, 0.0, 0.05))
    for _ in range(max_calls):
        if left and rng.random() < arrival_rate:
            world.add(left.pop())
        if rng.random() < reset_rate:
            scheduler.reset_prefix_cache()
            world.verify()
        if world.samples and rng.random() < abort_rate:
            request_id, index = rng.choice(list(world.samples))
            world.abort(request_id, rng.choice((None, index)))
        if world.handles and (len(world.handles) > world.depth or rng.random() < 0.3):
            world.commit()
        else:
            world.step()
        if not left and not scheduler.has_work:
            break
    world.drain()
    ends = Counter(sample.end.finish_reason for sample in world.samples.values() if sample.end)
    if fault_rate == 0.0:
        guilty = [s for s in world.samples.values() if s.end and s.end.error_code == "internal_error" and s.request.id not in poison]
        require(not guilty, "an innocent sequence was ended for another's fault")
    for sample in world.samples.values():
        reached = sample.request.id in poison and len(sample.golden) > poison_from
        require(not (reached and sample.end.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)), "a failing request went on")
    return Outcome(
        steps=world.num_steps,
        finished=ends[FinishReason.STOP] + ends[FinishReason.LENGTH],
        preemptions=scheduler.num_preemptions,
        faults=world.num_faults,
        aborted=ends[FinishReason.ABORT],
        swaps=scheduler.num_swaps,
        copies=scheduler.memory.num_copies,
        hits=scheduler.memory.prefix_hits,
        restored=world.num_restored,
    )


def _random_request(
    rng: random.Random, number: int, scheduler: Scheduler, growth: float, share_of_beams: float, samples: tuple[int, ...]
) -> Request:
    bound = scheduler.max_request_tokens
    size = scheduler.page_size
    total = max(2, rng.choice((rng.randint(2, bound), min(bound, rng.randint(1, 6) * size + rng.choice((-1, 0, 1))), bound)))
    max_tokens = rng.randint(1, max(1, min(total - 1, rng.choice((2, 12, 60)))))
    if rng.random() < growth:
        max_tokens = total - rng.randint(1, min(total - 1, 3))
    if rng.random() < 0.05:
        total = bound + rng.randint(1, 3)  # can never fit
    forks: dict[str, object] = {"n": rng.choice(samples)}
    if rng.random() < share_of_beams:
        width = rng.choice((1, 2, 3, 4))
        forks = {
            "use_beam_search": True,
            "beam_width": width,
            "n": rng.randint(1, width),
            "length_penalty": rng.choice((1.0, 0.0, -1.0)),
            "early_stopping": rng.choice((True, False, "never")),
            "temperature": 0.0,
        }
        max_tokens = min(max_tokens, 8)
    beams = "use_beam_search" in forks
    return make_request(
        f"r{number}",
        total - max_tokens,
        max_tokens,
        seed=rng.randrange(1000),
        topic=rng.choice((None, 1, 1, 2)),
        tenant=rng.choice(("", "", "other")),
        eos=rng.choice(((), (), (0,), (1, 2, 3))),
        min_tokens=rng.randint(0, max_tokens) if rng.random() < 0.3 else 0,
        stop_token_ids=rng.choice((None, None, None, [4, 5])),
        ignore_eos=rng.random() < 0.2,
        logprobs=None if beams else rng.choice((None, None, 1)),
        prompt_logprobs=None if beams else rng.choice((None, None, 1)),
        **forks,
    )


def main() -> int:
    """Runs many seeds and prints the figures; 1 if a check failed."""
    parser = argparse.ArgumentParser(description="Simulate the scheduler in random worlds and verify every step.")
    parser.add_argument("--runs", type=int, default=2000, help="worlds to run")
    parser.add_argument("--start", type=int, default=0, help="seed of the first; the others follow")
    options = parser.parse_args()
    totals: Counter[str] = Counter()
    failing: list[int] = []
    started = time.perf_counter()
    for seed in range(options.start, options.start + options.runs):
        try:
            totals.update(dataclasses.asdict(simulate(seed)))
        except Exception as error:
            failing.append(seed)
            print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
    seconds = time.perf_counter() - started
    print(f"{options.runs} runs ({options.runs / seconds:.0f}/s), seeds {options.start} to {options.start + options.runs - 1}")
    print(", ".join(f"{count} {name}" for name, count in totals.items()) + f"; {len(failing)} violations")
    return 1 if failing else 0


if __name__ == "__main__":
    raise SystemExit(main())
