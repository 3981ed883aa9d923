"""Bytes on a real socket: framing attacks, slow clients, disconnects, clients that do not read."""

import contextlib
import json
import re
import select
import socket
import struct
import threading
import time

import httpx
import pytest
from server_fakes import FakeAsyncEngine
from server_harness import LoopbackServer, until

from jaxpaged.config import ServerConfig
from jaxpaged.server import body as body_module
from jaxpaged.server import service as service_module
from jaxpaged.server.callers import Callers
from jaxpaged.server.http import GuardedProtocol
from jaxpaged.server.text_pool import SMALL_BODY_BYTES

BODY = b'{"model":"echo","prompt":"ok","max_tokens":2}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
TAIL = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def wire():
    server = LoopbackServer(FakeAsyncEngine())
    yield server
    server.close()


def exchange(server, data, *, timeout=5.0):
    """Sends bytes and returns all that comes back until the server closes or stays silent."""
    with server.connect() as connection:
        connection.settimeout(timeout)
        received = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server may close before it has read all
            connection.sendall(data)
        try:
            while chunk := connection.recv(65536):
                received += chunk
        except (TimeoutError, ConnectionResetError):
            pass
        return received


def read_answer(connection):
    """Reads one whole answer and no byte of the next: its head and its body may come in pieces."""
    with connection.makefile("rb", buffering=0) as stream:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = stream.read(1)
            assert byte, head
            head += byte
        length = int(re.search(rb"(?i)\r\ncontent-length: (\d+)", head)[1])
        body = b""
        while len(body) < length:
            body += stream.read(length - len(body))
    return head + body


def status_of(received):
    assert received.startswith(b"HTTP/1.1 "), received
    return int(received[9:12])


