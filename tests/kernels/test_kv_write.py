"""Writing keys and values into pages: right cells, padding dropped, in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_write import write_kv_pages


def make_write(dtype="float32", num_tokens=11, seed=0):
    rng = np.random.default_rng(seed)
    pages = rng.normal(size=(7, 4, 6, 8)).astype(np.float32)
    kv = rng.normal(size=(num_tokens, 6, 8)).astype(np.float32)
    cells = rng.permutation(4 * 6)[:num_tokens] + 4  # never the null page
    page_ids, offsets = (cells // 4).astype(np.int32), (cells % 4).astype(np.int32)
    page_ids[-3:] = 7  # padding
    return jnp.asarray(pages, dtype), jnp.asarray(kv), jnp.asarray(page_ids), jnp.asarray(offsets)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_agrees_with_the_reference(dtype):
    pages, kv, page_ids, offsets = make_write(dtype)
    want = write_kv_pages(pages, kv, page_ids, offsets, implementation="reference")
    got = jax.jit(write_kv_pages)(pages, kv, page_ids, offsets)
    assert got.dtype == pages.dtype
    assert np.array_equal(np.asarray(got), want)
    assert not np.array_equal(np.asarray(pages), want)


def test_padding_changes_nothing():
    pages, kv, page_ids, offsets = make_write()
    out = jax.jit(write_kv_pages)(pages, kv * jnp.nan, jnp.full_like(page_ids, 7), offsets)
    assert np.array_equal(np.asarray(out), np.asarray(pages))


def test_is_in_place_when_donated():
    pages = jax.ShapeDtypeStruct((4000, 16, 6, 64), jnp.float32)
    kv, ids = jax.ShapeDtypeStruct((64, 6, 64), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
    memory = jax.jit(write_kv_pages, donate_argnums=0).lower(pages, kv, ids, ids).compile().memory_analysis()
    pool_bytes = 4000 * 16 * 6 * 64 * 4
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes // 100


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("kv", lambda x: x[:, :4], r"kv is float32\[11, 4, 8\]: must be \[T, 2K, D\], here \[any, 6, 8\]"),
        ("kv_pages", lambda x: x[0], r"kv_pages is float32\[4, 6, 8\]: must be \[N, B, 2K, D\]"),
        ("page_ids", lambda x: x[:5], r"page_ids is int32\[5\]: must be int32 \[T\], here \[11\]"),
        ("offsets", lambda x: x.astype(jnp.float32), r"offsets is float32\[11\]: must be int32"),
        ("implementation", lambda _: "cuda", r"implementation='cuda': must be one of 'reference', 'xla'"),
    ],
)
def test_bad_argument_is_named(argument, change, message):
    arguments = dict(zip(("kv_pages", "kv", "page_ids", "offsets"), make_write(), strict=True)) | {"implementation": "xla"}
    arguments[argument] = change(arguments[argument])
    with pytest.raises(ValueError, match=message):
        write_kv_pages(**arguments)
