#!/usr/bin/env python3
"""Serves the packaged model on this machine's device and asks it over HTTP: the second half of ``scripts/device_check``.

The answers below were taken from a CPU, in float32. Each of their tokens was more likely than the next one by a factor of more than
a hundred, so that a device's rounding does not change them.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from trials.process import ServerProcess

_STORY = (
    "Read this story. Once upon a time, Ida lived near the lake. The weather was snowy. The coin belonged to Ida. The coin was red. "
    "Ida hid the coin in the tower. On the way they met a horse. In the evening Ida felt hungry. They shared some bread and cheese. "
    "It had been a good day. The end. "
)
ANSWERS = {
    "What is a page?": "A page is a small block of memory that holds the keys and values of a few tokens, for example sixteen.",
    "What is a block table?": "A block table lists the pages of one sequence in order. Attention reads it to find the keys and values.",
    "Who are you?": "I am the tiny demonstration model of jaxpaged. I know short stories, small drills and paged attention.",
    "Count these words: bear, brown, drum, black, white": "There are 5 words.",
    "Write this as JSON: Ben has a black shell.": '{"name": "Ben", "color": "black", "thing": "shell"}',
    f"{_STORY}Tell me which animal was there.": "They met a horse.",
}
_AT_ONCE = 64


def chat(question: str, **fields: Any) -> dict[str, Any]:
    """Returns a greedy request."""
    return {"model": "tiny", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 64, **fields}


class Asker:
    """Asks, and keeps what was found.

    Attributes:
        found: What was checked, whether it holds, and how long it took in seconds.
    """

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.found: list[tuple[str, bool, float]] = []

    async def ask_all(self) -> None:
        """Asks one by one, streamed, several samples, beams, and many at once."""
        for what, check in (
            ("greedy answers, one by one", self._one_by_one),
            ("the same, streamed", self._streamed),
            ("n = 2: two equal greedy answers", self._two),
            ("a beam search of 4: the best first", self._beams),
            (f"{_AT_ONCE} at once", self._at_once),
        ):
            began = time.perf_counter()
            holds = await check()
            self.found.append((what, holds, time.perf_counter() - began))

    async def _texts(self, body: dict[str, Any]) -> list[str]:
        answer = await self._client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        return [choice["message"]["content"] for choice in answer.json()["choices"]]

    async def _one_by_one(self) -> bool:
        return _same([(await self._texts(chat(question)))[0] for question in ANSWERS], list(ANSWERS.values()))

    async def _streamed(self) -> bool:
        texts = []
        for question in ANSWERS:
            pieces = []
            async with self._client.stream("POST", "/v1/chat/completions", json=chat(question, stream=True)) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        pieces += [choice["delta"].get("content") or "" for choice in json.loads(line[6:])["choices"]]
            texts.append("".join(pieces))
        return _same(texts, list(ANSWERS.values()))

    async def _two(self) -> bool:
        question, expected = next(iter(ANSWERS.items()))
        return _same(await self._texts(chat(question, n=2)), [expected] * 2)

    async def _beams(self) -> bool:
        question, expected = next(iter(ANSWERS.items()))
        texts = await self._texts(chat(question, n=4, use_beam_search=True))
        return _same(texts[:1], [expected]) and len(set(texts)) == 4

    async def _at_once(self) -> bool:
        questions = (list(ANSWERS) * _AT_ONCE)[:_AT_ONCE]
        texts = await asyncio.gather(*(self._texts(chat(question)) for question in questions))
        return _same([text for (text,) in texts], [ANSWERS[question] for question in questions])


def _same(found: Sequence[str], expected: Sequence[str]) -> bool:
    """Compares, and prints what differs."""
    wrong = [(mine, right) for mine, right in zip(found, expected, strict=True) if mine != right]
    for mine, right in wrong[:5]:
        print(f"  got  {mine!r}\n  want {right!r}")
    return not wrong


async def ask(url: str) -> list[tuple[str, bool, float]]:
    """Asks everything of a server."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        asker = Asker(client)
        await asker.ask_all()
        return asker.found


def main() -> int:
    """Returns 0 if every answer is right and nothing was compiled after ready."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start-timeout", type=float, default=1200.0, help="seconds that compiling may take (default %(default)s)")
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(["--served-model-name", "tiny", "--no-log-stats", *options], log=Path(folder) / "server.log")
        try:
            ready_s = server.wait_ready(args.start_timeout)
            found = asyncio.run(ask(server.url))
            metrics = server.metrics()
        finally:
            code = server.stop()
            print(server.log)
    found += [
        ("nothing was compiled after ready", metrics["recompiles_total"] == 0, metrics["compile_seconds_total"]),
        ("no step failed", metrics["recoveries_total"] == 0, 0.0),
        ("SIGTERM ends it with 0", code == 0, 0.0),
    ]
    print(f"ready in {ready_s:.1f} s; {metrics['generation_tokens_total']:g} tokens generated in {metrics['steps_total']:g} steps")
    print("\n".join(f"{'ok  ' if holds else 'FAIL'} {what:40} {seconds:8.2f} s" for what, holds, seconds in found))
    return 0 if all(holds for _, holds, _ in found) else 1


if __name__ == "__main__":
    sys.exit(main())
