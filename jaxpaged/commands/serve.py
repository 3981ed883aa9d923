"""``jaxpaged serve [MODEL]``: the OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpaged.config import EngineConfig, ServerConfig
from jaxpaged.flags import Parser, add_options, options_without_effect, read_options
from jaxpaged.server.serve import run as serve


def run(argv: Sequence[str]) -> int:
    """Serves until told to stop; returns the exit code."""
    parser = Parser(prog="jaxpaged serve", description=__doc__)
    add_options(parser, EngineConfig, ServerConfig)
    args = parser.parse(argv)
    engine_config, server_config = read_options(args, EngineConfig, ServerConfig)
    return serve(engine_config, server_config, notes=options_without_effect(args, EngineConfig, ServerConfig))
