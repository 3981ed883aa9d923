"""What the clients of a soak ask: each kind of request, and what its answer must be."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import httpx

Body = dict[str, Any]
_QUESTIONS = ("What is paged attention?", "What is a page?", "Tell me a story.", "What is a block table?", "Who are you?")
_MOST_FAILURES = 50

# What must give the same answer whenever it is asked, whatever else runs: greedy, seeded, several samples, the best of several, beams.
FIXED: tuple[tuple[str, Body], ...] = tuple(
    (path, body)
    for number, question in enumerate(_QUESTIONS)
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 64}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": question}], "seed": number, "n": 3, "max_tokens": 40}),
        ("/v1/completions", {"prompt": question * (1 + 5 * number), "temperature": 0, "max_tokens": 48, "ignore_eos": True}),
        ("/v1/completions", {"prompt": question, "seed": number, "n": 2, "best_of": 4, "temperature": 1.0, "max_tokens": 24}),
        ("/v1/completions", {"prompt": question, "use_beam_search": True, "n": 2, "beam_width": 4, "max_tokens": 24}),
        ("/v1/completions", {"prompt": question, "temperature": 0, "max_tokens": 64, "stop": [" a", "the"], "ignore_eos": True}),
    )
)

# Bodies that no server should take, and what they must be answered with.
BAD: tuple[tuple[str, bytes, int], ...] = (
    ("/v1/completions", b"", 400),
    ("/v1/completions", b"{", 400),
    ("/v1/completions", b"[1]", 400),
    ("/v1/completions", b'{"model": "tiny", "prompt": "\xff"}', 400),
    ("/v1/completions", b'{"model": "tiny"}', 400),
    ("/v1/completions", b'{"model": "tiny", "prompt": ""}', 400),
    ("/v1/completions", b'{"model": "tiny", "prompt": [-1]}', 400),
    ("/v1/completions", b'{"model": "tiny", "prompt": [1000000]}', 400),
    ("/v1/completions", b'{"model": "tiny", "prompt": "a", "temperature": -1}', 400),
    ("/v1/completions", b'{"model": "tiny", "prompt": "a", "max_tokens": 1e9}', 400),
    ("/v1/completions", b'{"model": "tiny", "prompt": "a", "n": 3, "best_of": 2}', 400),
    ("/v1/completions", b'{"model": "nobody", "prompt": "a"}', 404),
    ("/v1/chat/completions", b'{"model": "tiny", "messages": []}', 400),
    ("/v1/chat/completions", b'{"model": "tiny", "messages": [{"role": "pirate", "content": "a"}]}', 400),
    ("/v1/chat/completions", b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 100000}', 400),
    ("/v1/nothing", b"{}", 404),
)


class Tally:
    """What was asked and what went wrong.

    Attributes:
        asked: Requests by kind, as answered; those turned away with 429 under ``turned away``.
        failures: The first things that should not have happened, in words.
        num_failures: How many there were.
        choices: Choices that came whole.
        cached_tokens: Prompt tokens that answers said were found in the prefix cache.
    """

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.failures: list[str] = []
        self.num_failures = 0
        self.choices = 0
        self.cached_tokens = 0

    def fail(self, what: str) -> None:
        """Notes what should not have happened."""
        self.num_failures += 1
        if len(self.failures) < _MOST_FAILURES:
            self.failures.append(what[:500])


class Traffic:
    """Clients with two keys.

    Args:
        client: Speaks to the server.
        keys: Two API keys.
        rng: Decides who asks what.
        tally: What is found.
        vocab_size: Ids below it are asked for.
    """

    def __init__(
        self, client: httpx.AsyncClient, keys: tuple[str, str], rng: random.Random, tally: Tally, *, vocab_size: int = 1000
    ) -> None:
        self._client = client
        self._keys = keys
        self._rng = rng
        self._tally = tally
        self._vocab_size = vocab_size
        self._expected: list[Any] = []
        self._kinds: Mapping[str, tuple[float, Callable[[], Awaitable[bool]]]] = {
            "fixed": (8, self._fixed),
            "fixed, streamed": (4, self._fixed_stream),
            "sampled": (6, self._sampled),
            "several prompts": (3, self._several),
            "log-probabilities": (2, self._logprobs),
            "long": (6, self._long),
            "left": (6, self._left),
            "bad": (3, self._bad),
            "two keys": (2, self._two_keys),
            "reset": (0.1, self._reset),
        }

    async def learn(self) -> None:
        """Asks all that has one answer, one after the other on an idle server, and keeps the answers."""
        for path, body in FIXED:
            answer = await self._post(path, body)
            answer.raise_for_status()
            self._expected.append(_texts(answer.json()))

    async def run(self, num_clients: int, seconds: float) -> None:
        """Lets so many clients ask for so long."""
        until = asyncio.get_running_loop().time() + seconds

        async def one_client() -> None:
            while asyncio.get_running_loop().time() < until:
                await self._ask_something()

        await asyncio.gather(*(one_client() for _ in range(num_clients)))

    async def _ask_something(self) -> None:
        (kind,) = self._rng.choices(list(self._kinds), [weight for weight, _ in self._kinds.values()])
        try:
            answered = await self._kinds[kind][1]()
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            self._tally.fail(f"{kind}: {type(error).__name__}: {error}")
            return
        self._tally.asked[kind if answered else "turned away"] += 1
        if not answered:
            await asyncio.sleep(1.0)

    async def _post(self, path: str, body: Body, key: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key or self._rng.choice(self._keys)}"}
        return await self._client.post(path, json={"model": "tiny", **body}, headers=headers)

    def _good(self, answer: httpx.Response, what: str) -> bool:
        """Counts an answer; returns False for one that was turned away, or should not have come."""
        if answer.status_code == 200:
            parsed = answer.json()
            self._tally.choices += len(parsed["choices"])
            self._tally.cached_tokens += parsed["usage"]["prompt_tokens_details"]["cached_tokens"]
            return True
        if answer.status_code != 429:
            self._tally.fail(f"{what}: {answer.status_code} {answer.text[:300]}")
        return False

    async def _fixed(self) -> bool:
        number = self._rng.randrange(len(FIXED))
        path, body = FIXED[number]
        answer = await self._post(path, body)
        if not self._good(answer, f"fixed {number}"):
            return False
        if _texts(answer.json()) != self._expected[number]:
            self._tally.fail(f"fixed {number} {body}: {_texts(answer.json())} instead of {self._expected[number]}")
        return True

    async def _fixed_stream(self) -> bool:
        number = self._rng.choice([n for n, (_, body) in enumerate(FIXED) if not {"best_of", "use_beam_search"} & set(body)])
        path, body = FIXED[number]
        texts: dict[int, str] = {}
        ends: dict[int, str] = {}
        async with self._stream(path, body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return self._good(answer, f"stream {number}")
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        index = choice["index"]
                        texts[index] = texts.get(index, "") + (choice.get("text") or choice.get("delta", {}).get("content") or "")
                        ends |= {index: choice["finish_reason"]} if choice["finish_reason"] else {}
        self._tally.choices += len(ends)
        found = [(texts[index], ends.get(index)) for index in sorted(texts)]
        if found != self._expected[number]:
            self._tally.fail(f"stream {number} {body}: {found} instead of {self._expected[number]}")
        return True

    def _stream(self, path: str, body: Body) -> Any:
        headers = {"Authorization": f"Bearer {self._rng.choice(self._keys)}"}
        return self._client.stream("POST", path, json={"model": "tiny", "stream": True, **body}, headers=headers)

    async def _sampled(self) -> bool:
        body = {
            "prompt": self._rng.choice(_QUESTIONS) * self._rng.randint(1, 6),
            "max_tokens": self._rng.randint(1, 96),
            "n": self._rng.choice((1, 1, 2, 6)),
            "temperature": self._rng.choice((0.0, 0.7, 1.5)),
            "top_p": self._rng.choice((1.0, 0.8)),
            "top_k": self._rng.choice((0, 20)),
            "presence_penalty": self._rng.choice((0.0, 1.0)),
            "logit_bias": {str(self._rng.randrange(self._vocab_size)): 5.0} if self._rng.random() < 0.3 else None,
            "stop": self._rng.choice((None, ["."], ["\n", " and"])),
        }
        return self._good(await self._post("/v1/completions", body), "sampled")

    async def _several(self) -> bool:
        prompts = [self._rng.choice(_QUESTIONS) + str(self._rng.randrange(10**6)) for _ in range(self._rng.randint(2, 5))]
        answer = await self._post("/v1/completions", {"prompt": prompts, "max_tokens": 32, "n": self._rng.choice((1, 2))})
        return self._good(answer, "several prompts")

    async def _logprobs(self) -> bool:
        body = {"prompt": self._rng.choice(_QUESTIONS), "max_tokens": 16, "logprobs": 5, "echo": True, "temperature": 0}
        answer = await self._post("/v1/completions", body)
        if not self._good(answer, "log-probabilities"):
            return False
        found = answer.json()["choices"][0]["logprobs"]
        if len({len(found[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}) != 1:
            self._tally.fail(f"log-probabilities of different lengths: { {name: len(found[name]) for name in found} }")
        return True

    async def _long(self) -> bool:
        prompt = [self._rng.randrange(self._vocab_size // 3, self._vocab_size) for _ in range(self._rng.randint(150, 380))]
        body = {"prompt": prompt, "max_tokens": self._rng.randint(32, 120), "ignore_eos": True, "temperature": 0}
        return self._good(await self._post("/v1/completions", body), "long")

    async def _left(self) -> bool:
        """A client that goes away, in a stream or before a whole answer."""
        body = {"prompt": self._rng.choice(_QUESTIONS), "max_tokens": 200, "ignore_eos": True, "n": self._rng.choice((1, 3))}
        if self._rng.random() < 0.3:
            try:
                async with asyncio.timeout(self._rng.random()):
                    await self._post("/v1/completions", {**body, "best_of": 4, "n": 1})
            except TimeoutError:
                pass
            return True
        async with self._stream("/v1/completions", body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return self._good(answer, "left")
            lines = answer.aiter_lines()
            for _ in range(self._rng.randint(0, 12)):
                await anext(lines, None)
        return True

    async def _bad(self) -> bool:
        path, body, status = self._rng.choice(BAD)
        headers = {"Authorization": f"Bearer {self._keys[0]}", "Content-Type": "application/json"}
        answer = await self._client.post(path, content=body, headers=headers)
        if answer.status_code != status or not answer.json()["error"]["message"]:
            self._tally.fail(f"bad {path} {body!r}: {answer.status_code} {answer.text[:300]}")
        return True

    async def _two_keys(self) -> bool:
        """A text that nobody has sent before: its second reader finds it in the cache if he has the first one's key, else never."""
        text = f"{self._rng.getrandbits(64):x} " * 12
        body = {"prompt": text, "max_tokens": 2, "temperature": 0}
        first, second = self._rng.sample(self._keys, 2)
        answers = [await self._post("/v1/completions", body, key) for key in (first, second)]
        good = [self._good(answer, "two keys") for answer in answers]
        if not all(good):
            return False
        for answer in answers:
            if cached := answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]:
                self._tally.fail(f"two keys: {cached} tokens of a new text, or of another key's, were found in the cache")
        return True

    async def _reset(self) -> bool:
        answer = await self._client.post("/reset_prefix_cache", headers={"Authorization": f"Bearer {self._rng.choice(self._keys)}"})
        if answer.status_code != 200:
            self._tally.fail(f"reset: {answer.status_code} {answer.text[:300]}")
        return True


def _texts(answer: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns text and end of each choice of an answer."""
    return [(choice.get("text", choice.get("message", {}).get("content")), choice["finish_reason"]) for choice in answer["choices"]]
