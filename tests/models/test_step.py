"""The step: pure, in place, and each row on its own."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_checkpoints import CASES, make_tensors, write_checkpoint

from jaxpaged.engine.loading import load_model
from jaxpaged.scheduling.plan import FEEDBACK
from jaxpaged.state import NULL_PAGE, RowFlag, StepInputs, init_pool, init_sampling_state
from jaxpaged.step import forward_step, jit_step

HF = {**CASES["llama"], "num_hidden_layers": 1}
SLOTS = 4
PROMPTS = [[7], [3, 1, 4, 1, 5]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(write_checkpoint(tmp_path_factory.mktemp("m"), HF, make_tensors(HF)))


def make_inputs(rows, *, bucket=8, flags=RowFlag.SAMPLES, starts=(0, 0, 0, 0)) -> StepInputs:
    """One row per prompt (None: left out), each with its own slot and two pages of eight positions."""
    inputs = StepInputs.zeros(bucket, SLOTS, 2, max_num_seqs=SLOTS)
    at = row = 0
    for slot, tokens in enumerate(rows):
        if tokens is None:
            continue
        count, start = len(tokens), starts[slot]
        inputs.tokens[at : at + count] = tokens
        inputs.positions[at : at + count] = np.arange(start, start + count)
        inputs.targets[at : at + count - 1] = tokens[1:]
        inputs.kv_lens[row], inputs.prompt_lens[row], inputs.slots[row], inputs.flags[row] = start + count, count, slot, flags
        inputs.block_tables[row] = [1 + 2 * slot, 2 + 2 * slot]
        at, row = at + count, row + 1
        inputs.cu_q_lens[row:] = at
    singles = sum(tokens is not None and len(tokens) == 1 for tokens in rows)
    inputs.distribution[:] = [singles, singles, row]
    return inputs


def run(loaded, inputs, pool=None, sampling=None):
    model, params = loaded
    pool = init_pool(model.config, 9, 8) if pool is None else pool
    sampling = init_sampling_state(SLOTS, model.config.vocab_size) if sampling is None else sampling
    return jit_step(model, params, pool, inputs, sampling)


def test_jit_step_is_forward_step(loaded):
    model, params = loaded
    inputs, start = make_inputs(PROMPTS), init_pool(model.config, 9, 8)
    pure = jax.jit(forward_step, static_argnums=0)
    out, pool, sampling = pure(model, params, start, inputs, init_sampling_state(SLOTS, 99))
    assert not np.asarray(start.layers[0].kv).any()
    jitted, its_pool, its_sampling = run(loaded, inputs)
    np.testing.assert_array_equal(out.tokens, jitted.tokens)
    np.testing.assert_allclose(pool.layers[0].kv, its_pool.layers[0].kv, atol=1e-5)
    np.testing.assert_array_equal(sampling.last_tokens, its_sampling.last_tokens)
    assert out.tokens[2:].tolist() == [-1, -1]
    alone, _, none = jit_step(model, params, init_pool(model.config, 9, 8), inputs)
    assert none is None
    np.testing.assert_array_equal(alone.tokens, jitted.tokens)


def test_a_row_does_not_see_its_neighbours(loaded):
    together = run(loaded, make_inputs(PROMPTS))[0].tokens
    for slot, prompt in enumerate(PROMPTS):
        rows = [None] * len(PROMPTS)
        rows[slot] = prompt
        assert run(loaded, make_inputs(rows))[0].tokens[0] == together[slot]


def test_a_feedback_token_is_what_its_slot_sampled_last(loaded):
    out, pool, sampling = run(loaded, make_inputs(PROMPTS))
    known = out.tokens[:2].tolist()
    fed, _, _ = run(loaded, make_inputs([[FEEDBACK], [FEEDBACK]], starts=(1, 5)), pool, sampling)
    _, pool, _ = run(loaded, make_inputs(PROMPTS))
    told, _, _ = run(loaded, make_inputs([[token] for token in known], starts=(1, 5)), pool)
    assert fed.tokens.tolist() == told.tokens.tolist()
    _, pool, sampling = run(loaded, make_inputs(PROMPTS))
    wrong = dataclasses.replace(sampling, last_tokens=sampling.last_tokens + 1)
    other, _, _ = run(loaded, make_inputs([[FEEDBACK], [FEEDBACK]], starts=(1, 5)), pool, wrong)
    assert other.tokens.tolist() != told.tokens.tolist()


def test_only_rows_that_sample_give_a_token(loaded):
    inputs = make_inputs(PROMPTS)
    inputs.flags[1] = 0
    out, _, sampling = run(loaded, inputs)
    assert out.tokens[0] >= 0
    assert out.tokens[1] == -1
    assert sampling.last_tokens[1] == 0


def test_nan_ends_only_its_own_row(loaded):
    model, params = loaded
    poisoned = {**params, "embed.weight": params["embed.weight"].at[PROMPTS[0][0]].set(jnp.nan)}
    clean, _, _ = run(loaded, make_inputs(PROMPTS))
    out, _, _ = run((model, poisoned), make_inputs(PROMPTS))
    assert out.tokens[0] == -1
    assert out.tokens[1] == clean.tokens[1]
    greedy, _, _ = jit_step(model, poisoned, init_pool(model.config, 9, 8), make_inputs(PROMPTS))
    assert greedy.tokens[:2].tolist() == [-1, clean.tokens[1]]


def test_logprobs_come_from_the_models_own_distribution(loaded):
    model, params = loaded
    inputs = make_inputs(PROMPTS, flags=RowFlag.SAMPLES | RowFlag.LOGPROBS | RowFlag.PROMPT_LOGPROBS)

    @jax.jit
    def log_softmax(params, pool):
        return jax.nn.log_softmax(model.logits(params, model.hidden(params, pool, inputs)[0]), axis=-1)

    expected = np.asarray(log_softmax(params, init_pool(model.config, 9, 8)))
    out, _, _ = run(loaded, inputs)
    np.testing.assert_allclose(out.logprobs[:2], expected[[0, 5], out.tokens[:2]], atol=1e-5)
    np.testing.assert_allclose(out.prompt_logprobs[1:5], expected[np.arange(1, 5), PROMPTS[1][1:]], atol=1e-5)
    assert out.ranks[:2].tolist() == [1, 1]
    assert not np.any(out.prompt_logprobs[5:])


def test_the_pool_is_updated_in_place(loaded):
    """The pool dwarfs the activations: any copy of it would show in the temporary memory and in the program."""
    model, params = loaded
    pool, sampling = init_pool(model.config, 4096, 16), init_sampling_state(SLOTS, 99)
    compiled = jit_step.lower(model, params, pool, make_inputs(PROMPTS), sampling).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < pool.num_bytes / 4
    assert memory.alias_size_in_bytes >= pool.num_bytes
    shape = ",".join(map(str, pool.layers[0].kv.shape))
    assert not re.findall(rf"= f32\[{shape}\]\S* copy\(", compiled.as_text())
    assert not re.findall(rf"f32\[{shape.replace('4096,16', '65536')}\]\S* copy\(", compiled.as_text())
    before = pool.layers[0].kv.unsafe_buffer_pointer()
    _, after, _ = compiled(params, pool, make_inputs(PROMPTS), sampling)
    assert after.layers[0].kv.unsafe_buffer_pointer() == before
    assert pool.layers[0].kv.is_deleted()
    assert sampling.token_flags.is_deleted()


def test_the_step_writes_only_its_own_cells(loaded):
    before = init_pool(loaded[0].config, 9, 8)
    before = jax.tree.map(lambda layer: layer + 7, before)
    _, pool, _ = run(loaded, make_inputs(PROMPTS), jax.tree.map(jnp.copy, before))
    changed = np.any(np.asarray(pool.layers[0].kv) != np.asarray(before.layers[0].kv), axis=(2, 3))  # [N, B]
    expected = np.zeros((9, 8), bool)
    expected[1, :1] = expected[3, :5] = True
    np.testing.assert_array_equal(changed, expected)
    assert not changed[NULL_PAGE].any()


def test_weights_are_swapped_without_compiling(loaded):
    model, params = loaded
    run(loaded, make_inputs(PROMPTS))
    programs = jit_step._cache_size()
    other = jax.tree.map(lambda array: array * 1.5, params)
    run((model, other), make_inputs(PROMPTS))
    assert jit_step._cache_size() == programs


def test_the_step_maps_over_weights(loaded):
    model, params = loaded
    inputs, pool = make_inputs(PROMPTS), init_pool(model.config, 9, 8)
    scales = jnp.array([1.0, 0.5, 1.5])

    def tokens(scale):
        changed = {**params, "layers.0.mlp.down.weight": params["layers.0.mlp.down.weight"] * scale}
        return forward_step(model, changed, pool, inputs)[0].tokens

    mapped = jax.jit(jax.vmap(tokens))(scales)
    assert mapped.shape == (3, SLOTS)
    np.testing.assert_array_equal(mapped[0], run(loaded, inputs)[0].tokens)


def test_models_of_one_configuration_are_one_static_argument(loaded, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF))
    same, _ = load_model(tmp_path, load_format="dummy")
    other, _ = load_model(tmp_path, load_format="dummy", hf_overrides={"rope_theta": 5.0})
    assert same == loaded[0]
    assert hash(same) == hash(loaded[0])
    assert other != loaded[0]


# --------------------------------------------------------------------------------------------------- shared pages, copy-on-write


def with_copies(inputs: StepInputs, *copies: tuple[int, int]) -> StepInputs:
    inputs.num_copies[:] = len(copies)
    inputs.copy_sources[: len(copies)], inputs.copy_destinations[: len(copies)] = zip(*copies, strict=True)
    return inputs


def random_pool(config, num_pages, dtype, seed=0):
    rng, pool = np.random.default_rng(seed), init_pool(config, num_pages, 8, dtype)
    return jax.tree.map(lambda array: jnp.asarray(rng.integers(0, 100, array.shape).astype(array.dtype)), pool)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("copies", [[(1, 2)], [(3, 8), (3, 1), (5, 2), (7, 4)]])
def test_copies_change_their_destinations_and_nothing_else(loaded, dtype, copies):
    """In a step that writes nothing; keys, values and scales of every layer."""
    model, params = loaded
    pool = random_pool(model.config, 9, dtype)
    before = [np.asarray(array).copy() for array in jax.tree.leaves(pool)]
    inputs = with_copies(StepInputs.zeros(8, SLOTS, 2, max_num_seqs=SLOTS), *copies)
    _, pool, _ = jit_step(model, params, pool, inputs, init_sampling_state(SLOTS, 99))
    expected = np.arange(9)
    for source, destination in copies:
        expected[destination] = source
    for was, now in zip(before, jax.tree.leaves(pool), strict=True):
        np.testing.assert_array_equal(np.asarray(now), was[expected])


def test_copies_are_in_place_in_pages_with_scales(loaded):
    model, params = loaded
    pool = init_pool(model.config, 4000, 8, "int8")
    program = jit_step.lower(model, params, pool, make_inputs(PROMPTS), init_sampling_state(SLOTS, 99)).compile()
    memory, shape = program.memory_analysis(), ",".join(map(str, pool.layers[0].kv.shape))
    assert memory.alias_size_in_bytes >= pool.num_bytes
    assert memory.temp_size_in_bytes < pool.num_bytes / 4
    assert not re.findall(rf"\[{shape}\]\S* copy\(", program.as_text())


def test_a_fork_that_copies_the_page_it_writes_is_a_sequence_of_its_own(loaded):
    """Two go on with different tokens in one partly filled page; the bits are those of two that never shared any."""
    model, params = loaded
    prompt, others = list(range(3, 14)), [[50], [60]]

    def go_on(page_ids, *, fork):
        pool = random_pool(model.config, 9, None)
        for pages in page_ids[:1] if fork else page_ids:
            _, pool, _ = jit_step(model, params, pool, StepInputs.pack([prompt], page_ids=[pages], page_size=8))
        inputs = StepInputs.pack([prompt + other for other in others], page_ids=page_ids, page_size=8, num_computed=[11, 11], logprobs=True)
        out, pool, _ = jit_step(model, params, pool, with_copies(inputs, (2, 5)) if fork else inputs)
        return out, pool

    forked, pool = go_on([[1, 2], [1, 5]], fork=True)
    alone, own = go_on([[1, 2], [4, 5]], fork=False)
    for ours, theirs in zip(jax.tree.leaves(forked), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    for ours, theirs in zip(pool.layers, own.layers, strict=True):
        np.testing.assert_array_equal(np.asarray(ours.kv[2]), np.asarray(theirs.kv[2]))
        np.testing.assert_array_equal(np.asarray(ours.kv[5, :4]), np.asarray(theirs.kv[5, :4]))  # what is beyond was never written


def test_beams_are_found_in_the_step(loaded):
    inputs = make_inputs([[7], [8], [9]], flags=RowFlag.SAMPLES | RowFlag.BEAM | RowFlag.LOGPROBS)
    inputs.beam_index[:3], inputs.beam_score[:3] = [0, 1, 0], [-1.0, -1.5, -2.0]
    out, _, _ = run(loaded, inputs)
    for row, members in ((0, (0, 1)), (2, (2,))):
        offers = [
            (-(np.float32(inputs.beam_score[member]) + logprob), parent, int(token))
            for parent, member in enumerate(members)
            for token, logprob in zip(np.asarray(out.top_ids[member]), np.asarray(out.top_logprobs[member]), strict=True)
        ]
        best = sorted(offers)[:20]
        assert np.asarray(out.beam_scores[row]).tolist() == [-score for score, _, _ in best]
        assert np.asarray(out.beam_parents[row]).tolist() == [parent for _, parent, _ in best]
        assert np.asarray(out.beam_tokens[row]).tolist() == [token for _, _, token in best]
    plain, _, _ = run(loaded, make_inputs([[7], [8], [9]], flags=RowFlag.SAMPLES | RowFlag.LOGPROBS))
    assert not np.asarray(plain.beam_scores).any() and not np.asarray(plain.beam_tokens).any()
