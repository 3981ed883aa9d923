"""Options: one field each, parsed from four places, with errors that name the option, the value and what is allowed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxpaged.cli import main
from jaxpaged.config import EngineConfig, ServerConfig, iter_options, make_config, read_yaml
from jaxpaged.errors import ConfigError
from jaxpaged.flags import Parser, add_options, options_without_effect, read_options
from jaxpaged.version import installed_version
from jaxpaged.vllm_options import VLLM_OPTIONS, VLLM_SPELLINGS

ROOT = Path(__file__).resolve().parent.parent


GROUPS = (EngineConfig, ServerConfig)


def parse(*argv: str) -> tuple[EngineConfig, ServerConfig]:
    return parse_with_notes(*argv)[0]


def parse_with_notes(*argv: str, groups=GROUPS):
    parser = Parser(prog="test")
    add_options(parser, *groups)
    args = parser.parse(argv)
    return read_options(args, *groups), options_without_effect(args, *groups)


def test_every_option_has_a_meaning_and_one_name():
    options = list(iter_options(EngineConfig, ServerConfig))
    spellings = [s for o in options for s in (o.name, *o.aliases)]
    assert all(o.help for o in options)
    assert len(spellings) == len(set(spellings))


def test_flags_aliases_suffixes_and_underscores():
    engine, server = parse("my/model", "--max_model_len", "4K", "--block-size=32", "--hbm-utilization", "0.5", "--no-warmup", "--port", "0")
    assert engine.model == "my/model"
    assert engine.max_model_len == 4096
    assert engine.cache.page_size == 32
    assert engine.cache.gpu_memory_utilization == 0.5
    assert engine.warmup is False
    assert server.port == 0
    assert parse("--max-model-len", "4k")[0].max_model_len == 4000


def test_sharing_and_preemption():
    engine = parse("--no-enable-prefix-caching", "--swap-space", "0.5", "--preemption-mode=swap")[0]
    assert (engine.cache.enable_prefix_caching, engine.cache.swap_space, engine.scheduler.preemption_mode) == (False, 0.5, "swap")
    engine = parse("--enable-prefix-caching")[0]
    assert (engine.cache.enable_prefix_caching, engine.cache.swap_space, engine.scheduler.preemption_mode) == (True, None, "auto")


def test_lists_repeat_or_stand_between_commas():
    engine, server = parse("--api-key", "a", "--api-key", "b", "--token-buckets", "1,8,64")
    assert server.api_key == ("a", "b")
    assert engine.scheduler.token_buckets == (1, 8, 64)


@pytest.mark.parametrize("flag", ["--api-key", "--served-model-name", "--allowed-origins"])
@pytest.mark.parametrize(
    "values",
    [["a", "b", "c"], ["a", "FLAG", "b", "c"], ['["a", "b", "c"]'], ["a", "b", "FLAG=c"]],
    ids=["one flag", "two", "json", "equals"],
)
def test_a_flag_takes_several_texts(flag, values):
    _, server = parse("some/model", flag, *(value.replace("FLAG", flag) for value in values))
    assert getattr(server, flag[2:].replace("-", "_")) == ("a", "b", "c")


def test_a_list_of_texts_in_a_file_and_in_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "options.yaml"
    file.write_text("served-model-name: [a, b]\nmodel: x\n")
    assert parse("--config", str(file))[1].served_model_name == ("a", "b")
    monkeypatch.setenv("JAXPAGED_SERVED_MODEL_NAME", "c,d")
    assert parse("--config", str(file))[1].served_model_name == ("c", "d")
    assert parse("--served-model-name", "e,f", "[g")[1].served_model_name == ("e,f", "[g")


def test_a_model_behind_a_list_of_texts_is_not_taken_for_one_of_them(tmp_path, monkeypatch):
    for last in ("org/model", str(tmp_path)):
        with pytest.raises(ConfigError, match="--served-model-name takes all values behind it") as error:
            parse("--served-model-name", "a", last)
        assert last not in str(error.value)
    with pytest.raises(ConfigError, match="--api-key takes all values behind it"):
        parse("--api-key", "a", "b", "org/model")
    for argv in (["m", "--api-key", "a", "b/c"], ["--model", "m", "--api-key", "a", "b/c"]):
        assert parse(*argv)[1].api_key == ("a", "b/c")
    assert parse("--api-key", "b/c")[1].api_key == ("b/c",)
    assert parse("--served-model-name", "a", "b")[0].model.endswith("tiny")


def test_command_line_beats_environment_beats_file(tmp_path, monkeypatch):
    file = tmp_path / "options.yaml"
    file.write_text("port: 1\npage-size: 8\nmax_num_seqs: 3\n")
    monkeypatch.setenv("JAXPAGED_PORT", "2")
    monkeypatch.setenv("JAXPAGED_PAGE_SIZE", "64")
    engine, server = parse("--config", str(file), "--port", "3")
    assert (server.port, engine.cache.page_size, engine.scheduler.max_num_seqs) == (3, 64, 3)


def test_vllm_api_key_is_read_where_ours_is_not_set(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "theirs")
    assert parse()[1].api_key == ("theirs",)
    monkeypatch.setenv("JAXPAGED_API_KEY", "ours")
    assert parse()[1].api_key == ("ours",)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-num-seq", "3"], "unknown flag --max-num-seq; did you mean 'max-num-seqs'?"),
        (["-zz"], "unknown flag -zz"),
        (["--trust-remote-cod"], "unknown flag --trust-remote-cod"),
        (
            ["--tensor-parallel-size", "2"],
            "tensor_parallel_size is an option of vLLM's of which jaxpaged takes only 1: this version runs on one",
        ),
        (["-tp", "2"], "tensor_parallel_size is an option of vLLM's"),
        (["--trust-remote-code"], "never executed"),
        (["--async-scheduling", "--async-depth", "0"], "async_scheduling and async_depth contradict each other"),
        (["--disable-log-stats", "--log-stats"], "disable_log_stats and log_stats contradict each other"),
        (["--port", "70000"], "port must be in [0, 65535]; got '70000'"),
        (["--port", "x"], "port must be an integer"),
        (["--dtype", "int4"], "dtype must be one of auto, bfloat16, float16, float32; got 'int4'"),
        (["--gpu-memory-utilization", "0"], "gpu_memory_utilization must be in [0.01, 1]"),
        (["--gpu-memory-utilization", "nan"], "gpu_memory_utilization must be in [0.01, 1]"),
        (["--page-size", "0"], "page_size must be in [1, 1024]"),
        (["--swap-space", "nan"], "swap_space must be in [0, "),
        (["--swap-space", "inf"], "swap_space must be in [0, "),
        (["--preemption-mode", "drop"], "preemption_mode must be one of auto, recompute, swap; got 'drop'"),
        (["--hf-overrides", "[1]"], "hf_overrides must be a JSON object"),
        (["--port"], "expected one argument"),
        (["a", "b"], "unexpected argument 'b'"),
        (["--config", "no/such.yaml"], "--config no/such.yaml"),
    ],
)
def test_bad_flags_are_named(argv, message):
    with pytest.raises(ConfigError) as error:
        parse(*argv)
    assert message in str(error.value)


OTHERS = {"tensor_parallel_size": 2, "device": "tpu", "limit_mm_per_prompt": {"image": 1}, "cpu_offload_gb": 0.5}


def flags_of(name, value):
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]


def all_ways(name, value, tmp_path):
    """Yields what gives an option of vLLM's to us, in each of three ways: flags, a file, keywords."""
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump({name: value}))
    yield lambda: parse_with_notes(*flags_of(name, value))
    yield lambda: parse_with_notes("--config", str(file))
    yield lambda: (make_config(EngineConfig, {name: value}), None)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, o in VLLM_OPTIONS.items() if o.becomes is None for v in o.same], ids=str)
