"""Bringing a device back after a failed step, and knowing when it is back.

The runner's reset makes a new pool and runs a step of padding through the program that failed. If that step comes back, the device
computes: whatever failed was the fault of a moment or of a request, and which request is for ``scheduling.faults`` to find. If it does not,
the device fails for everybody; the reset is tried again after a pause, and after ``RESET_PAUSES_S`` the engine gives up. So neither a
request that breaks steps, however often it comes, nor a client that leaves in the middle of it ends the engine, and no client is needed to
show that the engine is well again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from jaxpaged.errors import EngineStopped

logger = logging.getLogger(__name__)

RESET_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between a reset that failed and the next; when the one after the last pause fails, the device is given up."""


class Resettable(Protocol):
    """What recovering needs of a runner."""

    def reset(self) -> None:
        """Makes the runner fit to start again from an empty pool, and runs a step of padding to see that the device computes.

        Raises:
            Exception: It does not.
        """
        ...


class Recovery:
    """Whether the device computes, as far as is known, and what is done about it. Never waits: whoever calls it does.

    Args:
        runner: Whose device.
        clock: Monotonic seconds.

    Attributes:
        pending: Something failed, and nothing has succeeded since.
    """

    def __init__(self, runner: Resettable, clock: Callable[[], float]) -> None:
        self.pending = False
        self._runner = runner
        self._clock = clock
        self._num_failed = 0
        self._next_at = 0.0

    @property
    def wait_s(self) -> float:
        """Seconds until the next ``attempt`` is due; 0 if it is now, or none is."""
        return max(0.0, self._next_at - self._clock()) if self.pending else 0.0

    def begin(self) -> None:
        """Something failed; the first reset is due at once."""
        self.pending = True
        self._num_failed = 0
        self._next_at = self._clock()

    def attempt(self) -> bool:
        """Resets the device; returns whether nothing is pending any more.

        Raises:
            EngineStopped: The last reset failed too.
        """
        try:
            self._runner.reset()
        except Exception as error:
            self._num_failed += 1
            text = one_line(error)
            if self._num_failed > len(RESET_PAUSES_S):
                raise EngineStopped(f"the device does not come back, after {self._num_failed} resets: {text}") from error
            pause_s = RESET_PAUSES_S[self._num_failed - 1]
            self._next_at = self._clock() + pause_s
            logger.error("reset %d after a failed step failed too (%s); the next one in %g s", self._num_failed, text, pause_s)
            return False
        self.pending = False
        return True


def one_line(error: Exception) -> str:
    """Returns the beginning of an error's text, without line breaks."""
    return " ".join(str(error).split())[:300]
