"""Everything that crosses the jit border, as frozen pytrees: the page pool, a step's inputs, per-slot state, outputs.

Letters: T tokens of a step, S slots (rows of the batch), M slots that exist (``max_num_seqs``), P width of a block table,
N pages, K key/value heads, D head dimension, V vocabulary, B page size. Indices are int32.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

from jaxpaged.config import ModelConfig

NULL_PAGE = 0
"""Padding reads this page; no sequence owns it and nothing is ever written to it."""

TOP_LOGPROBS = 20
"""W, the most likely tokens whose log-probabilities a step returns, unless it is built for more."""

MAX_BEAM_WIDTH = 10
"""Most rows of one beam search; it goes on with the best of ``2 * MAX_BEAM_WIDTH = TOP_LOGPROBS`` candidates."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVPages:
    """The pages of one layer.

    Attributes:
        kv: ``[N, B, 2K, D]``; K and V interleave on the head axis (K of head k at 2k, V at 2k + 1). D may be more than the model's
            head dimension: an attention backend may want it padded.
        k_scale, v_scale: float32 ``[N, K, B]``, what the stored numbers of a token and head are multiplied with, in int8 pages;
            None in others.
    """

    kv: Num[Array, "N B 2K D"]
    k_scale: Float[Array, "N K B"] | None = None
    v_scale: Float[Array, "N K B"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagePool:
    """The fixed arrays of pages, one set per layer; a page id names the same page in each.

    Attributes:
        layers: Pages by layer.
    """

    layers: tuple[KVPages, ...]

    @property
    def num_pages(self) -> int:
        """N, the null page included."""
        return self.layers[0].kv.shape[0]

    @property
    def page_size(self) -> int:
        """B, token positions in a page."""
        return self.layers[0].kv.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers, scales included."""
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(self.layers))


class RowFlag(enum.IntFlag):
    """What a step does for one row; the bits of ``StepInputs.flags``."""

    SAMPLES = 1
    RANDOM = 2
    PENALTIES = 4
    BIAS = 8
    SUPPRESS_STOP = 16
    LOGPROBS = 32
    PROMPT_LOGPROBS = 64
    BEAM = 128


class TokenFlag(enum.IntFlag):
    """The low bits of ``SamplingState.token_flags``; the bits above count the token in the output."""

    IN_PROMPT = 1
    STOPS = 2
    OUTPUT_ONE = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """What sampling remembers of each slot from step to step; donated and updated in place.

    Attributes:
        last_tokens: int32 [M], the token each slot sampled last; the next step reads it where the host does not know it.
        logit_bias: float32 [M, V], added to the logits of rows with RowFlag.BIAS; -inf for ids that are not allowed.
        token_flags: int32 [M, V], ``TokenFlag`` bits, and the output count times ``TokenFlag.OUTPUT_ONE``.
    """

    last_tokens: Int[Array, " M"]
    logit_bias: Float[Array, "M V"]
    token_flags: Int[Array, "M V"]


_INT_COLUMNS = (
    *("kv_lens", "prompt_lens", "slots", "flags", "top_k", "seed_low", "seed_high"),
    *("beam_index", "copy_sources", "copy_destinations"),
)
_FLOAT_COLUMNS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "beam_score")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """One step's work, in two host arrays so that it reaches the device in two transfers.

    Row s holds tokens ``cu_q_lens[s]:cu_q_lens[s + 1]`` of the flat arrays; single-token rows come first. Rows and tokens
    beyond those in use are padding: ``kv_lens`` 0, table of null pages, slot M (out of range, so writes drop), position 0.

    Attributes:
        ints: int32, the concatenation of ``tokens``, ``positions``, ``targets`` [T each]; the columns ``kv_lens``,
            ``prompt_lens``, ``slots``, ``flags``, ``top_k``, ``seed_low``, ``seed_high``, ``beam_index``, ``copy_sources``,
            ``copy_destinations`` [S each]; ``cu_q_lens`` [S + 1]; ``distribution`` [3]; ``num_copies`` [1]; ``block_tables`` [S, P].
        floats: float32 [7, S]: temperature, top_p, min_p, repetition, presence and frequency penalty, beam score.
        num_tokens, num_rows, table_width: T, S and P; static.
    """

    ints: Int[Array, " I"]
    floats: Float[Array, "7 S"]
    num_tokens: int = dataclasses.field(metadata={"static": True})
    num_rows: int = dataclasses.field(metadata={"static": True})
    table_width: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def zeros(cls, num_tokens: int, num_rows: int, table_width: int, *, max_num_seqs: int) -> StepInputs:
        """Returns inputs of this size that are all padding, as NumPy arrays to be filled through the views."""
        size = 3 * num_tokens + len(_INT_COLUMNS) * num_rows + (num_rows + 1) + 4 + num_rows * table_width
        inputs = cls(np.zeros(size, np.int32), np.zeros((len(_FLOAT_COLUMNS), num_rows), np.float32), num_tokens, num_rows, table_width)
        inputs.slots[:] = max_num_seqs
        inputs.targets[:] = -1
        inputs.floats[3] = 1.0  # repetition penalty
        return inputs

    @classmethod
    def pack(
        cls,
        prompts: Sequence[Sequence[int]],
        *,
        page_ids: Sequence[Sequence[int]],
        page_size: int,
        num_computed: Sequence[int] | None = None,
        prompt_lens: Sequence[int] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
        prompt_logprobs: bool = False,
        num_tokens: int | None = None,
        num_rows: int | None = None,
        table_width: int | None = None,
        max_num_seqs: int | None = None,
    ) -> StepInputs:
        """Packs sequences of known tokens into one step, each in the row and the slot of its index; every row samples.

        Args:
            prompts: All token ids of each sequence so far. Sequences with one new token come first.
            page_ids: Pages of each sequence in logical order, enough for its tokens; never the null page.
            page_size: B, token positions in a page.
            num_computed: Tokens of each sequence whose K/V is in the pool already; default none.
            prompt_lens: Tokens that are prompt; default all (only scalings that look at a text's length ask).
            temperature: Below 1e-5 takes the most likely token; above needs a ``SamplingState`` in the step.
            top_k: Most likely tokens to keep in each row; 0 for all.
            top_p: Probability mass to keep, in (0, 1].
            min_p: Least probability to keep, as a share of the largest.
            seeds: 64-bit seed of each sequence; default its index.
            logprobs: Whether the step returns log-probabilities of the sampled tokens.
            prompt_logprobs: The same of the prompts' tokens.
            num_tokens: T to pad to; default what is needed. One size is one program.
            num_rows: S to pad to.
            table_width: P to pad to.
            max_num_seqs: M of the sampling state; default S.

        Raises:
            ValueError: Lengths do not agree, pages are missing, or a size is too small.
        """
        count = len(prompts)
        starts = np.asarray(num_computed if num_computed is not None else [0] * count, np.int32)
        ends = np.array([len(prompt) for prompt in prompts], np.int32)
        needed = [-(-int(end) // page_size) for end in ends]
        total, rows = int((ends - starts).sum()), num_rows or count
        width = table_width or max((len(pages) for pages in page_ids), default=1)
        if not count == len(page_ids) == len(starts) or (ends <= starts).any() or (starts < 0).any():
            raise ValueError(f"{count} prompts need as many lists of page_ids and num_computed below their lengths {ends.tolist()}")
        if any(len(pages) < n or len(pages) > width or min(pages) < 1 for pages, n in zip(page_ids, needed, strict=True)):
            raise ValueError(f"the sequences need {needed} pages with ids from 1, at most table_width={width} each; got {page_ids}")
        if total > (num_tokens or total) or count > rows:
            raise ValueError(f"{count} rows of {total} new tokens do not fit num_rows={num_rows}, num_tokens={num_tokens}")
        inputs = cls.zeros(num_tokens or total, rows, width, max_num_seqs=max_num_seqs or rows)
        inputs.lay_out(starts, ends - starts)
        inputs.slots[:count] = np.arange(count)
        inputs.prompt_lens[:count] = ends if prompt_lens is None else prompt_lens
        random = RowFlag.RANDOM if temperature >= 1e-5 else RowFlag(0)
        asked = RowFlag.LOGPROBS * logprobs | RowFlag.PROMPT_LOGPROBS * prompt_logprobs
        inputs.flags[:count] = RowFlag.SAMPLES | random | asked
        inputs.top_k[:count] = max(top_k, 0)
        inputs.floats[:3, :count] = np.array([[temperature], [top_p], [min_p]], np.float32)
        for row, (prompt, pages) in enumerate(zip(prompts, page_ids, strict=True)):
            at = slice(inputs.cu_q_lens[row], inputs.cu_q_lens[row + 1])
            inputs.tokens[at] = prompt[starts[row] :]
            inputs.block_tables[row, : len(pages)] = pages
            if prompt_logprobs:
                inputs.targets[at][:-1] = prompt[starts[row] + 1 :]
            words = np.array([(row if seeds is None else seeds[row]) % 2**64], "<u8").view("<i4")
            inputs.seed_low[row], inputs.seed_high[row] = words
        return inputs

    def lay_out(self, starts: Int[np.ndarray, " R"], lengths: Int[np.ndarray, " R"]) -> None:
        """Writes where the rows' tokens lie: ``positions``, ``kv_lens``, ``cu_q_lens``, ``distribution``.

        Args:
            starts: Position of each row's first new token.
            lengths: Each row's new tokens, at least 1; rows of a single token first.
        """
        count, total = len(lengths), int(lengths.sum())
        self.kv_lens[:count] = starts + lengths
        self.cu_q_lens[1 : count + 1] = np.cumsum(lengths)
        self.cu_q_lens[count + 1 :] = total
        self.positions[:total] = np.repeat(starts - self.cu_q_lens[:count], lengths) + np.arange(total)
        num_single = int(np.argmax(np.append(lengths, 0) != 1))
        self.distribution[:] = (num_single, num_single, count)

    @property
    def tokens(self) -> Int[Array, " T"]:
        """Token ids; ``plan.FEEDBACK`` (-1) takes the slot's ``SamplingState.last_tokens``."""
        return self.ints[: self.num_tokens]

    @property
    def positions(self) -> Int[Array, " T"]:
        """Position of each token in its sequence."""
        return self.ints[self.num_tokens : 2 * self.num_tokens]

    @property
    def targets(self) -> Int[Array, " T"]:
        """Prompt token that follows each position, where prompt log-probabilities are asked for; else -1."""
        return self.ints[2 * self.num_tokens : 3 * self.num_tokens]

    def _column(self, name: str) -> Int[Array, " S"]:
        start = 3 * self.num_tokens + _INT_COLUMNS.index(name) * self.num_rows
        return self.ints[start : start + self.num_rows]

    @property
    def kv_lens(self) -> Int[Array, " S"]:
        """Tokens of each row's sequence once this step's are written; 0 for padding rows."""
        return self._column("kv_lens")

    @property
    def prompt_lens(self) -> Int[Array, " S"]:
        """Tokens of each row's prompt, as the client sent it; RoPE scalings that look at the length of the text need it."""
        return self._column("prompt_lens")

    @property
    def slots(self) -> Int[Array, " S"]:
        """Slot of each row's sequence, M for padding rows."""
        return self._column("slots")

    @property
    def flags(self) -> Int[Array, " S"]:
        """``RowFlag`` bits."""
        return self._column("flags")

    @property
    def top_k(self) -> Int[Array, " S"]:
        """Number of tokens to keep; 0 keeps all."""
        return self._column("top_k")

    @property
    def seed_low(self) -> Int[Array, " S"]:
        """Low 32 bits of the row's seed."""
        return self._column("seed_low")

    @property
    def seed_high(self) -> Int[Array, " S"]:
        """High 32 bits of the row's seed."""
        return self._column("seed_high")

    @property
    def beam_index(self) -> Int[Array, " S"]:
        """Place of a row with RowFlag.BEAM among the rows of its search, which lie side by side; 0 for the first."""
        return self._column("beam_index")

    @property
    def copy_sources(self) -> Int[Array, " S"]:
        """Pages to copy before anything is written, ``num_copies`` of them; never a destination of the same step."""
        return self._column("copy_sources")

    @property
    def copy_destinations(self) -> Int[Array, " S"]:
        """Where to."""
        return self._column("copy_destinations")

    @property
    def _tail(self) -> int:
        return 3 * self.num_tokens + len(_INT_COLUMNS) * self.num_rows

    @property
    def cu_q_lens(self) -> Int[Array, " S+1"]:
        """Running sum of the rows' new tokens; padding rows repeat the total."""
        return self.ints[self._tail : self._tail + self.num_rows + 1]

    @property
    def distribution(self) -> Int[Array, " 3"]:
        """Ends of the row regions: single-token rows, rows of a kernel's choice, all rows in use."""
        start = self._tail + self.num_rows + 1
        return self.ints[start : start + 3]

    @property
    def num_copies(self) -> Int[Array, " 1"]:
        """How many pages are copied, at most S."""
        start = self._tail + self.num_rows + 4
        return self.ints[start : start + 1]

    @property
    def block_tables(self) -> Int[Array, "S P"]:
        """Page ids of each row's sequence, padded with the null page. Pages that a sliding window has left behind are null too."""
        start = self._tail + self.num_rows + 5
        return self.ints[start:].reshape(self.num_rows, self.table_width)

    @property
    def temperature(self) -> Float[Array, " S"]:
        """Divides the logits of rows with RowFlag.RANDOM."""
        return self.floats[0]

    @property
    def top_p(self) -> Float[Array, " S"]:
        """Probability mass to keep, in (0, 1]."""
        return self.floats[1]

    @property
    def min_p(self) -> Float[Array, " S"]:
        """Least probability to keep, as a share of the largest."""
        return self.floats[2]

    @property
    def repetition_penalty(self) -> Float[Array, " S"]:
        """1 for none."""
        return self.floats[3]

    @property
    def presence_penalty(self) -> Float[Array, " S"]:
        """0 for none."""
        return self.floats[4]

    @property
    def frequency_penalty(self) -> Float[Array, " S"]:
        """0 for none."""
        return self.floats[5]

    @property
    def beam_score(self) -> Float[Array, " S"]:
        """Sum of the log-probabilities of the beam in a row with RowFlag.BEAM."""
        return self.floats[6]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What a step says of its rows. The host reads ``tokens`` always and the rest only where a request asked.

    Attributes:
        tokens: int32 [S], the sampled token; -1 for rows that do not sample or whose logits hold NaN.
        logprobs: float32 [S], log-probability of ``tokens`` in the model's own distribution; 0 unless RowFlag.LOGPROBS.
        ranks: int32 [S], rank of ``tokens``, 1 for the most likely.
        top_ids, top_logprobs: [S, W], most likely ids, best first, with their log-probabilities.
        prompt_logprobs, prompt_ranks: [T], of ``StepInputs.targets``; 0 unless RowFlag.PROMPT_LOGPROBS.
        prompt_top_ids, prompt_top_logprobs: [T, W].
        beam_parents, beam_tokens, beam_scores: [S, 20], see ``beam_candidates.Candidates``; 0 without RowFlag.BEAM.
    """

    tokens: Int[Array, " S"]
    logprobs: Float[Array, " S"]
    ranks: Int[Array, " S"]
    top_ids: Int[Array, "S W"]
    top_logprobs: Float[Array, "S W"]
    prompt_logprobs: Float[Array, " T"]
    prompt_ranks: Int[Array, " T"]
    prompt_top_ids: Int[Array, "T W"]
    prompt_top_logprobs: Float[Array, "T W"]
    beam_parents: Int[Array, "S 20"]
    beam_tokens: Int[Array, "S 20"]
    beam_scores: Float[Array, "S 20"]


def has_flag(flags: Int[Array, " S"], flag: RowFlag) -> Bool[Array, " S"]:
    """Returns which rows carry ``flag``."""
    return (flags & int(flag)) != 0


def init_pool(
    config: ModelConfig, num_pages: int, page_size: int, dtype: DTypeLike | None = None, *, head_dim: int | None = None
) -> PagePool:
    """Returns a pool of zeros.

    Args:
        config: Gives the layers, K/V heads and head dimension.
        num_pages: N, the null page included.
        page_size: B, token positions in a page.
        dtype: Of the pages; default the model's. int8 comes with scales.
        head_dim: D of the pages, where it is more than the model's; ``attention.make_pool`` knows.
    """
    heads, dtype = config.num_kv_heads, jnp.dtype(dtype or config.dtype)
    shape = (num_pages, page_size, 2 * heads, head_dim or config.head_dim)

    def make_layer() -> KVPages:
        scales = [jnp.zeros((num_pages, heads, page_size), jnp.float32) for _ in range(2)] if dtype == jnp.int8 else []
        return KVPages(jnp.zeros(shape, dtype), *scales)

    return PagePool(tuple(make_layer() for _ in range(config.num_layers)))


def init_sampling_state(max_num_seqs: int, vocab_size: int) -> SamplingState:
    """Returns the state of ``max_num_seqs`` slots, all unused."""
    return SamplingState(
        last_tokens=jnp.zeros(max_num_seqs, jnp.int32),
        logit_bias=jnp.zeros((max_num_seqs, vocab_size), jnp.float32),
        token_flags=jnp.zeros((max_num_seqs, vocab_size), jnp.int32),
    )
