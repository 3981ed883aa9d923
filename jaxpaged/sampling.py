"""Logits and per-slot state to tokens and log-probabilities; pure, on the device.

Order of operations, as in vLLM: log-probabilities come from the raw logits; then bias and masks, suppression of stop ids,
penalties; then the most likely token, or temperature, min_p, top_k, top_p and a draw.

Nothing here sorts the vocabulary. A threshold is found bit by bit, each step one pass of comparing and adding up. Masses are
integers: a token's weight ``exp((x - max) / temperature)`` is rounded to a multiple of ``4 ** -limb_bits``, and sums of such
weights are kept exactly as two uint32 limbs. Integer addition has no order, so a row's token depends on this row's logits,
parameters, seed and position alone: not on the batch, the bucket, the slot or the platform's way of adding up.

Letters: S rows, T tokens, M slots, V vocabulary, E model dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxpaged.state import TOP_LOGPROBS, RowFlag, SamplingState, StepInputs, TokenFlag, has_flag

_FLOAT_MAX = float(np.finfo(np.float32).max)
_FLOAT_TINY = float(np.finfo(np.float32).tiny)
_DRAW_BLOCK = 256
"""Tokens whose weights are added up before the draw looks among them."""
_PROMPT_CHUNK = 32
"""Prompt positions whose logits exist at one time."""


class Logprobs(NamedTuple):
    """Log-probabilities of R tokens in the model's own distribution.

    Attributes:
        logprobs: float32 [R]; -inf where the logit is -inf or the row holds NaN, never NaN.
        ranks: int32 [R], 1 plus the number of strictly more likely tokens.
        top_ids: int32 [R, 20], most likely ids, best first, lower id first among equals; -1 past the vocabulary's end.
        top_logprobs: float32 [R, 20].
    """

    logprobs: Float[Array, " R"]
    ranks: Int[Array, " R"]
    top_ids: Int[Array, "R 20"]
    top_logprobs: Float[Array, "R 20"]


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
    tokens = _choose(_adjusted(logits, inputs, state), inputs)
    samples = has_flag(inputs.flags, RowFlag.SAMPLES)
    tokens = jnp.where(samples, tokens, -1)
    return tokens, _remember(state, tokens, inputs)


def _remember(state: SamplingState, tokens: Int[Array, " S"], inputs: StepInputs) -> SamplingState:
    num_slots = state.last_tokens.shape[0]
    slots = jnp.where(tokens >= 0, inputs.slots, num_slots)  # out of range: dropped
    counted = jnp.where(has_flag(inputs.flags, RowFlag.PENALTIES), slots, num_slots)
    return SamplingState(
        last_tokens=state.last_tokens.at[slots].set(tokens, mode="drop"),
        logit_bias=state.logit_bias,
        token_flags=state.token_flags.at[counted, tokens].add(int(TokenFlag.OUTPUT_ONE), mode="drop"),
    )


def _adjusted(logits: Float[Array, "S V"], inputs: StepInputs, state: SamplingState) -> Float[Array, "S V"]:
    """Bias and masks, suppressed stop ids, penalties. Adds -inf rather than selecting it, so that NaN stays visible."""
    biased = has_flag(inputs.flags, RowFlag.BIAS)
    flagged = has_flag(inputs.flags, RowFlag.PENALTIES | RowFlag.SUPPRESS_STOP)

    def add_bias(x: Array) -> Array:
        rows = jnp.take(state.logit_bias, inputs.slots, axis=0, mode="clip")
        return x + jnp.where(biased[:, None], rows, 0.0)

    def apply_flags(x: Array) -> Array:
        return _apply_flags(x, jnp.take(state.token_flags, inputs.slots, axis=0, mode="clip"), inputs)

    logits = lax.cond(jnp.any(biased), add_bias, lambda x: x, logits)
    return lax.cond(jnp.any(flagged), apply_flags, lambda x: x, logits)


def _apply_flags(x: Float[Array, "S V"], rows: Int[Array, "S V"], inputs: StepInputs) -> Float[Array, "S V"]:
    suppress = has_flag(inputs.flags, RowFlag.SUPPRESS_STOP)[:, None] & ((rows & int(TokenFlag.STOPS)) != 0)
    x = x + jnp.where(suppress, -jnp.inf, 0.0)

    penalised = has_flag(inputs.flags, RowFlag.PENALTIES)[:, None]
    count = (rows >> 2).astype(jnp.float32)
    seen = (rows & ~int(TokenFlag.STOPS)) != 0
    factor = jnp.maximum(inputs.repetition_penalty, _FLOAT_TINY)[:, None]  # a subnormal factor may be flushed to 0
    repeated = jnp.where(x > 0, jnp.where(x < jnp.inf, jnp.minimum(x / factor, _FLOAT_MAX), x), x * factor)
    y = jnp.where(seen, repeated, x)
    y = y - inputs.frequency_penalty[:, None] * count - jnp.where(count > 0, inputs.presence_penalty[:, None], 0.0)
    return jnp.where(penalised, y, x)


def _choose(x: Float[Array, "S V"], inputs: StepInputs) -> Int[Array, " S"]:
    """Returns the most likely or a drawn token of each row, -1 where the largest logit is not finite."""
    top = jnp.max(x, axis=-1)  # NaN if the row holds any
    valid = jnp.isfinite(top)
    greedy = jnp.argmax(x, axis=-1).astype(jnp.int32)
    random = has_flag(inputs.flags, RowFlag.RANDOM)

    def draw(greedy: Array) -> Array:
        return jnp.where(random, _draw(x, top, random & valid, inputs), greedy)

    return jnp.where(valid, lax.cond(jnp.any(random & valid), draw, lambda greedy: greedy, greedy), -1)


def _draw(x: Float[Array, "S V"], top: Float[Array, " S"], active: Bool[Array, " S"], inputs: StepInputs) -> Int[Array, " S"]:
    """Temperature, min_p, top_k, top_p, and one draw; rows that are not active give any id."""
    vocab = x.shape[-1]
    limb_bits = _limb_bits(vocab)
    x = jnp.where(active[:, None], x, 0.0)
    top = jnp.where(active, top, 0.0)
    temperature = jnp.where(active, inputs.temperature, 1.0)
    weight = jnp.exp((x - top[:, None]) / temperature[:, None])
    weight = jnp.where(weight >= inputs.min_p[:, None], weight, 0.0)
    units = jnp.round(weight * float(4**limb_bits)).astype(jnp.uint32)

    top_k = jnp.where(active & (inputs.top_k > 0) & (inputs.top_k < vocab), inputs.top_k, vocab)
    units = lax.cond(jnp.any(top_k < vocab), lambda u: _keep_top_k(x, u, top_k), lambda u: u, units)
    top_p = jnp.where(active, inputs.top_p, 1.0)
    units = lax.cond(jnp.any(top_p < 1.0), lambda u: _keep_top_p(u, top_p, limb_bits), lambda u: u, units)
    return _invert(units, _uniform_bits(inputs), limb_bits)


def _uniform_bits(inputs: StepInputs) -> UInt[Array, " S"]:
    """One uint32 per row from its seed and the position of the token that is sampled."""
    words = jnp.stack([inputs.seed_high, inputs.seed_low], axis=-1)
    keys = jax.random.wrap_key_data(lax.bitcast_convert_type(words, jnp.uint32), impl="threefry2x32")
    return jax.vmap(lambda key, position: jax.random.bits(jax.random.fold_in(key, position), (), jnp.uint32))(keys, inputs.kv_lens)


# ------------------------------------------------------------------------------------------------------- thresholds and draw


class _Mass(NamedTuple):
    """Exact sums ``high * 2 ** limb_bits + low`` of weights, with ``low < 2 ** limb_bits``."""

    high: UInt[Array, ...]
    low: UInt[Array, ...]

    def at_least(self, other: _Mass) -> Bool[Array, ...]:
        return (self.high > other.high) | ((self.high == other.high) & (self.low >= other.low))

    def minus(self, other: _Mass, limb_bits: int) -> _Mass:
        borrow = self.low < other.low
        low = self.low + (borrow.astype(jnp.uint32) << limb_bits) - other.low
        return _Mass(self.high - other.high - borrow.astype(jnp.uint32), low)


def _limb_bits(vocab: int) -> int:
    """Bits per limb such that the high limbs of ``vocab`` largest weights, ``2 ** limb_bits`` each, add up below 2**32."""
    return min(15, 32 - vocab.bit_length())


def _split(units: UInt[Array, ...], limb_bits: int) -> tuple[Array, Array]:
    return units >> limb_bits, units & (2**limb_bits - 1)


def _carry(high: UInt[Array, ...], low: UInt[Array, ...], limb_bits: int) -> _Mass:
    return _Mass(high + (low >> limb_bits), low & (2**limb_bits - 1))


def _sum(units: UInt[Array, "... V"], limb_bits: int) -> _Mass:
    high, low = _split(units, limb_bits)
    return _carry(jnp.sum(high, axis=-1, dtype=jnp.uint32), jnp.sum(low, axis=-1, dtype=jnp.uint32), limb_bits)


def _cumulate(units: _Mass, limb_bits: int) -> _Mass:
    high, low = (jnp.cumsum(limb, axis=-1, dtype=jnp.uint32) for limb in units)
    return _carry(high, low, limb_bits)


def _multiply_high(a: UInt[Array, ...], b: UInt[Array, ...]) -> UInt[Array, ...]:
    """Upper 32 bits of the 64-bit product."""
    a_low, a_high, b_low, b_high = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    return a_high * b_high + (middle >> 16) + (((middle & 0xFFFF) + a_low * b_high) >> 16)


def _fraction_of(fraction: UInt[Array, ...], mass: _Mass, limb_bits: int) -> _Mass:
    """``floor(fraction / 2**32 * mass)``, exactly."""
    whole = fraction * mass.high  # lower 32 bits of the product, in units of 2 ** (limb_bits - 32)
    rest = fraction * mass.low
    carry = ((whole << limb_bits) + rest) < rest
    low = (whole >> (32 - limb_bits)) + _multiply_high(fraction, mass.low) + carry.astype(jnp.uint32)
    return _carry(_multiply_high(fraction, mass.high), low, limb_bits)


def _largest(num_bits: int, holds: Callable[[Array], Array], like: Array) -> UInt[Array, " S"]:
    """Largest ``num_bits``-bit number for which ``holds``, which must hold up to some number and not beyond; 0 if nowhere."""

    def refine(i: Array, found: Array) -> Array:
        candidate = found | (jnp.uint32(1) << (num_bits - 1 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, found)

    return lax.fori_loop(0, num_bits, refine, jnp.zeros(like.shape[0], jnp.uint32))


def _smallest_prefix(key: UInt[Array, "S V"], key_bits: int, reaches: Callable[[Array], Array]) -> Bool[Array, "S V"]:
    """Marks the shortest run of tokens, by key downwards and by id upwards among equal keys, that ``reaches``.

    Args:
        key: Order of the tokens, below ``2 ** key_bits``.
        key_bits: Passes over the vocabulary.
        reaches: From a mask [S, V] to [S]; true for the full mask, and once true it stays so as tokens are added.
    """
    threshold = _largest(key_bits, lambda t: reaches(key >= t[:, None]), key)[:, None]
    ids = jnp.arange(key.shape[-1], dtype=jnp.uint32)
    above, equal = key > threshold, key == threshold

    def break_ties(_: Array) -> Array:
        last = _largest(key.shape[-1].bit_length(), lambda c: ~reaches(above | (equal & (ids < c[:, None]))), key)[:, None]
        return above | (equal & (ids <= last))

    return lax.cond(jnp.any(jnp.sum(equal, axis=-1) > 1), break_ties, lambda _: above | equal, None)


def _keep_top_k(x: Float[Array, "S V"], units: UInt[Array, "S V"], top_k: Int[Array, " S"]) -> UInt[Array, "S V"]:
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0.0 and 0.0 are the same logit
    key = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(2**31))  # orders as the floats do
    keep = _smallest_prefix(key, 32, lambda mask: jnp.sum(mask, axis=-1, dtype=jnp.int32) >= top_k)
    return jnp.where(keep, units, 0)


def _keep_top_p(units: UInt[Array, "S V"], top_p: Float[Array, " S"], limb_bits: int) -> UInt[Array, "S V"]:
    total = _sum(units, limb_bits)
    share = jnp.clip(top_p * 2.0**32, 1.0, 2.0**32 - 256).astype(jnp.uint32)
    spare = jnp.where(top_p < 1.0, -share, 0)  # the share that may be dropped; keeping total - floor(spare) rounds the rest up
    target = total.minus(_fraction_of(spare, total, limb_bits), limb_bits)
    keep = _smallest_prefix(units, 2 * limb_bits + 1, lambda mask: _sum(jnp.where(mask, units, 0), limb_bits).at_least(target))
    return jnp.where(keep, units, 0)


def _invert(units: UInt[Array, "S V"], bits: UInt[Array, " S"], limb_bits: int) -> Int[Array, " S"]:
    """The token at ``bits / 2**32`` of the way through the cumulated weights: probability ``units / sum``, never one of zero units."""
    blocks = -(-units.shape[-1] // _DRAW_BLOCK)
    padded = jnp.pad(units, ((0, 0), (0, blocks * _DRAW_BLOCK - units.shape[-1]))).reshape(-1, blocks, _DRAW_BLOCK)
    upto = _cumulate(_sum(padded, limb_bits), limb_bits)
    goal = _fraction_of(bits, _Mass(upto.high[:, -1], upto.low[:, -1]), limb_bits)

    block, within = _first_beyond(upto, goal, limb_bits)
    chosen = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
    upto = _cumulate(_Mass(*_split(chosen, limb_bits)), limb_bits)
    index, _ = _first_beyond(upto, within, limb_bits)
    return block * _DRAW_BLOCK + index


def _first_beyond(upto: _Mass, goal: _Mass, limb_bits: int) -> tuple[Int[Array, " S"], _Mass]:
    """First index whose running sum exceeds the goal, and the goal less what lies before it."""
    passed = _Mass(goal.high[:, None], goal.low[:, None]).at_least(upto)
    index = jnp.sum(passed, axis=-1, dtype=jnp.int32)
    before = jnp.maximum(index - 1, 0)[:, None]
    high, low = (jnp.where(index > 0, jnp.take_along_axis(limb, before, axis=1)[:, 0], 0) for limb in upto)
    return index, goal.minus(_Mass(high, low), limb_bits)


# ------------------------------------------------------------------------------------------------------- log-probabilities


def token_logprobs(logits: Float[Array, "R V"], token_ids: Int[Array, " R"]) -> Logprobs:
    """Log-probabilities of ``token_ids`` under ``softmax(logits)``, their ranks, and the most likely ids. Id -1 gives -inf."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    normaliser = top + jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True))
    own = jnp.take_along_axis(logits, jnp.maximum(token_ids, 0)[:, None], axis=-1)
    ranks = 1 + jnp.sum(logits > own, axis=-1, dtype=jnp.int32)
    width = min(TOP_LOGPROBS, logits.shape[-1])
    best, ids = lax.top_k(logits, width)
    pad = ((0, 0), (0, TOP_LOGPROBS - width))
    best, ids = jnp.pad(best, pad, constant_values=-jnp.inf), jnp.pad(ids, pad, constant_values=-1)
    own = jnp.where(token_ids[:, None] >= 0, own, -jnp.inf)
    return Logprobs(_never_nan(own - normaliser)[:, 0], ranks, ids.astype(jnp.int32), _never_nan(best - normaliser))


