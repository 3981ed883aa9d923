"""The packaged tiny model: its generated material is right by construction, and its files are what loaders expect."""

import json
import re
import sys
from pathlib import Path
from random import Random

import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "jaxpaged" / "assets" / "tiny"
sys.path.insert(0, str(ROOT / "scripts"))

from tiny import about, corpus, drills, stories  # noqa: E402
from tiny import evaluate as tiny_evaluate  # noqa: E402

RECALL_FLOORS = {
    "story, near": 0.9,
    "story, far": 0.8,
    "story, new wording": 0.8,
    "weather": 0.9,
    "drill": 0.7,
    "JSON": 0.8,
    "project, new wording": 0.6,
    "total": 0.88,
}


def read_story(text):
    """The facts of a story, read back from its sentences: thing -> (name, color, place)."""
    owns = re.findall(r"(\w+) (?:had|owned|found) a (\w+) (\w+)\.", text)
    owners = re.findall(r"The (\w+) belonged to (\w+)\.", text)
    owns += [(name, re.search(rf"The {thing} was (\w+)\.", text)[1], thing) for thing, name in owners]
    puts = re.findall(r"(\w+) (?:put|left|hid) the (\w+) ((?:in|on|under|behind) the \w+)\.", text)
    places = {thing: (name, place) for name, thing, place in puts}
    assert all(places[thing][0] == name for name, _, thing in owns)
    return {thing: (name, color, places[thing][1]) for name, color, thing in owns}


def expected(kind, question, text, plain):
    """The answer, found from question and text alone."""
    facts = read_story(text)
    if kind == "weather" and plain >= 2:
        return re.search(r"The weather was \w+\.", text)[0]
    if kind == "weather":
        weather = re.search(r"(?:It was a|One) (\w+) day", text)[1]
        return f"It was a {weather} day."
    if kind == "animal":
        animal = re.search(r"(?:met a|Then a|A little) (\w+)", text)[1]
        return f"They met a {animal}."
    if kind == "feeling":
        return "{} felt {}.".format(*re.search(r"In the evening (\w+) felt (\w+)\.", text).groups())
    words = re.findall(r"\w+", question.removesuffix("?"))
    if kind == "had":
        (thing,) = [t for t, (name, _, _) in facts.items() if name in words]
    elif kind == "there":
        (thing,) = [t for t, (_, _, place) in facts.items() if place in question]
    else:
        (thing,) = [t for t in facts if t in words]
    name, color, place = facts[thing]
    if plain:
        return {
            "owner": f"The {thing} belonged to {name}.",
            "place": f"They put the {thing} {place}.",
            "color": f"The {thing} was {color}.",
            "had": f"{name} had the {thing}.",
        }[kind]
    return {
        "owner": f"The {thing} belonged to {name}.",
        "place": f"The {thing} is {place}.",
        "color": f"The {thing} is {color}.",
        "had": f"{name} had a {color} {thing}.",
        "there": f"The thing {place} is the {thing}.",
        "json": json.dumps({"name": name, "color": color, "thing": thing, "place": place}),
    }[kind]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize(("kind", "plain"), [(k, 0) for k in stories.ASK] + [(k, plain) for plain in (1, 2, 3) for k in stories.PLAIN])
def test_answers_follow_from_the_story(kind, plain, held_out):
    rng = Random(f"{kind}{plain}{held_out}")
    for _ in range(60):
        story = stories.make_story(rng, rng.randint(1, 4), rng.randint(0, 30), plain=plain)
        question, answer = stories.ask(rng, story, kind, held_out=held_out, plain=plain)
        assert answer == expected(kind, question, story.text, plain)


def test_answers_about_a_few_sentences_stand_in_them():
    rng = Random(3)
    for _ in range(300):
        text, question, answer = stories.ask_few(rng)
        shared = re.sub("They (met|put)", "", answer).rstrip(".")
        assert shared in text, (text, question, answer)


