"""One question, all its replays: ours beside contiguous reservation, page sizes, and what samples and beams share."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from jaxpaged.errors import ConfigError
from jaxpaged.memory.arrivals import drop_long
from jaxpaged.memory.contiguous import FINDERS, RESERVATIONS, ContiguousSystem, NeverFitsError
from jaxpaged.memory.ledger import Figures, Sample, summarize
from jaxpaged.memory.options import MemoryConfig
from jaxpaged.memory.paged import PagedSetting, PagedSystem
from jaxpaged.memory.shapes import ModelShape, read_shape
from jaxpaged.memory.workloads import Workload, load_workload
from jaxpaged.scheduling.fields import MAX_BEAM_WIDTH

_DEFAULT_CONTEXTS = 16
_POINTS = 240
OURS = "paged"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One replay.

    Attributes:
        system: ``paged`` or a key of ``contiguous.RESERVATIONS``.
        page_size: Tokens in a page; None for contiguous runs.
        decoding: ``sample`` or ``beam``.
        num_sequences: Samples of each request, or beam width.
        figures: None if the system cannot hold the workload at all; ``reason`` says why.
        preemptions: Sequences that lost their pages and were computed again.
        hit_tokens: Prompt tokens found in the prefix cache when their request was first admitted.
        history: For plots: step, requests at once and share of the memory that holds tokens, each the mean of a few steps.
    """

    system: str
    page_size: int | None
    decoding: str
    num_sequences: int
    figures: Figures | None
    reason: str = ""
    preemptions: int = 0
    hit_tokens: int = 0
    history: tuple[tuple[float, float, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """The workload in numbers.

    Attributes:
        dropped: Requests left out because no system could hold them, or because they follow such a one.
        repeated: Prompt tokens that continue an earlier text from its start, the most that a prefix cache can find.
        prompts, outputs: Tokens of each request.
    """

    name: str
    requests: int
    dropped: int
    prompt_tokens: int
    output_tokens: int
    repeated: int
    prompts: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def mean_prompt(self) -> float:
        """Mean prompt, in tokens."""
        return statistics.fmean(self.prompts)

    @property
    def mean_output(self) -> float:
        """Mean answer, in tokens."""
        return statistics.fmean(self.outputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All that was found; JSON has the same names.

    Attributes:
        kv_cache_dtype: Of keys and values, resolved.
        token_bytes: Bytes of a token's keys and values in all layers.
        memory_bytes: For keys and values.
        num_cells: Tokens that fit into them.
        max_model_len: Longest request that any of the systems takes, in tokens.
        swap_space: GiB of host memory behind the prefix cache.
        comparison: Ours, then the contiguous systems.
        page_sizes: Ours with each page size, the first again first; one if there is one.
        sharing: Ours with each number of samples or beam width.
    """

    model: ModelShape
    workload: Lengths
    kv_cache_dtype: str
    token_bytes: int
    memory_bytes: int
    num_cells: int
    num_pages: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    contiguous: str
    seed: int
    beam_entropy: float
    beam_likeness: float
    prefix_caching: bool
    swap_space: float
    comparison: tuple[Row, ...]
    page_sizes: tuple[Row, ...]
    sharing: tuple[Row, ...]


class Study:
    """Reads what is asked, replays, and reports.

    Raises:
        ConfigError: An option does not fit the model, the workload or another option.
    """

    def __init__(self, config: MemoryConfig) -> None:
        self.config = config
        self.shape = read_shape(config.model)
        self.token_bytes = self.shape.token_bytes(config.kv_cache_dtype)
        for name, values, low, high in (
            ("page_size", config.page_size, 1, 1024),
            ("n", config.n, 1, config.max_num_seqs),
            ("beam_width", config.beam_width, 1, min(config.max_num_seqs, MAX_BEAM_WIDTH)),
        ):
            if any(not low <= value <= high for value in values) or (not values and name != "beam_width"):
                raise ConfigError(f"{name} must be integers from {low} to {high}; got {', '.join(map(str, values)) or 'none'}")
        if config.beam_width and config.n != (1,):
            raise ConfigError("n and beam_width exclude each other: a search has one width")
        if config.max_num_batched_tokens < config.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({config.max_num_batched_tokens}) must be at least max_num_seqs ({config.max_num_seqs})"
            )
        longest = config.max_model_len or self.shape.max_model_len
        if longest > self.shape.max_model_len:
            raise ConfigError(f"max_model_len must be at most the model's {self.shape.max_model_len}; got {longest}")
        self.memory_bytes = self._memory_bytes(longest)
        self.num_cells = self.memory_bytes // self.token_bytes
        self.sequences = max(*config.n, *config.beam_width, 1)
        self.longest = min(longest, *((self.num_pages(size) - 1) // self.sequences * size for size in config.page_size))
        self.workload, self.lengths = self._workload(longest)

    def num_pages(self, page_size: int) -> int:
        """Returns the pages that fit, the null page included.

        Raises:
            ConfigError: Not even one and the null page.
        """
        count = self.memory_bytes // (page_size * self.token_bytes)
        if count < 2:
            raise ConfigError(
                f"the memory of {self.memory_bytes:,} bytes holds {count} pages of {page_size} tokens ({self.token_bytes:,} bytes each); "
                "at least 2 are needed: raise --memory or lower --page-size"
            )
        return count

    def run(self) -> Report:
        """Replays everything that was asked for."""
        config = self.config
        size = config.page_size[0]
        decoding, widths = ("beam", config.beam_width) if config.beam_width else ("sample", config.n)
        ours = self._paged(size, decoding, widths[0])
        baselines = [self._contiguous(name, decoding, widths[0]) for name in RESERVATIONS]
        page_sizes = [ours, *(self._paged(each, decoding, widths[0]) for each in config.page_size[1:])]
        sharing = [ours, *(self._paged(size, decoding, each) for each in widths[1:])]
        return Report(
            model=self.shape,
            workload=self.lengths,
            kv_cache_dtype=self.shape.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
            token_bytes=self.token_bytes,
            memory_bytes=self.memory_bytes,
            num_cells=self.num_cells,
            num_pages=self.num_pages(size),
            max_model_len=self.longest,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            contiguous=config.contiguous,
            seed=config.seed,
            beam_entropy=config.beam_entropy,
            beam_likeness=config.beam_likeness,
            prefix_caching=config.enable_prefix_caching,
            swap_space=config.swap_space,
            comparison=(ours, *baselines),
            page_sizes=tuple(page_sizes),
            sharing=tuple(sharing),
        )

    def _memory_bytes(self, longest: int) -> int:
        config = self.config
        if config.memory is not None and config.num_pages is not None:
            raise ConfigError("memory and num_pages exclude each other; give one of them")
        if config.memory is not None:
            return int(config.memory * 2**30)
        size = config.page_size[0]
        pages = config.num_pages if config.num_pages is not None else _DEFAULT_CONTEXTS * -(-longest // size) + 1
        return pages * size * self.token_bytes

    def _workload(self, longest: int) -> tuple[Workload, Lengths]:
        config = self.config
        loaded = load_workload(config.workload, num_requests=config.num_requests, seed=config.seed, max_model_len=longest)
        workload = Workload(loaded.name, drop_long(loaded.calls, self.longest))
        if not workload.calls:
            raise ConfigError(f"workload: no request fits {self.longest:,} tokens; raise --memory, --num-pages or --max-model-len")
        prompts = tuple(len(call.prompt) for call in workload.calls)
        outputs = tuple(len(call.output) for call in workload.calls)
        return workload, Lengths(
            name=workload.name,
            requests=len(prompts),
            dropped=len(loaded.calls) - len(prompts),
            prompt_tokens=sum(prompts),
            output_tokens=sum(outputs),
            repeated=workload.repeated_tokens(),
            prompts=prompts,
            outputs=outputs,
        )

    def _paged(self, page_size: int, decoding: str, num_sequences: int) -> Row:
        config = self.config
        setting = PagedSetting(
            num_pages=self.num_pages(page_size),
            page_size=page_size,
            max_model_len=self.longest,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            num_sequences=num_sequences,
            beams=decoding == "beam",
            entropy=config.beam_entropy,
            likeness=config.beam_likeness,
            seed=config.seed,
            async_depth=config.async_depth,
            prefix_caching=config.enable_prefix_caching,
            num_host_pages=int(config.swap_space * 2**30) // (page_size * self.token_bytes),
            sliding_window=self.shape.window,
        )
        system = PagedSystem(self.workload, setting)
        samples = system.replay()
        return Row(
            system=OURS,
            page_size=page_size,
            decoding=decoding,
            num_sequences=num_sequences,
            figures=summarize(samples, self.num_cells),
            preemptions=system.scheduler.num_preemptions,
            hit_tokens=system.hit_tokens,
            history=self._history(samples),
        )

    def _contiguous(self, name: str, decoding: str, num_sequences: int) -> Row:
        config = self.config
        system = ContiguousSystem(
            self.workload,
            runs=FINDERS[config.contiguous](self.num_cells),
            reservation=RESERVATIONS[name],
            num_sequences=num_sequences,
            max_model_len=self.longest,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        row = Row(system=name, page_size=None, decoding=decoding, num_sequences=num_sequences, figures=None)
        try:
            samples = system.replay()
        except NeverFitsError as error:
            return dataclasses.replace(row, reason=str(error))
        return dataclasses.replace(row, figures=summarize(samples, self.num_cells), history=self._history(samples))

    def _history(self, samples: Sequence[Sample]) -> tuple[tuple[float, float, float], ...]:
        few = -(-len(samples) // _POINTS)
        groups = (samples[start : start + few] for start in range(0, len(samples), few))
        return tuple(
            (
                few * index + (len(group) + 1) / 2,
                sum(sample.requests for sample in group) / len(group),
                sum(sample.tokens for sample in group) / (len(group) * self.num_cells),
            )
            for index, group in enumerate(groups)
        )
