"""Short stories that plant facts, and the questions whose only source is the story.

Each story gives every person one coloured thing and puts every thing in one place. A question about it can only be
answered by looking back to the sentence that planted the fact: an engine that reads a wrong page gives a wrong answer
that a person can see. Nearly all words are drawn from short closed lists, so one word is one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

NAMES = (
    "Ada", "Ben", "Cora", "Dan", "Ella", "Finn", "Gwen", "Hugo", "Ida", "Jun", "Kira", "Leo", "Mia", "Noah", "Olga",
    "Pete", "Rosa", "Sam", "Tess", "Una", "Vera", "Will", "Yara", "Zoe",
)  # fmt: skip
COLORS = (
    "red", "blue", "green", "yellow", "black", "white", "brown", "pink", "gray", "silver", "golden", "purple",
)  # fmt: skip
THINGS = (
    "kite", "drum", "lamp", "key", "ball", "book", "cup", "bell", "boat", "coin", "doll", "flute", "map", "ring",
    "rope", "shell", "spoon", "stone", "sword", "ticket", "whistle", "hat", "scarf", "brush",
)  # fmt: skip
PLACES = (
    "in the box", "in the basket", "in the drawer", "in the cave", "in the garden", "in the kitchen", "in the barn",
    "in the bag", "in the tower", "in the cellar", "under the bed", "under the table", "under the bridge",
    "under the stairs", "under the tree", "on the roof", "on the shelf", "on the chair", "on the wall", "on the hill",
    "behind the door", "behind the house", "behind the mill", "behind the curtain",
)  # fmt: skip
ANIMALS = (
    "fox", "cat", "dog", "rabbit", "horse", "goat", "bear", "duck", "mouse", "wolf", "hen", "pony",
)  # fmt: skip
WEATHER = (
    "sunny", "rainy", "windy", "snowy", "foggy", "cloudy", "warm", "cold",
)  # fmt: skip
FEELINGS = (
    "happy", "sad", "tired", "proud", "brave", "hungry", "calm", "glad",
)  # fmt: skip

OPENINGS = (
    "Once upon a time, {who} lived near the {land}. It was a {weather} day.",
    "One {weather} day, {who} went for a walk near the {land}.",
    "It was a {weather} day, and {who} were at home near the {land}.",
    "Once upon a time there was a {weather} day when {who} played near the {land}.",
)
PLAIN_OPENING = "Once upon a time, {who} lived near the {land}. The weather was {weather}."
LANDS = (
    "sea", "river", "forest", "lake", "town", "valley",
)  # fmt: skip
OWNS = ("{name} had a {color} {thing}.", "{name} owned a {color} {thing}.", "{name} found a {color} {thing}.")
PUTS = (
    "{name} put the {thing} {place}.",
    "{name} left the {thing} {place}.",
    "{name} hid the {thing} {place}.",
)
MEETS = ("On the way they met a {animal}.", "Then a {animal} came along.", "A little {animal} watched them.")
FEELS = "In the evening {name} felt {feeling}."
ENDINGS = (
    "At last they all went home. The end.",
    "Then it was time for supper. The end.",
    "Soon the stars came out. The end.",
    "It had been a good day. The end.",
)
FILLERS = (
    "The wind sang in the grass.", "They walked and walked for a long time.", "A bird flew over the water.",
    "Everyone laughed at the joke.", "The road was long and dusty.", "They stopped to drink some water.",
    "Far away a clock struck three.", "The clouds looked like sheep.", "{name} sang a song.", "{name} told a joke.",
    "{name} sat down to rest.", "{name} waved at the moon.", "{name} ran as fast as possible.",
    "{name} picked some apples.", "Nobody knew what would come next.", "The leaves fell one by one.",
    "They shared some bread and cheese.", "An old man said good morning.", "The sun went slowly down.",
    "They counted the birds in the sky.", "Somewhere a child was singing.", "The air smelled of flowers.",
    "It was very quiet for a while.", "They talked about the summer.", "{name} wanted to hear a tale.",
    "{name} danced in a circle.", "{name} looked up at the sky.", "The water was clear and cool.",
    "They made a small fire.", "The smoke went straight up.", "A cart rolled slowly by.", "They played until noon.",
    "{name} asked for more bread.", "{name} fell asleep for an hour.", "The bees were busy in the flowers.",
    "They followed the path to the north.",
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One planted fact: who has which thing, its color, and where it was put."""

    name: str
    color: str
    thing: str
    place: str


