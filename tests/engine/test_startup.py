"""Memory planning, the compile cache, what is printed, and what importing loads."""

import dataclasses
import io
import json
import logging
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from engine_fakes import SMALL

from jaxpaged.attention import make_pool, page_bytes
from jaxpaged.config import TINY_MODEL, CacheConfig, EngineConfig, ModelConfig, RopeScaling, SchedulerConfig, make_config
from jaxpaged.engine import compile_cache
from jaxpaged.engine.compile_cache import CompileCache, enable_compile_cache
from jaxpaged.engine.memory import Budget, available_host_bytes, plan_memory, plan_swap_space
from jaxpaged.engine.progress import Bars, Lines, Quiet, make_progress
from jaxpaged.engine.runner import Runner
from jaxpaged.engine.startup import (
    _eos_token_ids,
    _generation_defaults,
    _keys_depend_on_prompt_length,
    _resolve,
    _sliding_window,
    load_engine,
)
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.errors import CheckpointError, ConfigError

PAGE_BYTES = 1024


def plan(num_bytes, *, length=100, seqs=4, config=None, may_shorten=False, keep_small=False):
    return plan_memory(
        config or CacheConfig(),
        Budget(num_bytes, "the reason", "--the-flag"),
        page_size=16,
        page_bytes=PAGE_BYTES,
        max_model_len=length,
        max_num_seqs=seqs,
        may_shorten=may_shorten,
        keep_small=keep_small,
    )


def test_pages_fill_the_budget():
    assert plan(50 * PAGE_BYTES + 5).num_pages == 50
    assert plan(50 * PAGE_BYTES).num_bytes == 50 * PAGE_BYTES


def test_no_more_pages_than_can_be_used_are_taken_if_so_asked():
    assert plan(500 * PAGE_BYTES, keep_small=True).num_pages == 4 * 7 + 1
    assert plan(20 * PAGE_BYTES, keep_small=True).num_pages == 20


@pytest.mark.parametrize("pages", [7, 8, 9])
def test_too_little_memory_says_how_much_is_needed_there_and_fits(pages):
    """100 tokens are 7 pages, and one is the null page."""
    if pages >= 8:
        assert plan(pages * PAGE_BYTES).max_model_len == 100
        return
    with pytest.raises(ConfigError) as caught:
        plan(pages * PAGE_BYTES, length=100)
    message = str(caught.value)
    for part in (
        "max_model_len 100",
        f"{8 * PAGE_BYTES / 2**20:.1f} MiB",
        f"{7 * PAGE_BYTES / 2**20:.1f} MiB",
        "96 tokens",
        "--the-flag",
        "the reason",
    ):
        assert part in message


def test_the_context_is_shortened_only_if_nobody_asked_for_it():
    assert plan(5 * PAGE_BYTES, may_shorten=True).max_model_len == 64
    with pytest.raises(ConfigError):
        plan(1 * PAGE_BYTES, may_shorten=True)
    with pytest.raises(ConfigError):
        plan(-5, may_shorten=True)


def test_a_number_of_pages_overrides_the_budget():
    assert plan(0, config=CacheConfig(num_pages=33)).num_pages == 33
    with pytest.raises(ConfigError, match="--num-pages"):
        plan(10**9, config=CacheConfig(num_pages=3))


@dataclasses.dataclass
class Device:
    platform: str
    device_kind: str = ""
    compute_capability: str | None = None


CPU, TPU = Device("cpu", "cpu"), Device("tpu", "TPU v6 lite")
HOPPER, ADA = Device("gpu", "NVIDIA H200", "9.0"), Device("gpu", "NVIDIA L4", "8.9")


def test_default_sizes_by_platform():
    assert _resolve(EngineConfig(), CPU).max_num_seqs == 64
    assert _resolve(EngineConfig(), HOPPER).max_num_batched_tokens == 2048
    small = _resolve(make_config(EngineConfig, {"max_num_batched_tokens": 16}), CPU)
    assert (small.max_num_seqs, small.token_buckets[-1]) == (16, 16)
    wide = _resolve(EngineConfig(scheduler=SchedulerConfig(max_num_seqs=1000)), CPU)
    assert wide.max_num_batched_tokens == 1000


