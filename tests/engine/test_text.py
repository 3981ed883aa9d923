"""Properties of text: streaming adds up to decoding, stop strings are found as in the full text, whatever the pieces."""

import codecs
import dataclasses
import itertools
import json
import pickle
import random

import pytest
import tokenizers
import transformers
from engine_fakes import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, processors

from jaxpaged import LLM
from jaxpaged.config import TINY_MODEL
from jaxpaged.engine import tokenizer as tokenizer_module
from jaxpaged.engine.output import LEAST_LOGPROB, OutputProcessor, PromptText, StopStrings, describe_token
from jaxpaged.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from jaxpaged.errors import CheckpointError, RequestError
from jaxpaged.scheduling.plan import TokenEvent, TokenLogprobs
from jaxpaged.scheduling.request import FinishReason, Request, SamplingParams

TEXTS = [
    "Hello, world!",
    " leading",
    "héllo wörld",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family",
    "\n\n\ttabs",
    "a\u0301 combining",
    "مرحبا",
    "🇩🇪🏳️‍🌈",
    "x" * 50,
]


@pytest.fixture(scope="module")
def tiny():
    return Tokenizer.load(TINY_MODEL)


@pytest.fixture(scope="module")
def sentencepiece():
    """A tokenizer of Llama 2's kind: a space in front of words, byte tokens for what is not in the vocabulary."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "\u2581the",
        "\u2581cat",
        "s",
        "at",
        "c",
        "\u2581c",
        "é",
        "語",
    ]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [("\u2581", "c"), ("\u2581c", "at")]
    model = models.BPE(vocabulary | {"\u2581cat": vocabulary["\u2581cat"]}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_and_decoding_are_inverse(tiny, text):
    assert tiny.decode(tiny.encode(text)) == text


def test_decoding_is_the_tokenizers_own(tiny):
    rng = random.Random(0)
    for _ in range(3000):
        ids = [rng.randrange(tiny.vocab_size) for _ in range(rng.randrange(12))]
        for skip in (True, False):
            assert tiny.decode(ids, skip_special_tokens=skip) == tiny._plain.decode(ids, skip_special_tokens=skip)


def test_decoding_sentencepiece_is_the_tokenizers_own_where_bytes_are_characters(sentencepiece):
    rng = random.Random(1)
    characters = [[3 + byte for byte in char.encode()] for char in "aß語👍"]
    for _ in range(1000):
        ids = [i for _ in range(rng.randrange(8)) for i in rng.choice([*characters, [1], [2], *[[i] for i in range(259, 268)]])]
        for skip in (True, False):
            assert sentencepiece.decode(ids, skip_special_tokens=skip) == sentencepiece._plain.decode(ids, skip_special_tokens=skip), ids


@pytest.mark.parametrize("kind", ["tiny", "sentencepiece"])
def test_streaming_adds_up_to_decoding(request, kind):
    """For random ids, any split into prompt and output, halves of characters included."""
    tokenizer = request.getfixturevalue(kind)
    rng = random.Random(2)
    for case in range(3000):
        ids = [rng.randrange(tokenizer.vocab_size + 2) for _ in range(rng.randrange(1, 14))]
        if case % 2:
            text = "".join(rng.choice("aé日👍🇩 ") for _ in range(6))
            ids = tokenizer.encode(text, add_special_tokens=False) + ids[:2]
        split, skip = rng.randrange(len(ids) + 1), rng.random() < 0.5
        detokenizer = IncrementalDetokenizer(tokenizer, ids[:split], skip_special_tokens=skip)
        pieces = [detokenizer.push(token_id) for token_id in ids[split:]]
        text = "".join(pieces) + detokenizer.flush()
        whole, before = (tokenizer.decode(part, skip_special_tokens=skip) for part in (ids, ids[:split]))
        if not before.endswith("\ufffd"):
            assert before + text == whole
        else:  # the rest of the prompt's last character belongs to the output
            assert whole.endswith(text) and len(before) + len(text) - len(whole) in (0, 1, 2, 3)
        for piece in pieces:
            assert not (piece.endswith("\ufffd") and whole.count("\ufffd") < sum(p.count("\ufffd") for p in pieces))


def test_half_characters_are_held_back(tiny):
    ids = tiny.encode("👍")
    assert len(ids) > 1
    detokenizer = IncrementalDetokenizer(tiny)
    assert [detokenizer.push(token_id) for token_id in ids] == [""] * (len(ids) - 1) + ["👍"]
    assert detokenizer.flush() == ""


def test_a_prompt_that_ends_in_half_a_character_is_completed_by_the_output(tiny):
    ids = tiny.encode("ab👍")
    detokenizer = IncrementalDetokenizer(tiny, ids[:-1])
    assert detokenizer.push(ids[-1]) == "👍"


# ------------------------------------------------------------------------------------------------------------- stop strings


# ------------------------------------------------------------------------------------------------------------ where a token's text begins


def text_before(tokenizer, ids, skipped=frozenset()):
    """Characters that are complete once ``ids`` are there: the whole text anew for each prefix, without any state."""
    pieces = [tokenizer.token_bytes(i) for i in ids if i not in skipped]
    if pieces and tokenizer.strips_first_space:
        pieces[0] = pieces[0].removeprefix(b" ")
    return codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(pieces))


@pytest.mark.parametrize("kind", ["tiny", "sentencepiece"])
def test_a_prompts_tokens_begin_where_the_text_before_them_ends(request, kind):
    tokenizer = request.getfixturevalue(kind)
    rng = random.Random(3)
    for case in range(800):
        ids = [rng.randrange(tokenizer.vocab_size + 2) for _ in range(rng.randrange(1, 12))]
        if case % 2:
            ids = [*ids[:1], *tokenizer.encode("".join(rng.choice("aé日👍🇩 ") for _ in range(5)), add_special_tokens=False), *ids[1:2]]
        prompt = PromptText.decode(ids, tokenizer)
        assert prompt.text == text_before(tokenizer, ids)
        assert list(prompt.offsets) == [len(text_before(tokenizer, ids[:i])) for i in range(len(ids))]
        assert list(prompt.offsets) == sorted(prompt.offsets)
        whole = tokenizer.decode(ids, skip_special_tokens=False)
        assert whole.startswith(prompt.text.rstrip("\ufffd"))


@pytest.mark.parametrize("kind", ["tiny", "sentencepiece"])
@pytest.mark.parametrize("skip", [True, False])
def test_an_outputs_tokens_begin_where_the_text_before_them_ends(request, kind, skip):
    """However the tokens are cut into events, whatever is held back for a stop string."""
    tokenizer = request.getfixturevalue(kind)
    rng = random.Random(4)
    skipped = tokenizer.special_token_ids if skip else frozenset()
    for case in range(400):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 12))]
        if case % 2:
            ids = [*ids[:1], *tokenizer.encode("".join(rng.choice("aé日👍🇩 ") for _ in range(5)), add_special_tokens=False), *ids[1:2]]
        stop = ["\u0000never", "never"] if case % 3 else None
        asked = request_with(prompt=tuple(tokenizer.encode("a", add_special_tokens=False)), logprobs=0, skip_special_tokens=skip, stop=stop)
        processor = OutputProcessor(asked, tokenizer)
        entries = tuple(TokenLogprobs(token_id, -1.0, 1, ()) for token_id in ids)
        group, found, text = rng.randrange(1, 4), [], ""
        for at in range(0, len(ids), group):
            last = FinishReason.LENGTH if at + group >= len(ids) else None
            delta = processor.process(TokenEvent("r", 0, tuple(ids[at : at + group]), entries[at : at + group], finish_reason=last))
            found += [entry.offset for entry in delta.logprobs]
            text += delta.text
        before = [text_before(tokenizer, [*asked.prompt, *ids[:i]], skipped).removeprefix("a") for i in range(len(ids) + 1)]
        assert found == [len(piece) for piece in before[:-1]]
        emitted = [after.removeprefix(piece) for piece, after in itertools.pairwise(before)]
        assert all(text[offset:].startswith(piece) for offset, piece in zip(found, emitted, strict=True))


@pytest.mark.parametrize("include", [True, False])
def test_the_tokens_of_a_stop_string_keep_their_places(tiny, include):
    ids = [tiny.encode(letter)[0] for letter in "one two"]
    asked = request_with(logprobs=0, stop=["two"], include_stop_str_in_output=include)
    processor, found, text = OutputProcessor(asked, tiny), [], ""
    for token_id in ids:
        delta = processor.process(TokenEvent("r", 0, (token_id,), (TokenLogprobs(token_id, -1.0, 1, ()),)))
        found += [entry.offset for entry in delta.logprobs]
        text += delta.text
    assert (text, found) == ("one two" if include else "one ", [0, 1, 2, 3, 4, 5, 6])


def test_a_token_that_is_not_shown_begins_at_the_end(tiny):
    ids = [*tiny.encode("日"), 2]
    entries = tuple(TokenLogprobs(token_id, -1.0, 1, ()) for token_id in ids)
    asked = request_with(logprobs=0, stop_token_ids=[2], skip_special_tokens=False)
    delta = OutputProcessor(asked, tiny).process(TokenEvent("r", 0, tuple(ids), entries, finish_reason=FinishReason.STOP, stop_reason=2))
    assert delta.text == "日"
    assert [entry.offset for entry in delta.logprobs] == [0] * len(tiny.encode("日")) + [1]


def test_the_tokenizers_own_additions_are_no_text(sentencepiece):
    assert sentencepiece.num_added() == (0, 0)
    for template, expected in (("<s> $A", (1, 0)), ("<s> $A </s>", (1, 1)), ("$A </s>", (0, 1))):
        backend = tokenizers.Tokenizer.from_str(sentencepiece._plain.to_str())
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
        tokenizer = Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))
        assert tokenizer.num_added() == expected
        for text in ("the cat", " the", "日c", "c</s>"):
            ids = tokenizer.encode(text)
            prompt = PromptText.decode(ids, tokenizer, added=tokenizer.num_added())
            assert prompt.text == text
            assert len(prompt.offsets) == len(ids) and list(prompt.offsets) == sorted(prompt.offsets)


def oracle(text, stops, include):
    """The first end of a match, reading character by character; the longest match of those that end there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def stream(pieces, stops, include):
    matcher, out = StopStrings(stops, include=include), ""
    for piece in pieces:
        text, stop = matcher.push(piece)
        out += text
        if stop is not None:
            return out, stop
    return out + matcher.flush(), None


