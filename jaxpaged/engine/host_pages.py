"""Pages in host memory: swapped-out requests and the second tier of the prefix cache, moved to and from the pool between steps.

On its way out a page is gathered on the device, which a step may follow at once, and stored here when it has arrived or, at the latest,
when somebody wants it back. So the order in which moves are asked for is the order
in which they take effect, and nobody waits but for a page that is not here yet.
"""

from __future__ import annotations

import itertools
import operator
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, Shaped

from jaxpaged.scheduling.plan import Transfer
from jaxpaged.state import PagePool

_CHUNK_SIZES = (1, 4, 16)
"""Pages that one program moves; a transfer is cut into these, the largest first, so that none moves padding."""
_CHUNK_BYTES = 32 * 2**20
"""Most bytes of a chunk of more than one page."""
_MAX_CHUNKS = 8
"""Chunks that may be on their way in one direction; each takes its bytes on the device until it has arrived."""
_MEASURED_CHUNKS = 4

Part = Shaped[Array, "C ..."]
"""C pages of one layer: keys and values, or scales. Layers are not stacked: on a CPU that takes longer than the move itself."""


class _Leaving(NamedTuple):
    """Pages on their way to the host."""

    host_ids: Int[np.ndarray, " C"]
    parts: tuple[Any, ...]


def staging_bytes(page_bytes: int) -> int:
    """Returns the most device memory, in bytes, that pages on their way take beside the pool."""
    return 2 * _MAX_CHUNKS * _chunk_sizes(page_bytes)[0] * page_bytes


