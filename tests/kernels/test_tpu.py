"""What is special to the TPU kernels: races in their copies, the fused write, words of packed numbers, and what Mosaic compiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import LSE_TOLERANCE, TOLERANCE, Case, make_case, relative_rms, run_reference
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv_write import write_kv_pages
from pallas_kernels.paged_attention import tpu
from pallas_kernels.paged_attention.tpu import kernels, pages

RACES = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
SMALL = tpu.Tiling(single_rows=2, single_block=128, query_block=32, query_part=16, block=128)
"""Several blocks of keys and of queries in small cases."""


def races_found() -> bool:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


def run(case: Case, *, interpret=RACES, tiling=SMALL, **options):
    """Returns outputs and log-sums as float32; no two accesses may have raced."""
    arrays = {k: jnp.asarray(v) for k, v in {**case.scales, **options}.items() if k in ("sinks", "k_scale", "v_scale")}
    static = {k: v for k, v in options.items() if k not in arrays}
    arguments = map(jnp.asarray, case.arguments)
    out = tpu.ragged_paged_attention(*arguments, sm_scale=0.1, return_lse=True, tiling=tiling, interpret=interpret, **static, **arrays)
    out = jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32)), out)
    if interpret is RACES:
        assert not races_found()
    return out


def assert_right(case: Case, got, **options):
    want, want_lse = run_reference(case, sm_scale=0.1, return_lse=True, **options)
    dtype = str(case.q.dtype)
    assert relative_rms(got[0], want) <= TOLERANCE[dtype]
    some = np.isfinite(want_lse)
    np.testing.assert_array_equal(np.isneginf(got[1]), ~some)
    assert np.abs(got[1][some] - want_lse[some]).max() <= LSE_TOLERANCE[dtype]
    assert (got[0][case.num_used :] == 0).all()


SINKS = np.linspace(-1, 2, 2).astype(np.float32)
ROWS = {
    "single": ([1] * 4, [1, 128, 300, 129]),
    "mixed": ([1, 1, 5, 40, 1], [20, 257, 5, 140, 129]),
    "chunk": ([40], [233]),
}
CASES = [
    ("single", {}, {}),
    ("single", {"dtype": "bfloat16", "page_size": 128}, {"sliding_window": 100, "sinks": SINKS}),
    ("mixed", {"dtype": "bfloat16"}, {"sliding_window": 130, "soft_cap": 5.0, "sinks": SINKS}),
    ("mixed", {"dtype": "bfloat16", "head_dim": 256, "page_size": 8}, {"sliding_window": 1}),
    ("chunk", {"page_size": 256, "num_q_heads": 4, "num_kv_heads": 2}, {"sliding_window": 50}),
    ("mixed", {"dtype": "bfloat16", "kv_dtype": "int8", "page_size": 128, "num_q_heads": 2, "num_kv_heads": 2}, {"sliding_window": 200}),
    ("mixed", {"kv_dtype": "float8_e4m3fn", "num_q_heads": 4, "num_kv_heads": 2}, {}),
]


def small_case(rows, **shape) -> Case:
    return make_case(*ROWS[rows], **{"head_dim": 128, "num_q_heads": 2, "num_kv_heads": 1, **shape})


@pytest.mark.parametrize(("rows", "shape", "options"), CASES)
def test_right_and_without_races(rows, shape, options):
    case = small_case(rows, **shape)
    tiling = dataclasses.replace(SMALL, block=256, single_block=256) if shape.get("page_size") == 256 else SMALL
    assert_right(case, run(case, tiling=tiling, **options), **options)


@pytest.mark.parametrize(
    "shape",
    [
        {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 256},
        {"dtype": "bfloat16", "num_q_heads": 6, "num_kv_heads": 2},
        {"kv_dtype": "float8_e4m3fn", "num_q_heads": 4, "num_kv_heads": 4},
    ],
)
def test_heads_as_words(shape):
    """The interpreter without races knows the views of 32-bit words that a TPU reads heads through; the other one does not."""
    case = small_case("mixed", **shape)
    assert_right(case, run(case, interpret=True))


def test_unpacking_is_exact():
    every = np.arange(256, dtype=np.uint8)
    words = jnp.asarray(np.repeat(every, 4).view(np.int32))
    for dtype in ("int8", "float8_e4m3fn"):
        want = np.asarray(jnp.asarray(every.view(dtype)).astype(jnp.float32))
        for part in range(4):
            np.testing.assert_array_equal(pages.unpack(words, part, dtype), want)
    numbers = np.asarray(jnp.asarray([1.5, -3.25, np.nan, np.inf, 1e-38, -0.0], jnp.bfloat16))
    for part in range(2):
        got = pages.unpack(jnp.asarray(numbers.view(np.int32)), part, "bfloat16")
        np.testing.assert_array_equal(got, numbers[part::2].astype(np.float32))


def new_tokens(case: Case, *, seed: int = 1):
    """Returns keys and values of all query tokens and their cells; some of the padding is far beyond the pool."""
    num_tokens, (num_pages, page_size, num_kv, head_dim) = case.q.shape[0], case.kv_pages.shape
    kv = np.random.default_rng(seed).normal(size=(num_tokens, num_kv, head_dim)).astype(np.float32)
    ids, offsets = np.full(num_tokens, num_pages, np.int32), np.zeros(num_tokens, np.int32)
    ids[case.num_used + 1 :] = num_pages + 1000
    for row, (start, end) in enumerate(zip(case.cu_q_lens, case.cu_q_lens[1:], strict=False)):
        positions = case.kv_lens[row] - (end - np.arange(start, end))
        ids[start:end] = case.block_tables[row, positions // page_size]
        offsets[start:end] = positions % page_size
    return jnp.asarray(kv, case.q.dtype), jnp.asarray(ids), jnp.asarray(offsets)


def run_update(case: Case, kv, ids, offsets, *, function=tpu.ragged_paged_attention_update, interpret=RACES, **options):
    arguments = [jnp.asarray(x) for x in case.arguments]
    result = function(
        arguments[0], kv, *arguments[1:], ids, offsets, sm_scale=0.1, return_lse=True, tiling=SMALL, interpret=interpret, **options
    )
    if interpret is RACES:
        assert not races_found()
    return result


@pytest.mark.parametrize("shape", [{"dtype": "bfloat16", "page_size": 64}, {"dtype": "bfloat16", "kv_dtype": "float8_e4m3fn"}])
def test_update_writes_then_attends(shape):
    scales = {"k_scale": 0.7, "v_scale": 1.3} if "kv_dtype" in shape else {}
    shape = {"num_tokens": 52, "num_rows": 6, **shape, **({"num_kv_heads": 2} if scales else {})}
    case = small_case("mixed", **shape)
    kv, ids, offsets = new_tokens(case)
    poisoned = np.array(case.kv_pages)
    used = slice(case.num_used)
    poisoned[np.asarray(ids)[used], np.asarray(offsets)[used]] = np.nan
    case = dataclasses.replace(case, kv_pages=poisoned, k_scale=None, v_scale=None)
    (out, lse), written = run_update(case, kv, ids, offsets, **scales)
    want = np.asarray(write_kv_pages(jnp.asarray(poisoned), kv, ids, offsets, **scales))
    bits = f"u{want.dtype.itemsize}"
    np.testing.assert_array_equal(np.asarray(written).view(bits), want.view(bits))
    apart = run(dataclasses.replace(case, kv_pages=want), **scales)
    np.testing.assert_array_equal(np.asarray(out.astype(jnp.float32)), apart[0])
    np.testing.assert_array_equal(np.asarray(lse), apart[1])


def test_update_of_cells_in_any_order():
    """Tokens of a run of 16 that go to other cells than one copy would write."""
    case = small_case("chunk", page_size=64)
    kv, ids, offsets = (np.array(x) for x in new_tokens(case))
    ids[16:32], offsets[16:32] = ids[16:32][::-1].copy(), offsets[16:32][::-1].copy()
    ids[3] = case.kv_pages.shape[0]
    _, written = run_update(case, *map(jnp.asarray, (kv, ids, offsets)))
    np.testing.assert_array_equal(written, write_kv_pages(*map(jnp.asarray, (case.kv_pages, kv, ids, offsets))))


def test_bits_do_not_depend_on_the_batch():
    """Each row alone, with its pages elsewhere in a larger pool, gives the bits it gives among others."""
    case = small_case("mixed", dtype="bfloat16", num_q_heads=4, num_kv_heads=2)
    together = run(case, sliding_window=150)
    rng = np.random.default_rng(3)
    order = rng.permutation(case.kv_pages.shape[0])
    pool = np.full((len(order) + 7, *case.kv_pages.shape[1:]), np.nan, case.kv_pages.dtype)
    pool[order + 7] = case.kv_pages
    for row in (1, 3):
        tokens = slice(case.cu_q_lens[row], case.cu_q_lens[row + 1])
        count = tokens.stop - tokens.start
        single = int(row < case.distribution[0])
        alone = Case(
            case.q[tokens], pool, case.kv_lens[row : row + 1], order[case.block_tables[row : row + 1]].astype(np.int32) + 7,
            np.array([0, count], np.int32), np.array([single, single, 1], np.int32),
        )  # fmt: skip
        for got, want in zip(run(alone, sliding_window=150), together, strict=True):
            np.testing.assert_array_equal(got, want[tokens])


def test_a_neighbours_nan_stays_there():
    case = small_case("mixed", num_tokens=60, num_rows=8)
    row = 3
    ill = np.array(case.kv_pages)
    ill[case.block_tables[row, 2], 5] = np.nan
    got = run(dataclasses.replace(case, kv_pages=ill))[0]
    want = run_reference(case, sm_scale=0.1)
    others = np.ones(60, bool)
    others[case.cu_q_lens[row] : case.cu_q_lens[row + 1]] = False
    assert relative_rms(got[others], want[others]) <= TOLERANCE["float32"]
    assert np.isnan(got[~others]).all()


@pytest.mark.parametrize("window", [300, pytest.param(None, marks=pytest.mark.slow)])
def test_positions_beyond_32k(window):
    case = make_case([1, 3], [33001, 33002], head_dim=128, num_q_heads=1, num_kv_heads=1, page_size=256)
    options = {"sliding_window": window}
    assert_right(case, run(case, tiling=tpu.Tiling(2, 4096, 16, 16, 4096), **options), **options)


def test_rows_without_keys():
    case = small_case("mixed")
    case.kv_lens[0] = 0
    got = run(case, sliding_window=100, sinks=SINKS)
    assert (got[0][0] == 0).all()
    assert np.isneginf(got[1][0]).all()
    assert np.isfinite(got[1][1 : case.num_used]).all()


def test_agrees_with_the_reference_of_jaxs_kernel():
    """A second oracle, of other authors. The kernel itself runs in neither interpreter of jax 0.10 to 0.12."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

    case = small_case("mixed", num_q_heads=4, num_kv_heads=2)
    arguments = (jnp.asarray(x) for x in (case.q, np.nan_to_num(case.kv_pages), case.kv_lens, case.block_tables, case.cu_q_lens))
    num_rows = jnp.asarray([len(case.kv_lens)], jnp.int32)
    want = ref_ragged_paged_attention(*arguments, num_rows, sm_scale=0.1, sliding_window=150, soft_cap=5.0)
    assert relative_rms(run(case, sliding_window=150, soft_cap=5.0)[0], np.asarray(want)) <= 2e-5