def cut(text, rng):
    pieces = []
    while text:
        count = rng.randrange(0, 5)
        pieces.append(text[:count])
        text = text[count:]
    return pieces


@settings(max_examples=600, deadline=None)
@given(
    text=st.text("ab👍", max_size=24),
    stops=st.lists(st.text("ab👍", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
    rng=st.randoms(use_true_random=False),
)
def test_stop_strings_are_found_as_in_the_full_text(text, stops, include, rng):
    assert stream(cut(text, rng), stops, include) == oracle(text, stops, include)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab", max_size=20),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    rng=st.randoms(use_true_random=False),
)
def test_no_more_than_a_possible_beginning_is_held_back(text, stops, rng):
    """What has been sent is never part of a later match, and what is held back could be."""
    matcher, sent, seen = StopStrings(stops), "", ""
    for piece in cut(text, rng):
        part, stop = matcher.push(piece)
        sent, seen = sent + part, seen + piece
        if stop is not None:
            break
        held = seen[len(sent) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def events_of(ids, *, finish=FinishReason.LENGTH, group=1):
    chunks = [tuple(ids[i : i + group]) for i in range(0, len(ids), group)]
    return [TokenEvent("r", 0, chunk, finish_reason=finish if chunk is chunks[-1] else None) for chunk in chunks]


def request_with(prompt=(5,), **params):
    return Request(id="r", prompt=tuple(prompt), params=SamplingParams(**{"max_tokens": 100, **params}))


def drive(tokenizer, request, events):
    processor, text, ids, last = OutputProcessor(request, tokenizer), "", [], None
    for event in events:
        delta = processor.process(event)
        if delta is not None:
            text, ids, last = text + delta.text, [*ids, *delta.token_ids], delta
    return processor, text, ids, last


@pytest.mark.parametrize("group", [1, 2, 3, 7])
@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_over_token_borders(tiny, group, include):
    text = "Once upon a time there was 日本 👍 and a cat."
    ids = tiny.encode(text)
    for start in range(len(text)):
        for length in (1, 2, 5):
            stop = text[start : start + length]
            expected = oracle(text, [stop], include)
            processor, got, taken, last = drive(
                tiny, request_with(stop=[stop], include_stop_str_in_output=include), events_of(ids, group=group)
            )
            assert (got, last.stop_reason, last.finish_reason) == (*expected, "stop")
            assert processor.finished and processor.num_output_tokens == len(taken)
            assert taken == ids[: len(taken)]
            assert stop in tiny.decode(taken) and stop not in tiny.decode(taken[:-1])


def test_text_that_never_becomes_a_stop_string_comes_in_the_end(tiny):
    ids = tiny.encode("the end of")
    _, text, taken, last = drive(tiny, request_with(stop=["of course"]), events_of(ids))
    assert (text, taken, last.finish_reason, last.stop_reason) == ("the end of", ids, "length", None)


def test_an_output_that_ends_in_half_a_character_shows_it(tiny):
    ids = tiny.encode("ab👍")[:-1]
    processor = OutputProcessor(request_with(stop=["xyz"]), tiny)
    texts = [processor.process(event).text for event in events_of(ids)]
    assert "".join(texts) == tiny.decode(ids) == "ab\ufffd"
    assert "\ufffd" not in "".join(texts[:-1])


@pytest.mark.parametrize("min_tokens", range(0, 12))
def test_min_tokens_come_before_any_stop(tiny, min_tokens):
    ids = tiny.encode("a b a b a b a b a b")
    _, _, taken, last = drive(tiny, request_with(stop=["a"], min_tokens=min_tokens), events_of(ids))
    if last.stop_reason is not None:
        assert len(taken) > min_tokens
        assert tiny.token_text(taken[-1]).strip() == "a"
    else:
        assert taken == ids


def test_after_its_end_a_sample_says_nothing_and_counts_nothing(tiny):
    processor = OutputProcessor(request_with(stop=["b"]), tiny)
    ids = tiny.encode("a b c d")
    deltas = [processor.process(event) for event in events_of(ids)]
    end = next(i for i, delta in enumerate(deltas) if delta.finish_reason)
    assert deltas[end + 1 :] == [None] * (len(deltas) - end - 1) and end + 1 < len(deltas)
    assert processor.num_output_tokens == end + 1
    assert processor.process(TokenEvent("r", 0, finish_reason=FinishReason.ABORT)) is None


def test_samples_are_kept_apart(tiny):
    processor = OutputProcessor(request_with(n=2, stop=["!"]), tiny)
    ids = tiny.encode("👍")
    for token_id in ids[:-1]:
        assert processor.process(TokenEvent("r", 0, (token_id,))).text == ""
    assert processor.process(TokenEvent("r", 1, tuple(tiny.encode("x!")))).finish_reason == "stop"
    assert not processor.finished
    assert processor.process(TokenEvent("r", 0, (ids[-1],), finish_reason=FinishReason.LENGTH)).text == "👍"
    assert processor.finished


def ended(index, logprobs, reason=FinishReason.STOP):
    entries = tuple(TokenLogprobs(5 + i, value, 1) for i, value in enumerate(logprobs))
    return TokenEvent("r", index, tuple(range(5, 5 + len(entries))), entries, finish_reason=reason)


def test_the_best_of_several_by_mean_log_probability_come_when_all_have_ended(tiny):
    processor = OutputProcessor(request_with(n=2, best_of=4), tiny)
    events = [ended(2, [-0.1], FinishReason.ERROR), ended(1, [-1.0, -1.0, -1.2]), ended(3, [-1.5]), ended(0, [-1.4, -0.2, -1.6])]
    released = [processor.release(processor.process(event)) for event in events]
    assert [len(deltas) for deltas in released] == [0, 0, 0, 2]
    best, second = released[-1]
    assert (best.index, best.cumulative_logprob, second.index) == (0, pytest.approx(-3.2), 1)
    assert (best.logprobs, best.token_ids, best.finish_reason) == ((), (5, 6, 7), "stop")
    assert (second.cumulative_logprob, processor.num_output_tokens) == (pytest.approx(-3.2), 8)


def test_of_equally_good_samples_the_first_comes_first_and_failed_ones_last(tiny):
    processor = OutputProcessor(request_with(n=3, best_of=4, logprobs=0), tiny)
    (ends,) = [
        processor.release(processor.process(event))
        for event in (ended(3, [-2.0]), ended(0, [-0.1], FinishReason.ABORT), ended(2, [-2.0, -2.0]), ended(1, []))
    ][-1:]
    assert [len(delta.token_ids) for delta in ends] == [2, 1, 1]
    assert [delta.finish_reason for delta in ends] == ["stop", "stop", "abort"]
    assert [len(delta.logprobs) for delta in ends] == [2, 1, 1]


def test_without_best_of_all_is_released_at_once(tiny):
    for params in ({"n": 2}, {"n": 2, "best_of": 2}):
        processor = OutputProcessor(request_with(**params), tiny)
        delta = processor.process(TokenEvent("r", 1, (5,)))
        assert list(processor.release(delta)) == [delta]


def test_beams_that_are_not_returned_say_nothing(tiny):
    processor = OutputProcessor(request_with(n=2, use_beam_search=True, beam_width=4), tiny)
    events = [TokenEvent("r", i, (5, 6)[: 2 - i], finish_reason=FinishReason.LENGTH, cumulative_logprob=-1.0 - i) for i in range(2)]
    events += [TokenEvent("r", i, finish_reason=FinishReason.LENGTH, num_cached_tokens=3) for i in (2, 3)]
    found = [processor.process(event) for event in events]
    assert [delta and delta.cumulative_logprob for delta in found] == [-1.0, -2.0, None, None]
    assert processor.finished and (processor.num_output_tokens, processor.num_cached_tokens) == (3, 3)


def test_special_tokens_are_left_out_or_shown(tiny):
    ids = [*tiny.encode("hi"), tiny.eos_token_id]
    assert drive(tiny, request_with(), events_of(ids))[1] == "hi"
    assert drive(tiny, request_with(skip_special_tokens=False), events_of(ids))[1] == "hi" + tiny.eos_token


@pytest.mark.parametrize("group", [1, 3, 100])
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_the_token_that_ended_the_output_is_in_the_text_only_if_asked_for(tiny, group, include, special):
    """The model's end or one of the request's own, special or not; ids and log-probabilities always have it."""
    end = tiny.eos_token_id if special else tiny.encode(" the end")[-1]
    ids = [*tiny.encode("a cat sat 👍"), end]
    request = request_with(skip_special_tokens=False, include_stop_str_in_output=include, logprobs=0, stop=["never there"])
    entries = tuple(TokenLogprobs(i, -0.5, 1) for i in ids)
    events = events_of(ids, finish=FinishReason.STOP, group=group)
    events = [dataclasses.replace(e, logprobs=entries[i * group : (i + 1) * group], stop_reason=end) for i, e in enumerate(events)]
    processor, deltas = OutputProcessor(request, tiny), []
    for event in events:
        deltas.append(processor.process(event))
    assert "".join(delta.text for delta in deltas) == tiny.decode(ids if include else ids[:-1], skip_special_tokens=False)
    assert [i for delta in deltas for i in delta.token_ids] == [entry.token_id for delta in deltas for entry in delta.logprobs] == ids
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason, processor.num_output_tokens) == ("stop", end, len(ids))


def test_a_token_that_ends_the_output_ends_no_stop_string(tiny):
    ids = tiny.encode("one two")
    assert tiny.token_text(ids[-1]).endswith("o")
    events = events_of(ids, finish=FinishReason.STOP)
    _, text, taken, last = drive(tiny, request_with(stop=["two"]), [*events[:-1], dataclasses.replace(events[-1], stop_reason=ids[-1])])
    assert (taken, last.stop_reason) == (ids, ids[-1])
    assert text == tiny.decode(ids[:-1])  # and what was held back for the string has come
    assert drive(tiny, request_with(stop=["two"], include_stop_str_in_output=True), events)[3].stop_reason == "two"


def test_an_output_that_ends_at_its_length_keeps_its_last_token(tiny):
    ids = tiny.encode("hi there")
    assert drive(tiny, request_with(stop_token_ids=[ids[-1]]), events_of(ids))[1] == "hi there"


def test_the_best_of_several_are_without_the_token_that_ended_them(tiny):
    ids, (end,) = tiny.encode("a cat"), tiny.encode("!")
    processor = OutputProcessor(request_with(n=1, best_of=2, stop_token_ids=[end]), tiny)
    for index, value in enumerate((-0.1, -0.2)):
        entries = tuple(TokenLogprobs(i, value, 1) for i in (*ids, end))
        delta = processor.process(TokenEvent("r", index, (*ids, end), entries, finish_reason=FinishReason.STOP, stop_reason=end))
        released = processor.release(delta)
    assert [(delta.text, delta.token_ids) for delta in released] == [("a cat", (*ids, end))]
    assert released[0].cumulative_logprob == pytest.approx(-0.1 * len((*ids, end)))


def test_beams_are_without_the_token_that_ended_them(tiny):
    ids, (end,) = tiny.encode("a cat"), tiny.encode("!")
    for include in (False, True):
        processor = OutputProcessor(request_with(use_beam_search=True, include_stop_str_in_output=include), tiny)
        event = TokenEvent("r", 0, (*ids, end), finish_reason=FinishReason.STOP, cumulative_logprob=-1.0)
        delta = processor.process(event)
        assert (delta.text, delta.token_ids) == ("a cat!" if include else "a cat", (*ids, end))


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH])
def test_where_the_prompt_alone_is_wanted_the_output_is_dropped(tiny, reason):
    (end,), entry = tiny.encode("!"), TokenLogprobs(5, -0.5, 1)
    processor = OutputProcessor(request_with(max_tokens=0, logprobs=1, prompt_logprobs=1, n=2), tiny)
    assert processor.process(TokenEvent("r", 0, prompt_logprobs=(entry,))).prompt_logprobs
    for index in range(2):
        delta = processor.process(TokenEvent("r", index, (end,), (entry,), finish_reason=reason, stop_reason=end))
        assert (delta.text, delta.token_ids, delta.logprobs) == ("", (), ())
        assert (delta.finish_reason, delta.stop_reason) == ("length", None)
    assert processor.finished and (processor.num_prompt_tokens, processor.num_output_tokens) == (1, 0)


