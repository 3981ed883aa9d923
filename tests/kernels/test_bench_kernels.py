"""The benchmark's own parts: data, the check against the reference, timing, and what it says of peers that are not there."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from kernel_bench import timing
from kernel_bench.cases import TOLERANCE, Case, make
from kernel_bench.contenders import Unavailable, contenders

SMALL = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 8, "dtype": "float32", "layers": 2}
DECODE = Case("decode", 3, 1, 5, 40, **SMALL)
PREFILL = Case("prefill", 2, 24, 24, 24, **SMALL)


@pytest.mark.parametrize("case", [DECODE, PREFILL], ids=lambda case: case.name)
def test_every_contender_on_a_cpu_is_right_and_a_wrong_result_shows(case, monkeypatch):
    monkeypatch.setattr(timing, "SAMPLES", 1)
    data, names = make(case), []
    for contender in contenders(jax.devices("cpu")[0]):
        try:
            out, _ = contender.run(data)  # of the time nothing can be said: one sample, on a machine that may be busy
        except Unavailable as reason:
            assert case is PREFILL and "single-token" in str(reason)
            continue
        names.append(contender.name)
        assert data.error(out) <= TOLERANCE["float32"]
        assert data.error(np.asarray(out) * 1.001) > TOLERANCE["float32"]
    assert names == (["ours: xla", "plain gather, einsum"] if case is DECODE else ["ours: xla"])


def test_bytes_and_operations():
    data = make(PREFILL)
    assert data.flops == 4 * 2 * (24 * 25 // 2) * 4 * 16
    assert data.bytes == 2 * 24 * 2 * 2 * 16 * 4 + 2 * 48 * 4 * 16 * 4


def test_peers_that_are_not_installed_say_so(monkeypatch):
    for module in ("torch", "flashinfer"):
        monkeypatch.setitem(sys.modules, module, None)
    for module in ("torch_peers", "flashinfer_peers"):
        monkeypatch.delitem(sys.modules, f"kernel_bench.{module}", raising=False)
    gpu = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    found = {contender.name: contender for contender in contenders(gpu)}
    assert [name for name in found if name.startswith("ours")] == ["ours: mosaic_gpu", "ours: triton", "ours: xla"]
    for name, package in (("torch SDPA, no pages", "torch"), ("FlashInfer", "flashinfer")):
        with pytest.raises(Unavailable, match=f"{package} is not installed"):
            found[name].run(None)


def test_the_median_of_queues_leaves_out_what_comes_once(monkeypatch):
    """A clock that only the work and the waiting move: 3 ms a call, 1 ms to wait."""
    now = 0.0

    def work():
        nonlocal now
        now += 3e-3

    def wait(_):
        nonlocal now
        now += 1e-3

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    assert timing.queued_seconds(work, wait, samples=3) == pytest.approx(3e-3)
