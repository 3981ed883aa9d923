"""What is compiled: one row per program, shape and target. Plain data; nothing here loads jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from compile_targets.targets import TARGETS, Target
from jaxpaged.scheduling.buckets import token_buckets

MIB = 2**20
GIB = 2**30

KERNEL_POOL_BYTES = 2 * GIB
"""Pages of one layer in the kernels' rows; far beyond any bound on scratch memory, so that a copy of them shows."""

MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 256, 2048
"""The engine's defaults on GPU and TPU (a test compares them)."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """The attention of a model in production.

    Attributes:
        name: Of the model, with its tensor parallelism where that changes the shape.
        num_q_heads, num_kv_heads, head_dim: H, K, D of one device.
        sliding_window, soft_cap, sinks: What else its layers do.
    """

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False


LLAMA3_8B = Attention("Llama-3-8B", 32, 8, 128)
GEMMA2_9B = Attention("Gemma-2-9B", 16, 8, 256, sliding_window=4096, soft_cap=50.0)
SINKS = Attention("sinks, D=64", 64, 8, 64, sliding_window=128, sinks=True)
MODELS = (
    LLAMA3_8B,
    Attention("Llama-3-70B, TP 8", 8, 1, 128),
    Attention("Qwen3-0.6B", 16, 8, 128),
    Attention("Qwen3-32B", 64, 8, 128),
    GEMMA2_9B,
    SINKS,
    Attention("Gemma-7B, D=256", 16, 16, 256),
)
_XLA_MODELS = (LLAMA3_8B, GEMMA2_9B, SINKS)
"""For the XLA path, which has no tiles that could overflow at one shape and not at another; a mixed call holds all of its code."""


@dataclasses.dataclass(frozen=True)
class Call:
    """The sizes of one call.

    Attributes:
        name: For people.
        num_tokens, num_rows: T and S.
        context: Longest context that the block tables can name, in tokens.
    """

    name: str
    num_tokens: int
    num_rows: int
    context: int


DECODE = Call("decode 32 x 4k", 32, 32, 4096)
MIXED = Call("mixed 2,048 tokens, 256 x 16k", 2048, 256, 16384)
OTHER_CALLS = (Call("decode 1 x 16k", 1, 1, 16384), Call("decode 8 x 512", 8, 8, 512), Call("prefill 8k", 8192, 1, 8192))


@dataclasses.dataclass(frozen=True)
class StepModel:
    """A model whose whole engine step is compiled.

    Attributes:
        name: For people.
        architecture: Hugging Face class name.
        layers_that_fit: Per target, the layers of a shorter model, where the weights of the whole one are larger than the chip.
    """

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    layers_that_fit: tuple[tuple[str, int], ...] = ()

    def layers_on(self, target: Target) -> int:
        """Returns how many layers are compiled for a target."""
        return dict(self.layers_that_fit).get(target.name, self.num_layers)


STEP_MODELS = (
    StepModel("Llama-3-8B", "LlamaForCausalLM", 128256, 4096, 14336, 32, 32, 8, 128, 8192, 500000.0, layers_that_fit=(("v5e", 20),)),
    StepModel("Qwen3-0.6B", "Qwen3ForCausalLM", 151936, 1024, 3072, 28, 16, 8, 128, 40960, 1000000.0, True, True),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        target: Name of a chip.
        program: ``sample``, ``attention``, ``update``, ``write_kv_pages``, ``copy_pages``, ``take_pages``, ``put_pages``,
            ``merge_attention_states`` or ``step``.
        implementation: Of the program; of paged attention, for a step.
        model: Name of the model whose shape it is.
        call: Name of the call's sizes; of a step, its token bucket.
        kv_dtype: Of the pages.
    """

    target: str
    program: str
    implementation: str
    model: str
    call: str
    kv_dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.target} {self.program} {self.implementation} / {self.model} / {self.call} / {self.kv_dtype}"

    @property
    def attention(self) -> Attention:
        """The model's attention."""
        return next(model for model in MODELS if model.name == self.model)

    @property
    def sizes(self) -> Call:
        """The call's sizes."""
        return next(call for call in (DECODE, MIXED, *OTHER_CALLS) if call.name == self.call)

    @property
    def step_model(self) -> StepModel:
        """The step's model."""
        return next(model for model in STEP_MODELS if model.name == self.model)

    @property
    def step_tokens(self) -> int:
        """The step's token bucket; the rows that are sampled."""
        return int(self.call)


def _attention_rows(target: Target) -> Iterator[Row]:
    for implementation in target.implementations:
        for model in _XLA_MODELS if implementation == "xla" else MODELS:
            for call in (MIXED,) if implementation == "xla" else (DECODE, MIXED):
                yield Row(target.name, "attention", implementation, model.name, call.name)
        if implementation != "xla":
            for call in OTHER_CALLS:
                yield Row(target.name, "attention", implementation, LLAMA3_8B.name, call.name)
        for kv_dtype in ("float8_e4m3fn", "int8"):
            for model in (LLAMA3_8B,) if implementation == "xla" else (LLAMA3_8B, SINKS):
                for call in (MIXED,) if implementation == "xla" else (DECODE, MIXED):
                    yield Row(target.name, "attention", implementation, model.name, call.name, kv_dtype)


def _other_rows(target: Target) -> Iterator[Row]:
    for model in (LLAMA3_8B, SINKS):
        for call in (DECODE, MIXED):
            yield Row(target.name, "update", target.kernel, model.name, call.name)
    yield Row(target.name, "update", target.kernel, LLAMA3_8B.name, MIXED.name, "int8")
    for kv_dtype in ("bfloat16", "float8_e4m3fn", "int8"):
        yield Row(target.name, "write_kv_pages", "xla", LLAMA3_8B.name, MIXED.name, kv_dtype)
    for program in ("copy_pages", "merge_attention_states"):
        yield Row(target.name, program, "xla", LLAMA3_8B.name, MIXED.name)
    for program in ("take_pages", "put_pages"):
        for kv_dtype in ("bfloat16", "int8"):
            yield Row(target.name, program, "xla", LLAMA3_8B.name, MIXED.name, kv_dtype)


def _step_rows(target: Target) -> Iterator[Row]:
    for model in STEP_MODELS:
        for bucket in token_buckets(MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS):
            yield Row(target.name, "step", target.kernel, model.name, str(bucket))


def _sample_rows(target: Target) -> Iterator[Row]:
    """What every step's program holds once, whatever its bucket: a look at what it adds to the time of each."""
    yield Row(target.name, "sample", "xla", STEP_MODELS[1].name, str(MAX_NUM_SEQS), "–")


def rows() -> tuple[Row, ...]:
    """Returns every row, target by target."""
    parts = (_attention_rows, _other_rows, _sample_rows, _step_rows)
    return tuple(row for target in TARGETS.values() for part in parts for row in part(target))
