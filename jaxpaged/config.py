"""What the engine and the server can be told, as frozen dataclasses; the only place that reads the environment.

Each option is one dataclass field that carries its unit, its meaning and its aliases; the command line, the YAML keys, the
keyword arguments of ``LLM`` and docs/configuration.md are all made from these fields. Option names are vLLM's wherever the
meaning is the same. Values computed at start-up (the number of pages that fit, say) are never written back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import logging
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from jaxpaged.errors import ConfigError
from jaxpaged.vllm_options import replace_vllm_options

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

ENV_PREFIX = "JAXPAGED_"
TINY_MODEL = Path(__file__).parent / "assets" / "tiny"
"""Directory of the packaged demonstration model."""

MAX_LOGPROBS = 256
"""Most log-probabilities per position that an engine can be told to tell; docs/sampling.md says what they cost."""


def option(default: Any, help: str, *, aliases: tuple[str, ...] = (), low: float | None = None, high: float | None = None) -> Any:
    """Declares one option: its default, its meaning with unit, other spellings, and inclusive bounds of its value."""
    return dataclasses.field(default=default, metadata={"help": help, "aliases": aliases, "low": low, "high": high})


# --------------------------------------------------------------------------------------------------------------- the model


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary scaling of a checkpoint; ``kind`` is Hugging Face's ``rope_type``.

    Attributes:
        kind: ``default``, ``linear``, ``dynamic``, ``yarn``, ``llama3`` or ``longrope``.
        values: Its other keys as found in config.json (factor, low_freq_factor, original_max_position_embeddings, ...).
    """

    kind: str = "default"
    values: tuple[tuple[str, Any], ...] = ()

    def get(self, key: str, default: Any = None) -> Any:
        """Returns one of the scaling's values, as ``dict.get``."""
        return dict(self.values).get(key, default)

    def context_length(self, max_position_embeddings: int) -> int:
        """Returns the longest text, in tokens, that a model of so many positions reads under this scaling; vLLM's rule.

        Under ``linear``, ``dynamic`` and ``proportional`` config.json counts the positions before they are stretched, under ``yarn``
        the trained ones have a key of their own, and under ``llama3`` and ``longrope`` ``max_position_embeddings`` is the stretched
        length already.
        """
        factor = self.get("factor")
        if factor is None or self.kind not in ("linear", "dynamic", "proportional", "yarn"):
            return max_position_embeddings
        trained = self.get("original_max_position_embeddings", max_position_embeddings) if self.kind == "yarn" else max_position_embeddings
        return max(1, int(trained * factor))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model; hashable, so that it can be static under jit. Made by a family from Hugging Face's config.json.

    Attributes:
        architecture: Hugging Face class name, the registry's key.
        window: Sliding window in tokens per layer; None for full attention.
        qkv_bias, output_bias, mlp_bias: Which projections have a bias.
        qk_norm: RMSNorm over each query and key head before rotation (Qwen3).
        dtype: Name of the dtype to compute in; resolved for the device.
        weight_dtype: Name of the dtype that matrices are stored in, where it is another one (bfloat16 with float32).
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: tuple[int | None, ...] = ()
    dtype: str = "float32"
    weight_dtype: str | None = None

    @property
    def context_length(self) -> int:
        """Longest text in tokens, what the RoPE scaling adds included."""
        return self.rope_scaling.context_length(self.max_position_embeddings)

    @property
    def matrix_dtype(self) -> str:
        """Name of the dtype that matrices are stored in."""
        return self.weight_dtype or self.dtype


