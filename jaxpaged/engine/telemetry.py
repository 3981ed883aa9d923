"""Counters and histograms of the engine, written by its thread alone; ``snapshot`` gives everything that /metrics shows.

Names and buckets are vLLM's, so that its dashboards work after a change of prefix. All times are seconds of the
monotonic clock, taken in the engine's thread.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from jaxpaged.scheduling.plan import StepPlan, TokenEvent
from jaxpaged.scheduling.request import Request

_LATENCY = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    2560.0,
)
_TOKEN_LATENCY = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST_LATENCY = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
    1920.0,
    7680.0,
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

_RECENT_STEPS = 256

HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From arrival to the first token.", _LATENCY),
    "inter_token_latency_seconds": ("Between two tokens of a sequence.", _TOKEN_LATENCY),
    "request_time_per_output_token_seconds": ("Mean time per token after the first, of each finished sequence.", _TOKEN_LATENCY),
    "e2e_request_latency_seconds": ("From arrival to the last token.", _REQUEST_LATENCY),
    "request_queue_time_seconds": ("From arrival to the first step.", _REQUEST_LATENCY),
    "request_prefill_time_seconds": ("From the first step to the first token.", _REQUEST_LATENCY),
    "request_decode_time_seconds": ("From the first token to the last.", _REQUEST_LATENCY),
    "request_inference_time_seconds": ("From the first step to the last token.", _REQUEST_LATENCY),
    "step_seconds": ("From the dispatch of a step to its result.", _LATENCY),
    "iteration_tokens_total": ("Tokens computed in a step.", _STEP_TOKENS),
    "request_prompt_tokens": ("Prompt tokens of each finished sequence.", _LENGTHS),
    "request_generation_tokens": ("Generated tokens of each finished sequence.", _LENGTHS),
    "request_max_num_generation_tokens": ("Generated tokens of the longest sequence of each finished request.", _LENGTHS),
    "request_params_n": ("Completions asked for per request.", (1, 2, 5, 10, 20)),
    "request_params_max_tokens": ("max_tokens of each request.", _LENGTHS),
}
"""Name (without prefix), meaning and upper bucket bounds of each histogram."""


@dataclasses.dataclass(frozen=True)
class HistogramSnapshot:
    """A histogram's state.

    Attributes:
        bounds: Upper, inclusive bounds of the buckets; one more bucket above the last is implied.
        counts: Observations per bucket, ``len(bounds) + 1`` of them, not cumulative.
        total: Sum of the observed values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class Histogram:
    """Counts values by bucket."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Adds one value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def snapshot(self) -> HistogramSnapshot:
        """Returns a frozen copy."""
        return HistogramSnapshot(self.bounds, tuple(self.counts), self.total)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A snapshot of all counters and gauges. Fields may differ by one step from each other, never more.

    Attributes:
        running, waiting: Sequences that hold pages, and those in the queue.
        pages_used, pages_free: Of ``num_pages`` less the null page.
        pages_cached: Of ``pages_free``, those that the prefix cache can still give to somebody.
        kv_cache_usage: ``pages_used`` as a share, 0 to 1.
        kv_waste: Share of the cells of held pages that held no token, averaged over all steps so far; 0 before the first.
        prompt_tokens, generation_tokens: Prompt tokens of admitted requests, once for all their sequences, and tokens sent out.
        preemptions: Sequences whose pages were taken back.
        prefix_cache_queries, prefix_cache_hits: Prompt tokens that were looked up in the prefix cache, and that were found.
        swaps: Requests whose pages went to host memory when they were taken back.
        page_copies: Pages that were copied because another sequence reads them too.
        steps: Steps whose results were read.
        step_tokens, padding_tokens: Tokens computed in them, and the padding up to their buckets.
        compilations_after_ready: Programs compiled while serving; anything but 0 is a fault of the buckets.
        compile_s: Seconds spent on compiling, start-up included.
        recoveries: Failed steps that the engine recovered from.
        refused: Requests refused for want of room: the queue was full, or too many large bodies were arriving.
        finished: Finished sequences by finish reason (``stop``, ``length``, ``abort``, ``error``).
        histograms: By name, see ``HISTOGRAMS``.
    """

    running: int = 0
    waiting: int = 0
    num_pages: int = 0
    page_size: int = 0
    pages_used: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    kv_cache_usage: float = 0.0
    kv_waste: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    swaps: int = 0
    page_copies: int = 0
    steps: int = 0
    step_tokens: int = 0
    padding_tokens: int = 0
    compilations_after_ready: int = 0
    compile_s: float = 0.0
    recoveries: int = 0
    refused: int = 0
    finished: Mapping[str, int] = dataclasses.field(default_factory=dict)
    histograms: Mapping[str, HistogramSnapshot] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Siblings:
    """The sequences of one request: how many have not finished, and the tokens of the longest that has."""

    num_open: int
    longest: int = 0


