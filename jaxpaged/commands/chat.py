"""``jaxpaged chat [MODEL]``: talk in the terminal, with a model loaded here or, with ``--url``, with a running server.

``--quick TEXT`` asks once and ends. In a conversation ``/help`` lists the commands; Ctrl-C stops an answer, and at the prompt ends the
chat, as Ctrl-D does. A line that begins with a space goes to the model as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import sys
import time
from collections.abc import Sequence

from jaxpaged.commands.chat_remote import RemoteModel
from jaxpaged.commands.sampling_flags import add_sampling_flags, read_sampling_flags
from jaxpaged.commands.talker import Message, Talker
from jaxpaged.config import EngineConfig, suggest
from jaxpaged.errors import ConfigError, JaxpagedError
from jaxpaged.flags import Parser, add_options, given_options, options_without_effect, read_options, say

with contextlib.suppress(ImportError):
    import readline  # noqa: F401 - input() edits lines with it

COMMANDS = {
    "/help": "list these commands",
    "/clear": "begin another conversation",
    "/exit": "leave; so do exit, quit, Ctrl-D, and Ctrl-C at the prompt",
}
_SYNONYMS = {"/new": "/clear", "/quit": "/exit", "exit": "/exit", "quit": "/exit"}


def run(argv: Sequence[str]) -> int:
    """Holds one conversation; returns the exit code."""
    parser = Parser(prog="jaxpaged chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = parser.add_argument_group("chat")
    own.add_argument("--quick", dest="own_quick", metavar="TEXT", help="send this message, print the answer, end")
    own.add_argument("--system", dest="own_system", metavar="TEXT", help="system message")
    own.add_argument(
        "--stats", dest="own_stats", action="store_true", help="print time to first token and tokens per second after each answer"
    )
    own.add_argument("--url", dest="own_url", metavar="URL", help="talk to this server, to its first model or the one named MODEL")
    own.add_argument("--api-key", dest="own_api_key", metavar="TEXT", help="key for --url")
    add_sampling_flags(own)
    add_options(parser, EngineConfig)
    args = parser.parse(argv)
    sampling = read_sampling_flags(args)
    if args.own_url:
        return _converse(RemoteModel(args.own_url, args.own_api_key, _model_of_server(args), sampling), args)
    if args.own_api_key:
        raise ConfigError("--api-key is the key for --url, which is not given")
    (config,) = read_options(args, EngineConfig)
    for note in options_without_effect(args, EngineConfig):
        say(note)
    # Loaded only here: it brings JAX, which takes seconds that a chat with a server need not wait.
    with importlib.import_module("jaxpaged.commands.chat_local").load_model(config, sampling) as talker:
        return _converse(talker, args)


def _model_of_server(args: argparse.Namespace) -> str | None:
    """Returns the model's name, if one is given; raises ConfigError for options of a model that is loaded here."""
    given = given_options(args)
    model: str | None = args.model_argument or given.pop("model", None)
    if args.config or given:
        names = ["config"] if args.config else [name.replace("_", "-") for name in given]
        raise ConfigError(f"--{names[0]} is for a model that is loaded here, and --url talks to a server")
    return model


def _converse(talker: Talker, args: argparse.Namespace) -> int:
    """Asks once with ``--quick``, else reads and answers until told to leave; returns the exit code."""
    opening: list[Message] = [{"role": "system", "content": args.own_system}] if args.own_system else []
    if args.own_quick is not None:
        try:
            _print_answer(talker, [*opening, {"role": "user", "content": args.own_quick}], [], stats=args.own_stats)
        except JaxpagedError as error:
            say(str(error))
            return 1
        return 0
    messages = list(opening)
    _tell(f"{talker.introduction}\n/help lists commands, Ctrl-C stops an answer, Ctrl-D or /exit leaves.")
    while (line := _read_line()) is not None:
        command = _command(line)
        if command == "/exit":
            break
        if command == "/clear":
            messages = list(opening)
            _tell("another conversation begins")
        elif command == "/help":
            _tell("\n".join(f"{name:8} {meaning}" for name, meaning in COMMANDS.items()))
        elif command is not None:
            _tell(
                f"there is no command {command}{suggest(command, COMMANDS)}; /help lists them, and a space before it sends it to the model"
            )
        elif line.strip():
            _ask(talker, messages, line.strip(), stats=args.own_stats)
    return 0


def _read_line() -> str | None:
    """Returns what is typed; None at the end of input. Ctrl-C raises KeyboardInterrupt at once, since no event loop runs here."""
    try:
        return input("> ")
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        raise


def _command(line: str) -> str | None:
    """Returns the command that a line is, known or not; None for what goes to the model."""
    if line.strip().lower() in _SYNONYMS and not line.startswith(" "):
        return _SYNONYMS[line.strip().lower()]
    word = line.split(maxsplit=1)[0] if line.startswith("/") else ""
    return word if re.fullmatch(r"/[\w?-]*", word) else None


def _ask(talker: Talker, messages: list[Message], text: str, *, stats: bool) -> None:
    """Lets the conversation go on by a question and its answer, or what of it was shown when Ctrl-C came."""
    shown: list[str] = []
    messages.append({"role": "user", "content": text})
    try:
        _print_answer(talker, messages, shown, stats=stats)
    except KeyboardInterrupt:
        print()
        _tell("stopped; Ctrl-C at the prompt leaves")
    except JaxpagedError as error:
        if shown:
            print()
        say(str(error))
        messages.pop()
        return
    messages.append({"role": "assistant", "content": "".join(shown)})


def _print_answer(talker: Talker, messages: list[Message], shown: list[str], *, stats: bool) -> None:
    """Prints an answer as it comes, and adds its pieces to ``shown``."""
    start = time.perf_counter()
    first = num_tokens = None
    with contextlib.closing(talker.answer(messages)) as pieces:
        for piece in pieces:
            num_tokens = piece.num_tokens if piece.num_tokens is not None else num_tokens
            if piece.text:
                first = first or time.perf_counter()
                shown.append(piece.text)
                print(piece.text, end="", flush=True)
    print()
    if stats:
        _tell(_stats_line(start, first or time.perf_counter(), time.perf_counter(), num_tokens))


def _stats_line(start: float, first: float, end: float, num_tokens: int | None) -> str:
    """Says how fast an answer was; the three moments are in seconds."""
    begun = f"first text after {1000 * (first - start):.0f} ms"
    if num_tokens is None:
        return f"{begun}; the server does not count tokens"
    rate = f", then {(num_tokens - 1) / (end - first):.1f} tokens/s" if num_tokens > 1 and end > first else ""
    return f"{begun}{rate}; {num_tokens} tokens in {end - start:.1f} s"


def _tell(text: str) -> None:
    """Prints what is not part of an answer."""
    print(text, file=sys.stderr, flush=True)
