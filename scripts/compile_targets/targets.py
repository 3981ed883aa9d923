"""The chips that programs are compiled for, and what a machine without them needs to do it.

TPUs: libtpu holds the whole compiler and knows each chip by name. NVIDIA: XLA's GPU plugin compiles for a described device, and
ptxas, from the CUDA wheels, makes its machine code. Neither needs a driver.
"""

from __future__ import annotations

import dataclasses
import importlib.util

_GPU_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2_bytes}
  clock_rate_ghz: 1.98
  device_memory_size: {memory_bytes}
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{kind}"
"""
"""XLA's ``GpuTargetConfigProto`` of a Hopper GPU (SXM); what differs between the two is left open."""

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip.

    Attributes:
        name: For people and commands.
        platform: jax's name of its kind: ``tpu`` or ``cuda``.
        topology: The name its compiler knows it by.
        memory_bytes: Of the chip (of one of its two cores on tpu7x, which is what jax calls a device).
        page_size: Token positions in a page by the engine's default for the platform.
        kernel: The implementation of paged attention that the engine takes there.
        implementations: Every implementation that is compiled for it.
        bandwidth, l2_bytes: Of a GPU, by its data sheet.
    """

    name: str
    platform: str
    topology: str
    memory_bytes: int
    page_size: int
    kernel: str
    implementations: tuple[str, ...]
    bandwidth: int = 0
    l2_bytes: int = 0

    @property
    def num_cores(self) -> int:
        """Multiprocessors of a GPU, tensor cores of a TPU's device."""
        return 132 if self.platform == "cuda" else 1

    @property
    def description(self) -> str:
        """XLA's text form of a GPU."""
        return _GPU_DESCRIPTION.format(
            bandwidth=self.bandwidth, l2_bytes=self.l2_bytes, memory_bytes=self.memory_bytes, kind=f"NVIDIA {self.name}"
        )

    def environment(self) -> dict[str, str]:
        """Returns what must stand in a process's environment before it loads jax."""
        common = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
        if self.platform == "cuda":
            # No driver to ask for its version; and Mosaic GPU prints what ptxas says of each kernel.
            return common | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
        # No metadata server to ask for the machine's type, and several processes may compile at once: none drives a chip.
        quiet = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_LOG_DIR": "disabled"}
        return common | quiet | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}

    def missing(self) -> str | None:
        """Returns what has to be installed first, or None if all is there."""
        needed = ("libtpu",) if self.platform == "tpu" else ("jax_plugins.xla_cuda13", "nvidia.cu13")
        for module in needed:
            try:
                found = importlib.util.find_spec(module) is not None
            except ModuleNotFoundError:
                found = False
            if not found:
                return f"{module} is not installed: pip install 'jaxpaged[aot]'"
        return None


_ON_GPU = ("mosaic_gpu", "triton", "xla")
_ON_TPU = ("tpu", "xla")

TARGETS = {
    target.name: target
    for target in (
        Target("v5e", "tpu", "v5e:2x2", 16 * _GIB, 128, "tpu", _ON_TPU),
        Target("v6e", "tpu", "v6e:2x2", 32 * _GIB, 128, "tpu", _ON_TPU),
        Target("tpu7x", "tpu", "tpu7x:2x2x1", 96 * _GIB, 128, "tpu", _ON_TPU),
        Target("H100", "cuda", "1x1x1", 85_000_000_000, 64, "mosaic_gpu", _ON_GPU, 3_350_000_000_000, 50 * 2**20),
        Target("H200", "cuda", "1x1x1", 150_000_000_000, 64, "mosaic_gpu", _ON_GPU, 4_800_000_000_000, 60 * 2**20),
    )
}