class HostPages:
    """Holds pages in host memory, and moves them. Not thread-safe.

    The operating system gives the memory when a page is first stored.

    Args:
        pool: Gives the shape of a page; not kept.
        num_pages: Places, with ids from 1.

    Attributes:
        programs: The compiled moves, by direction and number of pages.
    """

    def __init__(self, pool: PagePool, num_pages: int) -> None:
        self.num_pages = num_pages
        self.chunk_sizes = _chunk_sizes(pool.num_bytes // pool.num_pages) if num_pages else ()
        self.programs: dict[tuple[bool, int], Any] = {}
        self._stored = [_reserve(num_pages, array.shape[1:], array.dtype) for array in jax.tree.leaves(pool)]
        self._leaving: deque[_Leaving] = deque()

    @property
    def num_programs(self) -> int:
        """How many programs ``compile`` makes in all."""
        return 2 * len(self.chunk_sizes)

    def compile(self, pool: PagePool) -> Iterator[None]:
        """Compiles what is not compiled yet, a program at a time."""
        for size in self.chunk_sizes:
            for to_host in (True, False):
                if (to_host, size) not in self.programs:
                    self.programs[to_host, size] = self._compile(pool, to_host=to_host, size=size)
                    yield

    def run(self, pool: PagePool, transfers: Sequence[Transfer]) -> PagePool:
        """Starts the moves, in order.

        Args:
            pool: Gone afterwards if a page comes back to it.
            transfers: From and to pages of the pool and places of the host that exist.

        Returns:
            The pool with the pages that came back.

        Raises:
            ValueError: A page or a place does not exist; nothing has moved then.
        """
        for transfer in transfers:
            self._check(transfer, pool.num_pages)
        returning = 0
        for to_host, page_ids, host_ids in _joined(transfers):
            for at, size in self._cut(len(page_ids)):
                pages, places = np.array(page_ids[at : at + size], np.int32), np.array(host_ids[at : at + size]) - 1
                if to_host:
                    self._send(pool, pages, places)
                    continue
                pool = self._bring(pool, pages, places)
                returning += 1
                if returning % _MAX_CHUNKS == 0:
                    _wait(pool)
        return pool

    def close(self) -> None:
        """Frees everything."""
        self._leaving.clear()
        self._stored.clear()
        self.programs.clear()

    def settle(self, *, wait: bool = False) -> None:
        """Stores the pages that have arrived; with ``wait``, all that are on their way."""
        while self._leaving and (wait or all(part.is_ready() for part in self._leaving[0].parts)):
            self._store_oldest()

    def forget(self) -> None:
        """Drops the pages that are on their way: the step that they follow has failed. Their places hold anything then."""
        self._leaving.clear()

    def measure(self, pool: PagePool) -> tuple[PagePool, int, float]:
        """Times moves there and back, and overwrites what host memory holds.

        Returns:
            The pool, unchanged; pages moved; and seconds, with nothing else running.
        """
        if not self.chunk_sizes:
            return pool, 0, 0.0
        count = min(self.chunk_sizes[0] * _MEASURED_CHUNKS, self.num_pages, pool.num_pages)
        seconds = 0.0
        for _ in range(2):  # the first makes the operating system give the memory
            _wait(pool)
            started = time.perf_counter()
            pool = self.run(pool, [Transfer(True, page_id, page_id + 1) for page_id in range(count)])
            self.settle(wait=True)
            pool = self.run(pool, [Transfer(False, page_id, page_id + 1) for page_id in range(count)])
            _wait(pool)
            seconds = time.perf_counter() - started
        return pool, count, seconds

    def _send(self, pool: PagePool, pages: Int[np.ndarray, " C"], places: Int[np.ndarray, " C"]) -> None:
        if len(self._leaving) == _MAX_CHUNKS:
            self._store_oldest()
        parts = self._program(pool, to_host=True, size=len(pages))(pool, pages)
        for part in parts:
            part.copy_to_host_async()
        self._leaving.append(_Leaving(places, parts))

    def _bring(self, pool: PagePool, pages: Int[np.ndarray, " C"], places: Int[np.ndarray, " C"]) -> PagePool:
        wanted = set(places.tolist())
        awaited = [index for index, leaving in enumerate(self._leaving) if not wanted.isdisjoint(leaving.host_ids.tolist())]
        for _ in range(awaited[-1] + 1 if awaited else 0):
            self._store_oldest()
        parts = tuple(stored[places] for stored in self._stored)  # copies: a device may alias NumPy's memory
        returned: PagePool = self._program(pool, to_host=False, size=len(pages))(pool, pages, parts)
        return returned

    def _store_oldest(self) -> None:
        leaving = self._leaving.popleft()
        for stored, part in zip(self._stored, leaving.parts, strict=True):
            stored[leaving.host_ids] = np.asarray(part)

    def _program(self, pool: PagePool, *, to_host: bool, size: int) -> Any:
        if (to_host, size) not in self.programs:
            self.programs[to_host, size] = self._compile(pool, to_host=to_host, size=size)
        return self.programs[to_host, size]

    def _compile(self, pool: PagePool, *, to_host: bool, size: int) -> Any:
        ids = np.zeros(size, np.int32)
        if to_host:
            return take_pages.lower(pool, ids).compile()
        parts = tuple(np.zeros((size, *stored.shape[1:]), stored.dtype) for stored in self._stored)
        return put_pages.lower(pool, ids, parts).compile()

    def _cut(self, count: int) -> Iterator[tuple[int, int]]:
        """Yields where each chunk begins and how many pages it has."""
        at = 0
        while at < count:
            size = next(size for size in self.chunk_sizes if size <= count - at)
            yield at, size
            at += size

    def _check(self, transfer: Transfer, num_pages: int) -> None:
        if not (0 <= transfer.page_id < num_pages and 1 <= transfer.host_id <= self.num_pages):
            raise ValueError(f"pages are in [0, {num_pages}), places in [1, {self.num_pages}]; got {transfer}")


@jax.jit
def take_pages(pool: PagePool, page_ids: Int[Array, " C"]) -> tuple[Part, ...]:
    """Returns some pages of every array of a pool."""
    return tuple(array.at[page_ids].get(mode="promise_in_bounds") for array in jax.tree.leaves(pool))


def _put_pages(pool: PagePool, page_ids: Int[Array, " C"], parts: tuple[Part, ...]) -> PagePool:
    arrays, structure = jax.tree.flatten(pool)
    written = [array.at[page_ids].set(part, unique_indices=True) for array, part in zip(arrays, parts, strict=True)]
    returned: PagePool = jax.tree.unflatten(structure, written)
    return returned


put_pages = jax.jit(_put_pages, donate_argnums=0)
"""Puts pages as ``take_pages`` returns them into a pool, in place."""


def _wait(pool: PagePool) -> None:
    """Waits for what was asked of the pool; one program writes all layers."""
    pool.layers[0].kv.block_until_ready()


def _chunk_sizes(page_bytes: int) -> tuple[int, ...]:
    """Largest first; one page at least."""
    return tuple(size for size in reversed(_CHUNK_SIZES) if size == 1 or size * page_bytes <= _CHUNK_BYTES)


def _reserve(num_pages: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Shaped[np.ndarray, "H ..."]:
    """Zeros that take no memory until they are written to."""
    count = num_pages * int(np.prod(shape)) * dtype.itemsize
    return np.zeros(count, np.uint8).view(dtype).reshape(num_pages, *shape)


def _joined(transfers: Sequence[Transfer]) -> Iterator[tuple[bool, list[int], list[int]]]:
    """Yields direction, pages and places of neighbours that write to different pages: a chunk of many is cheaper than many chunks."""
    for to_host, neighbours in itertools.groupby(transfers, key=operator.attrgetter("to_host")):
        page_ids: list[int] = []
        host_ids: list[int] = []
        written: set[int] = set()
        for _, page_id, host_id in neighbours:
            target = host_id if to_host else page_id
            if target in written:
                yield to_host, page_ids, host_ids
                page_ids, host_ids, written = [], [], set()
            page_ids.append(page_id)
            host_ids.append(host_id)
            written.add(target)
        yield to_host, page_ids, host_ids
