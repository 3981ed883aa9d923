"""The training loop: packed batches that depend only on the seed and the step, Muon, and an average of the weights."""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tiny import corpus
from tiny import tokenizer as tok
from tiny.model import Config, Tiny, save_model
from tokenizers import Tokenizer

PHASES = (
    (1800, 8, 256, 0),
    (2000, 8, 256, 1),
    (2400, 8, 256, 2),
    (3200, 8, 256, 3),
    (3450, 8, 256, 4),
    (3800, 4, 512, 4),
    (4000, 2, 1024, 4),
)
"""Until this step: rows of a batch, their length, and the stage of the material.

Short rows first: they teach recall fastest."""
RATES = {0: 0.0, 100: 1.0, 1800: 1.0, 2800: 0.4556, 2850: 0.8, 3200: 0.8, 4000: 0.02}
"""Learning rate at these steps, as a share of its peak, and in a straight line between: each new stage wants a high one."""
MAX_LENGTH = 1024

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Plan:
    """What to train, and where to write it. The weights follow from the first three alone."""

    steps: int
    seed: int
    rate: float
    out: Path
    state: Path | None
    """Resume from this file if it is there, and save to it."""
    every: int
    """Steps between exports."""


def phase(step: int) -> tuple[int, int, int]:
    """Rows and length of the batch of one step, and the stage of its material."""
    return next((rest for until, *rest in PHASES if step < until), PHASES[-1][1:])


def encode(tokenizer: Tokenizer, segments: list[corpus.Segment]) -> tuple[list[int], list[float]]:
    """Token ids of a document, and the weight of each in the loss."""
    ids: list[int] = []
    weights: list[float] = []
    for encoded, (_, weight) in zip(tokenizer.encode_batch([s for s, _ in segments]), segments, strict=True):
        ids += encoded.ids
        weights += [weight] * len(encoded.ids)
    return ids, weights


def make_batch(tokenizer: Tokenizer, seed: int, step: int, rows: int, length: int, stage: int) -> Batch:
    """Pack whole documents into rows; each array is [rows, length + 1].

    `parts` numbers the documents of a row (0: padding), because attention stays inside each; positions start at its head.
    """
    rng = Random(f"{seed}-{step}")
    batch = {k: np.zeros((rows, length + 1), np.int32) for k in ("ids", "parts", "positions")}
    batch["weights"] = np.zeros((rows, length + 1), np.float32)
    for row in range(rows):
        start, part = 0, 1
        while length + 1 - start > 24:
            ids, weights = encode(tokenizer, corpus.document(rng, min(length, length + 1 - start), stage))
            end = min(start + len(ids), length + 1)
            values = {"ids": ids, "weights": weights, "parts": [part] * len(ids), "positions": range(len(ids))}
            for key, value in values.items():
                batch[key][row, start:end] = value[: end - start]
            batch["weights"][row, start] = 0.0  # nothing before it in its document to foretell it
            start, part = end, part + 1
    return batch


def loss_of(model: Tiny, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Weighted cross-entropy, and the share of right guesses among fully weighted tokens."""
    ids, parts = batch["ids"][:, :-1], batch["parts"][:, :-1]
    length = ids.shape[1]
    mask = (parts[:, :, None] == parts[:, None, :]) & jnp.tril(jnp.ones((length, length), bool))
    logits = model(ids, batch["positions"][:, :-1], mask)
    targets, weights = batch["ids"][:, 1:], batch["weights"][:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    answers = weights >= 1.0
    right = ((logits.argmax(-1) == targets) & answers).sum() / answers.sum()
    return (losses * weights).sum() / weights.sum(), right


def make_optimizer(rate: float) -> optax.GradientTransformation:
    """Muon for the matrices, Adam for embeddings and norms."""
    steps, shares = jnp.array(list(RATES), jnp.float32), jnp.array(list(RATES.values()), jnp.float32)

    def schedule(step: jax.Array) -> jax.Array:
        return rate * jnp.interp(step, steps, shares)

    def matrices(params: Any) -> Any:
        spec = optax.contrib.MuonDimensionNumbers()
        return jax.tree.map_with_path(lambda path, _: spec if "kernel" in jax.tree_util.keystr(path) else None, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule,
            adam_learning_rate=lambda step: 0.5 * schedule(step),
            adam_b2=0.98,
            consistent_rms=0.2,
            weight_decay=0.02,
            muon_weight_dimension_numbers=matrices,
        ),
    )


def export(graph: nnx.GraphDef, params: nnx.State, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a complete model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(nnx.merge(graph, params), folder, MAX_LENGTH)
    tok.save_tokenizer(tokenizer, folder, MAX_LENGTH)


def train(plan: Plan) -> None:
    """Train as planned; what is exported is an average over about the last hundred steps."""
    tokenizer = tok.train_tokenizer(Config.vocab)
    graph, params = nnx.split(Tiny(Config(), plan.seed), nnx.Param)
    print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters, {tokenizer.get_vocab_size()} tokens", flush=True)
    optimizer = make_optimizer(plan.rate)
    state = (params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    first, seen = 0, 0
    if plan.state and plan.state.exists():
        leaves, first, seen = pickle.loads(plan.state.read_bytes())
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)

    @partial(jax.jit, donate_argnums=0)
    def update(state: Any, batch: Batch, step: int) -> tuple[Any, jax.Array, jax.Array]:
        params, mean, moments = state
        (loss, right), grads = jax.value_and_grad(lambda p: loss_of(nnx.merge(graph, p), batch), has_aux=True)(params)
        updates, moments = optimizer.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
        keep = jnp.minimum(0.99, (1 + step) / (10 + step))
        mean = jax.tree.map(lambda m, p: keep * m + (1 - keep) * p, mean, params)
        return (params, mean, moments), loss, right

    began, logged = time.time(), []
    for step in range(first, plan.steps):
        batch = make_batch(tokenizer, plan.seed, step, *phase(step))
        state, loss, right = update(state, batch, step)
        seen += int((batch["parts"] > 0).sum())
        logged.append((float(loss), float(right)))
        if (step + 1) % 50 == 0:
            loss, right = np.mean(logged, 0)
            logged = []
            print(f"step {step + 1} loss {loss:.4f} right {right:.4f} tokens {seen:,} {time.time() - began:.0f}s", flush=True)
        if (step + 1) % plan.every == 0 or step + 1 == plan.steps:
            export(graph, state[1], tokenizer, plan.out)
            if plan.state:
                part = plan.state.with_suffix(".part")
                part.write_bytes(pickle.dumps((jax.tree.map(np.asarray, jax.tree.leaves(state)), step + 1, seen)))
                part.replace(plan.state)
