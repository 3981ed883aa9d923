"""From an ``EngineConfig`` to an engine that is ready: weights, tokenizer, pool, programs; says what it does in a few lines."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from jaxpaged.attention import page_bytes, resolve_backend
from jaxpaged.config import EngineConfig, ModelConfig
from jaxpaged.engine.compile_cache import CompileCache, enable_compile_cache
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.host_pages import staging_bytes
from jaxpaged.engine.hub import model_directory
from jaxpaged.engine.json_files import read_json
from jaxpaged.engine.loading import load_model, read_hf_config
from jaxpaged.engine.memory import MemoryPlan, available_host_bytes, device_budget, plan_memory, plan_swap_space
from jaxpaged.engine.progress import Progress, Quiet, gib
from jaxpaged.engine.runner import Runner
from jaxpaged.engine.status import EngineInfo
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.errors import ConfigError, RequestError
from jaxpaged.models.model import Model, Params
from jaxpaged.scheduling.buckets import token_buckets
from jaxpaged.scheduling.fields import SAMPLING_FIELDS
from jaxpaged.scheduling.scheduler import Scheduler
from jaxpaged.state import TOP_LOGPROBS
from jaxpaged.version import installed_version

_DEFAULT_SEQS = {"cpu": 64}
_DEFAULT_TOKENS = {"cpu": 256}
_DEFAULT_PAGE_SIZE = {"cpu": 16, "gpu": 64, "tpu": 128}
_KV_DTYPES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}
"""What vLLM's names mean."""

_GENERATION_CONFIG = "generation_config.json"
_GENERATION_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclasses.dataclass(frozen=True)
class LoadedEngine:
    """An engine that is ready.

    Attributes:
        engine: Takes requests.
        info: What is fixed about it.
        close: Frees the device's memory.
    """

    engine: Engine
    info: EngineInfo
    close: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True)
class _Resolved:
    """What the options leave to the platform: sizes of a step and of a page, and who attends."""

    backend: str
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    token_buckets: tuple[int, ...]


def load_engine(config: EngineConfig, progress: Progress | None = None) -> LoadedEngine:
    """Loads everything, compiles everything, and runs each program once.

    Args:
        config: What to load.
        progress: Told of each stage; it may raise to end the loading.

    Raises:
        ConfigError: Something does not fit: the model, its files, the memory, an option.
    """
    started, progress = time.monotonic(), progress or Quiet()
    cache = enable_compile_cache(config.compilation_cache_dir)
    device = jax.devices()[0]
    sizes = _resolve(config, device)
    plan_swap_space(config, device, available_bytes=available_host_bytes())  # refuses early what cannot be
    progress.say(_headline(device))
    progress.say(f"{'attention':9} {sizes.backend}{' (auto)' if config.attention_backend == 'auto' else ''}")

    directory = model_directory(config.model, config.revision, weights=config.load_format != "dummy")
    model, params = _load_weights(config, directory, progress)
    tokenizer_dir = model_directory(config.tokenizer, weights=False) if config.tokenizer else directory
    tokenizer = Tokenizer.load(tokenizer_dir, chat_template=config.chat_template)
    with _explaining_lack_of_memory(device):
        plan = _plan_pool(config, model, params, sizes, device)
        progress.say(_describe_pool(plan, sizes.page_size, _kv_dtype(config, model)))
        progress.say(_describe_sharing(config, plan))
        runner = _make_runner(config, model, params, sizes, plan)
        if config.warmup:
            _warm_up(runner, cache, progress)
    if cache is not None:
        cache.seal()

    scheduler = Scheduler(
        num_pages=plan.num_pages,
        page_size=sizes.page_size,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        token_buckets=sizes.token_buckets,
        long_prefill_token_threshold=config.scheduler.long_prefill_token_threshold,
        max_waiting=config.scheduler.max_waiting,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        num_host_pages=plan.num_host_pages,
        preemption_mode=_preemption_mode(config, plan),
        prefers_swap=runner.preemption.prefers_swap,
        sliding_window=_sliding_window(model.config),
        cache_by_prompt_length=_keys_depend_on_prompt_length(model.config),
    )
    engine = Engine(scheduler, runner, async_depth=config.scheduler.async_depth)
    eos = _eos_token_ids(config, directory, tokenizer)
    defaults = _generation_defaults(config, directory, progress)
    info = EngineInfo(
        model_name=Path(config.model).name if Path(config.model).is_dir() else config.model,
        model_config=model.config,
        tokenizer=tokenizer,
        max_model_len=plan.max_model_len,
        max_request_tokens=scheduler.max_request_tokens,
        num_pages=plan.num_pages,
        page_size=sizes.page_size,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_waiting=config.scheduler.max_waiting,
        token_buckets=sizes.token_buckets,
        eos_token_ids=eos,
        default_sampling=defaults,
        max_logprobs=config.max_logprobs,
        seed=config.seed,
        platform=device.platform,
        device_kind=device.device_kind,
        attention_backend=sizes.backend,
        dtype=model.config.dtype,
        kv_dtype=_kv_dtype(config, model),
        weight_bytes=sum(array.nbytes for array in params.values()),
        pool_bytes=plan.num_bytes,
        num_host_pages=plan.num_host_pages,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        preemption_mode=_preemption_mode(config, plan),
        load_s=time.monotonic() - started,
    )

    def close() -> None:
        runner.close()
        if cache is not None:
            cache.seal()  # what was compiled while serving

    return LoadedEngine(engine, info, close)