# ------------------------------------------------------------------------------------------------------------------- mutants


def one_position_less(index, row, low, high):
    return pages.Span(index, row, low, high - 1)


def with_options(**changes):
    def make(**options):
        changed = {name: change(options[name]) for name, change in changes.items()}
        return kernels.CallOptions(**{**options, **changed})

    return make


def swapped_load(self, slot, head, which, dtype, load=pages.PageStream.load):
    return load(self, slot, head, 1 - which, dtype)


def neighbours_page(self, span, page, place, slot, copies=pages.PageStream._copies):
    return copies(self, span, jnp.maximum(page - 1, 0), place, slot)


def no_wait(self, span, block, slot):
    low = jnp.maximum(span.low - block * self.shape.block, 0)
    self._zero(slot, low, jnp.clip(span.high - block * self.shape.block, low, self.shape.block))


class OneSlot(pages.PageStream):
    def start(self, span, block, slot):
        super().start(span, block, 0)

    def finish(self, span, block, slot):
        super().finish(span, block, 0)

    def load(self, slot, head, which, dtype):
        return super().load(0, head, which, dtype)


MUTANTS = {
    "drops the last position": (kernels, "Span", one_position_less),
    "window one too wide": (tpu, "CallOptions", with_options(sliding_window=lambda w: w + 1)),
    "no sinks": (tpu, "CallOptions", with_options(sinks=lambda _: False)),
    "keys for values": (pages.PageStream, "load", swapped_load),
    "wrong page": (pages.PageStream, "_copies", neighbours_page),
    "does not wait for pages": (pages.PageStream, "finish", no_wait),
    "fetches over what it reads": (kernels, "PageStream", OneSlot),
    "leaves what pages do not cover": (pages.PageStream, "_zero", lambda *_: None),
    "does not write": (kernels, "write_new_tokens", lambda *_: None),
}