SMUGGLING = {
    "length and chunked": HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two different lengths": HEAD + b"Content-Length: 45\r\nContent-Length: 5\r\n\r\n" + BODY,
    "two equal lengths": HEAD + b"Content-Length: 45\r\nContent-Length: 45\r\n\r\n" + BODY,
    "list of lengths": HEAD + b"Content-Length: 45, 45\r\n\r\n" + BODY,
    "length with a plus": HEAD + b"Content-Length: +45\r\n\r\n" + BODY,
    "negative length": HEAD + b"Content-Length: -45\r\n\r\n" + BODY,
    "hexadecimal length": HEAD + b"Content-Length: 0x2d\r\n\r\n" + BODY,
    "length with text": HEAD + b"Content-Length: 45abc\r\n\r\n" + BODY,
    "length too long": HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n" + BODY,
    "another encoding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked not last": HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "gzip and chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "identity": HEAD + b"Transfer-Encoding: identity\r\n\r\n",
    "space before the colon": HEAD + b"Content-Length : 45\r\n\r\n" + BODY,
    "folded header": HEAD + b"X: a\r\n b\r\nContent-Length : 45\r\n\r\n" + BODY,
    "NUL in a header": HEAD + b"X: a\x00b\r\nContent-Length: 45\r\n\r\n" + BODY,
    "NUL in a name": HEAD + b"X\x00: a\r\nContent-Length: 45\r\n\r\n" + BODY,
    "bare CR in a header": HEAD + b"X: a\rContent-Length: 45\r\n\r\n" + BODY,
    "chunk size with 0x": HEAD + b"Transfer-Encoding: chunked\r\n\r\n0x2d\r\n" + BODY + b"\r\n0\r\n\r\n",
    "chunk size with a plus": HEAD + b"Transfer-Encoding: chunked\r\n\r\n+2d\r\n" + BODY + b"\r\n0\r\n\r\n",
    "chunk size that overflows": HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
    "chunk size empty": HEAD + b"Transfer-Encoding: chunked\r\n\r\n\r\n" + BODY,
    "chunk without its end": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n" + BODY + b"\r\n0\r\n\r\n",
    "no version": b"GET /version\r\n\r\n",
    "unknown version": b"GET /version HTTP/3.7\r\nHost: localhost\r\n\r\n",
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 64,
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "unknown method": b"BREW /version HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "space in the path": b"GET /ver sion HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no host": b"GET /version HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /version HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "host with a path": b"GET /version HTTP/1.1\r\nHost: a/livez?\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLING)
def test_what_can_be_read_in_two_ways_is_refused_and_nothing_behind_it_is_answered(wire, name):
    received = exchange(wire, SMUGGLING[name] + (b"" if "host" in name else TAIL), timeout=3.0)
    assert status_of(received) == 400, received
    assert received.count(b"HTTP/1.1 ") == 1, received
    head, _, body = received.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert b"x-request-id: " in head.lower()
    assert not wire.engine.running
    assert httpx.post(wire.url + "/v1/completions", json=json.loads(BODY)).json()["choices"][0]["text"] == "ok"


def test_pipelined_requests_are_answered_in_order(wire):
    request = HEAD + b"Content-Length: 45\r\n\r\n" + BODY
    received = exchange(wire, request + TAIL + request, timeout=3.0)
    assert received.count(b"HTTP/1.1 200 ") == 3
    assert received.index(b"text_completion") < received.index(b'{"version"') < received.rindex(b"text_completion")


def test_chunked_body_with_extensions_and_trailers_is_one_body(wire):
    data = HEAD + b"Transfer-Encoding: chunked\r\n\r\n10;a=b\r\n" + BODY[:16] + b"\r\n1d\r\n" + BODY[16:] + b"\r\n0\r\nX: y\r\n\r\n"
    received = exchange(wire, data + TAIL, timeout=3.0)
    assert received.count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /version HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 20_000 + b"\r\n\r\n", 431),
        (b"GET /version HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000, 431),
        (b"GET /version HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 101 + b"\r\n", 431),
        (b"GET /version HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 100_000, 431),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"GET /" + b"x" * 200_000, 414),
        (b"X" * 200_000, 400),
    ],
    ids=["header", "endless header", "headers", "endless headers", "url", "endless url", "no request"],
)
def test_heads_that_are_too_large(wire, head, status):
    received = exchange(wire, head)
    # A client that keeps sending may see the connection reset before it reads the answer.
    assert received == b"" or status_of(received) in (status, 431), received[:200]
    if len(head) < 60_000:
        assert status_of(received) == status
        assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"]
    assert httpx.get(wire.url + "/version").status_code == 200


def test_a_head_in_small_pieces_is_one_head(wire):
    with wire.connect() as connection:
        for byte in HEAD + b"Content-Length: 45\r\n\r\n" + BODY:
            connection.sendall(bytes([byte]))
        assert status_of(read_answer(connection)) == 200


class Hasty(GuardedProtocol):
    HEAD_TIMEOUT_S = 0.5
    STALL_TIMEOUT_S = 0.7


def test_slow_heads_are_cut_off_and_harm_nobody(make_server):
    server = make_server(protocol=Hasty)
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    began = time.monotonic()
    for connection in slow[:25]:
        connection.sendall(b"GET /version HT")
    assert httpx.get(server.url + "/version").status_code == 200
    for i, connection in enumerate(slow):
        connection.settimeout(5)
        received = read_answer(connection)
        assert status_of(received) == 408, (i, received)
        assert connection.recv(1) == b""
        connection.close()
    assert time.monotonic() - began < 10.0  # one after the other they would take 30 s


def test_blank_lines_do_not_hold_a_connection_open(make_server):
    server = make_server(protocol=Hasty)
    with server.connect() as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        assert status_of(read_answer(connection)) == 200
        connection.settimeout(5)
        connection.sendall(b"\r\n")
        assert status_of(read_answer(connection)) == 408


def test_a_slow_head_behind_a_running_answer_does_not_cut_it(make_server):
    server = make_server(FakeAsyncEngine(step_s=0.05), protocol=Hasty)
    body = b'{"model":"echo","prompt":"' + b"x" * 25 + b'","max_tokens":25}'
    with server.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body + b"GET /ver")
        connection.settimeout(5)
        assert status_of(read_answer(connection)) == 200


def test_a_slow_body_is_408(make_server, monkeypatch):
    monkeypatch.setattr(body_module, "BODY_S", 0.4)
    server = make_server()
    received = exchange(server, HEAD + b"Content-Length: 45\r\n\r\n" + BODY[:10])
    assert status_of(received) == 408
    assert b"connection: close" in received