def test_where_the_prompt_alone_is_wanted_a_fault_is_told(tiny):
    processor = OutputProcessor(request_with(max_tokens=0), tiny)
    delta = processor.process(TokenEvent("r", 0, finish_reason=FinishReason.ERROR, error="broken", error_code="numerical_error"))
    assert (delta.finish_reason, delta.error, delta.error_code) == ("error", "broken", "numerical_error")


def test_without_detokenizing_there_are_ids_and_no_text(tiny):
    ids = tiny.encode("a cat 👍")
    processor, text, taken, last = drive(tiny, request_with(detokenize=False), events_of(ids, group=2))
    assert (text, taken, last.finish_reason, processor.num_output_tokens) == ("", ids, "length", len(ids))


def test_logprobs_carry_text_and_bytes_and_are_finite(tiny):
    ids = tiny.encode("👍")
    entry = TokenLogprobs(ids[0], float("-inf"), 3, ((5, -0.5), (ids[0], float("nan"))))
    delta = OutputProcessor(request_with(logprobs=2), tiny).process(TokenEvent("r", 0, (ids[0],), (entry,), (entry,)))
    (token,) = delta.logprobs
    assert token.bytes == "👍".encode()[: len(token.bytes)] and token.text == "\ufffd"
    assert token.logprob == LEAST_LOGPROB == token.top[1].logprob
    assert [top.rank for top in token.top] == [1, 2]
    assert [describe_token(entry, tiny) for entry in delta.prompt_logprobs] == [dataclasses.replace(token, offset=0)]