def test_drill_answers_are_right():
    rng = Random(1)
    for _ in range(300):
        for kind in drills.DRILLS:
            held_out, last = (bool(rng.randint(0, 1)) for _ in range(2))
            ask, answer = drills.make_drill(rng, only=kind.__name__, held_out=held_out, last=last)
            listed = re.split("[ ,:?]+", ask.rstrip("?"))
            match kind.__name__:
                case "copy":
                    assert ask.endswith(answer)
                case "count":
                    assert int(re.search(r"\d+", answer)[0]) == ask.count(",") + 1
                case "sort_numbers":
                    assert [int(x) for x in answer.split()] == sorted(int(x) for x in listed if x.isdigit())
                case "sort_words":
                    assert answer.split() == sorted(listed[-len(answer.split()) :])
                    assert not last or set(answer.split()) <= {*stories.ANIMALS, *stories.COLORS}
                case "json_list":
                    assert json.loads(answer) == listed[-len(json.loads(answer)) :]
                case "json_object":
                    assert ask.endswith("{name} has a {color} {thing}.".format(**json.loads(answer)))


def test_repeated_facts_are_repeated():
    rng = Random(2)
    for _ in range(100):
        for drill in (drills.repeat_facts, drills.repeat_few):
            ask, answer = drill(rng)
            assert ask.endswith(f": {answer}")


def test_material_is_deterministic():
    for length, stage in ((256, 0), (256, 1), (256, 2), (512, 3), (1024, 4), (512, 5), (512, 6)):
        first, second = (corpus.document(Random("x"), length, stage) for _ in range(2))
        assert first == second
    assert corpus.document(Random("x"), 256) != corpus.document(Random("y"), 256)
    assert tiny_evaluate.cases(1, 6) == tiny_evaluate.cases(1, 6)


def test_held_out_wordings_are_never_trained():
    trained = {about.plain(w) for w, _ in about.questions()}
    held_out = {about.plain(w) for w, _ in about.questions(held_out=True)}
    assert len(held_out) >= 100
    assert not trained & held_out
    for kind in stories.ASK:
        trained = {*stories.wordings(kind), *stories.MORE.get(kind, ())}
        assert not trained & set(stories.wordings(kind, held_out=True))
    asked = {
        text.rstrip("?.")
        for seed in range(300)
        for text, weight in corpus.document(Random(seed), 512, seed % 7)
        if weight == corpus.ASKED_WEIGHT
    }
    assert not any(w.rstrip("?.") in asked for w, _ in about.questions(held_out=True))


def test_every_project_topic_keeps_several_trained_wordings():
    for topic in about.TOPICS:
        assert len([w for w in topic.wordings() if not about.is_held_out(w)]) >= 5, topic.answer


