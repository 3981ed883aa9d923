"""The life of a server process: binding, signals, exit codes, logs, TLS, UNIX sockets. Each test starts a real process."""

import contextlib
import http.client
import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import httpx
import pytest

from jaxpaged.config import ServerConfig
from jaxpaged.engine.telemetry import EngineStats
from jaxpaged.errors import ConfigError
from jaxpaged.server.listen import bind, is_loopback, url_of
from jaxpaged.server.logs import MAX_QUEUED_LINES, LineFormatter, QueuedHandler
from jaxpaged.server.serve import _Report

PROGRAM = """
import json, os, signal, sys, threading, time
from server_fakes import FakeAsyncEngine
from jaxpaged.config import EngineConfig, ServerConfig
from jaxpaged.errors import ConfigError
from jaxpaged.server import serve as serve_module
from jaxpaged.server.serve import run

def serve(script):
    engine = FakeAsyncEngine(step_s=script.pop("step_s", 0.01), max_model_len=4000)
    for name in ("state", "detail", "load_error", "fail_after_s"):
        setattr(engine, name, script.pop(name, getattr(engine, name)))
    serve_module.END_S = script.pop("end_s", serve_module.END_S)
    if script.pop("nohup", False):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    match script.pop("hang", None):
        case "loop":  # for ever, in the event loop, once it is ready
            engine.reply = lambda request: next(request for _ in iter(int, 1) if False)
        case "thread":
            threading.Thread(target=time.sleep, args=(1000,), name="jaxpaged-text_9").start()
        case "end":
            engine.stop = lambda: time.sleep(1000)
    if script.pop("interrupted", False):  # while it starts
        make_engine = lambda config, progress: (os.kill(os.getpid(), signal.SIGINT), engine)[1]
    else:
        make_engine = lambda config, progress: engine
    config = ServerConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in script.items()})
    try:
        return run(EngineConfig(model="echo"), config, make_engine=make_engine)
    except ConfigError as error:
        print(f"jaxpaged: {error}", file=sys.stderr)
        return 2

for line in sys.stdin:
    order = json.loads(line)
    if "poll" in order:
        pid, status = os.waitpid(order["poll"], os.WNOHANG)
        print(os.waitstatus_to_exitcode(status) if pid else "null", flush=True)
        continue
    pid = os.fork()
    if not pid:
        os.dup2(os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        code = 1
        try:
            code = serve(order["script"])
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)
"""


