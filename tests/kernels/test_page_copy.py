"""Copying pages: right pages, sources read first, padding dropped, in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.page_copy import copy_first_pages, copy_pages

SHAPES = {"float32": (9, 4, 6, 8), "int8": (9, 4, 6, 8), "uint8": (9, 4, 6, 8), "scales": (9, 3, 4)}


def make_pages(name):
    pages = np.random.default_rng(0).integers(-100, 100, size=SHAPES[name])
    return jnp.asarray(pages.astype("float32" if name == "scales" else name))


def ids(*values):
    return jnp.array(values, jnp.int32)


@pytest.mark.parametrize("name", SHAPES)
def test_agrees_with_the_reference(name):
    pages, src, dst = make_pages(name), ids(1, 1, 3, 8, 0, 5), ids(2, 4, 7, 0, 9, 12)
    want = copy_pages(pages, src, dst, implementation="reference")
    got = jax.jit(copy_pages)(pages, src, dst)
    assert np.array_equal(got, want)
    for page, source in enumerate([8, 1, 1, 3, 1, 5, 6, 3, 8]):
        assert np.array_equal(want[page], pages[source])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_sources_are_read_before_anything_is_written(implementation):
    pages = make_pages("float32")
    out = copy_pages(pages, ids(1, 2, 3), ids(2, 3, 1), implementation=implementation)
    assert np.array_equal(out, pages[np.array([0, 3, 1, 2, 4, 5, 6, 7, 8])])


def test_padding_changes_nothing():
    pages = make_pages("float32").at[3].set(jnp.nan)
    assert np.array_equal(jax.jit(copy_pages)(pages, ids(3, 3, 0), ids(9, 9, 9)), pages, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8", "uint16"])
def test_is_in_place_when_donated(dtype):
    pages, pairs = jax.ShapeDtypeStruct((4000, 16, 6, 64), dtype), jax.ShapeDtypeStruct((8,), jnp.int32)
    memory = jax.jit(copy_pages, donate_argnums=0).lower(pages, pairs, pairs).compile().memory_analysis()
    pool_bytes = pages.size * pages.dtype.itemsize
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes // 100


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("kv_pages", jnp.zeros(9), r"kv_pages is float32\[9\]: must be \[N, ...\]"),
        ("src", ids(1, 2, 3), r"dst is int32\[2\]: must be int32 \[M\], src and dst alike"),
        ("src", jnp.zeros(2), r"src is float32\[2\]: must be int32 \[M\]"),
        ("dst", jnp.zeros((2, 1), jnp.int32), r"dst is int32\[2, 1\]: must be int32 \[M\]"),
        ("implementation", "cuda", r"implementation='cuda': must be one of 'reference', 'xla'"),
    ],
)
def test_bad_argument_is_named(argument, value, message):
    arguments = {"kv_pages": make_pages("float32"), "src": ids(1, 2), "dst": ids(3, 4), "implementation": "xla"} | {argument: value}
    with pytest.raises(ValueError, match=message):
        copy_pages(**arguments)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_first_pairs_are_copied_in_all_arrays(count):
    pages = {name: make_pages(name) for name in ("float32", "scales")}
    src, dst = ids(1, 1, 8), ids(2, 4, 0)
    got = jax.jit(copy_first_pages)(pages, src, dst, jnp.int32(count))
    for name, array in pages.items():
        assert np.array_equal(got[name], copy_pages(array, src[:count], dst[:count], implementation="reference"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8", "uint16"])
def test_the_first_pairs_are_copied_in_place_when_donated(dtype):
    pages, pairs = [jax.ShapeDtypeStruct((4000, 16, 6, 64), dtype)] * 2, jax.ShapeDtypeStruct((64,), jnp.int32)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    memory = jax.jit(copy_first_pages, donate_argnums=0).lower(pages, pairs, pairs, count).compile().memory_analysis()
    page_bytes = pages[0].size // 4000 * pages[0].dtype.itemsize
    assert memory.alias_size_in_bytes >= 2 * 4000 * page_bytes
    assert memory.temp_size_in_bytes < 8 * page_bytes + 4096
