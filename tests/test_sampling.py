"""Sampling against plain NumPy in float64, and the promises that an oracle cannot show: exactness, independence, memory."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxpaged import sampling
from jaxpaged.state import RowFlag, SamplingState, StepInputs, TokenFlag, init_sampling_state

SAMPLES = int(RowFlag.SAMPLES)
RANDOM = int(RowFlag.SAMPLES | RowFlag.RANDOM)
VOCAB = 128
LARGE_VOCAB = 16640  # more than 128 blocks of 128

jit_sample = jax.jit(sampling.sample)
jit_logprobs = jax.jit(sampling.token_logprobs)


@dataclasses.dataclass
class Row:
    """One row of a step, with the defaults of a request that samples greedily."""

    flags: int = SAMPLES
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    position: int = 1
    slot: int = 0


def make_inputs(rows: list[Row], num_slots: int, size: int | None = None) -> StepInputs:
    inputs = StepInputs.zeros(size or len(rows), size or len(rows), 1, max_num_seqs=num_slots)
    for i, row in enumerate(rows):
        inputs.slots[i], inputs.flags[i], inputs.top_k[i], inputs.kv_lens[i] = row.slot, row.flags, row.top_k, row.position
        words = np.array([row.seed % 2**32, (row.seed % 2**64) >> 32], np.uint32).view(np.int32)
        inputs.seed_low[i], inputs.seed_high[i] = words
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            getattr(inputs, name)[i] = getattr(row, name)
    return inputs


def new_state(vocab: int) -> SamplingState:
    return init_sampling_state(64, padded(vocab))


def padded(vocab: int) -> int:
    """Few sizes are few compilations."""
    return max(vocab, VOCAB)


def run(
    logits: np.ndarray, rows: list[Row], state: SamplingState | None = None, *, size: int | None = None, exactly: bool = False
) -> tuple[np.ndarray, SamplingState]:
    """Samples rows, padded with rows of NaN to 16 or 512, and with ids of -inf to 128 unless ``exactly``.

    Every test gives rows slots of its own; a state of 64 slots is made if none is given.
    """
    size = size or (16 if len(rows) <= 16 else 512)
    vocab = logits.shape[1] if exactly else padded(logits.shape[1])
    if state is None:
        state = init_sampling_state(64 if len(rows) <= 64 else 512, vocab)
    filled = np.full((size, vocab), np.nan, np.float32)
    filled[: len(rows)] = -np.inf
    filled[: len(rows), : logits.shape[1]] = logits
    tokens, state = jit_sample(filled, make_inputs(rows, state.last_tokens.shape[0], size), state)
    assert (np.asarray(tokens)[len(rows) :] == -1).all()
    return np.asarray(tokens)[: len(rows)], state


def uniform(seed: int, position: int) -> float:
    """The number that a row must draw, from jax.random alone."""
    words = np.array([(seed % 2**64) >> 32, seed % 2**32], np.uint32)
    key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32"), position)
    return int(jax.random.key_data(key)[1]) / 2**32


def adjusted(logits: np.ndarray, row: Row, bias: np.ndarray | None = None, flags: np.ndarray | None = None) -> np.ndarray:
    """Bias, suppression and penalties of one row, in float64."""
    x = logits.astype(np.float64)
    if row.flags & RowFlag.BIAS:
        x = x + bias
    if flags is not None and row.flags & RowFlag.SUPPRESS_STOP:
        x[(flags & TokenFlag.STOPS) != 0] = -np.inf
    if flags is not None and row.flags & RowFlag.PENALTIES:
        count = flags // TokenFlag.OUTPUT_ONE
        seen = (count > 0) | ((flags & TokenFlag.IN_PROMPT) != 0)
        x[seen] = np.where(x[seen] > 0, x[seen] / row.repetition_penalty, x[seen] * row.repetition_penalty)
        x = x - row.frequency_penalty * count - row.presence_penalty * (count > 0)
    return x


def distribution(x: np.ndarray, row: Row, slack: float = 0.0) -> np.ndarray:
    """Probabilities after temperature, min_p, top_k and top_p, in float64; ties go to lower ids."""
    z = (x - x.max()) / row.temperature
    weights = np.exp(z)
    weights[weights < row.min_p * (1 - slack)] = 0.0
    order = np.lexsort((np.arange(len(x)), -x))
    if 0 < row.top_k < len(x):
        weights[order[row.top_k :]] = 0.0
    if row.top_p < 1.0:
        upto = np.cumsum(weights[order]) / weights.sum()
        weights[order[int(np.argmax(upto >= row.top_p - slack)) + 1 :]] = 0.0
    return weights / weights.sum()


def check_draw(x: np.ndarray, row: Row, token: int) -> None:
    """The token must be where the row's uniform number falls in the cumulated distribution."""
    u = uniform(row.seed, row.position)
    for slack in (0.0, 2e-6, -2e-6):
        p = distribution(x, row, slack)
        upto = np.cumsum(p)
        if p[token] > 0 and upto[token] - p[token] - 1e-5 <= u <= upto[token] + 1e-5:
            return
    raise AssertionError(f"token {token} is not what {row} draws with {u}")


