#!/usr/bin/env python3
"""A server under mixed traffic for a long time: does it leak, lose count, mix up clients, or change its answers?

    python scripts/soak.py --minutes 30     # what a release runs
    python scripts/soak.py --minutes 1      # a try

It starts ``jaxpaged serve`` with the packaged model, a pool of pages far too small for its clients and little host memory, so that
requests are swapped, recomputed and copied all the time, and lets the scheduler verify its invariants after every step. Clients with two
keys ask greedy, seeded and sampled requests, several samples, the best of several, beams, stop strings, log-probabilities, long prompts
and several prompts at once, whole and streamed; some leave early, some send what nobody should take. In the end all must be as it was.
Exit status 0 if every check holds.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

import httpx
from trials.process import SCRIPTS, ServerProcess
from trials.traffic import Tally, Traffic

OPTIONS = [
    *("--served-model-name", "tiny", "--max-model-len", "512", "--num-pages", "65", "--max-num-seqs", "16"),
    *("--max-num-batched-tokens", "64", "--swap-space", "0.002", "--preemption-mode", "swap", "--max-waiting", "12", "--no-log-stats"),
]
KEYS = ("soak-key-a", "soak-key-b")
NUM_PAGES = 64
MOST_GROWTH = 48 * 2**20
"""Bytes that the server may hold more at the end than after the first part, when all kinds of requests have been served."""
_LEAST_FIRST_S, _FIRST_SHARE = 20.0, 0.2
_START_S, _IDLE_S = 900.0, 60.0


async def ask(url: str, args: argparse.Namespace, server: ServerProcess, tally: Tally) -> tuple[int, int]:
    """Runs the clients; returns the server's memory in bytes and its descriptors when it was idle after the first part."""
    rng = random.Random(args.seed)
    first_s = max(_LEAST_FIRST_S, _FIRST_SHARE * 60 * args.minutes)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=args.clients)
    before = (0, 0)
    for seconds in (first_s, max(0.0, 60 * args.minutes - first_s)):
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
            traffic = Traffic(client, KEYS, rng, tally)
            await traffic.learn()
            await traffic.run(args.clients, seconds)
        idle(server)
        before = before if before[0] else (server.resident_bytes(), server.num_descriptors())
    return before


def idle(server: ServerProcess) -> dict[str, float]:
    """Waits until nothing runs or waits; returns the metrics then, or after a minute."""
    until = time.monotonic() + _IDLE_S
    while True:
        metrics = server.metrics()
        busy = metrics["num_requests_running"] or metrics["num_requests_waiting"] or metrics["pages{active}"]
        if not busy or time.monotonic() > until:
            return metrics
        time.sleep(0.2)


def check(server: ServerProcess, tally: Tally, before: tuple[int, int]) -> list[tuple[str, bool, str]]:
    """Returns what was checked, whether it holds, and the figures."""
    metrics = idle(server)
    memory, descriptors = server.resident_bytes(), server.num_descriptors()
    finished = {name: count for name, count in metrics.items() if name.startswith("request_success_total{")}
    whole = sum(count for name, count in finished.items() if name.endswith(("{stop}", "{length}")))
    ended = sum(finished.values())
    hits, queries = metrics["prefix_cache_hits_total"], metrics["prefix_cache_queries_total"]
    pages = [metrics[f"pages{{{state}}}"] for state in ("active", "cached", "free")]
    moved = [metrics[f"{name}_total"] for name in ("num_preemptions", "num_swaps", "page_copies")]
    return [
        ("every answer is as expected", tally.num_failures == 0, f"{tally.num_failures} failures in {tally.asked.total()} requests"),
        ("nothing runs or waits", metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0, ""),
        ("no page is in use, none is lost", pages[0] == 0 and sum(pages) == NUM_PAGES, f"active, cached, free: {pages}"),
        ("nothing was compiled after ready", metrics["recompiles_total"] == 0, f"{metrics['recompiles_total']:g}"),
        ("no step failed, no invariant broke", metrics["recoveries_total"] == 0, f"{metrics['recoveries_total']:g} recoveries"),
        ("no request ended by a fault", not finished.get("request_success_total{error}"), str(finished)),
        ("ends are counted once", ended == metrics["e2e_request_latency_seconds_count"], f"{ended:g} ends"),
        ("tokens are counted once", metrics["generation_tokens_total"] == metrics["request_generation_tokens_sum"], ""),
        ("what clients got is counted", tally.choices <= whole, f"{tally.choices} choices, {whole:g} whole sequences"),
        ("hits are of texts that were looked up", tally.cached_tokens <= hits <= queries, f"{hits:g} of {queries:g} tokens"),
        ("it was under pressure", all(moved) and hits > 0, f"preemptions, swaps, copies: {moved}"),
        ("memory is bounded", memory - before[0] <= MOST_GROWTH, f"{before[0] / 2**20:.0f} MiB, then {memory / 2**20:.0f} MiB"),
        ("descriptors are back", descriptors <= before[1], f"{before[1]}, then {descriptors}"),
        ("it still runs", server.exit_code is None, ""),
    ]


def main() -> int:
    """Returns 0 if every check holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default %(default)s)")
    parser.add_argument("--clients", type=int, default=24, help="at once (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of who asks what (default %(default)s)")
    args = parser.parse_args()
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(OPTIONS, keys=KEYS, log=Path(folder) / "server.log", program=SCRIPTS / "trials" / "checked_server.py")
        try:
            print(f"ready in {server.wait_ready(_START_S):.0f} s; {args.clients} clients for {args.minutes:g} minutes", flush=True)
            before = asyncio.run(ask(server.url, args, server, tally))
            checks = check(server, tally, before)
        finally:
            code = server.stop()
            log = server.log
    checks.append(("SIGTERM ends it with 0", code == 0, f"exit code {code}"))
    print("\n".join(f"{count:8} {kind}" for kind, count in tally.asked.most_common()))
    print("\n".join(tally.failures))
    print("\n".join(f"{'ok  ' if holds else 'FAIL'} {what:40} {figures}" for what, holds, figures in checks))
    if not all(holds for _, holds, _ in checks):
        print(f"the end of the server's log:\n{log[-3000:]}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
