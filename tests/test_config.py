"""Options: one field each, parsed from four places, with errors that name the option, the value and what is allowed."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxpaged.cli import main
from jaxpaged.config import EngineConfig, ServerConfig, iter_options, make_config, read_yaml
from jaxpaged.errors import ConfigError
from jaxpaged.flags import LACKING, Parser, add_options, read_options

ROOT = Path(__file__).resolve().parent.parent


def parse(*argv: str) -> tuple[EngineConfig, ServerConfig]:
    parser = Parser(prog="test")
    add_options(parser, EngineConfig, ServerConfig)
    return read_options(parser.parse(argv), EngineConfig, ServerConfig)


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
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size is a flag of vLLM"),
        (["--tp=2"], "--tp is a flag of vLLM"),
        (["--trust-remote-code"], "never executed"),
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


@pytest.mark.parametrize("name", LACKING)
def test_every_lacking_flag_is_answered_by_name_and_is_not_ours(name):
    with pytest.raises(ConfigError, match=f"--{name} is a flag of vLLM"):
        parse(f"--{name}")


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
