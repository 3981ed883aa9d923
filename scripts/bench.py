#!/usr/bin/env python3
"""Replays a workload file through the engine and prints one JSON line of figures.

A workload is ``{"name": ..., "requests": [{"prompt_token_ids": [...], "max_tokens": n}, ...]}``. Greedy, end of sequence
ignored; a few requests are run first and not counted; then one stream alone gives the decode speed. Any option of
``jaxpaged serve`` may follow.

    python scripts/bench.py MODEL WORKLOAD.json --max-model-len 1024
"""

import argparse
import json
import sys
import time

import jax

from jaxpaged import LLM, SamplingParams
from jaxpaged.config import EngineConfig
from jaxpaged.errors import ConfigError
from jaxpaged.flags import Parser, add_options, fail, read_options


def measure(llm: LLM, prompts: list[dict], params: list[SamplingParams]) -> tuple[float, int]:
    """Returns seconds and output tokens of one pass over the workload."""
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start, sum(len(output.outputs[0].token_ids) for output in outputs)


def main() -> int:
    """Loads, measures, prints."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, EngineConfig)
    parser.add_argument("own_workload", metavar="WORKLOAD.json")
    args = parser.parse(sys.argv[1:])
    (config,) = read_options(args, EngineConfig)
    start = time.perf_counter()
    llm = LLM.from_config(config)
    ready_s = time.perf_counter() - start
    with open(args.own_workload, encoding="utf-8") as file:  # noqa: PTH123
        requests = json.load(file)["requests"]
    prompts = [{"prompt_token_ids": r["prompt_token_ids"]} for r in requests]
    params = [SamplingParams(temperature=0.0, max_tokens=r["max_tokens"], ignore_eos=True) for r in requests]
    measure(llm, [{"prompt_token_ids": [7] * 40}] * 4, [SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)] * 4)
    total_s, tokens = measure(llm, prompts, params)
    single_s, single = measure(llm, [{"prompt_token_ids": [7] * 16}], [SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)])
    figures = {
        "engine": "jaxpaged",
        "device": str(jax.devices()[0].device_kind),
        "jax": jax.__version__,
        "requests": len(requests),
        "output_tokens": tokens,
        "total_s": round(total_s, 3),
        "output_tok_s": round(tokens / total_s, 1),
        "single_stream_tok_s": round(single / single_s, 1),
        "ready_s": round(ready_s, 1),
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(fail(error))
