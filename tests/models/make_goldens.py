"""Writes goldens/*.npz: what transformers says of the checkpoints of model_checkpoints.py. Needs torch; run from the repository root:

python tests/models/make_goldens.py
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from model_checkpoints import CASES, Generation, make_prompts, make_tensors, write_checkpoint

GOLDENS = Path(__file__).parent / "goldens"
PROMPT_LENGTHS = (5, 18, 26)
NUM_TOKENS = 12


def load_torch(directory: Path):
    """Loads a checkpoint with transformers, in float32, and checks that every tensor found its place."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]), info
    return model.eval()


@torch.no_grad()
def generate_torch(model, prompt: list[int], num_tokens: int) -> Generation:
    """Decodes greedily: the prompt at once, then token by token over transformers' cache."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # forgets the longest text seen so far
    tokens, logits, cache = list(prompt), [], None
    fed = torch.tensor([prompt])
    for _ in range(num_tokens):
        out = model(fed, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.extend(out.logits[0].numpy())
        tokens.append(int(np.argmax(logits[-1])))
        fed = torch.tensor([[tokens[-1]]])
    return Generation(tokens, np.stack(logits))


def frequencies(model) -> dict[str, np.ndarray]:
    """Returns transformers' inverse frequencies and attention factor, in the trained context."""
    rope = model.model.rotary_emb
    return {"inverse": rope.original_inv_freq.numpy(), "factor": np.float64(rope.attention_scaling)}


def main() -> None:
    GOLDENS.mkdir(exist_ok=True)
    for name, hf in CASES.items():
        with tempfile.TemporaryDirectory() as directory:
            write_checkpoint(Path(directory), hf, make_tensors(hf))
            AutoConfig.from_pretrained(directory)
            model = load_torch(Path(directory))
            arrays = {}
            for index, prompt in enumerate(make_prompts(hf, PROMPT_LENGTHS)):
                generation = generate_torch(model, prompt, NUM_TOKENS)
                arrays[f"tokens{index}"] = np.array(generation.tokens, np.int32)
                arrays[f"logits{index}"] = generation.logits[len(prompt) - 1 :]
            np.savez_compressed(GOLDENS / f"{name}.npz", **arrays, **frequencies(model))
            print(name)


if __name__ == "__main__":
    main()
