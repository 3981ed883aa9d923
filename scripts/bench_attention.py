"""Times the XLA paged attention against a plain gather-and-einsum and against the time that reading the keys and values takes.

Each figure is the least of several runs over enough layers' pools that no cache holds them. The floor is the bytes of keys and
values at the bandwidth that a plain sum over the same pools reaches in the same run.

    JAX_PLATFORMS=cpu python scripts/bench_attention.py
    JAX_PLATFORMS=cpu python scripts/bench_attention.py --rows 64 --contexts 100-300 --heads 9 --kv-heads 3 --head-dim 64
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import ragged_paged_attention

SHAPES = ((1, 100, 100), (64, 100, 300), (64, 1024, 1024))
"""Rows, least and greatest context."""


def gather_and_einsum(q: Any, pages: Any, kv_lens: Any, block_tables: Any, *, sm_scale: float) -> Any:
    """The plain way: gather each row's whole table, then two einsums."""
    rows, head_dim = q.shape[0], q.shape[2]
    num_kv_heads = pages.shape[2] // 2
    kv = pages[block_tables].reshape(rows, -1, num_kv_heads, 2, head_dim)
    scores = jnp.einsum("skgd,sckd->skgc", q.reshape(rows, num_kv_heads, -1, head_dim), kv[:, :, :, 0]) * sm_scale
    seen = jnp.arange(kv.shape[1]) < kv_lens[:, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("skgc,sckd->skgd", weights, kv[:, :, :, 1]).reshape(q.shape)


def paged(q: Any, pages: Any, kv_lens: Any, block_tables: Any, *, sm_scale: float) -> Any:
    """The implementation under test, for single-token rows."""
    rows = q.shape[0]
    distribution = jnp.full(3, rows, jnp.int32)
    return ragged_paged_attention(
        q, pages, kv_lens, block_tables, jnp.arange(rows + 1, dtype=jnp.int32), distribution, sm_scale=sm_scale, implementation="xla"
    )


def least_seconds(function: Callable[..., Any], *arguments: Any, repeats: int) -> float:
    """Returns the least wall time of a call, once compiled."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def run(rows: int, shortest: int, longest: int, arguments: argparse.Namespace) -> None:
    """Measures one shape and prints its line."""
    rng = np.random.default_rng(0)
    lens = rng.integers(shortest, longest + 1, rows)
    pages_of = -(-lens // arguments.page_size)
    width = int(pages_of.max())
    ids = 1 + rng.permutation(int(pages_of.sum()))
    tables = np.zeros((rows, width), np.int32)
    for row, (count, end) in enumerate(zip(pages_of, pages_of.cumsum(), strict=True)):
        tables[row, :count] = ids[end - count : end]
    shape = (len(ids) + 1, arguments.page_size, 2 * arguments.kv_heads, arguments.head_dim)
    pools = [jnp.asarray(rng.standard_normal(shape, dtype=np.float32)) for _ in range(arguments.layers)]
    q = jnp.asarray(rng.standard_normal((rows, arguments.heads, arguments.head_dim), dtype=np.float32))
    inputs = (jnp.asarray(lens, jnp.int32), jnp.asarray(tables))

    def over_layers(attend: Callable[..., Any]) -> Callable[..., Any]:
        def layers(q: Any, pools: Any, inputs: Any) -> Any:
            for pool in pools:
                q = attend(q, pool, *inputs, sm_scale=arguments.head_dim**-0.5)
            return q

        return jax.jit(layers)

    measure = functools.partial(least_seconds, repeats=arguments.repeats)
    ours, plain = over_layers(paged), over_layers(gather_and_einsum)
    difference = float(jnp.abs(ours(q, pools[:1], inputs) - plain(q, pools[:1], inputs)).max())
    ours_s, plain_s = (measure(f, q, pools, inputs) / len(pools) for f in (ours, plain))
    pool_bytes = sum(pool.nbytes for pool in pools)
    bandwidth = pool_bytes / measure(jax.jit(lambda pools: [pool.sum() for pool in pools]), pools)
    kv_bytes = int(lens.sum()) * 2 * arguments.kv_heads * arguments.head_dim * 4
    floor_s = kv_bytes / bandwidth
    print(
        f"{rows:5d} x {shortest:5d}-{longest:<5d} {ours_s * 1e3:9.3f} {plain_s * 1e3:9.3f} {plain_s / ours_s:7.1f} "
        f"{kv_bytes / 1e6:9.1f} {bandwidth / 1e9:7.1f} {floor_s * 1e3:9.3f} {ours_s / floor_s:7.1f} {difference:9.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="rows of one token; default: a table of shapes")
    parser.add_argument("--contexts", default="1024", help="tokens of context, a number or LEAST-GREATEST")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    least, _, greatest = arguments.contexts.partition("-")
    shapes = SHAPES if arguments.rows is None else ((arguments.rows, int(least), int(greatest or least)),)
    print(f"{arguments.heads} query heads, {arguments.kv_heads} KV heads of {arguments.head_dim}, pages of {arguments.page_size}, float32")
    print(" rows x context       xla ms  plain ms  plain/     KV MB    GB/s  floor ms    xla/      diff")
    print("                     a layer   a layer     xla   a layer              layer   floor")
    for shape in shapes:
        run(*shape, arguments)


if __name__ == "__main__":
    main()
