"""From a row of the table to something that can be lowered: a jitted function and abstract arguments. No array is ever made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from compile_targets.table import GIB, KERNEL_POOL_BYTES, MAX_NUM_SEQS, MIB, Row
from compile_targets.targets import TARGETS, Target
from jaxpaged.attention import make_pool, page_bytes
from jaxpaged.beam_candidates import beam_candidates
from jaxpaged.config import ModelConfig
from jaxpaged.engine.host_pages import put_pages, take_pages
from jaxpaged.engine.runner import jit_flat_step
from jaxpaged.models.model import Model
from jaxpaged.sampling import sample, sampled_logprobs
from jaxpaged.scheduling.buckets import slot_bucket
from jaxpaged.state import KVPages, PagePool, StepInputs, init_sampling_state
from pallas_kernels.kv_write import write_kv_pages, write_quantized_kv_pages
from pallas_kernels.page_copy import copy_pages
from pallas_kernels.paged_attention import merge_attention_states, ragged_paged_attention, ragged_paged_attention_update, storage_head_dim

_CUSTOM_CALLS = {"mosaic_gpu": "mosaic_gpu", "triton": "xla.gpu.triton", "tpu": "tpu_custom_call"}
"""Part of the name of the call that an implementation's kernels become in the compiled program."""

_SPLIT_TOKENS = 512
"""For the bound on scratch memory alone: keys whose share of a decode's result a split-KV kernel may keep apart."""

_COPIED_PAGES = 64

_MOVED_PAGES, _MOVED_LAYERS = 4, 2
"""Pages that go to host memory or come back at once, as the engine cuts them at this shape; each layer adds the same operations."""

_STEP_RESERVE_BYTES = 2 * GIB
"""Left free beside weights and pages for a step's scratch memory, which may not be more."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What to compile, and what to hold it to.

    Attributes:
        jitted: The function.
        arguments: Abstract arrays, placed on the target.
        layer_elements: Numbers in one layer's pages: no operation may copy an array of this size.
        aliased_bytes: Bytes of the donated arrays that must be updated in place.
        temp_limit: Most bytes of scratch memory.
        custom_call: Part of the name of a call that the compiled program must hold, or None.
    """

    jitted: Any
    arguments: tuple[Any, ...]
    layer_elements: int
    aliased_bytes: int
    temp_limit: int
    custom_call: str | None


def num_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree, abstract or not."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def make_program(row: Row, device: Any) -> Program:
    """Returns the program of a row.

    Raises:
        Exception: The program refuses the row's shape, or is not there.
    """
    builders: dict[str, Callable[[Row, Target], Program]] = {
        "attention": _attention,
        "update": _update,
        "write_kv_pages": _write_kv_pages,
        "copy_pages": _copy_pages,
        "take_pages": _take_pages,
        "put_pages": _put_pages,
        "merge_attention_states": _merge_attention_states,
        "sample": _sample,
        "step": _step,
    }
    program = builders[row.program](row, TARGETS[row.target])
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), program.arguments)
    return dataclasses.replace(program, arguments=placed)


