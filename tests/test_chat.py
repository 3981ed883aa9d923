"""``jaxpaged chat`` under a terminal: what a person types, and what Ctrl-C and Ctrl-D do, with a server and with a model of its own."""

import contextlib
import os
import re
import select
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from server_fakes import FakeAsyncEngine
from server_harness import LoopbackServer, until

from jaxpaged.cli import main
from jaxpaged.config import ServerConfig

# The first terminal that the leader of a session opens is the one whose Ctrl-C it hears.
PROGRAM = """
import os, sys
terminal = os.open(sys.argv.pop(1), os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(terminal, number)
if sys.argv[1] == "fake":
    import threading, time
    import jaxpaged.commands.chat_local
    from server_fakes import FakeAsyncEngine
    step_s, state = float(sys.argv[2]), sys.argv[3]
    class Engine(FakeAsyncEngine):
        def __init__(self, config, progress):
            super().__init__(step_s=step_s)
            self.state = state
            self.reply = lambda request: tuple(token for token in request.prompt if token < 256)
        def start(self, loop):
            print("engine started", flush=True)
        def stop(self, timeout_s):
            if self.state == "compiling":  # what it is deep in would keep an orderly exit waiting
                threading.Thread(target=time.sleep, args=(60,)).start()
                return
            print("running", len(self.running))
            super().stop()
            print("engine stopped")
    jaxpaged.commands.chat_local.AsyncEngine = Engine
    del sys.argv[1:4]
from jaxpaged.cli import main
sys.exit(main(sys.argv[1:]))
"""
CTRL_C, CTRL_D = "\x03", "\x04"
TESTS = Path(__file__).parent


class Terminal:
    """A command under a terminal of its own."""

    def __init__(self, *argv):
        self._master, slave = os.openpty()
        environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "JAX_PLATFORMS": "cpu", "TERM": "dumb"}
        command = [sys.executable, "-c", PROGRAM, os.ttyname(slave), *argv]
        self.process = subprocess.Popen(command, start_new_session=True, env=environment, stdin=subprocess.DEVNULL)
        os.close(slave)
        self.shown = ""

    def type(self, text):
        os.write(self._master, text.encode())

    def press(self, key):
        """Types a key when the command waits for one: nobody is as quick as a signal between the prompt's last byte and the read."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        if stat.exists():
            until(lambda: all(stat.read_text().rpartition(")")[2].split()[0] == "S" for _ in range(3) if time.sleep(0.02) is None))
        else:
            time.sleep(0.5)
        self.type(key)

    def expect(self, pattern, seconds=60.0):
        """Reads until the pattern comes, and forgets what was read up to its end."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.shown!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # EIO: the other side has been closed
                    self.shown += os.read(self._master, 65536).decode(errors="replace").replace("\r\n", "\n")
        before, self.shown = self.shown[: match.start()], self.shown[match.end() :]
        return before + match.group()

    def ends(self, code, seconds=20.0):
        assert self.process.wait(seconds) == code
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 65536):
                self.shown += data.decode(errors="replace").replace("\r\n", "\n")
        return self.shown

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal():
    with contextlib.ExitStack() as stack:

        def open_one(*argv):
            one = Terminal(*argv)
            stack.callback(one.close)
            return one

        yield open_one


@pytest.fixture
def server():
    engine = FakeAsyncEngine()
    engine.reply = lambda request: tuple(token for token in request.prompt if token < 256)  # without the template's special tokens
    served = LoopbackServer(engine, ServerConfig(served_model_name=("echo", "other")))
    yield served
    served.close()


@pytest.fixture(params=["server", "local"])
def chat(request, terminal):
    """Returns a function that opens a chat whose model repeats the prompt, a byte per step."""

    def open_chat(step_s, *argv):
        if request.param == "local":
            return terminal("fake", str(step_s), "ready", "chat", *argv)
        served = request.getfixturevalue("server")
        served.engine.step_s = step_s
        return terminal("chat", "--url", served.url, *argv)

    open_chat.server = request.getfixturevalue("server") if request.param == "server" else None
    return open_chat


def test_ctrl_c_at_the_prompt_ends_the_chat_at_once(chat):
    talk = chat(0.0)
    talk.expect("leaves.\n> ")
    talk.press(CTRL_C)
    shown = talk.ends(130, seconds=5.0)
    assert "Traceback" not in shown
    assert chat.server or "engine stopped" in shown


