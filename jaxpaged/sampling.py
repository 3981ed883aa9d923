"""Logits and per-slot state to tokens and log-probabilities; pure, on the device.

Order of operations, as in vLLM: log-probabilities come from the raw logits; then bias and masks, suppression of stop ids,
penalties; then the most likely token, or temperature, min_p, top_k, top_p and a draw.

Nothing here sorts the vocabulary. A threshold is found bit by bit, each step one pass of comparing and adding up. Masses are
integers: a token's weight ``exp((x - max) / temperature)`` is rounded to a multiple of ``4 ** -limb_bits``, and sums of such
weights are kept exactly as two uint32 limbs. Integer addition has no order, so a row's token depends on this row's logits,
parameters, seed and position alone: not on the batch, the bucket, the slot or the platform's way of adding up.

What is as wide as the vocabulary lies in blocks ``[S, B, W]``, W = 128, from the draw on: a TPU's tiles, of which a gather takes
whole ones. A TPU's compiler takes seconds for every sort, wide gather and change of layout, in each of the step's programs, so
there is none here, and a loop serves twice where it can.

Letters: S rows, T tokens, M slots, V vocabulary, E model dimension, W most likely tokens whose log-probabilities are told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt

from jaxpaged.state import TOP_LOGPROBS, RowFlag, SamplingState, StepInputs, TokenFlag, has_flag

_FLOAT_MAX = float(np.finfo(np.float32).max)
_FLOAT_TINY = float(np.finfo(np.float32).tiny)
_BLOCK = 128
"""Tokens whose largest logit stands for them where likely tokens are looked for: the lanes of a TPU, so that blocks need no padding."""
_NEAR_BLOCKS = 128
"""Blocks that are searched for the boundary of top_k and top_p before all are; at least as many tokens are ahead of all others."""
_NONE_LEFT = -(2**31)
"""Below the ``_order`` of every logit."""
_PROMPT_CHUNK = 32
"""Prompt positions whose logits exist at one time."""


class Logprobs(NamedTuple):
    """Log-probabilities of R tokens in the model's own distribution.

    Attributes:
        logprobs: float32 [R]; -inf where the logit is -inf or the row holds NaN, never NaN.
        ranks: int32 [R], 1 plus the number of strictly more likely tokens.
        top_ids: int32 [R, W], most likely ids, best first, lower id first among equals; -1 past the vocabulary's end.
        top_logprobs: float32 [R, W].
    """

    logprobs: Float[Array, " R"]
    ranks: Int[Array, " R"]
    top_ids: Int[Array, "R W"]
    top_logprobs: Float[Array, "R W"]


# --------------------------------------------------------------------------------------------------------------- the tokens


def sample(logits: Float[Array, "S V"], inputs: StepInputs, state: SamplingState) -> tuple[Int[Array, " S"], SamplingState]:
    """Picks each row's next token and remembers it in the row's slot.

    Args:
        logits: float32, of the last token of each row.
        inputs: The step's flags, parameters, seeds and slots.
        state: Donated by the step; only ``last_tokens`` and, for rows with RowFlag.PENALTIES, one count change.

    Returns:
        Tokens, -1 for rows that do not sample and for rows whose logits hold NaN or +inf or leave no token to choose; and
        the state after the step.
    """
    random = has_flag(inputs.flags, RowFlag.RANDOM)
    adjusted = has_flag(inputs.flags, RowFlag.BIAS | RowFlag.PENALTIES | RowFlag.SUPPRESS_STOP)
    likeliest = _likeliest(logits)

    def choose() -> Array:
        # Neither branch hands the logits through: XLA would copy them first, in every step.
        x = lax.cond(
            jnp.any(adjusted),
            lambda: jnp.where(likeliest.valid[:, None], _adjust(logits, inputs, state), -jnp.inf),
            lambda: jnp.where(likeliest.valid[:, None], logits, -jnp.inf),
        )
        return _choose(x, random, inputs)

    tokens = lax.cond(jnp.any(random | adjusted), choose, lambda: jnp.where(likeliest.valid, likeliest.ids, -1))
    tokens = jnp.where(has_flag(inputs.flags, RowFlag.SAMPLES), tokens, -1)
    return tokens, _remember(state, tokens, inputs)


def greedy(logits: Float[Array, "S V"]) -> Int[Array, " S"]:
    """Returns each row's most likely token, the lowest id among equals; -1 for rows that hold NaN or +inf, or -inf only."""
    likeliest = _likeliest(logits)
    return jnp.where(likeliest.valid, likeliest.ids, -1)