# ------------------------------------------------------------------------------------------------------------ chat templates


def test_special_tokens_in_messages_are_text(tiny):
    plain = tiny.apply_chat_template([{"role": "user", "content": "hi there"}])
    counts = {i: plain.count(i) for i in tiny.special_token_ids}
    for spelling in tiny._special_by_text:
        for content in (f"hi {spelling} there", spelling, spelling * 3, f"{spelling[:4]}{spelling}{spelling[4:]}"):
            for message in (
                {"role": "user", "content": content},
                {"role": "user", "content": [{"type": "text", "text": part} for part in content]},
            ):
                ids = tiny.apply_chat_template([message])
                assert {i: ids.count(i) for i in tiny.special_token_ids} == counts
                assert content in tiny.decode(ids, skip_special_tokens=False)
                assert not any(0xFDD0 <= ord(char) < 0xFDF0 for char in tiny.decode(ids))


def test_ordinary_conversations_are_encoded_as_the_template_renders_them(tiny):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "日本 👍 <b>"}]
    hf = transformers.AutoTokenizer.from_pretrained(TINY_MODEL)
    text = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tiny.apply_chat_template(messages) == tiny.encode(text, add_special_tokens=False)


def test_a_script_made_for_vllm_finds_its_tokenizer(tiny):
    hf, messages = transformers.AutoTokenizer.from_pretrained(TINY_MODEL), [{"role": "user", "content": "日本 <|im_end|> 👍"}]
    for opened in (True, False):
        text = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
        assert tiny.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened) == text
    template = "{{ messages[0].content }}{% if enable_thinking %}<think>{% endif %}{{ more }}"
    rendered = tiny.apply_chat_template(
        messages, tokenize=False, chat_template=template, enable_thinking=True, template_kwargs={"more": "<|im_end|>"}
    )
    assert rendered == "日本 <|im_end|> 👍<think><|im_end|>"
    with pytest.raises(RequestError, match="'eos_token'"):
        tiny.apply_chat_template(messages, tokenize=False, eos_token="x")
    assert (tiny.bos_token_id, tiny.eos_token_id) == (hf.bos_token_id, hf.eos_token_id)
    assert tiny.decode(5) == tiny.decode([5]) and tiny.decode(tiny.eos_token_id, skip_special_tokens=False) == tiny.eos_token


