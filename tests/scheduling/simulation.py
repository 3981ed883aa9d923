"""Whole-scheduler simulation: random worlds, an exact oracle, and every check after every call.

``World`` drives a scheduler as the engine does, with ``fakes.FakeRunner`` as the device. After each call it verifies

* the invariants (``Scheduler.check``), by identity of pages and slots;
* the **golden** tokens: an integer hash stands for the model, so any wrong cell, position, slot, order or seed changes them;
* the **canary**: each cell that a running sequence has computed holds what its own tokens make of it; free pages are poisoned;
* **liveness**: with nothing in flight and work left there is a plan; and the fairness bound of ``scheduler.py``, step by step;
* the **ledger**: each sequence gets exactly one last event, and the end that is due to it; late results change nothing;
* at the end, the **drain**: no page, slot or sequence is left.

``simulate(seed)`` makes a world from a seed, with few pages, and with aborts, NaN rows, failing steps and requests on which every step
fails. To run more than the test does::

    python tests/scheduling/simulation.py --runs 100000 --start 1000000
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fakes import POISON, DeviceFault, FakeHandle, FakeRunner, Violation, cell_value, golden_tokens

from jaxpaged.errors import QueueFull, RequestError
from jaxpaged.scheduling.buckets import token_buckets
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
    received: list[int] = dataclasses.field(default_factory=list)
    end: TokenEvent | None = None
    prompt_logprobs: int = 0
    aborted: bool = False
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


def make_request(name: str, prompt_length: int, max_tokens: int, *, seed: int = 0, eos: tuple[int, ...] = (), **params) -> Request:
    """Makes a request whose prompt follows from its seed."""
    prompt = tuple((31 * seed + 7 * i + i * i) % VOCAB for i in range(prompt_length))
    return Request(id=name, prompt=prompt, params=SamplingParams(max_tokens=max_tokens, **params), eos_token_ids=eos, seed=seed)


class World:
    """A scheduler, a fake device, and everything that must be true of the two."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        depth: int = 1,
        fails: Callable[[StepPlan], bool] = lambda plan: False,
        invalid: Callable[[Sequence, int], bool] = lambda sequence, num_output: False,
    ) -> None:
        self.scheduler = scheduler
        self.depth = depth
        self.device = FakeRunner(scheduler.pages.num_pages, scheduler.page_size, vocab_size=VOCAB, fails=fails, invalid=invalid)
        self.handles: list[tuple[StepPlan, FakeHandle]] = []
        self.samples: dict[tuple[str, int], Sample] = {}
        self.num_faults = 0
        self.num_steps = 0
        self.recomputed = 0

    # ------------------------------------------------------------------------------------------------------------ actions

    def add(self, request: Request) -> bool:
        """Adds a request; returns whether it was taken. Refusals must be exactly those that are due."""
        scheduler = self.scheduler
        bound = min(scheduler.max_model_len, (scheduler.pages.num_pages - 1) * scheduler.page_size)
        ahead = sum(self._cost(self.samples[s.request.id, s.index].request) for s in scheduler.live_sequences())
        is_full = scheduler.num_running + scheduler.num_waiting >= scheduler.max_num_seqs + scheduler.max_waiting
        never_fits = len(request.prompt) + request.max_tokens > bound
        try:
            scheduler.add(request)
        except RequestError as error:
            require(never_fits and error.code == "context_length_exceeded", "a request that fits was refused")
            return False
        except QueueFull as error:
            require(is_full and 1 <= error.retry_after_s <= 60, "a queue that is not full refused a request")
            return False
        require(not never_fits, "a request that can never fit was taken")
        require(not is_full, "a full queue took a request")
        for index in range(request.params.n):
            ahead += self._cost(request)
            golden = golden_tokens(request, index, VOCAB)
            cells: list[int] = []
            for position, token in enumerate([*request.prompt, *golden]):
                cells.append(cell_value(cells[-1] if cells else 0, token, position))
            self.samples[request.id, index] = Sample(request, index, golden, cells, scheduler.step + (1 + self.depth) * ahead)
        self.verify()
        return True

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Aborts what is left of a request, or one of its samples."""
        wanted = [s for s in self.samples.values() if s.request.id == request_id and index in (None, s.index)]
        for sample in wanted:
            sample.aborted |= sample.end is None
        self.receive(self.scheduler.abort(request_id, index))
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
            self.handles.append((plan, self.device.dispatch(plan)))
            self.num_steps += 1
        self.verify()
        return plan

    def commit(self) -> None:
        """Reads the oldest step and commits or recovers."""
        plan, handle = self.handles.pop(0)
        alive = [work.sequence for work in plan.work if work.sequence.status is not Status.FINISHED]
        for work in plan.work:
            if self.device.invalid(work.sequence, work.num_output) and work.samples:
                self.sample(work.sequence).invalid = True
        try:
            result = handle.read()
        except DeviceFault:
            self.num_faults += 1
            if len(alive) == 1:
                self.sample(alive[0]).failed_alone += 1
            events = self.scheduler.recover(plan)
            self.device.reset()
            self.handles.clear()
            self.receive(events)
            require(self.scheduler.commit(plan, handle.result) == [], "the result of a failed step was applied")
        else:
            self.receive(self.scheduler.commit(plan, result))
            require(self.scheduler.commit(plan, result) == [], "a result was applied twice")
        self.verify()

    def step(self) -> None:
        """One turn of the engine's loop."""
        plan = self.dispatch()
        if len(self.handles) > self.depth or (plan is None and self.handles):
            self.commit()

    def drain(self) -> None:
        """Runs until nothing is left, and verifies that nothing is left."""
        for _ in range(MAX_CALLS):
            if not self.scheduler.has_work:
                break
            self.step()
        require(not self.scheduler.has_work, "the work does not end")
        require(self.scheduler.num_pages_in_use == 0 and self.scheduler.slots.num_used == 0, "pages or slots are left")
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
            if event.token_ids:
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
        for sequence in scheduler.running:
            expected = self.sample(sequence).cells
            for i, page_id in enumerate(sequence.page_ids):
                count = min(size, min(sequence.num_computed, len(expected)) - i * size)  # a step ahead may run past the end
                if count <= 0:
                    break
                require(cells[page_id][:count] == expected[i * size : i * size + count], "a cell does not hold what its sequence wrote")
        if not self.num_faults:
            late = (sequence for sequence in scheduler.live_sequences() if scheduler.step > self.sample(sequence).deadline)
            require(next(late, None) is None, "a sequence runs beyond its fairness bound")
        for page_id in range(1, scheduler.pages.num_pages):
            if scheduler.pages.reference_count(page_id) == 0:
                cells[page_id] = [POISON] * size

    def _snapshot(self) -> tuple[int, list[tuple[Sequence, int]]]:
        pages = self.scheduler.pages
        return pages.num_free + pages.num_deferred, [(sequence, len(sequence.page_ids)) for sequence in self.scheduler.running]

    def _verify_choice(self, plan: StepPlan | None, available: int, running: list[tuple[Sequence, int]]) -> None:
        """Verifies that no decode was passed over that needs no page, and nobody preempted whose pages were not needed."""
        scheduler = self.scheduler
        planned = {work.sequence for work in plan.work} if plan else set()
        trial = any(sequence.num_faults for sequence, _ in running) or any(sequence.num_faults for sequence in planned)
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
            case FinishReason.STOP:
                due = sample.received == sample.golden and sample.golden[-1] in sample.request.stop_token_ids
                due = due and (end.stop_reason is not None) == (sample.golden[-1] in sample.request.params.stop_token_ids)
            case FinishReason.LENGTH:
                due = len(sample.received) == sample.request.max_tokens
            case FinishReason.ABORT:
                due = sample.aborted
            case FinishReason.ERROR:
                due = sample.invalid if end.error_code == "numerical_error" else sample.failed_alone > 0
            case _:
                due = False
        if sample.received and sample.request.params.prompt_logprobs is not None:
            due &= sample.prompt_logprobs == len(sample.request.prompt) - 1
        require(due, f"a sequence ended by {end.finish_reason}, which was not due")


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


