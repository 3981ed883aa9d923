"""A checkpoint that is damaged, hostile, or does not fit its configuration stops the start with one clear line, and quickly."""

import json
import struct
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from model_checkpoints import CASES, make_tensors, write_checkpoint
from safetensors.numpy import load_file, save_file

from jaxpaged.engine.hub import model_directory
from jaxpaged.engine.loading import load_model, read_config
from jaxpaged.engine.safetensors import read_header
from jaxpaged.engine.weights import load_params, match, open_checkpoint
from jaxpaged.errors import CheckpointError, ConfigError
from jaxpaged.models.model import Model

HF = {**CASES["llama"], "num_hidden_layers": 1}
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "m", HF, make_tensors(HF))


def refusal(directory: Path) -> str:
    """Returns the one line that the load ends with; it must come within 5 seconds (of processor time: the machine may be busy)."""
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    assert time.process_time() - started < 5
    text = str(caught.value)
    assert "\n" not in text
    return text


def change_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def write_header(directory: Path, header, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def read_raw(directory: Path) -> tuple[dict, bytes]:
    content = (directory / "model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    return {name: value for name, value in header.items() if name != "__metadata__"}, content[start:]


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# ------------------------------------------------------------------------------------------------------------------ it loads


def test_tensors_arrive_where_they_belong(checkpoint):
    model, params = load_model(checkpoint, dtype="float32")
    tensors = make_tensors(HF)
    prefix = "model.layers.0"
    np.testing.assert_array_equal(params["embed.weight"], tensors[EMBEDDING])
    qkv = [tensors[f"{prefix}.self_attn.{name}_proj.weight"] for name in "qkv"]
    np.testing.assert_array_equal(params["layers.0.attention.qkv.weight"], np.concatenate(qkv))
    gate_up = [tensors[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    np.testing.assert_array_equal(params["layers.0.mlp.gate_up.weight"], np.concatenate(gate_up))
    assert {name: (array.shape, str(array.dtype)) for name, array in params.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in model.specs.items()
    }


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_stored_dtype_loads_as_every_dtype(stored, dtype, tmp_path):
    tensors = {name: values.astype(stored) for name, values in make_tensors(HF).items()}
    write_checkpoint(tmp_path, HF, tensors)
    config = read_config(tmp_path, dtype=dtype)
    model = Model.build(config)
    params = load_params(model, match(model, open_checkpoint(tmp_path)))
    found = params["layers.0.mlp.down.weight"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, tensors["model.layers.0.mlp.down_proj.weight"].astype(dtype))


def test_shards_load_as_one_file_does(checkpoint, tmp_path):
    _, whole = load_model(checkpoint)
    _, sharded = load_model(write_checkpoint(tmp_path / "s", HF, make_tensors(HF), shards=4))
    jax.tree.map(np.testing.assert_array_equal, whole, sharded)


def test_progress_counts_every_byte(checkpoint):
    calls = []
    load_model(checkpoint, progress=lambda done, total: calls.append((done, total)))
    total = sum(values.nbytes for values in make_tensors(HF).values())
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_dummy_weights_need_no_weight_file_and_follow_the_seed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF))
    _, first = load_model(tmp_path, load_format="dummy", seed=3)
    _, same = load_model(tmp_path, load_format="dummy", seed=3)
    _, other = load_model(tmp_path, load_format="dummy", seed=4)
    jax.tree.map(np.testing.assert_array_equal, first, same)
    assert not np.array_equal(first["embed.weight"], other["embed.weight"])
    assert not np.array_equal(first["embed.weight"], first["head.weight"])


def test_auto_dtype_is_float32_on_a_cpu_and_matrices_keep_the_checkpoints(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, {**HF, "dtype": "bfloat16"}, make_tensors(HF), dtype="bfloat16")
    for fast in (True, False):
        monkeypatch.setattr("jaxpaged.engine.loading.multiplies_bfloat16", lambda fast=fast: fast)
        model, params = load_model(tmp_path)
        assert model.config.dtype == "float32"
        assert params["embed.weight"].dtype == ("bfloat16" if fast else "float32")
        assert params["norm.weight"].dtype == "float32"


def test_overrides_replace_values_and_merge_objects(tmp_path):
    hf = {**HF, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    config = read_config(tmp_path, hf_overrides={"num_hidden_layers": 5, "rope_scaling": {"factor": 4.0}})
    assert config.num_layers == 5
    assert (config.rope_scaling.kind, config.rope_scaling.get("factor")) == ("linear", 4.0)


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("file", "override", "kind", "theta", "factor"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_parameters": {"factor": 4.0}}, "linear", 7.0, 4.0),
        ({"rope_parameters": {**LINEAR, "rope_theta": 9.0}}, {"rope_scaling": {"factor": 4.0}}, "linear", 9.0, 4.0),
        ({"rope_parameters": {**LINEAR, "rope_theta": 9.0}}, {"rope_scaling": None}, "default", 9.0, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_parameters": None}, "default", 7.0, None),
        ({"rope_parameters": {**LINEAR, "rope_theta": 9.0}}, {"rope_theta": 5.0}, "linear", 5.0, 2.0),
        ({}, {"rope_parameters": {"rope_theta": 5.0}}, "default", 5.0, None),
        ({"rope_scaling": LINEAR}, {"rope_scaling": {"type": "dynamic"}}, "dynamic", 7.0, 2.0),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": {"rope_type": "dynamic"}}, "dynamic", 7.0, 2.0),
    ],
)
def test_an_override_counts_in_whichever_spelling(tmp_path, file, override, kind, theta, factor):
    (tmp_path / "config.json").write_text(json.dumps({**HF, "rope_theta": 7.0, **file}))
    config = read_config(tmp_path, hf_overrides=override)
    assert (config.rope_scaling.kind, config.rope_theta, config.rope_scaling.get("factor")) == (kind, theta, factor)


@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("over_top", [True, False])
def test_an_override_of_the_trained_length_counts_wherever_it_stands(tmp_path, top, over_top):
    yarn, trained = {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings"
    file = {"rope_scaling": yarn, trained: 16} if top else {"rope_scaling": {**yarn, trained: 16}}
    (tmp_path / "config.json").write_text(json.dumps({**HF, **file}))
    config = read_config(tmp_path, hf_overrides={trained: 32} if over_top else {"rope_scaling": {trained: 32}})
    assert (config.context_length, config.rope_scaling.get(trained)) == (128, 32)


@pytest.mark.parametrize(("stored", "override"), [("dtype", "torch_dtype"), ("torch_dtype", "dtype"), ("dtype", "dtype")])
def test_an_override_of_the_dtype_counts_in_whichever_spelling(tmp_path, stored, override, monkeypatch):
    monkeypatch.setattr("jaxpaged.engine.loading.jax.default_backend", lambda: "gpu")
    (tmp_path / "config.json").write_text(json.dumps({**HF, stored: "float32"}))
    assert read_config(tmp_path).dtype == "float32"
    assert read_config(tmp_path, hf_overrides={override: "bfloat16"}).dtype == "bfloat16"


UNUSED = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
    "model.layers.1.self_attn.rotary_emb.cos_cached": np.ones((1, 1, 4, 16), np.float16),
    "model.rotary_emb.original_inv_freq": np.ones(8, np.int64),
    "rotary_emb.long_inv_freq": np.ones(8, np.float64),
    "model.embed_positions.position_ids": np.arange(4)[None],
    "model.num_batches_tracked": np.zeros((), np.int64),
    "model.layers.0.self_attn.mask": np.ones((1, 1, 4, 4), bool),
    "version": np.zeros(3, np.uint8),
}


@pytest.mark.parametrize("name", UNUSED)
def test_what_nobody_needs_is_not_judged(checkpoint, name):
    _, expected = load_model(checkpoint)
    change_tensors(checkpoint, lambda t: t.update({name: UNUSED[name]}))
    jax.tree.map(np.testing.assert_array_equal, load_model(checkpoint)[1], expected)


def test_a_dtype_that_is_not_known_is_judged_where_it_is_needed(checkpoint):
    header, data = read_raw(checkpoint)
    header["some.scales"] = {**header.pop("model.norm.weight"), "dtype": "Q4_NEW"}
    write_header(checkpoint, header, data=data)
    assert "'model.norm.weight' is missing" in refusal(checkpoint)
    header["model.norm.weight"] = header.pop("some.scales")
    write_header(checkpoint, header, data=data)
    assert "tensor 'model.norm.weight': dtype 'Q4_NEW' is not supported; supported are F64, F32, F16, BF16" in refusal(checkpoint)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "I64"])
def test_a_weight_of_another_dtype_is_refused(checkpoint, dtype):
    header, data = read_raw(checkpoint)
    header["model.norm.weight"]["dtype"] = dtype
    write_header(checkpoint, header, data=data)
    assert f"tensor 'model.norm.weight': dtype '{dtype}' is not supported" in refusal(checkpoint)


def test_a_float_that_is_no_weight_of_this_model_is_refused_even_if_it_could_not_be_read(checkpoint):
    header, data = read_raw(checkpoint)
    header["model.layers.0.self_attn.q_proj.weight_scale"] = entry(dtype="F8_E5M2", offsets=(len(data), len(data) + 4))
    write_header(checkpoint, header, data=data + bytes(4))
    assert "'model.layers.0.self_attn.q_proj.weight_scale' belongs to nothing" in refusal(checkpoint)


def test_what_nobody_needs_has_no_say_in_the_dtype_of_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxpaged.engine.loading.multiplies_bfloat16", lambda: True)
    tensors = {name: values.astype("bfloat16") for name, values in make_tensors(HF).items()}
    tensors["model.rotary_emb.cos_cached"] = np.ones((4, 16), np.float32)
    _, params = load_model(write_checkpoint(tmp_path, {**HF, "dtype": "bfloat16"}, tensors))
    assert params["embed.weight"].dtype == "bfloat16"


def test_a_head_beside_a_tied_embedding_must_be_the_same(tmp_path):
    hf = {**HF, "tie_word_embeddings": True}
    tensors = make_tensors(hf)
    load_model(write_checkpoint(tmp_path / "same", hf, {**tensors, "lm_head.weight": tensors[EMBEDDING]}))
    other = write_checkpoint(tmp_path / "other", hf, {**tensors, "lm_head.weight": tensors[EMBEDDING] + 1})
    assert "lm_head.weight" in refusal(other)
    assert "tie_word_embeddings" in refusal(other)
    for change in (tensors[EMBEDDING][:-1], tensors[EMBEDDING].T.copy(), tensors[EMBEDDING].astype(np.int32)):
        other = write_checkpoint(tmp_path / "other", hf, {**tensors, "lm_head.weight": change})
        assert "lm_head.weight" in refusal(other)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("head", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("rows", [1, 99])
def test_a_head_beside_a_tied_embedding_may_be_of_another_dtype(tmp_path, stored, head, rows, monkeypatch):
    """The same table cast to each: what the coarser of the two can tell apart is told apart, in any piece of the table."""
    monkeypatch.setattr("jaxpaged.engine.weights._TIED_ROWS", rows)
    hf = {**HF, "tie_word_embeddings": True}
    exact = make_tensors(hf)
    table = np.round(exact[EMBEDDING].astype(np.float64) * 64) / 64
    if {stored, head} != {"float16", "bfloat16"}:  # neither of which is the coarser one everywhere
        table *= 1 + 2**-12
    tensors = {**exact, EMBEDDING: table.astype(stored)}
    _, params = load_model(write_checkpoint(tmp_path / "m", hf, {**tensors, "lm_head.weight": table.astype(head)}))
    np.testing.assert_array_equal(params["embed.weight"], table.astype(stored).astype(np.float32))
    table[-1, -1] += 0.25
    assert "tie_word_embeddings" in refusal(write_checkpoint(tmp_path / "m", hf, {**tensors, "lm_head.weight": table.astype(head)}))


# --------------------------------------------------------------------------------------------------- tensors that do not fit


def test_a_missing_tensor_is_named(checkpoint):
    change_tensors(checkpoint, lambda t: t.pop("model.layers.0.mlp.up_proj.weight"))
    assert "'model.layers.0.mlp.up_proj.weight' is missing" in refusal(checkpoint)


def test_a_tensor_too_many_is_named(checkpoint):
    change_tensors(checkpoint, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}))
    assert "model.safetensors: tensor 'model.layers.0.self_attn.q_proj.bias' belongs to nothing" in refusal(checkpoint)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "intermediate_size", "num_key_value_heads", "num_hidden_layers"])