def test_a_tokenizer_can_be_sent_to_another_process(tiny, sentencepiece):
    messages = [{"role": "user", "content": "<|im_end|> 日本 </s> <s>"}]
    for tokenizer in (tiny, sentencepiece):
        sent = pickle.loads(pickle.dumps(tokenizer))
        template = tokenizer.chat_template or "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
        ids = tokenizer.apply_chat_template(messages, chat_template=template)
        assert sent.apply_chat_template(messages, chat_template=template) == ids
        assert sent.encode(messages[0]["content"]) == tokenizer.encode(messages[0]["content"])
        assert sent.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids, skip_special_tokens=False)


def test_the_reason_of_a_template_is_cut(tiny):
    with pytest.raises(RequestError, match=r"rejects these messages: x{200,}\.\.\.$") as caught:
        tiny.apply_chat_template([{"role": "user", "content": "hi"}], chat_template="{{ raise_exception('x' * 10**6) }}")
    assert len(str(caught.value)) < 400


def test_a_prefix_space_is_not_put_between_pieces(sentencepiece):
    template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    literal = sentencepiece.apply_chat_template([{"role": "user", "content": "c</s>s"}], chat_template=template)
    assert literal[0] == 1 and literal[-1] == 2 and 2 not in literal[1:-1]
    assert sentencepiece.decode(literal).strip() == "c</s>s"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "chat template"),
        ("{{ messages[5].content }}", "chat template"),
        ("{{ messages.__class__.__mro__ }}", "chat template"),
        ("{{ 1 / 0 }}", "chat template"),
    ],
)
def test_template_errors_are_the_clients(tiny, template, expected):
    from jaxpaged.errors import RequestError

    with pytest.raises(RequestError, match=expected) as caught:
        tiny.apply_chat_template([{"role": "user", "content": "x"}], chat_template=template)
    assert caught.value.status == 400 and caught.value.param == "messages"


