"""Times paged attention beside its peers, against ceilings that are measured in the same run.

    python scripts/bench_kernels.py                 # on a GPU or TPU: the shapes and aims of docs/kernels.md
    JAX_PLATFORMS=cpu python scripts/bench_kernels.py    # on a CPU: small shapes in float32, the XLA path beside a plain gather
    python scripts/bench_kernels.py --case "decode 32 x 4k" --markdown

Per shape and contender: the median time of a layer over 50 samples, caches cold (``kernel_bench.timing`` says how), the bytes that
have to be moved, GB/s, and the share of the bandwidth of a copy; for prefill the rate of the products and its share of a matrix product's.
Every result is first checked against the float64 reference; a wrong one is not timed, and if it is ours the exit status is 1. On a CPU no
kernel of ours is timed: an interpreter's time says nothing. --profile writes a trace in which the kernels can be seen one by one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # peers outside jax need memory too

import jax
from kernel_bench import timing
from kernel_bench.cases import CASES, PEER_TOLERANCE, SMALL_CASES, TOLERANCE, Case, make
from kernel_bench.contenders import Contender, Unavailable, contenders

COLUMNS = ("shape", "contender", "us a layer", "MB", "GB/s", "of copy", "of read", "TFLOP/s", "of matmul", "error", "aim")


class Ceilings:
    """The rates that fractions are taken of, measured here and now."""

    def __init__(self, on_cpu: bool) -> None:
        size = 2**28 if on_cpu else 2**30
        self.copy = timing.copy_bandwidth(size)
        self.read = timing.read_bandwidth(size)
        self.matmul = timing.matmul_rate(1024, "float32") if on_cpu else timing.matmul_rate(8192, "bfloat16")

    def __str__(self) -> str:
        return f"copy {self.copy / 1e9:.1f} GB/s, read {self.read / 1e9:.1f} GB/s, matrix product {self.matmul / 1e12:.2f} TFLOP/s"


def measure(case: Case, ceilings: Ceilings, running: list[Contender]) -> tuple[list[tuple[str, ...]], bool]:
    """Returns a case's lines, and whether every result was right."""
    data, lines, right = make(case), [], True
    for contender in running:
        head = (case.name, contender.name)
        try:
            out, seconds = contender.run(data)
        except Unavailable as reason:
            lines.append((*head, f"not measured: {reason}", *[""] * 7, case.aim))
        except Exception as error:  # a peer that fails is a line of the table, not the end of it
            lines.append((*head, f"failed: {' '.join(str(error).split())[:120]}", *[""] * 7, case.aim))
            right &= not contender.name.startswith("ours")
        else:
            error = data.error(out)
            ours = contender.name.startswith("ours")
            if not error <= (TOLERANCE if ours else PEER_TOLERANCE)[case.dtype]:
                lines.append((*head, "wrong", *[""] * 6, f"{error:.1e}", case.aim))
                right &= not ours
                continue
            rate, products = data.bytes / seconds, data.flops / seconds
            shares = (f"{rate / ceilings.copy:.0%}", f"{rate / ceilings.read:.0%}") if case.decodes else ("", "")
            prefill = ("", "") if case.decodes else (f"{products / 1e12:.2f}", f"{products / ceilings.matmul:.0%}")
            figures = (f"{seconds * 1e6:.1f}", f"{data.bytes / 1e6:.1f}", f"{rate / 1e9:.1f}", *shares, *prefill)
            lines.append((*head, *figures, f"{error:.1e}", case.aim))
    return lines, right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small shapes in float32 (the only ones on a CPU)")
    parser.add_argument("--case", action="append", help="one shape by its name; may be given more than once")
    parser.add_argument("--contender", action="append", help="one contender by its name; may be given more than once")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/kernels.md shows it")
    parser.add_argument("--profile", metavar="DIR", help="write a profiler trace of everything")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    all_cases = SMALL_CASES if arguments.small or on_cpu else CASES
    cases = [case for case in all_cases if not arguments.case or case.name in arguments.case]
    if not cases:
        parser.error(f"no shape of that name here; there are {', '.join(case.name for case in all_cases)}")
    running = [contender for contender in contenders(device) if not arguments.contender or contender.name in arguments.contender]
    if not running:
        parser.error(f"no contender of that name here; there are {', '.join(contender.name for contender in contenders(device))}")
    print(f"jax {jax.__version__} on {device.device_kind}, {datetime.date.today():%d %B %Y}", flush=True)
    with jax.profiler.trace(arguments.profile) if arguments.profile else contextlib.nullcontext():
        ceilings = Ceilings(on_cpu)
        print(f"ceilings in this run: {ceilings}\n", flush=True)
        _print_row(COLUMNS, arguments.markdown)
        if arguments.markdown:
            _print_row(["---"] * len(COLUMNS), markdown=True)
        all_right = True
        for case in cases:
            lines, right = measure(case, ceilings, running)
            all_right &= right
            for line in lines:
                _print_row(line, arguments.markdown)
    if on_cpu:
        aims = "; ".join(f"{case.name} (aim {case.aim})" for case in CASES)
        print(f"\nNo GPU or TPU here. Not measured: mosaic_gpu, triton, tpu, and every peer of theirs, at {aims}.")
    return 0 if all_right else 1


def _print_row(cells: object, markdown: bool) -> None:
    texts = [str(cell) for cell in cells]  # type: ignore[attr-defined]
    if markdown:
        print("| " + " | ".join(texts) + " |", flush=True)
    else:
        print(f"{texts[0]:20} {texts[1]:23}" + "".join(f" {text:>10}" for text in texts[2:]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