def _remember(state: SamplingState, tokens: Int[Array, " S"], inputs: StepInputs) -> SamplingState:
    num_slots = state.last_tokens.shape[0]
    slots = jnp.where(tokens >= 0, inputs.slots, num_slots)  # out of range: dropped
    counted = jnp.where(has_flag(inputs.flags, RowFlag.PENALTIES), slots, num_slots)
    return SamplingState(
        last_tokens=state.last_tokens.at[slots].set(tokens, mode="drop"),
        logit_bias=state.logit_bias,
        token_flags=state.token_flags.at[counted, tokens].add(int(TokenFlag.OUTPUT_ONE), mode="drop"),
    )


def _adjust(x: Float[Array, "S V"], inputs: StepInputs, state: SamplingState) -> Float[Array, "S V"]:
    """Bias and masks, suppressed stop ids, penalties, for the rows whose flags ask for them."""
    biased, suppressed, penalised = (
        has_flag(inputs.flags, flag)[:, None] for flag in (RowFlag.BIAS, RowFlag.SUPPRESS_STOP, RowFlag.PENALTIES)
    )
    x = x + jnp.where(biased, _rows_of_slots(state.logit_bias, inputs.slots), 0.0)
    rows = _rows_of_slots(state.token_flags, inputs.slots)
    x = jnp.where(suppressed & ((rows & int(TokenFlag.STOPS)) != 0), -jnp.inf, x)

    count = (rows >> 2).astype(jnp.float32)
    seen = (rows & ~int(TokenFlag.STOPS)) != 0
    factor = jnp.maximum(inputs.repetition_penalty, _FLOAT_TINY)[:, None]  # a subnormal factor may be flushed to 0
    repeated = jnp.where(x > 0, jnp.where(x < jnp.inf, jnp.minimum(x / factor, _FLOAT_MAX), x), x * factor)
    y = jnp.where(seen, repeated, x)
    y = y - inputs.frequency_penalty[:, None] * count - jnp.where(count > 0, inputs.presence_penalty[:, None], 0.0)
    return jnp.where(penalised, y, x)


def _rows_of_slots(table: Shaped[Array, "M V"], slots: Int[Array, " S"]) -> Shaped[Array, "S V"]:
    """Returns the slots' rows: on a TPU as slices, which make a loop, where ``take`` makes code that takes seconds to compile."""
    return lax.platform_dependent(
        table,
        slots,
        tpu=jax.vmap(lambda table, slot: lax.dynamic_index_in_dim(table, slot, keepdims=False), (None, 0)),
        default=lambda table, slots: jnp.take(table, slots, axis=0, mode="clip"),
    )


class _Likeliest(NamedTuple):
    """The first of the most likely tokens of each row, found through maxima of blocks of tokens.

    Attributes:
        maxima: float32 [S, V / 128].
        value: float32 [S], the largest logit.
        valid: bool [S], whether the row holds no NaN and no +inf, and something other than -inf.
        ids: int32 [S].
    """

    maxima: Float[Array, "S B"]
    value: Float[Array, " S"]
    valid: Bool[Array, " S"]
    ids: Int[Array, " S"]