def test_template_variables_cannot_replace_ours(tiny):
    from jaxpaged.errors import RequestError

    with pytest.raises(RequestError) as caught:
        tiny.apply_chat_template([{"role": "user", "content": "x"}], template_kwargs={"tokenize": True})
    assert caught.value.param == "chat_template_kwargs"


def test_threads_share_a_tokenizer(tiny):
    from concurrent.futures import ThreadPoolExecutor

    messages = [{"role": "user", "content": "hello " * 50 + "<|im_end|>"}]
    expected = tiny.apply_chat_template(messages), tiny.encode("abc " * 100)
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda _: (tiny.apply_chat_template(messages), tiny.encode("abc " * 100)), range(64)))
    assert all(result == expected for result in results)


# ------------------------------------------------------------------------------------------------------------ the tokenizer's files


NAMED = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
OPENING = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
}
LOST = "a cat\n  had 1234 mice, and  $99"


@pytest.fixture
def write_tokenizer(tmp_path):
    """Writes the tiny model's tokenizer with other values in its files."""

    def write(config=None, *, vocab=None, added=None, **description):
        content = json.loads((TINY_MODEL / "tokenizer.json").read_text())
        content |= description
        content["model"]["vocab"] |= vocab or {}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        own = json.loads((TINY_MODEL / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**own, **(config or {})}))
        if added is not None:
            (tmp_path / "added_tokens.json").write_text(json.dumps(added))
        return tmp_path

    return write