@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_mutants_are_noticed(name, monkeypatch):
    """Each fault gives a wrong answer, NaN, a race or an error of the interpreter; none of it without the fault."""
    # One token is the first kernel's alone; both share all that is broken here.
    case = make_case([1], [270], head_dim=128, num_q_heads=1, num_kv_heads=1, page_size=64)
    kv, ids, offsets = new_tokens(case)
    want_pool = np.asarray(write_kv_pages(jnp.asarray(case.kv_pages), kv, ids, offsets))
    options = {"sliding_window": 150, "sinks": 3 * SINKS[1:]}
    want = run_reference(dataclasses.replace(case, kv_pages=want_pool), sm_scale=0.1, **options)
    if name is not None:
        monkeypatch.setattr(*MUTANTS[name])
    untraced = tpu.ragged_paged_attention_update.__wrapped__  # past the cache of traces
    try:
        (out, _), _ = run_update(case, kv, ids, offsets, function=untraced, **options)
        right = relative_rms(np.asarray(out), want) <= TOLERANCE["float32"]
    except Exception:
        right = False
        pltpu.reset_tpu_interpret_mode_state()
    except AssertionError:
        right = False
    assert right == (name is None)


# ----------------------------------------------------------------------------------------------------------------- shapes


@dataclasses.dataclass(frozen=True)
class Shape:
    num_q_heads: int
    num_kv_heads: int
    head_dim: int = 128
    page_size: int = 128
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"


