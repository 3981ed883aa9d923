"""Beam search on the host: transformers' beams in made-up models, from goldens and live, and its rules one by one."""

import json
from pathlib import Path

import pytest
from scheduling.beam_cases import make_setting, search

from jaxpaged.scheduling.beams import BeamSearch
from jaxpaged.scheduling.plan import BeamCandidate
from jaxpaged.scheduling.request import FinishReason

GOLDENS = json.loads((Path(__file__).parent / "beam_goldens.json").read_text())
STOP = 0


def make(width=2, max_tokens=8, **settings):
    return BeamSearch(width=width, max_tokens=max_tokens, stop_token_ids=(STOP,), **settings)


def candidates(*triples):
    return [BeamCandidate(*triple) for triple in triples]


def assert_same_beams(setting, expected):
    found = search(setting, setting.width)
    assert [list(hypothesis.tokens) for hypothesis in found] == [tokens for tokens, _ in expected]
    assert [hypothesis.score for hypothesis in found] == pytest.approx([score for _, score in expected], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("part", range(8))
def test_beams_are_those_of_transformers_in_made_up_models(part):
    for seed in range(part, len(GOLDENS), 8):
        assert_same_beams(make_setting(seed), GOLDENS[seed])


@pytest.mark.slow
def test_beams_are_those_of_transformers_live():
    pytest.importorskip("torch", reason="compares with transformers on torch, which is not installed here")
    from scheduling.make_beam_goldens import search_torch

    for seed in range(1000, 1200):
        setting = make_setting(seed)
        assert_same_beams(setting, search_torch(setting))


def test_the_best_of_all_sequences_is_found_when_no_beam_is_ever_dropped():
    """A model with two tokens, one of which ends: width 4 keeps everything, so the search is exhaustive."""
    beams = make(width=4, max_tokens=4, length_penalty=0.0, early_stopping="never")
    live = beams.advance([()], candidates((0, 1, -0.1), (0, STOP, -2.4)))
    live = beams.advance([(1,)], candidates((0, STOP, -0.2), (0, 1, -2.5)))
    assert [each.token_id for each in live] == [1]
    assert not beams.done
    beams.advance([(1, 1)], candidates((0, 1, -2.6), (0, STOP, -4.7)))
    assert beams.advance([(1, 1, 1)], candidates((0, STOP, -2.7), (0, 1, -5.0))) == []
    assert [(hypothesis.tokens, hypothesis.finish_reason) for hypothesis in beams.results(4)] == [
        ((1, STOP), FinishReason.STOP),
        ((STOP,), FinishReason.STOP),
        ((1, 1, 1, STOP), FinishReason.STOP),
        ((1, 1, STOP), FinishReason.STOP),
    ]


def test_a_beam_that_ends_below_the_best_width_candidates_is_dropped():
    beams = make()
    live = beams.advance([()], candidates((0, 5, -1.0), (0, 6, -2.0), (0, STOP, -2.1), (0, 7, -3.0)))
    assert [each.token_id for each in live] == [5, 6]
    assert beams.results(2) == ()


def test_beams_below_the_best_width_take_the_place_of_those_that_end():
    beams = make()
    live = beams.advance([(5,), (6,)], candidates((1, STOP, -1.0), (0, STOP, -2.0), (1, 7, -3.0), (0, 8, -4.0)))
    assert live == []
    assert [hypothesis.tokens for hypothesis in beams.results(2)] == [(6, STOP), (5, STOP)]
    assert [hypothesis.score for hypothesis in beams.results(2)] == [-0.5, -1.0]
    beams = make(early_stopping="never")
    live = beams.advance([(5,), (6,)], candidates((1, STOP, -1.0), (0, STOP, -2.0), (1, 7, -3.0), (0, 8, -4.0)))
    assert live == candidates((1, 7, -3.0), (0, 8, -4.0)), "-3 / 8 tokens may still beat -1"


@pytest.mark.parametrize(("early_stopping", "done"), [(True, True), (False, False), ("never", False)])
def test_when_width_beams_have_ended_early_stopping_decides(early_stopping, done):
    beams = make(early_stopping=early_stopping)
    beams.advance([(5,)], candidates((0, STOP, -2.0), (0, 7, -2.1), (0, 8, -2.2)))
    assert not beams.done
    beams.advance([(5, 7)], candidates((0, 9, -2.3), (0, STOP, -6.0)))
    assert beams.done is done
    assert [hypothesis.finish_reason for hypothesis in beams.results(2)] == [FinishReason.STOP] * 2


def test_never_takes_the_length_that_is_best_for_a_beam():
    beams = make(early_stopping="never", length_penalty=-1.0)
    beams.advance([()], candidates((0, STOP, -0.5), (0, 5, -1.0), (0, 6, -2.0)))
    beams.advance([(5,), (6,)], candidates((0, 7, -1.4), (0, STOP, -1.5), (0, 8, -2.0)))
    assert not beams.done, "-1.4 * 2 tokens is more than -1.5 * 2, though not at 8 tokens"


def test_at_max_tokens_the_best_live_beams_end():
    beams = make(max_tokens=2)
    beams.advance([()], candidates((0, 5, -1.0), (0, 6, -2.0), (0, 7, -3.0)))
    assert beams.advance([(5,), (6,)], candidates((1, 8, -3.0), (0, STOP, -3.5), (0, 9, -4.0))) == []
    assert beams.done
    assert [(h.tokens, h.score, h.cumulative_logprob, h.finish_reason) for h in beams.results(1)] == [
        ((6, 8), -1.5, -3.0, FinishReason.LENGTH)
    ]
    assert [(h.tokens, h.finish_reason) for h in beams.results(9)] == [((6, 8), FinishReason.LENGTH), ((5, STOP), FinishReason.STOP)]


def test_before_min_tokens_a_stop_token_is_no_candidate():
    beams = make(min_tokens=1)
    live = beams.advance([()], candidates((0, STOP, -0.1), (0, 5, -1.0), (0, STOP, -1.1), (0, 6, -2.0)))
    assert [each.token_id for each in live] == [5, 6]
    beams.advance([(5,), (6,)], candidates((0, STOP, -1.5), (0, 7, -2.0), (1, 8, -3.0)))
    assert [hypothesis.tokens for hypothesis in beams.results(2)] == [(5, STOP)]


def test_of_equal_beams_the_earlier_candidate_comes_first():
    beams = make(length_penalty=0.0)
    beams.advance([(5,), (6,)], candidates((0, STOP, -1.0), (1, STOP, -1.0), (0, 7, -1.0)))
    assert [hypothesis.tokens for hypothesis in beams.results(2)] == [(5, STOP), (6, STOP)]


def test_nothing_to_go_on_with_ends_the_search():
    beams = make()
    assert beams.advance([(5,)], []) == []
    assert beams.done
    assert beams.results(2) == ()
    with pytest.raises(ValueError, match="over"):
        beams.advance([], [])
