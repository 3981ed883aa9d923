"""What it costs and saves to keep pages free for running sequences (``Scheduler.headroom``): python tests/scheduling/headroom.py.

Four workloads that overfill their pool, at async depth 1. A step's time is modelled as max(1, padded tokens / 64): reading the weights
takes as long as computing 64 tokens.
"""

from __future__ import annotations

import random

from jaxpaged.scheduling.buckets import token_buckets
from jaxpaged.scheduling.plan import StepResult
from jaxpaged.scheduling.request import Request, SamplingParams
from jaxpaged.scheduling.scheduler import Scheduler

# pages, most sequences, token budget, prompt lengths, output lengths, requests
WORKLOADS = (
    (513, 64, 256, (50, 300), (100, 500), 300),
    (257, 64, 256, (20, 60), (200, 600), 300),
    (2049, 256, 2048, (100, 1000), (100, 400), 800),
    (129, 16, 256, (500, 1500), (10, 200), 150),
)


def run(headroom: int, num_pages: int, seqs: int, budget: int, prompts: tuple, outputs: tuple, requests: int) -> tuple[int, int, float]:
    """Returns steps, preemptions and modelled time of one workload."""
    rng = random.Random(0)
    scheduler = Scheduler(
        num_pages=num_pages,
        page_size=16,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=10**6,
        token_buckets=token_buckets(budget, seqs),
    )
    scheduler.headroom = headroom
    for number in range(requests):
        params = SamplingParams(max_tokens=rng.randint(*outputs))
        scheduler.add(Request(id=str(number), prompt=(1,) * rng.randint(*prompts), params=params))
    in_flight = []
    cost = 0.0
    while scheduler.has_work:
        plan = scheduler.schedule()
        if plan is not None:
            in_flight.append(plan)
            cost += max(1.0, plan.token_bucket / 64)
        if plan is None or len(in_flight) > 1:
            oldest = in_flight.pop(0)
            scheduler.commit(oldest, StepResult([1] * len(oldest.work)))
    return scheduler.step, scheduler.num_preemptions, cost


if __name__ == "__main__":
    for headroom in (0, 1, 2):
        figures = [run(headroom, *workload) for workload in WORKLOADS]
        steps, preemptions, cost = (sum(column) for column in zip(*figures, strict=True))
        print(f"headroom {headroom}: {steps} steps, {preemptions} preemptions, time {cost:.0f}")
