"""No request, whatever is in it, keeps the event loop from its other work: a monitor in the loop measures the longest wait."""

import asyncio
import functools
import gc
import json
import socket
import time

import pytest
import server_fakes
from server_fakes import FakeAsyncEngine
from server_harness import LoopbackServer, until

from jaxpaged.config import ServerConfig
from jaxpaged.server.text_pool import ProcessPool

MOST_S = 0.05
TRIES = 4
"""Other threads of the tests and caches that other programs empty only ever add to a wait: the least of a few tries counts."""

MAX_BODY = ServerConfig().max_body_bytes
MASKS = {"allowed_token_ids": [i % 250 for i in range(2**17)], "bad_token_ids": [255] * 2**17}


def text(**fields):
    return "/v1/completions", json.dumps({"model": "echo", "max_tokens": 2, **fields}).encode()


def chat(**fields):
    return "/v1/chat/completions", json.dumps({"model": "echo", "max_tokens": 2, **fields}).encode()


def filled(start, piece, end, size=MAX_BODY):
    """A body of completions that repeats a piece until it is as large as a body may be."""
    return "/v1/completions", start + piece * ((size - len(start) - len(end)) // len(piece)) + end


def said(content):
    return [{"role": "user", "content": content}]


BODIES = {
    "one long text": lambda: filled(b'{"model": "echo", "prompt": "', b"a b ", b'"}'),
    "one long word": lambda: filled(b'{"model": "echo", "prompt": "', b"a", b'"}'),
    "escapes": lambda: filled(b'{"model": "echo", "prompt": "', b"\\u00e9", b'"}'),
    "many ids": lambda: filled(b'{"model": "echo", "prompt": [1', b",1", b"]}"),
    "many lists of ids": lambda: filled(b'{"model": "echo", "prompt": [[1]', b",[1]", b"]}"),
    "many texts": lambda: filled(b'{"model": "echo", "prompt": ["a"', b',"a"', b"]}"),
    "a thousand prompts": lambda: text(prompt=["x" * 400] * 1024),
    "a thousand prompts of ids": lambda: text(prompt=[[1, 2, 3]] * 1024),
    "a thousand long prompts": lambda: text(prompt=["x" * 8000] * 1000),
    "masks for a thousand prompts": lambda: text(prompt=[[1]] * 1024, **MASKS),
    "masks for a thousand texts": lambda: text(prompt=["a"] * 1024, **MASKS),
    "masks for a few prompts": lambda: text(prompt=[[1]] * 4, **MASKS),
    "brackets": lambda: filled(b"[", b"[", b""),
    "brackets and back": lambda: filled(b'{"a": [', b"[],", b"[]]}"),
    "objects": lambda: filled(b'{"a": [', b'{"b":1},', b"1]}"),
    "digits": lambda: filled(b'{"model": "echo", "prompt": ', b"1", b"}"),
    "unknown fields": lambda: text(prompt=[1], **dict.fromkeys(map(str, range(600_000)), 1)),
    "many messages": lambda: chat(messages=said("x" * 2000) * 4000),
    "special tokens": lambda: chat(messages=said("<|im_end|>" * 700_000)),
    "parts": lambda: chat(messages=said([{"type": "text", "text": "a"}] * 200_000)),
    "template variables": lambda: chat(messages=said("a"), chat_template_kwargs={"x": ["y"] * 10**6}),
    "tools": lambda: chat(messages=said("a"), tool_choice="none", tools=[{"type": "function", "function": {"name": "f" * 10}}] * 100_000),
    "a text to tokenise": lambda: ("/tokenize", json.dumps({"prompt": "a b " * 500_000, "return_token_strs": True}).encode()),
    "ids to spell": lambda: ("/detokenize", json.dumps({"tokens": [65] * 2**20}).encode()),
    "log-probabilities of a prompt, often": lambda: text(prompt="x" * 380, n=64, prompt_logprobs=20),
    "an echo with log-probabilities, often": lambda: text(prompt="x" * 380, n=64, logprobs=20, echo=True),
    "an echo with log-probabilities, streamed": lambda: text(prompt="x" * 20_000, logprobs=20, echo=True, stream=True),
    "ids of a long prompt, often": lambda: text(prompt="x" * 20_000, n=64, return_token_ids=True),
}


class WatchedEngine(FakeAsyncEngine):
    """Does next to nothing, and notes the longest time for which the event loop did not turn."""

    def __init__(self, pool, **options):
        super().__init__(**options)
        self.pool = pool
        self.rows = asyncio.Semaphore(64)  # an engine's step has news of so many requests, not of all that wait
        self.longest_s = 0.0

    def start(self, loop):
        self.tasks = [loop.create_task(self.watch()), loop.create_task(self.pool.load(self.info))]

    async def beat(self):
        async with self.rows:
            await super().beat()

    async def watch(self):
        """Counts the seconds of processor between two turns, of all threads: any may hold the lock. Other programs do not count."""
        while True:
            began = time.process_time()
            await asyncio.sleep(0.002)
            self.longest_s = max(self.longest_s, time.process_time() - began)


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_fakes, "_logprob", functools.cache(server_fakes._logprob))  # an engine makes them in a thread of its own
        pool = ProcessPool(2)
        server = LoopbackServer(WatchedEngine(pool, max_model_len=2**15, max_calls=2000), texts=pool)
        gc.collect()
        gc.freeze()  # as an engine does once it is loaded
        yield server
        gc.unfreeze()
        server.close()


def exchange(server, path, body):
    """Sends one request as raw bytes and returns the answer's status; a client of much Python would hold the lock itself."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
        connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        received = connection.recv(2**20)
        while connection.recv(2**20):
            pass
    return int(received.split(b" ", 2)[1])


@pytest.mark.parametrize("name", BODIES)
def test_the_loop_never_waits(server, name):
    path, body = BODIES[name]()
    assert len(body) <= MAX_BODY
    waits = []
    while not waits or (min(waits) > MOST_S and len(waits) < TRIES):
        server.engine.longest_s = 0.0
        status = exchange(server, path, body)
        assert status in (200, 400), status
        waits.append(server.engine.longest_s)
    assert min(waits) <= MOST_S, waits
    assert exchange(server, *text(prompt="small")) == 200
    until(lambda: server.service._bodies.held_bytes == 0 and not server.engine.running)


def test_the_monitor_sees_a_wait(server):
    server.engine.longest_s = 0.0
    server.engine.tasks[0].get_loop().call_soon_threadsafe(sum, range(10**7))
    until(lambda: server.engine.longest_s > MOST_S)
