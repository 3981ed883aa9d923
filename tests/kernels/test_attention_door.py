"""jaxpaged.attention: metadata of a step, and write-then-attend over several layers in place."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.attention import attention_metadata, paged_attention
from jaxpaged.state import KVPages, StepInputs

PAGE_SIZE = 4


def make_inputs():
    """Two decodes, at positions 4 and 9, a row with three new tokens from position 6 on, one padding row and three padding tokens."""
    inputs = StepInputs.zeros(8, 4, 5, max_num_seqs=4)
    inputs.positions[:5] = [4, 9, 6, 7, 8]
    inputs.kv_lens[:3] = [5, 10, 9]
    inputs.cu_q_lens[:] = [0, 1, 2, 5, 5]
    inputs.distribution[:] = [2, 2, 3]
    inputs.block_tables[:3] = [[3, 1, 0, 0, 0], [2, 4, 5, 0, 0], [6, 8, 7, 0, 0]]
    return inputs


def test_metadata_says_where_each_token_is_written():
    metadata = jax.jit(lambda inputs: attention_metadata(inputs, num_pages=9, page_size=PAGE_SIZE))(make_inputs())
    assert metadata.write_pages.tolist() == [1, 5, 8, 8, 7, 9, 9, 9]
    assert metadata.write_offsets[:5].tolist() == [0, 1, 2, 3, 0]
    assert metadata.kv_lens.tolist() == [5, 10, 9, 0]


def test_a_step_of_padding_writes_nothing():
    inputs = StepInputs.zeros(4, 2, 3, max_num_seqs=2)
    metadata = attention_metadata(inputs, num_pages=9, page_size=PAGE_SIZE)
    assert metadata.write_pages.tolist() == [9, 9, 9, 9]


def test_writes_then_attends():
    rng = np.random.default_rng(0)
    pages = rng.normal(size=(9, PAGE_SIZE, 4, 16)).astype(np.float32)
    q, k, v = (rng.normal(size=(8, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
    inputs = make_inputs()

    def layer(q, k, v, pages, inputs):
        metadata = attention_metadata(inputs, num_pages=9, page_size=PAGE_SIZE)
        out, pages = paged_attention(q, k, v, KVPages(pages), metadata, sm_scale=0.25)
        return out, pages.kv

    out, new_pages = jax.jit(layer)(q, k, v, pages, inputs)
    want = pages.copy()
    for token, (page, offset) in enumerate([(1, 0), (5, 1), (8, 2), (8, 3), (7, 0)]):
        want[page, offset, 0::2], want[page, offset, 1::2] = k[token], v[token]
    assert np.array_equal(new_pages, want)
    for token, (table, position) in enumerate([([3, 1], 4), ([2, 4, 5], 9), ([6, 8, 7], 6), ([6, 8, 7], 7), ([6, 8, 7], 8)]):
        kv = want[table].reshape(-1, 4, 16)[: position + 1]
        for head in range(4):
            scores = kv[:, 2 * (head // 2)] @ q[token, head] * 0.25
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(out[token, head], weights @ kv[:, 2 * (head // 2) + 1] / weights.sum(), rtol=2e-5, atol=2e-6)
    assert not np.asarray(out[5:]).any()


def test_unknown_implementation_is_named():
    metadata = attention_metadata(make_inputs(), num_pages=9, page_size=PAGE_SIZE)
    zeros = jnp.zeros((8, 2, 16))
    with pytest.raises(ValueError, match="implementation='cuda': must be 'auto' or one of 'reference', 'xla'"):
        paged_attention(zeros, zeros, zeros, KVPages(jnp.zeros((9, PAGE_SIZE, 4, 16))), metadata, sm_scale=1.0, implementation="cuda")


@pytest.mark.parametrize("head_dim", [16, 12])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16"])
def test_stored_in_fewer_bits_and_wider_heads_it_is_the_same_attention(dtype, head_dim):
    """e4m3 keeps 4 bits of a number and bfloat16 8; int8 rounds to 1/254 of a head's largest."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(8, heads, head_dim)).astype(np.float32) for heads in (4, 2, 2))
    inputs = make_inputs()
    inputs.block_tables[:3] = [[1, 0, 0, 0, 0], [5, 0, 0, 0, 0], [8, 7, 0, 0, 0]]
    inputs.positions[:5] = [0, 0, 0, 1, 2]
    inputs.kv_lens[:3] = [1, 1, 3]

    @jax.jit
    def layer(q, k, v, pages, inputs):
        metadata = attention_metadata(inputs, num_pages=9, page_size=PAGE_SIZE)
        return paged_attention(q, k, v, pages, metadata, sm_scale=0.25)

    zeros = jnp.zeros((2, 9, 2, PAGE_SIZE))
    want, _ = layer(q, k, v, KVPages(jnp.zeros((9, PAGE_SIZE, 4, head_dim))), inputs)
    out, pages = layer(q, k, v, KVPages(jnp.zeros((9, PAGE_SIZE, 4, 16), dtype), *(zeros if dtype == "int8" else ())), inputs)
    assert out.shape == want.shape
    error = float(jnp.sqrt(jnp.mean((out - want) ** 2) / jnp.mean(want**2)))
    assert 1e-5 < error < {"int8": 0.01, "uint8": 0.05, "uint16": 0.005}[dtype]
    assert not np.asarray(pages.kv)[..., head_dim:].any()