@pytest.mark.parametrize(
    ("device", "page_size", "backend"), [(CPU, 16, "xla"), (HOPPER, 64, "mosaic_gpu"), (ADA, 64, "triton"), (TPU, 128, "tpu")]
)
def test_page_size_and_attention_backend_by_platform(device, page_size, backend):
    resolved = _resolve(EngineConfig(), device)
    assert (resolved.page_size, resolved.backend) == (page_size, backend)
    asked = _resolve(make_config(EngineConfig, {"block_size": 32, "attention_backend": "xla"}), device)
    assert (asked.page_size, asked.backend) == (32, "xla")


@pytest.mark.parametrize(
    ("device", "backend", "message"),
    [
        (CPU, "triton", r"--attention-backend triton cannot run on cpu:cpu; here run: auto, xla$"),
        (ADA, "mosaic_gpu", r"cannot run on gpu:NVIDIA L4 \(compute capability 8.9\); here run: auto, triton, xla$"),
        (HOPPER, "tpu", r"here run: auto, mosaic_gpu, triton, xla$"),
        (TPU, "mosaic_gpu", r"--attention-backend mosaic_gpu cannot run on tpu:TPU v6 lite; here run: auto, tpu, xla$"),
    ],
)
def test_a_backend_that_cannot_run_here_is_refused_with_what_can(device, backend, message):
    with pytest.raises(ConfigError, match=message):
        _resolve(make_config(EngineConfig, {"attention_backend": backend}), device)


def test_an_engine_refuses_a_backend_before_it_loads_anything():
    with pytest.raises(ConfigError, match="--attention-backend tpu cannot run on cpu"):
        load_engine(make_config(EngineConfig, {"model": "nowhere", "attention_backend": "tpu", "compilation_cache_dir": ""}))


@pytest.mark.parametrize(
    ("dtype", "implementation", "bytes_per_head"),
    [
        ("float32", "xla", 80 * 4),
        ("bfloat16", "xla", 80 * 2),
        ("float8_e4m3fn", "xla", 80),
        ("int8", "xla", 80 + 4),
        ("bfloat16", "tpu", 128 * 2),
        ("int8", "tpu", 128 + 4),
    ],
)
def test_a_pages_bytes_count_padded_heads_and_scales(dtype, implementation, bytes_per_head):
    config = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=9, hidden_size=9, intermediate_size=9, num_layers=3, num_heads=4, num_kv_heads=2,
        head_dim=80, max_position_embeddings=9,
    )  # fmt: skip
    size = page_bytes(config, 16, dtype, implementation=implementation)
    assert size == 16 * 3 * 2 * 2 * bytes_per_head
    pool = make_pool(config, 5, 16, dtype, implementation=implementation)
    assert pool.num_bytes == 5 * size
    assert (pool.num_pages, pool.page_size) == (5, 16)


def test_running_out_of_device_memory_says_what_to_do(monkeypatch):
    def exhausted(self, progress):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes")

    monkeypatch.setattr(Runner, "warm_up", exhausted)
    with pytest.raises(ConfigError, match="--gpu-memory-utilization"):
        load_engine(make_config(EngineConfig, {"max_num_batched_tokens": 4, "num_pages": 200, "compilation_cache_dir": ""}))


def test_a_context_longer_than_the_models_is_refused():
    with pytest.raises(ConfigError, match=r"max_model_len 1000000 is more than the model's context of 1024 tokens$"):
        load_engine(make_config(EngineConfig, {"max_model_len": 10**6, "compilation_cache_dir": ""}))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_context_that_the_rope_scaling_stretches_may_be_had(kind):
    options = {"load_format": "dummy", "warmup": False, "compilation_cache_dir": "", "max_num_seqs": 1, "max_num_batched_tokens": 4}
    options["hf_overrides"] = {"max_position_embeddings": 64, "rope_scaling": {"rope_type": kind, "factor": 4.0}, "eos_token_id": 9}
    for asked in (None, 256):
        loaded = load_engine(make_config(EngineConfig, {**options, "max_model_len": asked}))
        assert (loaded.info.max_model_len, loaded.info.max_request_tokens, loaded.info.eos_token_ids) == (256, 256, (9,))
        loaded.close()
    message = rf"the model's context of 256 tokens \(max_position_embeddings 64, stretched by {kind} RoPE scaling\)"
    with pytest.raises(ConfigError, match=message):
        load_engine(make_config(EngineConfig, {**options, "max_model_len": 257}))


