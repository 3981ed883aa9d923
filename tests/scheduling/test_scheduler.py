"""What the scheduler promises, one promise a test."""

from __future__ import annotations

from collections import defaultdict

import pytest
from fakes import FakeRunner, golden_tokens

from jaxpaged.errors import QueueFull, RequestError
from jaxpaged.scheduling.buckets import token_buckets
from jaxpaged.scheduling.plan import StepPlan, TokenEvent
from jaxpaged.scheduling.request import FinishReason, Request, SamplingParams
from jaxpaged.scheduling.scheduler import Scheduler

VOCAB = 50


def make_scheduler(*, num_pages=64, page_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=10_000, **options) -> Scheduler:
    return Scheduler(
        num_pages=num_pages,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        token_buckets=token_buckets(max_num_batched_tokens, max_num_seqs),
        **options,
    )


def make_request(name: str, prompt_length: int, max_tokens: int, *, eos: tuple[int, ...] = (), seed: int = 0, **params) -> Request:
    prompt = tuple((17 * seed + 7 * i) % VOCAB for i in range(prompt_length))
    return Request(id=name, prompt=prompt, params=SamplingParams(max_tokens=max_tokens, **params), eos_token_ids=eos, seed=seed)


class Drive:
    """The engine's loop with a fake device: plans, dispatches, commits, and checks every invariant in between."""

    def __init__(self, scheduler: Scheduler, depth: int = 1, **device) -> None:
        self.scheduler = scheduler
        self.depth = depth
        self.device = FakeRunner(scheduler.pages.num_pages, scheduler.page_size, vocab_size=VOCAB, **device)
        self.handles: list = []
        self.plans: list[StepPlan] = []
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.ends: dict[tuple[str, int], TokenEvent] = {}

    def dispatch(self) -> StepPlan | None:
        plan = self.scheduler.schedule()
        self.scheduler.check()
        if plan is not None:
            self.plans.append(plan)
            self.handles.append((plan, self.device.dispatch(plan)))
        return plan

    def commit(self) -> None:
        plan, handle = self.handles.pop(0)
        self.take(self.scheduler.commit(plan, handle.read()))

    def take(self, events: list[TokenEvent]) -> None:
        self.scheduler.check()
        for event in events:
            assert (event.request_id, event.index) not in self.ends
            self.tokens[event.request_id, event.index] += event.token_ids
            if event.finish_reason is not None:
                self.ends[event.request_id, event.index] = event

    def step(self) -> None:
        plan = self.dispatch()
        if len(self.handles) > self.depth or (plan is None and self.handles):
            self.commit()

    def run(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                assert self.scheduler.num_pages_in_use == 0
                return
            self.step()
        raise AssertionError("not done")


@pytest.mark.parametrize("depth", [0, 1])
def test_generates_what_the_model_says(depth):
    drive = Drive(make_scheduler(), depth)
    requests = [make_request(f"r{i}", 5 + 9 * i, 12, seed=i, n=1 + i % 2) for i in range(5)]
    for request in requests:
        drive.scheduler.add(request)
    drive.run()
    for request in requests:
        for index in range(request.params.n):
            assert drive.tokens[request.id, index] == golden_tokens(request, index, VOCAB)
            assert drive.ends[request.id, index].finish_reason is FinishReason.LENGTH


def test_refuses_what_can_never_fit():
    scheduler = make_scheduler(num_pages=5, page_size=4)
    with pytest.raises(RequestError) as error:
        scheduler.add(make_request("a", 10, 7))
    assert error.value.code == "context_length_exceeded"
    scheduler.add(make_request("b", 10, 6))


def test_queue_full():
    scheduler = make_scheduler(max_num_seqs=2, max_waiting=1)
    for name in "abc":
        scheduler.add(make_request(name, 3, 3))
    with pytest.raises(QueueFull):
        scheduler.add(make_request("d", 3, 3))