LABELS = [
    "LlamaTokenizerFast",
    "LlamaTokenizer",
    "GPT2TokenizerFast",
    "Qwen2Tokenizer",
    "GemmaTokenizer",
    "T5TokenizerFast",
    "Nobody",
    None,
]


@pytest.mark.parametrize("label", LABELS)
def test_tokenizer_json_decides_and_not_the_class_that_is_named(write_tokenizer, label):
    directory = write_tokenizer({"tokenizer_class": label, "add_prefix_space": True, **NAMED}, pre_tokenizer=DIGITS)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    own, loaded = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")), Tokenizer.load(directory)
    for text in (LOST, *TEXTS, "<|im_start|>user"):
        ids = loaded.encode(text)
        assert ids == own.encode(text).ids
        assert loaded.decode(ids, skip_special_tokens=False) == own.decode(ids, skip_special_tokens=False) == text
        detokenizer = IncrementalDetokenizer(loaded, skip_special_tokens=False)
        assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == text
    (*_, said, end) = loaded.apply_chat_template([{"role": "user", "content": LOST}], add_generation_prompt=False)
    assert (said, end) == (loaded.eos_token_id, *loaded.encode("\n"))
    assert (loaded.bos_token, loaded.eos_token, loaded.eos_token_id) == ("<|im_start|>", "<|im_end|>", 2)