def test_ctrl_c_within_a_line_that_is_being_typed_ends_the_chat(chat):
    talk = chat(0.0)
    talk.expect("leaves.\n> ")
    talk.type("half a li")
    talk.expect("half a li")
    talk.press(CTRL_C)
    assert "Traceback" not in talk.ends(130, seconds=5.0)


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(chat):
    talk = chat(0.05)
    talk.expect("leaves.\n> ")
    talk.type("tell me\n")
    talk.expect("tell me")  # the terminal's echo
    talk.expect("user\n")  # the model's
    talk.press(CTRL_C)
    talk.expect("stopped; Ctrl-C at the prompt leaves\n> ", seconds=5.0)
    if chat.server:
        until(lambda: not chat.server.engine.running)
        chat.server.engine.step_s = 0.0
    talk.type("more\n")
    talk.expect(r"user\ntell me\nassistant\nuser\n[a-z ]*\nuser\nmore\nassistant\n\n> ")  # what was shown is part of the conversation
    talk.press(CTRL_D)
    shown = talk.ends(0)
    assert "Traceback" not in shown
    assert chat.server or "running 0" in shown


def test_ctrl_c_before_the_first_token_stops_the_answer(chat):
    talk = chat(30.0)
    talk.expect("leaves.\n> ")
    talk.type("hello\n")
    if chat.server:
        until(lambda: chat.server.engine.running)
    time.sleep(0.3)
    talk.press(CTRL_C)
    talk.expect("stopped; .*\n> ", seconds=5.0)
    talk.press(CTRL_C)
    talk.ends(130, seconds=5.0)
    if chat.server:
        until(lambda: not chat.server.engine.running)


def test_ctrl_d_ends_the_chat(chat):
    talk = chat(0.0)
    talk.expect("leaves.\n> ")
    talk.press(CTRL_D)
    assert "Traceback" not in talk.ends(0, seconds=5.0)


def test_ctrl_c_while_one_question_is_answered_ends_the_command(chat):
    talk = chat(30.0, "--quick", "hello")
    if chat.server:
        until(lambda: chat.server.engine.running, seconds=60.0)
    else:
        talk.expect("engine started")
    talk.press(CTRL_C)
    shown = talk.ends(130, seconds=10.0)
    assert "Traceback" not in shown


def test_ctrl_c_while_a_model_is_loaded_ends_the_command(terminal):
    talk = terminal("fake", "0", "loading", "chat")
    talk.expect("engine started")
    talk.press(CTRL_C)
    shown = talk.ends(130, seconds=10.0)
    assert "Traceback" not in shown
    assert "engine stopped" in shown


def test_ctrl_c_does_not_wait_for_a_compilation(terminal):
    talk = terminal("fake", "0", "compiling", "chat")
    talk.expect("engine started")
    talk.press(CTRL_C)
    assert "Traceback" not in talk.ends(130, seconds=10.0)


def test_prompts_are_asked_for_at_a_terminal(terminal):
    talk = terminal("generate")
    talk.expect("jaxpaged: type prompts, one a line; Ctrl-D ends them")
    talk.press(CTRL_D)
    assert "no prompt: give --prompt TEXT" in talk.ends(2)


def test_a_conversation(chat):
    talk = chat(0.0, "--stats", "--system", "Be brief.")
    banner = talk.expect("> ")
    assert re.search(r"echo (at http://127.0.0.1:\d+, context 512|on .*, context 512) tokens", banner)
    assert "/help lists commands, Ctrl-C stops an answer, Ctrl-D or /exit leaves." in banner
    for line, answer in (
        ("/help", r"/clear +begin another conversation"),
        ("/foo", r"there is no command /foo; /help lists them"),
        ("/hlep me", r"there is no command /hlep; did you mean '/help'\?"),
        ("", ""),
        ("one", r"system\nBe brief\.\nuser\none\nassistant\n\nfirst text after \d+ ms, then [\d.]+ tokens/s; 36 tokens in [\d.]+ s"),
        ("two", r"user\none\nassistant\n[\s\S]*user\ntwo\nassistant\n\nfirst text"),
        ("/clear", "another conversation begins"),
        ("three", r"system\nBe brief\.\nuser\nthree\nassistant\n\nfirst text"),
        ("/new", "another conversation begins"),
        ("/etc/hosts is a file", r"user\n/etc/hosts is a file\nassistant"),
        ("/clear", "another conversation begins"),
        (" /exit", r"user\n/exit\nassistant"),
        (" quit", r"user\nquit\nassistant"),
    ):
        talk.type(f"{line}\n")
        shown = talk.expect(r"> ")
        assert re.search(answer, shown), shown
    talk.type("/exit\n")
    talk.ends(0)


