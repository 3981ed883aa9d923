#!/usr/bin/env python3
"""Times chats through running servers, in turn, so that two versions are compared on the same work at the same time.

Each round sends the same chats to each server; greedy, end of sequence ignored. The last line for a server is the median over the rounds of
its seconds divided by the first server's, round by round. Wants httpx (the extra ``test``).

    python scripts/bench_http.py http://127.0.0.1:8000
    python scripts/bench_http.py http://127.0.0.1:8401 http://127.0.0.1:8402 --concurrency 16 --requests 300 --max-tokens 16
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import NamedTuple

import httpx


class Round(NamedTuple):
    """What one round took: seconds in all, of the median chat, and to its first text (0 unless streamed)."""

    seconds: float
    latency_s: float
    first_s: float


async def chat(client: httpx.AsyncClient, model: str, number: int, max_tokens: int, stream: bool) -> tuple[float, float]:
    """Sends one chat; returns seconds to its end and to its first text."""
    messages = [{"role": "user", "content": f"What is a page? {number}"}]
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    began, first_s = time.perf_counter(), 0.0
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if stream and not first_s and '"content":"' in line and '"content":""' not in line:
                first_s = time.perf_counter() - began
    answer.raise_for_status()
    return time.perf_counter() - began, first_s


async def measure(url: str, concurrency: int, requests: int, max_tokens: int, stream: bool) -> Round:
    """Sends one round of chats, so many at once."""
    free = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=concurrency)) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def one(number: int) -> tuple[float, float]:
            async with free:
                return await chat(client, model, number, max_tokens, stream)

        began = time.perf_counter()
        chats = await asyncio.gather(*map(one, range(requests)))
        seconds = time.perf_counter() - began
    return Round(seconds, statistics.median(each for each, _ in chats), statistics.median(first for _, first in chats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="+", metavar="URL")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    work = (args.concurrency, args.requests, args.max_tokens, args.stream)
    rounds: dict[str, list[Round]] = {url: [] for url in args.urls}
    for url in args.urls:  # a round that does not count
        asyncio.run(measure(url, *work))
    for number in range(args.rounds):
        for url in args.urls if number % 2 else reversed(args.urls):
            rounds[url].append(asyncio.run(measure(url, *work)))
    for url, each in rounds.items():
        ratio = statistics.median(mine.seconds / first.seconds for mine, first in zip(each, rounds[args.urls[0]], strict=True))
        seconds, latency_s, first_s = (statistics.median(column) for column in zip(*each, strict=True))
        speed = f"{seconds:.3f} s, {args.requests * args.max_tokens / seconds:.0f} tokens/s"
        print(f"{url}  {speed}, {1e3 * latency_s:.1f} ms a chat, first text {1e3 * first_s:.1f} ms, {ratio:.3f}x")


if __name__ == "__main__":
    main()
