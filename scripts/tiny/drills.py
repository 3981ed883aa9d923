"""Small exercises with one right answer: copy, count, sort, and lists as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random

from tiny.stories import ANIMALS, COLORS, FEELINGS, LANDS, NAMES, PLACES, PLAIN, PUTS, THINGS, WEATHER

WORDS = (*NAMES, *COLORS, *THINGS, *ANIMALS)
RECALLED = (*WORDS, *WEATHER, *FEELINGS, *LANDS, *(word for place in PLACES for word in place.split()[-1:]))
"""All words that a story may be asked for."""
SORTABLE = (NAMES, ANIMALS, COLORS)
SHORT_LISTS = (ANIMALS, COLORS)

Drill = tuple[str, str]


def copy(rng: Random, ask: Sequence[str], longest: int = 10) -> Drill:
    """Repeat a list of words: the plainest use of attention, and the first one that training discovers."""
    words = " ".join(rng.choices(WORDS, k=rng.randint(2, longest)))
    return rng.choice(ask).format(words), words


def count(rng: Random, ask: Sequence[str]) -> Drill:
    """Count the words of a list."""
    words = rng.choices(WORDS, k=rng.randint(2, 7))
    return rng.choice(ask).format(", ".join(words)), f"There are {len(words)} words."


def sort_numbers(rng: Random, ask: Sequence[str]) -> Drill:
    """Put different numbers from 1 to 20 in order."""
    numbers = rng.sample(range(1, 21), rng.randint(3, 5))
    return rng.choice(ask).format(" ".join(map(str, numbers))), " ".join(map(str, sorted(numbers)))


def sort_words(rng: Random, ask: Sequence[str]) -> Drill:
    """Put different words of one list in alphabetical order."""
    words = rng.sample(rng.choice(SORTABLE), rng.randint(2, 4))
    return rng.choice(ask).format(" ".join(words)), " ".join(sorted(words))


def sort_few_words(rng: Random, ask: Sequence[str]) -> Drill:
    """Put different words of one of two short lists in alphabetical order."""
    words = rng.sample(rng.choice(SHORT_LISTS), rng.randint(2, 4))
    return rng.choice(ask).format(" ".join(words)), " ".join(sorted(words))


def json_list(rng: Random, ask: Sequence[str]) -> Drill:
    """Write a list of words as a JSON array."""
    words = rng.sample(WORDS, rng.randint(2, 5))
    return rng.choice(ask).format(", ".join(words)), json.dumps(words)


def json_object(rng: Random, ask: Sequence[str]) -> Drill:
    """Turn one sentence into a JSON object."""
    name, color, thing = rng.choice(NAMES), rng.choice(COLORS), rng.choice(THINGS)
    text = rng.choice(ask).format(f"{name} has a {color} {thing}.")
    return text, json.dumps({"name": name, "color": color, "thing": thing})


DRILLS: dict[Callable[..., Drill], tuple[str, ...]] = {
    copy: (
        "Copy: {}", "Repeat: {}", "Repeat these words: {}", "Say this again: {}", "Copy these words: {}",
        "Please repeat after me: {}", "Copy this: {}",
    ),
    count: (
        "How many words are there: {}?", "Count these words: {}", "Count: {}", "How many words: {}",
        "How many words are in this list: {}?", "Count the words: {}",
    ),
    sort_numbers: (
        "Sort these numbers: {}", "Sort: {}", "Put these numbers in order: {}", "Order these numbers: {}",
        "Sort the numbers {}", "Sort the numbers: {}",
    ),
    sort_words: (
        "Sort these words: {}", "Sort: {}", "Put these words in order: {}", "Order these words: {}",
        "Sort the words {}", "Sort the words: {}",
    ),
    json_list: (
        "Write as a JSON list: {}", "Make a JSON list of {}", "JSON list: {}", "Turn this into a JSON list: {}",
        "Give me a JSON list of these words: {}", "Write a JSON list of {}",
    ),
    json_object: (
        "Turn this into JSON: {}", "Write this as JSON: {}", "JSON: {}", "As JSON, please: {}",
        "Give me this as JSON: {}", "Make JSON of this: {}",
    ),
}  # fmt: skip
"""The exercises and their wordings; the last wording of each is never trained on."""


LAST = {copy: 2, sort_numbers: 2, sort_words: 6, json_list: 2}
"""How often each exercise is drawn, beside 1 for the others, when the model can copy: more of what is hard to learn."""


def make_drill(rng: Random, held_out: bool = False, only: str | None = None, last: bool = False) -> Drill:
    """One exercise; `only` names its kind. In the `last` stage only short lists of words are sorted."""
    kinds = [d for d in DRILLS if only in (None, d.__name__)]
    shares = LAST if last else {copy: 3}
    kind = rng.choices(kinds, [shares.get(d, 1) for d in kinds])[0]
    drill = sort_few_words if last and kind is sort_words else kind
    return drill(rng, DRILLS[kind][-1:] if held_out else DRILLS[kind][:-1])


def repeat_facts(rng: Random) -> Drill:
    """Repeat sentences of a plain story: many words that only their neighbors tell apart, so recall is learned fast."""
    people = rng.randint(2, 4)
    columns = (rng.sample(words, people) for words in (NAMES, COLORS, THINGS, PLACES))
    put = rng.choice(PUTS)
    rows = [dict(zip(("name", "color", "thing", "place"), row, strict=True)) for row in zip(*columns, strict=True)]
    forms = rng.choice(((PLAIN["owner"], put), (PLAIN["color"], put), (PLAIN["owner"], PLAIN["color"]), (put,), (PLAIN["place"],)))
    text = " ".join(rng.sample([form.format(**row) for row in rows for form in forms], rng.randint(2, people)))
    return rng.choice(DRILLS[copy][:-1]).format(text), text


def repeat_few(rng: Random) -> Drill:
    """Repeat a list in which a few of all recalled words come again and again."""
    words = " ".join(rng.choices(rng.sample(RECALLED, rng.randint(3, 8)), k=rng.randint(4, 14)))
    return rng.choice(DRILLS[copy][:-1]).format(words), words