def test_what_asks_vllm_for_what_happens_anyway_is_taken_and_said(name, value, tmp_path, caplog):
    caplog.set_level("INFO")
    for way in all_ways(name, value, tmp_path):
        config, notes = way()
        assert config in (parse(), EngineConfig())
        said = notes if notes is not None else caplog.messages
        assert len(said) == 1
        assert said[0].startswith(f"{name} ")
        assert "accepted without effect" in said[0]


@pytest.mark.parametrize("name", VLLM_OPTIONS)
def test_every_other_value_of_vllms_options_is_refused_by_name_and_reason(name, tmp_path):
    opt = VLLM_OPTIONS[name]
    taken = (*opt.same, *(opt.becomes[1] if opt.becomes else ()))
    value = OTHERS.get(name, next((v for v in (True, False) if v not in taken), None) if opt.is_switch else "something else")
    if value is None:  # both ways of a switch are taken
        assert len(taken) == 2
        return
    for way in all_ways(name, value, tmp_path):
        with pytest.raises(ConfigError, match=f"{name} is an option of vLLM's") as error:
            way()
        assert opt.why in str(error.value)


def test_vllms_options_that_say_the_opposite_of_ours_are_honoured(tmp_path):
    assert parse("--disable-log-stats")[1].log_stats is False
    assert parse("--disable-log-requests")[1].log_requests is False
    assert parse("--no-disable-log-requests")[1].log_requests is True
    assert parse("--enable-log-requests")[1].log_requests is True
    assert parse("--no-async-scheduling")[0].scheduler.async_depth == 0
    assert make_config(EngineConfig, {"async_scheduling": False}).scheduler.async_depth == 0
    assert parse_with_notes("--disable-log-stats")[1] == ()
    assert parse_with_notes("--disable-log-stats", "--no-log-stats")[0][1].log_stats is False
    file = tmp_path / "options.yaml"
    file.write_text("disable-log-stats: true\n")
    assert parse("--config", str(file))[1].log_stats is False
    assert parse("--config", str(file), "--log-stats")[1].log_stats is True
    config, notes = parse_with_notes("--disable-log-stats", groups=(EngineConfig,))
    assert (config[0], len(notes)) == (EngineConfig(), 1)  # without a server nothing is logged anyway


