"""One request in a reserved run, and in pages: the arithmetic that a newcomer asks for first."""

from __future__ import annotations

import dataclasses

from jaxpaged.errors import ConfigError
from jaxpaged.memory.paged import PagedSetting, PagedSystem
from jaxpaged.memory.workloads import STOP_TOKEN, Call, Workload


@dataclasses.dataclass(frozen=True)
class WorkedExample:
    """What one request holds.

    Attributes:
        reserved: Tokens that a contiguous system keeps for it.
        used: Tokens that it holds.
        page_size: Tokens in a page.
        paged: Tokens that its pages, taken by the scheduler, have room for.
    """

    reserved: int
    used: int
    page_size: int
    paged: int

    @property
    def num_pages(self) -> int:
        """Pages that it holds."""
        return self.paged // self.page_size

    @property
    def contiguous_waste(self) -> float:
        """Share of what is reserved that holds nothing."""
        return 1 - self.used / self.reserved

    @property
    def paged_waste(self) -> float:
        """Share of its pages that holds nothing."""
        return 1 - self.used / self.paged


def work_example(*, reserved: int, used: int, page_size: int) -> WorkedExample:
    """Lets the scheduler serve one request and counts the pages that it holds in the end.

    Args:
        reserved: Tokens that a contiguous system would keep for it; at least ``used``.
        used: Tokens whose keys and values are stored: the first as a prompt, the rest generated.
        page_size: Tokens in a page.

    Raises:
        ConfigError: More is used than reserved.
    """
    if used > reserved:
        raise ConfigError(f"used must be at most reserved ({reserved}); got {used}")
    output = tuple(range(STOP_TOKEN + used - 1, STOP_TOKEN, -1))
    call = Call(prompt=(1,), output=(*output, STOP_TOKEN))
    setting = PagedSetting(
        num_pages=reserved // page_size + 3,
        page_size=page_size,
        max_model_len=reserved + 1,
        max_num_seqs=1,
        max_num_batched_tokens=1,
        async_depth=0,
    )
    samples = PagedSystem(Workload("one request", (call,)), setting).replay()
    return WorkedExample(reserved, samples[-1].tokens, page_size, samples[-1].allocated)
