"""What compilers report, read from their text: plain data and plain parsing; nothing here loads jax."""

from __future__ import annotations

import dataclasses
import re

_PTXAS_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_PTXAS_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_PTXAS_REGISTERS = re.compile(r"Used (\d+) registers")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (?:\()?(\w+)\[([\d,]*)\]\S* (?:.*?\) )?([\w\-]+)\(")
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
_ARRAY = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = [a-z]+(\d*)\w*\[([\d,]+)\]")
_SLICE = re.compile(r" (?:dynamic-)?slice\(%?([\w.\-]+)\b[^)]*\)(?:, slice=\{([^}]*)\})?")
_BEGINNING = re.compile(r"\[(\d+):")
_ALIGNMENT = 256
_COPIES = ("copy", "copy-start", "reshape", "transpose", "convert")
_IN_PLACE = ("scatter", "dynamic-update-slice")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel.

    Attributes:
        name: Of its entry.
        registers: Per thread.
        spill_bytes: Stored to and loaded from local memory for want of registers.
    """

    name: str
    registers: int
    spill_bytes: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """What compiling a row gave.

    Attributes:
        seconds: Processor time of lowering and compiling, all threads: a busy machine changes it little.
        temp_bytes, alias_bytes, argument_bytes: As the compiler plans the device's memory.
        kernels: Ours, on GPUs.
        problems: Why the row is red; empty if it is green.
    """

    seconds: float
    temp_bytes: int = 0
    alias_bytes: int = 0
    argument_bytes: int = 0
    kernels: tuple[Kernel, ...] = ()
    problems: tuple[str, ...] = ()


def read_ptxas(text: str) -> list[Kernel]:
    """Returns the kernels that ``ptxas -v`` reports on."""
    kernels = []
    for part in re.split(r"(?=Compiling entry function)", text):
        name, registers = _PTXAS_ENTRY.search(part), _PTXAS_REGISTERS.search(part)
        if name and registers:
            spills = sum(int(n) for pair in _PTXAS_SPILLS.findall(part) for n in pair)
            kernels.append(Kernel(name[1], int(registers[1]), spills))
    return kernels


def find_copies(text: str, elements: int) -> list[str]:
    """Returns the operations of a compiled program that make a new array of ``elements`` numbers or more from an old one.

    A scatter and a slice update write in place where the operand is donated or of no more use; whether they do shows in the scratch
    memory. A fused operation counts unless one of these is in it.

    Args:
        text: The optimised HLO.
        elements: Numbers in one layer's pages.
    """
    opcodes: dict[str, set[str]] = {}
    large: list[tuple[str, str, str]] = []
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        name, _, dimensions, opcode = found.groups()
        opcodes.setdefault(computation, set()).add(opcode)
        size = 1
        for dimension in dimensions.split(","):
            size *= int(dimension or 1)
        if size >= elements and opcode in (*_COPIES, "fusion", "async-start"):
            called = _CALLS.search(line)
            large.append((computation, f"{opcode} {name} [{dimensions}]", called[1] if called else ""))
    fused = set(_CALLS.findall(text))
    copies = []
    for computation, description, called in large:
        if computation in fused or (called and opcodes.get(called, set()) & set(_IN_PLACE)):
            continue
        copies.append(f"the pages are copied: {description}")
    return copies[:3]


def find_sliced_operands(text: str, custom_call: str) -> list[str]:
    """Returns the calls of our kernels that XLA has fused with slices they read, which do not begin at a multiple of 256 bytes.

    Such a kernel is handed an address within a larger array, and Mosaic GPU refuses one that is no such multiple.

    Args:
        text: The optimised HLO.
        custom_call: Part of the name of the kernels' custom calls.
    """
    fused, computation, found = set(_CALLS.findall(text)), "", []
    arrays: dict[str, tuple[int, tuple[int, ...]]] = {}
    misplaced = False
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation, arrays, misplaced = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%"), {}, False
        if computation not in fused:
            continue
        if array := _ARRAY.match(line):
            name, item_bits, dimensions = array.groups()
            arrays[name] = (int(item_bits or 8) // 8, tuple(int(dimension) for dimension in dimensions.split(",")))
        if part := _SLICE.search(line):
            operand, bounds = part.groups()
            misplaced |= operand not in arrays or _first_byte(*arrays[operand], _BEGINNING.findall(bounds or "")) % _ALIGNMENT != 0
        elif misplaced and " custom-call(" in line and f'custom_call_target="{custom_call}' in line:
            found.append(f"a kernel reads a slice where it lies: {computation}")
    return found[:3]


def _first_byte(item_bytes: int, shape: tuple[int, ...], beginnings: list[str]) -> int:
    """Returns where a slice of an array begins; 1, which is aligned with nothing, if only the device knows."""
    if len(beginnings) != len(shape):
        return 1
    index = 0
    for beginning, size in zip(beginnings, shape, strict=True):
        index = index * size + int(beginning)
    return index * item_bytes
