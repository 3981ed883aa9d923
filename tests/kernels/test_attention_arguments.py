"""Arguments that do not fit are refused at trace time, by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention import ragged_paged_attention, ragged_paged_attention_update

GOOD = {
    "q": jax.ShapeDtypeStruct((8, 6, 32), jnp.float32),
    "kv_pages": jax.ShapeDtypeStruct((10, 16, 4, 32), jnp.float32),
    "kv_lens": jax.ShapeDtypeStruct((3,), jnp.int32),
    "block_tables": jax.ShapeDtypeStruct((3, 5), jnp.int32),
    "cu_q_lens": jax.ShapeDtypeStruct((4,), jnp.int32),
    "distribution": jax.ShapeDtypeStruct((3,), jnp.int32),
}


def call(**changes):
    arrays = {name: changes.pop(name, value) for name, value in GOOD.items()}
    return jax.eval_shape(lambda **a: ragged_paged_attention(**a, sm_scale=0.1, **changes), **arrays)


def array(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_good_arguments_pass():
    assert call().shape == (8, 6, 32)
    out, lse = call(return_lse=True, sliding_window=4, soft_cap=2.0, sinks=jnp.zeros(6), k_scale=2.0)
    assert out.shape == (8, 6, 32)
    assert lse.shape == (8, 6)
    assert call(q=array(8, 6, 32, dtype=jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": array(8, 192, dtype=jnp.float32)}, r"q is float32\[8, 192\]: must be \[T, H, D\]"),
        ({"q": array(8, 6, 32)}, r"q is int32\[8, 6, 32\]: must be float32 or bfloat16 or float16"),
        ({"q": array(8, 5, 32, dtype=jnp.float32)}, r"q is .*H a multiple of K, here 2"),
        ({"q": array(8, 6, 64, dtype=jnp.float32)}, r"kv_pages is .*with q's D, here 64"),
        ({"kv_pages": array(10, 16, 3, 32, dtype=jnp.float32)}, r"kv_pages is .*axis 2 is even"),
        ({"kv_pages": array(10, 0, 4, 32, dtype=jnp.float32)}, r"kv_pages is .*above 0 on each axis"),
        ({"kv_pages": array(10, 16, 4, 32)}, r"kv_pages is int32.*must be float32 or .* or int8"),
        ({"kv_pages": array(10, 16, 4, 32, dtype=jnp.int8)}, r"k_scale is None: must be float32 .* for int8 pages, here \[10, 2, 16\]"),
        ({"kv_lens": array(3, 1)}, r"kv_lens is int32\[3, 1\]: must be \[S\]"),
        ({"kv_lens": array(3, dtype=jnp.float32)}, r"kv_lens is float32\[3\]: must be int32"),
        ({"block_tables": array(4, 5)}, r"block_tables is int32\[4, 5\]: must be \[S, P\], here \[3, any\]"),
        ({"block_tables": array(3, 0)}, r"block_tables is .*P above 0"),
        ({"cu_q_lens": array(3)}, r"cu_q_lens is int32\[3\]: must be \[S \+ 1\], here \[4\]"),
        ({"distribution": array(2)}, r"distribution is int32\[2\]: must be \[3\]"),
        ({"sliding_window": 0}, r"sliding_window is 0: must be a whole number above 0, or None"),
        ({"sliding_window": 2.5}, r"sliding_window is 2.5"),
        ({"soft_cap": -1.0}, r"soft_cap is -1.0: must be above 0, or None"),
        ({"sinks": jnp.zeros(5)}, r"sinks is float32\[5\]: must be \[H\], here \[6\]"),
        ({"k_scale": jnp.zeros(2)}, r"k_scale is float32\[2\]: must be a scalar, None, or \[N, K, B\], here \[10, 2, 16\]"),
        ({"v_scale": array(10, 2, 16)}, r"v_scale is int32.*must be float32"),
        ({"k_scale": 1.0, "v_scale": array(10, 2, 16, dtype=jnp.float32)}, r"v_scale is .*of k_scale's shape"),
        ({"implementation": "cuda"}, r"implementation='cuda': must be 'auto' or one of 'reference', 'xla', 'mosaic_gpu', 'triton', 'tpu'"),
    ],
)
def test_bad_argument_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="here it may run")
@pytest.mark.parametrize("implementation", ["triton", "mosaic_gpu", "tpu"])
@pytest.mark.parametrize("update", [False, True])
def test_an_implementation_that_does_not_run_here_is_refused_with_those_that_do(implementation, update):
    q, pages = jnp.ones((2, 4, 128), jnp.bfloat16), jnp.ones((4, 64, 4, 128), jnp.bfloat16)
    step = [jnp.array(values, jnp.int32) for values in ([1, 1], [[1], [2]], [0, 1, 2], [2, 2, 2])]
    with pytest.raises(
        ValueError, match=rf"^implementation='{implementation}' does not run on cpu:cpu; here run 'auto', 'xla', 'reference'$"
    ):
        if update:
            cells = (jnp.array([1, 2], jnp.int32), jnp.zeros(2, jnp.int32))
            ragged_paged_attention_update(q, q, pages, *step, *cells, sm_scale=1.0, implementation=implementation)
        else:
            ragged_paged_attention(q, pages, *step, sm_scale=1.0, implementation=implementation)