def test_a_command_line_made_for_vllm_is_taken():
    argv = (
        "some/model --tensor-parallel-size 1 --pipeline-parallel-size=1 --enforce-eager --disable-log-requests --disable-log-stats "
        "--dtype auto --enable-prefix-caching --enable-chunked-prefill --swap-space 0 --block-size 16 "
        "--max-num-batched-tokens 64 --tokenizer-mode auto "
        "--disable-custom-all-reduce --load-format auto --distributed-executor-backend uni --device auto --quantization none "
        "--guided-decoding-backend auto --max-model-len 512 --gpu-memory-utilization 0.9 --trust_remote_code"
    )
    with pytest.raises(ConfigError, match="trust_remote_code is an option of vLLM's of which jaxpaged takes only false"):
        parse(*argv.split())
    (engine, server), notes = parse_with_notes(*argv.split()[:-1])
    assert (engine.model, engine.cache.page_size, engine.scheduler.max_num_batched_tokens) == ("some/model", 16, 64)
    assert server.log_stats is False
    assert len(notes) == 10


def test_vllms_table_has_no_option_of_ours():
    ours = {spelling for opt in iter_options(*GROUPS) for spelling in (opt.name, *opt.aliases)}
    assert not ours & set(VLLM_SPELLINGS)
    names = {opt.name for opt in iter_options(*GROUPS)}
    assert all(opt.becomes is None or opt.becomes[0] in names for opt in VLLM_OPTIONS.values())
    assert len(VLLM_SPELLINGS) == sum(1 + len(opt.aliases) for opt in VLLM_OPTIONS.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "expected a mapping"),
        ("a: [", "--config"),
        ("prot: 1", "did you mean 'port'"),
        ("enable_lora: true", "adapters are not in this version"),
        ("swap_space: -1", r"swap_space must be in \[0, "),
        ("preemption_mode: never", "preemption_mode must be one of auto, recompute, swap"),
        ("enable_prefix_caching: maybe", "enable_prefix_caching must be true or false"),
    ],
)
def test_bad_yaml_is_named(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse("--config", str(file))


def test_keywords_of_llm_take_aliases_and_reject_unknown_names():
    config = make_config(EngineConfig, {"block_size": 8, "max_num_seqs": 4})
    assert (config.cache.page_size, config.scheduler.max_num_seqs) == (8, 4)
    with pytest.raises(ConfigError, match="unknown option 'max_seqs'"):
        make_config(EngineConfig, {"max_seqs": 4})


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_presets_are_valid(preset):
    assert read_yaml(preset) == {key.replace("-", "_"): value for key, value in yaml.safe_load(preset.read_text()).items()}
    parse("--config", str(preset))


def test_none_stands_for_the_default():
    assert make_config(EngineConfig, {"seed": None, "dtype": None, "quantization": None, "max_model_len": None}) == EngineConfig()


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_version(word, capsys):
    assert main([word]) == 0
    assert capsys.readouterr().out == f"jaxpaged {installed_version()}\n"


@pytest.mark.parametrize("command", ["serve", "generate", "chat", "memory", "collect-env"])
def test_help_is_for_people(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert "``" not in out
    assert str(ROOT) not in out
    assert "--tensor-parallel-size" not in out
    assert out.startswith(f"usage: jaxpaged {command} [")
    assert out.index("[MODEL]") < out.index("--") if "MODEL" in out else command == "collect-env"


def test_usage_and_unknown_commands(capsys):
    assert main(["--help"]) == 0
    assert "collect-env" in capsys.readouterr().out
    assert main(["sevre"]) == 2
    assert "did you mean 'serve'" in capsys.readouterr().err


def test_collect_env_names_versions_and_devices(capsys):
    assert main(["collect-env"]) == 0
    out = capsys.readouterr().out
    assert "jax: " in out
    assert "device 0: cpu" in out


def test_options_mistake_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, ROOT / "scripts/serve_local.py", "--prot", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "jaxpaged: unknown flag --prot; did you mean 'port'?\n"


def test_generated_docs_are_up_to_date():
    done = subprocess.run([sys.executable, ROOT / "scripts/make_docs.py", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_host_floor_loads_without_jax():
    code = "import sys, jaxpaged, jaxpaged.scheduling.request, jaxpaged.config, jaxpaged.flags; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
