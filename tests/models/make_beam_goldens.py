"""Writes goldens/beams.json: what transformers' beam search finds on the checkpoints of beam_checkpoints.py. Needs torch; run from the
repository root:

python tests/models/make_beam_goldens.py
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
from beam_checkpoints import NAMES, SEARCHES, Search, prompts_of
from model_checkpoints import CASES, make_tensors, write_checkpoint
from models.make_goldens import load_torch

GOLDENS = Path(__file__).parent / "goldens" / "beams.json"
NO_TOKEN = 98
"""Fills up short beams in transformers' answer; no search stops at it."""


def search_torch(model, prompt: list[int], search: Search) -> dict:
    """Returns the stop tokens, and each beam's tokens and score, best first."""
    ids = torch.tensor([prompt])
    common = {"do_sample": False, "attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
    plain = GenerationConfig(
        max_new_tokens=max(2, search.max_tokens // 2), eos_token_id=None, pad_token_id=NO_TOKEN, num_beams=search.width
    )
    said = model.generate(ids, generation_config=plain, **common).sequences[0, len(prompt) :].tolist()
    stops = [token for token in dict.fromkeys(reversed(said)) if token != NO_TOKEN][: search.num_stops]
    config = GenerationConfig(
        num_beams=search.width,
        num_return_sequences=search.n,
        max_new_tokens=search.max_tokens,
        min_new_tokens=search.min_tokens or None,
        eos_token_id=stops or None,
        pad_token_id=NO_TOKEN,
        length_penalty=search.length_penalty,
        early_stopping=search.early_stopping,
    )
    found = model.generate(ids, generation_config=config, output_scores=True, **common)
    lengths = (found.beam_indices >= 0).sum(dim=1).tolist()
    outputs = [row[len(prompt) :][:length].tolist() for row, length in zip(found.sequences, lengths, strict=True)]
    scores = [float(f"{score:.7g}") for score in found.sequences_scores.tolist()]
    return {"stops": stops, "beams": [list(pair) for pair in zip(outputs, scores, strict=True)]}


def search_all(directory: Path, name: str, seed: int = 0) -> list[dict]:
    """Writes the checkpoint and runs all searches on it."""
    write_checkpoint(directory, CASES[name], make_tensors(CASES[name], seed))
    model = load_torch(directory)
    return [search_torch(model, prompt, search) for prompt, search in zip(prompts_of(name, seed + 1), SEARCHES, strict=True)]


def main() -> None:
    found = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as directory:
            found[name] = search_all(Path(directory), name)
        short = sum(len(t) < s.max_tokens for r, s in zip(found[name], SEARCHES, strict=True) for t, _ in r["beams"])
        print(f"{name}: {short} of {sum(len(result['beams']) for result in found[name])} beams end early")
    rows = [f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(r, separators=(",", ":")) for r in found[name]) + "\n]" for name in NAMES]
    GOLDENS.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
