"""What is timed in jax: our implementations, a plain gather, jax's own paged kernel, and cuDNN without pages."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernel_bench.cases import Data
from kernel_bench.timing import layer_seconds
from pallas_kernels.paged_attention import implementations_on, make_work_list, ragged_paged_attention


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something that attends.

    Attributes:
        name: For people.
        run: From a case's data to the first layer's result and the seconds that a layer takes.
    """

    name: str
    run: Callable[[Data], tuple[Any, float]]


class Unavailable(Exception):
    """This contender does not serve this case, or is not installed; the message says why."""


def contenders(device: Any) -> Iterator[Contender]:
    """Returns who runs on a device, ours first."""
    for name in implementations_on(device):
        yield Contender(f"ours: {name}", _ours(name))
    yield Contender("plain gather, einsum", _in_jax(_gather_and_einsum, lambda data, pool: pool, decodes_only=True))
    if device.platform == "gpu":
        yield Contender("jax's paged kernel", _jax_paged)
        yield Contender("cuDNN, no pages (jax)", _in_jax(_cudnn, lambda data, pool: data.contiguous(pool)))
        for module in ("torch_peers", "flashinfer_peers"):
            yield from _optional(module)


def _ours(implementation: str) -> Callable[[Data], tuple[Any, float]]:
    def run(data: Data) -> tuple[Any, float]:
        case = data.case

        def prepare(tables: Any) -> Any:
            sizes = {"num_tokens": data.q.shape[0], "page_size": case.page_size, "table_width": tables[1].shape[1]}
            return make_work_list(tables[0], tables[2], tables[3], **sizes, implementation=implementation)

        def attend(q: Any, pool: Any, tables: Any, work: Any) -> Any:
            return ragged_paged_attention(q, pool, *tables, sm_scale=case.sm_scale, implementation=implementation, work=work)

        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # a fallback would be timed under a wrong name
            return _timed(attend, prepare, data, data.pools)

    return run


def _timed(attend: Callable[..., Any], prepare: Callable[..., Any], data: Data, layers: list[Any]) -> tuple[Any, float]:
    first = jax.jit(lambda q, layer, shared: attend(q, layer, shared, prepare(shared)))(data.q, layers[0], data.tables)
    return first, layer_seconds(attend, prepare, data.q, layers, data.tables)


def _in_jax(
    attend: Callable[..., Any], layer_of: Callable[[Data, Any], Any], *, decodes_only: bool = False
) -> Callable[[Data], tuple[Any, float]]:
    def run(data: Data) -> tuple[Any, float]:
        if decodes_only and not data.case.decodes:
            raise Unavailable("single-token rows only")
        layers = [layer_of(data, pool) for pool in data.pools]
        return _timed(lambda q, layer, tables, _: attend(data, q, layer, tables), lambda tables: None, data, layers)

    return run


def _gather_and_einsum(data: Data, q: Any, pages: Any, tables: Any) -> Any:
    """The plain way: gather each row's whole table, then two einsums."""
    rows, _, head_dim = q.shape
    kv = pages[tables[1]].reshape(rows, -1, pages.shape[2] // 2, 2, head_dim)
    scores = jnp.einsum("skgd,sckd->skgc", q.reshape(rows, kv.shape[2], -1, head_dim), kv[:, :, :, 0]) * data.case.sm_scale
    seen = jnp.arange(kv.shape[1]) < tables[0][:, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("skgc,sckd->skgd", weights, kv[:, :, :, 1]).reshape(q.shape)


def _cudnn(data: Data, q: Any, layer: Any, tables: Any) -> Any:
    """The lower bound: the same attention over keys and values that lie in one piece."""
    case = data.case
    q = q.reshape(case.rows, case.q_len, *q.shape[1:])
    options = {"scale": case.sm_scale, "implementation": "cudnn"}
    if data.lens.min() != data.lens.max():
        options |= {"query_seq_lengths": jnp.ones(case.rows, jnp.int32), "key_value_seq_lengths": tables[0]}
    return jax.nn.dot_product_attention(q, *layer, is_causal=not case.decodes, **options).reshape(data.q.shape)


def _jax_paged(data: Data) -> tuple[Any, float]:
    """jax.experimental.pallas.ops.gpu.paged_attention: decode only, head-major pools for K and V, 16 splits of the table's width."""
    if not data.case.decodes:
        raise Unavailable("single-token rows only")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")
    splits = min(16, data.tables[1].shape[1])

    def attend(data: Data, q: Any, layer: Any, tables: Any) -> Any:
        q = q * jnp.asarray(data.case.sm_scale, q.dtype)  # it has no scale of its own
        # Blocks of one page of 64 tokens: with its default of 8 pages it asks for more shared memory than there is.
        return module.paged_attention(q, *layer, tables[1], tables[0], pages_per_compute_block=1, k_splits=splits)

    def head_major(data: Data, pool: Any) -> Any:
        return tuple(pool[:, :, first::2].transpose(2, 0, 1, 3) for first in (0, 1))

    return _in_jax(attend, head_major)(data)


def _optional(module: str) -> Iterator[Contender]:
    try:
        yield from importlib.import_module(f"kernel_bench.{module}").contenders()
    except ImportError as error:
        reason = f"{error.name or module} is not installed"

        def run(data: Data) -> tuple[Any, float]:
            raise Unavailable(reason)

        yield Contender({"torch_peers": "torch SDPA, no pages", "flashinfer_peers": "FlashInfer"}[module], run)
