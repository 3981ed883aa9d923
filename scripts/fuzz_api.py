#!/usr/bin/env python3
"""Tens of thousands of damaged requests: each must be answered in time, in this API's own words, and harm nobody else.

    python scripts/fuzz_api.py                          # 50,000, against a server of the packaged model that it starts
    python scripts/fuzz_api.py --count 2000             # a try
    python scripts/fuzz_api.py --url http://host:8000   # against a running one
    python scripts/fuzz_api.py --only 1234              # shows one request and its answer

Good requests of every route are changed in values, types, numbers, nesting, Unicode, sizes, fields and raw bytes. No answer may be a
5xx, an error of another shape than OpenAI's, or come too late; in the end the server must be idle, well, and give a good request the
answer that it gave in the beginning. The same seed makes the same requests. Exit status 0 if all that holds.
"""

import argparse
import asyncio
import dataclasses
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
from trials.mutants import Mutant, make_mutant
from trials.process import ServerProcess

OPTIONS = [
    "--served-model-name",
    "tiny",
    "--max-model-len",
    "512",
    "--max-num-seqs",
    "16",
    "--max-num-batched-tokens",
    "64",
    "--no-log-stats",
]
GOOD = {"prompt": "What is a page?", "max_tokens": 8, "temperature": 0}
SHOWN_FAILURES = 20
_LEAK = re.compile(r"Traceback|File \\?\"|site-packages|0x[0-9a-f]{8,}")
_START_S, _IDLE_S = 900.0, 60.0


@dataclasses.dataclass
class Tally:
    """What came back.

    Attributes:
        answers: How often each route and status was seen.
        codes: How often each error's code was.
        failures: Number of the request and what was wrong, for the first of them.
        num_failures: How many there were.
        num_again: Requests that were sent twice, because the connection broke the first time.
        slowest_s: Seconds of the slowest answer.
    """

    answers: Counter[tuple[str, int]] = dataclasses.field(default_factory=Counter)
    codes: Counter[str] = dataclasses.field(default_factory=Counter)
    failures: list[str] = dataclasses.field(default_factory=list)
    num_failures: int = 0
    num_again: int = 0
    slowest_s: float = 0.0

    def fail(self, what: str) -> None:
        """Notes a failure."""
        self.num_failures += 1
        if len(self.failures) < SHOWN_FAILURES:
            self.failures.append(what)


async def ask(client: httpx.AsyncClient, mutant: Mutant, tally: Tally) -> httpx.Response:
    """Sends one request; once more if the connection broke, for the server may close one at rest while a request is on its way."""
    headers = {"content-type": mutant.content_type} if mutant.content_type else {}
    try:
        return await client.request(mutant.method, mutant.path, content=mutant.body, headers=headers)
    except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
        tally.num_again += 1
        return await client.request(mutant.method, mutant.path, content=mutant.body, headers=headers)


def judge(mutant: Mutant, answer: httpx.Response, tally: Tally) -> str | None:
    """Says what is wrong with an answer; None if nothing."""
    status, text = answer.status_code, answer.text
    tally.answers[mutant.path.partition("?")[0] if status != 404 else "(no such route or model)", status] += 1
    if not re.fullmatch(r"[0-9a-f]{32}", answer.headers.get("x-request-id", "")):
        return "no x-request-id"
    if status >= 500:
        return f"{status}: {text[:200]}"
    if _LEAK.search(text) and not _LEAK.search(mutant.body.decode("utf-8", "replace")):
        return f"an answer that tells of the inside: {text[:200]}"
    if mutant.method == "HEAD" or status == 204:
        return None
    if status >= 400:
        return _judge_error(text, tally)
    if "text/event-stream" in answer.headers["content-type"]:
        events = [block.removeprefix("data: ") for block in text.split("\n\n") if block and not block.startswith(":")]
        if not events or events[-1] != "[DONE]":
            return f"a stream that ends with {events[-1:]}"
        return next((f"an event that is not JSON: {event[:80]}" for event in events[:-1] if not _is_object(event)), None)
    if answer.headers["content-type"].startswith("application/json") and not _is_object(text):
        return f"an answer that is not JSON: {text[:80]}"
    return None


def _judge_error(text: str, tally: Tally) -> str | None:
    try:
        error = json.loads(text)["error"]
        if set(error) != {"message", "type", "param", "code"} or not error["message"] or len(error["message"]) > 1000:
            return f"an error of another shape: {text[:200]}"
    except (ValueError, KeyError, TypeError):
        return f"an error that is not OpenAI's: {text[:200]}"
    tally.codes[str(error["code"])] += 1
    return None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


