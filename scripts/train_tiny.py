#!/usr/bin/env python3
"""Trains, exports and evaluates the packaged tiny model.

    python scripts/train_tiny.py --out DIR          # train from scratch, write DIR, print its recall
    python scripts/train_tiny.py --evaluate [DIR]   # exact-match recall of DIR (default: the packaged model) in the engine

The plan (``scripts/tiny/training.py``) has 6,200 steps. The packaged weights were made in two parts: steps 1 to 4,000 on
23 November 2026 by an earlier version of this script (the same material, batches and learning rates, but float32 products
and the Muon of optax), stopped and resumed a few times; then, on 25 November 2026, steps 4,001 to 6,200 from the weights of the
first part (the packaged model until then; its model.safetensors has a sha256 that begins d83122801e3b5f4a), stopped and
resumed once, at step 5,700, to add the last stage:

    python scripts/train_tiny.py --seed 0 --start FIRST_PART --out DIR

Without ``--start``, one command runs the same plan from its start: each batch follows from the seed and its step number
alone, and step 4,000 rounds the weights and begins new moments as an export and ``--start`` do. That whole run has not been
repeated in one go with this version. The weights will differ in rounding, and more on another machine or version of JAX.

A step takes about 0.4 s of one core that has AMX, much longer on one without matrix units for bfloat16. One thread
(``XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"``) is enough. On Linux,
``GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=
8000000000:glibc.malloc.top_pad=268435456`` (one word) lets a step keep its memory instead of asking the system for it again:
page faults of one process fell from 83,000 a step to almost none, and on two busy cores the time of a step to less than half.
"""

import argparse
import time
from pathlib import Path

from tiny.evaluate import Generate, Message, evaluate
from tiny.training import PHASES, RESTART, Plan, train

from jaxpaged import LLM, SamplingParams
from jaxpaged.config import TINY_MODEL


def make_generate(folder: Path) -> Generate:
    """Returns a function that answers conversations greedily, through the whole engine."""
    llm = LLM(str(folder), show_progress=False)
    params = SamplingParams(temperature=0.0, max_tokens=64)

    def generate(conversations: list[list[Message]]) -> list[str]:
        return [output.outputs[0].text for output in llm.chat(conversations, params, use_tqdm=False)]

    return generate


def report(folder: Path, each: int = 50, show: int = 0) -> None:
    """Prints the recall of an exported model."""
    generate = make_generate(folder)
    began = time.perf_counter()
    for category, score in evaluate(generate, each=each, show=show).items():
        print(f"{category:24}{score:6.1%}")
    print(f"{time.perf_counter() - began:.1f} s after the engine's start")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", nargs="?", type=Path, const=TINY_MODEL, metavar="DIR", help="only evaluate")
    parser.add_argument("--each", type=int, default=50, help="questions of each category (default %(default)s)")
    parser.add_argument("--show", type=int, default=0, help="print so many wrong answers")
    parser.add_argument("--out", type=Path, default=Path("tiny-model"), help="folder to write (default %(default)s)")
    parser.add_argument("--steps", type=int, default=PHASES[-1][0], help="stop after so many (default %(default)s)")
    parser.add_argument("--rate", type=float, default=6e-3, help="peak learning rate (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--every", type=int, default=500, help="steps between exports (default %(default)s)")
    parser.add_argument("--state", type=Path, help="file to save the run to, and to resume it from")
    parser.add_argument("--start", type=Path, metavar="DIR", help=f"begin at step {RESTART} with the weights of this model")
    args = parser.parse_args()
    if not args.evaluate:
        train(Plan(args.steps, args.seed, args.rate, args.out, args.state, args.start, args.every))
    report(args.evaluate or args.out, args.each, args.show)


if __name__ == "__main__":
    main()
