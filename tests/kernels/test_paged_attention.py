"""One suite over all implementations of paged attention: against the float64 reference, and under changes that must not matter.

Pallas kernels run in the interpreters of their languages. What is special to one implementation stands in a file of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import LSE_TOLERANCE, SUBJECTS, TOLERANCE, each_value, pairwise, relative_rms, run_reference

from pallas_kernels.paged_attention import ragged_paged_attention
from pallas_kernels.paged_attention.dispatch import choose, implementations_on, sibling

SCALE = 0.17
MIXES = {
    # name: rows' new tokens, and their contexts of (pages, tokens more)
    "decode": ([1] * 6, [(0, 1), (1, -1), (1, 0), (1, 1), (2, 3), (3, -1)]),
    "prefill": ([37, 5], [(0, 37), (0, 5)]),
    "mixed": ([1, 1, 7, 1, 40], [(2, 1), (1, 0), (0, 7), (1, 5), (1, 41)]),
    "chunked": ([33, 20], [(2, 33), (1, 20)]),
    "a few tokens a row": ([2, 3, 8], [(1, 2), (2, 3), (0, 8)]),
    "one row": ([1], [(3, 1)]),
}
COLUMNS = {
    "heads": [(4, 2), (2, 2), (4, 1), (7, 1), (8, 1), (32, 2)],
    "head_dim": [64, 80, 96, 128, 256],
    "page_size": [8, 16, 32, 64, 128, 256],
    "dtypes": [
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("bfloat16", "float8_e4m3fn"),
        ("bfloat16", "int8"),
        ("float32", "int8"),
    ],
    "window": [None, "1", "a page less 1", "a page", "beyond"],
    "soft_cap": [None, 5.0],
    "with_sinks": [False, True],
    "mix": list(MIXES),
    "padding": [False, True],
}


@functools.cache
def serves(name: str, head_dim: int, page_size: int, dtypes: tuple[str, str]) -> bool:
    case = SUBJECTS[name].make_case([1], [3], head_dim=head_dim, page_size=page_size, dtype=dtypes[0], kv_dtype=dtypes[1])
    return SUBJECTS[name].missing() is None and SUBJECTS[name].unsupported(case) is None


def matrix():
    """A pairwise cover of what each implementation serves itself; those that hold each value once run in the test command."""
    for name in SUBJECTS:
        shape = {"head_dim": 128, "page_size": 64, "dtypes": ("bfloat16", "bfloat16")}
        served = {column: [v for v in COLUMNS[column] if serves(name, **{**shape, column: v})] for column in shape}
        rows = pairwise({**COLUMNS, **served}) if all(served.values()) else []
        short = each_value(rows)
        for row in rows:
            slow = [] if row in short else [pytest.mark.slow]
            yield pytest.param(name, row, marks=slow, id="-".join([name, *(str(v) for v in row.values())]).replace(" ", "_"))


def subjects():
    """The interpreter of Mosaic GPU is far the slowest; its own files have quicker tests of the kind."""
    for name in SUBJECTS:
        slow = [pytest.mark.slow] if name == "mosaic_gpu" and SUBJECTS[name].interpreted else []
        yield pytest.param(name, marks=slow)


@pytest.fixture(params=subjects())
def subject(request):
    subject = SUBJECTS[request.param]
    if reason := subject.missing():
        pytest.skip(reason)
    return subject


SLOWLY = [pytest.param(name, marks=pytest.mark.slow) if SUBJECTS[name].interpreted else name for name in SUBJECTS]
"""For tests that interpreters run among the slow ones: each has tests of the kind in its own file."""


def check(subject, case, dtype=None, **options):
    if reason := subject.missing():
        pytest.skip(reason)
    dtype = dtype or subject.dtype
    out, lse = subject.run(case, sm_scale=SCALE, return_lse=True, **options)
    want, want_lse = run_reference(case, sm_scale=SCALE, return_lse=True, **options)
    used = case.num_used
    assert np.isfinite(out).all()
    assert relative_rms(out[:used], want[:used]) <= TOLERANCE[dtype]
    assert np.abs(lse[:used] - want_lse[:used]).max() <= LSE_TOLERANCE[dtype]
    assert not out[used:].any()
    assert (lse[used:] == -np.inf).all()


@pytest.mark.parametrize(("name", "row"), list(matrix()))
def test_agrees_with_the_reference(name, row):
    size, (q_dtype, kv_dtype), (q_lens, contexts) = row["page_size"], row["dtypes"], MIXES[row["mix"]]
    kv_lens = [max(length, pages * size + more) for length, (pages, more) in zip(q_lens, contexts, strict=True)]
    q_heads, kv_heads = row["heads"]
    case = SUBJECTS[name].make_case(
        q_lens,
        kv_lens,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=row["head_dim"],
        page_size=size,
        dtype=q_dtype,
        kv_dtype=kv_dtype,
        num_tokens=sum(q_lens) + 11 if row["padding"] else None,
        num_rows=len(q_lens) + 3 if row["padding"] else None,
    )
    if reason := SUBJECTS[name].unsupported(case):
        pytest.skip(reason)  # each value is served, but not each pair of values
    window = {None: None, "1": 1, "a page less 1": size - 1, "a page": size, "beyond": 10_000}[row["window"]]
    sinks = np.random.default_rng(1).normal(size=q_heads).astype(np.float32) if row["with_sinks"] else None
    check(SUBJECTS[name], case, q_dtype, sliding_window=window, soft_cap=row["soft_cap"], sinks=sinks)


EDGES = {
    "one key": ([1], [1], 1),
    "one prompt": ([5], [5], 5),
    "a chunk": ([3], [300], 4),
    "decodes": ([1] * 9, [15, 16, 17, 127, 128, 129, 63, 64, 65], 9),
    "chunks": ([15, 16, 17], [31, 32, 33], 64),
    "query blocks": ([128, 129], [128, 257], 257),
}


def edges():
    """Interpreters see most of them in the slow tests."""
    for name in SUBJECTS:
        for edge in EDGES:
            slow = [pytest.mark.slow] if SUBJECTS[name].interpreted and edge not in ("decodes", "query blocks") else []
            yield pytest.param(SUBJECTS[name], edge, marks=slow, id=f"{name}-{edge}".replace(" ", "_"))


@pytest.mark.parametrize(("subject", "edge"), list(edges()))
def test_page_chunk_and_block_edges(subject, edge):
    q_lens, kv_lens, num_tokens = EDGES[edge]
    check(subject, subject.make_case(q_lens, kv_lens, num_tokens=num_tokens))


@pytest.mark.parametrize("subject", SLOWLY, indirect=True)
def test_a_single_token_row_may_stand_among_the_others(subject):
    case = subject.make_case([1, 1, 1, 9], [30, 50, 1, 20], num_tokens=16)
    other = dataclasses.replace(case, distribution=np.array([0, 0, 4], np.int32))
    out, want = subject.run(other, sm_scale=SCALE), run_reference(case, sm_scale=SCALE)
    assert relative_rms(out[: case.num_used], want[: case.num_used]) <= TOLERANCE[subject.dtype]


def test_a_step_of_padding_alone_gives_zeros(subject):
    case = subject.make_case([], [], num_tokens=8, num_rows=4, table_width=3)
    out, lse = subject.run(case, sm_scale=SCALE, return_lse=True)
    assert not out.any()
    assert (lse == -np.inf).all()


def test_a_token_without_a_key_gives_zeros_whatever_its_sink(subject):
    case = subject.make_case([1, 1], [0, 20])
    sinks = np.linspace(-1, 2, 6, dtype=np.float32)
    out, lse = subject.run(case, sm_scale=SCALE, return_lse=True, sinks=sinks)
    want, want_lse = run_reference(case, sm_scale=SCALE, return_lse=True, sinks=sinks)
    assert not out[0].any()
    assert (lse[0] == -np.inf).all()
    assert (want_lse[0] == -np.inf).all()
    assert relative_rms(out[1], want[1]) <= TOLERANCE[subject.dtype]


@pytest.mark.parametrize("subject", SLOWLY, indirect=True)
def test_key_and_value_scales(subject):
    check(subject, subject.make_case([1, 1, 20], [70, 16, 33]), k_scale=np.float32(1.7), v_scale=np.float32(0.3))


@pytest.mark.parametrize("subject", SLOWLY, indirect=True)
@pytest.mark.parametrize("window", [None, 100])
def test_context_beyond_32768_positions(subject, window):
    if subject.interpreted and window is None:
        pytest.skip("an interpreter takes minutes for 33,000 keys; the window starts beyond 32,768 too")
    check(subject, subject.make_case([1, 2], [33_001, 32_770], num_q_heads=2, num_kv_heads=1, page_size=64), sliding_window=window)


@pytest.mark.parametrize("subject", SLOWLY, indirect=True)
def test_chunked_prefill_equals_unchunked(subject):
    whole = subject.make_case([150], [150])
    want = subject.run(whole, sm_scale=SCALE)
    for start, end in ((0, 1), (1, 70), (70, 149), (149, 150)):
        part = dataclasses.replace(
            whole,
            q=whole.q[start:end],
            kv_lens=np.array([end], np.int32),
            cu_q_lens=np.array([0, end - start], np.int32),
            distribution=np.array([int(end - start == 1)] * 2 + [1], np.int32),
        )
        assert relative_rms(subject.run(part, sm_scale=SCALE), want[start:end]) <= TOLERANCE[subject.dtype]


MIXED = ([1, 1, 1, 7, 40], [1, 64, 65, 7, 130])


def test_page_ids_do_not_matter(subject):
    case = subject.make_case(*MIXED)
    order = np.random.default_rng(3).permutation(len(case.kv_pages))
    place = np.argsort(order).astype(np.int32)
    moved = dataclasses.replace(case, kv_pages=case.kv_pages[order], block_tables=place[case.block_tables])
    assert np.array_equal(subject.run(case, sm_scale=SCALE), subject.run(moved, sm_scale=SCALE))


def test_pages_may_be_shared_and_the_pool_may_grow(subject):
    case = subject.make_case([1, 1], [48, 48])
    shared = dataclasses.replace(case, block_tables=case.block_tables[[0, 0]], q=case.q[[0, 0]])
    out = subject.run(shared, sm_scale=SCALE)
    assert np.array_equal(out[0], out[1])
    assert np.array_equal(out[0], subject.run(case, sm_scale=SCALE)[0])
    grown = dataclasses.replace(case, kv_pages=np.concatenate([case.kv_pages, np.full_like(case.kv_pages, np.nan)]))
    assert np.array_equal(subject.run(case, sm_scale=SCALE), subject.run(grown, sm_scale=SCALE))


@pytest.mark.parametrize("window", [None, 20])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(subject, window):
    lens = [5, 300, 64, 129, 1, 33]
    case = subject.make_case([1] * len(lens), lens, num_tokens=8, num_rows=8)
    together = subject.run(case, sm_scale=SCALE, sliding_window=window)
    for row in range(len(lens)):
        tables = np.zeros_like(case.block_tables)
        tables[0] = case.block_tables[row]
        alone = dataclasses.replace(
            case,
            q=np.concatenate([case.q[row : row + 1], np.full_like(case.q[1:], np.nan)]),
            block_tables=tables,
            kv_lens=np.array([lens[row]] + [0] * 7, np.int32),
            cu_q_lens=np.array([0] + [1] * 8, np.int32),
            distribution=np.array([1, 1, 1], np.int32),
        )
        assert np.array_equal(subject.run(alone, sm_scale=SCALE, sliding_window=window)[0], together[row])


def test_a_chunks_bits_do_not_depend_on_the_rows_beside_it(subject):
    q_lens, kv_lens = [1, 7, 40], [65, 20, 130]
    case = subject.make_case(q_lens, kv_lens, num_tokens=48)
    together = subject.run(case, sm_scale=SCALE)
    for row, (start, length) in enumerate(((1, 7), (8, 40)), start=1):
        q = np.full_like(case.q, np.nan)
        q[:length] = case.q[start : start + length]
        alone = dataclasses.replace(
            case,
            q=q,
            block_tables=case.block_tables[[row, 0, 0]],
            kv_lens=np.array([kv_lens[row], 0, 0], np.int32),
            cu_q_lens=np.array([0, length, length, length], np.int32),
            distribution=np.array([0, 0, 1], np.int32),
        )
        assert np.array_equal(subject.run(alone, sm_scale=SCALE)[:length], together[start : start + length])


def test_table_entries_beyond_a_rows_end_may_be_any_page(subject):
    q_lens, kv_lens = MIXED
    case = subject.make_case(q_lens, kv_lens, table_width=40)
    tables = case.block_tables.copy()
    rng = np.random.default_rng(5)
    for row, length in enumerate(kv_lens):
        tables[row, -(-length // 16) :] = rng.integers(0, len(case.kv_pages), 40 - -(-length // 16))
    other = dataclasses.replace(case, block_tables=tables)
    assert np.array_equal(subject.run(case, sm_scale=SCALE), subject.run(other, sm_scale=SCALE))


@pytest.mark.parametrize("subject", SLOWLY, indirect=True)
@pytest.mark.parametrize("fault", ["token missing", "keys and values swapped", "wrong page", "window off by one", "sink missing"])
def test_a_wrong_argument_is_noticed(subject, fault):
    """The tolerances see each of these: what they allow is less than one token of 200."""
    case = subject.make_case([1, 40], [200, 60])
    sinks = np.linspace(-1, 2, 6, dtype=np.float32)
    options = {"sm_scale": SCALE, "sliding_window": 20 if fault == "window off by one" else None, "sinks": sinks}
    tables = case.block_tables.copy()
    tables[0, 3] = tables[1, 0]
    wrong, wrong_options = {
        "token missing": (dataclasses.replace(case, kv_lens=case.kv_lens - 1), {}),
        "keys and values swapped": (dataclasses.replace(case, kv_pages=case.kv_pages[:, :, [1, 0, 3, 2]]), {}),
        "wrong page": (dataclasses.replace(case, block_tables=tables), {}),
        "window off by one": (case, {"sliding_window": 19}),
        "sink missing": (case, {"sinks": None}),
    }[fault]
    error = relative_rms(subject.run(wrong, **{**options, **wrong_options}), run_reference(case, **options))
    assert error > 3 * TOLERANCE[subject.dtype]


NO_OPTIONS = dict.fromkeys(("sliding_window", "soft_cap", "sinks", "k_scale", "v_scale"))


@pytest.mark.parametrize(("name", "next_name"), [("tpu", "xla"), ("mosaic_gpu", "triton")])
def test_what_an_implementation_lacks_goes_to_the_next_and_one_warning_says_so(name, next_name):
    case = SUBJECTS["xla"].make_case([1, 5], [30, 9], head_dim=24)
    reason = sibling(name).unsupported(case.q, case.kv_pages, **NO_OPTIONS)
    assert reason
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            assert choose(name, case.q, case.kv_pages, **NO_OPTIONS) is sibling(next_name)
    assert [str(w.message) for w in caught] == [f"paged attention: '{name}' cannot serve this call ({reason}); '{next_name}' serves it"]


def test_the_answer_is_right_all_the_same():
    case = SUBJECTS["xla"].make_case([1, 5], [30, 9], head_dim=24)
    with pytest.warns(RuntimeWarning, match="'tpu' cannot serve this call"):
        out = jax.jit(functools.partial(ragged_paged_attention, sm_scale=SCALE, implementation="tpu"))(*map(jnp.asarray, case.arguments))
    assert relative_rms(np.asarray(out), run_reference(case, sm_scale=SCALE)) <= TOLERANCE["float32"]


def test_auto_means_the_fastest_for_the_device():
    """``xla`` on a CPU."""
    subject = SUBJECTS[implementations_on(jax.devices()[0])[0]]
    case = subject.make_case([1, 5], [30, 9])
    out = jax.jit(functools.partial(ragged_paged_attention, sm_scale=SCALE))(*map(jnp.asarray, case.arguments))
    assert np.array_equal(np.asarray(out.astype(jnp.float32)), subject.run(case, sm_scale=SCALE))
