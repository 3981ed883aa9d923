"""Attention for training on one CPU core: causal inside each document of a packed row, in blocks that stay in its cache.

The idea of FlashAttention (https://arxiv.org/abs/2205.14135): the forward pass keeps only the logarithm of each softmax sum,
and the backward pass computes the weights again. Queries go in blocks, and blocks of later keys are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

BLOCK = 128
"""Queries of one block."""
AT_ONCE = 512
"""The longest rows that are computed side by side; longer ones go one after another, to stay in the cache."""

Arrays = tuple[jax.Array, ...]


def product(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    """A product over one axis for each head (the leading axis), summed in float32."""
    numbers = (((left_axis,), (right_axis,)), ((0,), (0,)))
    return jax.lax.dot_general(left, right, numbers, preferred_element_type=jnp.float32)


def visible(parts: jax.Array, start: int, end: int) -> jax.Array:
    """Which of the keys before `end` the queries from `start` to `end` see."""
    same = parts[start:end, None] == parts[None, :end]
    return same & (jnp.arange(start, end)[:, None] >= jnp.arange(end)[None])


def each_row(function: Callable[..., Arrays], arrays: Arrays, length: int) -> Arrays:
    """Apply a function of one row to all rows."""
    if length <= AT_ONCE:
        return jax.vmap(function)(*arrays)
    return jax.lax.map(lambda row: function(*row), arrays)


def forward_row(q: jax.Array, k: jax.Array, v: jax.Array, parts: jax.Array) -> Arrays:
    """One row: q [kv_heads, group, length, head], k and v [kv_heads, length, head]. The output, and the log of the sums."""
    heads, group, length, head = q.shape
    size = min(BLOCK, length)
    outputs, logs = [], []
    for start in range(0, length, size):
        end = start + size
        scores = product(q[:, :, start:end].reshape(heads, group * size, head), k[:, :end], 2, 2).reshape(heads, group, size, end)
        scores = jnp.where(visible(parts, start, end), scores, -1e9)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        mixed = product(weights.astype(v.dtype).reshape(heads, group * size, end), v[:, :end], 2, 1)
        outputs.append(mixed.reshape(heads, group, size, head) / total)
        logs.append(top + jnp.log(total))
    return jnp.concatenate(outputs, 2), jnp.concatenate(logs, 2)


def backward_row(q: jax.Array, k: jax.Array, v: jax.Array, parts: jax.Array, out: jax.Array, log: jax.Array, grad: jax.Array) -> Arrays:
    """The gradients of q, k and v of one row."""
    heads, group, length, head = q.shape
    size = min(BLOCK, length)
    inner = (out * grad).sum(-1, keepdims=True)
    grad = grad.astype(v.dtype)
    dk = dv = jnp.zeros((heads, length, head), jnp.float32)
    dq = []
    for start in range(0, length, size):
        end = start + size
        q_part, grad_part = (x[:, :, start:end].reshape(heads, group * size, head) for x in (q, grad))
        scores = product(q_part, k[:, :end], 2, 2).reshape(heads, group, size, end)
        weights = jnp.where(visible(parts, start, end), jnp.exp(scores - log[:, :, start:end]), 0.0)
        change = product(grad_part, v[:, :end], 2, 2).reshape(heads, group, size, end)
        change = (weights * (change - inner[:, :, start:end])).astype(q.dtype).reshape(heads, group * size, end)
        weights = weights.astype(q.dtype).reshape(heads, group * size, end)
        dv = dv.at[:, :end].add(product(weights, grad_part, 1, 1))
        dk = dk.at[:, :end].add(product(change, q_part, 1, 1))
        dq.append(product(change, k[:, :end], 2, 1).reshape(heads, group, size, head))
    return jnp.concatenate(dq, 2), dk, dv


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array, parts: jax.Array) -> jax.Array:
    """The mixed values, shaped as q: [rows, kv_heads, group, length, head], already scaled. k, v [rows, kv_heads, length, head]."""
    return attend_forward(q, k, v, parts)[0]


def attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, parts: jax.Array) -> tuple[jax.Array, Arrays]:
    """The output, and what the gradient needs."""
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    out, log = each_row(forward_row, (q, k, v, parts), q.shape[-2])
    return out, (q, k, v, parts, out, log)


def attend_backward(kept: Arrays, grad: jax.Array) -> tuple[jax.Array | None, ...]:
    """The gradients of q, k and v."""
    return *each_row(backward_row, (*kept, grad), grad.shape[-2]), None


attend.defvjp(attend_forward, attend_backward)
