#!/usr/bin/env python3
"""Compares the dtypes of keys and values: what a token takes, how far log-probabilities move, which greedy tokens and answers change.

Each dtype runs the same held-out questions through the engine, and is compared with float32 pages: root mean square and largest
difference of the prompt tokens' log-probabilities, share of the prompts whose 32 greedy tokens are all the same, and exact-match
recall (as ``train_tiny.py --evaluate`` prints it).

    JAX_PLATFORMS=cpu python scripts/bench_kv_dtypes.py
"""

from __future__ import annotations

import argparse

import numpy as np
from tiny.evaluate import Message, cases, evaluate

from jaxpaged import LLM, SamplingParams
from jaxpaged.config import TINY_MODEL

DTYPES = ("float32", "bfloat16", "int8", "fp8")


def measure(dtype: str, prompts: list[list[Message]], arguments: argparse.Namespace) -> tuple[int, np.ndarray, list[list[int]], float]:
    """Returns bytes per token, log-probabilities of all prompt tokens, greedy tokens, and recall."""
    sizes = {"max_num_seqs": 16, "max_num_batched_tokens": 128, "token_buckets": (16, 128)}
    llm = LLM(arguments.model, kv_cache_dtype=dtype, show_progress=False, **sizes)
    greedy = SamplingParams(temperature=0.0, max_tokens=32, prompt_logprobs=0, ignore_eos=True)
    outputs = llm.chat(prompts, greedy, use_tqdm=False)
    logprobs = [
        entry[token].logprob
        for output in outputs
        for token, entry in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        if entry is not None
    ]

    def answer(conversations: list[list[Message]]) -> list[str]:
        short = SamplingParams(temperature=0.0, max_tokens=64)
        return [output.outputs[0].text for output in llm.chat(conversations, short, use_tqdm=False)]

    recall = evaluate(answer, each=arguments.each)["total"] if arguments.each else float("nan")
    per_token = llm.info.pool_bytes // (llm.info.num_pages * llm.info.page_size)
    return per_token, np.array(logprobs), [output.outputs[0].token_ids for output in outputs], recall


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_MODEL), help="directory (default: the packaged tiny model)")
    parser.add_argument("--prompts", type=int, default=10, help="questions of each category to compare tokens of (default %(default)s)")
    parser.add_argument("--each", type=int, default=50, help="questions of each category for the recall; 0 for none (default %(default)s)")
    arguments = parser.parse_args()
    prompts = [conversation for _, conversation, _ in cases(each=arguments.prompts)]
    print(f"{'dtype':>9} {'B/token':>8} {'rms':>9} {'largest':>9} {'same tokens':>12} {'recall':>7}", flush=True)
    exact = None
    for dtype in DTYPES:
        per_token, logprobs, tokens, recall = measure(dtype, prompts, arguments)
        exact = exact or (logprobs, tokens)
        difference = np.abs(logprobs - exact[0])
        same = np.mean([a == b for a, b in zip(tokens, exact[1], strict=True)])
        rms = np.sqrt(np.mean(difference**2))
        print(f"{dtype:>9} {per_token:8d} {rms:9.1e} {difference.max():9.1e} {same:12.0%} {recall:7.1%}", flush=True)


if __name__ == "__main__":
    main()
