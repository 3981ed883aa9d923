"""The next candidates of beam searches, on the device: of all beams of a request, the best ways to go on with one token.

Of each beam the 20 most likely tokens compete: twice the largest width, so that ``width`` candidates are left even if as many others end
their text (Sutskever et al., "Sequence to sequence learning with neural networks", 2014, describe the search). A request's beams are rows
side by side, so each row looks at those after it; that moves a few kilobytes, whatever the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxpaged.state import MAX_BEAM_WIDTH, TOP_LOGPROBS, RowFlag, StepInputs, has_flag


class Candidates(NamedTuple):
    """The best ways to go on with each beam search, at its first row; zeros at other rows, and everywhere if there is no search.

    Attributes:
        parents: int32 [S, 20], which of the search's rows goes on, counted from its first; best candidate first.
        token_ids: int32 [S, 20], with which token; -1 where there are no more candidates.
        scores: float32 [S, 20], the row's ``beam_score`` plus the token's log-probability; among equals the lower parent is
            first, then the lower token id.
    """

    parents: Int[Array, "S 20"]
    token_ids: Int[Array, "S 20"]
    scores: Float[Array, "S 20"]


def beam_candidates(top_ids: Int[Array, "S W"], top_logprobs: Float[Array, "S W"], inputs: StepInputs) -> Candidates:
    """Returns the candidates of the rows with RowFlag.BEAM; costs nothing if there are none.

    Args:
        top_ids: The most likely tokens of each row, best first, at least 20; -1 past the vocabulary's end. As ``sampling.sampled_logprobs``
            finds them for rows with RowFlag.LOGPROBS, which rows with RowFlag.BEAM must carry too.
        top_logprobs: Their log-probabilities in the model's own distribution.
        inputs: The step's flags, ``beam_index`` and ``beam_score``.
    """
    beams = has_flag(inputs.flags, RowFlag.BEAM)
    top_ids, top_logprobs = top_ids[:, :TOP_LOGPROBS], top_logprobs[:, :TOP_LOGPROBS]
    return lax.cond(jnp.any(beams), lambda: _find(top_ids, top_logprobs, inputs, beams), lambda: _nothing(inputs.num_rows))


def _nothing(rows: int) -> Candidates:
    ids = jnp.zeros((rows, TOP_LOGPROBS), jnp.int32)
    return Candidates(ids, ids, ids.astype(jnp.float32))


def _find(ids: Int[Array, "S 20"], logprobs: Float[Array, "S 20"], inputs: StepInputs, beams: Bool[Array, " S"]) -> Candidates:
    rows = inputs.num_rows
    scores = inputs.beam_score[:, None] + logprobs
    scores = jnp.where(ids >= 0, scores, -jnp.inf)
    ids, scores = _by_score_and_id(ids, scores)

    members = jnp.arange(MAX_BEAM_WIDTH, dtype=jnp.int32)
    others = jnp.arange(rows, dtype=jnp.int32)[:, None] + members  # [S, 10]
    index = inputs.beam_index.at[others].get(mode="fill", fill_value=-1)
    same = (index == members) & beams.at[others].get(mode="fill", fill_value=False)
    pool_ids = ids.at[others].get(mode="clip")  # [S, 10, 20]
    pool_scores = jnp.where(same[:, :, None], scores.at[others].get(mode="clip"), -jnp.inf)

    # The first among equals is the lower place: the lower parent, and of one parent the lower id.
    best, places = _first(pool_scores.reshape(rows, -1))
    found = jnp.take_along_axis(pool_ids.reshape(rows, -1), places, axis=1)
    first = (beams & (inputs.beam_index == 0))[:, None]
    valid = first & (best > -jnp.inf)
    return Candidates(
        jnp.where(valid, (places // TOP_LOGPROBS).astype(jnp.int32), 0),
        jnp.where(valid, found, jnp.where(first, -1, 0)),
        jnp.where(valid, best, jnp.where(first, -jnp.inf, 0.0)),
    )


def _by_score_and_id(ids: Int[Array, "S 20"], scores: Float[Array, "S 20"]) -> tuple[Int[Array, "S 20"], Float[Array, "S 20"]]:
    """Sorts each row by score downwards, then by id upwards: two log-probabilities may round to one score.

    Counts for each candidate how many are before it; there are few, and XLA takes long to compile a sort of two keys.
    """
    mine, other = scores[:, :, None], scores[:, None, :]
    ahead = (other > mine) | ((other == mine) & (ids[:, None, :] < ids[:, :, None]))
    earlier = jnp.arange(TOP_LOGPROBS) < jnp.arange(TOP_LOGPROBS)[:, None]
    equal = (other == mine) & (ids[:, None, :] == ids[:, :, None])  # of padding only
    ranks = jnp.sum(ahead | (equal & earlier), axis=-1)  # [S, 20]
    chosen = ranks[:, None, :] == jnp.arange(TOP_LOGPROBS)[:, None]  # [S, place, candidate]
    return jnp.sum(jnp.where(chosen, ids[:, None, :], 0), axis=-1), jnp.max(jnp.where(chosen, scores[:, None, :], -jnp.inf), axis=-1)


def _first(scores: Float[Array, "S 200"]) -> tuple[Float[Array, "S 20"], Int[Array, "S 20"]]:
    """Returns the best scores and their places, the lower place first among equals; any place where only -inf is left.

    What ``lax.top_k`` does, one after the other: a sort takes a TPU's compiler two seconds, and comparing all with all takes a CPU 12 ms
    for 64 rows.
    """
    places = jnp.arange(scores.shape[1], dtype=jnp.int32)

    def pick(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        left, best, chosen = state
        value = jnp.max(left, axis=1, keepdims=True)
        place = jnp.min(jnp.where(left == value, places, scores.shape[1]), axis=1, keepdims=True)
        best = lax.dynamic_update_slice_in_dim(best, value, i, axis=1)
        chosen = lax.dynamic_update_slice_in_dim(chosen, place, i, axis=1)
        return jnp.where(places == place, -jnp.inf, left), best, chosen

    empty = scores[:, :TOP_LOGPROBS]
    _, best, chosen = lax.fori_loop(0, TOP_LOGPROBS, pick, (scores, empty, jnp.zeros(empty.shape, jnp.int32)))
    return best, chosen
