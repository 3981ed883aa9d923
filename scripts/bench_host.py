#!/usr/bin/env python3
"""Times the host's part of a decode step, without a device: deciding it, building its arrays, committing its result.

The scheduler and the batch builder are the real ones; the device's answer is made up. Each figure is the median over the steps, in
microseconds of this thread's processor time, so that a busy machine disturbs it little.

    python scripts/bench_host.py
    python scripts/bench_host.py --rows 1 64 256 --prompt 512
"""

from __future__ import annotations

import argparse
import statistics
import time

from jaxpaged.engine.batch import BatchBuilder
from jaxpaged.scheduling.buckets import token_buckets
from jaxpaged.scheduling.plan import StepResult
from jaxpaged.scheduling.request import Request, SamplingParams
from jaxpaged.scheduling.scheduler import Scheduler

PAGE_SIZE = 16


def measure(rows: int, prompt: int, steps: int) -> dict[str, float]:
    """Returns the median microseconds of each part, over ``steps`` steps that decode ``rows`` sequences."""
    length, budget = prompt + steps + 2, max(2048, rows)
    scheduler = Scheduler(
        num_pages=rows * (length // PAGE_SIZE + 1) + 1,
        page_size=PAGE_SIZE,
        max_num_seqs=rows,
        max_num_batched_tokens=budget,
        max_model_len=length,
        token_buckets=token_buckets(budget, rows),
    )
    builder = BatchBuilder(page_size=PAGE_SIZE, table_width=-(-length // PAGE_SIZE), max_num_seqs=rows)
    params = SamplingParams(temperature=0.0, max_tokens=steps + 2, ignore_eos=True)
    for i in range(rows):
        scheduler.add(Request(id=str(i), prompt=(7,) * prompt, params=params))
    times: dict[str, list[float]] = {"schedule": [], "build": [], "commit": []}
    while True:
        marks = [time.thread_time()]
        plan = scheduler.schedule()
        marks.append(time.thread_time())
        if plan is None:
            return {name: statistics.median(values) * 1e6 for name, values in times.items()}
        builder.build(plan)
        marks.append(time.thread_time())
        scheduler.commit(plan, StepResult([5] * len(plan.work)))
        marks.append(time.thread_time())
        if plan.num_tokens == len(plan.work) == rows:
            for values, begin, end in zip(times.values(), marks, marks[1:], strict=False):
                values.append(end - begin)


def main() -> None:
    """Reads the command line, prints a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256], help="sequences that decode (default %(default)s)")
    parser.add_argument("--prompt", type=int, default=200, help="tokens of each prompt (default %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="decode steps (default %(default)s)")
    arguments = parser.parse_args()
    print("  rows  schedule     build    commit   all, microseconds a step")
    for rows in arguments.rows:
        parts = measure(rows, arguments.prompt, arguments.steps)
        print(f"{rows:6d}" + "".join(f"{value:10.0f}" for value in (*parts.values(), sum(parts.values()))), flush=True)


if __name__ == "__main__":
    main()
