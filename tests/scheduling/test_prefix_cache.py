"""Keys of pages, and what becomes of them: two texts have a key in common only if all before it is the same."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling.simulation import make_request

from jaxpaged.scheduling.kv_memory import KVMemory
from jaxpaged.scheduling.prefix_cache import PrefixCache, extend_keys, next_key, partition_key, tenant_mark
from jaxpaged.scheduling.request import Group, Sequence

START = partition_key("", ("prompt length", ""))


def keys_of(tokens, size: int = 2, start: bytes = START) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, start, tokens, size)
    return keys


def make_sequence(tokens, *, tenant: str = "", name: str = "r", **params) -> Sequence:
    request = make_request(name, len(tokens), 50, tenant=tenant, **params)
    object.__setattr__(request, "prompt", tuple(tokens))
    group = Group(request)
    group.sequences.append(Sequence(group))
    return group.sequences[0]


def compute(memory: KVMemory, sequence: Sequence) -> None:
    """All that a sequence has, in one step that is complete at once."""
    memory.grow(sequence, len(sequence.tokens))
    memory.take_moves()
    sequence.num_computed = len(sequence.tokens)
    memory.settle(sequence, sequence.num_computed)


def cached_tokens(memory: KVMemory, tokens, **options) -> int:
    """How many tokens of a text would be found."""
    sequence = make_sequence([*tokens, 0], **options)
    memory.begin(sequence)
    memory.take_moves()
    memory.release(sequence)
    return sequence.num_computed


# -------------------------------------------------------------------------------------------------------------------- keys


def test_only_full_pages_have_keys():
    assert [len(keys_of([1] * count, 4)) for count in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_keys_grow_as_the_text_does_and_do_not_change():
    tokens = [5, 1, 4, 1, 5, 9, 2]
    keys: list[bytes] = []
    for count in range(len(tokens) + 1):
        extend_keys(keys, START, tokens[:count], 3)
        assert keys == keys_of(tokens[:count], 3)
    assert len(set(keys)) == 2


def test_a_key_depends_on_everything_before_it():
    first, second = keys_of([1, 2, 3, 4]), keys_of([1, 0, 3, 4])
    assert first[1] != second[1]
    assert keys_of([3, 4])[0] != first[1]


def test_a_key_depends_on_the_order_of_tokens_and_on_how_pages_are_cut():
    texts = {tuple(keys_of(tokens, size)) for tokens in itertools.permutations([1, 2, 3, 4]) for size in (1, 2, 4)}
    assert len(texts) == 24 * 3
    assert len({key for keys in texts for key in keys}) == (4 + 12 + 24 + 24) + (12 + 24) + 24  # all beginnings, in pages of 1, 2 and 4


@pytest.mark.parametrize("tokens", [([1], [256]), ([0, 1], [1, 0]), ([1], [1, 0]), ([0], [0, 0]), ([257], [1, 1]), ([2**31], [0])])
def test_tokens_are_not_written_alike(tokens):
    assert next_key(START, tokens[0]) != next_key(START, tokens[1])


FIELDS = st.lists(st.tuples(st.text(max_size=4), st.text(max_size=6)), max_size=3)


@settings(derandomize=True, max_examples=300)
@given(FIELDS, FIELDS)
def test_partitions_are_the_same_only_if_all_fields_are(first, second):
    assert (partition_key("", *first) == partition_key("", *second)) == (first == second)
    assert partition_key("a", *first) != partition_key("b", *second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([("tenant", "ab")], [("tenant", "a"), ("b", "")]),
        ([("a", "bc")], [("ab", "c")]),
        ([("tenant", "1:x")], [("tenant1:", "x")]),
        ([("tenant", ""), ("length", "1")], [("tenant", "1"), ("length", "")]),
        ([("a", "1"), ("b", "2")], [("b", "2"), ("a", "1")]),
        ([("a", "6:tenant0:")], [("a", ""), ("tenant", "")]),
        ([], [("", "")]),
    ],
)
def test_what_looks_alike_when_written_in_a_row_is_not(first, second):
    assert partition_key("", *first) != partition_key("", *second)


def test_a_partition_is_no_page():
    assert partition_key("", ("parent", "x"), ("tokens", "")) != next_key(START, [])


def test_tenants_and_prompt_lengths_share_nothing():
    memory = KVMemory(num_pages=20, page_size=2)
    compute(memory, make_sequence([1, 2, 3, 4], tenant="a"))
    assert cached_tokens(memory, [1, 2, 3, 4], tenant="a") == 4
    assert cached_tokens(memory, [1, 2, 3, 4], tenant="b") == 0
    assert cached_tokens(memory, [1, 2, 3, 4], tenant="") == 0
    by_length = KVMemory(num_pages=20, page_size=2, cache_by_prompt_length=True)
    compute(by_length, make_sequence([1, 2, 3, 4, 5]))
    assert cached_tokens(by_length, [1, 2, 3, 4]) == 4
    assert cached_tokens(by_length, [1, 2, 3, 4, 5]) == 0


# --------------------------------------------------------------------------------------------------------------- the cache


def test_of_two_pages_that_hold_the_same_the_first_is_known():
    cache = PrefixCache(5)
    first, second = cache.pages.take(2)
    cache.put(b"k", first)
    cache.put(b"k", second)
    assert (cache.find(b"k"), cache.key_of(second), len(cache)) == (first, None, 1)
    cache.pages.release([first, second])
    assert cache.pages.num_cached == 1


def test_a_page_has_one_key():
    cache = PrefixCache(3)
    (page_id,) = cache.pages.take(1)
    cache.put(b"k", page_id)
    cache.put(b"other", page_id)
    assert (cache.find(b"k"), cache.find(b"other")) == (page_id, None)


def test_what_is_evicted_is_told_with_its_key_and_not_found_any_more():
    told = []
    cache = PrefixCache(3, lambda key, page_id: told.append((key, page_id, cache.find(key))))
    pages = cache.pages.take(2)
    cache.put(b"a", pages[0])
    cache.put(b"b", pages[1])
    cache.pages.release(pages)
    assert cache.pages.take(1) == [pages[0]]
    assert told == [(b"a", pages[0], None)]
    assert (cache.find(b"a"), cache.find(b"b")) == (None, pages[1])


def test_longest_stops_at_the_first_key_that_is_not_known():
    cache = PrefixCache(5)
    pages = cache.pages.take(3)
    for key, page_id in zip((b"a", b"b", b"d"), pages, strict=True):
        cache.put(key, page_id)
    assert cache.longest([b"a", b"b", b"c", b"d"]) == pages[:2]
    assert cache.longest([b"c", b"a"]) == []


def test_forgetting_and_clearing_leave_readers_their_pages():
    cache = PrefixCache(4)
    read, unread = cache.pages.take(2)
    cache.put(b"read", read)
    cache.put(b"unread", unread)
    cache.pages.release([unread])
    cache.forget(b"nobody")
    cache.clear()
    assert (len(cache), cache.pages.num_cached, cache.pages.num_free, cache.pages.reference_count(read)) == (0, 0, 2, 1)
    cache.pages.check([[read]])


@pytest.mark.parametrize("places", [0, 20])
def test_a_reset_for_one_tenant_forgets_what_is_his_on_the_device_and_in_host_memory_and_nothing_else(places):
    memory = KVMemory(num_pages=11, page_size=2, num_host_pages=places)
    tenants = ("", "a", "b")
    running = {tenant: make_sequence([1, 2, 3, 4, 5, 6], tenant=tenant) for tenant in tenants}
    for sequence in running.values():
        compute(memory, sequence)
    memory.release(running["a"])
    memory.release(running["b"])
    if places:  # what is not read is moved to host memory, and forgotten there
        memory.pages.release(memory.pages.take(memory.pages.num_free))
    free = memory.pages.num_free
    memory.reset_prefix_cache("a")
    assert [cached_tokens(memory, [1, 2, 3, 4, 5, 6], tenant=tenant) for tenant in tenants] == [6, 0, 6]
    memory.reset_prefix_cache("nobody")
    memory.reset_prefix_cache("")  # its text is read by a sequence that runs, and stays its own
    assert [cached_tokens(memory, [1, 2, 3, 4, 5, 6], tenant=tenant) for tenant in tenants] == [0, 0, 6]
    assert memory.pages.num_free >= free
    memory.release(running[""])
    assert memory.pages.num_cached == 3  # those of b
    memory.reset_prefix_cache()
    assert (len(memory.device), memory.pages.num_free) == (0, 10)


def test_two_tenants_pages_have_no_mark_in_common():
    lengths = [(("prompt length", length),) for length in ("", "4", "5")]
    keys = {
        tenant: [key for length in lengths for key in keys_of([1, 2, 3, 4], start=partition_key(tenant, *length))]
        for tenant in ("", "a", "b", "ab", "tenant")
    }
    for tenant, own in keys.items():
        assert all(key.startswith(tenant_mark(tenant)) == (other == tenant) for other, others in keys.items() for key in others)
        assert len({len(key) for key in own}) == 1


# ---------------------------------------------------------------------------------------------------------- order of leaving


@pytest.mark.parametrize("places", [0, 20])
def test_the_tail_of_a_text_is_evicted_before_its_head(places):
    """One page after the other is taken by somebody else; what is left can always be found, and with host memory all of it."""
    for taken in range(7):
        memory = KVMemory(num_pages=7, page_size=2, num_host_pages=places)
        sequence = make_sequence([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])
        compute(memory, sequence)
        memory.release(sequence)
        assert memory.pages.num_cached == 6
        other = memory.pages.take(taken)
        memory.take_moves()
        left = sequence.tokens[: 12 - 2 * taken]
        assert len(memory.device.longest(keys_of(left))) == 6 - taken == memory.pages.num_cached
        if places:
            memory.pages.release(other)
            assert cached_tokens(memory, sequence.tokens[:11]) == 10


def test_a_text_that_was_used_again_is_evicted_last():
    memory = KVMemory(num_pages=7, page_size=2)
    texts = [[i, i, i + 1, i + 1] for i in range(3)]
    for tokens in texts:
        sequence = make_sequence(tokens)
        compute(memory, sequence)
        memory.release(sequence)
    used = make_sequence([*texts[0], 7])
    memory.begin(used)
    memory.release(used)
    memory.pages.take(4)
    assert [len(memory.device.longest(keys_of(tokens))) for tokens in texts] == [2, 0, 0]


def test_a_text_that_is_cached_whole_is_copied_only_if_there_is_room():
    """The last token is computed again, into a copy; without a page for it the last page is computed anew, at once."""
    for free, expected in ((1, 3), (0, 2)):
        memory = KVMemory(num_pages=3 + free, page_size=2)
        first = make_sequence([1, 2, 3, 4])
        compute(memory, first)
        memory.release(first)
        again = make_sequence([1, 2, 3, 4])
        memory.begin(again)
        assert again.num_computed == expected
        memory.grow(again, 4)
        _, copies = memory.take_moves()
        assert len(copies) == free


def test_prompts_with_logprobs_are_computed_whole_and_not_counted():
    memory = KVMemory(num_pages=9, page_size=2)
    compute(memory, make_sequence([1, 2, 3, 4]))
    assert cached_tokens(memory, [1, 2, 3, 4], prompt_logprobs=1) == 0
    assert (memory.prefix_queries, memory.prefix_hits) == (0, 0)
    assert cached_tokens(memory, [1, 2, 3, 4]) == 4
    assert (memory.prefix_queries, memory.prefix_hits) == (5, 4)