# ----------------------------------------------------------------------------------------- host memory, sharing, preemption


GIB = 2**30


def swap_pages(device, *, available=64 * GIB, page_bytes=1, **options):
    return plan_swap_space(make_config(EngineConfig, options), device, available_bytes=available, page_bytes=page_bytes)


def test_a_swap_space_by_platform_and_free_memory():
    assert swap_pages(CPU) == 0
    assert swap_pages(HOPPER) == swap_pages(TPU) == 4 * GIB
    assert swap_pages(HOPPER, available=GIB) == GIB // 2  # nobody asked for more
    assert swap_pages(HOPPER, available=-5) == 0
    assert swap_pages(CPU, swap_space=0.5, page_bytes=GIB // 8) == 4
    assert swap_pages(HOPPER, available=None) == 4 * GIB
    assert swap_pages(HOPPER, swap_space=0) == 0


@pytest.mark.parametrize("device", [CPU, HOPPER])
def test_a_swap_space_larger_than_free_memory_is_refused_with_both_numbers(device):
    assert swap_pages(device, swap_space=3, available=3 * GIB) == 3 * GIB
    with pytest.raises(ConfigError, match=r"--swap-space 3 asks for 3\.00 GiB of host memory, but 2\.00 GiB are free"):
        swap_pages(device, swap_space=3, available=2 * GIB)
    assert swap_pages(device, swap_space=3, available=None) == 3 * GIB


@pytest.mark.parametrize(("swap_space", "page_bytes"), [(None, 1), (0, 1), (0.5, GIB)])
def test_swapping_without_room_for_a_page_is_refused(swap_space, page_bytes):
    options = {} if swap_space is None else {"swap_space": swap_space}
    with pytest.raises(ConfigError, match="--preemption-mode swap needs a --swap-space"):
        swap_pages(CPU, preemption_mode="swap", page_bytes=page_bytes, **options)
    assert swap_pages(CPU, preemption_mode="recompute", page_bytes=page_bytes, **options) == 0


def test_free_memory_is_what_the_kernel_says(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       16 kB\nMemFree:        2 kB\nMemAvailable:   12 kB\n")
    assert available_host_bytes(file) == 12 * 1024
    file.write_text("MemTotal:       16 kB\n")
    assert available_host_bytes(file) is None
    assert available_host_bytes(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("options", "message"), [({"swap_space": 2**19}, "are free"), ({"preemption_mode": "swap"}, "needs a --swap-space")]
)
def test_an_engine_refuses_such_a_swap_space_before_it_loads_anything(options, message):
    with pytest.raises(ConfigError, match=message):
        load_engine(make_config(EngineConfig, {"model": "nowhere", "compilation_cache_dir": "", **options}))


def model_config(**more):
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=9, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=1, num_kv_heads=1,
        head_dim=8, max_position_embeddings=9, **more,
    )  # fmt: skip


def test_pages_may_be_left_behind_only_if_no_layer_sees_them():
    assert _sliding_window(model_config(window=(4, 8))) == 8
    assert _sliding_window(model_config(window=(4, None))) is None
    assert _sliding_window(model_config(window=(None, None))) is None
    assert _sliding_window(model_config()) is None


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "yarn", "llama3", "longrope"])
def test_keys_that_look_at_the_prompts_length(kind):
    assert _keys_depend_on_prompt_length(model_config(rope_scaling=RopeScaling(kind=kind))) is (kind in ("dynamic", "longrope"))


# --------------------------------------------------------------------------------------------------------- the compile cache


@pytest.fixture
def jax_config():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compile_cache.compilation_cache.reset_cache()


def compile_one(constant):
    jax.jit(lambda x: x * constant + 1).lower(jax.ShapeDtypeStruct((4,), "float32")).compile()


def test_programs_are_kept_in_a_private_directory(tmp_path, jax_config):
    cache = enable_compile_cache(str(tmp_path / "deep" / "xla"))
    path = cache.path
    assert path.stat().st_mode & 0o777 == 0o700
    compile_one(3.25)
    assert any(path.iterdir())
    assert enable_compile_cache(str(path)) == cache


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_open_to_others_is_refused(tmp_path, jax_config, mode):
    path = tmp_path / "xla"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 700"):
        enable_compile_cache(str(path))
    assert jax.config.jax_compilation_cache_dir is None