def _likeliest(x: Float[Array, "S V"]) -> _Likeliest:
    blocks = _in_blocks(x)
    maxima = jnp.max(blocks, axis=-1)
    value = jnp.max(maxima, axis=-1)
    block = jnp.argmax(maxima, axis=-1)  # much faster on a CPU than an argmax over all
    index = jnp.argmax(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], axis=-1)
    no_nan = ~jnp.isnan(jnp.sum(x, axis=-1))  # XLA's maximum on a CPU may lose a NaN, a sum does not
    return _Likeliest(maxima, value, jnp.isfinite(value) & no_nan, (block * _BLOCK + index).astype(jnp.int32))


def _in_blocks(x: Float[Array, "S V"]) -> Float[Array, "S B 128"]:
    """Cuts rows into blocks, the last filled up with -inf."""
    rows, vocab = x.shape
    if vocab % _BLOCK:
        x = jnp.pad(x, ((0, 0), (0, -vocab % _BLOCK)), constant_values=-jnp.inf)
    return x.reshape(rows, -1, _BLOCK)


def _choose(x: Float[Array, "S V"], random: Bool[Array, " S"], inputs: StepInputs) -> Int[Array, " S"]:
    """Returns the most likely or a drawn token of each row, -1 where the largest logit is not finite."""
    likeliest = _likeliest(x)
    random = random & likeliest.valid
    drawn = lax.cond(jnp.any(random), lambda: _draw(x, likeliest, random, inputs), lambda: likeliest.ids)
    return jnp.where(likeliest.valid, jnp.where(random, drawn, likeliest.ids), -1)


def _draw(x: Float[Array, "S V"], likeliest: _Likeliest, active: Bool[Array, " S"], inputs: StepInputs) -> Int[Array, " S"]:
    """Temperature, min_p, top_k, top_p, and one draw; rows that are not active give any id."""
    blocks, vocab = _in_blocks(x), x.shape[-1]
    limb_bits = _limb_bits(vocab)
    temperature = jnp.where(active, inputs.temperature, 1.0)
    weights = jnp.exp((blocks - _each(likeliest.value)) / _each(temperature))  # 1 for the most likely token
    weights = jnp.where(weights >= _each(inputs.min_p), weights, 0.0)
    units = jnp.where(_each(active), jnp.round(weights * float(4**limb_bits)), 0.0).astype(jnp.int32)

    top_k = jnp.where(active & (inputs.top_k < vocab), jnp.maximum(inputs.top_k, 0), 0)
    top_p = jnp.where(active, inputs.top_p, 1.0)
    restricted = jnp.any((top_k > 0) | (top_p < 1.0))
    units = lax.cond(
        restricted, lambda units: _restrict(blocks, units, likeliest.maxima, top_k, top_p, limb_bits), lambda units: units, units
    )
    return _pick(units, _uniform_bits(inputs), limb_bits)


def _each(row: Shaped[Array, " S"]) -> Shaped[Array, "S 1 1"]:
    """One number for all tokens of a row."""
    return row[:, None, None]


def _uniform_bits(inputs: StepInputs) -> UInt[Array, " S"]:
    """One uint32 per row from its seed and the position of the token that is sampled."""
    words = lax.bitcast_convert_type(jnp.stack([inputs.seed_high, inputs.seed_low], axis=-1), jnp.uint32)
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(words, impl="threefry2x32"), inputs.kv_lens)
    return jax.random.key_data(keys)[:, 1]  # a cipher of the position under the seed


# --------------------------------------------------------------------------------------------------------- top_k and top_p


class _Tokens(NamedTuple):
    """Blocks of tokens of each row among which a boundary is sought: logits, weights, and the blocks' numbers."""

    x: Float[Array, "S B W"]
    weights: Int[Array, "S B W"]
    numbers: Int[Array, "#S B"]

    @property
    def ids(self) -> Int[Array, "#S B W"]:
        return self.numbers[:, :, None] * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)

    def mass_of(self, mask: Bool[Array, "S B W"], limb_bits: int) -> _Mass:
        """What the marked tokens weigh together."""
        return _mass(jnp.where(mask, self.weights, 0), limb_bits)