def _headline(device: jax.Device) -> str:
    stats = device.memory_stats() or {}
    memory = f" ({gib(stats['bytes_limit'])})" if "bytes_limit" in stats else ""
    kind = "cpu" if device.platform == "cpu" else f"{device.platform}:{device.device_kind}"
    python = f"python {platform.python_version()}"
    return f"jaxpaged {installed_version()} · jax {jax.__version__} · {kind} ×{jax.device_count()}{memory} · {python}"


def _load_weights(config: EngineConfig, directory: Path, progress: Progress) -> tuple[Model, Params]:
    started, began = time.monotonic(), False

    def advance(done: int, total: int) -> None:
        nonlocal began
        if not began:
            progress.begin("weights", total, "bytes")
            began = True
        progress.advance(done)

    model, params = load_model(
        directory,
        dtype=config.dtype,
        load_format=config.load_format,
        hf_overrides=config.hf_overrides,
        progress=advance,
        seed=config.seed,
    )
    if not began:
        progress.begin("weights", 1, "files")
    count, size = sum(array.size for array in params.values()), sum(array.nbytes for array in params.values())
    millions = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    made = " random" if config.load_format == "dummy" else ""
    progress.end(f"{model.config.architecture} {millions}{made} {model.config.dtype}  {gib(size)}  {time.monotonic() - started:.1f} s")
    return model, params


def _resolve(config: EngineConfig, device: jax.Device) -> _Resolved:
    asked = config.scheduler
    tokens = asked.max_num_batched_tokens or _DEFAULT_TOKENS.get(device.platform, 2048)
    seqs = asked.max_num_seqs or min(tokens, _DEFAULT_SEQS.get(device.platform, 256))
    if asked.max_num_batched_tokens is None:
        tokens = max(tokens, seqs)
    page_size = config.cache.page_size or _DEFAULT_PAGE_SIZE.get(device.platform, 16)
    backend = resolve_backend(config.attention_backend, device)
    return _Resolved(backend, page_size, seqs, tokens, token_buckets(tokens, seqs, asked.token_buckets))


def _plan_pool(config: EngineConfig, model: Model, params: Params, sizes: _Resolved, device: jax.Device) -> MemoryPlan:
    longest, scaling = model.config.context_length, model.config.rope_scaling
    max_model_len = config.max_model_len or longest
    if max_model_len > longest:
        positions = model.config.max_position_embeddings
        stretched = "" if longest == positions else f" (max_position_embeddings {positions}, stretched by {scaling.kind} RoPE scaling)"
        raise ConfigError(f"max_model_len {max_model_len} is more than the model's context of {longest} tokens{stretched}")
    size_of_page = page_bytes(model.config, sizes.page_size, _kv_dtype(config, model), implementation=sizes.backend)
    available, temp = available_host_bytes(), 0
    num_host_pages = plan_swap_space(config, device, available_bytes=available, page_bytes=size_of_page)
    if device.platform != "cpu" and config.cache.num_pages is None and config.cache.kv_cache_memory_bytes is None:
        probe = _make_runner(config, model, params, sizes, MemoryPlan(2, size_of_page, max_model_len, ""))
        temp = probe.temp_bytes(sizes.token_buckets[-1]) + (staging_bytes(size_of_page) if num_host_pages else 0)
        probe.close()
    budget = device_budget(config.cache, device, step_temp_bytes=temp)
    plan = plan_memory(
        config.cache,
        budget,
        page_size=sizes.page_size,
        page_bytes=size_of_page,
        max_model_len=max_model_len,
        max_num_seqs=sizes.max_num_seqs,
        may_shorten=config.max_model_len is None,
        keep_small=device.platform == "cpu" and config.cache.kv_cache_memory_bytes is None,
    )
    if available is not None and device.platform == "cpu":  # whose pool takes of the same memory
        plan_swap_space(config, device, available_bytes=available - plan.num_bytes, page_bytes=size_of_page)
    return dataclasses.replace(plan, num_host_pages=num_host_pages)