@pytest.mark.parametrize("word", ["exit", "QUIT", "/quit", "/exit"])
def test_words_that_leave_are_not_sent(word, server, terminal):
    talk = terminal("chat", "--url", server.url)
    talk.expect("leaves.\n> ")
    talk.type(f"{word}\n")
    talk.ends(0)
    assert not server.engine.submitted


def test_a_model_of_the_server_is_chosen_by_name(server, capsys):
    assert main(["chat", "--url", server.url.removeprefix("http://"), "other", "--quick", "hi", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == "user\n"[:4] + "\n"
    assert main(["chat", "--url", f"{server.url}/v1/", "third", "--quick", "hi"]) == 2
    assert "its models are echo, other; not third" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-model-len", "64"], "--max-model-len is for a model that is loaded here"),
        (["--enforce-eager"], "--enforce-eager is for a model that is loaded here"),
        (["--config", "x.yaml"], "--config is for a model that is loaded here"),
    ],
)
def test_options_of_a_model_that_is_loaded_are_refused_with_a_server(argv, message, server, capsys):
    assert main(["chat", "--url", server.url, "--quick", "hi", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_key_without_a_server_is_refused(capsys):
    assert main(["chat", "--api-key", "x"]) == 2
    assert "--api-key is the key for --url" in capsys.readouterr().err


def test_a_servers_refusal_and_fault_are_one_line_and_the_conversation_goes_on(server, terminal):
    talk = terminal("chat", "--url", server.url)
    talk.expect("leaves.\n> ")
    talk.type("x" * 600 + "\n")
    talk.expect(r"jaxpaged: 400: .*512.*\n> ")
    server.engine.fail_at = (3, "internal_error")
    talk.type("hi\n")
    talk.expect(r"jaxpaged: .*\n> ")
    server.engine.fail_at = None
    talk.type("hi\n")
    assert "x" * 20 not in talk.expect(r"user\nhi\nassistant\n\n> ")  # what was refused is no part of the conversation
    server.close()
    talk.type("hi\n")
    talk.expect(r"jaxpaged: http.*refused\n> ")
    talk.press(CTRL_D)
    assert "Traceback" not in talk.ends(0)


class _Other(BaseHTTPRequestHandler):
    """A server of another make: what it lists, and what it streams, come from the test."""

    listed = b'{"data": [{"id": "m"}]}'
    streamed = b""

    def do_GET(self):
        self._send(self.listed)

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self._send(self.streamed)

    def _send(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("listed", "streamed", "code", "message"),
    [
        (b"<html>", b"", 2, "does not list models as OpenAI's API does"),
        (b'{"data": {}}', b"", 2, "its models are none"),
        (b'{"data": 1}', b"", 2, "does not list models as OpenAI's API does"),
        (_Other.listed, b"", 1, "the answer broke off"),
        (_Other.listed, b"data: {\n\n", 1, "jaxpaged: http"),
        (_Other.listed, b'data: {"error": {"message": "no luck"}}\n\n', 1, "jaxpaged: no luck"),
        (_Other.listed, b'data: {"choices": [{"delta": {"content": "yes"}}]}\n\ndata: [DONE]\n\n', 0, "the server does not count tokens"),
    ],
)
def test_servers_of_another_make(listed, streamed, code, message, capsys):
    with HTTPServer(("127.0.0.1", 0), type("Handler", (_Other,), {"listed": listed, "streamed": streamed})) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            assert main(["chat", "--url", f"127.0.0.1:{other.server_port}", "--quick", "hi", "--stats"]) == code
        finally:
            other.shutdown()
            thread.join()
    assert message in capsys.readouterr().err


def test_a_chat_with_a_server_loads_no_jax():
    code = "import sys, jaxpaged.cli, jaxpaged.commands.chat; sys.exit('jax' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