def test_somebody_elses_directory_is_refused(tmp_path, jax_config, monkeypatch):
    path = tmp_path / "xla"
    path.mkdir(mode=0o700)
    monkeypatch.setattr(compile_cache.os, "getuid", lambda: 12345)
    with pytest.raises(ConfigError, match="not to you"):
        enable_compile_cache(str(path))


def test_a_file_in_its_place_or_no_place_costs_only_a_warning(tmp_path, jax_config, caplog):
    (tmp_path / "file").write_text("")
    assert enable_compile_cache(str(tmp_path / "file" / "xla")) is None
    assert "not kept" in caplog.text
    assert jax.config.jax_compilation_cache_dir is None


HITS = "/jax/compilation_cache/cache_hits"


@pytest.fixture
def start(tmp_path, jax_config):
    """Plays a start that compiles programs, and returns how many came out of the cache."""

    def play(*constants, directory=tmp_path / "xla", seal=True):
        jax.clear_caches()
        cache, hits = enable_compile_cache(str(directory)), []
        listener = lambda event, **_: hits.append(event) if event == HITS else None  # noqa: E731
        jax.monitoring.register_event_listener(listener)
        for constant in constants:
            program = jax.jit(lambda x, constant=constant: x * constant + 1).lower(jax.ShapeDtypeStruct((4,), "float32")).compile()
            assert np.asarray(program(np.ones(4, np.float32)))[0] == constant + 1
        jax.monitoring.unregister_event_listener(listener)
        if seal:
            cache.seal()
        return len(hits)

    return play


def entries(tmp_path):
    return sorted((tmp_path / "xla").glob("*-cache"))


def shorten(path):
    path.write_bytes(path.read_bytes()[:20])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [shorten, flip, lambda path: path.write_bytes(b"")])
def test_a_damaged_entry_is_replaced(tmp_path, start, caplog, damage):
    assert (start(7.5, 8.5), start(7.5, 8.5)) == (0, 2)
    damage(entries(tmp_path)[0])
    assert start(7.5, 8.5) == 1
    assert f"compile cache {tmp_path / 'xla'}: 1 of 2 programs were damaged, exchanged or not written to the end" in caplog.text
    caplog.clear()
    assert start(7.5, 8.5) == 2
    assert not caplog.text


def test_exchanged_entries_are_seen_before_they_are_run(tmp_path, start, caplog):
    start(7.5, 8.5, 9.5)
    one, other, _ = entries(tmp_path)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    assert (start(7.5, 8.5, 9.5), start(7.5, 8.5, 9.5)) == (1, 3)
    assert "2 of 3 programs were damaged, exchanged" in caplog.text


def test_what_was_not_written_to_the_end_or_has_lost_its_seal_is_compiled_anew(tmp_path, start):
    start(7.5)
    assert start(7.5, 8.5, seal=False) == 1  # killed while it compiled
    assert (start(7.5, 8.5), start(7.5, 8.5)) == (1, 2)
    for seal in (tmp_path / "xla").glob("*.sha256"):
        seal.write_bytes(b"\xff")
    assert (start(7.5, 8.5), start(7.5, 8.5)) == (0, 2)
    for entry in entries(tmp_path):
        entry.unlink()
    assert (start(7.5, 8.5), start(7.5, 8.5)) == (0, 2)


def test_a_directory_is_found_through_a_symbolic_link(tmp_path, start):
    start(7.5)
    (tmp_path / "link").symlink_to(tmp_path / "xla")
    (tmp_path / "up").symlink_to(tmp_path)
    for directory in (tmp_path / "link", tmp_path / "up" / "xla", tmp_path / "up" / ".." / tmp_path.name / "xla"):
        assert start(7.5, directory=directory) == 1
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "xla")


def test_somebody_elses_entries_get_no_seal(tmp_path, jax_config):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    (tmp_path / "jit_other-1-cache").write_bytes(b"x")
    enable_compile_cache(None).seal()
    assert [path.name for path in tmp_path.iterdir()] == ["jit_other-1-cache"]


def test_a_second_engine_of_a_process_seals_what_it_compiles(tmp_path, start):
    start(7.5)
    start(8.5, seal=False)
    cache = enable_compile_cache(None)  # the first one's
    cache.seal()
    assert (cache, start(7.5, 8.5)) == (CompileCache(tmp_path / "xla", is_ours=True), 2)


