"""Exact-match recall on material that training never saw: new stories, and wordings that were held out."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tiny import about, drills, stories

Message = dict[str, str]
Case = tuple[str, list[Message], str]
"""Category, conversation, and the right answer."""
Generate = Callable[[list[list[Message]]], list[str]]
"""Greedy replies to a list of conversations."""

CATEGORIES = ("story, near", "story, far", "story, new wording", "weather", "drill", "JSON", "project, new wording")
"""The weather of a story stands alone, because the first 4,000 steps did not teach it."""


def story_case(rng: Random, category: str) -> Case:
    """A question about a story of the category's length, asked at once or after the story was told."""
    far, new = category == "story, far", category == "story, new wording"
    story = stories.make_story(rng, 1, 50 if far else rng.randint(0, 4), plain=2)
    kind = "weather" if category == "weather" else rng.choice([k for k in stories.PLAIN if k != "weather"])
    question, answer = stories.ask(rng, story, kind, rng.choice(story.facts), held_out=new, plain=2)
    if rng.random() < 0.5:
        return category, [message("user", f"Read this story. {story.text} {question}")], answer
    told = [message("user", "Tell me a story."), message("assistant", story.text)]
    return category, [*told, message("user", question)], answer


def message(role: str, text: str) -> Message:
    """One chat message."""
    return {"role": role, "content": text}


def cases(seed: int = 1, each: int = 50) -> list[Case]:
    """The evaluation set: `each` questions per category."""
    rng = Random(f"evaluation-{seed}")
    found = [story_case(rng, category) for category in CATEGORIES[:4] for _ in range(each)]
    kinds = [kind.__name__ for kind in drills.DRILLS]
    for category, names in (("drill", kinds[:4]), ("JSON", kinds[4:])):
        for index in range(each):
            question, answer = drills.make_drill(rng, only=names[index % len(names)], last=True)
            found.append((category, [message("user", question)], answer))
    asked = rng.sample(about.questions(held_out=True), each - each // 6)
    asked += [about.off_topic(rng, held_out=True) for _ in range(each // 6)]
    return found + [("project, new wording", [message("user", q)], a) for q, a in asked]


def evaluate(generate: Generate, seed: int = 1, each: int = 50, show: int = 0) -> dict[str, float]:
    """Recall per category and in total; prints up to `show` wrong answers."""
    found = cases(seed, each)
    replies = generate([conversation for _, conversation, _ in found])
    right: dict[str, list[bool]] = {category: [] for category in CATEGORIES}
    for (category, conversation, answer), reply in zip(found, replies, strict=True):
        right[category].append(reply.strip() == answer)
        if reply.strip() != answer and show > 0:
            show -= 1
            print(f"[{category}] {conversation[-1]['content'][-80:]!r}\n  want {answer!r}\n  got  {reply!r}")
    scores = {category: sum(hits) / len(hits) for category, hits in right.items()}
    return scores | {"total": sum(map(sum, right.values())) / len(found)}