# ------------------------------------------------------------------------------------------------------ against the oracle

ROWS = st.builds(
    Row,
    flags=st.sampled_from([0, 8, 4, 16, 28]).flatmap(lambda bits: st.sampled_from([SAMPLES | bits, RANDOM | bits, RANDOM | bits])),
    temperature=st.sampled_from([1e-5, 0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 50, 10**6]),
    top_p=st.sampled_from([1.0, 1.0, 0.99, 0.9, 0.5, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5, 10.0]),
    presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -2.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(1, 2**20),
)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(ROWS, min_size=8, max_size=8),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    vocab=st.sampled_from([VOCAB, LARGE_VOCAB]),
)
def test_any_mixture_of_parameters_agrees_with_float64(rows: list[Row], seed: int, scale: float, vocab: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((8, vocab)) * scale).astype(np.float32)
    bias = np.where(rng.random((8, vocab)) < 0.2, -np.inf, rng.choice([0.0, 0.0, 2.0, -100.0], (8, vocab))).astype(np.float32)
    flags = (rng.integers(0, 4, (8, vocab)) + 4 * rng.poisson(0.3, (8, vocab))).astype(np.int32)
    slots = rng.permutation(64)[:8]
    before = new_state(vocab)
    state = SamplingState(jnp.full(64, 77, jnp.int32), before.logit_bias.at[slots].set(bias), before.token_flags.at[slots].set(flags))
    rows = [dataclasses.replace(row, slot=int(slot)) for row, slot in zip(rows, slots, strict=True)]

    tokens, after = run(logits, rows, state)

    for i, row in enumerate(rows):
        x = adjusted(logits[i], row, bias[i], flags[i])
        if row.flags & RowFlag.RANDOM:
            check_draw(x, row, tokens[i])
        else:
            assert x[tokens[i]] >= x.max() - 1e-5 * max(1.0, abs(x.max()))
        assert after.last_tokens[row.slot] == tokens[i]
        expected = flags[i].copy()
        expected[tokens[i]] += TokenFlag.OUTPUT_ONE if row.flags & RowFlag.PENALTIES else 0
        np.testing.assert_array_equal(after.token_flags[row.slot], expected)
    np.testing.assert_array_equal(after.logit_bias, state.logit_bias)


