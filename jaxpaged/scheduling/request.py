"""What a client asks for (frozen) and what the engine makes of it (mutable).

Knows nothing of text, arrays or devices: a prompt is a tuple of token ids.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

from jaxpaged.scheduling.fields import NEUTRAL_PARAMS, SAMPLING_FIELDS, check_neutral, check_sampling_fields

if TYPE_CHECKING:
    from jaxpaged.scheduling.beams import BeamSearch


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to generate; names, defaults and meanings as in vLLM, ranges in ``scheduling.fields``.

    The last arguments are vLLM's, and taken if they ask for what happens anyway.

    Raises:
        RequestError: A field has the wrong type or is out of range; names the field, the value and what is allowed.
    """

    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Seq[int] | None = None
    bad_token_ids: Seq[int] | None = None
    seed: int | None = None
    stop: str | Seq[str] | None = None
    stop_token_ids: Seq[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    truncate_prompt_tokens: int | None = None
    bad_words: dataclasses.InitVar[Any] = None  # from here on as in NEUTRAL_PARAMS
    structured_outputs: dataclasses.InitVar[Any] = None
    guided_decoding: dataclasses.InitVar[Any] = None
    logits_processors: dataclasses.InitVar[Any] = None
    spaces_between_special_tokens: dataclasses.InitVar[Any] = None
    flat_logprobs: dataclasses.InitVar[Any] = None
    extra_args: dataclasses.InitVar[Any] = None
    skip_reading_prefix_cache: dataclasses.InitVar[Any] = None

    def __post_init__(self, *neutral: object) -> None:
        check_neutral(dict(zip(NEUTRAL_PARAMS, neutral, strict=True)))
        check_sampling_fields({field.name: getattr(self, field.name) for field in SAMPLING_FIELDS})
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None and field.name != "max_tokens":
                object.__setattr__(self, field.name, field.default)
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        for name in ("stop_token_ids", "bad_token_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))

    def clone(self) -> SamplingParams:
        """Returns a copy; to change something in it use ``dataclasses.replace``, since parameters are frozen."""
        return copy.deepcopy(self)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken (temperatures below 1e-5 count as 0, as in vLLM)."""
        return self.temperature < 1e-5

    @property
    def counting_field(self) -> str:
        """Name of the field that says how many sequences are generated, for error messages."""
        return "beam_width" if self.beam_width else "best_of" if self.best_of else "n"

    @property
    def num_sequences(self) -> int:
        """How many sequences are generated, of which ``n`` are returned: the beams, or the samples."""
        if self.use_beam_search:
            return self.beam_width or self.n
        return self.best_of or self.n


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One client request, validated against the model; nothing in it changes after submission.

    Attributes:
        id: Unique in this engine; made by the server or by ``LLM``, never by the client.
        prompt: Token ids, at least one, each in [0, vocabulary).
        params: Sampling parameters; requests made by one call share them.
        max_tokens: Most tokens to generate for each sample, at least 1; left out, ``params.max_tokens``.
        eos_token_ids: Ids that end a sequence unless ``params.ignore_eos``.
        seed: 64-bit seed; drawn by the engine when the client gave none.
        arrival_s: Monotonic time of submission, in seconds.
        tenant: Whose request it is; requests of different tenants never share a page through the prefix cache.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    max_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    seed: int = 0
    arrival_s: float = 0.0
    tenant: str = ""

    def __post_init__(self) -> None:
        if not self.max_tokens:
            if self.params.max_tokens is None:
                raise ValueError(f"request {self.id}: max_tokens is not resolved")
            object.__setattr__(self, "max_tokens", max(1, self.params.max_tokens))

    @functools.cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a sequence of this request: the client's, and the model's unless ignored."""
        own = tuple(self.params.stop_token_ids or ())
        return own if self.params.ignore_eos else own + tuple(i for i in self.eos_token_ids if i not in own)


class Status(enum.Enum):
    """Where a sequence is in its life; only the scheduler changes it."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    """Why a sequence ended; the values are OpenAI's where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclasses.dataclass(eq=False)
class Group:
    """A request's sequences. They are admitted, preempted and blamed together, and share the pages of their prompt.

    Attributes:
        request: What was asked.
        sequences: Those that are not finished, by index.
        beams: The beam search, if it is one.
        num_cached_tokens: Prompt tokens that were found in the prefix cache when it was first admitted; None before.
        num_prompt_logprobs: Prompt tokens whose log-probabilities were delivered (recomputing does not deliver them twice).
        num_faults: Failed steps that this request alone can have caused, since no sequence of it is a suspect.
    """

    request: Request
    sequences: list[Sequence] = dataclasses.field(default_factory=list)
    beams: BeamSearch | None = None
    num_cached_tokens: int | None = None
    num_prompt_logprobs: int = 0
    num_faults: int = 0

    @property
    def suspect(self) -> bool:
        """Whether one of its sequences was in a step that failed and has got no token since."""
        return True in [sequence.suspect for sequence in self.sequences]  # asked for each request in each step

    @property
    def active(self) -> list[Sequence]:
        """The sequences that have something to compute: all but beams that a beam search has no candidate for yet."""
        return [sequence for sequence in self.sequences if not sequence.idle]


@dataclasses.dataclass(eq=False)
class Sequence:
    """One running generation of a request. Owned by the scheduler; its pages and keys by ``KVMemory``.

    Attributes:
        group: The request's sequences, this one among them.
        index: Which of the request's samples or beams this is.
        order: Place in the line: running number of sequences in order of arrival.
        tokens: Prompt, then every token sampled so far whose value the host knows.
        num_computed: Tokens whose K/V is in the pool once every dispatched step is done. May exceed ``len(tokens) - 1``
            while a sampled token is still on the device only.
        num_settled: Of these, the ones that complete steps computed.
        num_pending: Sampled tokens that dispatched steps will deliver and the host has not read yet.
        page_ids: Pages in logical order, page ``i`` holds positions ``[i*B, (i+1)*B)``; the null page where no later token can read.
        host_ids: Places in host memory of the same pages, while the sequence is swapped out.
        page_keys: Keys in the prefix cache of its full pages, as far as they were needed.
        num_registered: Pages that were put into the prefix cache, or looked up there.
        num_listed: Pages that the block table in the runner has.
        slot: Row of the per-slot device state, held from admission until finish or preemption.
        first_step: Number of the first step since it was last admitted.
        last_step: Number of the last dispatched step that contains this sequence (the fence for its pages).
        num_preemptions: How often its pages were taken back.
        suspect: It was in a step that failed and has got no token since.
        idle: A beam of a search that has no candidate for it yet.
        score: Of a beam, the sum of its tokens' log-probabilities.
    """

    group: Group
    index: int = 0
    order: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    num_computed: int = 0
    num_settled: int = 0
    num_pending: int = 0
    page_ids: list[int] = dataclasses.field(default_factory=list)
    host_ids: list[int] = dataclasses.field(default_factory=list)
    page_keys: list[bytes] = dataclasses.field(default_factory=list)
    num_registered: int = 0
    num_listed: int = 0
    slot: int | None = None
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    first_step: int = 0
    last_step: int = 0
    num_preemptions: int = 0
    suspect: bool = False
    idle: bool = False
    score: float = 0.0

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = list(self.request.prompt)

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.group.request

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.group.request.prompt)

    @property
    def num_output(self) -> int:
        """Sampled tokens that the host knows."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_total(self) -> int:
        """Tokens including those still on the device only."""
        return len(self.tokens) + self.num_pending