def test_assets_are_small_and_complete():
    names = {p.name for p in ASSETS.iterdir()}
    assert names >= {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(p.stat().st_size for p in ASSETS.iterdir()) <= 13 * 10**6
    with safe_open(ASSETS / "model.safetensors", "numpy") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
        sizes = [s.get_shape() for s in slices]
        assert {s.get_dtype() for s in slices} == {"BF16"}
    total = sum(s[0] * (s[1] if len(s) > 1 else 1) for s in sizes)
    assert 1.5e6 <= total <= 6e6


def test_tokenizer_and_template():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    config = json.loads((ASSETS / "config.json").read_text())
    stops = json.loads((ASSETS / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(stops) == ["<|im_end|>", "<|endoftext|>"]
    assert len(tokenizer) <= config["vocab_size"]
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    turns = [corpus.Turn(m["role"], m["content"], 1.0) for m in chat]
    assert text == "".join(part for part, _ in corpus.render(turns)) + "<|im_start|>assistant\n"
    odd = 'Ada\'s kite: "ünï" {1}\n\t<b> 木'
    assert tokenizer.decode(tokenizer.encode(odd)) == odd


def test_the_template_shows_tools_calls_and_results():
    from jaxpaged.engine.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(ASSETS)
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
    talk = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "x"},
    ]
    tool = {"type": "function", "function": {"name": "look"}}
    text = tokenizer.decode(tokenizer.apply_chat_template(talk, tools=[tool]), skip_special_tokens=False)
    assert text == (
        f"<|im_start|>system\nTools:\n{json.dumps(tool)}<|im_end|>\n<|im_start|>user\nLook.<|im_end|>\n<|im_start|>assistant\n"
        '\n<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\nx<|im_end|>\n<|im_start|>assistant\n"
    )
    talk[1:] = [{"role": "assistant", "function_call": call["function"]}, {"role": "function", "name": "look", "content": "x"}]
    old = tokenizer.decode(tokenizer.apply_chat_template(talk, tools=[tool]), skip_special_tokens=False)
    assert old == text.replace("<|im_start|>tool", "<|im_start|>function")
    assert "<think>\nhm\n</think>\nx<|im_end|>" in tokenizer.decode(
        tokenizer.apply_chat_template([{"role": "assistant", "content": "x", "reasoning": "hm"}]), skip_special_tokens=False
    )


def test_recalled_words_are_single_tokens():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    for word in (*drills.WORDS, *stories.WEATHER, *stories.FEELINGS):
        assert len(tokenizer.encode(word).ids) == len(tokenizer.encode(f" {word}").ids) == 1, word


def test_recall_through_the_engine():
    """A wrong block table, position or mask makes the model forget its stories; the floors lie well below what it reaches."""
    from jaxpaged import LLM, SamplingParams

    llm = LLM(
        str(ASSETS),
        show_progress=False,
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        token_buckets=(16, 256),
        warmup=False,
    )
    params = SamplingParams(temperature=0.0, max_tokens=64)

    def generate(conversations):
        return [output.outputs[0].text for output in llm.chat(conversations, params, use_tqdm=False)]

    try:
        scores = tiny_evaluate.evaluate(generate, each=10)
    finally:
        llm.close()
    assert {name: score for name, score in scores.items() if score < RECALL_FLOORS[name]} == {}


def test_attention_of_training_is_attention():
    """Blocks, packed documents and the handwritten gradient against the plain formula in float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from tiny.flash import attend

    draw = np.random.default_rng(0)
    q, k, v, seen = (jnp.asarray(draw.normal(size=(2, 2, n, 256, 32)) / 4, jnp.float32) for n in (3, 1, 1, 3))
    parts = jnp.asarray(np.sort(draw.integers(0, 4, (2, 256)), 1))

    def plain(q, k, v):
        mask = (parts[:, :, None] == parts[:, None, :]) & jnp.tril(jnp.ones((256, 256), bool))
        scores = jnp.where(mask[:, None, None], jnp.einsum("bkgtd,bksd->bkgts", q, k), -1e9)
        return jnp.einsum("bkgts,bksd->bkgtd", jax.nn.softmax(scores), v)

    def both(attention):
        return jax.value_and_grad(lambda *args: (attention(*args) * seen).sum(), argnums=(0, 1, 2))(q, k[:, :, 0], v[:, :, 0])

    (_, exact), (_, fast) = both(plain), both(lambda *args: attend(*args, parts))
    np.testing.assert_allclose(attend(q, k[:, :, 0], v[:, :, 0], parts), plain(q, k[:, :, 0], v[:, :, 0]), atol=0.01)
    for right, found in zip(exact, fast, strict=True):
        assert float(jnp.linalg.norm(right - found) / jnp.linalg.norm(right)) < 0.01


def test_orthogonalized_update():
    import jax.numpy as jnp
    import numpy as np
    from tiny.training import orthogonalize

    draw = np.random.default_rng(0)
    for shape in ((64, 192), (192, 64)):
        update = np.asarray(orthogonalize(jnp.asarray(draw.normal(size=shape), jnp.float32))) / (0.2 * 192**0.5)
        values = np.linalg.svd(update, compute_uv=False)
        assert values.min() > 0.6 and values.max() < 1.3


def test_weights_survive_saving_and_loading(tmp_path):
    from safetensors.numpy import load_file
    from tiny.model import load_model, save_model

    save_model(load_model(ASSETS), tmp_path, 1024)
    before, after = (load_file(folder / "model.safetensors") for folder in (ASSETS, tmp_path))
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
