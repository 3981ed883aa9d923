"""Beam searches on the random checkpoints of ``model_checkpoints.py``. ``models/make_beam_goldens.py`` runs them through transformers."""

import dataclasses

from model_checkpoints import CASES, make_prompts

NAMES = ("llama", "llama_tied_mha", "llama_llama3", "mistral_window", "qwen2", "qwen3_window_bias")
"""Families, tied weights, scaled rotations, windows. Not those whose rotation depends on the longest text so far: transformers
computes all beams' keys anew there, and not as it would one by one."""


@dataclasses.dataclass(frozen=True)
class Search:
    """One beam search on one checkpoint.

    Attributes:
        num_stops: How many stop tokens; they are chosen among those that greedy decoding says first, so that many beams end.
    """

    num_prompt: int
    width: int
    n: int
    max_tokens: int
    num_stops: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    min_tokens: int = 0


SEARCHES = (
    Search(5, width=2, n=1, max_tokens=12),
    Search(18, width=3, n=3, max_tokens=1, num_stops=1),
    Search(11, width=3, n=2, max_tokens=16, num_stops=1, length_penalty=2.0, early_stopping="never"),
    Search(26, width=4, n=4, max_tokens=16, num_stops=1, early_stopping=True),
    Search(7, width=4, n=4, max_tokens=14, num_stops=2, length_penalty=0.0),
    Search(9, width=5, n=5, max_tokens=10, num_stops=2, length_penalty=-1.0, early_stopping="never"),
    Search(3, width=6, n=2, max_tokens=12, num_stops=1, min_tokens=6),
    Search(16, width=7, n=7, max_tokens=9, num_stops=1, length_penalty=0.5),
    Search(13, width=8, n=8, max_tokens=20, num_stops=1, early_stopping=True, length_penalty=1.5),
    Search(22, width=8, n=3, max_tokens=16),
)


def prompts_of(name: str, seed: int = 1) -> list[list[int]]:
    """Returns the prompt of each search."""
    return make_prompts(CASES[name], tuple(search.num_prompt for search in SEARCHES), seed)