@contextlib.contextmanager
def _explaining_lack_of_memory(device: jax.Device) -> Iterator[None]:
    """Turns XLA's complaint into one that names what to do."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        stats = device.memory_stats() or {}
        held = f" ({gib(stats['bytes_in_use'])} of {gib(stats['bytes_limit'])} in use)" if "bytes_limit" in stats else ""
        raise ConfigError(
            f"out of device memory while making pages and programs{held}: lower --gpu-memory-utilization, --num-pages, "
            f"--max-num-batched-tokens or --max-num-seqs, and see that no other process holds the device"
        ) from error


def _make_runner(config: EngineConfig, model: Model, params: Params, sizes: _Resolved, plan: MemoryPlan) -> Runner:
    return Runner(
        model,
        params,
        num_pages=plan.num_pages,
        page_size=sizes.page_size,
        max_model_len=plan.max_model_len,
        max_num_seqs=sizes.max_num_seqs,
        token_buckets=sizes.token_buckets,
        kv_dtype=_kv_dtype(config, model),
        attention=sizes.backend,
        num_host_pages=plan.num_host_pages,
        top_logprobs=max(TOP_LOGPROBS, config.max_logprobs),
    )


def _preemption_mode(config: EngineConfig, plan: MemoryPlan) -> Literal["auto", "recompute", "swap"]:
    return config.scheduler.preemption_mode if plan.num_host_pages else "recompute"


def _sliding_window(config: ModelConfig) -> int | None:
    """Returns how far back the farthest-seeing layer looks; None if one sees everything."""
    windows = [window for window in config.window if window is not None]
    return max(windows) if windows and len(windows) == len(config.window) else None


def _keys_depend_on_prompt_length(config: ModelConfig) -> bool:
    """Whether the rotation of a token's key looks at the length of the whole prompt (``layers.rope``)."""
    return config.rope_scaling.kind in ("dynamic", "longrope")


def _kv_dtype(config: EngineConfig, model: Model) -> str:
    asked = config.kv_cache_dtype
    return model.config.dtype if asked == "auto" else _KV_DTYPES.get(asked, asked)


def _describe_pool(plan: MemoryPlan, page_size: int, dtype: str) -> str:
    per_token, tokens = plan.page_bytes // page_size, (plan.num_pages - 1) * page_size
    return (
        f"{'kv pages':9} {plan.num_pages:,} pages × {page_size} tokens × {per_token:,} B/token ({dtype}) = {gib(plan.num_bytes)} "
        f"({plan.why})\n"
        f"{'':9} = {tokens:,} tokens → {tokens / plan.max_model_len:.1f} full-length requests of {plan.max_model_len:,}"
    )


def _describe_sharing(config: EngineConfig, plan: MemoryPlan) -> str:
    swap = f"{plan.num_host_pages:,} pages = {gib(plan.num_host_pages * plan.page_bytes)}" if plan.num_host_pages else "none"
    prefix = "on" if config.cache.enable_prefix_caching else "off"
    return f"{'sharing':9} prefix cache {prefix} · swap space {swap} · preemption {_preemption_mode(config, plan)}"


def _warm_up(runner: Runner, cache: CompileCache | None, progress: Progress) -> None:
    started, began = time.monotonic(), False

    def made(done: int) -> str:
        hits = min(done, runner.cache_hits)
        return f"{hits} from the cache, {done - hits} compiled" if cache else f"{done} compiled"

    def advance(done: int, total: int) -> None:
        nonlocal began
        if not began:
            progress.begin("programs", total, "programs")
            began = True
        progress.advance(done, made(done))

    runner.warm_up(advance)
    buckets, where = runner.token_buckets, f"cache {cache.path}" if cache else "no cache"
    steps = f"steps of {', '.join(map(str, buckets))} tokens" if len(buckets) < 3 else f"steps of {buckets[0]}…{buckets[-1]} tokens"
    progress.end(f"{made(runner.num_programs)}  {time.monotonic() - started:.1f} s  {steps}  {where}")


def _eos_token_ids(config: EngineConfig, directory: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids that end a sequence: what the overrides say, else what all files of the model name together.

    Raises:
        ConfigError: The overrides give something else than ids.
    """
    named = [read_hf_config(directory, config.hf_overrides).get("eos_token_id")]
    asked = "eos_token_id" in (config.hf_overrides or {})
    if not asked:
        named = [_read_generation_config(directory).get("eos_token_id"), *named, tokenizer.eos_token_id]
    values = [value for entry in named for value in (entry if isinstance(entry, list) else [entry]) if value is not None]
    ids = [value for value in values if isinstance(value, int) and not isinstance(value, bool) and value >= 0]
    if asked and ids != values:
        raise ConfigError(f"hf_overrides: eos_token_id must be a token id, a list of them, or null; got {named[0]!r}")
    return tuple(dict.fromkeys(ids))


def _read_generation_config(directory: Path) -> Mapping[str, Any]:
    path = directory / _GENERATION_CONFIG
    return read_json(path) if path.is_file() else {}


def _generation_defaults(config: EngineConfig, directory: Path, progress: Progress) -> Mapping[str, Any]:
    """Returns the sampling values that requests need not give."""
    if config.generation_config == "vllm":
        return {}
    generation, defaults = _read_generation_config(directory), {}
    fields = {field.name: field for field in SAMPLING_FIELDS}
    for theirs, ours in _GENERATION_FIELDS.items():
        value = generation.get(theirs)
        try:
            fields[ours].check(value)
        except RequestError as error:
            progress.say(f"{_GENERATION_CONFIG}: ignored, {error}")
            continue
        if value is not None:
            defaults[ours] = value
    if defaults:
        progress.say(f"{'sampling':9} defaults from {_GENERATION_CONFIG}: {', '.join(f'{k} {v}' for k, v in defaults.items())}")
    return defaults
