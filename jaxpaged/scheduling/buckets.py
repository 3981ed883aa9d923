"""The few sizes of step that are compiled.

The family has one dimension: a program is named by its number of tokens T alone. A step of T tokens can hold no more than T rows, nor
more than ``max_num_seqs``, so its rows are padded to the smaller of the two, and a decode-only step (T = rows) wastes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxpaged.errors import ConfigError


def token_buckets(max_num_batched_tokens: int, max_num_seqs: int, explicit: Iterable[int] | None = None) -> tuple[int, ...]:
    """Returns the token counts to compile for, ascending; the last is ``max_num_batched_tokens``.

    By default these are the powers of two from 1, so that padding less than doubles a step, and ``max_num_seqs``, so that the step
    in which every sequence decodes, the commonest one under load, is not padded at all.

    Args:
        max_num_batched_tokens: Most tokens of a step.
        max_num_seqs: Most rows of a step.
        explicit: Token counts to use instead.

    Raises:
        ConfigError: An explicit bucket could never be used, or the largest is not the largest step.
    """
    if explicit is None:
        powers = (1 << exponent for exponent in range(max_num_batched_tokens.bit_length()))
        buckets = sorted({*powers, min(max_num_seqs, max_num_batched_tokens), max_num_batched_tokens})
    else:
        buckets = sorted(set(explicit))
        if not buckets or buckets[0] < 1 or buckets[-1] != max_num_batched_tokens:
            shown = ", ".join(map(str, buckets)) or "none"
            raise ConfigError(f"token_buckets must be positive and end with max_num_batched_tokens ({max_num_batched_tokens}); got {shown}")
    return tuple(buckets)


def slot_bucket(num_tokens: int, max_num_seqs: int) -> int:
    """Returns the padded number of rows S of a step of ``num_tokens`` (padded) tokens."""
    return min(num_tokens, max_num_seqs)
