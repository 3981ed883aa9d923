"""Beam search through the whole engine finds transformers' beams on random checkpoints, whatever else is in the batch."""

import json
from pathlib import Path

import pytest
from beam_checkpoints import NAMES, SEARCHES, prompts_of
from model_checkpoints import CASES, make_tensors, write_checkpoint

from jaxpaged import LLM, BeamSearchParams, RequestError, SamplingParams
from jaxpaged.config import TINY_MODEL

GOLDENS = json.loads((Path(__file__).parent.parent / "models" / "goldens" / "beams.json").read_text())
SCORE_TOLERANCE = 1e-4


def load(directory, name, seed=0, **options):
    """Loads a random checkpoint, with the tiny model's tokenizer, whose text nobody looks at."""
    write_checkpoint(directory, CASES[name], make_tensors(CASES[name], seed))
    sizes = {"page_size": 4, "num_pages": 257, "max_num_seqs": 16, "max_num_batched_tokens": 32, "token_buckets": (32,)}
    return LLM(str(directory), tokenizer=str(TINY_MODEL), compilation_cache_dir="", show_progress=False, **{**sizes, **options})


def params_of(search, stops):
    return SamplingParams(
        use_beam_search=True,
        n=search.n,
        beam_width=search.width,
        max_tokens=search.max_tokens,
        min_tokens=search.min_tokens,
        stop_token_ids=stops,
        ignore_eos=True,
        length_penalty=search.length_penalty,
        early_stopping=search.early_stopping,
    )


def assert_same_beams(search, stops, completions, beams):
    assert [completion.token_ids for completion in completions] == [tokens for tokens, _ in beams]
    for index, (completion, (tokens, score)) in enumerate(zip(completions, beams, strict=True)):
        assert completion.index == index
        assert completion.cumulative_logprob / len(tokens) ** search.length_penalty == pytest.approx(score, rel=SCORE_TOLERANCE)
        assert completion.finish_reason == ("stop" if tokens[-1] in stops else "length")
        assert completion.stop_reason == (tokens[-1] if tokens[-1] in stops else None)


def search_all(llm, name, results, seed=1, num_long=0):
    """Runs all searches at once, between greedy and sampling requests (and behind some that grow long), and compares."""
    prompts = prompts_of(name, seed)
    searches = [params_of(search, result["stops"]) for search, result in zip(SEARCHES, results, strict=True)]
    others = [SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True), SamplingParams(seed=5, n=3, max_tokens=7, ignore_eos=True)]
    alone = [llm.generate([prompts[0]], params, use_tqdm=False)[0] for params in others]
    long = [SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)] * num_long
    order = [*long, others[0], *searches[:5], others[1], *searches[5:]]
    outputs = llm.generate([[7, i] for i in range(num_long)] + [prompts[0], *prompts[:5], prompts[0], *prompts[5:]], order, use_tqdm=False)
    del outputs[:num_long]
    for found, expected in zip((outputs.pop(6), outputs.pop(0)), reversed(alone), strict=True):
        assert [completion.token_ids for completion in found.outputs] == [completion.token_ids for completion in expected.outputs]
    for search, result, output in zip(SEARCHES, results, outputs, strict=True):
        assert_same_beams(search, result["stops"], output.outputs, result["beams"])


def test_beams_are_those_of_transformers(tmp_path):
    llm = load(tmp_path, "llama")
    search_all(llm, "llama", GOLDENS["llama"])
    llm.close()


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_beams_do_not_depend_on_preemption_and_the_prefix_cache(tmp_path, mode):
    """A pool that holds a part of the demand; then once more, with prompts in the cache."""
    name = "qwen3_window_bias"
    llm = load(tmp_path, name, num_pages=65, max_num_seqs=32, preemption_mode=mode, swap_space=0.01)
    llm._engine.scheduler.headroom = 0
    search_all(llm, name, GOLDENS[name], num_long=6)
    assert llm.get_metrics().preemptions > 0
    assert (llm.get_metrics().swaps > 0) == (mode == "swap")
    hits = llm.get_metrics().prefix_cache_hits
    search_all(llm, name, GOLDENS[name])
    assert llm.get_metrics().prefix_cache_hits > hits
    llm.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_beams_are_those_of_transformers_live(name, tmp_path):
    pytest.importorskip("torch", reason="compares with transformers on torch, which is not installed here")
    from models.make_beam_goldens import search_all as search_all_torch

    expected = search_all_torch(tmp_path / "torch", name, seed=7)
    llm = load(tmp_path / "ours", name, seed=7)
    search_all(llm, name, expected, seed=8)
    llm.close()


def test_beam_search_gives_what_vllms_does(small):
    llm = small.llm
    ids = llm.get_tokenizer().encode("the cat sat")
    outputs = llm.beam_search([{"prompt_token_ids": ids}, "the cat sat"], BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True))
    for output in outputs:
        assert len(output.sequences) == 3
        logprobs = [beam.cum_logprob for beam in output.sequences]
        assert logprobs == sorted(logprobs, reverse=True) and logprobs[0] < 0
        for beam in output.sequences:
            assert beam.tokens[: len(ids)] == ids and len(beam.tokens) == len(ids) + 6
            assert beam.text == llm.get_tokenizer().decode(beam.tokens)
            assert (beam.finish_reason, beam.stop_reason) == ("length", None)
    assert [beam.tokens for beam in outputs[0].sequences] == [beam.tokens for beam in outputs[1].sequences]
    params = SamplingParams(use_beam_search=True, beam_width=3, n=2, max_tokens=6, ignore_eos=True)
    (two,) = llm.beam_search("the cat sat", params)
    assert [beam.tokens for beam in two.sequences] == [beam.tokens for beam in outputs[0].sequences[:2]]


def test_the_sum_of_log_probabilities_is_the_samples_own(small):
    """A beam's score is what scoring its tokens as a prompt gives."""
    llm = small.llm
    ids = llm.get_tokenizer().encode("the cat sat")
    (output,) = llm.beam_search([ids], BeamSearchParams(beam_width=4, max_tokens=5, ignore_eos=True))
    scored = llm.generate([beam.tokens for beam in output.sequences], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    for beam, score in zip(output.sequences, scored, strict=True):
        entries = zip(beam.tokens[len(ids) :], score.prompt_logprobs[len(ids) :], strict=True)
        assert beam.cum_logprob == pytest.approx(sum(entry[token].logprob for token, entry in entries), abs=1e-4)


def test_one_beam_is_greedy_decoding(small):
    (beam,) = small.llm.beam_search("the cat", BeamSearchParams(beam_width=1, max_tokens=12))[0].sequences
    (greedy,) = small.llm.generate("the cat", SamplingParams(temperature=0.0, max_tokens=12), use_tqdm=False)[0].outputs
    assert beam.tokens[-len(greedy.token_ids) :] == greedy.token_ids


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (lambda: BeamSearchParams(beam_width=11, max_tokens=4), "beam_width"),
        (lambda: BeamSearchParams(beam_width=2, max_tokens=4, temperature=0.5), "temperature"),
        (lambda: BeamSearchParams(beam_width=5, max_tokens=4), "at most 4"),
        (lambda: SamplingParams(n=2), "use_beam_search"),
    ],
)
def test_what_does_not_fit_is_named(small, params, match):
    with pytest.raises(RequestError, match=match):
        small.llm.beam_search("the cat", params())
