"""A model as the step sees it: a static description, and functions of a flat dictionary of arrays."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jaxtyping import Array, Float

from jaxpaged.config import ModelConfig
from jaxpaged.models.registry import family_of
from jaxpaged.state import PagePool, StepInputs

Params = dict[str, Array]
"""Weights by name (``layers.0.attention.qkv.weight``); a plain pytree to swap, perturb, shard or donate."""

_DUMMY_SCALE = 0.02


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape and dtype of one parameter.

    Attributes:
        parts: Rows of each checkpoint tensor that it holds, where it holds several.
        init: ``ones`` or ``normal``.
    """

    shape: tuple[int, ...]
    dtype: str
    parts: tuple[int, ...]
    init: str


@dataclasses.dataclass(frozen=True)
class Model:
    """A model without its weights; hashable by its configuration, so that it can be a static argument of jit.

    The Flax modules are built once, abstractly, and kept as a graph definition; they meet their arrays only inside a trace.
    """

    config: ModelConfig
    graph: nnx.GraphDef[Any] = dataclasses.field(compare=False, repr=False)
    specs: Mapping[str, ParamSpec] = dataclasses.field(compare=False, repr=False)

    @classmethod
    def build(cls, config: ModelConfig) -> Model:
        """Returns the model of this configuration.

        Raises:
            ConfigError: The architecture is not supported.
        """
        family = family_of(config.architecture)
        graph, state = nnx.split(nnx.eval_shape(lambda: family.decoder(config)))
        specs = {}
        for path, variable in nnx.to_flat_state(state):
            value, meta = variable.get_value(), variable.get_metadata()
            specs[".".join(map(str, path))] = ParamSpec(value.shape, str(value.dtype), meta.get("parts", (value.shape[0],)), meta["init"])
        return cls(config, graph, specs)

    def init(self, seed: int = 0) -> Params:
        """Returns random weights: norms 1, all else normal with standard deviation 0.02, the same on every platform."""
        return {name: jax.device_put(_draw(name, spec, seed)) for name, spec in self.specs.items()}

    def hidden(
        self, params: Params, pool: PagePool, inputs: StepInputs, *, attention: str = "auto"
    ) -> tuple[Float[Array, "T E"], PagePool]:
        """Runs the decoder over a step's tokens.

        Args:
            params: As ``init`` returns them.
            pool: Pages; the step's keys and values are written to the cells that the block tables and positions name.
            inputs: The step; its tokens must be ids in [0, V) (no feedback marks).
            attention: Implementation of paged attention.

        Returns:
            Hidden states after the final norm, and the pool.
        """
        return self._module(params)(jax.tree.map(jnp.asarray, inputs), pool, attention=attention)

    def logits(self, params: Params, hidden: Float[Array, "R E"]) -> Float[Array, "R V"]:
        """Returns float32 scores of every token for some hidden states."""
        return self._module(params).logits(hidden)

    def _module(self, params: Params) -> Any:
        paths = {name: tuple(int(part) if part.isdigit() else part for part in name.split(".")) for name in params}
        return nnx.merge(self.graph, nnx.from_flat_state([(paths[name], array) for name, array in params.items()]))


def _draw(name: str, spec: ParamSpec, seed: int) -> npt.NDArray:
    """NumPy draws these: no program to compile for each shape."""
    dtype = jnp.dtype(spec.dtype)
    if spec.init == "ones":
        return np.ones(spec.shape, dtype)
    values = np.random.Generator(np.random.SFC64([seed % 2**64, zlib.crc32(name.encode())])).standard_normal(spec.shape, np.float32)
    values *= _DUMMY_SCALE
    return values.astype(dtype, copy=False)
