"""Whether a preempted request is cheaper to move to host memory and back, or to compute again: measured, not guessed.

Both costs are taken as proportional: seconds per page moved there and back, and seconds per token computed in a chunk. Kwon et al.,
"Efficient memory management for large language model serving with PagedAttention" (2023), section 4.5, compare the two; which wins
depends on the page size, the model and the bus.
"""

from __future__ import annotations

_WEIGHT = 0.1
"""Share of a new measurement in the running mean of the seconds per token."""


class PreemptionCost:
    """What moving a page and computing a token cost on this machine. Written by the engine's thread alone.

    Attributes:
        seconds_per_page: To move one page to the host and back; None before it was measured.
        seconds_per_token: To compute one token among others of a chunk; None before it was measured.
    """

    def __init__(self) -> None:
        self.seconds_per_page: float | None = None
        self.seconds_per_token: float | None = None

    def moved(self, num_pages: int, seconds: float) -> None:
        """Takes in how long it took to move pages there and back with nothing else running.

        A running engine moves pages while steps run and cannot tell the one time from the other, so the warm-up measures it.
        """
        if num_pages > 0 and seconds > 0:
            self.seconds_per_page = seconds / num_pages

    def computed(self, num_tokens: int, seconds: float) -> None:
        """Takes in the duration of a step with chunks."""
        if num_tokens > 0 and seconds > 0:
            measured, before = seconds / num_tokens, self.seconds_per_token
            self.seconds_per_token = measured if before is None else before + _WEIGHT * (measured - before)

    def prefers_swap(self, num_tokens: int, num_pages: int) -> bool:
        """Returns whether moving ``num_pages`` is cheaper than computing ``num_tokens``; recomputing while nothing is known."""
        if self.seconds_per_page is None or self.seconds_per_token is None:
            return False
        return num_pages * self.seconds_per_page < num_tokens * self.seconds_per_token