def simulate(seed: int, *, mutate: Callable[[Scheduler], None] = lambda scheduler: None, num_requests: int = 16) -> Outcome:
    """Runs a random world to its end.

    Args:
        seed: Decides everything.
        mutate: Plants a bug in the scheduler.
        num_requests: Requests that arrive.

    Raises:
        AssertionError: A check failed (``Violation``, ``InvariantError``), or anything else that the bug raised.
    """
    rng = random.Random(seed)
    max_num_seqs = rng.choice((1, 2, 3, 5, 8))
    budget = max_num_seqs + rng.choice((0, 1, 4, 11, 40))
    scheduler = make_scheduler(
        num_pages=rng.choice((3, 5, 7, 10, 10, 15, 15, 30)),
        page_size=rng.choice((1, 2, 3, 4, 8)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=rng.choice((10_000, 10_000, 20)),
        buckets=rng.choice((None, None, (budget,), {1, (budget + 1) // 2, budget})),
        long_prefill_token_threshold=rng.choice((0, 0, 1, 2, 5)),
        max_waiting=rng.choice((1024, 1024, 3)),
        clock=lambda: 0.0,
    )
    scheduler.headroom = rng.choice((0, 0, 1))
    mutate(scheduler)
    fault_rate = rng.choice((0.0, 0.0, 0.0, 0.02))
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

    world = World(scheduler, depth=rng.choice((0, 1, 1, 2, 3)), fails=fails, invalid=invalid)
    growth = rng.choice((0.0, 0.5, 1.0))
    left = [_random_request(rng, i, scheduler, growth) for i in reversed(range(num_requests))]
    for _ in range(MAX_CALLS):
        if left and rng.random() < arrival_rate:
            world.add(left.pop())
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
    )


def _random_request(rng: random.Random, number: int, scheduler: Scheduler, growth: float) -> Request:
    bound = scheduler.max_request_tokens
    size = scheduler.page_size
    total = max(2, rng.choice((rng.randint(2, bound), min(bound, rng.randint(1, 6) * size + rng.choice((-1, 0, 1))), bound)))
    max_tokens = rng.randint(1, max(1, min(total - 1, rng.choice((2, 12, 60)))))
    if rng.random() < growth:
        max_tokens = total - rng.randint(1, min(total - 1, 3))
    if rng.random() < 0.05:
        total = bound + rng.randint(1, 3)  # can never fit
    return make_request(
        f"r{number}",
        total - max_tokens,
        max_tokens,
        seed=rng.randrange(1000),
        eos=rng.choice(((), (), (0,), (1, 2, 3))),
        n=rng.choice((1, 1, 1, 2, 3)),
        min_tokens=rng.randint(0, max_tokens) if rng.random() < 0.3 else 0,
        stop_token_ids=rng.choice((None, None, None, [4, 5])),
        ignore_eos=rng.random() < 0.2,
        logprobs=rng.choice((None, None, 1)),
        prompt_logprobs=rng.choice((None, None, 1)),
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
