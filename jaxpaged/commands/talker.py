"""What ``jaxpaged chat`` talks to: anything that answers a conversation piece by piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Protocol

Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of an answer.

    Attributes:
        text: What is new; may be empty.
        num_tokens: Tokens of the whole answer, with its last piece, where they were counted.
    """

    text: str = ""
    num_tokens: int | None = None


class Talker(Protocol):
    """A model, here or behind a server."""

    @property
    def introduction(self) -> str:
        """Which model it is, and where it runs: one line."""
        ...

    def answer(self, messages: list[Message]) -> Generator[Piece, None, None]:
        """Yields the answer piece by piece; closing the generator, or KeyboardInterrupt in it, ends the answer.

        Raises:
            JaxpagedError: There is no answer, or no more of it.
        """
        ...