# --------------------------------------------------------------------------------------------------------------- the engine


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The page pool."""

    page_size: int | None = option(
        None, "tokens in a page; default 64 on a GPU, 128 on a TPU, 16 on a CPU", aliases=("block_size",), low=1, high=1024
    )
    num_pages: int | None = option(
        None, "pages in the pool, the null page included; default: what fits", aliases=("num_gpu_blocks_override",), low=2, high=2**31 - 1
    )
    gpu_memory_utilization: float = option(
        0.9, "share of the device's memory that weights, activations and pages may take", aliases=("hbm_utilization",), low=0.01, high=1.0
    )
    kv_cache_memory_bytes: int | None = option(None, "bytes of the page pool; overrides the share", low=1)
    cpu_kv_cache_gib: float = option(1.0, "GiB of pages on a CPU, at most; less where all slots at full length need less", low=0.001)
    enable_prefix_caching: bool = option(True, "keep the keys and values of earlier texts for later ones that begin alike")
    swap_space: float | None = option(
        None,
        "GiB of host memory for pages of preempted requests and of the prefix cache; default 4 on a GPU or TPU, 0 on a CPU",
        low=0,
        high=2**20,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Who runs in a step, and what sizes of step are compiled."""

    max_num_seqs: int | None = option(None, "sequences that run at once; default 256, 64 on a CPU", low=1, high=4096)
    max_num_batched_tokens: int | None = option(None, "tokens of a step, chunks and decodes; default 2048, 256 on a CPU", low=1, high=2**20)
    long_prefill_token_threshold: int = option(0, "most tokens of one prompt in a step; 0 for no bound", low=0)
    max_waiting: int = option(1024, "requests that may wait; beyond them the answer is 429", low=0)
    preemption_mode: Literal["auto", "recompute", "swap"] = option(
        "auto", "what becomes of a preempted request's pages: computed again, moved to the swap space, or what costs less by measurement"
    )
    async_depth: int = option(1, "steps dispatched before the tokens of the first are read", low=0, high=1)
    token_buckets: tuple[int, ...] | None = option(None, "token counts to compile for; default powers of two up to max_num_batched_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that ``LLM`` and the server need to make an engine."""

    model: str = option(str(TINY_MODEL), "a local directory in Hugging Face layout, or a hub id; default: the packaged tiny model")
    tokenizer: str | None = option(None, "directory or hub id of the tokenizer; default: the model's")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "of weights and computation; auto: the checkpoint's on GPU and TPU, float32 on a CPU"
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8", "fp8_e4m3", "int8"] = option(
        "auto", "of the pages; auto: as dtype; fp8 (e4m3) and int8 (with a scale per token and head) take a quarter of float32's room"
    )
    max_model_len: int | None = option(None, "longest context in tokens (4k: 4000, 4K: 4096); default: the model's, or what fits", low=1)
    load_format: Literal["auto", "safetensors", "dummy"] = option("auto", "dummy: random weights of the model's shape")
    hf_overrides: dict[str, Any] | None = option(None, "JSON object that overrides keys of config.json")
    chat_template: str | None = option(None, "file with a Jinja chat template; default: the tokenizer's")
    generation_config: Literal["auto", "vllm"] = option("auto", "auto: default sampling values from generation_config.json; vllm: none")
    seed: int = option(0, "of dummy weights, and of the seeds of requests that bring none", low=-(2**63), high=2**63 - 1)
    max_logprobs: int = option(
        20,
        "most log-probabilities a request may ask for per position; above 20 each step that tells some takes longer",
        low=0,
        high=MAX_LOGPROBS,
    )
    attention_backend: Literal["auto", "xla", "mosaic_gpu", "triton", "tpu"] = option(
        "auto", "implementation of paged attention; auto: mosaic_gpu on Hopper, triton on other GPUs, tpu on a TPU, xla on a CPU"
    )
    compilation_cache_dir: str | None = option(
        None, "directory of compiled programs, private to you; default ~/.cache/jaxpaged/xla; empty: none"
    )
    warmup: bool = option(True, "compile and run every program before the server is ready")
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP face."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 serves the network (use api_key then)")
    port: int = option(8000, "port to listen on; 0 takes a free one", low=0, high=65535)
    uds: str | None = option(None, "path of a UNIX socket to listen on instead")
    api_key: tuple[str, ...] = option((), "key that clients must send as a bearer token; several are taken")
    api_key_file: str | None = option(None, "file with further keys, one on each line (# begins a comment); read at the start")
    admin_api_key: tuple[str, ...] = option((), "key that may also do what concerns everybody, as emptying the whole prefix cache")
    served_model_name: tuple[str, ...] = option(
        (), "names that clients use for the model, the first in answers; default: its directory's name"
    )
    root_path: str = option("", "path prefix when behind a proxy that strips it")
    allowed_origins: tuple[str, ...] = option(
        (), "origins whose pages may call through a browser; * for all; default: those of loopback where it listens there without a key"
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "names that clients may call it by, beside loopback's; * for all; default: all, or none where it listens on loopback without a key",
    )
    ssl_keyfile: str | None = option(None, "PEM file of the TLS key")
    ssl_certfile: str | None = option(None, "PEM file of the TLS certificate")
    max_body_bytes: int = option(8 * 2**20, "bytes of a request body; beyond them the answer is 413", low=1024)
    shutdown_timeout: float = option(30.0, "seconds that running requests get to finish after SIGTERM", low=0.0)
    request_timeout: float | None = option(None, "seconds after which a request is ended; default: none", low=0.001)
    metrics_prefix: Literal["jaxpaged", "vllm"] = option("jaxpaged", "prefix of the metric names")
    log_requests: bool = option(False, "log one line per request (never its text)", aliases=("enable_log_requests",))
    log_stats: bool = option(True, "log throughput every 10 s while busy")
    log_format: Literal["text", "json"] = option("text", "of the log")
    uvicorn_log_level: Literal["critical", "error", "warning", "info", "debug"] = option("warning", "log level of the HTTP server")
    enable_force_include_usage: bool = option(False, "send usage in every stream")


# --------------------------------------------------------------------------------------------------------------- the options