class Mother:
    """A process that has imported everything and forks a server for each test: imports take seconds, forks milliseconds."""

    def __init__(self):
        tests = Path(__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def order(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Process:
    """A server process."""

    def __init__(self, mother, log, script):
        self.script = {"port": 0} | script
        self._mother = mother
        self._log = log
        self._code = None
        self.pid = mother.order(script=self.script, log=str(log))
        self.url = None

    @property
    def log(self):
        return self._log.read_text() if self._log.exists() else ""

    @property
    def lines(self):
        return self.log.splitlines()

    def signal(self, number):
        os.kill(self.pid, number)

    def poll(self):
        if self._code is None:
            self._code = self._mother.order(poll=self.pid)
        return self._code

    def wait_for(self, pattern, seconds=60.0):
        deadline = time.monotonic() + seconds
        while True:
            for line in self.lines:
                if match := re.search(pattern, line):
                    return match
            assert time.monotonic() < deadline and self.poll() is None, self.log
            time.sleep(0.02)

    def ready(self):
        self.url = self.wait_for(r"ready +(\S+)")[1]
        return self

    def end(self, seconds=20.0):
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)
        return self._code


@pytest.fixture(scope="module")
def mother():
    made = Mother()
    yield made
    made.process.stdin.close()
    made.process.wait(10)


@pytest.fixture
def start(mother, tmp_path):
    made = []

    def start(**script):
        made.append(Process(mother, tmp_path / f"log{len(made)}", script))
        return made[-1]

    yield start
    for process in made:
        if process.poll() is None:
            process.signal(signal.SIGKILL)
            process.end()


class Streams:
    """Clients that read streams in threads."""

    def __init__(self, url, count, tokens):
        self.texts = [b""] * count
        self._threads = [threading.Thread(target=self._read, args=(url, i, tokens), daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()
        deadline = time.monotonic() + 20
        while not all(self.texts):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def _read(self, url, i, tokens):
        body = {"model": "echo", "prompt": "x" * tokens, "max_tokens": tokens, "stream": True}
        with contextlib.suppress(httpx.HTTPError), httpx.stream("POST", url + "/v1/completions", json=body, timeout=30) as answer:
            for piece in answer.iter_bytes():
                self.texts[i] += piece

    def join(self):
        for thread in self._threads:
            thread.join(30)


def test_sigterm_drains_and_loses_no_stream(start):
    process = start(step_s=0.05, shutdown_timeout=100.0).ready()
    streams = Streams(process.url, 32, 40)
    process.signal(signal.SIGTERM)
    process.wait_for("draining 32 calls")
    answer = httpx.get(process.url + "/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "draining")
    assert httpx.get(process.url + "/livez").status_code == 200
    refused = httpx.post(process.url + "/v1/completions", json={"model": "echo", "prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "service_unavailable")
    assert "retry-after" in refused.headers
    assert process.end(100.0) == 0
    streams.join()
    for text in streams.texts:
        assert text.endswith(b"data: [DONE]\n\n")
        assert text.count(b'"text":"x"') == 40


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_every_stream_at_once_with_an_error_event(start, number):
    process = start(step_s=0.05).ready()
    streams = Streams(process.url, 8, 2000)
    process.signal(number)
    process.wait_for("draining 8 calls")
    process.signal(number)
    began = time.monotonic()
    assert process.end() == 0
    assert time.monotonic() - began < 8.0  # 2 s, and room for a machine that is busy
    streams.join()
    for text in streams.texts:
        last = text.decode().strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "service_unavailable"
        assert b"[DONE]" not in text


def test_the_time_for_draining_is_bounded(start):
    process = start(step_s=0.05, shutdown_timeout=0.5).ready()
    streams = Streams(process.url, 3, 2000)
    process.signal(signal.SIGTERM)
    assert process.end(12.0) == 0
    streams.join()
    assert all(b'"error"' in text for text in streams.texts)


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_goes_away_drains_unless_nohup_has_it_ignored(start, nohup):
    process = start(step_s=0.05, nohup=nohup).ready()
    streams = Streams(process.url, 4, 40)
    process.signal(signal.SIGHUP)
    if nohup:
        streams.join()
        assert httpx.get(process.url + "/readyz").status_code == 200
        process.signal(signal.SIGTERM)
    else:
        process.wait_for("draining 4 calls")
        streams.join()
    assert process.end(30.0) == 0
    assert all(text.endswith(b"data: [DONE]\n\n") and text.count(b'"text":"x"') == 40 for text in streams.texts)


@pytest.mark.parametrize(
    ("hang", "number", "code"),
    [("loop", signal.SIGTERM, 70), ("loop", signal.SIGHUP, 70), ("thread", signal.SIGTERM, 0), ("end", signal.SIGINT, 0)],
)
def test_a_signal_ends_the_process_in_bounded_time_whatever_hangs(start, hang, number, code):
    process = start(hang=hang, shutdown_timeout=1.0, end_s=3.0).ready()
    if hang == "loop":
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(process.url + "/v1/completions", json={"model": "echo", "prompt": "x"}, timeout=1.0)
        with pytest.raises(httpx.HTTPError):
            httpx.get(process.url + "/livez", timeout=0.5)
    process.signal(number)
    began = time.monotonic()
    assert process.end(20.0) == code
    assert time.monotonic() - began < 12.0  # 4 s, and room for a machine that is busy
    assert ("did not end in time" if code else "leaving without waiting") in process.log


def test_a_second_signal_shortens_what_a_hanging_process_gets(start):
    process = start(hang="loop", shutdown_timeout=500.0, end_s=1.0).ready()
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(process.url + "/v1/completions", json={"model": "echo", "prompt": "x"}, timeout=1.0)
    process.signal(signal.SIGTERM)
    time.sleep(2.0)
    assert process.poll() is None
    process.signal(signal.SIGTERM)
    assert process.end(20.0) == 70


def test_a_server_that_may_drain_for_ever_still_ends_after_a_second_signal(start):
    process = start(hang="loop", shutdown_timeout=float("inf"), end_s=1.0).ready()
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(process.url + "/v1/completions", json={"model": "echo", "prompt": "x"}, timeout=1.0)
    for _ in range(2):
        process.signal(signal.SIGTERM)
        time.sleep(0.2)
    assert process.end(20.0) == 70
    assert "Traceback" not in process.log


def test_ctrl_c_before_the_server_takes_signals_ends_the_process_at_once(start):
    process = start(interrupted=True)
    assert process.end(20.0) == -signal.SIGINT
    assert "Traceback" not in process.log and "ready" not in process.log


def test_sigterm_while_idle_and_while_loading(start):
    process = start(shutdown_timeout=float("inf")).ready()
    process.signal(signal.SIGTERM)
    assert process.end(10.0) == 0
    loading = start(state="loading", port=_free_port())
    _until_bound(loading)
    loading.signal(signal.SIGTERM)
    assert loading.end(10.0) == 0


def test_the_port_answers_while_the_engine_loads(start):
    port = _free_port()
    process = start(state="compiling", detail="compiling 9/12", port=port)
    answer = _until_bound(process, port)
    assert answer.status_code == 503
    assert answer.json()["error"] == {"code": 503, "message": "compiling 9/12", "type": "unavailable_error"}
    refused = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"model": "echo", "prompt": "x"})
    assert (refused.status_code, "compiling 9/12" in refused.text) == (503, True)


def test_the_ready_line_has_an_address_and_a_curl_that_work(start):
    process = start().ready()
    command = process.wait_for("try +(curl .*)")[1]
    output = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60).stdout
    assert output.endswith("data: [DONE]\n\n")


def test_a_taken_port_is_one_line_and_exit_code_2(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(port=taken.getsockname()[1])
        assert process.end(30) == 2
    assert [line for line in process.lines if line.startswith("jaxpaged:")] == [
        f"jaxpaged: cannot listen on 127.0.0.1:{taken_port(process)}: address already in use; choose another with --port or --host"
    ]
    assert "Traceback" not in process.log


def taken_port(process):
    return re.search(r"127\.0\.0\.1:(\d+)", process.log)[1]


def test_a_model_that_cannot_be_loaded_is_exit_code_2(start):
    process = start(state="loading", load_error="model.safetensors is truncated")
    assert process.end(30) == 2
    assert "jaxpaged: model.safetensors is truncated" in process.log
    assert "Traceback" not in process.log


def test_an_engine_that_dies_ends_the_process_with_70(start):
    process = start(fail_after_s=1.0, step_s=0.05).ready()
    streams = Streams(process.url, 4, 2000)
    assert process.end(10) == 70
    streams.join()
    assert all(b'"error"' in text and b"[DONE]" not in text for text in streams.texts)


def test_the_network_without_a_key_is_a_warning(start):
    process = start(host="0.0.0.0").ready()
    assert "open to the network without a key" in process.log
    assert process.url.startswith("http://127.0.0.1:")
    quiet = start(host="0.0.0.0", api_key=["sk-secret-canary"]).ready()
    assert "without a key" not in quiet.log
    assert "canary" not in quiet.log


def test_a_unix_socket(start, tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as gone:
        gone.bind(path)  # a server that died left its socket
    process = start(uds=path)
    process.wait_for("ready")
    assert Path(path).stat().st_mode & 0o777 == 0o600
    with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://localhost") as client:
        assert client.get("/livez").status_code == 200
    second = start(uds=path)
    assert second.end(30) == 2
    assert "another server is using it" in second.log
    process.signal(signal.SIGTERM)
    assert process.end(10.0) == 0
    assert not Path(path).exists()


def test_who_may_call_a_server_as_it_is_started(start, tmp_path):
    """On loopback without a key: its own names; through a UNIX socket or with a key: any; and only the keys that were given."""

    def status(process, host, path="/version", **headers):
        transport = httpx.HTTPTransport(uds=process.script.get("uds"))
        with httpx.Client(transport=transport, base_url=process.url if "uds" not in process.script else "http://any") as client:
            return client.get(path, headers={"host": host} | headers).status_code

    port = _free_port()
    local = start(port=port, allowed_hosts=["llm.example.com"]).ready()
    assert [status(local, host) for host in (f"127.0.0.1:{port}", "localhost", "llm.example.com", "evil.example")] == [200, 200, 200, 403]
    by_path = start(uds=str(tmp_path / "s"))
    by_path.wait_for("ready")
    assert [status(by_path, host) for host in ("localhost", "llm.example.com")] == [200, 200]
    assert status(by_path, "any", origin="http://evil.example") == 403
    (tmp_path / "keys").write_text("sk-from-file\n")
    (tmp_path / "keys").chmod(0o644)
    keyed = start(api_key_file=str(tmp_path / "keys")).ready()
    assert "the file of API keys can be read by other users" in keyed.log and "sk-from-file" not in keyed.log
    assert status(keyed, "any.example") == 401
    assert status(keyed, "any.example", authorization="Bearer sk-from-file") == 200
    assert start(api_key=[""]).end(30) == 2
    assert start(allowed_origins=["localhost"]).end(30) == 2


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_closes_its_half_gets_its_answer_and_one_that_is_gone_ends_its_request(start, stream, tmp_path):
    """On the event loop that a server runs on, which is not the tests'."""
    process = start(step_s=0.05, uds=str(tmp_path / "s"), log_requests=True)
    process.wait_for("ready")
    process_tcp = start(step_s=0.05).ready()
    port = int(process_tcp.url.rsplit(":", 1)[1])

    def connect(server):
        if server is process_tcp:
            return socket.create_connection(("127.0.0.1", port), timeout=20)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(20)
        connection.connect(server.script["uds"])
        return connection

    def request(tokens):
        body = json.dumps({"model": "echo", "prompt": "x" * tokens, "max_tokens": tokens, "stream": stream}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        return head % len(body) + body

    def load(server):
        transport = httpx.HTTPTransport(uds=server.script.get("uds"))
        with httpx.Client(transport=transport, base_url=f"http://localhost:{port}") as client:
            return client.get("/load").json()["server_load"]

    for server in (process, process_tcp):
        with connect(server) as half:
            half.sendall(request(20))
            half.shutdown(socket.SHUT_WR)
            received = b"".join(iter(lambda half=half: half.recv(65536), b""))
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert received.count(b'"text":"x"') == 20 if stream else b"x" * 20 in received
        gone = [connect(server) for _ in range(20)]
        for connection in gone:
            connection.sendall(request(2000))
        deadline = time.monotonic() + 20
        while load(server) < 20:
            assert time.monotonic() < deadline
        for connection in gone:
            connection.close()
        while load(server):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_tls(start, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            key,
            "-out",
            certificate,
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
        ],
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("no openssl command to make a certificate with")
    process = start(ssl_keyfile=str(key), ssl_certfile=str(certificate)).ready()
    assert process.url.startswith("https://")
    assert httpx.get(process.url + "/livez", verify=False).status_code == 200
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        http.client.HTTPSConnection(process.url.removeprefix("https://"), context=old, timeout=5).request("GET", "/livez")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ssl_keyfile": "nowhere.pem"}, "ssl_keyfile needs ssl_certfile"),
        ({"ssl_certfile": "nowhere.pem"}, "ssl_certfile nowhere.pem cannot be read"),
        ({"host": "256.256.256.256"}, "cannot"),
        ({"host": "192.0.2.1"}, "cannot listen on 192.0.2.1"),
        ({"uds": "/nowhere/at/all"}, "cannot listen on the UNIX socket"),
        ({"uds": __file__}, "not a socket"),
    ],
)
def test_addresses_and_files_that_do_not_work(config, message):
    from jaxpaged.server.serve import run

    with pytest.raises(ConfigError, match=message):
        run(None, ServerConfig(**({"port": 0} | config)))


def test_addresses():
    with bind(ServerConfig(port=0)) as listener:
        assert is_loopback(listener)
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url_of(listener, ServerConfig()))
    with bind(ServerConfig(port=0, host="0.0.0.0")) as listener:
        assert not is_loopback(listener)


def test_no_text_key_or_header_is_ever_logged(start):
    """Canaries in every place where a client can put text; none may come back in the log."""
    process = start(log_requests=True, api_key=["sk-canary-key"], uvicorn_log_level="debug").ready()
    key = {"authorization": "Bearer sk-canary-key", "x-canary": "canary-header", "user-agent": "canary-agent"}
    good = {"model": "echo", "prompt": "canary-prompt", "stop": "canary-stop", "user": "canary-user"}
    bodies = [good, good | {"stream": True}, good | {"temperature": "canary"}, good | {"canary-field": 1}, good | {"model": "canary-model"}]
    with httpx.Client(base_url=process.url) as client:
        for body in bodies:
            client.post("/v1/completions", json=body, headers=key)
        client.post("/v1/completions", json=good, headers=key | {"authorization": "Bearer canary-wrong"})
        client.get("/canary-path?canary-query=1", headers=key)
        client.post("/v1/completions", content=b"canary-raw", headers=key)
        metrics = client.get("/metrics", headers=key).text
    with socket.create_connection(("127.0.0.1", int(process.url.rsplit(":", 1)[1]))) as raw:
        raw.sendall(b"canary nonsense\r\n\r\n")
        raw.recv(1000)
    process.signal(signal.SIGTERM)
    assert process.end(10.0) == 0
    assert "canary" not in process.log
    assert "canary" not in metrics
    assert len(re.findall(r"request [0-9a-f]{32}: 1 choices, 13 prompt \+ \d+ output tokens", process.log)) == 3


def test_json_log(start):
    process = start(log_format="json", log_requests=True)
    process.wait_for("ready")
    lines = [json.loads(line) for line in process.lines if line.startswith("{")]
    assert any("ready" in line["message"] for line in lines)
    assert all(set(line) == {"time", "level", "logger", "message"} for line in lines)


def test_a_log_that_nobody_reads_holds_up_nothing():
    reading, writing = os.pipe()
    handler = QueuedHandler(os.fdopen(writing, "w"))
    handler.setFormatter(LineFormatter("text"))
    began = time.monotonic()
    for _ in range(MAX_QUEUED_LINES + 2000):
        handler.emit(logging.makeLogRecord({"msg": "x" * 200, "levelno": logging.INFO}))
    handler.finish(0.1)
    assert time.monotonic() - began < 5.0
    assert handler.dropped > 1000
    os.close(reading)


def test_the_periodic_line_is_vllms_and_silent_when_idle():
    report = _Report(EngineStats())
    assert report.line(EngineStats()) is None
    line = report.line(EngineStats(steps=5, prompt_tokens=100, generation_tokens=50, running=3, waiting=2, kv_cache_usage=0.713))
    shape = r"Engine 000: Avg prompt throughput: [\d.]+ tokens/s, Avg generation throughput: [\d.]+ tokens/s, "
    assert re.fullmatch(shape + r"Running: 3 reqs, Waiting: 2 reqs, KV cache usage: 71\.3%", line)


def test_a_line_of_text_begins_with_its_time_and_what_is_more_than_news_with_its_level():
    made = [
        LineFormatter("text").format(logging.makeLogRecord({"msg": "hello\nworld", "levelno": level, "levelname": name}))
        for level, name in ((logging.INFO, "INFO"), (logging.ERROR, "ERROR"))
    ]
    moment = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} "
    assert re.fullmatch(moment + "hello\n  world", made[0]) and re.fullmatch(moment + "error     hello\n  world", made[1])


CLOSED = """
import sys
from server_fakes import FakeAsyncEngine
from jaxpaged import cli
from jaxpaged.commands import serve
from jaxpaged.server.serve import run

serve.serve = lambda *configs, **options: run(*configs, **options, make_engine=lambda config, progress: FakeAsyncEngine())
sys.exit(cli.main(["serve", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("kind", ["text", "json"])
def test_a_server_whose_caller_has_closed_standard_streams_serves(closed, kind):
    tests, port = Path(__file__).parents[1], _free_port()
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "JAX_PLATFORMS": "cpu"}
    command = f'exec "$@" {closed}'
    program = [sys.executable, "-c", CLOSED, "--port", str(port), "--log-format", kind]
    process = subprocess.Popen(["bash", "-c", command, "bash", *program], env=environment)
    try:
        deadline = time.monotonic() + 60
        answer = None
        while answer is None:
            assert time.monotonic() < deadline and process.poll() is None
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"model": "tiny", "prompt": "x"})
            time.sleep(0.1)
        assert answer.json()["choices"][0]["text"] == "x"
        targets = {number: str(Path(f"/proc/{process.pid}/fd/{number}").readlink()) for number in range(3)}
        assert targets[2] == "/dev/null" and not any("socket" in target for target in targets.values())
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["text", "json"])
def test_nobody_can_forge_a_log_line(kind):
    record = logging.makeLogRecord(
        {"msg": "user %s", "args": ("\x1b[2Ja\r\nERROR forged\u2028\x9b",), "levelno": logging.WARNING, "levelname": "WARNING"}
    )
    line = LineFormatter(kind).format(record)
    assert not any((ord(letter) < 32 and letter != "\n") or ord(letter) in (0x7F, 0x9B, 0x2028) for letter in line)
    assert not any(part.startswith("ERROR") for part in line.splitlines())


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def _until_bound(process, port=None):
    deadline = time.monotonic() + 30
    port = port or process.script["port"]
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{port}/health")
        time.sleep(0.05)
    raise AssertionError("the port was never bound")