async def run(client: httpx.AsyncClient, args: argparse.Namespace) -> Tally:
    """Sends all requests, ``args.clients`` at a time."""
    tally, numbers, began = Tally(), iter(range(args.count)), time.monotonic()

    async def one_client() -> None:
        for number in numbers:
            mutant = make_mutant(args.seed, number)
            sent_s = time.monotonic()
            try:
                async with asyncio.timeout(args.timeout):
                    wrong = judge(mutant, await ask(client, mutant, tally), tally)
            except (TimeoutError, httpx.HTTPError) as error:
                wrong = f"no answer: {type(error).__name__}"
            tally.slowest_s = max(tally.slowest_s, time.monotonic() - sent_s)
            if wrong is not None:
                tally.fail(f"--only {number}: {mutant.method} {mutant.path}: {wrong}")
            if number % 5000 == 4999:
                print(f"{number + 1} requests in {time.monotonic() - began:.0f} s, {tally.num_failures} failures", flush=True)

    await asyncio.gather(*(one_client() for _ in range(args.clients)))
    return tally


async def good_answer(client: httpx.AsyncClient) -> str:
    """Returns what a good request is answered."""
    model = (await client.get("/v1/models")).json()["data"][0]["id"]
    answer = await client.post("/v1/completions", json={"model": model, **GOOD})
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["text"])


async def fuzz(url: str, args: argparse.Namespace) -> bool:
    """Runs the whole trial; prints what came back and returns whether all of it is right."""
    limits = httpx.Limits(max_connections=args.clients, max_keepalive_connections=args.clients)
    async with httpx.AsyncClient(base_url=url, timeout=args.timeout, limits=limits) as client:
        before, began = await good_answer(client), time.monotonic()
        tally = await run(client, args)
        seconds = time.monotonic() - began
        for _ in range(int(_IDLE_S / 0.2)):
            state = (await client.get("/health")).json()
            if state["status"] == "ready" and not state["running"] and not state["waiting"]:
                break
            await asyncio.sleep(0.2)
        else:
            tally.fail(f"in the end the server is not idle and well: {state}")
        if tally.num_again > args.count // 1000:
            tally.fail(f"{tally.num_again} connections broke")
        if await good_answer(client) != before:
            tally.fail("a good request is answered otherwise than before")
    by_status = Counter[int]()
    for (_, status), count in tally.answers.items():
        by_status[status] += count
    print(f"\n{sum(by_status.values())} answers to {args.count} requests in {seconds:.0f} s, the slowest after {tally.slowest_s:.1f} s")
    print("\n".join(f"{count:8} {path} {status}" for (path, status), count in sorted(tally.answers.items())))
    print("by status: " + ", ".join(f"{status}: {count}" for status, count in sorted(by_status.items())))
    print("by code: " + ", ".join(f"{code}: {count}" for code, count in tally.codes.most_common()))
    print("\n".join(["", *tally.failures, f"{tally.num_failures} failures, {tally.num_again} sent again"]))
    return tally.num_failures == 0


async def show(url: str, args: argparse.Namespace) -> bool:
    """Prints one request and its answer; returns whether it is right."""
    mutant, tally = make_mutant(args.seed, args.only), Tally()
    print(f"{mutant.method} {mutant.path} {mutant.content_type}\n{mutant.body!r}\n", flush=True)
    async with httpx.AsyncClient(base_url=url, timeout=args.timeout) as client:
        answer = await ask(client, mutant, tally)
    wrong = judge(mutant, answer, tally)
    print(f"{answer.status_code} {dict(answer.headers)}\n{answer.text}\n\n{wrong or 'right'}")
    return wrong is None


def main() -> int:
    """Returns 0 if every answer is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a running server without a key; default: one of its own")
    parser.add_argument("--count", type=int, default=50_000, help="requests (default %(default)s)")
    parser.add_argument("--clients", type=int, default=16, help="at once (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default %(default)s)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that an answer may take (default %(default)s)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="send and show this request alone")
    args = parser.parse_args()
    trial = fuzz if args.only is None else show
    if args.url:
        return 0 if asyncio.run(trial(args.url, args)) else 1
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(OPTIONS, log=Path(folder) / "server.log")
        try:
            print(f"ready in {server.wait_ready(_START_S):.0f} s", flush=True)
            right = asyncio.run(trial(server.url, args))
        finally:
            code = server.stop()
            log = server.log
    if not right or code != 0:
        print(f"exit code of the server: {code}; the end of its log:\n{log[-3000:]}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
