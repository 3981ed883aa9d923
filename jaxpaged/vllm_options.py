"""vLLM's options that jaxpaged does not have, so that scripts, files and keyword arguments made for it can be used as they are.

One table says of each what happens here instead, and which of its values ask for just that: these are taken, with a note that they
have no effect; every other value is refused by name. Nothing that would change what happens is taken and ignored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Container, Mapping
from typing import Any

from jaxpaged.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class VllmOption:
    """One option of vLLM's.

    Attributes:
        why: What happens here.
        same: Values that ask for what happens anyway; None always does, since it stands for an option that was not given.
        aliases: vLLM's other spellings.
        becomes: The option of ours that says the same, and its value for each value of vLLM's. Where a command has no such option, the
            value counts as one of ``same``.
    """

    why: str
    same: tuple[Any, ...] = ()
    aliases: tuple[str, ...] = ()
    becomes: tuple[str, Mapping[Any, Any]] | None = None

    @property
    def is_switch(self) -> bool:
        """Whether its flag takes no value."""
        return any(isinstance(value, bool) for value in (*self.same, *(self.becomes[1] if self.becomes else ())))


_ONE_DEVICE = "this version runs on one device"
_NO_ADAPTERS = "adapters are not in this version"
_NO_DRAFTS = "speculative decoding is not in this version"
_NO_TOOLS = "calls of tools are not read out of answers in this version"
_NO_GRAMMAR = "output is not constrained by grammars in this version"
_ONE_PROCESS = "one process holds HTTP and engine"
_TEXT_ONLY = "models take text only"

VLLM_OPTIONS: Mapping[str, VllmOption] = {
    # Devices.
    "tensor_parallel_size": VllmOption(_ONE_DEVICE, (1,), ("tp",)),
    "pipeline_parallel_size": VllmOption(_ONE_DEVICE, (1,), ("pp",)),
    "data_parallel_size": VllmOption("start one server per device behind a router", (1,), ("dp",)),
    "decode_context_parallel_size": VllmOption(_ONE_DEVICE, (1,), ("dcp",)),
    "enable_expert_parallel": VllmOption(_ONE_DEVICE, (False,)),
    "distributed_executor_backend": VllmOption("one device, driven by the process itself", ("uni",)),
    "disable_custom_all_reduce": VllmOption("one device has nothing to reduce with others", (True, False)),
    "device": VllmOption("JAX picks the device; set JAX_PLATFORMS to choose another", ("auto",)),
    "nnodes": VllmOption(_ONE_DEVICE, (1,)),
    # Weights and tokenizer.
    "trust_remote_code": VllmOption(
        "code from a model directory is never executed; convert the model to a supported architecture", (False,)
    ),
    "quantization": VllmOption("this version computes in bfloat16, float16 or float32", ("none",), ("q",)),
    "tokenizer_mode": VllmOption("the fast tokenizer is always used", ("auto", "hf")),
    "skip_tokenizer_init": VllmOption("the tokenizer is always loaded", (False,)),
    "config_format": VllmOption("configurations are Hugging Face's", ("auto", "hf")),
    "model_impl": VllmOption("models are jaxpaged's own", ("auto",)),
    "runner": VllmOption("models generate text", ("auto", "generate")),
    "task": VllmOption("models generate text", ("auto", "generate")),
    "convert": VllmOption("models generate text", ("auto", "none")),
    "download_dir": VllmOption("set HF_HOME to choose where a hub's files are kept"),
    "hf_token": VllmOption("set HF_TOKEN"),
    "cpu_offload_gb": VllmOption("weights stay on the device", (0,)),
    "enable_lora": VllmOption(_NO_ADAPTERS, (False,)),
    "lora_modules": VllmOption(_NO_ADAPTERS),
    "limit_mm_per_prompt": VllmOption(_TEXT_ONLY, ({},)),
    "mm_processor_kwargs": VllmOption(_TEXT_ONLY, ({},)),
    # Steps.
    "enforce_eager": VllmOption(
        "no CUDA graphs are captured: XLA compiles every step; --no-warmup compiles it on first use", (True, False)
    ),
    "enable_chunked_prefill": VllmOption("chunked prefill is always on; --max-num-batched-tokens is the size of a step", (True,)),
    "scheduling_policy": VllmOption("requests run first come, first served", ("fcfs",)),
    "async_scheduling": VllmOption("--async-depth says how many steps overlap", becomes=("async_depth", {True: 1, False: 0})),
    "num_scheduler_steps": VllmOption("steps overlap with the host by default, see --async-depth", (1,)),
    "use_v2_block_manager": VllmOption("there is one allocator of pages", (True,)),
    "disable_sliding_window": VllmOption("a model's own window is always kept", (False,)),
    "calculate_kv_scales": VllmOption("int8 pages carry scales of their own, fp8 pages none", (False,)),
    "enable_sleep_mode": VllmOption("weights and pages stay on the device", (False,)),
    "compilation_config": VllmOption("XLA compiles; --token-buckets says for which sizes of step"),
    "speculative_config": VllmOption(_NO_DRAFTS),
    "speculative_model": VllmOption(_NO_DRAFTS),
    "kv_transfer_config": VllmOption("prefill and decode run in one process"),
    # Answers.
    "guided_decoding_backend": VllmOption(_NO_GRAMMAR, ("auto",)),
    "structured_outputs_config": VllmOption(_NO_GRAMMAR, ({},)),
    "enable_auto_tool_choice": VllmOption(_NO_TOOLS, (False,)),
    "tool_call_parser": VllmOption(_NO_TOOLS),
    "reasoning_parser": VllmOption("reasoning parsers are not in this version"),
    "enable_reasoning": VllmOption("reasoning parsers are not in this version", (False,)),
    "override_generation_config": VllmOption("send the values with each request, or write them into generation_config.json", ({},)),
    "response_role": VllmOption("answers have the role assistant", ("assistant",)),
    "chat_template_content_format": VllmOption("templates get text", ("auto", "string")),
    "return_tokens_as_token_ids": VllmOption("a field of the request", (False,)),
    "enable_prompt_tokens_details": VllmOption("cached tokens are always reported", (True,)),
    # The server.
    "disable_log_requests": VllmOption("the opposite of --log-requests", becomes=("log_requests", {True: False, False: True})),
    "disable_log_stats": VllmOption(
        "the opposite of --log-stats; counters are always kept", becomes=("log_stats", {True: False, False: True})
    ),
    "disable_uvicorn_access_log": VllmOption("there is no access log; see --log-requests", (True,)),
    "disable_fastapi_docs": VllmOption("there is no page of FastAPI's; /openapi.json describes the API", (True,)),
    "enable_request_id_headers": VllmOption("every answer carries x-request-id", (True,)),
    "enable_server_load_tracking": VllmOption("see /metrics", (False,)),
    "enable_tokenizer_info_endpoint": VllmOption("there is no such route", (False,)),
    "api_server_count": VllmOption(_ONE_PROCESS, (1,), ("asc",)),
    "disable_frontend_multiprocessing": VllmOption(_ONE_PROCESS, (True,)),
    "middleware": VllmOption("the server runs no code of others; put a proxy before it"),
}
"""vLLM's options that we know and do not have, by name, in the order of the documentation."""

