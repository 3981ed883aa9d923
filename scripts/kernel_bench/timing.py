"""From calls to seconds.

A call of a jitted function costs the host tens of microseconds, more than a small kernel takes. So what is timed is a program that
walks over the pages of many layers, each layer's queries the results of the one before: what the engine runs. And the programs are
queued: one sample is the time of a long queue less that of a short one, divided by the difference of their lengths, so that what
comes once (the first dispatch, waiting for the last result) falls out. A program of many milliseconds is timed on its own. Caches
are cold because all layers' pages together are larger than they are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

SAMPLES = 50
_LEAST_SAMPLE_S = 2e-3
"""A sample's queue is made long enough to take this, so that the clock and the scheduler of the host matter little."""
_LONG_S = 20e-3
"""A program that takes this is timed alone."""


def queued_seconds(start: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready, samples: int | None = None) -> float:
    """Returns the median time of one call of ``start``, which begins some work and returns what to ``wait`` for."""

    def queue(length: int) -> float:
        began = time.perf_counter()
        for _ in range(length):
            last = start()
        wait(last)
        return time.perf_counter() - began

    queue(2)
    once = min(queue(1) for _ in range(3))
    if once > _LONG_S:
        return statistics.median(queue(1) for _ in range(samples or SAMPLES))
    short = max(1, min(64, round(_LEAST_SAMPLE_S / once)))
    taken = [(queue(3 * short) - queue(short)) / (2 * short) for _ in range(samples or SAMPLES)]
    return statistics.median(taken)


def layer_seconds(attend: Callable[..., Any], prepare: Callable[..., Any], q: Any, layers: Sequence[Any], shared: Any) -> float:
    """Returns the median time of one layer.

    Args:
        attend: From queries, one layer's arrays, what is shared and what was prepared, to results of the queries' shape.
        prepare: From what is shared to what all layers of a step use; made once a program, as in the engine.
        q: Queries of the first layer.
        layers: Arrays of each layer.
        shared: Arrays that all layers use.
    """

    @jax.jit
    def program(q: Any, layers: Sequence[Any], shared: Any) -> Any:
        prepared = prepare(shared)
        for layer in layers:
            q = attend(q, layer, shared, prepared).astype(q.dtype).reshape(q.shape)
        return q

    jax.block_until_ready(program(q, layers, shared))
    return queued_seconds(lambda: program(q, layers, shared)) / len(layers)


def copy_bandwidth(num_bytes: int) -> float:
    """Returns the bytes per second, read and written together, at which an array larger than the caches is read and written."""
    x = jnp.ones(num_bytes // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: fresh memory would cost a CPU more than the copy

    def step() -> jax.Array:
        nonlocal x
        x = add(x)
        return x

    return 2 * num_bytes / queued_seconds(step)


def read_bandwidth(num_bytes: int) -> float:
    """Returns the bytes per second that adding up an array larger than the caches reaches."""
    x = jnp.ones((num_bytes // 4 // 1024, 1024), jnp.float32)
    total = jax.jit(lambda x: x.sum())
    return x.nbytes / queued_seconds(lambda: total(x))


def matmul_rate(size: int, dtype: str) -> float:
    """Returns the operations per second of a square product of random matrices, multiplications and additions counted.

    Random, since a GPU that multiplies equal numbers draws less power, keeps a higher clock and shows a rate that no data reaches.
    """
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(lambda x: x @ x)
    return 2 * size**3 / queued_seconds(lambda: multiply(x))
