"""The next candidates of beam searches against NumPy, in float32 exactly, wherever the rows lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.beam_candidates import Candidates, beam_candidates
from jaxpaged.sampling import token_logprobs
from jaxpaged.state import MAX_BEAM_WIDTH, TOP_LOGPROBS, RowFlag, StepInputs

VOCAB = 131


def make_inputs(widths, scores, rows):
    """One search of each width (0 for a row of another request), side by side; the rest is padding."""
    inputs = StepInputs.zeros(rows, rows, 1, max_num_seqs=rows)
    at = 0
    for width, mine in zip(widths, scores, strict=True):
        for index in range(width):
            inputs.flags[at + index] = RowFlag.SAMPLES | RowFlag.BEAM | RowFlag.LOGPROBS
            inputs.beam_index[at + index], inputs.beam_score[at + index] = index, mine[index]
        if width == 0:
            inputs.flags[at] = RowFlag.SAMPLES
        at += max(width, 1)
    return inputs


@jax.jit
def find(logits, inputs):
    top = token_logprobs(logits, jnp.zeros(logits.shape[0], jnp.int32))
    return beam_candidates(top.top_ids, top.top_logprobs, inputs), top


def test_an_engine_that_tells_more_log_probabilities_searches_among_as_many():
    rng = np.random.default_rng(9)
    logits = rng.normal(0, 3, (6, VOCAB)).astype(np.float32)
    inputs = make_inputs([4, 2], [rng.normal(-5, 2, 4), rng.normal(-5, 2, 2)], 6)
    wide = token_logprobs(logits, jnp.zeros(6, jnp.int32), 50)
    got, _ = find(logits, inputs)
    for one, other in zip(got, jax.jit(beam_candidates)(wide.top_ids, wide.top_logprobs, inputs), strict=True):
        np.testing.assert_array_equal(one, other)


def oracle(ids, logprobs, scores):
    """Candidates of one search from its rows' 20 most likely tokens: sorted by score, then parent, then id."""
    found = [
        (-(np.float32(score) + logprob), parent, int(i))
        for parent, score in enumerate(scores)
        for i, logprob in zip(ids[parent], logprobs[parent], strict=True)
        if i >= 0
    ]
    return [(parent, i, float(-negative)) for negative, parent, i in sorted(found)][:TOP_LOGPROBS]


def read(candidates: Candidates, row):
    parents, ids, scores = (np.asarray(array)[row] for array in candidates)
    return [(int(p), int(i), float(s)) for p, i, s in zip(parents, ids, scores, strict=True) if i >= 0]


@pytest.mark.parametrize("seed", range(6))
def test_the_best_of_all_rows_of_each_search(seed):
    rng = np.random.default_rng(seed)
    widths = [[1], [MAX_BEAM_WIDTH], [2, 3, 0, 1, 4], [0, 5, 5], [4, 0, 0, 2], [1, 1, 1, 1]][seed]
    rows = sum(max(width, 1) for width in widths) + 2
    logits = rng.normal(0, 3, (rows, VOCAB)).astype(np.float32)
    scores = [np.float32(rng.normal(-5, 2, width)) for width in widths]
    got, top = find(logits, make_inputs(widths, scores, rows))
    at = 0
    for width, mine in zip(widths, scores, strict=True):
        if width:
            rows_of = slice(at, at + width)
            want = oracle(np.asarray(top.top_ids)[rows_of], np.asarray(top.top_logprobs)[rows_of], mine)
            assert read(got, at) == want
            exact = logits[rows_of].astype(np.float64)
            exact = exact - np.log(np.exp(exact).sum(-1, keepdims=True)) + mine[:, None].astype(np.float64)
            np.testing.assert_allclose([s for _, _, s in want], np.sort(exact.ravel())[::-1][:TOP_LOGPROBS], rtol=1e-5)
            for parent, token, score in want:
                np.testing.assert_allclose(score, exact[parent, token], rtol=1e-5)
        at += max(width, 1)


def test_rows_that_begin_no_search_have_zeros():
    logits = np.random.default_rng(0).normal(size=(8, VOCAB)).astype(np.float32)
    got, _ = find(logits, make_inputs([0, 3, 0], [[], [-1, -2, -3], []], 8))
    for row in (0, 2, 3, 4, 5, 6, 7):
        assert not any(np.asarray(array)[row].any() for array in got)


def test_equal_scores_go_to_the_lower_parent_and_then_to_the_lower_id():
    logits = np.zeros((3, VOCAB), np.float32)
    logits[:, 50:60] = 1.0
    got, _ = find(logits, make_inputs([3], [[-1.0, -1.0, -1.0]], 3))
    assert [(p, i) for p, i, _ in read(got, 0)] == [(p, i) for p in range(2) for i in range(50, 60)]


def test_log_probabilities_that_round_to_one_score_are_ordered_by_id():
    logits = np.full((1, VOCAB), -20.0, np.float32)
    logits[0, [90, 40, 70, 10]] = 1.0 + np.float32([3e-6, 2e-6, 1e-6, 0.0])  # distinct, but not beside a score of -1000
    got, top = find(logits, make_inputs([1], [[-1000.0]], 1))
    assert np.asarray(top.top_ids)[0, :4].tolist() == [90, 40, 70, 10]
    assert len(set(np.asarray(top.top_logprobs)[0, :4].tolist())) == 4
    assert [i for _, i, _ in read(got, 0)][:4] == [10, 40, 70, 90]


def test_a_small_vocabulary_gives_fewer_candidates():
    logits = np.random.default_rng(0).normal(size=(2, 7)).astype(np.float32)
    got, top = find(logits, make_inputs([2], [[-1.0, -2.0]], 2))
    assert read(got, 0) == oracle(np.asarray(top.top_ids), np.asarray(top.top_logprobs), np.float32([-1, -2]))
    assert len(read(got, 0)) == 14


def test_a_row_that_is_not_a_number_offers_nothing():
    logits = np.random.default_rng(0).normal(size=(2, VOCAB)).astype(np.float32)
    logits[0, 5] = np.nan
    got, top = find(logits, make_inputs([2], [[-1.0, -2.0]], 2))
    candidates = read(got, 0)
    assert {parent for parent, _, _ in candidates} == {1}
    assert candidates == [(1, i, s) for _, i, s in oracle(np.asarray(top.top_ids)[1:], np.asarray(top.top_logprobs)[1:], np.float32([-2]))]


@pytest.mark.parametrize("place", [0, 1, 5, 11])
def test_bits_do_not_depend_on_the_place_or_the_neighbours(place):
    rng = np.random.default_rng(3)
    mine, scores = rng.normal(0, 3, (3, VOCAB)).astype(np.float32), np.float32([-3, -3.5, -4])
    alone, _ = find(mine, make_inputs([3], [scores], 3))
    crowd = rng.normal(0, 3, (16, VOCAB)).astype(np.float32)
    crowd[place : place + 3] = mine
    widths = [0] * place + [3] + ([2] if place < 11 else [])
    among, _ = find(crowd, make_inputs(widths, [[]] * place + [scores] + ([[0, 0]] if place < 11 else []), 16))
    assert read(among, place) == read(alone, 0)


def test_nothing_is_computed_without_a_search():
    text = find.lower(np.zeros((4, VOCAB), np.float32), make_inputs([0] * 4, [[]] * 4, 4)).as_text()
    assert "stablehlo.case" in text or "stablehlo.if" in text
