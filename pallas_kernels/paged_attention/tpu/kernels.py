"""The two kernels: single-token rows with all heads of a row at once, and the other rows by blocks of query tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.tpu.pages import LANES, PageShape, PageStream, Span, divide, write_new_tokens

NO_KEY = -1e30
"""Maximum of no scores; finite, so that the difference of two is not NaN."""


@dataclasses.dataclass(frozen=True)
class CallOptions:
    """Static facts about a call.

    Attributes:
        pages: Facts about the pool.
        group: Query heads of a key/value head; in ``attend_single_tokens`` padded to whole sublanes.
        exact: Whether to multiply in float32 instead of bfloat16.
        sliding_window: As in the call.
        soft_cap: As in the call.
        sinks: Whether there are sinks.
        return_lse: As in the call.
        write: Whether to write new tokens first.
    """

    pages: PageShape
    group: int
    exact: bool
    sliding_window: int | None
    soft_cap: float | None
    sinks: bool
    return_lse: bool
    write: bool

    @property
    def operand(self) -> Any:
        """The dtype of the products' sides."""
        return jnp.float32 if self.exact else jnp.bfloat16

    def product(self, left: jax.Array, right: jax.Array, right_axis: int) -> jax.Array:
        """Returns the product over ``left``'s last axis and an axis of ``right``, accumulated in float32."""
        return lax.dot_general(
            left.astype(self.operand), right, (((1,), (right_axis,)), ((), ())),
            precision=lax.Precision.HIGHEST if self.exact else lax.Precision.DEFAULT, preferred_element_type=jnp.float32,
        )  # fmt: skip

    def capped(self, scores: jax.Array) -> jax.Array:
        """Returns the scores with the soft cap on, if there is one."""
        return scores if self.soft_cap is None else self.soft_cap * jnp.tanh(scores * (1 / self.soft_cap))


class _Names:
    """A kernel's references by name, in the order in which Pallas passes them."""

    def __init__(self, names: list[str], references: tuple[Any, ...]) -> None:
        assert len(names) == len(references), (names, len(references))
        self._by_name = dict(zip(names, references, strict=True))

    def __getattr__(self, name: str) -> Any:
        return self._by_name[name]

    def some(self, *names: str) -> tuple[Any, ...]:
        """Returns those of the references that this call has."""
        return tuple(self._by_name[name] for name in names if name in self._by_name)


def _stream(refs: _Names, options: CallOptions) -> PageStream:
    pool = refs.written_pool if options.write else refs.pool
    return PageStream(
        options.pages, refs.tables, pool, refs.some("k_scales", "v_scales"), refs.buffer, refs.some("k_buffer", "v_buffer"), refs.arrived
    )


def _walk(
    stream: PageStream, span_of: Callable[[Any], Span], first: Any, end: Any, total: Any, slot_ref: Any, visit: Callable[..., None]
) -> None:
    """Calls ``visit(span, block, slot)`` for each KV block of the spans ``first:end``, fetching one block ahead up to span ``total``."""

    @pl.when((pl.program_id(0) == 0) & (total > 0))
    def _() -> None:
        slot_ref[0] = 0
        span = span_of(0)
        stream.start(span, stream.first_block(span), 0)

    def visit_span(index: Any, slot: Any) -> Any:
        span = span_of(index)
        following = span_of(jnp.minimum(index + 1, total - 1))
        end_block = stream.end_block(span)

        def visit_block(block: Any, slot: Any) -> Any:
            is_last = block + 1 == end_block

            @pl.when(jnp.logical_not(is_last))
            def _() -> None:
                stream.start(span, block + 1, 1 - slot)

            @pl.when(is_last & (index + 1 < total))
            def _() -> None:
                stream.start(following, stream.first_block(following), 1 - slot)

            stream.finish(span, block, slot)
            visit(span, block, slot)
            return 1 - slot

        return lax.fori_loop(stream.first_block(span), end_block, visit_block, slot)

    @pl.when(first < end)
    def _() -> None:
        slot_ref[0] = lax.fori_loop(first, end, visit_span, slot_ref[0])


