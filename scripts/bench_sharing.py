#!/usr/bin/env python3
"""Measures what shared pages and swapping are worth on a real engine; prints one JSON line for each experiment.

``prefix``: requests with a common prefix, one after the other: time to the first token without and with a hit in the prefix cache, the
median over several prefixes. ``preemption``: chat-like requests in a pool that holds a share of what they need at once, preempted by
recomputing and by swapping, against a pool that holds all: seconds, preemptions, and how many requests got other tokens. A processor
multiplies matrices of another number of rows in another order, so a near tie may fall the other way whenever a request runs beside
others than before, preempted or not; ``--temperature 0`` has fewer near ties. Any option of ``jaxpaged serve`` may follow.

    python scripts/bench_sharing.py prefix MODEL --max-model-len 1024
    python scripts/bench_sharing.py preemption --max-num-seqs 64 --max-model-len 512
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
import time

from jaxpaged import LLM, SamplingParams
from jaxpaged.config import EngineConfig
from jaxpaged.errors import ConfigError
from jaxpaged.flags import Parser, add_options, fail, read_options

PREFIX_TOKENS = 512
OWN_TOKENS = 16
REPEATS = 5
CHAT_REQUESTS = 200
POOL_SHARE = 0.25


def measure_prefix(config: EngineConfig, _: float) -> None:
    """Prints the time to the first token of the first and of the second request with a common prefix."""
    llm = LLM.from_config(config)
    rng = random.Random(0)
    ids = lambda count: [rng.randrange(3, llm.info.model_config.vocab_size) for _ in range(count)]  # noqa: E731

    def first_token_s(prompt: list[int]) -> tuple[float, int]:
        started = time.perf_counter()
        (output,) = llm.generate([{"prompt_token_ids": prompt}], SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
        return time.perf_counter() - started, output.num_cached_tokens

    first_token_s(ids(PREFIX_TOKENS + OWN_TOKENS))
    cold, warm, cached = [], [], []
    for _ in range(REPEATS):
        prefix = ids(PREFIX_TOKENS)
        cold.append(first_token_s(prefix + ids(OWN_TOKENS))[0])
        seconds, hit = first_token_s(prefix + ids(OWN_TOKENS))
        warm.append(seconds)
        cached.append(hit)
    figures = {
        "experiment": "prefix",
        "prefix_tokens": PREFIX_TOKENS,
        "cached_tokens": min(cached),
        "first_ms": round(1e3 * statistics.median(cold), 1),
        "second_ms": round(1e3 * statistics.median(warm), 1),
        "ratio": round(statistics.median(warm) / statistics.median(cold), 3),
    }
    print(json.dumps(figures), flush=True)


def chat_lengths(count: int, most: int) -> list[tuple[int, int]]:
    """Returns prompt and output lengths as in chat traffic: log-normal, long tails, clipped to half of ``most`` each."""
    rng = random.Random(1)
    draw = lambda median: int(min(most // 2 - 1, max(4, rng.lognormvariate(0, 1.0) * median)))  # noqa: E731
    return [(draw(most / 8), draw(most / 8)) for _ in range(count)]


def measure_preemption(config: EngineConfig, temperature: float) -> None:
    """Prints how a workload fares in a pool of a quarter of what its requests need if as many as may run do so at once."""
    most = config.max_model_len or 512
    lengths = chat_lengths(CHAT_REQUESTS, most)
    rng = random.Random(2)
    prompts = [[rng.randrange(3, 1000) for _ in range(prompt)] for prompt, _ in lengths]
    params = [SamplingParams(temperature=temperature, seed=i, max_tokens=output, ignore_eos=True) for i, (_, output) in enumerate(lengths)]
    seqs, size = config.scheduler.max_num_seqs or 64, config.cache.page_size or 16
    needs = sorted((-(-sum(pair) // size) for pair in lengths), reverse=True)
    demand = sum(needs[:seqs])
    expected: list[list[int]] | None = None
    for mode, num_pages in (("roomy", demand + 1), ("recompute", int(POOL_SHARE * demand) + 1), ("swap", int(POOL_SHARE * demand) + 1)):
        cache = dataclasses.replace(config.cache, num_pages=num_pages, page_size=size, swap_space=1.0 if mode == "swap" else 0.0)
        scheduler = dataclasses.replace(config.scheduler, max_num_seqs=seqs, preemption_mode="swap" if mode == "swap" else "recompute")
        llm = LLM.from_config(dataclasses.replace(config, cache=cache, scheduler=scheduler, max_model_len=most))
        started = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = [output.outputs[0].token_ids for output in outputs]
        expected = expected or tokens
        stats = llm.get_metrics()
        figures = {
            "experiment": "preemption",
            "mode": mode,
            "requests": len(outputs),
            "pages": num_pages - 1,
            "demand_pages": demand,
            "seconds": round(seconds, 2),
            "preemptions": stats.preemptions,
            "swaps": stats.swaps,
            "complete": all(len(found) == output for found, (_, output) in zip(tokens, lengths, strict=True)),
            "other_tokens": sum(found != wanted for found, wanted in zip(tokens, expected, strict=True)),
        }
        print(json.dumps(figures), flush=True)
        llm.close()


EXPERIMENTS = {"prefix": measure_prefix, "preemption": measure_preemption}


def main() -> int:
    """Reads the command line, runs one experiment."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("own_experiment", metavar="EXPERIMENT", choices=EXPERIMENTS)
    parser.add_argument("--own-temperature", "--temperature", type=float, default=1.0, help="of the preempted requests (default 1)")
    add_options(parser, EngineConfig)
    args = parser.parse(sys.argv[1:])
    (config,) = read_options(args, EngineConfig)
    EXPERIMENTS[args.own_experiment](config, args.own_temperature)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(fail(error))
