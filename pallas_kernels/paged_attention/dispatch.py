"""Which implementation of paged attention runs: loading it, choosing it for the platform, and falling to the next one aloud."""

from __future__ import annotations

import contextlib
import importlib
import types
import warnings
from collections.abc import Iterator
from typing import Any

import jax

from pallas_kernels.kv_write.quantize import BITS_OF

IMPLEMENTATIONS = ("reference", "xla", "mosaic_gpu", "triton", "tpu")

FALLS_TO = {"mosaic_gpu": "triton", "triton": "xla", "tpu": "xla"}
"""Who serves what an implementation lacks. ``xla`` lacks nothing and runs on every platform."""


_REFUSAL = "interpret mode is supported"
"""What jax says of a kernel that it cannot compile for a platform."""


def sibling(implementation: str) -> types.ModuleType:
    """Returns the module of an implementation, loaded on first use: the kernel languages are optional parts of jax.

    Raises:
        ValueError: There is no such implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: must be 'auto' or one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    return importlib.import_module(f"pallas_kernels.paged_attention.{implementation}")


def implementations_on(device: Any) -> tuple[str, ...]:
    """Returns the implementations that run on a device (``reference`` aside, which runs on none), the fastest first."""
    if device.platform == "tpu":
        return ("tpu", "xla")
    if device.platform == "gpu":
        # Mosaic GPU's wgmma is Hopper's (compute capability 9.x) alone; AMD's devices name an architecture here.
        hopper = str(getattr(device, "compute_capability", "")).startswith("9.")
        return ("mosaic_gpu", "triton", "xla") if hopper else ("triton", "xla")
    return ("xla",)


def default_implementation() -> str:
    """Returns the fastest implementation for jax's default device: what ``auto`` means."""
    return implementations_on(jax.devices()[0])[0]


def resolve(implementation: str) -> str:
    """Returns an implementation's name, ``auto`` resolved for the default device.

    Raises:
        ValueError: There is no such implementation.
    """
    if implementation == "auto":
        return default_implementation()
    sibling(implementation)
    return implementation


@contextlib.contextmanager
def naming_what_runs_here(module: types.ModuleType) -> Iterator[None]:
    """Turns jax's refusal to compile an implementation for the default device into an error that names those that run there.

    Asked is jax, not the device: an implementation may well be traced, lowered or interpreted where it cannot run.
    """
    try:
        yield
    except ValueError as error:
        if _REFUSAL not in str(error):
            raise
        device, name = jax.devices()[0], module.__name__.rpartition(".")[2]
        runs = ", ".join(map(repr, ("auto", *implementations_on(device), "reference")))
        raise ValueError(f"implementation={name!r} does not run on {device.platform}:{device.device_kind}; here run {runs}") from error


def choose(implementation: str, q: Any, kv_pages: Any, **options: Any) -> types.ModuleType:
    """Returns the module that serves a call: the one asked for, or the first behind it that can.

    What an implementation lacks is said once, in a warning that names it (Python shows the same warning from the same place
    once). An answer is never wrong for want of a feature.

    Args:
        implementation: A name, or ``auto``.
        q: Queries; their shape and dtype are looked at.
        kv_pages: The pool of one layer; shape and dtype.
        **options: ``sliding_window``, ``soft_cap``, ``sinks``, ``k_scale``, ``v_scale`` of the call.

    Raises:
        ValueError: There is no such implementation.
    """
    name = resolve(implementation)
    bits = "it reads floats, not their bits" if str(kv_pages.dtype) in BITS_OF else None
    while name in FALLS_TO:
        module = sibling(name)
        reason = bits or module.unsupported(q, kv_pages, **options)
        if reason is None:
            return module
        warnings.warn(
            f"paged attention: {name!r} cannot serve this call ({reason}); {FALLS_TO[name]!r} serves it", RuntimeWarning, stacklevel=3
        )
        name = FALLS_TO[name]
    return sibling(name)
