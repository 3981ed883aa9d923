#!/usr/bin/env python3
"""``jaxpaged serve`` whose scheduler verifies all its invariants after every step; a broken one fails the step, which /metrics counts."""

import sys
from typing import Any

from jaxpaged.config import EngineConfig, ServerConfig
from jaxpaged.engine.async_engine import AsyncEngine
from jaxpaged.engine.progress import Progress
from jaxpaged.engine.startup import LoadedEngine, load_engine
from jaxpaged.flags import Parser, add_options, read_options
from jaxpaged.server.serve import run


def load_checked(config: EngineConfig, progress: Progress | None) -> LoadedEngine:
    """Loads an engine whose scheduler looks at its books after every step."""
    loaded = load_engine(config, progress)
    scheduler = loaded.engine.scheduler
    commit = scheduler.commit

    def checked(*args: Any) -> Any:
        events = commit(*args)
        scheduler.check()
        return events

    scheduler.commit = checked  # type: ignore[method-assign]
    return loaded


def main() -> int:
    """Serves; returns the exit code."""
    parser = Parser(prog="checked_server")
    add_options(parser, EngineConfig, ServerConfig)
    engine_config, server_config = read_options(parser.parse(sys.argv[1:]), EngineConfig, ServerConfig)
    return run(engine_config, server_config, make_engine=lambda config, progress: AsyncEngine(config, progress=progress, load=load_checked))


if __name__ == "__main__":
    sys.exit(main())