def _restrict(
    x: Float[Array, "S B W"],
    units: Int[Array, "S B W"],
    maxima: Float[Array, "S B"],
    top_k: Int[Array, " S"],
    top_p: Float[Array, " S"],
    limb_bits: int,
) -> Int[Array, "S B W"]:
    """Sets the weights of the tokens that top_k (0 for all), then top_p (1 for all) leave out to zero.

    Both keep the fewest tokens that weigh enough together, top_k with a weight of 1 for each token.
    """
    numbers = jnp.arange(x.shape[1], dtype=jnp.int32)[None]

    def restrict(stage: Array, units: Array) -> Array:
        by_count = stage == 0
        wanted = jnp.where(by_count, top_k > 0, top_p < 1.0)

        def keep() -> Array:
            weights = jnp.where(by_count, 1, units)
            total = _mass(weights, limb_bits)
            share = jnp.clip(top_p * 2.0**32, 1.0, 2.0**32 - 256).astype(jnp.uint32)
            most = total.minus(_fraction_of(-share, total, limb_bits), limb_bits)  # all but what may go: the share rounded up
            count = _carry(jnp.zeros_like(share), top_k.astype(jnp.uint32), limb_bits)
            target = _Mass(*(jnp.where(wanted, jnp.where(by_count, c, m), 0) for c, m in zip(count, most, strict=True)))
            return jnp.where(_fewest(_Tokens(x, weights, numbers), maxima, target, limb_bits) | ~_each(wanted), units, 0)

        return lax.cond(jnp.any(wanted), keep, lambda: units)

    return lax.fori_loop(0, 2, restrict, units)


def _fewest(tokens: _Tokens, maxima: Float[Array, "S B"], target: _Mass, limb_bits: int) -> Bool[Array, "S B W"]:
    """Marks the fewest tokens that weigh the target, in the order of the logits downwards and of the ids upwards among equals.

    Looks first among the blocks with the largest maxima: every token beyond the least of these maxima is in them, so if these
    tokens weigh enough, the boundary is among them. Only if they do not for some row are all tokens searched.
    """
    if maxima.shape[-1] <= _NEAR_BLOCKS:
        value, last = _boundary(tokens, target, limb_bits)
    else:
        least, blocks = _leading(maxima, _NEAR_BLOCKS)
        near = _Tokens(*(jnp.take_along_axis(array, blocks[:, :, None], axis=1) for array in tokens[:2]), blocks)
        inside = near.mass_of(near.x > _each(least), limb_bits).at_least(target) | (least == -jnp.inf)
        value, last = lax.cond(jnp.all(inside), lambda: _boundary(near, target, limb_bits), lambda: _boundary(tokens, target, limb_bits))
    return (tokens.x > _each(value)) | ((tokens.x == _each(value)) & (tokens.ids <= _each(last)))


def _leading(maxima: Float[Array, "S B"], count: int) -> tuple[Float[Array, " S"], Int[Array, "S N"]]:
    """Returns the least of each row's ``count`` largest maxima, and their indices upwards; among equals the lower come first.

    ``lax.top_k`` gives as much, but sorts for it, and a TPU's compiler takes seconds for a sort.
    """
    least = _nth_float(_largest(32, maxima.shape[0], lambda n: _count(maxima >= _nth_float(n)[:, None]) >= count))
    above, equal = jnp.cumsum(jnp.stack([maxima > least[:, None], maxima == least[:, None]]), axis=-1, dtype=jnp.int32)
    upto = above + jnp.minimum(equal, count - above[:, -1:])  # how many are chosen up to here
    return least, _count(upto[:, None] <= jnp.arange(count, dtype=jnp.int32)[:, None]).astype(jnp.int32)


