"""Small random checkpoints of each family, and a driver that runs them over pages in chunks and batches.

The checkpoints are made from numpy seeds, with Hugging Face's tensor names spelled out here on purpose: a wrong name in a
family's weight table must fail a test. ``models/make_goldens.py`` runs the same checkpoints through transformers.
"""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
_LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", **SMALL)
_MISTRAL = dict(architectures=["MistralForCausalLM"], model_type="mistral", **SMALL)
_QWEN2 = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", **SMALL)
_QWEN3 = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=24, **SMALL)
_SHORT = [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]
_LONG = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

CASES = {
    "llama": _LLAMA,
    "llama_tied_mha": {**_LLAMA, "tie_word_embeddings": True, "num_key_value_heads": None, "rope_theta": 500.0},
    "llama_biases": {**_LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 8},
    "llama_linear": {**_LLAMA, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama_dynamic": {**_LLAMA, "max_position_embeddings": 20, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama_yarn": {**_LLAMA, "rope_scaling": _YARN},
    "llama_yarn_mscale": {
        **_LLAMA,
        "rope_parameters": {**_YARN, "rope_theta": 1e6, "mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 8, "truncate": False},
    },
    "llama_llama3": {
        **_LLAMA,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama_longrope": {
        **_LLAMA,
        "rope_scaling": {"rope_type": "longrope", "short_factor": _SHORT, "long_factor": _LONG, "original_max_position_embeddings": 24},
    },
    "llama_proportional": {**_LLAMA, "rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "mistral": {**_MISTRAL, "sliding_window": None},
    "mistral_window": {**_MISTRAL, "sliding_window": 7, "head_dim": 32},
    "qwen2": _QWEN2,
    "qwen2_window_tied": {
        **_QWEN2,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": _QWEN3,
    "qwen3_window_bias": {
        **_QWEN3,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
"""Name -> content of config.json."""


def make_tensors(hf: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns float32 tensors under Hugging Face's names, all of them exact in bfloat16."""
    rng = np.random.default_rng(seed)
    hidden, inner, heads = hf["hidden_size"], hf["intermediate_size"], hf["num_attention_heads"]
    kv_heads, dim = hf["num_key_value_heads"] or heads, hf.get("head_dim") or hidden // heads
    family = hf["model_type"]
    shapes = {"model.embed_tokens.weight": (hf["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not hf["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (hf["vocab_size"], hidden)
    for layer in range(hf["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        linears = {
            "self_attn.q_proj": (heads * dim, hidden, family == "qwen2" or hf.get("attention_bias", False)),
            "self_attn.k_proj": (kv_heads * dim, hidden, family == "qwen2" or hf.get("attention_bias", False)),
            "self_attn.v_proj": (kv_heads * dim, hidden, family == "qwen2" or hf.get("attention_bias", False)),
            "self_attn.o_proj": (hidden, heads * dim, hf.get("attention_bias", False)),
            "mlp.gate_proj": (inner, hidden, hf.get("mlp_bias", False)),
            "mlp.up_proj": (inner, hidden, hf.get("mlp_bias", False)),
            "mlp.down_proj": (hidden, inner, hf.get("mlp_bias", False)),
        }
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}.{name}.bias"] = (rows,)
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        norms |= {"self_attn.q_norm": dim, "self_attn.k_norm": dim} if family == "qwen3" else {}
        shapes |= {f"{prefix}.{name}.weight": (size,) for name, size in norms.items()}
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32) * np.float32(0.15)
        if "norm" in name:
            values += 1
        tensors[name] = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    return tensors


def make_prompts(hf: dict, lengths: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    """Returns random prompts of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, hf["vocab_size"], length).tolist() for length in lengths]


def write_checkpoint(directory: Path, hf: dict, tensors: dict[str, np.ndarray], *, dtype: str | None = None, shards: int = 1) -> Path:
    """Writes a model directory in Hugging Face layout."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf))
    if dtype is not None:
        tensors = {name: values.astype(dtype) for name, values in tensors.items()}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[shard::shards]}, directory / file)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@dataclasses.dataclass
class Generation:
    """What greedy decoding gave for one prompt.

    Attributes:
        tokens: The prompt and what was generated.
        logits: float32 [len(tokens) - 1, V], after each token but the last.
    """

    tokens: list[int]
    logits: np.ndarray


def generate_paged(model, params, prompts: list[list[int]], num_tokens: int, *, page_size: int = 4, chunk: int = 5, bucket: int = 64):
    """Decodes greedily over scattered pages: prompts in chunks of ``chunk`` tokens, decodes of others in the same steps."""
    import jax

    from jaxpaged.state import StepInputs, init_pool

    @jax.jit
    def run(params, pool, inputs):
        hidden, pool = model.hidden(params, pool, inputs)
        return model.logits(params, hidden), pool

    width = -(-(max(map(len, prompts)) + num_tokens) // page_size)
    num_pages = 1 + len(prompts) * width
    tables = np.random.default_rng(5).permutation(np.arange(1, num_pages)).reshape(len(prompts), width)
    pool = init_pool(model.config, num_pages, page_size)
    tokens, computed = [list(prompt) for prompt in prompts], [0] * len(prompts)
    logits: list[list[np.ndarray]] = [[] for _ in prompts]
    goals = [len(prompt) + num_tokens - 1 for prompt in prompts]  # the last token is never fed
    while any(done < goal for done, goal in zip(computed, goals, strict=True)):
        inputs = StepInputs.zeros(bucket, len(prompts), width, max_num_seqs=len(prompts))
        left, rows = bucket, []
        for index in range(len(prompts)):
            count = min(len(tokens[index]) - computed[index], 1 if computed[index] >= len(prompts[index]) else chunk, left)
            if count > 0 and computed[index] < goals[index]:
                rows.append((index, count))
                left -= count
        rows.sort(key=lambda row: row[1] > 1)
        at = 0
        for row, (index, count) in enumerate(rows):
            start = computed[index]
            inputs.tokens[at : at + count] = tokens[index][start : start + count]
            inputs.positions[at : at + count] = np.arange(start, start + count)
            inputs.kv_lens[row], inputs.prompt_lens[row] = start + count, len(prompts[index])
            inputs.block_tables[row] = tables[index]
            inputs.cu_q_lens[row + 1 :] = at + count
            at += count
        singles = sum(count == 1 for _, count in rows)
        inputs.distribution[:] = [singles, singles, len(rows)]
        found, pool = run(params, pool, inputs)
        at = 0
        for index, count in rows:
            logits[index].extend(np.asarray(found[at : at + count]))
            at += count
            computed[index] += count
            if computed[index] == len(tokens[index]):
                tokens[index].append(int(np.argmax(logits[index][-1])))
    return [Generation(sequence, np.stack(rows)) for sequence, rows in zip(tokens, logits, strict=True)]
