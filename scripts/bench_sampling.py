#!/usr/bin/env python3
"""Times sampling on its own: logits of many rows to tokens, for each kind of request.

Each figure is the median over the calls, in milliseconds: of wall time, and of processor time of all of the process's threads, which a
busy machine disturbs less (on a CPU; elsewhere it is the host's part).

    python scripts/bench_sampling.py
    python scripts/bench_sampling.py --rows 256 --vocab 151936
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.sampling import sample
from jaxpaged.state import RowFlag, StepInputs, init_sampling_state

RANDOM = {"temperature": 0.8}
KINDS: dict[str, tuple[RowFlag, dict[str, Any]]] = {
    "greedy": (RowFlag.SAMPLES, {}),
    "penalties": (RowFlag.SAMPLES | RowFlag.PENALTIES, {"repetition_penalty": 1.1}),
    "bias": (RowFlag.SAMPLES | RowFlag.BIAS, {}),
    "temperature": (RowFlag.SAMPLES | RowFlag.RANDOM, RANDOM),
    "top_k 50": (RowFlag.SAMPLES | RowFlag.RANDOM, {**RANDOM, "top_k": 50}),
    "top_p 0.9": (RowFlag.SAMPLES | RowFlag.RANDOM, {**RANDOM, "top_p": 0.9}),
    "top_k and top_p": (RowFlag.SAMPLES | RowFlag.RANDOM, {**RANDOM, "top_k": 50, "top_p": 0.9}),
    "min_p 0.05": (RowFlag.SAMPLES | RowFlag.RANDOM, {**RANDOM, "min_p": 0.05}),
}


def make_inputs(rows: int, flags: RowFlag, values: dict[str, Any]) -> StepInputs:
    """Returns a decode step whose rows all ask for the same."""
    inputs = StepInputs.zeros(rows, rows, 1, max_num_seqs=rows)
    inputs.slots[:] = np.arange(rows)
    inputs.flags[:] = flags
    inputs.seed_low[:] = np.arange(rows)
    inputs.top_p[:] = 1.0
    for name, value in values.items():
        getattr(inputs, name)[:] = value
    return inputs


def main() -> None:
    """Reads the command line, prints a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="default %(default)s")
    parser.add_argument("--vocab", type=int, default=49_152, help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=15, help="default %(default)s")
    arguments = parser.parse_args()
    logits = jnp.asarray(np.random.default_rng(0).normal(scale=3.0, size=(arguments.rows, arguments.vocab)), jnp.float32)
    state = init_sampling_state(arguments.rows, arguments.vocab)
    step = jax.jit(sample, donate_argnums=2).lower(logits, make_inputs(arguments.rows, RowFlag.SAMPLES, {}), state).compile()
    print(f"{arguments.rows} rows, {arguments.vocab:,} tokens, {jax.devices()[0].device_kind}")
    print(f"{'':18}{'wall ms':>10}{'processor ms':>14}")
    for kind, (flags, values) in KINDS.items():
        inputs, wall, processor = make_inputs(arguments.rows, flags, values), [], []
        for _ in range(arguments.repeats + 1):
            began = time.perf_counter(), time.process_time()
            tokens, state = step(logits, inputs, state)
            tokens.block_until_ready()
            wall.append(time.perf_counter() - began[0])
            processor.append(time.process_time() - began[1])
        print(f"{kind:18}{statistics.median(wall[1:]) * 1e3:10.1f}{statistics.median(processor[1:]) * 1e3:14.1f}", flush=True)


if __name__ == "__main__":
    main()