def test_a_fault_in_int8_pages_shows_in_its_own_row():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(8, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
    k[1, 1, 3] = np.nan  # head 1 of the second row's token
    inputs = make_inputs()

    @jax.jit
    def layer(q, k, v, pages, inputs):
        metadata = attention_metadata(inputs, num_pages=9, page_size=PAGE_SIZE)
        return paged_attention(q, k, v, pages, metadata, sm_scale=0.25)[0]

    pages = KVPages(jnp.zeros((9, PAGE_SIZE, 4, 16), jnp.int8), *jnp.zeros((2, 9, 2, PAGE_SIZE)))
    out = np.asarray(layer(q, k, v, pages, inputs))
    assert np.isnan(out[1, 2:]).all()
    assert np.isfinite(np.delete(out, 1, axis=0)).all()
    assert np.isfinite(out[1, :2]).all()


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "dtype"),
    [(1, 1, "float32"), (32, 32, "float32"), (256, 32, "float32"), (32, 32, "int8"), (32, 32, "uint8"), (32, 32, "uint16")],
)
def test_layers_update_the_donated_pool_in_place(num_tokens, num_rows, dtype):
    heads, kv_heads, head_dim, num_pages, layers = 4, 2, 64, 3000, 3

    def step(x, pools, inputs):
        metadata = attention_metadata(inputs, num_pages=num_pages, page_size=16)
        new_pools = []
        for pages in pools:
            q = x.reshape(num_tokens, heads, head_dim)
            out, pages = paged_attention(q, q[:, :kv_heads], q[:, kv_heads:], pages, metadata, sm_scale=0.1)
            x = x + out.reshape(x.shape)
            new_pools.append(pages)
        return x, new_pools

    scale = jax.ShapeDtypeStruct((num_pages, kv_heads, 16), jnp.float32)
    pages = jax.ShapeDtypeStruct((num_pages, 16, 2 * kv_heads, head_dim), dtype)
    pool = KVPages(pages, scale, scale) if dtype == "int8" else KVPages(pages)
    inputs = StepInputs.zeros(num_tokens, num_rows, 64, max_num_seqs=num_rows)
    x = jax.ShapeDtypeStruct((num_tokens, heads * head_dim), jnp.float32)
    compiled = jax.jit(step, donate_argnums=1).lower(x, [pool] * layers, inputs).compile()
    elements = num_pages * 16 * 2 * kv_heads * head_dim
    layer_bytes = elements * jnp.dtype(dtype).itemsize
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= layers * layer_bytes
    assert memory.temp_size_in_bytes < layer_bytes // 4
    copies = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", compiled.as_text())
    assert all(np.prod([int(n) for n in dims.split(",")]) < elements // 4 for dims in copies)
    # What every layer needs of the tables is computed once.
    assert len(re.findall(r"= \S+ sort\(", compiled.as_text())) <= 2
