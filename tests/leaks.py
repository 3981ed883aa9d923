"""Nothing is left: after each test, every engine that has nothing to do holds no page, no place in host memory and no slot."""

from __future__ import annotations

import functools
import weakref

from jaxpaged.engine.engine import Engine

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def watch() -> None:
    """Remembers every engine that is made from now on; idempotent."""
    make = Engine.__init__
    if hasattr(make, "__wrapped__"):
        return

    @functools.wraps(make)
    def watched(self, *args, **options):
        make(self, *args, **options)
        _engines.add(self)

    Engine.__init__ = watched


def check_idle_engines() -> int:
    """Verifies the engines that are idle, and returns how many these are; not those that died, or were left in the middle of work."""
    idle = [engine for engine in list(_engines) if engine.failed is None and not engine.has_work]
    for engine in idle:
        engine.check()
        scheduler, memory = engine.scheduler, engine.scheduler.memory
        assert memory.pages.num_free == memory.pages.num_pages - 1, "pages are neither free nor cached"
        assert memory.host is None or memory.host.pages.num_free == memory.host.pages.num_pages - 1, "places in host memory leaked"
        assert scheduler.slots.num_free == scheduler.max_num_seqs, "slots leaked"
    return len(idle)