SHAPES = {
    "llama-3-8b": Shape(32, 8),
    "llama-3-70b, an eighth": Shape(8, 1),
    "qwen3-32b, small pages": Shape(64, 8, page_size=16),
    "gemma-2-9b": Shape(16, 8, 256),
    "seven queries a key": Shape(14, 2, page_size=64),
    "float32": Shape(32, 8, dtype="float32", kv_dtype="float32"),
    "fp8": Shape(32, 8, kv_dtype="float8_e4m3fn"),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_lowers_for_tpus(shape):
    """To Mosaic's modules; ``pytest -m aot`` compiles them."""
    num_tokens, num_rows, width = 256, 64, 64
    array = jax.ShapeDtypeStruct
    pool = array((100, shape.page_size, 2 * shape.num_kv_heads, shape.head_dim), shape.kv_dtype)
    arguments = [
        array((num_tokens, shape.num_q_heads, shape.head_dim), shape.dtype), array((num_tokens, *pool.shape[2:]), shape.dtype), pool,
        *(array(s, jnp.int32) for s in ((num_rows,), (num_rows, width), (num_rows + 1,), (3,), (num_tokens,), (num_tokens,))),
    ]  # fmt: skip
    update = functools.partial(tpu.ragged_paged_attention_update, sm_scale=0.1, sliding_window=4096, soft_cap=50.0)
    lowered = jax.jit(update, donate_argnums=2).trace(*arguments).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 2


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (Shape(9, 3), "3 key/value heads"),
        (Shape(8, 2, head_dim=80), "head dimension 80"),
        (Shape(8, 2, page_size=24), "page size 24"),
        (Shape(8, 2, dtype="float16"), "queries of float16"),
        (Shape(8, 2, kv_dtype="float16"), "pages of float16"),
        (Shape(64, 64, head_dim=256), "too much for VMEM"),
        (Shape(8, 1, kv_dtype="int8"), "1 key/value heads of int8"),
    ],
)
def test_says_what_it_lacks(shape, words):
    q = jax.ShapeDtypeStruct((4, shape.num_q_heads, shape.head_dim), shape.dtype)
    pool = jax.ShapeDtypeStruct((9, shape.page_size, 2 * shape.num_kv_heads, shape.head_dim), shape.kv_dtype)
    assert words in tpu.unsupported(q, pool)


def test_tables_that_smem_does_not_hold_go_to_xla_aloud(monkeypatch):
    monkeypatch.setattr(tpu, "SMEM_BYTES", 100)
    case = small_case("chunk")
    kv, ids, offsets = new_tokens(case)
    want = run_reference(
        dataclasses.replace(case, kv_pages=np.asarray(write_kv_pages(jnp.asarray(case.kv_pages), kv, ids, offsets))), sm_scale=0.1
    )
    with pytest.warns(RuntimeWarning, match="'xla' serves it"):
        (out, _), _ = run_update(case, kv, ids, offsets, function=tpu.ragged_paged_attention_update.__wrapped__, interpret=False)
    assert relative_rms(np.asarray(out), want) <= TOLERANCE["float32"]
    monkeypatch.undo()
    assert tpu.tables_too_large(2048, 256, 896) is None
    assert "256 by 1024" in tpu.tables_too_large(2048, 256, 1024)


def test_storage_head_dim_is_whole_lanes():
    assert [tpu.storage_head_dim(d) for d in (64, 80, 96, 128, 256)] == [128, 128, 128, 128, 256]


def test_a_default_tiling_depends_on_the_batch_in_its_query_blocks_alone():
    few, many = (tpu.default_tiling(t, 32, 2, (9, 128, 16, 128), 2, 64) for t in (16, 4096))
    assert (few.single_block, few.block) == (many.single_block, many.block) == (512, 512)
    assert (few.query_block, many.query_block) == (16, 256)