@dataclasses.dataclass
class _Times:
    """Moments in the life of one sequence, in seconds of the clock."""

    num_prompt: int
    arrival: float
    siblings: _Siblings
    first_step: float | None = None
    first_token: float | None = None
    last_token: float = 0.0
    num_tokens: int = 0


class Telemetry:
    """Observes what the engine does. Keeps one small record per live sequence and nothing per finished one.

    Args:
        page_size: B, token positions in a page.
        clock: Monotonic seconds.
    """

    def __init__(self, page_size: int, clock: Callable[[], float]) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.steps = 0
        self.step_tokens = 0
        self.padding_tokens = 0
        self.recoveries = 0
        self.refused = 0
        self.finished: Counter[str] = Counter()
        self._histograms = {name: Histogram(bounds) for name, (_, bounds) in HISTOGRAMS.items()}
        self._page_size = page_size
        self._clock = clock
        self._live: dict[tuple[str, int], _Times] = {}
        self._cells_held = 0
        self._cells_filled = 0
        self._recent = [0.0] * _RECENT_STEPS

    @property
    def num_live(self) -> int:
        """Sequences with a record; those that the scheduler has."""
        return len(self._live)

    @property
    def step_p99_s(self) -> float:
        """99th percentile of the durations of the last 256 steps, in seconds."""
        recent = sorted(self._recent[: self.steps])
        return recent[int(0.99 * (len(recent) - 1))] if recent else 0.0

    @property
    def kv_waste(self) -> float:
        """Share of the cells in held pages without a token, over all steps."""
        return 1.0 - self._cells_filled / self._cells_held if self._cells_held else 0.0

    def added(self, request: Request) -> None:
        """Notes a request that was taken in."""
        arrival = request.arrival_s or self._clock()
        siblings = _Siblings(request.params.num_sequences)
        for index in range(request.params.num_sequences):
            self._live[request.id, index] = _Times(len(request.prompt), arrival, siblings)
        self._observe("request_params_n", request.params.n)
        self._observe("request_params_max_tokens", request.max_tokens)

    def dispatched(self, plan: StepPlan) -> None:
        """Notes a step that starts."""
        for work in plan.work:
            self._cells_held += len(work.sequence.page_ids) * self._page_size
            self._cells_filled += work.end
            if work.new_slot:
                self._started(work.sequence.request.id, work.sequence.index)

    def committed(self, plan: StepPlan, seconds: float) -> None:
        """Notes a step that ended, with the time that it took the device and the host, steps that overlapped it excluded."""
        self._recent[self.steps % _RECENT_STEPS] = seconds
        self.steps += 1
        self.step_tokens += plan.num_tokens
        self.padding_tokens += plan.token_bucket - plan.num_tokens
        self._observe("step_seconds", seconds)
        self._observe("iteration_tokens_total", plan.num_tokens)

    def sent(self, events: Iterable[TokenEvent]) -> None:
        """Notes tokens and ends of sequences."""
        now = self._clock()
        for event in events:
            times = self._live.get((event.request_id, event.index))
            if times is None:
                continue
            if event.token_ids:
                self._token(times, now, len(event.token_ids))
            if event.finish_reason is not None:
                self._ended(times, now)
                self.finished[str(event.finish_reason)] += 1
                del self._live[event.request_id, event.index]

    def histograms(self) -> dict[str, HistogramSnapshot]:
        """Returns frozen copies."""
        return {name: histogram.snapshot() for name, histogram in self._histograms.items()}

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    def _started(self, request_id: str, index: int) -> None:
        times = self._live.get((request_id, index))
        if times is not None and times.first_step is None:
            times.first_step = self._clock()
            self.prompt_tokens += times.num_prompt if index == 0 else 0
            self._observe("request_queue_time_seconds", times.first_step - times.arrival)

    def _token(self, times: _Times, now: float, count: int) -> None:
        self.generation_tokens += count
        if times.first_token is None:
            times.first_token = now
            self._observe("time_to_first_token_seconds", now - times.arrival)
            self._observe("request_prefill_time_seconds", now - (times.first_step or times.arrival))
        else:
            self._observe("inter_token_latency_seconds", now - times.last_token)
        times.last_token = now
        times.num_tokens += count

    def _ended(self, times: _Times, now: float) -> None:
        self._observe("e2e_request_latency_seconds", now - times.arrival)
        self._observe("request_prompt_tokens", times.num_prompt)
        self._observe("request_generation_tokens", times.num_tokens)
        times.siblings.num_open -= 1
        times.siblings.longest = max(times.siblings.longest, times.num_tokens)
        if not times.siblings.num_open:
            self._observe("request_max_num_generation_tokens", times.siblings.longest)
        if times.first_step is not None:
            self._observe("request_inference_time_seconds", now - times.first_step)
        if times.first_token is not None:
            self._observe("request_decode_time_seconds", times.last_token - times.first_token)
            if times.num_tokens > 1:
                self._observe("request_time_per_output_token_seconds", (times.last_token - times.first_token) / (times.num_tokens - 1))
