"""Pages that go to host memory and come back: every bit, in order, without a copy of the pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.engine.host_pages import _CHUNK_BYTES, _MAX_CHUNKS, HostPages, _chunk_sizes, _joined, put_pages, staging_bytes, take_pages
from jaxpaged.scheduling.plan import Transfer
from jaxpaged.state import KVPages, PagePool

LAYERS, PAGES, HOST = 3, 40, 50
DTYPES = ["float32", "int8", "uint8", "uint16", "float16"]


def make_pool(dtype="float32", seed=0):
    """Random bits, the null page among them, so that a wrong page shows."""
    rng = np.random.default_rng(seed)

    def draw(shape, dtype):
        words = rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
        return jnp.asarray(words.view(dtype)[..., 0])

    def make_layer():
        scales = [draw((PAGES, 2, 4), "float32") for _ in range(2)] if dtype == "int8" else []
        return KVPages(draw((PAGES, 4, 4, 8), dtype), *scales)

    return PagePool(tuple(make_layer() for _ in range(LAYERS)))


def bits(pool):
    return [np.asarray(array).view(np.uint8).copy() for array in jax.tree.leaves(pool)]


def assert_pages(pool, expected):
    """Compares each page of the pool with the page of the first pool whose id is expected there."""
    for now, was in zip(bits(pool), expected["bits"], strict=True):
        np.testing.assert_array_equal(now, was[expected["pages"]])


def out(pages, places):
    return [Transfer(True, page, place) for page, place in zip(pages, places, strict=True)]


def back(pages, places):
    return [Transfer(False, page, place) for page, place in zip(pages, places, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 4, 7, 33])
def test_pages_come_back_bit_by_bit_to_where_they_are_wanted_and_nothing_else_changes(dtype, count):
    pool = make_pool(dtype)
    before, host, rng = bits(pool), HostPages(pool, HOST), np.random.default_rng(count)
    pages, targets = rng.choice(PAGES, count, replace=False), rng.choice(PAGES, count, replace=False)
    places = rng.choice(HOST, count, replace=False) + 1
    pool = host.run(pool, out(pages.tolist(), places.tolist()))
    for was, now in zip(before, bits(pool), strict=True):
        np.testing.assert_array_equal(was, now)
    pool = host.run(pool, back(targets.tolist(), places.tolist()))
    expected = np.arange(PAGES)
    expected[targets] = pages
    assert_pages(pool, {"bits": before, "pages": expected})


def test_a_plans_moves_take_effect_in_order():
    pool = make_pool()
    before, host = bits(pool), HostPages(pool, HOST)
    moves = [
        *out([5, 6], [1, 2]),
        *back([7], [1]),  # reads what is still on its way
        *out([7, 8], [2, 3]),  # overwrites a place, from a page that has just come
        *back([9, 10], [2, 3]),
        *out([9], [4]),
        *back([5, 5], [4, 3]),  # the same page again: the later one wins
    ]
    pool = host.run(pool, moves)
    expected = np.arange(PAGES)
    expected[[7, 9, 10, 5]] = 5, 5, 8, 8
    assert_pages(pool, {"bits": before, "pages": expected})


def test_neighbours_are_joined_unless_they_write_to_the_same():
    joined = list(_joined([*out([1, 1, 2, 3], [4, 5, 6, 5]), *back([7, 8, 8], [4, 4, 5]), *out([9], [9])]))
    assert joined == [(True, [1, 1, 2], [4, 5, 6]), (True, [3], [5]), (False, [7, 8], [4, 4]), (False, [8], [5]), (True, [9], [9])]
    assert list(_joined([])) == []


def test_random_moves_agree_with_a_model():
    rng = np.random.default_rng(1)
    pool = make_pool("int8")
    before, host = bits(pool), HostPages(pool, 12)
    device, stored = np.arange(PAGES), np.zeros(13, int)
    written: set[int] = set()
    for _ in range(60):
        plan = []
        for _ in range(rng.integers(1, 5)):
            count = int(rng.integers(1, 8))
            pages, places = rng.choice(PAGES, count, replace=False), rng.choice(12, count, replace=False) + 1
            if rng.random() < 0.5:
                plan += out(pages.tolist(), places.tolist())
                stored[places] = device[pages]
                written.update(places.tolist())
            elif written.issuperset(places.tolist()):
                plan += back(pages.tolist(), places.tolist())
                device[pages] = stored[places]
        pool = host.run(pool, plan)
        if rng.random() < 0.3:
            host.settle(wait=bool(rng.random() < 0.5))
    assert_pages(pool, {"bits": before, "pages": device})


def test_host_memory_is_nobodys_alias():
    """A page on the host stays what it was when the page of the pool changes, and the other way round."""
    pool = make_pool()
    before, host = bits(pool), HostPages(pool, HOST)
    pool = host.run(pool, out([3], [1]))
    host.settle(wait=True)
    pool = host.run(pool, out([4], [2]) + back([3], [2]))  # page 3 changes
    pool = host.run(pool, back([5], [1]))
    for stored in host._stored:
        stored[:] = 0
    expected = np.arange(PAGES)
    expected[[3, 5]] = 4, 3
    assert_pages(pool, {"bits": before, "pages": expected})


def test_pages_on_their_way_are_bounded_and_can_be_forgotten():
    pool = make_pool()
    before, host = bits(pool), HostPages(pool, HOST)
    for place in range(1, 2 * _MAX_CHUNKS):
        pool = host.run(pool, out([place], [place]))
        assert len(host._leaving) <= _MAX_CHUNKS
    pool = host.run(pool, out([30], [1]))
    host.forget()
    pool = host.run(pool, back([20], [1]))  # what was stored before
    expected = np.arange(PAGES)
    expected[20] = 1
    assert_pages(pool, {"bits": before, "pages": expected})
    host.settle(wait=True)
    assert not host._leaving


@pytest.mark.parametrize("dtype", DTYPES)
def test_putting_pages_back_is_in_place_and_taking_them_copies_no_more_than_them(dtype):
    pool = jax.eval_shape(lambda: PagePool(tuple(KVPages(jnp.zeros((4000, 16, 6, 64), dtype)) for _ in range(2))))
    ids, page_bytes = jax.ShapeDtypeStruct((4,), jnp.int32), pool.num_bytes // 4000
    parts = (jax.ShapeDtypeStruct((4, 16, 6, 64), dtype),) * 2
    memory = put_pages.lower(pool, ids, parts).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= pool.num_bytes
    assert memory.temp_size_in_bytes < 16 * page_bytes
    memory = take_pages.lower(pool, ids).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 16 * page_bytes


def test_chunks_are_bounded_in_bytes_and_a_page_always_fits():
    assert _chunk_sizes(1024) == (16, 4, 1)
    assert _chunk_sizes(_CHUNK_BYTES // 4) == (4, 1)
    assert _chunk_sizes(2 * _CHUNK_BYTES) == (1,)
    assert staging_bytes(_CHUNK_BYTES // 4) == 2 * _MAX_CHUNKS * _CHUNK_BYTES


def test_measuring_changes_no_page_and_needs_host_memory():
    pool = make_pool("int8")
    before = bits(pool)
    pool, count, seconds = HostPages(pool, 10).measure(pool)
    assert count == 10 and seconds > 0
    assert_pages(pool, {"bits": before, "pages": np.arange(PAGES)})
    assert HostPages(pool, 0).measure(pool)[1:] == (0, 0.0)


@pytest.mark.parametrize("wrong", [out([PAGES], [1]), out([-1], [1]), out([1], [0]), back([1], [HOST + 1])])
def test_pages_and_places_that_do_not_exist_are_refused_before_anything_moves(wrong):
    pool = make_pool()
    before, host = bits(pool), HostPages(pool, HOST)
    with pytest.raises(ValueError, match="pages are in"):
        host.run(pool, [*back([2], [1]), *wrong])
    assert_pages(pool, {"bits": before, "pages": np.arange(PAGES)})