def _finished(top: jax.Array, total: jax.Array, acc: jax.Array, sinks: jax.Array | None, v_scale: Any) -> tuple[jax.Array, jax.Array]:
    """Returns outputs and log-sums; 0 and -inf where nothing was summed. ``top``, ``total`` and ``sinks`` repeat along the lanes."""
    some = total != 0  # NaN stays NaN
    if sinks is not None:
        new_top = jnp.maximum(top, sinks)
        decay = jnp.exp(top - new_top)
        total = total * decay + jnp.exp(sinks - new_top)
        top, acc = new_top, acc * decay[:, :1]
    total = jnp.where(some, total, 1.0)
    out = jnp.where(some[:, :1], acc * (v_scale / total[:, :1]), 0.0)
    return out, jnp.where(some, top + jnp.log(total), -jnp.inf)


def _single_tokens_kernel(*references: Any, names: list[str], options: CallOptions) -> None:
    refs = _Names(names, references)
    pages, group = options.pages, options.group
    stream = _stream(refs, options)
    rows_per_step = refs.q.shape[0]
    total = refs.num_rows[0]
    step = pl.program_id(0)

    if options.write:

        @pl.when(step == 0)
        def _() -> None:
            write_new_tokens(refs.kv, refs.written_pool, refs.page_ids, refs.offsets, refs.runs, refs.written, pages.num_pages)

    def span_of(row: Any) -> Span:
        length = jnp.minimum(refs.kv_lens[row], pages.table_width * pages.page_size)
        low = jnp.int32(0) if options.sliding_window is None else jnp.maximum(length - options.sliding_window, 0)
        return Span(row, row, low, length)

    refs.out[...] = jnp.zeros(refs.out.shape, refs.out.dtype)
    if options.return_lse:
        refs.lse[...] = jnp.full(refs.lse.shape, -jnp.inf, jnp.float32)

    def visit(span: Span, block: Any, slot: Any) -> None:
        place = span.row - step * rows_per_step

        @pl.when(block == stream.first_block(span))
        def _() -> None:
            refs.top[...] = jnp.full(refs.top.shape, NO_KEY, jnp.float32)
            refs.total[...] = jnp.zeros(refs.total.shape, jnp.float32)
            refs.acc[...] = jnp.zeros(refs.acc.shape, jnp.float32)

        queries = refs.q[place].astype(jnp.float32)
        scores = []
        for head in range(pages.num_kv_heads):
            score = options.product(queries[head * group : (head + 1) * group], stream.load(slot, head, 0, options.operand), 1)
            scale = stream.load_scales(slot, head, 0)
            scores.append(score if scale is None else score * scale)
        scores = options.capped(jnp.concatenate(scores) * refs.factors[0])
        where = block * pages.block + lax.broadcasted_iota(jnp.int32, (1, pages.block), 1)
        seen = (where >= span.low) & (where < span.high)
        scores = jnp.where(seen, scores, NO_KEY)
        old_top = refs.top[...]
        top = jnp.maximum(old_top, scores.max(1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - top[:, :1]), 0.0)
        decay = jnp.exp(old_top - top)
        refs.top[...] = top
        refs.total[...] = refs.total[...] * decay + weights.sum(1, keepdims=True)
        values = []
        for head in range(pages.num_kv_heads):
            weight = weights[head * group : (head + 1) * group]
            scale = stream.load_scales(slot, head, 1)
            weight = weight if scale is None else jnp.where(seen, weight * scale, 0.0)
            values.append(options.product(weight, stream.load(slot, head, 1, options.operand), 0))
        refs.acc[...] = refs.acc[...] * decay[:, :1] + jnp.concatenate(values)

        @pl.when(block + 1 == stream.end_block(span))
        def _() -> None:
            sinks = refs.sinks[...] if options.sinks else None
            out, lse = _finished(refs.top[...], refs.total[...], refs.acc[...], sinks, refs.factors[1])
            refs.out[place] = out.astype(refs.out.dtype)
            if options.return_lse:
                refs.lse[place] = lse

    first = jnp.minimum(step * rows_per_step, total)
    end = jnp.minimum(first + rows_per_step, total)
    _walk(stream, span_of, first, end, total, refs.slot, visit)


