"""What /metrics says, and in which format."""

from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxpaged.config import ServerConfig
from jaxpaged.engine.telemetry import EngineStats, Telemetry
from jaxpaged.scheduling.plan import TokenEvent
from jaxpaged.scheduling.request import FinishReason, Request, SamplingParams
from jaxpaged.server.metrics import EngineCollector


def test_pages_by_state_and_the_prefix_caches_counts_are_shown():
    info = SimpleNamespace(page_size=64, num_pages=9, kv_dtype="int8", pool_bytes=12345)
    counts = {"prefix_cache_queries": 70, "prefix_cache_hits": 36, "swaps": 3, "page_copies": 5}
    stats = EngineStats(pages_used=3, pages_free=5, pages_cached=2, **counts)
    service = SimpleNamespace(engine=SimpleNamespace(info=info, stats=lambda: stats), names=lambda info: ["tiny"])
    families = {family.name: family.samples for family in EngineCollector(service, "vllm").collect()}
    assert {sample.labels["state"]: sample.value for sample in families["vllm:pages"]} == {"active": 3, "cached": 2, "free": 3}
    shown = {"prefix_cache_queries": 70, "prefix_cache_hits": 36, "num_swaps": 3, "page_copies": 5}
    assert {name: families[f"vllm:{name}"][0].value for name in shown} == shown


def test_the_pools_bytes_and_dtype_are_shown():
    info = SimpleNamespace(page_size=64, num_pages=9, kv_dtype="int8", pool_bytes=12345)
    service = SimpleNamespace(engine=SimpleNamespace(info=info, stats=EngineStats), names=lambda info: ["tiny"])
    found = {family.name: family.samples[0] for family in EngineCollector(service, "jaxpaged").collect() if family.samples}
    assert found["jaxpaged:kv_cache_bytes"].value == 12345
    labels = found["jaxpaged:cache_config_info"].labels
    assert (labels["block_size"], labels["num_gpu_blocks"], labels["cache_dtype"]) == ("64", "9", "int8")


def test_the_longest_sequence_of_each_request_is_observed_once_when_the_last_has_ended():
    telemetry = Telemetry(16, lambda: 1.0)
    lengths = {"one": (7,), "three": (4, 9, 2), "none": (0, 0)}

    def observed():
        return (snapshot := telemetry.histograms()["request_max_num_generation_tokens"]).total, sum(snapshot.counts)

    for name, tokens in lengths.items():
        params = SamplingParams(n=len(tokens), max_tokens=9)
        telemetry.added(Request(id=name, prompt=(1, 2), params=params))
    for name, tokens in lengths.items():
        for index, count in enumerate(tokens):
            before = observed()
            telemetry.sent([TokenEvent(name, index, (5,))] * count)
            assert observed() == before
            telemetry.sent([TokenEvent(name, index, finish_reason=FinishReason.LENGTH)])
    assert observed() == (7 + 9 + 0, 3)
    assert telemetry.histograms()["request_generation_tokens"].total == 7 + 4 + 9 + 2
    assert telemetry.num_live == 0


ACCEPT = {
    "Prometheus 2.42": "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "Prometheus 3": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3",
    "Prometheus 3 with legacy names": "application/openmetrics-text;version=1.0.0;escaping=underscores,text/plain;version=0.0.4;q=0.3",
    "escaped as values": "text/plain;version=1.0.0;escaping=values",
    "OpenMetrics alone": "application/openmetrics-text;version=1.0.0",
    "curl": "*/*",
    "a browser": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
}


@pytest.mark.parametrize("name", ACCEPT)
@pytest.mark.parametrize("prefix", ["jaxpaged", "vllm"])
def test_every_prometheus_gets_samples_with_colons_and_types(make_client, prefix, name):
    client = make_client(config=ServerConfig(metrics_prefix=prefix))
    answer = client.request("GET", "/metrics", headers={"accept": ACCEPT[name]})
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    own = [family for family in families.values() if not family.name.startswith("process_")]
    assert len(own) > 20
    for family in own:
        assert family.type in ("gauge", "counter", "histogram"), family.name
        assert all(sample.name.startswith(f"{prefix}:") for sample in family.samples), family.name
    assert families[f"{prefix}:num_requests_running"].samples[0].value == 0
