"""What /metrics says of the page pool."""

from types import SimpleNamespace

from jaxpaged.engine.telemetry import EngineStats
from jaxpaged.server.metrics import EngineCollector


def test_the_pools_bytes_and_dtype_are_shown():
    info = SimpleNamespace(page_size=64, num_pages=9, kv_dtype="int8", pool_bytes=12345)
    service = SimpleNamespace(engine=SimpleNamespace(info=info, stats=EngineStats), names=lambda info: ["tiny"])
    found = {family.name: family.samples[0] for family in EngineCollector(service, "jaxpaged").collect() if family.samples}
    assert found["jaxpaged:kv_cache_bytes"].value == 12345
    labels = found["jaxpaged:cache_config_info"].labels
    assert (labels["block_size"], labels["num_gpu_blocks"], labels["cache_dtype"]) == ("64", "9", "int8")