def _blocks_kernel(*references: Any, names: list[str], options: CallOptions, query_block: int, query_part: int) -> None:
    refs = _Names(names, references)
    pages, group = options.pages, options.group
    stream = _stream(refs, options)
    step = pl.program_id(0)
    part = query_part * group
    capacity = pages.table_width * pages.page_size

    def tokens_of(pair: Any) -> tuple[Any, Any, Any]:
        """Returns the first token of a pair, the one after its last, and what to add to a token to get its position."""
        row, first_token = refs.pair_row[pair], refs.pair_block[pair] * query_block
        first = jnp.maximum(refs.cu_q_lens[row], first_token)
        end = jnp.minimum(refs.cu_q_lens[row + 1], first_token + query_block)
        return first, end, refs.kv_lens[row] - refs.cu_q_lens[row + 1]

    def span_of(pair: Any) -> Span:
        first, end, shift = tokens_of(pair)
        high = jnp.clip(end + shift, 0, capacity)
        low = jnp.int32(0) if options.sliding_window is None else jnp.clip(first + shift - options.sliding_window + 1, 0, high)
        return Span(pair, refs.pair_row[pair], low, high)

    refs.top[...] = jnp.full(refs.top.shape, NO_KEY, jnp.float32)
    refs.total[...] = jnp.zeros(refs.total.shape, jnp.float32)
    refs.acc[...] = jnp.zeros(refs.acc.shape, jnp.float32)

    def visit(span: Span, block: Any, slot: Any) -> None:
        first, end, shift = tokens_of(span.index)
        start = block * pages.block
        # Of the pair's tokens, those that see something of the block.
        first_seeing = jnp.maximum(first, start - shift)
        end_seeing = end
        if options.sliding_window is not None:
            end_seeing = jnp.minimum(end, start + pages.block + options.sliding_window - 1 - shift)
        first_part = divide(jnp.maximum(first_seeing - step * query_block, 0), query_part)
        end_part = divide(jnp.maximum(end_seeing - step * query_block + query_part - 1, 0), query_part)
        where = start + lax.broadcasted_iota(jnp.int32, (1, pages.block), 1)

        for head in range(pages.num_kv_heads):
            keys, values = (stream.load(slot, head, which, options.operand) for which in (0, 1))
            scales = [stream.load_scales(slot, head, which) for which in (0, 1)]

            def visit_part(index: Any, carry: Any, head: int = head, keys: Any = keys, values: Any = values, scales: Any = scales) -> Any:
                rows = pl.ds(pl.multiple_of(index * part, part), part)
                token = step * query_block + index * query_part + divide(lax.broadcasted_iota(jnp.int32, (part, 1), 0), group)
                mine = (token >= first) & (token < end)
                position = jnp.where(mine, token + shift, -1)
                seen = where <= position
                if options.sliding_window is not None:
                    seen &= where > position - options.sliding_window
                scores = options.product(refs.q[head, rows, :], keys, 1)
                scores = scores if scales[0] is None else scores * scales[0]
                scores = jnp.where(seen, options.capped(scores * refs.factors[0]), NO_KEY)
                old_top = refs.top[head, rows, :]
                top = jnp.maximum(old_top, scores.max(1, keepdims=True))
                weights = jnp.where(seen, jnp.exp(scores - top[:, :1]), 0.0)
                decay = jnp.exp(old_top - top)
                refs.top[head, rows, :] = top
                refs.total[head, rows, :] = refs.total[head, rows, :] * decay + weights.sum(1, keepdims=True)
                weights = weights if scales[1] is None else jnp.where(seen, weights * scales[1], 0.0)
                acc = refs.acc[head, rows, :]
                # Without the choice, a NaN in another row's values would reach this one as 0 * NaN.
                refs.acc[head, rows, :] = jnp.where(mine, acc * decay[:, :1] + options.product(weights, values, 0), acc)
                return carry

            lax.fori_loop(first_part, end_part, visit_part, 0)

    _walk(stream, span_of, refs.pair_start[step], refs.pair_start[step + 1], refs.pair_start[pl.num_programs(0)], refs.slot, visit)

    for head in range(pages.num_kv_heads):

        def finish(index: Any, carry: Any, head: int = head) -> Any:
            rows = pl.ds(pl.multiple_of(index * part, part), part)
            sinks = refs.sinks[head] if options.sinks else None
            state = (ref[head, rows, :] for ref in (refs.top, refs.total, refs.acc))
            out, lse = _finished(*state, sinks, refs.factors[1])
            refs.out[head, rows, :] = out.astype(refs.out.dtype)
            if options.return_lse:
                refs.lse[head, rows, :] = lse
            return carry

        lax.fori_loop(0, query_block // query_part, finish, 0)


def attend_single_tokens(
    inputs: dict[str, jax.Array], *, options: CallOptions, rows_per_step: int, interpret: Any, compiler_params: Any
) -> dict[str, jax.Array]:
    """Attends single-token rows, and writes new tokens first if the options say so.

    Args:
        inputs: By name: ``kv_lens [S]``, ``tables [S * P]``, ``num_rows [1]``, ``factors [2]``, ``q [rows, K * group, D]`` with rows
            a multiple of ``rows_per_step``, ``pool``, and where the options ask for it ``sinks [K * group, 128]``, ``k_scales``,
            ``v_scales``, ``kv``, ``page_ids``, ``offsets``, ``runs``.
        options: Static facts.
        rows_per_step: Rows of one grid step.
        interpret: As in ``pl.pallas_call``.
        compiler_params: As in ``pl.pallas_call``.

    Returns:
        ``out`` as ``q`` (zeros from row ``num_rows`` on), and where asked for ``lse [rows, K * group, 128]`` and ``written_pool``.
    """
    rows, heads, head_dim = inputs["q"].shape
    by_step = functools.partial(_spec, lambda step: (step, 0, 0))
    outputs = {"out": (inputs["q"], by_step((rows_per_step, heads, head_dim)))}
    if options.return_lse:
        outputs["lse"] = (jax.ShapeDtypeStruct((rows, heads, LANES), jnp.float32), by_step((rows_per_step, heads, LANES)))
    if options.write:
        outputs["written_pool"] = (inputs["pool"], _ANYWHERE)
    scratch = {
        "top": pltpu.VMEM((heads, LANES), jnp.float32),
        "total": pltpu.VMEM((heads, LANES), jnp.float32),
        "acc": pltpu.VMEM((heads, head_dim), jnp.float32),
    }
    if options.write:
        scratch["written"] = pltpu.SemaphoreType.DMA(())
    scalars = ["kv_lens", "tables", "num_rows", "factors", *(["page_ids", "offsets", "runs"] if options.write else [])]
    blocks = {"q": by_step((rows_per_step, heads, head_dim))}
    if options.sinks:
        blocks["sinks"] = _spec(lambda step: (0, 0), (heads, LANES))
    return _call(
        _single_tokens_kernel, inputs, options, scalars, blocks, outputs, scratch,
        grid=rows // rows_per_step, interpret=interpret, compiler_params=compiler_params,
    )  # fmt: skip


def attend_blocks(
    inputs: dict[str, jax.Array], *, options: CallOptions, query_block: int, query_part: int, interpret: Any, compiler_params: Any
) -> dict[str, jax.Array]:
    """Attends rows of any number of tokens, ``query_block`` tokens of the flat array at a time.

    Args:
        inputs: By name: ``kv_lens [S]``, ``tables [S * P]``, ``cu_q_lens [S + 1]``, ``pair_row``, ``pair_block``, ``pair_start``
            (``list_pairs``), ``factors [2]``, ``q [K, tokens * group, D]`` with tokens a multiple of ``query_block``, ``pool``, and
            where the options ask for it ``sinks [K, query_part * group, 128]``, ``k_scales``, ``v_scales``.
        options: Static facts.
        query_block: Query tokens of one grid step.
        query_part: Query tokens of one product; divides ``query_block``.
        interpret: As in ``pl.pallas_call``.
        compiler_params: As in ``pl.pallas_call``.

    Returns:
        ``out`` as ``q`` (zeros for tokens of no pair), and where asked for ``lse [K, tokens * group, 128]``.
    """
    num_kv_heads, rows, head_dim = inputs["q"].shape
    block = query_block * options.group
    by_step = functools.partial(_spec, lambda step: (0, step, 0))
    outputs = {"out": (inputs["q"], by_step((num_kv_heads, block, head_dim)))}
    if options.return_lse:
        outputs["lse"] = (jax.ShapeDtypeStruct((num_kv_heads, rows, LANES), jnp.float32), by_step((num_kv_heads, block, LANES)))
    scratch = {
        "top": pltpu.VMEM((num_kv_heads, block, LANES), jnp.float32),
        "total": pltpu.VMEM((num_kv_heads, block, LANES), jnp.float32),
        "acc": pltpu.VMEM((num_kv_heads, block, head_dim), jnp.float32),
    }
    blocks = {"q": by_step((num_kv_heads, block, head_dim))}
    if options.sinks:
        blocks["sinks"] = _spec(lambda step: (0, 0, 0), (num_kv_heads, query_part * options.group, LANES))
    kernel = functools.partial(_blocks_kernel, query_block=query_block, query_part=query_part)
    scalars = ["kv_lens", "tables", "cu_q_lens", "pair_row", "pair_block", "pair_start", "factors"]
    return _call(
        kernel, inputs, options, scalars, blocks, outputs, scratch,
        grid=rows // block, interpret=interpret, compiler_params=compiler_params,
    )  # fmt: skip


_ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)