def test_a_large_body_is_refused_while_it_comes_in(make_server):
    server = make_server(config=ServerConfig(max_body_bytes=100_000))
    declared = exchange(server, HEAD + b"Content-Length: 100000000\r\n\r\n{", timeout=2.0)
    assert status_of(declared) == 413
    with server.connect() as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        try:
            while sent < 50_000_000:
                connection.sendall(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
                sent += 0x4000
        except (ConnectionResetError, BrokenPipeError):
            pass
        assert sent < 20_000_000  # what the kernel's buffers hold at most
    assert httpx.get(server.url + "/version").status_code == 200


def test_large_bodies_of_one_client_are_bounded_and_small_ones_pass(make_server, monkeypatch):
    monkeypatch.setattr(service_module, "BODIES_HELD", 8)
    server = make_server(config=ServerConfig(max_body_bytes=200_000))
    part = HEAD + b"Content-Length: 180000\r\n\r\n" + b" " * 179_000
    with server.connect() as first, server.connect() as second, server.connect() as third:
        for connection in (first, second):
            connection.sendall(part)
        until(lambda: server.service._bodies.held_bytes == 2 * (179_000 - SMALL_BODY_BYTES))
        third.sendall(part)
        assert status_of(read_answer(third)) == 429
        assert httpx.post(server.url + "/v1/completions", json=json.loads(BODY)).status_code == 200
        for connection in (first, second):
            connection.sendall(b" " * 955 + BODY)
            assert status_of(read_answer(connection)) == 200
    until(lambda: server.service._bodies.held_bytes == 0)


def test_a_drip_of_bytes_does_not_prolong_a_body(server, monkeypatch):
    monkeypatch.setattr(body_module, "BODY_S", 1.0)
    with server.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 8 and not select.select([connection], [], [], 0.1)[0]:
                connection.sendall(b" " * 100)
        assert status_of(read_answer(connection)) == 408
        assert time.monotonic() - began < 6


def send_generation(connection, **fields):
    body = json.dumps({"model": "echo", "prompt": "x" * 400, "max_tokens": 100, **fields}).encode()
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize("fields", [{}, {"n": 4}, {"prompt": ["x" * 300] * 3}], ids=["one", "n=4", "three prompts"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_goes_away_ends_its_requests(make_server, stream, fields, reset):
    server = make_server(FakeAsyncEngine(step_s=0.1))  # 10 s to the end
    with server.connect() as connection:
        send_generation(connection, stream=stream, **fields)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        until(lambda: server.engine.emitted > 5)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    until(lambda: not server.engine.running and len(server.service.calls) == 0, 5.0)
    emitted = server.engine.emitted
    time.sleep(0.3)
    assert server.engine.emitted == emitted


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_goes_away_while_it_waits(make_server, stream):
    server = make_server()
    server.engine.gate.clear()  # in the queue: no event comes
    with server.connect() as connection:
        send_generation(connection, stream=stream)
        until(lambda: server.engine.running)
    until(lambda: not server.engine.running and len(server.service.calls) == 0, 5.0)


def test_a_client_that_goes_away_in_its_body(make_server):
    server = make_server()
    with server.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 45\r\n\r\n" + BODY[:10])
        until(lambda: len(server.service.calls) == 1)
    until(lambda: len(server.service.calls) == 0, 5.0)
    assert not server.engine.submitted


def test_a_client_that_does_not_read_is_cut_off_and_holds_up_nobody(make_server):
    server = make_server(FakeAsyncEngine(max_model_len=100_000), protocol=Hasty)
    server.engine.reply = lambda request: request.prompt * 2000
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        send_generation(connection, stream=True, prompt="x" * 20, max_tokens=40_000, logprobs=20)
        until(lambda: server.engine.emitted > 50)
        until(lambda: len(server.service.calls) == 0, 8.0)
        assert server.engine.emitted < 39_000
    assert not server.engine.running
    assert httpx.post(server.url + "/v1/completions", json=json.loads(BODY)).status_code == 200


def test_a_silent_stream_gets_comments(make_server, monkeypatch):
    from jaxpaged.server import generate

    monkeypatch.setattr(generate, "PING_S", 0.15)
    server = make_server()
    server.engine.gate.clear()
    threading.Timer(0.8, lambda: server.engine.loop.call_soon_threadsafe(server.engine.gate.set)).start()
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    text = httpx.post(server.url + "/v1/chat/completions", json=body).text
    assert 2 <= text.count(": ping\n\n") <= 6
    assert text.startswith(": ping\n\n")
    assert text.endswith("data: [DONE]\n\n")


def test_many_clients_at_once(make_server):
    server = make_server(FakeAsyncEngine(step_s=0.001))
    answers = {}

    def ask(i):
        body = {"model": "echo", "prompt": f"client {i}", "max_tokens": 50}
        answers[i] = httpx.post(server.url + "/v1/completions", json=body, timeout=30).json()["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: f"client {i}" for i in range(60)}
    until(lambda: not server.engine.running)  # closed just after the last byte is sent


def head_and_body(received):
    head, _, body = received.partition(b"\r\n\r\n")
    return head.lower(), body


def post(path, version=b"1.1", headers=b"", **fields):
    body = json.dumps({"model": "echo", "prompt": "page", "max_tokens": 4, **fields}).encode()
    head = b"POST %s HTTP/%s\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n"
    return head % (path, version, len(body), headers) + body


@pytest.mark.parametrize("connection", [b"", b"Connection: keep-alive\r\n", b"Connection: close\r\n"], ids=["plain", "keep-alive", "close"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_of_http_1_0_gets_a_body_without_chunks_that_ends_with_the_connection(wire, stream, connection):
    began = time.monotonic()
    head, body = head_and_body(exchange(wire, post(b"/v1/completions", b"1.0", connection, stream=stream, n=2)))
    assert time.monotonic() - began < 4.0  # the connection was closed; nobody waited for silence
    assert head.startswith(b"http/1.1 200 ") and b"transfer-encoding" not in head and b"\r\nconnection: close" in head
    if stream:
        blocks = body.split(b"\n\n")
        assert blocks.pop() == b"" and blocks.pop() == b"data: [DONE]"
        assert all(block.startswith(b"data: {") for block in blocks)
    else:
        assert [choice["text"] for choice in json.loads(body)["choices"]] == ["page", "page"]
        assert b"content-length: %d" % len(body) in head


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("path", [b"/version", b"/metrics", b"/v1/models", b"/nowhere"])
def test_head_and_get_of_both_versions_have_the_same_head(wire, method, path):
    """A HEAD has no body in either version, and the length that the GET would have."""
    lengths = set()
    for version in (b"1.0", b"1.1"):
        head, body = head_and_body(
            exchange(wire, b"%s %s HTTP/%s\r\nHost: localhost\r\nConnection: close\r\n\r\n" % (method, path, version))
        )
        assert head.startswith(b"http/1.1 404 " if path == b"/nowhere" else b"http/1.1 200 ")
        length = int(re.search(rb"\r\ncontent-length: (\d+)", head)[1])
        assert len(body) == (0 if method == b"HEAD" else length)
        lengths.add(length)
    assert path == b"/metrics" or len(lengths) == 1


def test_an_error_in_the_middle_of_a_stream_reaches_a_client_of_http_1_0(make_server):
    server = make_server()
    server.engine.fail_at = (2, "internal_error")
    head, body = head_and_body(exchange(server, post(b"/v1/completions", b"1.0", stream=True)))
    assert head.startswith(b"http/1.1 200 ") and b'{"error":' in body.split(b"\n\n")[-2] and b"[DONE]" not in body


UPGRADES = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n",
    "h2c, twice": b"Connection: Upgrade\r\nUpgrade: h2c\r\nConnection: upgrade\r\nUpgrade: TLS/1.2\r\n",
    "websocket": b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    "unknown": b"Upgrade: something-else\r\nConnection: UPGRADE\r\n",
}


@pytest.mark.parametrize("cut", [None, 30, 150, -4, -1], ids=["at once", "in the head", "in the head too", "in the body", "at the end"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("name", UPGRADES)
def test_a_request_to_upgrade_is_answered_as_if_it_had_not_asked(wire, name, framing, cut):
    request = post(b"/v1/completions", headers=UPGRADES[name])
    if framing == "chunked":
        head, _, body = request.partition(b"\r\n\r\n")
        head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
        request = head + b"\r\n\r\n" + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    with wire.connect() as connection:
        for _ in range(2):  # the connection is good for another one
            connection.sendall(request[:cut])
            if cut is not None:
                time.sleep(0.05)
                connection.sendall(request[cut:])
            answer = read_answer(connection)
            assert status_of(answer) == 200 and b'"text":"page"' in answer
            assert b"upgrade" not in answer.lower()


@pytest.mark.parametrize("count", [3, 400])
def test_pipelined_requests_to_upgrade_are_all_answered(wire, count):
    request = b"GET /version HTTP/1.1\r\nHost: localhost\r\n" + UPGRADES["h2c"] + b"\r\n"
    received = exchange(wire, request * count + TAIL.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), timeout=10.0)
    assert received.count(b"HTTP/1.1 200 ") == count + 1


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_an_upgrade_on_a_connection_that_closes(wire, version):
    headers = UPGRADES["h2c"] + b"Connection: close\r\n"
    head, body = head_and_body(exchange(wire, post(b"/v1/completions", version, headers)))
    assert head.startswith(b"http/1.1 200 ") and json.loads(body)["choices"][0]["text"] == "page"


@pytest.mark.parametrize("name", ["length and chunked", "two different lengths", "another encoding", "chunk size with a plus", "no host"])
def test_a_request_to_upgrade_is_refused_for_what_any_other_is(wire, name):
    data = SMUGGLING[name].replace(b"\r\n", b"\r\n" + UPGRADES["h2c"], 1)
    received = exchange(wire, data + (b"" if "host" in name else TAIL), timeout=3.0)
    assert status_of(received) == 400 and received.count(b"HTTP/1.1 ") == 1, received


def test_connect_is_refused(wire):
    received = exchange(wire, b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n" + TAIL)
    assert status_of(received) == 400 and b"no proxy" in received and received.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("upgrade", [b"", UPGRADES["h2c"]], ids=["plain", "upgrade"])
def test_a_client_that_waits_for_100_continue_gets_it_before_it_sends_its_body(wire, upgrade):
    request = post(b"/v1/completions", headers=b"Expect: 100-continue\r\n" + upgrade)
    head, _, body = request.partition(b"\r\n\r\n")
    with wire.connect() as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert status_of(read_answer(connection)) == 200
    refused = exchange(wire, head.replace(b"application/json", b"text/plain") + b"\r\n\r\n", timeout=1.0)
    assert status_of(refused) == 415  # and no invitation to send the body
    old = exchange(wire, request.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert status_of(old) == 200, "a client of HTTP/1.0 knows no 100"


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("wait_s", [0.0, 0.8], ids=["at once", "slowly"])
def test_a_client_that_closes_its_half_behind_its_request_gets_the_answer(make_server, stream, version, wait_s):
    server = make_server(FakeAsyncEngine(step_s=0.1))
    if wait_s:
        server.engine.gate.clear()  # no token for longer than the first bytes of the head take
        threading.Timer(wait_s, lambda: server.engine.loop.call_soon_threadsafe(server.engine.gate.set)).start()
    with server.connect() as connection:
        connection.sendall(post(b"/v1/completions", version, stream=stream))
        connection.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: connection.recv(1000), b""))
    head, body = head_and_body(received)
    assert head.startswith(b"http/1.1 200 ok\r\n") and b"\r\nconnection: close" in head
    if stream:
        assert b"data: [DONE]\n\n" in body and len(re.findall(rb'"text":"."', body)) == 4
    else:
        assert json.loads(body)["choices"][0]["text"] == "page"
    until(lambda: not server.engine.running and len(server.service.calls) == 0)


def test_a_client_that_closes_its_half_behind_several_requests_gets_all_answers(make_server):
    server = make_server(FakeAsyncEngine(step_s=0.15))
    with server.connect() as connection:
        connection.sendall(post(b"/v1/completions") + post(b"/v1/completions", stream=True) + post(b"/v1/completions") + TAIL + b"GET /ver")
        connection.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: connection.recv(1000), b""))
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 4 and received.count(b'"text":"page"') == 2
    assert received.count(b"data: [DONE]") == 1 and received.count(b'{"version"') == 1


@pytest.mark.parametrize("error", ["unknown model", "refused late"])
def test_a_client_that_closes_its_half_gets_errors_too(make_server, error):
    server = make_server()
    server.engine.refuse_late = error == "refused late"
    with server.connect() as connection:
        connection.sendall(post(b"/v1/completions", **({"model": "other"} if error == "unknown model" else {})))
        connection.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: connection.recv(1000), b""))
    assert status_of(received) == (404 if error == "unknown model" else 429)


@pytest.mark.parametrize("closed", ["first", "later", "with the answer unread"])
def test_a_client_that_closes_its_half_and_then_goes_away_ends_its_request(make_server, closed):
    server = make_server()
    server.engine.gate.clear()
    with server.connect() as connection:
        connection.sendall(post(b"/v1/completions"))
        until(lambda: server.engine.running)
        if closed != "first":
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b"H"
            if closed == "later":
                connection.recv(100)
    until(lambda: not server.engine.running and len(server.service.calls) == 0, 5.0)


@pytest.mark.parametrize("first", [{}, {"stream": True}], ids=["whole", "stream"])
def test_a_client_that_goes_away_ends_the_request_in_front_of_the_one_it_sent_last(make_server, first):
    server = make_server()
    server.engine.gate.clear()
    with server.connect() as connection:
        connection.sendall(post(b"/v1/completions", **first) + post(b"/v1/completions"))
        until(lambda: server.engine.running and server.engine.loop)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    until(lambda: not server.engine.running and len(server.service.calls) == 0, 5.0)
    assert len(server.engine.submitted) == 1


def test_a_client_that_closes_its_half_and_goes_away_after_some_of_its_answers_ends_the_next_request(make_server):
    server = make_server(FakeAsyncEngine(step_s=0.1))

    def hold_the_last(request):
        if len(server.engine.submitted) == 2:
            server.engine.gate.clear()
        return request.prompt

    server.engine.reply = hold_the_last
    with server.connect() as connection:
        connection.sendall(TAIL + post(b"/v1/completions") * 2)
        connection.shutdown(socket.SHUT_WR)
        for _ in range(2):
            assert status_of(read_answer(connection)) == 200
        until(lambda: len(server.engine.submitted) == 2 and server.engine.running)
    until(lambda: not server.engine.running and len(server.service.calls) == 0, 5.0)


def test_two_hundred_clients_that_go_away_leave_nothing(make_server):
    server = make_server(FakeAsyncEngine(step_s=0.02, max_calls=300))
    connections = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(200)]
    for i, connection in enumerate(connections):
        send_generation(connection, stream=bool(i % 2))
    until(lambda: len(server.engine.running) == 200)
    for i, connection in enumerate(connections):
        if i % 4 > 1:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    until(lambda: not server.engine.running and len(server.service.calls) == 0, 10.0)


@pytest.mark.parametrize(
    ("data", "status", "cause"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 64, 400, "this port speaks plain HTTP, and a client began with TLS"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "this server speaks HTTP/1.1, and a client began with HTTP/2"),
        (b"secret nonsense\r\n\r\n", 400, "not a valid HTTP request: "),
        (b"GET /version HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 20_000 + b"\r\n\r\n", 431, "at most 100 headers"),
        (SMUGGLING["two equal lengths"], 400, "not a valid HTTP request: "),
    ],
    ids=["TLS", "HTTP/2", "nonsense", "header", "lengths"],
)
def test_what_is_refused_is_logged_with_its_peer_and_cause(wire, caplog, data, status, cause):
    with wire.connect() as connection:
        peer = "{}:{}".format(*connection.getsockname())
        connection.sendall(data)
        answer = read_answer(connection)
    assert status_of(answer) == status and cause.encode() in answer
    lines = [record.getMessage() for record in caplog.records if record.name == "uvicorn.error"]
    assert [line for line in lines if line.startswith(f"refused a request of {peer} with {status}: {cause}")], lines
    assert not any("secret" in line or "Invalid HTTP request" in line for line in lines)


@pytest.mark.parametrize("origin", [b"http://localhost:3000", b"http://evil.example"])
@pytest.mark.parametrize("bad", [b"X: " + b"y" * 20_000, b"Content-Length: 1\r\nContent-Length: 1"], ids=["431", "400"])
def test_a_page_that_may_call_can_read_why_its_request_was_refused(make_server, origin, bad):
    server = make_server(callers=Callers(local_only=True))
    received = exchange(server, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: " + origin + b"\r\n" + bad + b"\r\n\r\n")
    assert status_of(received) in (400, 431)
    allowed = b"\r\naccess-control-allow-origin: http://localhost:3000\r\n" in received
    assert allowed == (b"localhost" in origin) and b"\r\nvary: Origin\r\n" in received