def test_jaxs_own_directory_is_respected_and_empty_means_none(tmp_path, jax_config):
    assert enable_compile_cache("") is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert enable_compile_cache(None) == CompileCache(tmp_path, is_ours=False)


# ------------------------------------------------------------------------------------------------------------- the model's files


@pytest.fixture
def directory(tmp_path):
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MODEL / name, tmp_path / name)
    return tmp_path


def test_generation_config_gives_defaults_and_ends(directory):
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 0], "temperature": 0.6, "top_k": 20, "max_new_tokens": 99, "top_p": 7.0, "do_sample": True})
    )
    lines = []
    eos = _eos_token_ids(EngineConfig(), directory, Tokenizer.load(directory))
    defaults = _generation_defaults(EngineConfig(), directory, Lines(lines.append))
    assert set(eos) >= {2, 0} and len(set(eos)) == len(eos)
    assert defaults == {"temperature": 0.6, "top_k": 20, "max_tokens": 99}
    assert any("top_p" in line and "7.0" in line for line in lines)
    assert _generation_defaults(EngineConfig(generation_config="vllm"), directory, Lines(lines.append)) == {}


@pytest.mark.parametrize(
    ("override", "ids"),
    [({"eos_token_id": 9}, (9,)), ({"eos_token_id": [9, 0, 9]}, (9, 0)), ({"eos_token_id": None}, ()), ({"vocab_size": 9}, (5, 6, 7, 2))],
)
def test_an_override_alone_says_what_ends_a_sequence(directory, override, ids):
    """It wins over generation_config.json and the tokenizer; without one, all the files together say it."""
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, None, 6, True], "temperature": None}))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert _eos_token_ids(EngineConfig(hf_overrides=override), directory, Tokenizer.load(directory)) == ids
    assert _generation_defaults(EngineConfig(hf_overrides=override), directory, Quiet()) == {}


@pytest.mark.parametrize("value", ["9", -1, [9, "x"], True, {"id": 9}, 9.0])
def test_an_override_that_is_no_id_is_refused(directory, value):
    with pytest.raises(ConfigError, match="hf_overrides: eos_token_id must be a token id, a list of them, or null; got "):
        _eos_token_ids(EngineConfig(hf_overrides={"eos_token_id": value}), directory, Tokenizer.load(directory))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": "1.0"}', b"\xff\xfe"])
