#!/usr/bin/env python3
"""What the beams of a real model share, beside the made-up beams of ``jaxpaged memory``.

Prompts are the beginnings of stories of scripts/tiny, as long as the workload says, and every search goes on for as many tokens as the
workload's answer has. Both columns are replays of the same requests through the scheduler; in the first the model gives the candidates.

    python scripts/measure_beams.py --num-requests 60
    python scripts/measure_beams.py --workload sharegpt --num-requests 30
"""

from __future__ import annotations

import argparse
import dataclasses
from random import Random

from tiny import stories

from jaxpaged.config import TINY_MODEL, EngineConfig, make_config
from jaxpaged.engine.runner import Runner
from jaxpaged.engine.startup import LoadedEngine, load_engine
from jaxpaged.memory.ledger import summarize
from jaxpaged.memory.paged import Device, PagedSetting, PagedSystem
from jaxpaged.memory.workloads import Call, Workload, load_workload
from jaxpaged.scheduling.plan import StepPlan, StepResult


class ModelDevice:
    """Answers plans with a model."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def answer(self, plan: StepPlan) -> StepResult:
        """Computes a step."""
        return self._runner.dispatch(plan).read()


def with_stories(workload: Workload, loaded: LoadedEngine, seed: int) -> Workload:
    """Returns the workload with prompts of the same lengths that are text."""
    rng = Random(seed)
    calls = []
    for call in workload.calls:
        ids: list[int] = []
        while len(ids) < len(call.prompt):
            ids += loaded.info.tokenizer.encode(stories.make_story(rng, 1, rng.randint(0, 60), plain=2).text + " ")
        calls.append(Call(tuple(ids[: len(call.prompt)]), call.output))
    return Workload(workload.name, tuple(calls))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_MODEL), help="directory (default: the packaged tiny model)")
    parser.add_argument("--workload", default="alpaca", help="name or file, as for jaxpaged memory (default %(default)s)")
    parser.add_argument("--num-requests", type=int, default=60, help="default %(default)s")
    parser.add_argument("--max-model-len", type=int, default=1024, help="default %(default)s")
    parser.add_argument("--num-pages", type=int, default=2049, help="pages of 16 tokens (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    arguments = parser.parse_args()
    setting = PagedSetting(
        num_pages=arguments.num_pages,
        page_size=16,
        max_model_len=arguments.max_model_len,
        max_num_seqs=32,
        max_num_batched_tokens=256,
        beams=True,
        async_depth=0,
        prefix_caching=False,
    )
    options = {
        "model": arguments.model,
        "max_model_len": setting.max_model_len,
        "max_num_seqs": setting.max_num_seqs,
        "max_num_batched_tokens": setting.max_num_batched_tokens,
        "num_pages": setting.num_pages,
        "page_size": setting.page_size,
    }
    loaded = load_engine(make_config(EngineConfig, options))
    made = load_workload(
        arguments.workload, num_requests=arguments.num_requests, seed=arguments.seed, max_model_len=arguments.max_model_len
    )
    workload = with_stories(made, loaded, arguments.seed)
    print(f"{'beam width':>10} {'the model':>10} {'made up':>10}", flush=True)
    devices: tuple[Device | None, ...] = (ModelDevice(loaded.engine.runner), None)
    for width in (2, 4, 6):
        saved = [
            summarize(PagedSystem(workload, dataclasses.replace(setting, num_sequences=width), device).replay(), 1).saved
            for device in devices
        ]
        print(f"{width:10} {saved[0]:10.1%} {saved[1]:10.1%}", flush=True)
    loaded.close()


if __name__ == "__main__":
    main()