@dataclass(frozen=True)
class Story:
    """A story text and what it says."""

    text: str
    facts: tuple[Fact, ...]
    weather: str
    animal: str
    sad: str
    """The one person whose feeling is told."""
    feeling: str


def join_names(names: Sequence[str]) -> str:
    """'Ada', 'Ada and Ben', 'Ada, Ben and Cora'."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def make_story(rng: Random, people: int, fillers: int, used: Sequence[Fact] = (), wish: Fact | None = None, plain: int = 0) -> Story:
    """Write a story with one fact per person and `fillers` sentences of distance spread at random between them.

    People, things and places in `used` (earlier stories of the same conversation) are avoided, so every later question
    has one answer. `wish` is the first fact when the user asked for it ("a story about Ada and a red kite"). A `plain`
    story states each fact in the words of its answer; at `plain` 1 its weather stands in other words than every other
    fact, and was never learned, so `plain` 2 states it like the color. Stories of `plain` 3 are
    the same, and are asked about in more wordings.
    """

    def fresh(words: Sequence[str], taken: set[str], count: int) -> list[str]:
        return rng.sample([w for w in words if w not in taken], count)

    names = fresh(NAMES, {f.name for f in used}, people)
    things = fresh(THINGS, {f.thing for f in used}, people)
    places = fresh(PLACES, {f.place for f in used}, people)
    colors = rng.sample(COLORS, people)
    if wish:
        names = [wish.name, *[n for n in names if n != wish.name]][:people]
        things = [wish.thing, *[t for t in things if t != wish.thing]][:people]
        colors = [wish.color, *[c for c in colors if c != wish.color]][:people]
    facts = tuple(Fact(*row) for row in zip(names, colors, things, places, strict=True))
    weather, animal, feeling = rng.choice(WEATHER), rng.choice(ANIMALS), rng.choice(FEELINGS)
    sad = rng.choice(names)
    owns, puts = rng.choice(OWNS), rng.choice(PUTS)
    body = [owns.format(**vars(f)) for f in facts]
    later = [puts.format(**vars(f)) for f in rng.sample(facts, people)]
    later.insert(rng.randint(0, people), rng.choice(MEETS).format(animal=animal))
    if plain:
        body = [sentence.format(**vars(f)) for f in facts for sentence in (PLAIN["owner"], PLAIN["color"])]
        later = [puts.format(**vars(f)) for f in rng.sample(facts, people)]
        later.insert(rng.randint(0, people), MEETS[0].format(animal=animal))
    if rng.random() < 0.3 and not plain:  # fact by fact instead of all owners first
        body, later = [], [s for f in facts for s in (owns.format(**vars(f)), puts.format(**vars(f)))]
        later.append(rng.choice(MEETS).format(animal=animal))
    body += later
    body.append(FEELS.format(name=sad, feeling=feeling))
    for _ in range(fillers):
        body.insert(rng.randint(0, len(body)), rng.choice(FILLERS).format(name=rng.choice(names)))
    opening = rng.choice(OPENINGS[: 3 if people > 1 else 2])
    if plain:
        opening = OPENINGS[0] if plain == 1 else PLAIN_OPENING
    opening = opening.format(who=join_names(names), weather=weather, land=rng.choice(LANDS))
    return Story(" ".join([opening, *body, rng.choice(ENDINGS)]), facts, weather, animal, sad, feeling)


ASK = {
    "owner": (
        "Who had the {thing}?", "Whose {thing} was it?", "Who owned the {thing}?", "Who has the {thing}?",
        "To whom does the {thing} belong?", "Which person had the {thing}?", "Who is the owner of the {thing}?",
        "Name the owner of the {thing}.",
    ),
    "place": (
        "Where is the {thing}?", "Where did {name} put the {thing}?", "Where was the {thing}?",
        "In what place is the {thing}?", "Where can I find the {thing}?", "Where is the {color} {thing}?",
        "Where do I find the {thing}?", "Tell me where the {thing} is.",
    ),
    "color": (
        "What color is the {thing}?", "What colour is the {thing}?", "Which color did the {thing} have?",
        "What is the color of the {thing}?", "Which colour was the {thing}?", "What color was {name}'s {thing}?",
        "Tell me the color of the {thing}.", "What was the colour of the {thing}?",
    ),
    "had": (
        "What did {name} have?", "What did {name} own?", "Which thing did {name} have?", "What does {name} have?",
        "What belonged to {name}?", "Which thing belonged to {name}?", "What was {name}'s thing?",
        "Tell me what {name} had.",
    ),
    "there": (
        "What is {place}?", "What was {place}?", "Which thing is {place}?", "What did they put {place}?",
        "What can I find {place}?", "What do I find {place}?", "Which thing was {place}?", "Tell me what is {place}.",
    ),
    "json": (
        "Answer in JSON: who had the {thing}, and where is it?", "Describe the {thing} as JSON.",
        "Give me the facts about the {thing} as JSON.", "Write JSON about the {thing}.",
        "Return a JSON object for the {thing}.", "Who has the {thing} and where is it? Use JSON.",
        "Give me a JSON object about the {thing}.", "JSON for the {thing}, please.",
    ),
    "weather": (
        "What was the weather like?", "How was the weather?", "What kind of day was it?",
        "Tell me about the weather in the story.", "Which weather did they have?",
    ),
    "animal": (
        "Which animal was in the story?", "What animal did they meet?", "Which animal did they see?",
        "What kind of animal was there?", "Tell me which animal was there.",
    ),
    "feeling": (
        "How did {sad} feel?", "How was {sad} in the evening?", "What did {sad} feel?",
        "How did {sad} feel in the evening?", "Tell me how {sad} felt.",
    ),
}  # fmt: skip
"""Wordings of each question; the last `HELD_OUT` of a kind are never trained on."""
HELD_OUT = 2

MORE = {
    "owner": (
        "Say who had the {thing}.", "Tell me who had the {thing}.", "Do you know who had the {thing}?",
        "Name the person who had the {thing}.", "I forgot who had the {thing}.",
    ),
    "place": (
        "Say where the {thing} is.", "Do you know where the {thing} is?", "Name the place of the {thing}.",
        "I forgot where the {thing} is.", "Where is {name}'s {thing}?",
    ),
    "color": (
        "Say what color the {thing} was.", "Do you know the color of the {thing}?", "Name the color of the {thing}.",
        "I forgot the color of the {thing}.", "Which color was {name}'s {thing}?",
    ),
    "had": (
        "Say what {name} had.", "Do you know what {name} had?", "Name the thing that {name} had.",
        "I forgot what {name} had.", "What thing did {name} own?",
    ),
    "weather": ("Say how the weather was.", "Do you know how the weather was?", "I forgot the weather of that day."),
    "animal": ("Say which animal it was.", "Do you know which animal they met?", "I forgot which animal they met."),
    "feeling": ("Say how {sad} felt.", "Do you know how {sad} felt?", "I forgot how {sad} felt."),
}  # fmt: skip
"""More wordings, for the last stage of training: with few, the model guesses at the kind of question from single words."""

ANSWER = {
    "owner": "The {thing} belonged to {name}.",
    "place": "The {thing} is {place}.",
    "color": "The {thing} is {color}.",
    "had": "{name} had a {color} {thing}.",
    "there": "The thing {place} is the {thing}.",
    "json": '{{"name": "{name}", "color": "{color}", "thing": "{thing}", "place": "{place}"}}',
    "weather": "It was a {weather} day.",
    "animal": "They met a {animal}.",
    "feeling": "{sad} felt {feeling}.",
}
FACT_KINDS = ("owner", "place", "color", "had", "there")
PLAIN = {
    "owner": "The {thing} belonged to {name}.",
    "place": "They put the {thing} {place}.",
    "color": "The {thing} was {color}.",
    "had": "{name} had the {thing}.",
    "weather": "It was a {weather} day.",
    "animal": "They met a {animal}.",
    "feeling": "{sad} felt {feeling}.",
}
"""Answers about a plain story, which repeat its words: a small model learns to find them much sooner."""
PLAINER = PLAIN | {"weather": "The weather was {weather}."}
"""The same, for stories of `plain` 2 and 3."""
PLAIN_KINDS = ("owner", "place", "color", "had")


def wordings(kind: str, held_out: bool = False) -> tuple[str, ...]:
    """The trained (or the held-out) wordings of one kind of question."""
    count = HELD_OUT if len(ASK[kind]) > 5 else 1
    return ASK[kind][-count:] if held_out else ASK[kind][:-count]


def ask(rng: Random, story: Story, kind: str, fact: Fact | None = None, held_out: bool = False, plain: int = 0) -> tuple[str, str]:
    """A question of this kind about the story (about `fact`, if given), and its answer."""
    slots = vars(story) | vars(fact or rng.choice(story.facts))
    words = wordings(kind, held_out) + (MORE[kind] if plain == 3 and not held_out else ())
    return rng.choice(words).format(**slots), (ANSWER, PLAIN, PLAINER, PLAINER)[plain][kind].format(**slots)


def ask_all(rng: Random, story: Story, limit: int, plain: int = 0) -> list[tuple[str, str]]:
    """Up to `limit` different questions about one story, in random order."""
    if plain:
        rows = [(k, f) for k in PLAIN_KINDS for f in story.facts] + [(k, None) for k in ("weather", "animal", "feeling")]
        return [ask(rng, story, kind, fact, plain=plain) for kind, fact in rng.sample(rows, min(limit, len(rows)))]
    kinds = [(k, f) for k in FACT_KINDS for f in story.facts]
    kinds += [("json", rng.choice(story.facts)), *[(k, None) for k in ("weather", "animal", "feeling")]]
    return [ask(rng, story, kind, fact) for kind, fact in rng.sample(kinds, min(limit, len(kinds)))]


PLANTS = {
    "owner": PLAIN["owner"],
    "place": PUTS[0],
    "color": PLAIN["color"],
    "weather": PLAINER["weather"],
    "animal": MEETS[0],
    "feeling": FEELS,
}
"""The sentence of a plain story that plants the answer to each kind of question."""


def ask_few(rng: Random) -> tuple[str, str, str]:
    """A few sentences of a plain story in any order, a question about them (often for the weather), and its answer.

    In a whole story the model looks at other words so firmly that it never tries the weather; among a few it does.
    """
    story = make_story(rng, 1, 0, plain=2)
    kinds = rng.sample(list(PLANTS), rng.randint(1, 5))
    if "weather" not in kinds and rng.random() < 0.5:
        kinds[0] = "weather"
    kind = "weather" if "weather" in kinds and rng.random() < 0.5 else rng.choice(kinds)
    sentences = [PLANTS[k].format(**vars(story), **vars(story.facts[0])) for k in kinds]
    sentences += [rng.choice(FILLERS).format(name=story.sad) for _ in range(rng.choice((0, 0, 1, 2, 4)))]
    rng.shuffle(sentences)
    return " ".join(sentences), *ask(rng, story, kind, plain=2)


TELL = (
    "Tell me a story.", "Tell me a short story.", "Write a story.", "Can you tell me a story?", "Please write a story.",
    "I want to hear a story.", "Another story, please.", "Make up a story.", "A story, please.", "Tell a story",
    "Could you tell me a short story?", "Tell me another story.", "Write a short story for me.", "story",
)  # fmt: skip
TELL_ABOUT = (
    "Tell me a story about {name} and a {color} {thing}.", "Write a story about {name} and a {color} {thing}.",
    "Can you tell me a story about {name} and a {color} {thing}?",
    "Write a short story about {name} who had a {color} {thing}.", "A story about {name} and a {color} {thing}, please.",
    "Tell me a story with {name} and a {color} {thing}.",
)  # fmt: skip
READ = (
    "Here is a story. {text}", "Read this story. {text}", "{text}", "Story: {text}", "Read this story: {text}",
    "Please read this. {text}",
)  # fmt: skip
READ_REPLY = "Thank you for the story. What do you want to know?"