def _boundary(tokens: _Tokens, target: _Mass, limb_bits: int) -> tuple[Float[Array, " S"], Int[Array, " S"]]:
    """Returns logit and id of the last of the fewest tokens that weigh the target.

    For rows with a target of 0 the logit is NaN, which no token equals or exceeds.
    """
    rows = tokens.x.shape[0]

    def search(stage: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        """First for the logit; then, if tokens tie for the last place in some row, for the id, by the code of the same loop."""
        by_id, (value, last) = stage == 1, found

        def with_number(n: Array) -> tuple[Array, Array]:
            return jnp.where(by_id, value, _nth_float(n)), jnp.where(by_id, n, last)

        def holds(n: Array) -> Array:
            value, end = with_number(n)
            mask = (tokens.x > _each(value)) | ((tokens.x == _each(value)) & (tokens.ids.astype(jnp.uint32) < _each(end)))
            return tokens.mass_of(mask, limb_bits).at_least(target) ^ by_id  # ids are too few up to the last one

        ties = (_count(tokens.x == _each(value), (1, 2)) > 1) & (value > -jnp.inf)  # tokens of -inf weigh nothing in the end, kept or not
        return lax.cond(~by_id | jnp.any(ties), lambda: with_number(_largest(32, rows, holds)), lambda: found)

    value, last = lax.fori_loop(0, 2, search, (jnp.zeros(rows, jnp.float32), jnp.full(rows, 2**31 - 1, jnp.uint32)))
    return value, last.astype(jnp.int32)


def _largest(num_bits: int, rows: int, holds: Callable[[Array], Array]) -> UInt[Array, " S"]:
    """Returns per row the largest ``num_bits``-bit number for which ``holds``, which must hold up to there and not beyond."""

    def refine(i: Array, found: Array) -> Array:
        candidate = found | (jnp.uint32(1) << (num_bits - 1 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, found)

    return lax.fori_loop(0, num_bits, refine, jnp.zeros(rows, jnp.uint32))


def _nth_float(n: UInt[Array, "*n"]) -> Float[Array, "*n"]:
    """The n-th float32 from below; -inf for those before it, NaN beyond +inf."""
    n = jnp.maximum(n, jnp.uint32(0x007FFFFF))
    return lax.bitcast_convert_type(jnp.where(n >> 31 == 1, n ^ jnp.uint32(2**31), ~n), jnp.float32)


# ------------------------------------------------------------------------------------------------------- exact sums, the draw


class _Mass(NamedTuple):
    """Exact sums ``high * 2 ** limb_bits + low`` of weights, with ``low < 2 ** limb_bits``."""

    high: UInt[Array, "*n"]
    low: UInt[Array, "*n"]

    def at_least(self, other: _Mass) -> Bool[Array, "*n"]:
        return (self.high > other.high) | ((self.high == other.high) & (self.low >= other.low))

    def minus(self, other: _Mass, limb_bits: int) -> _Mass:
        borrow = (self.low < other.low).astype(jnp.uint32)
        return _Mass(self.high - other.high - borrow, self.low + (borrow << limb_bits) - other.low)


def _limb_bits(vocab: int) -> int:
    """Bits per limb such that the high limbs of ``vocab`` largest weights, ``2 ** limb_bits`` each, add up below 2**32."""
    return min(15, 32 - vocab.bit_length())


def _carry(high: UInt[Array, "*n"], low: UInt[Array, "*n"], limb_bits: int) -> _Mass:
    return _Mass(high + (low >> limb_bits), low & (2**limb_bits - 1))


def _limbs(weights: Int[Array, "*n"], limb_bits: int) -> tuple[UInt[Array, "*n"], UInt[Array, "*n"]]:
    return (weights >> limb_bits).astype(jnp.uint32), (weights & (2**limb_bits - 1)).astype(jnp.uint32)


def _count(mask: Bool[Array, "*n C"], axes: int | tuple[int, ...] = -1) -> Float[Array, "*n"]:
    """Counts below 2**24, exactly; floats because XLA vectorises their sums on a CPU and not those of integers."""
    return jnp.sum(jnp.where(mask, 1.0, 0.0), axis=axes)


def _add_up(limbs: tuple[UInt[Array, "*n"], UInt[Array, "*n"]], axes: Sequence[int]) -> tuple[UInt[Array, "*m"], UInt[Array, "*m"]]:
    """Adds up high and low limbs, both in one reduction: XLA vectorises it on a CPU, and not a sum of one array of integers."""
    return lax.reduce(limbs, (jnp.uint32(0), jnp.uint32(0)), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes)


def _mass(weights: Int[Array, "S B W"], limb_bits: int) -> _Mass:
    return _carry(*_add_up(_limbs(weights, limb_bits), (1, 2)), limb_bits)


def _multiply_high(a: UInt[Array, "*n"], b: UInt[Array, "*n"]) -> UInt[Array, "*n"]:
    """Upper 32 bits of the 64-bit product."""
    a_low, a_high, b_low, b_high = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    return a_high * b_high + (middle >> 16) + (((middle & 0xFFFF) + a_low * b_high) >> 16)


def _fraction_of(fraction: UInt[Array, "*n"], mass: _Mass, limb_bits: int) -> _Mass:
    """``floor(fraction / 2**32 * mass)``, exactly."""
    whole = fraction * mass.high  # lower 32 bits of the product, in units of 2 ** (limb_bits - 32)
    rest = fraction * mass.low
    carry = ((whole << limb_bits) + rest) < rest
    low = (whole >> (32 - limb_bits)) + _multiply_high(fraction, mass.low) + carry.astype(jnp.uint32)
    return _carry(_multiply_high(fraction, mass.high), low, limb_bits)


def _pick(units: Int[Array, "S B W"], bits: UInt[Array, " S"], limb_bits: int) -> Int[Array, " S"]:
    """The token at ``bits / 2**32`` of the way through the weights in order of ids, so one of zero weight never."""
    sums = _add_up(_limbs(units, limb_bits), (2,))
    total = _carry(*_add_up(sums, (1,)), limb_bits)
    block, goal = _find(sums, _fraction_of(bits, total, limb_bits), limb_bits)
    chosen = jnp.take_along_axis(units, block[:, None, None], axis=1)[:, 0]
    index, _ = _find(_limbs(chosen, limb_bits), goal, limb_bits)
    return block * _BLOCK + index


def _find(limbs: tuple[UInt[Array, "S N"], UInt[Array, "S N"]], goal: _Mass, limb_bits: int) -> tuple[Int[Array, " S"], _Mass]:
    """Returns the last index before which at most the goal lies, and the goal less what lies before it."""
    rows, count = limbs[0].shape
    order = jnp.arange(count, dtype=jnp.uint32)

    def before(n: Array) -> _Mass:
        high, low = (jnp.where(order < n[:, None], limb, 0) for limb in limbs)
        return _carry(*_add_up((high, low), (1,)), limb_bits)

    index = _largest(count.bit_length(), rows, lambda n: (n < count) & goal.at_least(before(n)))
    return index.astype(jnp.int32), goal.minus(before(index), limb_bits)


# ------------------------------------------------------------------------------------------------------- log-probabilities


def token_logprobs(logits: Float[Array, "R V"], token_ids: Int[Array, " R"], width: int = TOP_LOGPROBS) -> Logprobs:
    """Log-probabilities of ``token_ids`` under ``softmax(logits)``, their ranks, and the ``width`` most likely ids. Id -1 gives -inf."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    normaliser = top + jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True))
    own = jnp.take_along_axis(logits, jnp.maximum(token_ids, 0)[:, None], axis=-1)
    ranks = 1 + _count(logits > own).astype(jnp.int32)
    count = min(width, logits.shape[-1])
    ids = _best(logits, count)
    best = jnp.take_along_axis(logits, ids, axis=-1)
    pad = ((0, 0), (0, width - count))
    best, ids = jnp.pad(best, pad, constant_values=-jnp.inf), jnp.pad(ids, pad, constant_values=-1)
    own = jnp.where(token_ids[:, None] >= 0, own, -jnp.inf)
    return Logprobs(_never_nan(own - normaliser)[:, 0], ranks, ids, _never_nan(best - normaliser))


def _best(x: Float[Array, "R V"], count: int) -> Int[Array, "R {count}"]:
    """Returns the ids of the largest logits, best first, the lower id first among equals, as ``lax.top_k`` without its sort would.

    One after the other: the next is in the block with the largest maximum of what is left.
    """
    blocks, lanes = _in_blocks(x), jnp.arange(_BLOCK, dtype=jnp.int32)
    numbers = jnp.arange(blocks.shape[1], dtype=jnp.int32)
    rows = x.shape[0]

    def following(last: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], Array]:
        maxima, last_value, last_id = last
        value, block = jnp.max(maxima, axis=-1), jnp.argmax(maxima, axis=-1).astype(jnp.int32)
        order = _order(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0])
        ids = block[:, None] * _BLOCK + lanes
        equal = order == value[:, None]
        index = jnp.argmax(equal & ((value < last_value)[:, None] | (ids > last_id[:, None])), axis=-1).astype(jnp.int32)
        left = (order < value[:, None]) | (equal & (lanes > index[:, None]))
        most = jnp.max(jnp.where(left, order, _NONE_LEFT), axis=-1)
        found = block * _BLOCK + index
        return (jnp.where(numbers == block[:, None], most[:, None], maxima), value, found), found

    start = (jnp.max(_order(blocks), axis=-1), jnp.full(rows, 2**31 - 1, jnp.int32), jnp.full(rows, -1, jnp.int32))
    return lax.scan(following, start, length=count)[1].T


def _order(x: Float[Array, "*n"]) -> Int[Array, "*n"]:
    """Numbers in the floats' order, NaN above all, -inf above ``_NONE_LEFT``."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ (2**31 - 1), bits)


def sampled_logprobs(logits: Float[Array, "S V"], tokens: Int[Array, " S"], inputs: StepInputs, width: int = TOP_LOGPROBS) -> Logprobs:
    """``token_logprobs`` of a step's tokens from its raw logits; zeros, at no cost, unless a row has RowFlag.LOGPROBS."""
    wanted = jnp.any(has_flag(inputs.flags, RowFlag.LOGPROBS))
    find = partial(token_logprobs, width=width)
    return lax.cond(wanted, find, lambda _, tokens: _no_logprobs(tokens.shape[0], width), logits, tokens)


def prompt_logprobs(
    hidden: Float[Array, "T E"], logits_fn: Callable[[Array], Array], inputs: StepInputs, width: int = TOP_LOGPROBS
) -> Logprobs:
    """Log-probabilities of ``inputs.targets``, from the hidden states that precede them.

    Works through the tokens a chunk at a time, so that logits of ``[32, V]`` at most exist, and only through chunks that
    hold a target; without any it costs nothing.

    Args:
        hidden: Final hidden states of all tokens of the step.
        logits_fn: From hidden states [R, E] to float32 logits [R, V].
        inputs: The step's ``targets``.
        width: W, most likely tokens to name.

    Returns:
        Per token; zeros where the target is -1.
    """
    total, chunk = hidden.shape[0], min(_PROMPT_CHUNK, hidden.shape[0])

    def fill(i: Array, results: Logprobs) -> Logprobs:
        start = jnp.minimum(i * chunk, total - chunk)  # the last chunk may repeat tokens, with the same outcome
        targets = lax.dynamic_slice_in_dim(inputs.targets, start, chunk)

        def compute(results: Logprobs) -> Logprobs:
            found = token_logprobs(logits_fn(lax.dynamic_slice_in_dim(hidden, start, chunk)), targets, width)
            empty = _no_logprobs(chunk, width)
            rows = jax.tree.map(lambda new, zero: jnp.where((targets >= 0).reshape(-1, *[1] * (new.ndim - 1)), new, zero), found, empty)
            return jax.tree.map(lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, start, 0), results, rows)

        return lax.cond(jnp.any(targets >= 0), compute, lambda results: results, results)

    # A condition and not a loop of no chunks: XLA moves what a loop does to the weights out of it, a copy for tpu7x in another layout.
    empty = _no_logprobs(total, width)
    return lax.cond(jnp.any(inputs.targets >= 0), lambda: lax.fori_loop(0, -(-total // chunk), fill, empty), lambda: empty)


def _no_logprobs(count: int, width: int) -> Logprobs:
    ids = jnp.zeros((count, width), jnp.int32)
    return Logprobs(jnp.zeros(count, jnp.float32), jnp.zeros(count, jnp.int32), ids, ids.astype(jnp.float32))


def _never_nan(logprobs: Float[Array, ...]) -> Float[Array, ...]:
    return jnp.where(jnp.isnan(logprobs), -jnp.inf, logprobs)


# ------------------------------------------------------------------------------------------------------------ the slots


def _set_slot(
    state: SamplingState, slot: Int[Array, ""], logit_bias_row: Float[Array, " V"], token_flags_row: Int[Array, " V"]
) -> SamplingState:
    return SamplingState(
        last_tokens=state.last_tokens,
        logit_bias=state.logit_bias.at[slot].set(logit_bias_row, mode="drop"),
        token_flags=state.token_flags.at[slot].set(token_flags_row, mode="drop"),
    )


set_slot = jax.jit(_set_slot, donate_argnames="state")
"""Writes one slot's rows in place. Needed only for requests for which ``slot_rows`` returns rows: the flags of other requests
never let a step read theirs, whatever an earlier request left there."""


def slot_rows(
    vocab_size: int,
    *,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    stop_token_ids: Sequence[int] = (),
    logit_bias: dict[int, float] | None = None,
    allowed_token_ids: Sequence[int] | None = None,
    bad_token_ids: Sequence[int] | None = None,
    penalties: bool = False,
    min_tokens: int = 0,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Builds what a slot must hold for a request, on the host.

    Args:
        vocab_size: V; every id must be below it, stop ids excepted.
        prompt: Token ids of the prompt.
        output: Token ids sampled so far (a sequence that was preempted comes back with some).
        stop_token_ids: Every id that ends the sequence, the model's included.
        logit_bias: Token id to number.
        allowed_token_ids: The only ids that may be generated; None for all.
        bad_token_ids: Ids that must not be generated.
        penalties: Whether any of the three penalties has an effect.
        min_tokens: Tokens before a stop id may be generated.

    Returns:
        float32 [V] and int32 [V] for ``set_slot``; None for a request that needs neither.
    """
    biased = bool(logit_bias) or allowed_token_ids is not None or bool(bad_token_ids)
    suppressing = min_tokens > len(output) and bool(stop_token_ids)
    if not (biased or penalties or suppressing):
        return None
    stops = [token_id for token_id in stop_token_ids if token_id < vocab_size]  # a checkpoint may name others
    bias, flags = np.zeros(vocab_size, np.float32), np.zeros(vocab_size, np.int32)
    if allowed_token_ids is not None:
        bias[:] = -np.inf
        bias[np.asarray(allowed_token_ids, np.int64)] = 0.0
    for token_id, value in (logit_bias or {}).items():
        bias[token_id] += value
    bias[np.asarray(bad_token_ids or (), np.int64)] = -np.inf
    if penalties:
        np.add.at(flags, np.asarray(output, np.int64), int(TokenFlag.OUTPUT_ONE))
        flags[np.asarray(prompt, np.int64)] |= int(TokenFlag.IN_PROMPT)
    flags[np.asarray(stops, np.int64)] |= int(TokenFlag.STOPS)
    return bias, flags
