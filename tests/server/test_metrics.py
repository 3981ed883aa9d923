"""What /metrics says of the page pool."""

from types import SimpleNamespace

from jaxpaged.engine.telemetry import EngineStats
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