def sampled_logprobs(logits: Float[Array, "S V"], tokens: Int[Array, " S"], inputs: StepInputs) -> Logprobs:
    """``token_logprobs`` of a step's tokens from its raw logits; zeros, at no cost, unless a row has RowFlag.LOGPROBS."""
    wanted = jnp.any(has_flag(inputs.flags, RowFlag.LOGPROBS))
    return lax.cond(wanted, token_logprobs, lambda _, tokens: _no_logprobs(tokens.shape[0]), logits, tokens)


def prompt_logprobs(hidden: Float[Array, "T E"], logits_fn: Callable[[Array], Array], inputs: StepInputs) -> Logprobs:
    """Log-probabilities of ``inputs.targets``, from the hidden states that precede them.

    Works through the tokens a chunk at a time, so that logits of ``[32, V]`` at most exist, and only through chunks that
    hold a target; without any it costs nothing.

    Args:
        hidden: Final hidden states of all tokens of the step.
        logits_fn: From hidden states [R, E] to float32 logits [R, V].
        inputs: The step's ``targets``.

    Returns:
        Per token; zeros where the target is -1.
    """
    total, chunk = hidden.shape[0], min(_PROMPT_CHUNK, hidden.shape[0])

    def fill(i: Array, results: Logprobs) -> Logprobs:
        start = jnp.minimum(i * chunk, total - chunk)  # the last chunk may repeat tokens, with the same outcome
        targets = lax.dynamic_slice_in_dim(inputs.targets, start, chunk)

        def compute(results: Logprobs) -> Logprobs:
            found = token_logprobs(logits_fn(lax.dynamic_slice_in_dim(hidden, start, chunk)), targets)
            empty = _no_logprobs(chunk)
            rows = jax.tree.map(lambda new, zero: jnp.where((targets >= 0).reshape(-1, *[1] * (new.ndim - 1)), new, zero), found, empty)
            return jax.tree.map(lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, start, 0), results, rows)

        return lax.cond(jnp.any(targets >= 0), compute, lambda results: results, results)

    chunks = jnp.where(jnp.any(inputs.targets >= 0), -(-total // chunk), 0)
    return lax.fori_loop(0, chunks, fill, _no_logprobs(total))


def _no_logprobs(count: int) -> Logprobs:
    ids = jnp.zeros((count, TOP_LOGPROBS), jnp.int32)
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
        vocab_size: V; every id must be below it.
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
    flags[np.asarray(stop_token_ids, np.int64)] |= int(TokenFlag.STOPS)
    return bias, flags
