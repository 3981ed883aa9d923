"""Pages of fewer bits through the whole engine: close to float32, updated in place, counted in full."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from jaxpaged import LLM, SamplingParams
from jaxpaged.config import EngineConfig, make_config
from jaxpaged.engine.startup import _kv_dtype
from jaxpaged.errors import ConfigError

PROMPTS = [
    "The lamp belonged to Ada. Ben put the key under the bed. The key was red. Who had the lamp? In the evening Ada felt happy.",
    "What is a page? A page is a run of token positions, and a block table lists the pages of a sequence in order.",
    'Write the words in JSON: apple, river, stone, cloud. {"words": ["apple", "river", "stone", "cloud"]}',
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen",
]
BUCKETS = (4, 32)
# Largest and root mean square difference of a prompt token's log-probability from that over float32 pages, in nats, and prompts whose
# greedy tokens must all be the same. Twice what was measured: 0.50 and 0.068, 2.5 and 0.23, 4.8 and 0.52; 3, 4 and 2 prompts.
BOUNDS = {"bfloat16": (1.0, 0.14, 2), "int8": (5.0, 0.46, 3), "fp8": (9.7, 1.05, 1)}


def load(kv_cache_dtype: str) -> LLM:
    return LLM(
        kv_cache_dtype=kv_cache_dtype,
        num_pages=2049,
        max_num_seqs=4,
        max_num_batched_tokens=BUCKETS[-1],
        token_buckets=BUCKETS,
        compilation_cache_dir="",
        show_progress=False,
    )


def measure(llm: LLM) -> tuple[np.ndarray, list[list[int]]]:
    """Log-probabilities of the prompts' tokens, and 24 greedy tokens after each prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=24, prompt_logprobs=0, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    logprobs = [
        entry[token].logprob
        for output in outputs
        for token, entry in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        if entry is not None
    ]
    return np.array(logprobs), [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def exact():
    return measure(load("float32"))


@pytest.fixture(scope="module", params=BOUNDS)
def llm(request):
    return load(request.param), request.param


def test_stays_close_to_float32(llm, exact):
    (logprobs, tokens), (want, want_tokens) = measure(llm[0]), exact
    largest, rms, fewest = BOUNDS[llm[1]]
    difference = np.abs(logprobs - want)
    assert len(want) > 100
    assert 0 < difference.max() < largest
    assert np.sqrt(np.mean(difference**2)) < rms
    assert sum(a == b for a, b in zip(tokens, want_tokens, strict=True)) >= fewest


def test_the_pool_is_updated_in_place(llm):
    runner = llm[0]._engine.runner
    arrays = jax.tree.leaves(runner.pool)
    shapes = {",".join(map(str, array.shape)) for array in arrays}
    for bucket in BUCKETS:
        program = runner._programs[bucket]
        memory = program.memory_analysis()
        assert memory.temp_size_in_bytes < runner.pool.num_bytes / 4
        assert memory.alias_size_in_bytes >= runner.pool.num_bytes
        assert not [line for line in program.as_text().splitlines() if " copy(" in line and any(f"[{shape}]" in line for shape in shapes)]
    before = [array.unsafe_buffer_pointer() for array in arrays]
    llm[0].generate(PROMPTS[:1], SamplingParams(max_tokens=3), use_tqdm=False)
    assert [array.unsafe_buffer_pointer() for array in jax.tree.leaves(runner.pool)] == before


def test_what_is_planned_is_what_is_made(llm):
    engine, info = llm[0]._engine, llm[0].info
    heads = 2 * info.model_config.num_layers * info.model_config.num_kv_heads
    bytes_per_head = {"bfloat16": 32 * 2, "int8": 32 + 4, "fp8": 32}[llm[1]]
    assert info.pool_bytes == engine.runner.pool.num_bytes == 2049 * 16 * heads * bytes_per_head
    assert info.kv_dtype == {"fp8": "float8_e4m3fn"}.get(llm[1], llm[1])


def test_names_of_kv_dtypes():
    model = types.SimpleNamespace(config=types.SimpleNamespace(dtype="float32"))
    for name, dtype in {"auto": "float32", "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "int8": "int8"}.items():
        config = make_config(EngineConfig, {"kv_cache_dtype": name})
        assert _kv_dtype(config, model) == dtype
    with pytest.raises(ConfigError, match=r"kv_cache_dtype must be one of auto, bfloat16, .*, fp8, fp8_e4m3, int8; got 'fp4'"):
        make_config(EngineConfig, {"kv_cache_dtype": "fp4"})