def test_a_config_of_other_sizes_is_refused(checkpoint, key):
    (checkpoint / "config.json").write_text(json.dumps({**HF, key: {"num_key_value_heads": 4}.get(key, HF[key] * 2)}))
    text = refusal(checkpoint)
    assert "tensor 'model." in text
    assert key == "num_hidden_layers" or "config.json asks for [" in text


def test_a_transposed_matrix_is_refused(checkpoint):
    change_tensors(checkpoint, lambda t: t.update({"model.layers.0.mlp.down_proj.weight": np.zeros((112, 64), np.float32)}))
    assert "'model.layers.0.mlp.down_proj.weight' has shape [112, 64], config.json asks for [64, 112]" in refusal(checkpoint)


def test_an_untied_config_wants_a_head(checkpoint):
    change_tensors(checkpoint, lambda t: t.pop("lm_head.weight"))
    assert "'lm_head.weight' is missing" in refusal(checkpoint)


# ------------------------------------------------------------------------------------------------------------ damaged files


def damaged_files():
    long = b'{"a":' + b" " * 64
    return {
        "empty": (b"", "ends within the first 8 bytes"),
        "seven bytes": (b"\0" * 7, "ends within the first 8 bytes"),
        "header of 2**63": (struct.pack("<Q", 2**63) + b"{}", "header claims 9223372036854775808 bytes"),
        "header beyond the end": (struct.pack("<Q", 1000) + b"{}", "header claims 1000 bytes"),
        "not utf-8": (struct.pack("<Q", 4) + b"\xff\xfe{}", "not JSON"),
        "not json": (struct.pack("<Q", len(long)) + long, "not JSON"),
        "nested too deep": (struct.pack("<Q", 200_000) + b"[" * 200_000, "not JSON"),
        "a list": (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        "twice": (struct.pack("<Q", 15) + b'{"a":{},"a":{}}', "'a' appears twice"),
    }


@pytest.mark.parametrize("kind", damaged_files())
def test_a_damaged_file_is_named(checkpoint, kind):
    content, why = damaged_files()[kind]
    (checkpoint / "model.safetensors").write_bytes(content)
    text = refusal(checkpoint)
    assert "model.safetensors: " in text
    assert why in text


def test_a_header_of_more_than_100_mb_is_not_read(checkpoint):
    with (checkpoint / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)  # sparse: takes no room
    assert "header claims 200000000 bytes" in refusal(checkpoint)


BAD_ENTRIES = {
    "entry is a list": ([], "not an object"),
    "no dtype": ({"shape": [1], "data_offsets": [0, 4]}, "dtype must be a name"),
    "dtype is a list": (entry(dtype=["F32"]), "dtype must be a name"),
    "offsets of an unknown dtype backwards": (entry(dtype="Q4", offsets=(4, 0)), "its offsets give -4"),
    "an unknown dtype beyond the end": (entry(dtype="Q4", offsets=(0, 5)), "truncated"),
    "negative size": (entry(shape=(-1,)), "shape must be a list"),
    "size is true": (entry(shape=(True,)), "shape must be a list"),
    "size is a float": (entry(shape=(1.0,)), "shape must be a list"),
    "too many axes": (entry(shape=(1,) * 9), "shape must be a list"),
    "product overflows": (entry(shape=(2**62, 2**62)), "its offsets give 4"),
    "one offset": (entry(offsets=(0,)), "two byte offsets"),
    "negative offset": (entry(offsets=(-4, 0)), "two byte offsets"),
    "offsets backwards": (entry(offsets=(4, 0)), "its offsets give -4"),
    "offsets too short": (entry(offsets=(0, 3)), "its offsets give 3"),
    "beyond the end": (entry(offsets=(2, 6)), "truncated"),
    "far beyond the end": (entry(offsets=(2**40, 2**40 + 4)), "truncated"),
}


@pytest.mark.parametrize("kind", BAD_ENTRIES)
def test_a_damaged_entry_names_its_tensor(checkpoint, kind):
    bad, why = BAD_ENTRIES[kind]
    write_header(checkpoint, {"some.weight": bad}, data=b"\0" * 4)
    text = refusal(checkpoint)
    assert "model.safetensors: tensor 'some.weight'" in text
    assert why in text


@pytest.mark.parametrize(
    ("entries", "size", "why"),
    [
        ({"a": entry(offsets=(0, 4)), "b": entry(offsets=(0, 4))}, 4, "overlaps the one before"),
        ({"a": entry(offsets=(0, 4)), "b": entry(offsets=(2, 6))}, 6, "overlaps the one before"),
        ({"a": entry(offsets=(0, 4)), "b": entry(offsets=(8, 12))}, 12, "leaves a hole before it"),
        ({"a": entry(offsets=(4, 8))}, 8, "leaves a hole before it"),
        ({"a": entry(offsets=(0, 4)), "b": entry(shape=(0,), offsets=(2, 2))}, 4, "overlaps the one before"),
        ({"a": entry(offsets=(0, 4))}, 9, "5 bytes after the last tensor"),
    ],
)
def test_data_must_be_one_run_of_tensors(checkpoint, entries, size, why):
    write_header(checkpoint, entries, data=b"\0" * size)
    assert why in refusal(checkpoint)


def test_a_truncated_file_names_the_first_tensor_that_is_cut(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    text = refusal(checkpoint)
    assert "model.safetensors: tensor 'model." in text
    assert "truncated" in text


def test_a_hundred_thousand_tensors_are_refused_quickly(checkpoint):
    write_header(checkpoint, {f"t{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(100_000)})
    assert "'model.embed_tokens.weight' is missing" in refusal(checkpoint)


def test_tensors_without_elements_are_valid(tmp_path):
    save_file({"a": np.zeros((0, 3), np.float32), "b": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    tensors = read_header(tmp_path / "x.safetensors")
    assert tensors["a"].read().shape == (0, 3)
    np.testing.assert_array_equal(tensors["b"].read(), [1, 1])


# -------------------------------------------------------------------------------------------------------- index and directory


def set_index(directory: Path, change) -> Path:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return directory


@pytest.fixture
def sharded(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "s", HF, make_tensors(HF), shards=2)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a\\b.safetensors", "x.bin", 7, ""])
def test_an_index_cannot_point_elsewhere(sharded, tmp_path, file):
    save_file({EMBEDDING: np.zeros((99, 64), np.float32)}, tmp_path / "secret.safetensors")
    text = refusal(set_index(sharded, lambda weights: weights.update({EMBEDDING: file})))
    assert f"tensor {EMBEDDING!r} lies in {file!r}" in text


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: missing" in refusal(sharded)


def test_an_index_that_names_the_wrong_shard_is_refused(sharded):
    other = {"model-00001-of-00002.safetensors": "model-00002-of-00002.safetensors"}
    text = refusal(set_index(sharded, lambda weights: weights.update({EMBEDDING: other.get(weights[EMBEDDING], *other)})))
    assert f"tensor {EMBEDDING!r} should be in" in text


def test_a_buffer_may_be_in_two_shards_or_where_the_index_does_not_say(sharded):
    _, expected = load_model(sharded)
    for number, value in (("1", 0.0), ("2", 1.0)):
        path = sharded / f"model-0000{number}-of-00002.safetensors"
        save_file({**load_file(path), "model.rotary_emb.inv_freq": np.full(8, value, np.float32)}, path)
    set_index(sharded, lambda weights: weights.update({"model.rotary_emb.cos": "model-00001-of-00002.safetensors"}))
    jax.tree.map(np.testing.assert_array_equal, load_model(sharded)[1], expected)


def test_a_tensor_in_two_shards_is_refused(sharded):
    path = sharded / "model-00001-of-00002.safetensors"
    twice = load_file(sharded / "model-00002-of-00002.safetensors")
    name = next(iter(twice))
    save_file({**load_file(path), name: twice[name]}, path)
    assert f"tensor {name!r} is also in" in refusal(sharded)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\ufffd{"])
def test_a_damaged_index_is_named(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json: " in refusal(sharded)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "weights.pth", "x.ckpt", "m.pkl", "m.gguf"])
def test_pickled_weights_are_named_and_never_opened(tmp_path, file, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(HF))
    (tmp_path / file).write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    opened = []
    real_open, real_read = Path.open, Path.read_bytes
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: opened.append(self.name) or real_open(self, *a, **k))
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self.name) or real_read(self))
    assert f"{file} is not read, convert it to safetensors" in refusal(tmp_path)
    assert file not in opened


def test_code_beside_the_weights_is_not_run(checkpoint):
    canary = checkpoint / "canary"
    (checkpoint / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (checkpoint / "config.json").write_text(json.dumps({**HF, "auto_map": auto_map, "trust_remote_code": True}))
    load_model(checkpoint)
    assert not canary.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00", "[" * 200_000])
def test_a_damaged_config_is_named(checkpoint, content):
    (checkpoint / "config.json").write_text(content)
    assert "config.json: not" in refusal(checkpoint)


def test_a_missing_config_is_named(checkpoint):
    (checkpoint / "config.json").unlink()
    assert "config.json: missing" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["owner/name-that-is-not-here", "just-a-name"])
def test_a_hub_id_without_network_says_what_to_do(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="pass a local directory, or omit MODEL for the packaged tiny model") as caught:
        model_directory(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "../up", "a/b/c", "", "with space"])
def test_a_path_that_is_not_there_is_no_hub_id(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(ConfigError, match="not a directory"):
        model_directory(name)