def test_a_damaged_tokenizer_is_one_line(directory, content):
    (directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(directory)
    assert "\n" not in str(caught.value) and "tokenizer" in str(caught.value)


def test_a_chat_template_from_a_file(directory, tmp_path):
    (tmp_path / "my.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = Tokenizer.load(directory, chat_template=tmp_path / "my.jinja")
    assert tokenizer.decode(tokenizer.apply_chat_template([{"role": "user", "content": "hey"}])) == "hey!"
    with pytest.raises(ConfigError):
        Tokenizer.load(directory, chat_template=tmp_path / "absent.jinja")


# ------------------------------------------------------------------------------------------------------------- what is shown


def test_plain_lines_show_tenths_of_slow_stages():
    now, lines = [0.0], []
    progress = Lines(lines.append, clock=lambda: now[0])
    progress.begin("programs", 20, "programs")
    for done in range(21):
        progress.advance(done, f"{done} compiled" if done > 4 else "")
        now[0] += 0.3
    progress.end("20 compiled")
    progress.say("ready")
    assert lines[-2:] == ["programs  20 compiled", "ready"]
    assert lines[:2] == ["programs  4 of 20, about 5 s left", "programs  6 of 20, 6 compiled, about 4 s left"]
    assert 5 < len(lines) < 12


def test_fast_stages_show_one_line():
    lines = []
    progress = Lines(lines.append)
    progress.begin("weights", 100, "bytes")
    progress.advance(50)
    progress.end("done")
    assert lines == ["weights   done"]


def test_bars_only_on_a_terminal():
    stream = io.StringIO()
    assert isinstance(make_progress(stream), Lines)
    stream.isatty = lambda: True
    bars = make_progress(stream)
    assert isinstance(bars, Bars)
    bars.begin("weights", 2**30, "bytes")
    bars.advance(2**29, "half of it")
    bars.end("7 MiB [not markup]")
    assert "weights   7 MiB [not markup]" in stream.getvalue()


def test_the_start_up_log_says_what_was_loaded(small, caplog):
    """With everything switched off that takes time; the compile line is the runner's test's matter."""
    caplog.set_level(logging.WARNING)
    lines = []
    options = {"load_format": "dummy", "warmup": False, "compilation_cache_dir": "", "max_num_seqs": 2, "max_num_batched_tokens": 8}
    loaded = load_engine(make_config(EngineConfig, options), Lines(lines.append))
    text = "\n".join(lines)
    assert "jaxpaged " in lines[0] and "jax " in lines[0] and "cpu" in lines[0]
    assert "weights   LlamaForCausalLM" in text and "random" in text
    assert "attention xla (auto)" in text
    assert f"kv pages  {loaded.info.num_pages:,} pages × 16 tokens" in text
    longest = loaded.info.max_model_len
    assert f"2.0 full-length requests of {longest:,}" in text
    assert longest == loaded.info.model_config.max_position_embeddings
    assert loaded.info.num_pages == 2 * longest // 16 + 1
    assert loaded.info.model_name == "tiny" and loaded.info.platform == "cpu"
    assert "sharing   prefix cache on · swap space none · preemption recompute" in text
    assert (loaded.info.num_host_pages, loaded.info.enable_prefix_caching, loaded.info.preemption_mode) == (0, True, "recompute")
    loaded.close()


@pytest.mark.parametrize(("cached", "swap"), [(False, 0), (True, 0.01)])
def test_the_start_up_log_counts_every_program_once(tmp_path, jax_config, cached, swap):
    options = {"load_format": "dummy", "max_num_seqs": 2, "max_num_batched_tokens": 4, "token_buckets": (1, 4), "num_pages": 100}
    options |= {"hf_overrides": SMALL}
    options |= {"compilation_cache_dir": str(tmp_path / "xla") if cached else "", "swap_space": swap}
    moves = 0
    for start in ("empty", "full"):
        jax.clear_caches()  # of the process
        lines, counts = [], []
        progress = Lines(lines.append)
        progress.advance = lambda done, note="", counts=counts: counts.append((done, note)) if "compiled" in note else None
        loaded = load_engine(make_config(EngineConfig, options), progress)
        moves = loaded.engine.runner._host.num_programs
        total = 2 + 1 + moves
        assert (moves > 0) == (swap > 0)
        assert [done for done, _ in counts] == list(range(total + 1))
        assert counts[0][1] == ("0 from the cache, 0 compiled" if cached else "0 compiled")
        loaded.close()
        made = f"{total} from the cache, 0 compiled" if start == "full" else f"0 from the cache, {total} compiled"
        (line,) = [line for line in lines if line.startswith("programs ")]
        assert line.startswith(f"programs  {made if cached else f'{total} compiled'}  ")
        assert line.endswith(f"  steps of 1, 4 tokens  {f'cache {tmp_path}/xla' if cached else 'no cache'}")
        if not cached:
            break


def test_the_start_up_log_says_what_is_shared_and_swapped():
    lines = []
    options = {"load_format": "dummy", "warmup": False, "compilation_cache_dir": "", "max_num_seqs": 2, "max_num_batched_tokens": 8}
    options |= {"swap_space": 0.125, "enable_prefix_caching": False, "num_pages": 200}
    loaded = load_engine(make_config(EngineConfig, options), Lines(lines.append))
    page_bytes = loaded.info.pool_bytes // 200
    assert loaded.info.num_host_pages == 2**27 // page_bytes
    assert (loaded.info.enable_prefix_caching, loaded.info.preemption_mode) == (False, "auto")
    assert any(line.startswith("sharing   prefix cache off · swap space ") and line.endswith("preemption auto") for line in lines)
    loaded.close()


# ------------------------------------------------------------------------------------------------------------ what importing loads


def loaded_modules(statement):
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_host_floor_loads_no_jax():
    modules = loaded_modules("import jaxpaged\nimport jaxpaged.scheduling.scheduler\nfrom jaxpaged import SamplingParams, RequestError")
    assert not modules & {"jax", "jaxlib", "flax", "transformers", "torch"}


def test_public_names_are_all_there():
    import jaxpaged

    for name in jaxpaged.__all__:
        assert getattr(jaxpaged, name) is not None
    assert set(jaxpaged.__all__) <= set(dir(jaxpaged))
    with pytest.raises(AttributeError):
        jaxpaged.nonsense  # noqa: B018
