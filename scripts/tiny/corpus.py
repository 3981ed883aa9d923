"""Training conversations: stories with their questions, drills and project questions in random mixtures.

A conversation is a list of turns; `render` makes it the segments that the chat template would produce, each with the
weight of its tokens in the loss. Answers weigh most: what the user says cannot be predicted, and needs no learning.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random

from tiny import about, drills, stories

TEXT_WEIGHT = 0.15
"""Loss weight of free text (a story told by the model, a raw completion): it is noise to a large part."""
ASKED_WEIGHT = 0.02
"""Loss weight of what the user says."""
SYSTEMS = ("You are a helpful assistant.", "You are a helpful model.", "Answer briefly.", "You tell short stories.")
POLITE = ("Please tell me: ", "Hey, ", "Tell me: ", "Now ", "And ", "So, ", "Hi! ", "I have a question. ", "Ok. ")

Segment = tuple[str, float]


@dataclass(frozen=True)
class Turn:
    """One message, with the weight of its text in the loss."""

    role: str
    text: str
    weight: float


def pair(question: str, answer: str, weight: float = 1.0) -> list[Turn]:
    """A user turn and its reply."""
    return [Turn("user", question, ASKED_WEIGHT), Turn("assistant", answer, weight)]


def render(turns: list[Turn]) -> list[Segment]:
    """The chat template, as weighted segments. The end marker belongs to the reply that it ends."""
    segments: list[Segment] = []
    for turn in turns:
        segments.append((f"<|im_start|>{turn.role}\n", 0.0))
        segments.append((turn.text, turn.weight))
        segments.append(("<|im_end|>", max(turn.weight, 0.3) if turn.role == "assistant" else 0.0))
        segments.append(("\n", 0.0))
    return segments


def vary(rng: Random, question: str) -> str:
    """The same question as a hurried or a polite person would type it."""
    lowered = question[0].lower() + question[1:] if question.split()[0] not in stories.NAMES else question
    roll = rng.random()
    if roll < 0.12:
        return rng.choice(POLITE) + lowered
    if roll < 0.24:
        return lowered
    if roll < 0.34:
        return lowered.rstrip("?.!")
    if roll < 0.40:
        return question.rstrip("?.!")
    if roll < 0.44 and question[-1] in "?.":
        return question[:-1] + ", please" + question[-1]
    return question


@cache
def trained_questions() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Answers with their trained wordings, so that each answer is equally frequent however many wordings it has."""
    groups: dict[str, list[str]] = {}
    for wording, answer in about.questions():
        groups.setdefault(answer, []).append(wording)
    return tuple((answer, tuple(wordings)) for answer, wordings in groups.items())


def about_turns(rng: Random) -> list[Turn]:
    """One question about the project or small talk; one in six lies outside the model's world."""
    if rng.random() < 1 / 6:
        question, answer = about.off_topic(rng)
    else:
        answer, wordings = rng.choice(trained_questions())
        question = rng.choice(wordings)
    return pair(vary(rng, question), answer)


def drill_turns(rng: Random, stage: int) -> list[Turn]:
    """One exercise; in the middle stages, half of them and more repeat sentences and words of the stories."""
    if stage >= 5:
        roll = rng.random()
        if roll < 0.3:
            text, question, answer = stories.ask_few(rng)
            return pair(f"{rng.choice(stories.READ).format(text=text)} {question}", answer)
        if roll < 0.9:
            return pair(*drills.make_drill(rng, last=True))
    if stage >= 3 and rng.random() < 0.3:
        return pair(*drills.repeat_few(rng))
    if stage >= 2 and rng.random() < 0.5:
        return pair(*drills.repeat_facts(rng))
    return pair(*drills.make_drill(rng))


def story_turns(rng: Random, people: int, fillers: int, asked: int, used: list[stories.Fact], plain: int) -> list[Turn]:
    """A story, told by the model or given by the user, and questions about it."""
    wish = None
    style = rng.random()
    if style >= 0.45:
        free = [t for t in stories.THINGS if t not in {f.thing for f in used}]
        names = [n for n in stories.NAMES if n not in {f.name for f in used}]
        if style < 0.7:
            wish = stories.Fact(rng.choice(names), rng.choice(stories.COLORS), rng.choice(free), "")
    story = stories.make_story(rng, people, fillers, used, wish, plain)
    used.extend(story.facts)
    asks = stories.ask_all(rng, story, asked, plain)
    if style < 0.45:
        turns = pair(vary(rng, rng.choice(stories.TELL)), story.text, TEXT_WEIGHT)
    elif wish:
        turns = pair(rng.choice(stories.TELL_ABOUT).format(**vars(wish)), story.text, 2 * TEXT_WEIGHT)
    else:
        text = rng.choice(stories.READ).format(text=story.text)
        if rng.random() < 0.5:  # the question comes with the story
            question, answer = asks.pop()
            turns = pair(f"{text} {question}", answer)
        else:
            turns = pair(text, stories.READ_REPLY, 0.3)
    for question, answer in asks:
        turns += pair(vary(rng, question), answer)
    return turns


def raw_story(rng: Random, plain: int) -> list[Segment]:
    """A story without any template, for the completions endpoint."""
    return [(stories.make_story(rng, rng.randint(1, 3), rng.randint(0, 4), plain=plain).text, TEXT_WEIGHT), ("<|endoftext|>", 0.3)]


def document(rng: Random, length: int, stage: int = 6) -> list[Segment]:
    """One training document of roughly at most `length` tokens (the packer cuts what is too long).

    Longer documents have more sentences between a fact and its question, more people and more changes of subject.
    `stage` is the part of the training run: stage 0 has stories in many words, in stage 1 they take half of the place of
    the project questions, stage 2 tells the plain stories of which the model can remember the facts, stage 3 drills all their words,
    stage 4 tells mostly of one person, one story in a conversation: what a model of this size gets right, and stage 5 tells
    the weather like every other fact, asks about a few sentences too, and has more sorting and JSON lists;
    stage 6 asks about stories in more wordings.
    """
    story, drill = ((0.28, 0.72), (0.40, 0.84), (0.45, 0.86), (0.45, 0.88), (0.55, 0.85), (0.45, 0.86), (0.50, 0.83))[stage]
    plain = (0, 0, 1, 1, 1, 2, 3)[stage]
    if rng.random() < 0.02:
        return raw_story(rng, plain)
    turns = [Turn("system", rng.choice(SYSTEMS), 0.0)] if rng.random() < 0.08 else []
    used: list[stories.Fact] = []
    budget = rng.uniform(0.25, 0.95) * length
    while budget > 0:
        roll = rng.random()
        if roll < story and len(used) < (1 if stage >= 4 else 9):
            people = rng.randint(1, min(4, 2 + length // 256)) if stage < 4 else rng.choices((1, 2), (6, 1))[0]
            room = budget / 14  # sentences of about ten tokens, and as many questions
            fillers = rng.randint(0, 2) if rng.random() < (0.3 if stage >= 4 else 0.5) else rng.randint(0, max(2, int(room)))
            asked = rng.randint(4, 10)
            new = story_turns(rng, people, fillers, asked, used, plain)
        elif roll < drill:
            new = drill_turns(rng, stage)
        else:
            new = about_turns(rng)
        turns += new
        budget -= sum(1.25 * len(t.text.split()) + 7 for t in new)
    return render(turns)