def _int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """Abstract arguments that the kernels' rows share."""

    q: jax.ShapeDtypeStruct
    kv: jax.ShapeDtypeStruct
    pages: jax.ShapeDtypeStruct
    tables: tuple[jax.ShapeDtypeStruct, ...]
    cells: tuple[jax.ShapeDtypeStruct, ...]
    traced: dict[str, jax.ShapeDtypeStruct]
    static: dict[str, Any]
    temp_limit: int

    @property
    def scales(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The scales of an int8 pool."""
        return {name: scale for name, scale in self.traced.items() if len(scale.shape) == 3}


def _shapes(row: Row, target: Target, page_size: int | None = None) -> _Shapes:
    model, call, page = row.attention, row.sizes, page_size or target.page_size
    kernel = row.implementation if row.program in ("attention", "update") else target.kernel
    head_dim = storage_head_dim(model.head_dim, target.kernel if kernel == "xla" else kernel)  # what xla serves is laid out for its chip
    kv_dtype = jnp.dtype(row.kv_dtype)
    page_bytes = page * 2 * model.num_kv_heads * head_dim * kv_dtype.itemsize
    pages = jax.ShapeDtypeStruct((KERNEL_POOL_BYTES // page_bytes, page, 2 * model.num_kv_heads, head_dim), kv_dtype)
    q = jax.ShapeDtypeStruct((call.num_tokens, model.num_q_heads, head_dim), jnp.bfloat16)
    traced = {}
    if model.sinks:
        traced["sinks"] = jax.ShapeDtypeStruct((model.num_q_heads,), jnp.float32)
    if kv_dtype == jnp.int8:
        scale = jax.ShapeDtypeStruct((pages.shape[0], model.num_kv_heads, page), jnp.float32)
        traced |= {"k_scale": scale, "v_scale": scale}
    elif kv_dtype.itemsize == 1:
        traced |= dict.fromkeys(("k_scale", "v_scale"), jax.ShapeDtypeStruct((), jnp.float32))
    static = {"sm_scale": model.head_dim**-0.5, "sliding_window": model.sliding_window, "soft_cap": model.soft_cap}
    # Queries and results in float32, the metadata, and what each split of a row's keys contributes, twice.
    splits = -(-call.context // _SPLIT_TOKENS)
    partials = call.num_rows * splits * model.num_q_heads * (head_dim + 2) * 4
    limit = KERNEL_POOL_BYTES // 2 if kernel == "xla" else 32 * MIB + 4 * math.prod(q.shape) * 4 + 2 * partials
    return _Shapes(
        q=q,
        kv=jax.ShapeDtypeStruct((call.num_tokens, 2 * model.num_kv_heads, head_dim), jnp.bfloat16),
        pages=pages,
        tables=(_int32(call.num_rows), _int32(call.num_rows, -(-call.context // page)), _int32(call.num_rows + 1), _int32(3)),
        cells=(_int32(call.num_tokens), _int32(call.num_tokens)),
        traced=traced,
        static={name: value for name, value in static.items() if value is not None},
        temp_limit=limit,
    )


def _attention(row: Row, target: Target) -> Program:
    shapes = _shapes(row, target)

    def attention(q: Any, pages: Any, tables: Any, traced: Any) -> Any:
        return ragged_paged_attention(q, pages, *tables, **traced, **shapes.static, implementation=row.implementation)

    arguments = (shapes.q, shapes.pages, shapes.tables, shapes.traced)
    call = _CUSTOM_CALLS.get(row.implementation)
    return Program(jax.jit(attention), arguments, math.prod(shapes.pages.shape), 0, shapes.temp_limit, call)


def _update(row: Row, target: Target) -> Program:
    shapes = _shapes(row, target)

    def update(donated: Any, q: Any, kv: Any, tables: Any, cells: Any, traced: Any) -> Any:
        pages, scales = donated
        options = {**traced, **scales, **shapes.static}
        return ragged_paged_attention_update(q, kv, pages, *tables, *cells, **options, implementation=row.implementation)

    donated = (shapes.pages, shapes.scales)
    traced = {name: leaf for name, leaf in shapes.traced.items() if name not in shapes.scales}
    arguments = (donated, shapes.q, shapes.kv, shapes.tables, shapes.cells, traced)
    call = _CUSTOM_CALLS.get(row.implementation)
    jitted = jax.jit(update, donate_argnums=0)
    return Program(jitted, arguments, math.prod(shapes.pages.shape), num_bytes(donated), shapes.temp_limit, call)


def _write_kv_pages(row: Row, target: Target) -> Program:
    shapes = _shapes(row, target)
    donated = (shapes.pages, *shapes.scales.values())
    jitted = jax.jit(write_quantized_kv_pages if shapes.scales else write_kv_pages, donate_argnums=range(len(donated)))
    arguments = (*donated, shapes.kv, *shapes.cells)
    return Program(jitted, arguments, math.prod(shapes.pages.shape), num_bytes(donated), 8 * num_bytes(shapes.kv) + MIB, None)


def _copy_pages(row: Row, target: Target) -> Program:
    shapes = _shapes(row, target)
    arguments = (shapes.pages, _int32(_COPIED_PAGES), _int32(_COPIED_PAGES))
    limit = 4 * _COPIED_PAGES * num_bytes(shapes.pages) // shapes.pages.shape[0]
    return Program(jax.jit(copy_pages, donate_argnums=0), arguments, math.prod(shapes.pages.shape), num_bytes(shapes.pages), limit, None)


def _moved(row: Row, target: Target) -> tuple[PagePool, tuple[jax.ShapeDtypeStruct, ...], int]:
    """Returns a pool, pages of all its layers as they travel, and the bound on scratch memory: a few times these."""
    shapes = _shapes(row, target)
    pool = PagePool((KVPages(shapes.pages, *shapes.scales.values()),) * _MOVED_LAYERS)
    arrays = (shapes.pages, *shapes.scales.values())
    parts = tuple(jax.ShapeDtypeStruct((_MOVED_PAGES, *array.shape[1:]), array.dtype) for array in arrays) * _MOVED_LAYERS
    return pool, parts, 4 * num_bytes(parts)


def _take_pages(row: Row, target: Target) -> Program:
    pool, _, limit = _moved(row, target)
    return Program(take_pages, (pool, _int32(_MOVED_PAGES)), math.prod(pool.layers[0].kv.shape), 0, limit, None)


def _put_pages(row: Row, target: Target) -> Program:
    pool, parts, limit = _moved(row, target)
    arguments = (pool, _int32(_MOVED_PAGES), parts)
    return Program(put_pages, arguments, math.prod(pool.layers[0].kv.shape), num_bytes(pool), limit, None)


def _merge_attention_states(row: Row, target: Target) -> Program:
    shapes = _shapes(row, target)
    lse = jax.ShapeDtypeStruct(shapes.q.shape[:2], jnp.float32)
    arguments = (shapes.q, lse, shapes.q, lse)
    return Program(jax.jit(merge_attention_states), arguments, math.prod(shapes.pages.shape), 0, 4 * math.prod(shapes.q.shape) * 4, None)


def _sample(row: Row, target: Target) -> Program:
    """Logits to tokens, log-probabilities and beams, without a model."""
    rows, vocab = row.step_tokens, row.step_model.vocab_size

    def sample_step(state: Any, logits: Any, inputs: Any) -> Any:
        tokens, state = sample(logits, inputs, state)
        logprobs = sampled_logprobs(logits, tokens, inputs)
        return state, tokens, logprobs, beam_candidates(logprobs.top_ids, logprobs.top_logprobs, inputs)

    state = jax.eval_shape(lambda: init_sampling_state(MAX_NUM_SEQS, vocab))
    inputs = StepInputs.zeros(rows, rows, 1, max_num_seqs=MAX_NUM_SEQS)
    arguments = (state, jax.ShapeDtypeStruct((rows, vocab), jnp.float32), inputs)
    no_pages = 2 * MAX_NUM_SEQS * vocab  # copies of logits are meant to be made
    return Program(jax.jit(sample_step, donate_argnums=0), arguments, no_pages, num_bytes(state), _STEP_RESERVE_BYTES, None)


def _step(row: Row, target: Target) -> Program:
    shape, tokens = row.step_model, row.step_tokens
    fields = {field.name: getattr(shape, field.name) for field in dataclasses.fields(ModelConfig) if hasattr(shape, field.name)}
    layers = shape.layers_on(target)
    fields |= {"num_layers": layers, "window": (None,) * layers, "dtype": "bfloat16"}
    model = Model.build(ModelConfig(**fields))
    params = {name: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for name, spec in model.specs.items()}
    leaves, structure = jax.tree.flatten(params)

    # As the engine plans it: a share of the device's memory, less the weights and the largest step's scratch memory.
    free = int(0.9 * target.memory_bytes) - num_bytes(params) - _STEP_RESERVE_BYTES
    num_pages = free // page_bytes(model.config, target.page_size, implementation=row.implementation)
    pool = jax.eval_shape(lambda: make_pool(model.config, num_pages, target.page_size, implementation=row.implementation))
    sampling = jax.eval_shape(lambda: init_sampling_state(MAX_NUM_SEQS, shape.vocab_size))
    rows, width = slot_bucket(tokens, MAX_NUM_SEQS), -(-shape.max_position_embeddings // target.page_size)
    inputs = StepInputs.zeros(tokens, rows, width, max_num_seqs=MAX_NUM_SEQS)
    return Program(
        jitted=jit_flat_step(model, structure, row.implementation),
        arguments=(tuple(leaves), pool, inputs, sampling),
        layer_elements=math.prod(jax.tree.leaves(pool)[0].shape),
        aliased_bytes=num_bytes((pool, sampling)),
        temp_limit=_STEP_RESERVE_BYTES,
        custom_call=_CUSTOM_CALLS.get(row.implementation),
    )
