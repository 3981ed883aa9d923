"""The only holder of device memory: weights, page pool, sampling state and the compiled programs.

A program is named by its token bucket. All of them are compiled ahead of time and kept as executables, so that dispatching is a
dictionary look-up and a call; nothing can be traced or compiled by accident on the way.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxpaged.attention import make_pool
from jaxpaged.engine.batch import BatchBuilder, row_flags
from jaxpaged.engine.host_pages import HostPages
from jaxpaged.engine.preemption import PreemptionCost
from jaxpaged.models.model import Model, Params
from jaxpaged.sampling import set_slot, slot_rows
from jaxpaged.scheduling.buckets import slot_bucket
from jaxpaged.scheduling.plan import BeamCandidate, StepPlan, StepResult, TokenLogprobs, Work
from jaxpaged.state import TOP_LOGPROBS, PagePool, RowFlag, SamplingState, StepInputs, StepOutput, init_sampling_state
from jaxpaged.step import forward_step

logger = logging.getLogger(__name__)

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"
_MOST_COMPILE_THREADS = 4
"""With eight, on an H200 with 16 processors, XLA warned that its autotuning, which times kernels, was disturbed."""


def _compile_threads() -> int:
    """Returns how many programs to compile at once: XLA compiles outside Python's lock, so one is traced while others compile."""
    return min(_MOST_COMPILE_THREADS, max(2, (os.cpu_count() or 2) // 2))


@dataclasses.dataclass(frozen=True)
class InFlight:
    """A dispatched step.

    Attributes:
        plan: What was dispatched.
        output: Device arrays, perhaps not computed yet.
        inputs: The host arrays; the device may read them until the step is done.
        on_read: Called with the plan and the time of dispatch when the step is done.
    """

    plan: StepPlan
    output: StepOutput
    inputs: StepInputs
    on_read: Callable[[StepPlan, float], None] = lambda plan, dispatched_at: None
    dispatched_at: float = 0.0

    def read(self) -> StepResult:
        """Waits for the step and returns what it says; log-probabilities and beams are fetched only where a row asks for them.

        Raises:
            Exception: Whatever the step raised on the device.
        """
        count = len(self.plan.work)
        tokens = np.asarray(self.output.tokens)[:count].tolist()
        self.on_read(self.plan, self.dispatched_at)
        flags = np.asarray(self.inputs.flags[:count])
        beams, prompt_wanted = (flags & RowFlag.BEAM) != 0, (flags & RowFlag.PROMPT_LOGPROBS) != 0
        wanted = ((flags & RowFlag.LOGPROBS) != 0) & ~beams
        return StepResult(
            tokens,
            self._read_logprobs(tokens, wanted) if wanted.any() else (),
            self._read_prompt_logprobs(prompt_wanted) if prompt_wanted.any() else (),
            self._read_beams(beams) if beams.any() else {},
        )

    def _read_beams(self, beams: np.ndarray) -> dict[str, tuple[BeamCandidate, ...]]:
        out, index = self.output, self.inputs.beam_index
        parents, ids, scores = (np.asarray(array) for array in (out.beam_parents, out.beam_tokens, out.beam_scores))
        found = {}
        for row in np.flatnonzero(beams & (index[: len(beams)] == 0)).tolist():
            request = self.plan.work[row].sequence.request
            triples = zip(parents[row].tolist(), ids[row].tolist(), scores[row].tolist(), strict=True)
            found[request.id] = tuple(BeamCandidate(*triple) for triple in triples if triple[1] >= 0)
        return found

    def _read_logprobs(self, tokens: Sequence[int], wanted: np.ndarray) -> list[TokenLogprobs | None]:
        out = self.output
        arrays = [np.asarray(array) for array in (out.logprobs, out.ranks, out.top_ids, out.top_logprobs)]
        return [
            _token_logprobs(tokens[row], row, work.sequence.request.params.logprobs, *arrays) if wanted[row] and work.samples else None
            for row, work in enumerate(self.plan.work)
        ]

    def _read_prompt_logprobs(self, wanted: np.ndarray) -> list[tuple[TokenLogprobs, ...]]:
        out, targets, bounds = self.output, self.inputs.targets, self.inputs.cu_q_lens
        arrays = [np.asarray(a) for a in (out.prompt_logprobs, out.prompt_ranks, out.prompt_top_ids, out.prompt_top_logprobs)]
        return [
            tuple(
                _token_logprobs(int(targets[at]), at, work.sequence.request.params.prompt_logprobs, *arrays)
                for at in range(bounds[row], bounds[row + 1])
                if targets[at] >= 0
            )
            if wanted[row]
            else ()
            for row, work in enumerate(self.plan.work)
        ]


def _token_logprobs(token: int, at: int, width: int | None, logprobs: Any, ranks: Any, top_ids: Any, top_logprobs: Any) -> TokenLogprobs:
    top = zip(top_ids[at, : width or 0].tolist(), top_logprobs[at, : width or 0].tolist(), strict=True)
    return TokenLogprobs(token, float(logprobs[at]), int(ranks[at]), tuple((i, p) for i, p in top if i >= 0))


class Runner:
    """Runs plans on the device.

    Args:
        model: Static description.
        params: Its weights, on the device.
        num_pages: N, the null page included.
        page_size: B.
        max_model_len: Longest context; sets the block tables' width.
        max_num_seqs: M, slots.
        token_buckets: Every T that a plan may have.
        kv_dtype: Of keys and values in the pages; default the model's.
        attention: Attention backend.
        num_host_pages: Places for pages in host memory.
        top_logprobs: W, most likely tokens whose log-probabilities a step can tell, at least 20.

    Attributes:
        vocab_size: V; every id that a step samples is below it.
        preemption: What moving pages and computing tokens cost, as measured here.
        num_programs: Programs that ``warm_up`` compiles or finds in the compile cache; 0 before it.
        compilations_after_ready: Programs compiled inside ``dispatch`` since ``warm_up`` ended; 0 if the buckets are right.
        cache_hits: Programs that warm-up found in the compile cache.
        compile_s: Seconds spent on tracing and compiling programs, waiting included.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        num_pages: int,
        page_size: int,
        max_model_len: int,
        max_num_seqs: int,
        token_buckets: Sequence[int],
        kv_dtype: DTypeLike | None = None,
        attention: str = "auto",
        num_host_pages: int = 0,
        top_logprobs: int = TOP_LOGPROBS,
    ) -> None:
        self.model = model
        self.vocab_size = model.config.vocab_size
        self.num_pages = num_pages
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.table_width = -(-max_model_len // page_size)
        self.token_buckets = tuple(token_buckets)
        self.preemption = PreemptionCost()
        self.num_programs = 0
        self.compilations_after_ready = 0
        self.compile_s = 0.0
        self.cache_hits = 0
        self._kv_dtype = kv_dtype
        self._attention = attention
        leaves, structure = jax.tree.flatten(params)
        self._leaves = tuple(leaves)  # a tuple of arrays is the cheapest argument to dispatch
        self._step = jit_flat_step(model, structure, attention, top_logprobs)
        self._programs: dict[int, Any] = {}
        self._slot_writer: Any = None
        self._ready = False
        self._dispatching: tuple[int, int] | None = None
        self._unread: deque[int] = deque()  # token buckets of the steps that were dispatched and not read
        self._warming = False
        self._pool: PagePool | None = None
        self._sampling: SamplingState | None = None
        self._make_state()
        self._host = HostPages(self.pool, num_host_pages)
        self._read_at = 0.0
        self._stop_listening = _listen(self)

    @property
    def pool(self) -> PagePool:
        """The page pool."""
        if self._pool is None:
            raise RuntimeError("the pool was lost in a failed step; reset() makes a new one")
        return self._pool

    def dispatch(self, plan: StepPlan) -> InFlight:
        """Starts a step and returns without waiting for it: first the plan's transfers, in their order, then the step with its copies.

        Raises:
            Exception: Whatever XLA raises; the pool may be gone then, ``reset`` before the next dispatch.
        """
        self._dispatching = (plan.token_bucket, plan.slot_bucket)
        self._unread.append(plan.token_bucket)
        started = time.monotonic()
        try:
            inputs = self._batch.build(plan)
            self._host.settle()
            if plan.transfers:
                self._pool = self._host.run(self.pool, plan.transfers)
            for work in plan.work:
                if work.new_slot:
                    self._write_slot(work)
            output = self._run(inputs)
        finally:
            self._dispatching = None
        output.tokens.copy_to_host_async()
        if any(work.beam_score is not None for work in plan.work):
            for array in (output.beam_parents, output.beam_tokens, output.beam_scores):
                array.copy_to_host_async()
        return InFlight(plan, output, inputs, self._on_read, started)

    def reset(self) -> None:
        """Makes an empty pool and sampling state after a failed step, and runs one step of padding to see that the device works.

        That step is the largest one that was dispatched and not read, so that a program which fails does so again. Pages that were on
        their way to the host are lost, and their places hold anything.

        Raises:
            Exception: It does not.
        """
        self._pool = self._sampling = None
        self._host.forget()
        self._make_state()
        self._run(self._padding(max(self._unread, default=self.token_buckets[0]))).tokens.block_until_ready()
        self._unread.clear()

    def warm_up(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compiles every program or reads it from the compile cache, runs each once on padding, and counts compilations from then on.

        Args:
            progress: Called with programs done and their number, from this thread.
        """
        started = time.monotonic()
        self.num_programs = len(self.token_buckets) + 1 + self._host.num_programs
        progress(0, self.num_programs)
        self._warming = True
        with contextlib.closing(self._make_programs()) as programs:
            for done, _ in enumerate(programs, start=1):
                progress(done, self.num_programs)
        self._warming = False
        self.compile_s += time.monotonic() - started
        for bucket in (*self.token_buckets, self.token_buckets[-1]):  # the last one twice: the first run of a program is slow
            started = time.monotonic()
            self._run(self._padding(bucket)).tokens.block_until_ready()
        self.preemption.computed(self.token_buckets[-1], time.monotonic() - started)
        self._pool, num_pages, seconds = self._host.measure(self.pool)
        self.preemption.moved(num_pages, seconds)
        self.mark_ready()

    def _make_programs(self) -> Generator[None]:
        """Makes the programs that are not there yet; yields after each, in whatever order they come."""
        yield from (None for bucket in self.token_buckets if bucket in self._programs)
        with concurrent.futures.ThreadPoolExecutor(_compile_threads()) as threads:
            buckets = [bucket for bucket in reversed(self.token_buckets) if bucket not in self._programs]
            compiling = {threads.submit(self._compile, bucket): bucket for bucket in buckets}
            try:
                for future in concurrent.futures.as_completed(compiling):
                    self._programs[compiling[future]] = future.result()
                    yield
            except BaseException:
                threads.shutdown(wait=True, cancel_futures=True)
                raise
        self._set_slot(self.max_num_seqs, np.zeros(self.vocab_size, np.float32), np.zeros(self.vocab_size, np.int32))
        yield
        yield from self._host.compile(self.pool)

    def mark_ready(self) -> None:
        """Counts compilations from now on."""
        self._ready = True

    def temp_bytes(self, token_bucket: int) -> int:
        """Returns the scratch memory, in bytes, of one program beyond weights, pool and outputs; compiles it if need be."""
        if token_bucket not in self._programs:
            self._programs[token_bucket] = self._compile(token_bucket)
        return int(self._programs[token_bucket].memory_analysis().temp_size_in_bytes)

    def close(self) -> None:
        """Frees the device's memory; the runner is of no use afterwards."""
        self._stop_listening()
        self._pool = self._sampling = None
        self._leaves = ()
        self._programs.clear()
        self._slot_writer = None
        self._host.close()

    def _make_state(self) -> None:
        self._pool = make_pool(self.model.config, self.num_pages, self.page_size, self._kv_dtype, implementation=self._attention)
        self._sampling = init_sampling_state(self.max_num_seqs, self.model.config.vocab_size)
        self._batch = BatchBuilder(page_size=self.page_size, table_width=self.table_width, max_num_seqs=self.max_num_seqs)

    def _run(self, inputs: StepInputs) -> StepOutput:
        program = self._programs.get(inputs.num_tokens)
        if program is None:
            program = self._programs[inputs.num_tokens] = self._compile(inputs.num_tokens)
        output: StepOutput
        output, self._pool, self._sampling = program(self._leaves, self._pool, inputs, self._sampling)
        return output

    def _compile(self, token_bucket: int) -> Any:
        return self._step.lower(self._leaves, self._pool, self._padding(token_bucket), self._sampling).compile()

    def _padding(self, token_bucket: int) -> StepInputs:
        rows = slot_bucket(token_bucket, self.max_num_seqs)
        return StepInputs.zeros(token_bucket, rows, self.table_width, max_num_seqs=self.max_num_seqs)

    def _write_slot(self, work: Work) -> None:
        """Writes the rows of a slot whose new sequence has bias, penalties or stop ids to suppress; others never read theirs."""
        sequence, params = work.sequence, work.sequence.request.params
        rows = slot_rows(
            self.model.config.vocab_size,
            prompt=sequence.request.prompt,
            output=sequence.tokens[sequence.num_prompt :],
            stop_token_ids=sequence.request.stop_token_ids,
            logit_bias=params.logit_bias,
            allowed_token_ids=params.allowed_token_ids,
            bad_token_ids=params.bad_token_ids,
            penalties=bool(row_flags(params) & RowFlag.PENALTIES),
            min_tokens=params.min_tokens,
        )
        if rows is not None and sequence.slot is not None:
            self._set_slot(sequence.slot, *rows)

    def _set_slot(self, slot: int, bias: np.ndarray, flags: np.ndarray) -> None:
        arguments = (self._sampling, np.int32(slot), bias, flags)
        if self._slot_writer is None:
            self._slot_writer = set_slot.lower(*arguments).compile()
        self._sampling = self._slot_writer(*arguments)

    def _on_read(self, plan: StepPlan, dispatched_at: float) -> None:
        """Times steps that compute much: what a token costs there is what it costs to compute a preempted sequence again."""
        now = time.monotonic()
        if self._unread:
            self._unread.popleft()
        if not plan.transfers and 2 * plan.num_tokens >= self.token_buckets[-1] and plan.num_tokens > plan.num_decode:
            self.preemption.computed(plan.num_tokens, now - max(dispatched_at, self._read_at))
        self._read_at = now

    def on_event(self, event: str) -> None:
        """Hears of each of JAX's events; counts what warm-up found in the compile cache."""
        self.cache_hits += event == _CACHE_HIT_EVENT and self._warming

    def on_duration(self, event: str, duration_secs: float) -> None:
        """Hears how long each of JAX's events took, in seconds; counts compilations while serving, and warns of each."""
        if event == _COMPILE_EVENT and self._ready and self._dispatching:
            self.compilations_after_ready += 1
            self.compile_s += duration_secs
            message = "a program was compiled while serving, in %.1f s: token bucket %d, %d rows; compiled before: %s"
            logger.warning(message, duration_secs, *self._dispatching, sorted(self._programs))


def _listen(runner: Runner) -> Callable[[], object]:
    """Lets a runner hear JAX's events while it lives, and returns what ends that.

    JAX's list of listeners is the process's and holds what is in it. So it gets functions that only look at the runner: weights and
    pages go when nobody else holds them, closed or not.
    """
    found = weakref.ref(runner)

    def on_event(event: str, **_: object) -> None:
        if (listening := found()) is not None:
            listening.on_event(event)

    def on_duration(event: str, duration_secs: float, **_: object) -> None:
        if (listening := found()) is not None:
            listening.on_duration(event, duration_secs)

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    return weakref.finalize(runner, _forget_listeners, on_event, on_duration)


def _forget_listeners(on_event: Callable[..., None], on_duration: Callable[..., None]) -> None:
    with contextlib.suppress(ValueError, AssertionError):  # somebody cleared the list
        jax.monitoring.unregister_event_listener(on_event)
    with contextlib.suppress(ValueError, AssertionError):
        jax.monitoring.unregister_event_duration_listener(on_duration)


def jit_flat_step(model: Model, structure: Any, attention: str, top_logprobs: int = TOP_LOGPROBS) -> Any:
    """Returns the jitted step over a tuple of weights, pool and sampling state donated."""

    def step(
        leaves: tuple[jax.Array, ...], pool: PagePool, inputs: StepInputs, sampling: SamplingState
    ) -> tuple[StepOutput, PagePool, SamplingState | None]:
        params = jax.tree.unflatten(structure, leaves)
        return forward_step(model, params, pool, inputs, sampling, attention=attention, top_logprobs=top_logprobs)

    return jax.jit(step, donate_argnums=(1, 3))