@pytest.mark.parametrize(
    "row",
    [
        Row(RANDOM),
        Row(RANDOM, temperature=0.5),
        Row(RANDOM, temperature=2.0),
        Row(RANDOM, top_k=5),
        Row(RANDOM, top_p=0.7),
        Row(RANDOM, min_p=0.2),
        Row(RANDOM, temperature=1.5, top_k=20, top_p=0.8, min_p=0.02),
    ],
    ids=lambda row: f"T{row.temperature}-k{row.top_k}-p{row.top_p}-m{row.min_p}",
)
@pytest.mark.parametrize("by", ["seed", "position"])
def test_draws_follow_the_distribution(row: Row, by: str) -> None:
    """Chi-squared on 102,400 draws, once over as many seeds and once over the positions of 64 seeds; fixed, so it cannot flake."""
    rng = np.random.default_rng(5)
    x = (rng.standard_normal(97) * 2).astype(np.float32)
    size, steps = 512, 200
    inputs = make_inputs([row] * size, size)
    inputs.slots[:] = np.arange(size)

    observed = np.asarray(_count_draws(jnp.tile(x, (size, 1)), inputs, steps, by == "seed"))
    expected = distribution(x.astype(np.float64), row) * size * steps
    assert observed.sum() == size * steps
    assert (observed[expected == 0] == 0).all()
    common = expected >= 5
    observed = np.append(observed[common], observed[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(observed) > 1:
        assert stats.chisquare(observed, expected).pvalue > 1e-6


@functools.partial(jax.jit, static_argnames="steps")
def _count_draws(logits: jax.Array, inputs: StepInputs, steps: int, over_seeds: bool) -> jax.Array:
    size, vocab = logits.shape

    def one(step: jax.Array, counts: jax.Array) -> jax.Array:
        index = jnp.arange(size) + step * size
        filled = _with_columns(inputs, jnp.where(over_seeds, index, index % 64), jnp.where(over_seeds, 9, index // 64 + 1))
        tokens, _ = sampling.sample(logits, filled, init_sampling_state(size, vocab))
        return counts.at[tokens].add(1)

    return jax.lax.fori_loop(0, steps, one, jnp.zeros(vocab, jnp.int32))


def _with_columns(inputs: StepInputs, seed_low: jax.Array, kv_lens: jax.Array) -> StepInputs:
    ints = jnp.asarray(inputs.ints)
    base = 3 * inputs.num_tokens
    for column, value in (("seed_low", seed_low), ("kv_lens", kv_lens)):
        marked = dataclasses.replace(inputs, ints=np.arange(len(inputs.ints), dtype=np.int32))
        at = int(getattr(marked, column)[0])
        assert at >= base
        ints = ints.at[at : at + inputs.num_rows].set(value.astype(jnp.int32))
    return dataclasses.replace(inputs, ints=ints)


# ---------------------------------------------------------------------------------------------------- exactness and edges


def test_fractions_of_masses_are_exact() -> None:
    rng = np.random.default_rng(0)
    for limb_bits in (13, 14, 15):
        high = np.concatenate([[0, 1, 2**32 - 1], rng.integers(0, 2**32, 500)]).astype(np.uint32)
        low = np.concatenate([[0, 2**limb_bits - 1, 2**limb_bits - 1], rng.integers(0, 2**limb_bits, 500)]).astype(np.uint32)
        share = np.concatenate([[0, 2**32 - 1, 2**32 - 1], rng.integers(0, 2**32, 500)]).astype(np.uint32)
        got = sampling._fraction_of(jnp.asarray(share), sampling._Mass(jnp.asarray(high), jnp.asarray(low)), limb_bits)
        for h, lo, f, gh, gl in zip(high, low, share, np.asarray(got.high), np.asarray(got.low), strict=True):
            assert (int(gh) << limb_bits) + int(gl) == (int(f) * ((int(h) << limb_bits) + int(lo))) >> 32
            assert gl < 2**limb_bits


@pytest.mark.parametrize("vocab", [64, 49152, 151936, 262144])
def test_masses_are_exact_at_their_largest(vocab: int) -> None:
    limb_bits = sampling._limb_bits(vocab)
    mass = jax.jit(sampling._mass, static_argnums=1)
    rng = np.random.default_rng(1)
    for units in (np.full((1, vocab), 4**limb_bits), rng.integers(0, 4**limb_bits + 1, (3, vocab))):
        got = mass(units.astype(np.int32).reshape(len(units), -1, 64), limb_bits)
        exact = [sum(row.tolist()) for row in units]
        assert [(int(h) << limb_bits) + int(low) for h, low in zip(got.high, got.low, strict=True)] == exact


@jax.jit
def jit_sample_everywhere(*args: object) -> tuple[jax.Array, SamplingState]:
    with mock.patch.object(sampling, "_NEAR_BLOCKS", 10**9):
        return sampling.sample(*args)


@pytest.mark.parametrize("scale", [0.5, 4.0])
@pytest.mark.parametrize("ties", [False, True])
def test_searching_near_blocks_first_changes_nothing(scale: float, ties: bool) -> None:
    """A boundary found among the likeliest blocks is the one found among all tokens, where large nuclei make all rows look."""
    rng = np.random.default_rng(7)
    logits = (rng.standard_normal((16, LARGE_VOCAB)) * scale).astype(np.float32)
    logits = np.round(logits) if ties else logits
    rows = [Row(RANDOM, top_k=k, top_p=p, seed=i, slot=i) for i, (k, p) in enumerate(itertools.product([0, 3, 80, 16500], [0.6, 0.999]))]
    rows += [dataclasses.replace(row, slot=8 + i, seed=8 + i, temperature=0.5) for i, row in enumerate(rows)]
    small = [dataclasses.replace(row, top_k=row.top_k % 16500 or 5) for row in rows]
    for chosen in (rows, small):
        tokens, _ = run(logits, chosen)
        everywhere, _ = jit_sample_everywhere(logits, make_inputs(chosen, 64), new_state(LARGE_VOCAB))
        np.testing.assert_array_equal(tokens, everywhere)
        for i, row in enumerate(chosen):
            check_draw(logits[i].astype(np.float64), row, int(tokens[i]))


@pytest.mark.parametrize("vocab", [1, 100, 8193, 10000, 151936])
def test_ids_stay_inside_any_vocabulary_and_hopeless_rows_give_minus_one(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    good = (rng.standard_normal((3, vocab)) * 3).astype(np.float32)
    one_left = np.full(vocab, -np.inf, np.float32)
    one_left[-1] = -50.0
    with_nan, with_inf = good[0].copy(), good[1].copy()
    with_nan[vocab // 2], with_inf[vocab - 1] = np.nan, np.inf
    bad = [np.full(vocab, np.nan), np.full(vocab, -np.inf), np.full(vocab, np.inf), with_nan, with_inf]
    logits = np.stack([*good, one_left, np.zeros(vocab), np.full(vocab, 3e38), np.full(vocab, -3e38), *bad]).astype(np.float32)
    count = len(logits)
    for make in (
        lambda i: Row(SAMPLES, slot=i),
        lambda i: Row(RANDOM, seed=i, slot=i),
        lambda i: Row(RANDOM, seed=i, top_k=3, top_p=0.5, min_p=0.1, temperature=2.0, slot=i),
    ):
        tokens, state = run(logits, [make(i) for i in range(count)], exactly=True)
        assert (tokens[count - len(bad) :] == -1).all()
        assert ((tokens[: count - len(bad)] >= 0) & (tokens[: count - len(bad)] < vocab)).all()
        assert tokens[3] == vocab - 1
        assert (np.asarray(state.last_tokens) >= 0).all()


def test_tokens_of_no_probability_are_never_drawn() -> None:
    rng = np.random.default_rng(3)
    logits = np.full((512, VOCAB), -np.inf, np.float32)
    allowed = [rng.choice(VOCAB, 3, replace=False) for _ in range(512)]
    for row, ids in zip(logits, allowed, strict=True):
        row[ids] = rng.standard_normal(3)
    for position in range(1, 30):
        tokens, _ = run(logits, [Row(RANDOM, seed=i, position=position, slot=i) for i in range(512)])
        assert all(token in ids for token, ids in zip(tokens, allowed, strict=True))


def test_extreme_uniform_numbers_pick_the_first_and_the_last_token() -> None:
    units = np.zeros((2, 3, 128), np.int32)
    units[:, [0, 2], [5, 90]] = 7
    picked = sampling._pick(jnp.asarray(units), jnp.asarray([0, 2**32 - 1], jnp.uint32), 15)
    assert picked.tolist() == [5, 2 * 128 + 90]


# -------------------------------------------------------------------------------------------------------- single operations


def drawn(logits: np.ndarray, **params: object) -> set[int]:
    """Every token that 512 seeds draw."""
    rows = [Row(RANDOM, seed=i, slot=i, **params) for i in range(512)]  # type: ignore[arg-type]
    return set(run(np.tile(np.asarray(logits, np.float32), (512, 1)), rows)[0].tolist())


def test_ties_go_to_the_lower_ids() -> None:
    logits = [0.0, 2.0, 1.0, 2.0, 2.0, -1.0, 2.0, -0.0]
    assert drawn(logits, top_k=3) == {1, 3, 4}
    assert drawn(logits, top_k=1) == {1}
    assert drawn(logits, top_k=4) == {1, 3, 4, 6}
    assert drawn(logits, top_k=6) == {0, 1, 2, 3, 4, 6}
    assert drawn([1.0] * 4, top_p=0.5) == {0, 1}
    assert drawn([1.0] * 4, top_p=0.51) == {0, 1, 2}
    assert drawn([1.0] * 4, top_p=1e-9) == {0}
    assert drawn([1.0] * 4, top_p=1.0) == {0, 1, 2, 3}
    assert drawn([3.0, 1.0, 3.0], min_p=1.0) == {0, 2}
    assert run(np.asarray([logits], np.float32), [Row()])[0].tolist() == [1]
    assert sampling.greedy(jnp.asarray([logits, [np.nan] * 8], jnp.float32)).tolist() == [1, -1]


def test_restrictions_apply_one_after_the_other() -> None:
    """top_p looks at what top_k left, top_k at what min_p left."""
    probabilities = np.array([0.4, 0.3, 0.2, 0.1])
    logits = np.log(probabilities)
    assert drawn(logits, top_p=0.7 - 1e-4) == {0, 1}
    assert drawn(logits, top_k=2, top_p=0.7 - 1e-4) == {0, 1}  # 0.4 of 0.7 is not enough
    assert drawn(logits, top_k=2, top_p=0.5) == {0}
    assert drawn(logits, min_p=0.6) == {0, 1}
    assert drawn(logits, min_p=0.6, top_p=0.57) == {0}
    assert drawn(logits, temperature=1e-5) == {0}
    assert drawn(logits, temperature=0.5, min_p=0.5) == {0, 1}  # 0.09 of 0.16 stays, 0.04 goes


def test_top_k_of_one_and_a_tiny_top_p_are_greedy() -> None:
    logits = (np.random.default_rng(2).standard_normal((64, VOCAB)) * 0.1).astype(np.float32)
    greedy, _ = run(logits, [Row(slot=i) for i in range(64)])
    np.testing.assert_array_equal(greedy, logits.argmax(-1))
    for params in ({"top_k": 1}, {"top_p": 1e-12}, {"min_p": 1.0}):
        tokens, _ = run(logits, [Row(RANDOM, temperature=2.0, seed=i, slot=i, **params) for i in range(64)])
        np.testing.assert_array_equal(tokens, greedy)


def test_seeds_have_64_bits_and_the_number_drawn_is_the_documented_one() -> None:
    seeds = [0, 1, -1, 2**32, 2**32 + 1, -(2**63), 2**63 - 1, 2**31, -(2**31), 12345678901234]
    rows = [Row(RANDOM, seed=seed, position=p) for seed in seeds for p in range(1, 7)]
    tokens, _ = run(np.zeros((len(rows), VOCAB), np.float32), [dataclasses.replace(row, slot=i) for i, row in enumerate(rows)])
    assert tokens.tolist() == [int(uniform(row.seed, row.position) * VOCAB) for row in rows]
    assert len({tuple(tokens[i : i + 6]) for i in range(0, len(rows), 6)}) == len(seeds)


def test_a_row_does_not_depend_on_batch_slot_or_bucket() -> None:
    """Bitwise, for the same logits: neighbours, order, slots and padded sizes change."""
    rng = np.random.default_rng(11)
    count, vocab = 16, LARGE_VOCAB
    logits = (rng.standard_normal((count, vocab)) * rng.choice([0.5, 3.0], (count, 1))).astype(np.float32)
    choices = [
        Row(SAMPLES),
        Row(RANDOM),
        Row(RANDOM, temperature=0.6, top_p=0.9),
        Row(RANDOM, top_k=40),
        Row(RANDOM, top_k=40, top_p=0.95, min_p=0.01),
    ]
    rows = [dataclasses.replace(choices[i % 5], seed=i * 7919, position=3 + i, slot=i) for i in range(count)]
    together, _ = run(logits, rows)
    for size in (1, 16, 64):
        for start in range(0, count, max(size // 2, 1)):
            part = list(range(start, min(start + max(size // 2, 1), count)))
            rng.shuffle(part)
            moved = [dataclasses.replace(rows[i], slot=int(slot)) for i, slot in zip(part, rng.permutation(64)[: len(part)], strict=True)]
            tokens, _ = run(logits[part], moved, new_state(vocab), size=size)
            np.testing.assert_array_equal(tokens, together[part])


def test_rows_without_flags_never_read_what_a_slot_holds() -> None:
    logits = np.random.default_rng(4).standard_normal((4, 100)).astype(np.float32)
    rows = [
        Row(slot=0),
        Row(RANDOM, slot=1, seed=5),
        Row(SAMPLES | RowFlag.BIAS, slot=2),
        Row(SAMPLES | RowFlag.PENALTIES, slot=3, repetition_penalty=2.0),
    ]
    state = new_state(100)
    stale = SamplingState(
        state.last_tokens,
        state.logit_bias.at[:2].set(jnp.nan).at[3].set(-jnp.inf),
        state.token_flags.at[:3].set(-1),
    )
    np.testing.assert_array_equal(run(logits, rows, stale)[0], run(logits, rows)[0])


def test_rows_that_do_not_sample_change_nothing() -> None:
    logits = np.random.default_rng(4).standard_normal((3, 100)).astype(np.float32)
    state = dataclasses.replace(new_state(100), last_tokens=jnp.arange(41, 105, dtype=jnp.int32))
    rows = [Row(0, slot=0), Row(int(RowFlag.RANDOM | RowFlag.PENALTIES), slot=1), Row(slot=2)]
    tokens, after = run(logits, rows, state)
    assert tokens.tolist() == [-1, -1, logits[2].argmax()]
    assert after.last_tokens.tolist() == [41, 42, logits[2].argmax(), *range(44, 105)]
    assert not np.asarray(after.token_flags).any()


def test_bad_rows_hurt_themselves_only() -> None:
    rng = np.random.default_rng(8)
    logits = (rng.standard_normal((8, VOCAB)) * 2).astype(np.float32)
    rows = [Row(RANDOM | (4 if i % 2 else 8), top_p=0.9, repetition_penalty=1.5, seed=i, slot=i) for i in range(8)]
    clean, _ = run(logits, rows)
    logits[1, 17], logits[4], logits[6, 3] = np.nan, -np.inf, np.inf
    tokens, state = run(logits, rows)
    for i in range(8):
        assert tokens[i] == (-1 if i in (1, 4, 6) else clean[i])
    assert np.asarray(state.token_flags)[[1, 4, 6]].sum() == 0


def test_a_banned_nan_is_still_an_error() -> None:
    logits = np.zeros((3, 50), np.float32)
    logits[0, 7], logits[1, 7], logits[2, 7] = np.nan, np.inf, np.nan
    state = new_state(50)
    bias, flags = sampling.slot_rows(VOCAB, bad_token_ids=[7], stop_token_ids=[7], min_tokens=3)
    for slot in range(3):
        state = sampling.set_slot(state, slot, bias, flags)
    rows = [Row(SAMPLES | bits, slot=i) for i, bits in enumerate([RowFlag.BIAS, RowFlag.BIAS, RowFlag.SUPPRESS_STOP])]
    assert run(logits, rows, state)[0].tolist() == [-1, -1, -1]


# --------------------------------------------------------------------------------------------------------------- the slots


def test_slot_rows_say_what_a_request_needs() -> None:
    assert sampling.slot_rows(10, prompt=[1], stop_token_ids=[2]) is None
    assert sampling.slot_rows(10, min_tokens=3) is None
    assert sampling.slot_rows(10, stop_token_ids=[2], min_tokens=3, output=[1, 1, 1]) is None
    bias, flags = sampling.slot_rows(
        6,
        prompt=[1, 1, 2],
        output=[2, 3, 3],
        stop_token_ids=[5, 99],
        logit_bias={0: 2.5, 4: 1.0, 2: -1.0},
        allowed_token_ids=[0, 1, 4],
        bad_token_ids=[4],
        penalties=True,
    )
    np.testing.assert_array_equal(bias, np.array([2.5, 0, -np.inf, -np.inf, -np.inf, -np.inf], np.float32))
    assert flags.tolist() == [0, 1, 1 + 4, 8, 0, 2]
    assert (bias.dtype, flags.dtype) == (np.float32, np.int32)


def test_suppressed_stops_allowed_and_bad_ids_hold_for_greedy_and_drawn_rows() -> None:
    logits = np.array([[9.0, 8.0, 7.0, 6.0, 5.0]] * 2, np.float32)
    for params, bits, expected in (
        ({"stop_token_ids": [0, 1], "min_tokens": 2}, RowFlag.SUPPRESS_STOP, 2),
        ({"allowed_token_ids": [3]}, RowFlag.BIAS, 3),
        ({"bad_token_ids": [0]}, RowFlag.BIAS, 1),
        ({"logit_bias": {4: 100.0}}, RowFlag.BIAS, 4),
        (
            {"allowed_token_ids": [0, 3], "bad_token_ids": [0], "stop_token_ids": [1], "min_tokens": 1},
            RowFlag.BIAS | RowFlag.SUPPRESS_STOP,
            3,
        ),
    ):
        state = new_state(5)
        for slot in range(2):
            state = sampling.set_slot(state, slot, *sampling.slot_rows(VOCAB, **params))
        tokens, _ = run(logits, [Row(SAMPLES | bits, slot=0), Row(RANDOM | bits, temperature=0.01, slot=1)], state)
        assert tokens.tolist() == [expected, expected]


def test_nothing_left_to_choose_gives_minus_one() -> None:
    state = sampling.set_slot(new_state(5), 0, *sampling.slot_rows(VOCAB, allowed_token_ids=[2], stop_token_ids=[2], min_tokens=1))
    for base in (SAMPLES, RANDOM):
        assert run(np.zeros((1, 5), np.float32), [Row(base | RowFlag.BIAS | RowFlag.SUPPRESS_STOP)], state)[0].tolist() == [-1]


def test_penalties_follow_the_tokens_that_the_device_sampled() -> None:
    """Ten steps without the host: counts on the device against counts in Python."""
    rng = np.random.default_rng(6)
    vocab, prompt, output = 12, [0, 1, 2], [3, 3]
    logits = (rng.standard_normal(vocab) * 2).astype(np.float32)
    row = Row(SAMPLES | RowFlag.PENALTIES, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.45, slot=1)
    state = sampling.set_slot(new_state(vocab), 1, *sampling.slot_rows(VOCAB, prompt=prompt, output=output, penalties=True))
    for _ in range(10):
        flags = np.zeros(vocab, np.int64)
        np.add.at(flags, output, int(TokenFlag.OUTPUT_ONE))
        flags[prompt] |= TokenFlag.IN_PROMPT
        expected = int(adjusted(logits, row, flags=flags).argmax())
        tokens, state = run(logits[None], [row], state)
        assert tokens.tolist() == [expected]
        output.append(expected)
    assert len(set(output)) > 3
    assert int(state.last_tokens[1]) == output[-1]
    assert int(state.last_tokens[0]) == 0


def test_odd_repetition_penalties_stay_finite() -> None:
    """A subnormal factor is flushed to zero by some devices; a masked token must not come back, nor a large logit overflow."""
    logits = np.array([[20.0, -5.0, 0.0, -np.inf]], np.float32)
    state = sampling.set_slot(new_state(4), 0, *sampling.slot_rows(VOCAB, prompt=[0, 1, 3], penalties=True))
    for factor in (5e-324, 1e-38, 1e-3, 10.0):
        tokens, _ = run(logits, [Row(SAMPLES | RowFlag.PENALTIES, repetition_penalty=factor)], state)
        assert tokens.tolist() == [0]


# ------------------------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("vocab", [7, 20, 1000])
def test_logprobs_and_ranks(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = np.round(rng.standard_normal((6, vocab)) * 3, 1).astype(np.float32)
    logits[3, : vocab // 2] = -np.inf
    ids = rng.integers(0, vocab, 6).astype(np.int32)
    ids[3], ids[4] = 0, -1
    got = jit_logprobs(logits, ids)
    x = logits.astype(np.float64)
    expected = x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
    width = min(20, vocab)
    for i in range(6):
        if i == 4:
            assert got.logprobs[i] == -np.inf
            continue
        np.testing.assert_allclose(got.logprobs[i], expected[i, ids[i]], atol=2e-6)
        assert got.ranks[i] == 1 + (x[i] > x[i, ids[i]]).sum()
        order = np.lexsort((np.arange(vocab), -x[i]))[:width]
        np.testing.assert_array_equal(got.top_ids[i, :width], order)
        np.testing.assert_allclose(got.top_logprobs[i, :width], expected[i, order], atol=2e-6)
        assert (np.asarray(got.top_ids[i, width:]) == -1).all()
        assert (np.asarray(got.top_logprobs[i, width:]) == -np.inf).all()


@pytest.mark.parametrize("vocab", [20, 300, 1280])
def test_most_likely_ids_are_those_of_top_k(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    x = rng.standard_normal((8, vocab)).astype(np.float32)
    x[1] = np.round(x[1])
    x[2, rng.random(vocab) < 0.95] = -np.inf
    x[3] = 1.0
    x[4, [0, vocab - 1]] = np.nan
    x[5, vocab // 2] = np.inf
    x[6] = np.where(rng.random(vocab) < 0.5, 0.0, -0.0)
    x[7] = -np.inf
    np.testing.assert_array_equal(jax.jit(sampling._best, static_argnums=1)(x, 20), jax.lax.top_k(x, 20)[1])


@pytest.mark.parametrize("number", [1, 5, 60])
def test_leading_blocks_are_those_of_top_k(number: int) -> None:
    rng = np.random.default_rng(number)
    maxima = rng.standard_normal((6, 60)).astype(np.float32)
    maxima[1:3] = np.round(maxima[1:3])
    maxima[3], maxima[4, 3:] = -np.inf, -np.inf
    least, blocks = sampling._leading(jnp.asarray(maxima), number)
    expected, indices = jax.lax.top_k(maxima, number)
    np.testing.assert_array_equal(least, expected[:, -1])
    np.testing.assert_array_equal(blocks, np.sort(indices, axis=-1))


def test_nothing_sorts() -> None:
    """A TPU's compiler takes seconds for each sort, in every program of the engine."""
    logits, inputs = np.zeros((2, LARGE_VOCAB), np.float32), make_inputs([Row(), Row(slot=1)], 64)
    for lowered in (jit_sample.lower(logits, inputs, new_state(LARGE_VOCAB)), jit_logprobs.lower(logits, inputs.slots)):
        operations = {word for word in ("stablehlo.sort", "chlo.top_k", "@top_k") if word in lowered.as_text()}
        assert not operations


def test_logprobs_are_never_nan() -> None:
    logits = np.zeros((4, 30), np.float32)
    logits[0, 3], logits[1], logits[2, 5] = np.nan, -np.inf, np.inf
    got = jit_logprobs(logits, np.array([1, 1, 1, -1], np.int32))
    assert not any(np.isnan(np.asarray(a, np.float32)).any() for a in got)
    np.testing.assert_allclose(got.top_logprobs[3], -np.log(30), atol=1e-6)


@pytest.mark.parametrize("width", [21, 64, 200])
def test_more_log_probabilities_are_the_same_and_go_on(width: int) -> None:
    """With ties, in a vocabulary that is narrower than the widest; the first twenty to the bit."""
    rng = np.random.default_rng(width)
    logits = np.round(rng.standard_normal((6, 150)) * 4).astype(np.float32) + 0.0  # -0 comes after 0, as with lax.top_k
    tokens = rng.integers(0, 150, 6).astype(np.int32)
    few, many = jit_logprobs(logits, tokens), jax.jit(functools.partial(sampling.token_logprobs, width=width))(logits, tokens)
    for one, other in zip(few, many, strict=True):
        np.testing.assert_array_equal(one, np.asarray(other)[:, :20] if one.ndim == 2 else other)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :width]
    np.testing.assert_array_equal(np.asarray(many.top_ids)[:, : order.shape[1]], order)
    assert (np.asarray(many.top_ids)[:, 150:] == -1).all() and many.top_ids.shape == many.top_logprobs.shape == (6, width)
    inputs = make_inputs([Row(SAMPLES | RowFlag.LOGPROBS, slot=i) for i in range(6)], 6)
    for one, other in zip(many, sampling.sampled_logprobs(logits, tokens, inputs, width), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    inputs.targets[:] = tokens
    in_prompt = sampling.prompt_logprobs(jnp.asarray(logits), lambda x: x, inputs, width)
    np.testing.assert_array_equal(in_prompt.top_ids, many.top_ids)


def test_sampled_logprobs_only_where_asked_for() -> None:
    logits = np.random.default_rng(9).standard_normal((2, 50)).astype(np.float32)
    tokens = np.array([3, 4], np.int32)
    quiet = sampling.sampled_logprobs(logits, tokens, make_inputs([Row(), Row(slot=1)], 2))
    assert not any(np.asarray(a).any() for a in quiet)
    asked = sampling.sampled_logprobs(logits, tokens, make_inputs([Row(), Row(SAMPLES | RowFlag.LOGPROBS, slot=1)], 2))
    np.testing.assert_allclose(asked.logprobs, jit_logprobs(logits, tokens).logprobs, atol=1e-6)


@pytest.mark.parametrize("total", [1, 5, 32, 75, 128])
def test_prompt_logprobs_in_chunks(total: int) -> None:
    rng = np.random.default_rng(total)
    hidden = rng.standard_normal((total, 8)).astype(np.float32)
    weights = rng.standard_normal((8, 60)).astype(np.float32)
    inputs = StepInputs.zeros(total, 1, 1, max_num_seqs=1)
    got = sampling.prompt_logprobs(hidden, lambda h: h @ weights, inputs)
    assert not any(np.asarray(a).any() for a in got)
    inputs.targets[:] = np.where(rng.random(total) < 0.7, rng.integers(0, 60, total), -1)
    inputs.targets[-1] = 59
    got = jax.jit(lambda h, i: sampling.prompt_logprobs(h, lambda h: h @ weights, i))(hidden, inputs)
    expected = jit_logprobs(hidden @ weights, np.asarray(inputs.targets))
    asked = inputs.targets >= 0
    for mine, whole in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(mine)[asked], np.asarray(whole)[asked], atol=1e-5)
        assert not np.asarray(mine)[~asked].any()


# ------------------------------------------------------------------------------------------------------------------ memory


def test_state_is_updated_in_place() -> None:
    """M x V is 8 MiB here and S x V 64 KiB: no copy of a state array, in any branch, fits into the scratch memory."""
    slots, vocab, rows = 512, 4096, 4
    state = jax.eval_shape(lambda: init_sampling_state(slots, vocab))
    inputs = make_inputs([Row(slot=i) for i in range(rows)], slots)
    logits = jax.ShapeDtypeStruct((rows, vocab), jnp.float32)
    step = jax.jit(sampling.sample, donate_argnums=2).lower(logits, inputs, state).compile().memory_analysis()
    assert step.temp_size_in_bytes < slots * vocab * 4 / 4
    assert step.alias_size_in_bytes >= 2 * slots * vocab * 4
    row = jax.ShapeDtypeStruct((vocab,), jnp.float32), jax.ShapeDtypeStruct((vocab,), jnp.int32)
    write = sampling.set_slot.lower(state, jax.ShapeDtypeStruct((), jnp.int32), *row).compile().memory_analysis()
    assert write.temp_size_in_bytes < vocab * 64
    assert write.alias_size_in_bytes >= 2 * slots * vocab * 4


def test_prompt_logprobs_never_hold_all_logits() -> None:
    total, vocab = 1024, 4096
    inputs = StepInputs.zeros(total, 1, 1, max_num_seqs=1)
    hidden, weights = jax.ShapeDtypeStruct((total, 16), jnp.float32), jax.ShapeDtypeStruct((16, vocab), jnp.float32)
    compiled = jax.jit(lambda h, w, i: sampling.prompt_logprobs(h, lambda x: x @ w, i)).lower(hidden, weights, inputs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < total * vocab * 4 / 4


def test_greedy_steps_copy_no_logits() -> None:
    """Outside branches that a greedy step skips, nothing of the size of the logits is written."""
    rows, vocab = 8, 8192
    state = jax.eval_shape(lambda: init_sampling_state(rows, vocab))
    compiled = jax.jit(sampling.sample, donate_argnums=2).lower(
        jax.ShapeDtypeStruct((rows, vocab), jnp.float32), make_inputs([Row(slot=i) for i in range(rows)], rows), state
    )
    entry = compiled.compile().as_text().split("\nENTRY ")[1]
    made = [
        line
        for line in entry.splitlines()
        if f"= f32[{rows},{vocab}]" in line and "parameter(" not in line and "get-tuple-element(" not in line
    ]
    assert made == []