VLLM_SPELLINGS: Mapping[str, str] = {spelling: name for name, opt in VLLM_OPTIONS.items() for spelling in (name, *opt.aliases)}
"""The name of each, by all of its spellings."""


def replace_vllm_options(values: Mapping[str, Any], known: Container[str], *, where: str = "") -> tuple[dict[str, Any], tuple[str, ...]]:
    """Takes vLLM's options out of a set of options, or puts ours in their place.

    Args:
        values: Options by name, ours and others.
        known: Names of ours that are meant here.
        where: Begins each complaint; a file's name, say.

    Returns:
        What is left, by our names, names that nobody knows included; and a line for each option that has no effect.

    Raises:
        ConfigError: A value asks for something that does not happen here, or contradicts one of ours.
    """
    ours: dict[str, Any] = {}
    notes: list[str] = []
    for given, value in values.items():
        name = VLLM_SPELLINGS.get(given)
        if name is None or given in known:
            ours[given] = value
    for given, value in values.items():
        name = VLLM_SPELLINGS.get(given)
        if name is None or given in known or value is None:
            continue
        opt = VLLM_OPTIONS[name]
        target, meanings = opt.becomes or ("", {})
        meant = {_spell(theirs): own for theirs, own in meanings.items()}.get(_spell(value))
        if target in known and meant is not None:
            if _spell(ours.setdefault(target, meant)) != _spell(meant):
                raise ConfigError(f"{where}{given} and {target} contradict each other")
        elif _spell(value) in (same := [_spell(item) for item in (*opt.same, *meanings)]):
            notes.append(f"{name} {_spell(value)}: accepted without effect, since it is what happens anyway ({opt.why})")
        else:
            fate = f"of which jaxpaged takes only {' or '.join(same)}" if same else "that jaxpaged does not have"
            raise ConfigError(f"{where}{given} is an option of vLLM's {fate}: {opt.why}; got {_spell(value)}")
    return ours, tuple(notes)


def _spell(value: object) -> str:
    """Writes a value in one way, whether it came as text, from YAML or from Python."""
    text = value.strip().lower() if isinstance(value, str) else json.dumps(value, default=str)
    try:
        return f"{float(text):g}"
    except ValueError:
        return text