def test_an_llm_reads_prompts_as_tokenizer_json_says(write_tokenizer):
    directory = write_tokenizer({"tokenizer_class": "GPT2TokenizerFast"}, pre_tokenizer=DIGITS)
    options = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "token_buckets": (32,), "num_pages": 9, "compilation_cache_dir": ""}
    llm = LLM(load_format="dummy", hf_overrides=SMALL, tokenizer=str(directory), show_progress=False, warmup=False, **options)
    own = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    (output,) = llm.generate(LOST, SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    assert output.prompt_token_ids == own.encode(LOST).ids
    assert output.outputs[0].text == own.decode(output.outputs[0].token_ids)
    llm.close()


@pytest.mark.parametrize("adds", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_bos_token": None, "add_eos_token": True}])
def test_tokenizer_json_says_what_is_put_before_and_behind_a_text(write_tokenizer, adds):
    plain = Tokenizer.load(write_tokenizer({**NAMED, **adds})).encode("hi")
    assert Tokenizer.load(write_tokenizer({**NAMED, **adds}, post_processor=OPENING)).encode("hi") == [1, *plain]
    assert Tokenizer.load(write_tokenizer({**NAMED, **adds}, post_processor=OPENING)).encode("hi", add_special_tokens=False) == plain


def test_truncation_and_padding_of_the_file_are_left_out(write_tokenizer, tiny):
    cut = {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}}
    pad = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    assert Tokenizer.load(write_tokenizer(**cut, padding=pad)).encode(LOST) == tiny.encode(LOST)


def added(text, **flags):
    return {"content": text, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True, **flags}


def test_tokens_that_tokenizer_json_does_not_know_come_behind_it(write_tokenizer, tiny):
    size = tiny.vocab_size
    config = {"bos_token": "<new>", "added_tokens_decoder": {str(size): added("<named>"), str(size + 1): added("<think>", special=False)}}
    loaded = Tokenizer.load(write_tokenizer(config))
    ids = loaded.encode("<named><think>hi<new>")
    assert ids == [size, size + 1, *tiny.encode("hi"), size + 2]
    assert loaded.decode(ids) == "<think>hi"
    assert loaded.decode(ids, skip_special_tokens=False) == "<named><think>hi<new>"
    assert loaded.bos_token == "<new>"
    assert Tokenizer.load(write_tokenizer(added={"<more>": size})).encode("<more>") == [size]


def test_a_word_of_the_vocabulary_may_be_named_as_special(write_tokenizer, tiny):
    (word,) = tiny.encode(" the")
    loaded = Tokenizer.load(write_tokenizer({"eos_token": tiny._plain.id_to_token(word)}))
    assert loaded.eos_token_id == word
    assert loaded.decode([*tiny.encode("end"), word]) == "end"


@pytest.mark.parametrize("file", ["tokenizer_config.json", "added_tokens.json"])
def test_a_token_with_two_ids_is_refused_with_both(write_tokenizer, tiny, file):
    size = tiny.vocab_size
    if file == "added_tokens.json":
        directory = write_tokenizer(added={"<far>": 5000})
    else:
        directory = write_tokenizer({"added_tokens_decoder": {"5000": added("<far>")}})
    with pytest.raises(CheckpointError, match=rf"{file}: token '<far>' has id 5000, but tokenizer.json gives it {size}"):
        Tokenizer.load(directory)


@pytest.mark.parametrize("token_id", [2**22, 2**31 - 1])
def test_an_id_that_no_model_has_is_refused_before_memory_is_taken_for_it(write_tokenizer, token_id):
    directory = write_tokenizer(vocab={"zzqq": token_id})
    with pytest.raises(CheckpointError, match=f"'zzqq' has id {token_id:,}; ids up to 4,194,303 are supported"):
        Tokenizer.load(directory)


def test_a_directory_without_tokenizer_json_is_converted_or_refused(write_tokenizer, tiny):
    directory = write_tokenizer({"tokenizer_class": "GPT2Tokenizer"})
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json .*, and not all of merges\.txt, vocab\.json to make it of$"):
        Tokenizer.load(directory)
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    (directory / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    loaded = Tokenizer.load(directory)
    assert loaded.encode("the cat sat") == tiny.encode("the cat sat")
    assert loaded.decode(loaded.encode(LOST)) == LOST


HOSTILE = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}


def test_a_tokenizer_that_panics_is_an_error_of_that_text_alone(write_tokenizer, tiny):
    loaded = Tokenizer.load(write_tokenizer(pre_tokenizer=HOSTILE))
    for encode in (loaded.encode, lambda text: loaded.apply_chat_template([{"role": "user", "content": text}])):
        for text in ("x" * 60, "<|im_end|>" + "x" * 60):
            with pytest.raises(RequestError, match=r"^this model's tokenizer cannot encode this text: .*retry-limit") as caught:
                encode(text)
            assert caught.value.code == "tokenizer_failed"
        assert encode("cat")


@pytest.fixture(scope="module")
def panic():
    """What tokenizers raises where its Rust code panics."""
    splitter = tokenizers.Tokenizer(models.BPE())
    splitter.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(x+x+)+y"), "isolated")
    with pytest.raises(BaseException, match="retry-limit") as caught:
        splitter.encode("x" * 60)
    assert not isinstance(caught.value, Exception)
    return caught.value


def test_a_panic_while_loading_is_an_error_of_the_files_and_an_interrupt_is_none(write_tokenizer, monkeypatch, panic):
    directory = write_tokenizer()
    for error, expected in ((panic, CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt)):
        monkeypatch.setattr(tokenizer_module, "read_json", lambda path, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(expected):
            Tokenizer.load(directory)
