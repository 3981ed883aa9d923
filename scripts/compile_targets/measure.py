"""Compiles one row and reads what the compilers say: memory, registers, spills, and whether the pages were copied."""

from __future__ import annotations

import contextlib
import re
import resource
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from compile_targets.programs import Program, make_program
from compile_targets.reports import Kernel, Measured, find_copies, find_sliced_operands, read_ptxas
from compile_targets.table import Row
from compile_targets.targets import Target

_KERNEL_HASH = re.compile(r'kernel_hash = "((?:[^"\\]|\\.)*)"')
_TRITON_NAME = re.compile(r'custom_call_target="__gpu\$xla\.gpu\.triton".*? name = "([^"]+)"')


def open_device(target: Target) -> Any:
    """Returns the device that a target's programs are compiled for.

    Raises:
        Exception: The compiler plugin is missing or does not know the chip.
    """
    if target.platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=target.topology).devices[0]
    described = topologies.get_topology_desc(
        platform="cuda", topology_name=target.name, topology=target.topology, target_config=target.description
    )
    return described.devices[0]


def processor_seconds() -> float:
    """Returns the processor time of this process, its threads, and the programs that it ran."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(row: Row, target: Target, device: Any, captured: Callable[[], str], reported: dict[frozenset[str], list[Kernel]]) -> Measured:
    """Compiles a row.

    Args:
        row: What.
        target: For which chip.
        device: Its ``open_device``.
        captured: Returns what the process has printed since the last call; ptxas speaks there.
        reported: What ptxas said of the Mosaic GPU kernels of earlier rows, by their hashes: within a process it compiles a
            kernel once. This row's are added.

    Raises:
        Exception: The row does not compile.
    """
    captured()
    started = processor_seconds()
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings(record=True) as said, _as_if_on(target, device):
        warnings.simplefilter("always", RuntimeWarning)
        program = make_program(row, device)
        lowered = program.jitted.lower(*program.arguments)
        options = {"xla_dump_to": directory, "xla_dump_emitter_re": "ptx"} if row.implementation == "triton" else {}
        compiled = lowered.compile(compiler_options=options)
        seconds = processor_seconds() - started
        text = compiled.as_text()
        kernels = read_ptxas(captured())
        hashes = frozenset(_KERNEL_HASH.findall(lowered.as_text()))
        if hashes:
            kernels = reported.setdefault(hashes, kernels)
        if options:
            kernels += _triton_kernels(set(_TRITON_NAME.findall(text)), Path(directory))
    memory = compiled.memory_analysis()
    problems = [str(warning.message) for warning in said if issubclass(warning.category, RuntimeWarning)]
    problems += _memory_problems(program, memory) + find_copies(text, program.layer_elements)
    if program.custom_call == "mosaic_gpu":
        problems += find_sliced_operands(text, program.custom_call)
    if program.custom_call and program.custom_call not in text:
        problems.append(f"no call of {program.custom_call} in the compiled program: another implementation serves it")
    if program.custom_call and target.platform == "cuda" and not kernels:
        problems.append("ptxas said nothing of our kernels")
    problems += [f"{kernel.name} spills {kernel.spill_bytes} bytes" for kernel in kernels if kernel.spill_bytes]
    return Measured(
        seconds=seconds,
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        kernels=tuple(sorted(kernels, key=lambda kernel: kernel.name)),
        problems=tuple(problems),
    )


def _memory_problems(program: Program, memory: Any) -> list[str]:
    problems = []
    if memory.temp_size_in_bytes > program.temp_limit:
        problems.append(f"temp memory {memory.temp_size_in_bytes:,} bytes is more than {program.temp_limit:,}")
    if memory.alias_size_in_bytes < program.aliased_bytes:
        problems.append(f"{memory.alias_size_in_bytes:,} bytes are updated in place; the pages are {program.aliased_bytes:,}")
    return problems


def _triton_kernels(names: set[str], directory: Path) -> list[Kernel]:
    """XLA makes the PTX; what ptxas says of it we ask ourselves, since XLA keeps it to itself."""
    kernels = []
    for path in sorted(directory.glob("*.ptx")):
        text = path.read_text()
        architecture = re.search(r"^\.target (\w+)", text, re.MULTILINE)
        if architecture and names & set(re.findall(r"\.entry (\w+)", text)):
            command = [_ptxas(), "-v", f"--gpu-name={architecture[1]}", str(path), "-o", str(path.with_suffix(".cubin"))]
            said = subprocess.run(command, capture_output=True, text=True, check=True)
            kernels += [kernel for kernel in read_ptxas(said.stdout + said.stderr) if kernel.name in names]
    return kernels


def _ptxas() -> str:
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    found = sorted(wheels.glob("*/bin/ptxas"))
    path = str(found[-1]) if found else shutil.which("ptxas")
    if path is None:
        raise FileNotFoundError("ptxas is in none of the CUDA wheels and not on PATH")
    return path


def _as_if_on(target: Target, device: Any) -> contextlib.AbstractContextManager[Any]:
    """Names the chip to lowerings that ask for one: newer jax's Triton does, and a few operations of Mosaic for TPUs."""
    kind = device.device_kind if target.platform == "tpu" else f"NVIDIA {target.name}"
    abstract = jax.sharding.AbstractDevice(kind, target.num_cores, target.platform)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=abstract))