@dataclasses.dataclass(frozen=True)
class Option:
    """One option as the command line, YAML and docs see it: a flat name and where its value belongs.

    Attributes:
        name: Field name, with underscores.
        group: The dataclass that holds it.
        type: Its annotation, resolved.
    """

    name: str
    group: type
    type: Any
    default: Any
    help: str
    aliases: tuple[str, ...]
    low: float | None
    high: float | None

    @property
    def flag(self) -> str:
        """Spelling on the command line."""
        return "--" + self.name.replace("_", "-")

    def parse(self, value: object, *, source: str) -> Any:
        """Converts and checks a value that came as text or from YAML.

        Raises:
            ConfigError: Names ``source``, the value and what is allowed.
        """
        try:
            parsed = _convert(self.type, value)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{source} must be {_describe(self.type)}; got {value!r}") from error
        if isinstance(parsed, int | float) and not isinstance(parsed, bool):
            above = self.low is None or parsed >= self.low
            if not (above and (self.high is None or parsed <= self.high)):
                bounds = f"at least {self.low:g}" if self.high is None else f"in [{self.low:g}, {self.high:g}]"
                raise ConfigError(f"{source} must be {bounds}; got {value!r}")
        return parsed


def iter_options(*groups: type) -> Iterator[Option]:
    """Yields the options of these dataclasses, in order, nested ones in place."""
    for group in groups:
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            if dataclasses.is_dataclass(hints[field.name]):
                yield from iter_options(hints[field.name])
            else:
                meta = field.metadata
                yield Option(field.name, group, hints[field.name], field.default, meta["help"], meta["aliases"], meta["low"], meta["high"])


def make_config(group: type[_T], values: Mapping[str, Any]) -> _T:
    """Makes a config dataclass, nested ones included, from flat names or aliases; None stands for an option's default.

    Options of vLLM's that ask for what happens anyway are taken, and logged.

    Raises:
        ConfigError: A name is unknown (the nearest known one is suggested) or a value does not fit.
    """
    known = {spelling: opt for opt in iter_options(group) for spelling in (opt.name, *opt.aliases)}
    ours, notes = replace_vllm_options(values, known)
    for note in notes:
        logger.info("%s", note)
    by_group: dict[type, dict[str, Any]] = {}
    for name, value in ours.items():
        opt = known.get(name)
        if opt is None:
            raise ConfigError(f"unknown option {name!r}{suggest(name, known)}")
        if value is not None:
            by_group.setdefault(opt.group, {})[opt.name] = opt.parse(value, source=name)
    config: _T = _build(group, by_group)
    return config


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file of options (flat, ``-`` and ``_`` alike).

    Raises:
        ConfigError: The file cannot be read or is not a mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected a mapping of options, got {type(content).__name__}")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def read_environment(*groups: type) -> dict[str, str]:
    """Returns the options given as ``JAXPAGED_<NAME>`` variables, and ``VLLM_API_KEY``."""
    found = {
        opt.name: os.environ[ENV_PREFIX + opt.name.upper()] for opt in iter_options(*groups) if ENV_PREFIX + opt.name.upper() in os.environ
    }
    if "VLLM_API_KEY" in os.environ and ServerConfig in groups:
        found.setdefault("api_key", os.environ["VLLM_API_KEY"])
    return found


def suggest(name: str, known: Mapping[str, object]) -> str:
    """Returns ``; did you mean ...?`` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def cache_home() -> Path:
    """Returns the user's cache directory (``XDG_CACHE_HOME`` or ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _build(group: type, by_group: Mapping[type, dict[str, Any]]) -> Any:
    hints = typing.get_type_hints(group)
    nested = {f.name: _build(hints[f.name], by_group) for f in dataclasses.fields(group) if dataclasses.is_dataclass(hints[f.name])}
    return group(**by_group.get(group, {}), **nested)


def _convert(kind: Any, value: object) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _convert(next(arg for arg in args if arg is not type(None)), value)
    if origin is Literal:
        if value not in args:
            raise ValueError(value)
        return value
    if origin is tuple:
        return tuple(_convert(args[0], item) for item in _items(value))
    if origin is dict:
        content = json.loads(value) if isinstance(value, str) else value
        if not isinstance(content, dict):
            raise TypeError(value)
        return content
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        return value if isinstance(value, bool) else words[str(value).lower()] if str(value).lower() in words else _fail(value)
    if kind is int:
        return _parse_int(value)
    if kind is float:
        return _fail(value) if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    return value if isinstance(value, str) else _fail(value)


def _items(value: object) -> list[Any]:
    """Returns the items of a list that came as one: as text with commas (from the environment), or as JSON, in which vLLM takes some."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    if len(items) == 1 and isinstance(items[0], str) and items[0].startswith("["):
        with contextlib.suppress(ValueError):
            content = json.loads(items[0])
            if all(isinstance(item, str) for item in content):
                return list(content)
    return value.split(",") if isinstance(value, str) else items


def _parse_int(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"(-?\d+)([kKmM]?)", value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(value)
    return int(match[1]) * {"": 1, "k": 1000, "K": 1024, "m": 10**6, "M": 2**20}[match[2]]


def _fail(value: object) -> Any:
    raise ValueError(value)


def _describe(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _describe(next(arg for arg in args if arg is not type(None)))
    if origin is Literal:
        return "one of " + ", ".join(args)
    if origin is tuple:
        return f"a list of {args[0].__name__} values"
    if origin is dict:
        return "a JSON object"
    return {int: "an integer (4k means 4000, 4K means 4096)", float: "a number", bool: "true or false"}.get(kind, "text")
