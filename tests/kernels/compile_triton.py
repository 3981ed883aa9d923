"""Compiles the Triton kernels for a described GPU: ``python compile_triton.py A100``; prints one JSON object a kernel.

A process of its own, since the CUDA plugin must be told before jax loads that no driver is there. scripts/compile_check.py compiles for
Hopper, with the other kernels; this is for the GPUs that have no other kernel.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels.paged_attention import triton

DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_per_core}
  shared_memory_per_block_optin: {shared_per_block}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 41943040
  clock_rate_ghz: 1.4
  device_memory_size: 24000000000
  cuda_compute_capability {{ major: 8 minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""
GPUS = {
    "A100": {
        "minor": 0,
        "cores": 108,
        "fpus": 64,
        "threads": 2048,
        "bandwidth": 2039 * 10**9,
        "shared_per_core": 167936,
        "shared_per_block": 166912,
    },
    "L4": {
        "minor": 9,
        "cores": 58,
        "fpus": 128,
        "threads": 1536,
        "bandwidth": 300 * 10**9,
        "shared_per_core": 102400,
        "shared_per_block": 101376,
    },
}

SHAPES = {
    # name: query heads, key/value heads, head dimension, page size, pool's dtype, options
    "Llama-3-8B": (32, 8, 128, 64, "bfloat16", {}),
    "Llama-3-8B in small pages": (32, 8, 128, 16, "bfloat16", {}),
    "Llama-3-8B, float8": (32, 8, 128, 64, "float8_e4m3fn", {}),
    "Llama-3-8B, int8": (32, 8, 128, 64, "int8", {}),
    "Qwen3-0.6B": (16, 8, 128, 64, "bfloat16", {}),
    "Gemma-2-9B": (16, 8, 256, 64, "bfloat16", {"soft_cap": 50.0, "sliding_window": 4096}),
    "sinks": (64, 8, 64, 64, "bfloat16", {"sliding_window": 128}),
    "head dimension 80": (32, 32, 80, 64, "bfloat16", {}),
}
TOKENS, ROWS, CONTEXT, PAGES = 512, 64, 8192, 2048


def lower(device, name):
    num_q_heads, num_kv_heads, head_dim, page_size, kv_dtype, options = SHAPES[name]
    spec = functools.partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))
    arguments = [
        spec((TOKENS, num_q_heads, head_dim), jnp.bfloat16),
        spec((PAGES, page_size, 2 * num_kv_heads, head_dim), kv_dtype),
        *(spec(shape, jnp.int32) for shape in ((ROWS,), (ROWS, CONTEXT // page_size), (ROWS + 1,), (3,))),
    ]
    traced = {"sinks": spec((num_q_heads,), jnp.float32)} if name == "sinks" else {}
    if kv_dtype == "int8":
        traced |= dict.fromkeys(("k_scale", "v_scale"), spec((PAGES, num_kv_heads, page_size), jnp.float32))
    call = functools.partial(triton.ragged_paged_attention, sm_scale=0.1, **options)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice(device.device_kind, platform="gpu", num_cores=8))
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(call).lower(*arguments, **traced)


def main():
    gpu = sys.argv[1]
    description = DESCRIPTION.format(name=gpu, **GPUS[gpu])
    device = topologies.get_topology_desc(platform="cuda", topology_name=gpu, topology="1x1x1", target_config=description).devices[0]
    ptxas = next((Path(sysconfig.get_paths()["purelib"]) / "nvidia").glob("*/bin/ptxas"))
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as directory:
            compiled = lower(device, name).compile(compiler_options={"xla_dump_to": directory})
            temp = compiled.memory_analysis().temp_size_in_bytes
            for path in sorted(Path(directory).glob("*.ptx")):
                text = path.read_text()
                entry = re.search(r"\.entry (paged_attention_\w+)\(", text)
                if entry:
                    command = [ptxas, "-v", "-arch", re.search(r"^\.target (\w+)", text, re.MULTILINE)[1], path, "-o", os.devnull]
                    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
                    registers = int(re.search(r"Used (\d+) registers", said)[1])
                    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
                    print(
                        json.dumps({"shape": name, "kernel": entry[1], "registers": registers, "spilled": spilled, "temp": temp}),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