def _spec(index: Callable[[Any], tuple[Any, ...]], shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda step, *_: index(step))


def _call(
    kernel: Callable[..., None],
    inputs: dict[str, jax.Array],
    options: CallOptions,
    scalars: list[str],
    blocks: dict[str, pl.BlockSpec],
    outputs: dict[str, tuple[Any, pl.BlockSpec]],
    scratch: dict[str, Any],
    *,
    grid: int,
    interpret: Any,
    compiler_params: Any,
) -> dict[str, jax.Array]:
    """Calls a kernel with references by name: scalars in SMEM, blocked inputs, inputs left in HBM, outputs, scratch."""
    in_place = [name for name in inputs if name not in scalars and name not in blocks]
    page_names = ["buffer", *(["k_buffer", "v_buffer"] if options.pages.scaled else []), "arrived"]
    names = [*scalars, *blocks, *in_place, *outputs, *page_names, *scratch, "slot"]
    order = [*scalars, *blocks, *in_place]
    aliases = {order.index("pool"): list(outputs).index("written_pool")} if options.write else {}

    def call(*arrays: jax.Array, views: bool) -> list[jax.Array]:
        pages = dataclasses.replace(options.pages, views=views)
        return pl.pallas_call(
            functools.partial(kernel, names=names, options=dataclasses.replace(options, pages=pages)),
            out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like, _ in outputs.values()],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(grid,),
                in_specs=[*blocks.values(), *[_ANYWHERE] * len(in_place)],
                out_specs=[spec for _, spec in outputs.values()],
                scratch_shapes=[*pages.scratch(), *scratch.values(), pltpu.SMEM((1,), jnp.int32)],
            ),
            input_output_aliases=aliases,
            interpret=interpret,
            compiler_params=compiler_params,
        )(*arrays)

    with_views, without = functools.partial(call, views=True), functools.partial(call, views=False)
    arrays = [inputs[name] for name in order]
    if interpret is False:  # elsewhere than on a TPU, a context manager of jax has chosen the interpreter that looks for races
        results = lax.platform_dependent(*arrays, tpu=with_views, default=without)
    else:
        results = (with_views if interpret is True else without)(*arrays)
    return dict(zip(outputs, results, strict=True))
