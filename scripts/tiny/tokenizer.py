"""The byte-level BPE of the tiny model, and the files that go with it in Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from tiny import about, corpus, drills, stories
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ENDOFTEXT, IM_START, IM_END = range(3)
CHAT_TEMPLATE = """\
{%- if tools -%}
{{- '<|im_start|>system\\nTools:' -}}
{%- for tool in tools -%}
{{- '\\n' + tool | tojson -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.reasoning_content -%}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n' -}}
{%- endif -%}
{{- message.content -}}
{%- set old = [{'function': message.function_call}] if message.function_call else [] -%}
{%- for call in message.tool_calls or old -%}
{{- '\\n<tool_call>\\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson + '\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def train_tokenizer(vocab_size: int, seed: int = 0) -> Tokenizer:
    """Train on generated conversations, with the recalled words added often enough to be one token each.

    One token per word, with and without its leading space, makes recall a matter of one attention step.
    """
    rng = Random(f"tokenizer-{seed}")
    texts = [text for _ in range(4000) for text, _ in corpus.document(rng, 256, stage=0) if "<|" not in text]
    places = [word for place in stories.PLACES for word in place.split()]
    words = [*drills.WORDS, *places, *stories.WEATHER, *stories.FEELINGS, *stories.LANDS, *map(str, range(1, 21))]
    texts += [f"{word} {word}" for word in words for _ in range(200)]
    texts += ["user", "assistant", "system"] * 200
    texts += [wording for wording, _ in about.questions() for _ in range(5)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIALS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json, its configuration, and the chat template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
