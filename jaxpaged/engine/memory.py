"""How many pages fit, on the device and in host memory, and what to say when too few do."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax

from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.engine.progress import gib
from jaxpaged.errors import ConfigError

_DEFAULT_SWAP_BYTES = 4 * 2**30
_DEFAULT_SWAP_SHARE = 0.5
"""Most of the free host memory that is taken where nobody asked for a swap space."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes for pages, and how they came about.

    Attributes:
        num_bytes: For the pool.
        why: For people.
        flag: The option that raises it.
    """

    num_bytes: int
    why: str
    flag: str


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The pool that will be made.

    Attributes:
        num_pages: N, the null page included.
        page_bytes: Bytes of a page in all layers.
        max_model_len: Longest context; less than the model's only if it was not asked for by name.
        why: How the size came about, for people.
        num_host_pages: Pages that host memory holds beside it.
    """

    num_pages: int
    page_bytes: int
    max_model_len: int
    why: str
    num_host_pages: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the pool."""
        return self.num_pages * self.page_bytes


def device_budget(config: CacheConfig, device: jax.Device, *, step_temp_bytes: int) -> Budget:
    """Returns the bytes that pages may take on a device that holds the weights already.

    Args:
        config: Says how.
        device: Where.
        step_temp_bytes: Scratch memory of the largest step, and of pages on their way to or from the host.
    """
    if config.kv_cache_memory_bytes is not None:
        return Budget(config.kv_cache_memory_bytes, "--kv-cache-memory-bytes", "--kv-cache-memory-bytes")
    if device.platform == "cpu":
        return Budget(int(config.cpu_kv_cache_gib * 2**30), "--cpu-kv-cache-gib", "--cpu-kv-cache-gib")
    stats = device.memory_stats() or {}
    total = stats.get("bytes_limit", 0)
    used = stats.get("bytes_in_use", 0)
    num_bytes = int(total * config.gpu_memory_utilization) - used - step_temp_bytes
    why = f"{config.gpu_memory_utilization:.2f} of {gib(total)} - {gib(used)} in use - {gib(step_temp_bytes)} for the largest step"
    return Budget(num_bytes, why, "--gpu-memory-utilization")


def plan_memory(
    config: CacheConfig,
    budget: Budget,
    *,
    page_size: int,
    page_bytes: int,
    max_model_len: int,
    max_num_seqs: int,
    may_shorten: bool,
    keep_small: bool,
) -> MemoryPlan:
    """Decides the number of pages.

    Args:
        config: ``num_pages`` overrides the budget.
        budget: Bytes for pages.
        page_size: B, tokens in a page.
        page_bytes: Bytes of a page in all layers.
        max_model_len: Longest context, in tokens.
        max_num_seqs: Most sequences at once.
        may_shorten: Whether the context may be made shorter to fit (nobody asked for this length by name).
        keep_small: Whether to take no more pages than ``max_num_seqs`` longest contexts need.

    Raises:
        ConfigError: Not even one context of ``max_model_len`` fits; says what is needed, what there is, and what would fit.
    """
    needed = -(-max_model_len // page_size)
    if config.num_pages is not None:
        num_pages, why, flag = config.num_pages, "--num-pages", "--num-pages"
    else:
        num_pages, why, flag = max(0, budget.num_bytes // page_bytes), budget.why, budget.flag
        if keep_small and num_pages > needed * max_num_seqs + 1:
            num_pages, why = needed * max_num_seqs + 1, f"what {max_num_seqs} requests of {max_model_len:,} tokens need"
    fits = max(0, num_pages - 1) * page_size
    if fits < max_model_len and not (may_shorten and fits >= page_size):
        raise ConfigError(
            f"to serve one request of max_model_len {max_model_len:,} tokens, {gib((needed + 1) * page_bytes)} of pages are needed, but "
            f"{gib(max(0, num_pages) * page_bytes)} are available ({why}); the longest context that fits is {fits:,} tokens. "
            f"Raise {flag}, lower --max-model-len, or use a smaller --kv-cache-dtype"
        )
    return MemoryPlan(num_pages, page_bytes, min(max_model_len, fits), why)


def available_host_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Returns the memory of the host that can be taken without swapping; None where the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return int(found[1]) * 1024 if found else None


def plan_swap_space(config: EngineConfig, device: jax.Device, *, available_bytes: int | None, page_bytes: int = 1) -> int:
    """Decides how many pages host memory holds.

    Args:
        config: ``swap_space`` and ``preemption_mode``.
        device: Where the engine runs; a CPU's pages are in host memory anyway, so it gets no swap space unless asked to.
        available_bytes: Free memory of the host; None if it is not known.
        page_bytes: Bytes of a page in all layers; 1 to have the answer in bytes.

    Raises:
        ConfigError: The swap space is larger than what is free, or there is none and requests are to be preempted by swapping.
    """
    asked = config.cache.swap_space
    if asked is not None:
        num_bytes = int(asked * 2**30)
        if available_bytes is not None and num_bytes > available_bytes:
            raise ConfigError(
                f"--swap-space {asked:g} asks for {gib(num_bytes)} of host memory, but {gib(max(0, available_bytes))} are free; lower it"
            )
    elif device.platform == "cpu":
        num_bytes = 0
    else:
        most = _DEFAULT_SWAP_BYTES if available_bytes is None else int(_DEFAULT_SWAP_SHARE * available_bytes)
        num_bytes = max(0, min(_DEFAULT_SWAP_BYTES, most))
    num_pages = num_bytes // page_bytes
    if config.scheduler.preemption_mode == "swap" and num_pages == 0:
        raise ConfigError(
            f"--preemption-mode swap needs a --swap-space of at least a page ({gib(page_bytes)}); it is {gib(num_bytes)}. "
            f"Raise --swap-space, or use --preemption-mode recompute"
        )
    return num_pages
