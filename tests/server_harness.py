"""Ways to reach the server in tests: in this process without a socket, and on a real socket in a thread."""

import asyncio
import contextlib
import functools
import json
import pickle
import re
import socket
import threading
import time

import httpx
import uvicorn

from jaxpaged.config import ServerConfig
from jaxpaged.server.app import create_app
from jaxpaged.server.callers import Callers
from jaxpaged.server.http import GuardedProtocol
from jaxpaged.server.prepare import prepare

LEAK = re.compile(r"0x[0-9a-fA-F]{6,}|File \"|Traceback|/(?:usr|home|root|tmp|work|opt|var|site-packages)/")
GOOD = {"model": "echo", "prompt": "ok", "max_tokens": 2}


class InlinePool:
    """Prepares calls where they are; what would cross to another process is pickled all the same."""

    async def run(self, job, info, *, size, owner):
        await asyncio.sleep(0)
        return pickle.loads(pickle.dumps(prepare(pickle.loads(pickle.dumps(job)), info)))

    def close(self):
        pass


class Client:
    """Drives an application without a socket; checks what every answer must have."""

    def __init__(self, engine, config=None, texts=None, **options):
        self.engine = engine
        self.app = create_app(engine, config or ServerConfig(), texts or InlinePool(), **options)
        self.service = self.app.state.service
        self.runner = asyncio.Runner()

    def request(self, method, path, **kwargs):
        async def go():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=20) as client:
                return await client.request(method, path, **kwargs)

        answer = self.runner.run(go())
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
        return answer

    def post(self, path, body, **kwargs):
        if isinstance(body, bytes):
            return self.request("POST", path, content=body, **{"headers": {"content-type": "application/json"}, **kwargs})
        return self.request("POST", path, json=body, **kwargs)

    def refused(self, answer, status, *, code=None, param=None):
        """Checks an error answer, that nothing leaks, that nothing was left running, and that the server still works."""
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and isinstance(error["message"], str) and len(error["message"]) < 1000
        assert not LEAK.search(answer.text), answer.text
        if code is not None:
            assert error["code"] == code, answer.text
        if param is not None:
            assert error["param"] == param, answer.text
        assert not self.engine.running
        assert len(self.service.calls) == 0
        return error

    def works(self):
        """A known good request is answered."""
        answer = self.post("/v1/completions", GOOD)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == "ok"

    def close(self):
        self.runner.close()
        self.service.close()


def events_of(text):
    """Splits an event stream into its data objects; checks the framing."""
    assert text.endswith("\n\n")
    blocks = [block for block in text[:-2].split("\n\n") if not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


class LoopbackServer:
    """The application on a real socket, in a thread."""

    def __init__(self, engine, config=None, texts=None, protocol=GuardedProtocol, callers=None, **options):
        self.engine = engine
        config = config or ServerConfig()
        callers = callers or Callers(allowed_origins=config.allowed_origins, allowed_hosts=config.allowed_hosts)
        self.app = create_app(engine, config, texts or InlinePool(), callers=callers, **options)
        self.service = self.app.state.service
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        settings = uvicorn.Config(
            self.app,
            http=functools.partial(protocol, callers=callers),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        with httpx.Client(base_url=self.url) as probe:
            assert probe.get("/livez").status_code == 200

    async def _main(self):
        self.engine.start(asyncio.get_running_loop())
        await self._server.serve(sockets=[self._listener])

    @contextlib.contextmanager
    def connect(self):
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            yield connection

    def close(self):
        self._server.should_exit = True
        self._thread.join(10)
        self.service.close()


def until(condition, seconds=10.0):
    """Waits for something that must come soon."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


BODIES = {
    "/v1/chat/completions": {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/completions": {"model": "echo", "prompt": "hi", "max_tokens": 2},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1, 2]},
}
"""A good body for each route that takes one."""
