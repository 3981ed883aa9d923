"""/metrics: the engine's counters in Prometheus' text format, under vLLM's names so that its dashboards work.

It is always the text format 0.0.4, which every Prometheus reads, whatever the client would rather have: the library's OpenMetrics writer
turns the colon in a sample's name into an underscore for clients that do not ask for UTF-8 (Prometheus 2), but not in its TYPE line, so
that names and types are lost. vLLM answers the same.

The engine counts (``engine.telemetry``); here a snapshot is only turned into metric families when somebody asks. There is no
process-wide registry: two servers in one process do not meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from jaxpaged.engine.telemetry import HISTOGRAMS, EngineStats, HistogramSnapshot
from jaxpaged.server.service import Service

_LABELS = ("model_name", "engine")
_ENGINE = "0"

_GAUGES: tuple[tuple[str, str, str], ...] = (
    ("num_requests_running", "running", "Sequences that hold pages."),
    ("num_requests_waiting", "waiting", "Sequences in the queue."),
    ("kv_cache_usage_perc", "kv_cache_usage", "Share of the pages that are in use, 0 to 1."),
    ("kv_waste_perc", "kv_waste", "Share of the cells of held pages that held no token, averaged over all steps, 0 to 1."),
)
_COUNTERS: tuple[tuple[str, str, str], ...] = (
    ("prompt_tokens", "prompt_tokens", "Prompt tokens of admitted requests."),
    ("generation_tokens", "generation_tokens", "Generated tokens."),
    ("num_preemptions", "preemptions", "Sequences whose pages were taken back, to be swapped in or recomputed later."),
    ("prefix_cache_queries", "prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache."),
    ("prefix_cache_hits", "prefix_cache_hits", "Prompt tokens that were found there."),
    ("num_swaps", "swaps", "Requests whose pages went to host memory when they were taken back."),
    ("page_copies", "page_copies", "Pages that were copied because another sequence reads them too."),
    ("steps", "steps", "Steps whose results were read."),
    ("padding_tokens", "padding_tokens", "Padding up to the steps' token buckets."),
    ("recompiles", "compilations_after_ready", "Programs compiled after the server was ready; anything but 0 is a fault."),
    ("compile_seconds", "compile_s", "Seconds spent on compiling, start-up included."),
    ("recoveries", "recoveries", "Failed steps that the engine recovered from."),
    ("requests_refused", "refused", "Requests refused with 429: the queue was full, or too many large bodies were arriving."),
)
"""Metric name without prefix and ``_total``, attribute of EngineStats, meaning."""


class EngineCollector(Collector):
    """Makes metric families from a fresh snapshot.

    Args:
        service: Where the snapshot comes from.
        prefix: Of the metric names.
    """

    def __init__(self, service: Service, prefix: str) -> None:
        self._service = service
        self._prefix = prefix

    def describe(self) -> Iterable[Metric]:
        """Says nothing, so that registering takes no snapshot."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yields every family; before the engine is loaded there is none."""
        info = self._service.engine.info
        if info is None:
            return
        stats = self._service.engine.stats()
        labels = (self._service.names(info)[0], _ENGINE)
        for name, attribute, meaning in _GAUGES:
            gauge = GaugeMetricFamily(f"{self._prefix}:{name}", meaning, labels=_LABELS)
            gauge.add_metric(labels, getattr(stats, attribute))
            yield gauge
        for name, attribute, meaning in _COUNTERS:
            counter = CounterMetricFamily(f"{self._prefix}:{name}", meaning, labels=_LABELS)
            counter.add_metric(labels, getattr(stats, attribute))
            yield counter
        yield from self._labelled(stats, labels)
        cache = GaugeMetricFamily(
            f"{self._prefix}:cache_config_info", "The page pool.", labels=(*_LABELS, "block_size", "num_gpu_blocks", "cache_dtype")
        )
        cache.add_metric((*labels, str(info.page_size), str(info.num_pages), info.kv_dtype), 1)
        yield cache
        size = GaugeMetricFamily(f"{self._prefix}:kv_cache_bytes", "Bytes of the page pool, scales and padding included.", labels=_LABELS)
        size.add_metric(labels, info.pool_bytes)
        yield size
        for name, snapshot in stats.histograms.items():
            yield self._histogram(name, snapshot, labels)

    def _labelled(self, stats: EngineStats, labels: tuple[str, str]) -> Iterator[Metric]:
        pages = GaugeMetricFamily(f"{self._prefix}:pages", "Pages of the pool by state.", labels=(*_LABELS, "state"))
        pages.add_metric((*labels, "active"), stats.pages_used)
        pages.add_metric((*labels, "cached"), stats.pages_cached)
        pages.add_metric((*labels, "free"), stats.pages_free - stats.pages_cached)
        yield pages
        finished = CounterMetricFamily(f"{self._prefix}:request_success", "Finished sequences.", labels=(*_LABELS, "finished_reason"))
        for reason, count in stats.finished.items():
            finished.add_metric((*labels, reason), count)
        yield finished

    def _histogram(self, name: str, snapshot: HistogramSnapshot, labels: tuple[str, str]) -> Metric:
        family = HistogramMetricFamily(f"{self._prefix}:{name}", HISTOGRAMS[name][0], labels=_LABELS)
        total, buckets = 0, []
        for bound, count in zip((*map(str, map(float, snapshot.bounds)), "+Inf"), snapshot.counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(labels, buckets, snapshot.total)
        return family


class Metrics:
    """The registry behind /metrics.

    Args:
        service: The server's engine.
        prefix: ``jaxpaged`` or ``vllm``.
    """

    def __init__(self, service: Service, prefix: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(service, prefix))
        ProcessCollector(registry=self._registry)

    def render(self) -> tuple[bytes, str]:
        """Returns the body and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4
