"""Writes beam_goldens.json: what transformers' beam search finds in the made-up models of beam_cases.py. Needs torch; run from the
repository root:

python tests/scheduling/make_beam_goldens.py
"""

import json
import sys
from pathlib import Path

import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

sys.path.insert(0, str(Path(__file__).parent.parent))
from scheduling.beam_cases import VOCAB, Setting, logits, make_setting

GOLDENS = Path(__file__).parent / "beam_goldens.json"
NUM_SETTINGS = 400


class HashModel(PreTrainedModel, GenerationMixin):
    """The made-up model, as transformers wants a model."""

    config_class = PretrainedConfig

    def __init__(self, setting: Setting) -> None:
        super().__init__(PretrainedConfig(vocab_size=VOCAB, is_encoder_decoder=False))
        self.setting = setting
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask=None, **kwargs):
        rows = [logits(self.setting, tuple(row)) for row in input_ids.tolist()]
        return CausalLMOutput(logits=torch.tensor(rows, dtype=torch.float32)[:, None])

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids}

    def _prefill(self, input_ids, *args, **kwargs):
        return self(input_ids)


def search_torch(setting: Setting) -> list[tuple[list[int], float]]:
    """Returns the beams and their scores, best first."""
    config = GenerationConfig(
        num_beams=setting.width,
        num_return_sequences=setting.width,
        do_sample=False,
        max_new_tokens=setting.max_tokens,
        min_new_tokens=setting.min_tokens or None,
        eos_token_id=list(setting.stops) or None,
        pad_token_id=VOCAB,
        length_penalty=setting.length_penalty,
        early_stopping=setting.early_stopping,
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    prompt = torch.tensor([setting.prompt])
    found = HashModel(setting).generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    outputs = [[token for token in row[len(setting.prompt) :].tolist() if token != VOCAB] for row in found.sequences]
    return list(zip(outputs, found.sequences_scores.tolist(), strict=True))


def main() -> None:
    found = [search_torch(make_setting(seed)) for seed in range(NUM_SETTINGS)]
    rows = [json.dumps([[tokens, float(f"{score:.6g}")] for tokens, score in beams], separators=(",", ":")) for beams in found]
    GOLDENS.write_text("[\n" + ",\n".join(rows) + "\n]\n")
    print(f"{len(found)} searches")


if __name__ == "__main__":
    main()
