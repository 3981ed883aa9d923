"""Writing keys and values into pages: right cells, padding dropped, in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_write import write_kv_pages, write_quantized_kv_pages


def make_write(dtype="float32", num_tokens=11, seed=0):
    rng = np.random.default_rng(seed)
    pages = rng.normal(size=(7, 4, 6, 8)).astype(np.float32) * 50
    kv = rng.normal(size=(num_tokens, 6, 8)).astype(np.float32)
    cells = rng.permutation(4 * 6)[:num_tokens] + 4  # never the null page
    page_ids, offsets = (cells // 4).astype(np.int32), (cells % 4).astype(np.int32)
    page_ids[-3:] = 7  # padding
    return (
        jnp.asarray(np.abs(pages) if dtype.startswith("u") else pages).astype(dtype),
        jnp.asarray(kv),
        jnp.asarray(page_ids),
        jnp.asarray(offsets),
    )


def make_quantized_write(**options):
    """The same as int8: pages, scales, and tokens of very different sizes, one of them zero."""
    pages, kv, page_ids, offsets = make_write("int8", **options)
    scales = np.random.default_rng(2).uniform(0.1, 1, size=(2, 7, 3, 4)).astype(np.float32)
    sizes = 10.0 ** jnp.arange(-7, kv.shape[0] - 7)
    return pages, *map(jnp.asarray, scales), kv * sizes.at[1].set(0)[:, None, None], page_ids, offsets


def bits(array):
    """The array as whole numbers, so that NaN compare too."""
    array = np.asarray(array)
    return array.view(f"u{array.itemsize}")


@pytest.mark.parametrize("scales", [{}, {"k_scale": 0.25, "v_scale": 4.0}, {"v_scale": 0.5}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "uint8", "uint16"])
def test_agrees_with_the_reference(dtype, scales):
    pages, kv, page_ids, offsets = make_write(dtype)
    want = write_kv_pages(pages, kv, page_ids, offsets, **scales, implementation="reference")
    got = jax.jit(write_kv_pages)(pages, kv, page_ids, offsets, **scales)
    assert got.dtype == pages.dtype
    assert np.array_equal(bits(got), bits(want))
    assert not np.array_equal(bits(pages), bits(want))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "uint8"])
def test_e4m3_saturates_and_keeps_nan(dtype):
    values = jnp.array([1.0, 449.0, 1e6, -1e6, jnp.inf, -jnp.inf, jnp.nan, 2.0**-9])
    kv = jnp.broadcast_to(values, (1, 2, 8))
    for implementation in ("xla", "reference"):
        zero = jnp.zeros(1, jnp.int32)
        out = jnp.asarray(write_kv_pages(jnp.zeros((1, 1, 2, 8), dtype), kv, zero, zero, implementation=implementation))
        stored = (out if dtype != "uint8" else jax.lax.bitcast_convert_type(out, jnp.float8_e4m3fn)).astype(jnp.float32)
        np.testing.assert_array_equal(stored[0, 0, 1], [1, 448, 448, -448, 448, -448, np.nan, 2.0**-9])


def test_int8_agrees_with_the_reference():
    arguments = make_quantized_write()
    want = write_quantized_kv_pages(*arguments, implementation="reference")
    got = jax.jit(write_quantized_kv_pages)(*arguments)
    for array, expected, before in zip(got, want, arguments, strict=False):
        assert array.dtype == before.dtype
        atol = int(array.dtype == jnp.int8)  # a scale's last bit may send a half to the other side
        np.testing.assert_allclose(np.asarray(array, np.float32), np.asarray(expected, np.float32), rtol=1e-6, atol=atol)
        assert not np.array_equal(expected, before)
    assert np.mean(np.asarray(got[0]) != want[0]) < 0.01


def test_int8_times_its_scale_is_the_number():
    pages, k_scale, v_scale, kv, page_ids, offsets = make_quantized_write(num_tokens=14)
    pages, k_scale, v_scale = jax.jit(write_quantized_kv_pages)(pages, k_scale, v_scale, kv, page_ids, offsets)
    for token in range(11):
        page, offset = page_ids[token], offsets[token]
        scales = jnp.stack([k_scale[page, :, offset], v_scale[page, :, offset]], axis=1)[..., None]
        want = kv[token].reshape(3, 2, 8)
        error = jnp.abs(pages[page, offset].reshape(3, 2, 8) * scales - want)
        assert (error <= jnp.abs(want).max(-1, keepdims=True) / 254 * 1.001).all()


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
def test_a_fault_makes_one_scale_nan(fault):
    pages, k_scale, v_scale, kv, page_ids, offsets = make_quantized_write()
    kv = kv.at[2, 3, 5].set(fault)  # a value of head 1
    for implementation in ("xla", "reference"):
        written = write_quantized_kv_pages(pages, k_scale, v_scale, kv, page_ids, offsets, implementation=implementation)
        assert np.isfinite(written[1]).all()
        assert np.argwhere(np.isnan(written[2])).tolist() == [[int(page_ids[2]), 1, int(offsets[2])]]


def test_padding_changes_nothing():
    pages, kv, page_ids, offsets = make_write()
    out = jax.jit(write_kv_pages)(pages, kv * jnp.nan, jnp.full_like(page_ids, 7), offsets)
    assert np.array_equal(np.asarray(out), np.asarray(pages))
    *before, kv, page_ids, offsets = make_quantized_write()
    after = jax.jit(write_quantized_kv_pages)(*before, kv * jnp.nan, jnp.full_like(page_ids, 7), offsets)
    assert all(np.array_equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "uint16", "int8"])
def test_is_in_place_when_donated(dtype):
    """On a CPU, float8_e4m3fn is not, nor is bfloat16 with jaxlib 0.10.2, since XLA widens the pool; their bits are."""
    pages, scale = jax.ShapeDtypeStruct((4000, 16, 6, 64), dtype), jax.ShapeDtypeStruct((4000, 3, 16), jnp.float32)
    kv, ids = jax.ShapeDtypeStruct((64, 6, 64), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
    write, pool = (write_quantized_kv_pages, (pages, scale, scale)) if dtype == "int8" else (write_kv_pages, (pages,))
    memory = jax.jit(write, donate_argnums=tuple(range(len(pool)))).lower(*pool, kv, ids, ids).compile().memory_analysis()
    pool_bytes = sum(array.size * array.dtype.itemsize for array in pool)
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes // 100


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        (
            "kv_pages",
            lambda x: x.astype(jnp.int8),
            r"kv_pages is int8\[7, 4, 6, 8\]: must be float32 .*write_quantized_kv_pages writes int8",
        ),
        ("k_scale", lambda _: jnp.ones(3), r"k_scale is float32\[3\]: must be a scalar, or None"),
        ("kv", lambda x: x[:, :4], r"kv is float32\[11, 4, 8\]: must be \[T, 2K, D\], here \[any, 6, 8\]"),
        ("kv_pages", lambda x: x[0], r"kv_pages is float32\[4, 6, 8\]: must be \[N, B, 2K, D\]"),
        ("page_ids", lambda x: x[:5], r"page_ids is int32\[5\]: must be int32 \[T\], here \[11\]"),
        ("offsets", lambda x: x.astype(jnp.float32), r"offsets is float32\[11\]: must be int32"),
        ("implementation", lambda _: "cuda", r"implementation='cuda': must be one of 'reference', 'xla'"),
    ],
)
def test_bad_argument_is_named(argument, change, message):
    arguments = dict(zip(("kv_pages", "kv", "page_ids", "offsets"), make_write(), strict=True)) | {"implementation": "xla"}
    arguments[argument] = change(arguments.get(argument))
    with pytest.raises(ValueError, match=message):
        write_kv_pages(**arguments)


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("kv_pages", lambda x: x.astype(jnp.float32), r"kv_pages is float32\[7, 4, 6, 8\]: must be int8"),
        ("k_scale", lambda x: x.swapaxes(1, 2), r"k_scale is float32\[7, 4, 3\]: must be float32 \[N, K, B\], here \[7, 3, 4\]"),
        ("v_scale", lambda x: x.astype(jnp.float16), r"v_scale is float16\[7, 3, 4\]: must be float32"),
        ("page_ids", lambda x: x[:5], r"page_ids is int32\[5\]: must be int32 \[T\], here \[11\]"),
        ("implementation", lambda _: "cuda", r"implementation='cuda': must be one of 'reference', 'xla'"),
    ],
)
def test_bad_argument_of_the_int8_write_is_named(argument, change, message):
    names = ("kv_pages", "k_scale", "v_scale", "kv", "page_ids", "offsets")
    arguments = dict(zip(names, make_quantized_write(), strict=True)) | {"implementation": "xla"}
    arguments[argument] = change(arguments[argument])
    with pytest.raises(ValueError, match=message):
        write_quantized_kv_pages(**arguments)
