"""What is counted at each step, and the figures made of it: one definition for pages and for contiguous reservation alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple


class Sample(NamedTuple):
    """The memory while one step runs; all but ``requests`` and ``waits`` are cells, each with room for one token's keys and values.

    Attributes:
        tokens: Cells that hold a token, those that the step writes included; a cell with several readers counts once.
        to_come: Allocated cells without a token now, which its owner will write later.
        allocated: Cells that belong to a request, or still wait for a step that reads them; shared ones count once.
        unshared: What would be allocated if each sequence had its own copy of what it shares.
        requests: Requests that run.
        waits: Whether the next request in line is not let in for want of memory (and of nothing else).
    """

    tokens: int
    to_come: int
    allocated: int
    unshared: int
    requests: int
    waits: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What a run comes to. Shares are in [0, 1] and are sums over steps divided by sums over steps, each step counting the same.

    Attributes:
        steps: Steps until the last request was answered.
        waiting_steps: Those in which a request waited for memory: the memory was as full as the system can make it.
        used: Cells with tokens, of those allocated; all steps.
        internal_waste: 1 - used; all steps.
        tokens, to_come, never, external: How the whole memory divides in the waiting steps: cells with tokens, allocated cells that
            will be written, allocated cells that never will, and cells that nobody has although somebody waits; None without such steps.
        peak_requests: Most requests at once.
        mean_requests: Requests at once, mean of the waiting steps; of all steps if there are none.
        saved: Cells saved by sharing, of those that would be allocated without; all steps.
        peak_cells: Most cells allocated at once.
    """

    steps: int
    waiting_steps: int
    used: float
    internal_waste: float
    tokens: float | None
    to_come: float | None
    never: float | None
    external: float | None
    peak_requests: int
    mean_requests: float
    saved: float
    peak_cells: int


def summarize(samples: Sequence[Sample], num_cells: int) -> Figures:
    """Returns the figures of a run.

    Args:
        samples: One for each step; at least one.
        num_cells: Cells of the whole memory.
    """
    waiting = [sample for sample in samples if sample.waits]
    allocated = sum(sample.allocated for sample in samples)
    tokens = sum(sample.tokens for sample in samples)
    unshared = sum(sample.unshared for sample in samples)
    counted = waiting or samples
    whole = len(waiting) * num_cells

    def share(cells: int) -> float | None:
        return cells / whole if whole else None

    return Figures(
        steps=len(samples),
        waiting_steps=len(waiting),
        used=tokens / allocated,
        internal_waste=1 - tokens / allocated,
        tokens=share(sum(sample.tokens for sample in waiting)),
        to_come=share(sum(sample.to_come for sample in waiting)),
        never=share(sum(sample.allocated - sample.tokens - sample.to_come for sample in waiting)),
        external=share(sum(num_cells - sample.allocated for sample in waiting)),
        peak_requests=max(sample.requests for sample in samples),
        mean_requests=sum(sample.requests for sample in counted) / len(counted),
        saved=1 - allocated / unshared,
        peak_cells=max(sample.allocated for sample in samples),
    )
