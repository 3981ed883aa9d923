"""From a plan to the two host arrays of a step, in a few microseconds a row.

What does not change from step to step (block tables, sampling parameters) is mirrored per slot in NumPy and gathered for the
rows of a plan; what remains per row in Python is one pass that collects a handful of integers.
"""

from __future__ import annotations

import itertools

import numpy as np

from jaxpaged.scheduling.plan import FEEDBACK, StepPlan, Work
from jaxpaged.scheduling.request import Request, SamplingParams, Sequence
from jaxpaged.state import RowFlag, StepInputs

_SAMPLE_STRIDE = 0x9E3779B97F4A7C15
"""Odd constant (2^64 over the golden ratio) that spreads the samples of one request over the seeds."""


class BatchBuilder:
    """Builds ``StepInputs``; mirrors what each slot's sequence needs in every step.

    A slot's mirror is written when a plan says ``new_slot``, and its block table from where the plan says that it has changed.

    Args:
        page_size: B, token positions in a page.
        table_width: P, pages of the longest context.
        max_num_seqs: M, slots that exist.
    """

    def __init__(self, *, page_size: int, table_width: int, max_num_seqs: int) -> None:
        self.page_size = page_size
        self.table_width = table_width
        self.max_num_seqs = max_num_seqs
        self._tables = np.zeros((max_num_seqs, table_width), np.int32)
        self._held = [0] * max_num_seqs
        self._floats = np.zeros((6, max_num_seqs), np.float32)  # what does not change from step to step
        self._ints = np.zeros((4, max_num_seqs), np.int32)  # prompt_lens, top_k, seed_low, seed_high
        self._flags = [0] * max_num_seqs
        self._min_tokens = [0] * max_num_seqs

    def build(self, plan: StepPlan) -> StepInputs:
        """Returns the plan's work as arrays, freshly allocated (a device may still read those of the step before).

        Args:
            plan: Single-token rows first; every sequence has its slot and the pages of its new tokens.
        """
        inputs = StepInputs.zeros(plan.token_bucket, plan.slot_bucket, self.table_width, max_num_seqs=self.max_num_seqs)
        rows = np.array([self._row(work) for work in plan.work], np.int32).T
        slots, starts, lengths, flags, first_tokens = rows
        count = len(plan.work)
        num_decode = int(np.count_nonzero(lengths == 1))

        inputs.lay_out(starts, lengths)
        inputs.slots[:count] = slots
        inputs.flags[:count] = flags
        inputs.prompt_lens[:count], inputs.top_k[:count], inputs.seed_low[:count], inputs.seed_high[:count] = self._ints[:, slots]
        inputs.floats[: len(self._floats), :count] = self._floats[:, slots]
        inputs.block_tables[:count] = self._tables[slots]
        inputs.tokens[:num_decode] = first_tokens[:num_decode]

        at = num_decode
        for work in itertools.islice(plan.work, num_decode, None):
            inputs.tokens[at : at + work.num_new_tokens] = work.token_ids()
            at += work.num_new_tokens
        if (flags & RowFlag.PROMPT_LOGPROBS).any():
            _set_targets(inputs, plan)
        if (flags & RowFlag.BEAM).any():
            _set_beams(inputs, plan)
        if plan.copies:
            inputs.num_copies[:] = len(plan.copies)
            inputs.copy_sources[: len(plan.copies)], inputs.copy_destinations[: len(plan.copies)] = zip(*plan.copies, strict=True)
        return inputs

    def _row(self, work: Work) -> tuple[int, int, int, int, int]:
        sequence = work.sequence
        slot = sequence.slot
        if slot is None:
            raise ValueError(f"sequence {sequence.request.id}[{sequence.index}] is planned without a slot")
        if work.new_slot:
            self._take_slot(slot, sequence)
        pages, changed = sequence.page_ids, 0 if work.new_slot else work.table_start
        if changed < len(pages) or len(pages) != self._held[slot]:
            self._tables[slot, changed : len(pages)] = pages[changed:]
            self._tables[slot, len(pages) : self._held[slot]] = 0
            self._held[slot] = len(pages)
        start, tokens = work.start, sequence.tokens
        flags = self._flags[slot]
        if work.samples:
            flags |= 1  # RowFlag.SAMPLES; enum arithmetic costs a microsecond each
            if work.num_output < self._min_tokens[slot]:
                flags |= 16  # RowFlag.SUPPRESS_STOP
        if work.beam_score is not None:
            flags |= 160  # RowFlag.BEAM, and RowFlag.LOGPROBS for the most likely tokens
        if flags & 64 and start >= len(sequence.request.prompt) - 1:
            flags &= ~64  # RowFlag.PROMPT_LOGPROBS: nothing of the prompt follows
        return slot, start, work.num_new_tokens, flags, tokens[start] if start < len(tokens) else FEEDBACK

    def _take_slot(self, slot: int, sequence: Sequence) -> None:
        request, params = sequence.request, sequence.request.params
        self._tables[slot] = 0
        self._held[slot] = 0
        low, high = sample_seed(request, sequence.index)
        self._ints[:, slot] = (len(request.prompt), max(params.top_k, 0), low, high)
        self._floats[:, slot] = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        self._flags[slot] = int(row_flags(params))
        self._min_tokens[slot] = params.min_tokens if request.stop_token_ids and not params.use_beam_search else 0


def row_flags(params: SamplingParams) -> RowFlag:
    """Returns the flags that hold for every row of a sequence with these parameters; a beam draws nothing and picks its own tokens."""
    flags = RowFlag(0)
    if not params.greedy and not params.use_beam_search:
        flags |= RowFlag.RANDOM
    if params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        flags |= RowFlag.PENALTIES
    if params.logit_bias or params.allowed_token_ids is not None or params.bad_token_ids:
        flags |= RowFlag.BIAS
    if params.logprobs is not None or params.best_of is not None:
        flags |= RowFlag.LOGPROBS
    if params.prompt_logprobs is not None:
        flags |= RowFlag.PROMPT_LOGPROBS
    return flags


def sample_seed(request: Request, index: int) -> tuple[int, int]:
    """Returns the low and high halves, as int32, of the seed of one of a request's samples; sample 0 has the request's own."""
    seed = (request.seed + index * _SAMPLE_STRIDE) % 2**64
    low, high = seed % 2**32, seed >> 32
    return low - (low >= 2**31) * 2**32, high - (high >= 2**31) * 2**32


def _set_targets(inputs: StepInputs, plan: StepPlan) -> None:
    """Writes the prompt token that follows each position of the rows that ask for prompt log-probabilities."""
    for row, work in enumerate(plan.work):
        if inputs.flags[row] & RowFlag.PROMPT_LOGPROBS:
            following = work.sequence.request.prompt[work.start + 1 : work.end + 1]
            at = int(inputs.cu_q_lens[row])
            inputs.targets[at : at + len(following)] = following


def _set_beams(inputs: StepInputs, plan: StepPlan) -> None:
    """Writes the scores of the rows that ask for the next candidates of their beam search, and their places in it."""
    before: Request | None = None
    index = 0
    for row, work in enumerate(plan.work):
        if work.beam_score is None:
            before = None
            continue
        request = work.sequence.request
        index = index + 1 if request is before else 0
        before = request
        inputs.beam_index[row], inputs.beam_score[row] = index, work.beam_score
