"""``jaxpaged generate [MODEL] --prompt TEXT``: completes prompts offline.

Prompts come from ``--prompt`` (repeatable) or, one a line, from standard input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from jaxpaged.commands.sampling_flags import add_sampling_flags, read_sampling_flags
from jaxpaged.config import EngineConfig
from jaxpaged.engine.admission import make_params
from jaxpaged.errors import ConfigError
from jaxpaged.flags import Parser, add_options, options_without_effect, read_options, say
from jaxpaged.llm import LLM


def run(argv: Sequence[str]) -> int:
    """Prints each completion, or one JSON object a line with ``--json``."""
    parser = Parser(prog="jaxpaged generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = parser.add_argument_group("generate")
    own.add_argument("--prompt", dest="own_prompts", action="append", metavar="TEXT", help="prompt to complete; may be repeated")
    own.add_argument("--json", dest="own_json", action="store_true", help="print one JSON object a line")
    add_sampling_flags(own)
    add_options(parser, EngineConfig)
    args = parser.parse(argv)
    (config,) = read_options(args, EngineConfig)
    for note in options_without_effect(args, EngineConfig):
        say(note)
    if not args.own_prompts and sys.stdin.isatty():
        say("type prompts, one a line; Ctrl-D ends them")
    prompts = args.own_prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ConfigError("no prompt: give --prompt TEXT, or one prompt a line on standard input")
    llm = LLM.from_config(config)
    params = make_params({"max_tokens": llm.get_default_sampling_params().max_tokens, **read_sampling_flags(args)}, llm.info)
    for output in llm.generate(prompts, params, use_tqdm=sys.stderr.isatty()):
        for completion in output.outputs:
            if args.own_json:
                print(json.dumps({"prompt": output.prompt, "text": completion.text, "finish_reason": completion.finish_reason}))
            else:
                print(f"{output.prompt}{completion.text}")
    return 0
