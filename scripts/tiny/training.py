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
from tiny.model import Config, Tiny, contract, load_model, save_model
from tokenizers import Tokenizer

PHASES = (
    (1800, 8, 256, 0),
    (2000, 8, 256, 1),
    (2400, 8, 256, 2),
    (3200, 8, 256, 3),
    (3450, 8, 256, 4),
    (3800, 4, 512, 4),
    (4000, 2, 1024, 4),
    (5100, 8, 256, 5),
    (5550, 4, 512, 5),
    (5700, 2, 1024, 5),
    (6100, 4, 512, 6),
    (6200, 2, 1024, 6),
)
"""Until this step: rows of a batch, their length, and the stage of the material.

Short rows first: they teach recall fastest."""
RESTART = 4000
"""At this step the run goes on from the weights that an export would hold (their average, in bfloat16), with new moments."""
RATES = {
    **{0: 0.0, 100: 1.0, 1800: 1.0, 2800: 0.4556, 2850: 0.8, 3200: 0.8, 4000: 0.02},
    **{4050: 0.8, 4900: 0.8, 5700: 0.02, 5730: 0.4, 5800: 0.4, 6200: 0.02},
}
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
    start: Path | None
    """Begin at step `RESTART` with the weights of this model folder: what an export at that step holds."""
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
    """Weighted cross-entropy of the heaviest half of the tokens, and the share of right guesses among fully weighted ones.

    About that half has any weight; the other logits, a fifth of a step's work, are not computed.
    """
    targets, weights = batch["ids"][:, 1:].reshape(-1), batch["weights"][:, 1:].reshape(-1)
    weights, picked = jax.lax.top_k(weights, weights.size // 2)
    logits = model(batch["ids"][:, :-1], batch["positions"][:, :-1], batch["parts"][:, :-1], picked)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets[picked])
    answers = weights >= 1.0
    right = ((logits.argmax(-1) == targets[picked]) & answers).sum() / answers.sum()
    return (losses * weights).sum() / weights.sum(), right


def orthogonalize(grad: jax.Array) -> jax.Array:
    """Muon's five Newton-Schulz steps (https://kellerjordan.github.io/posts/muon), with products in bfloat16.

    The result has the root mean square of an update of Adam (0.2), as in https://arxiv.org/abs/2502.16982.
    """
    wide = grad.shape[0] <= grad.shape[1]
    x = grad / (jnp.linalg.norm(grad) + 1e-8)
    for _ in range(5):
        square = contract(x, x, 1, 1) if wide else contract(x, x, 0, 0)
        factor = -4.7750 * square + 2.0315 * contract(square, square, 1, 0)
        x = 3.4445 * x + (contract(factor, x, 1, 0) if wide else contract(x, factor, 1, 0))
    return x * 0.2 * max(grad.shape) ** 0.5


def make_optimizer() -> optax.GradientTransformation:
    """Muon for the matrices, Adam for embeddings and norms, at a learning rate of 1.

    Muon is put together here, because the one of optax computes in float32: a third of a step's time.
    """

    def kinds(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: "muon" if "kernel" in jax.tree_util.keystr(path) else "adam", params)

    muon = optax.chain(
        optax.trace(decay=0.95, nesterov=True),
        optax.stateless_with_tree_map(lambda grad, _: orthogonalize(grad)),
        optax.add_decayed_weights(0.02),
        optax.scale(-1.0),
    )
    adam = optax.adam(0.5, b2=0.98)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition({"muon": muon, "adam": adam}, kinds))


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
    optimizer = make_optimizer()

    def begin(params: nnx.State) -> tuple[nnx.State, nnx.State, Any]:
        return params, jax.tree.map(jnp.copy, params), optimizer.init(params)

    state, first, seen = begin(params), 0, 0
    if plan.start:
        state, first = begin(nnx.state(load_model(plan.start), nnx.Param)), RESTART
    if plan.state and plan.state.exists():
        leaves, first, seen = pickle.loads(plan.state.read_bytes())
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)

    @partial(jax.jit, donate_argnums=0)
    def update(state: Any, batch: Batch, step: int) -> tuple[Any, jax.Array, jax.Array]:
        params, mean, moments = state
        (loss, right), grads = jax.value_and_grad(lambda p: loss_of(nnx.merge(graph, p), batch), has_aux=True)(params)
        updates, moments = optimizer.update(grads, moments, params)
        rate = plan.rate * jnp.interp(step, jnp.array(list(RATES)), jnp.array(list(RATES.values())))
        updates = jax.tree.map(lambda u: rate * u, updates)
        params = optax.apply_updates(params, updates)
        since = step - jnp.where(step < RESTART, 0, RESTART)
        keep = jnp.minimum(0.99, (1 + since) / (10 + since))
        mean = jax.tree.map(lambda m, p: keep * m + (1 - keep) * p, mean, params)
        return (params, mean, moments), loss, right

    began, logged = time.time(), []
    for step in range(first, plan.steps):
        if step == RESTART and not plan.start:
            state = begin(jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), state[1]))
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
