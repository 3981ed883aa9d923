"""Which pages hold which tokens: settled, full pages by the hash of all tokens up to their end.

A page's key is a chain: the hash of the key of the page before it and of its own tokens. So equal keys mean equal texts from the first
token on, and a page is found by walking along the chain. The chain of each text starts with the partition it belongs to; texts of
different partitions have no key in common. Everything hashed is typed and prefixed with its length, so that no two
texts are written the same way. In front of the hash a key has the tenant's mark, so that all that one tenant has there can be forgotten.

The idea is vLLM's automatic prefix caching (``vllm/v1/core/kv_cache_utils.py``); SHA-256 in place of a fast hash because a
collision that somebody can construct would show one client's text to another (CVE-2025-25183).
"""

from __future__ import annotations

import array
import hashlib
from collections.abc import Callable, Iterable, Sequence

from jaxpaged.scheduling.pages import PageAllocator

Key = bytes
"""The tenant's mark, and SHA-256 of a text up to the end of a page and of its partition."""

_MARK_BYTES = 8


def tenant_mark(tenant: str) -> bytes:
    """Returns what all keys of a tenant begin with. Two tenants may have the same one, by a chance of 2**-64; only resets would meet."""
    return _digest(("mark of", tenant.encode()))[:_MARK_BYTES]


def partition_key(tenant: str, *fields: tuple[str, str]) -> Key:
    """Returns where the chains of a partition start.

    Args:
        tenant: Whose texts.
        fields: Name and value of whatever else separates texts that have the same tokens.
    """
    return tenant_mark(tenant) + _digest(("tenant", tenant.encode()), *((name, value.encode()) for name, value in fields))


def next_key(parent: Key, tokens: Sequence[int]) -> Key:
    """Returns the key of a page with these tokens that follows the page with key ``parent``."""
    return parent[:_MARK_BYTES] + _digest(("parent", parent), ("tokens", array.array("q", tokens).tobytes()))


def extend_keys(keys: list[Key], start: Key, tokens: Sequence[int], page_size: int) -> None:
    """Appends the keys of the full pages of a text that are not in ``keys`` yet."""
    for page in range(len(keys), len(tokens) // page_size):
        keys.append(next_key(keys[-1] if keys else start, tokens[page * page_size : (page + 1) * page_size]))


def _digest(*fields: tuple[str, bytes]) -> Key:
    hasher = hashlib.sha256()
    for name, value in fields:
        hasher.update(b"%d:%s%d:" % (len(name), name.encode(), len(value)))
        hasher.update(value)
    return hasher.digest()


class PrefixCache:
    """The keys of one tier: of pages on the device, or of places in host memory.

    Pages that it knows are kept by their allocator when nobody reads them, and may be evicted; nothing is written to them.

    Args:
        num_pages: Pages of the tier, the null page included.
        on_evict: Called with key and page before somebody else gets it, while its content is still there.

    Attributes:
        pages: The tier's allocator.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[Key, int], None] = lambda key, page_id: None) -> None:
        self.pages = PageAllocator(num_pages, self._evicted)
        self._on_evict = on_evict
        self._page_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    def __len__(self) -> int:
        return len(self._page_of)

    def find(self, key: Key) -> int | None:
        """Returns the page with this key."""
        return self._page_of.get(key)

    def longest(self, keys: Iterable[Key]) -> list[int]:
        """Returns the pages of the longest beginning of ``keys`` that is known."""
        found = []
        for key in keys:
            page_id = self._page_of.get(key)
            if page_id is None:
                break
            found.append(page_id)
        return found

    def put(self, key: Key, page_id: int) -> None:
        """Says what a used page holds; where another page holds the same, or it has a key already, nothing changes."""
        if key not in self._page_of and page_id not in self._key_of:
            self.pages.keep(page_id)
            self._page_of[key] = page_id
            self._key_of[page_id] = key

    def key_of(self, page_id: int) -> Key | None:
        """Returns the key of a page."""
        return self._key_of.get(page_id)

    def forget(self, key: Key) -> None:
        """Forgets a key; its page is free once nobody reads it. Unknown keys are ignored."""
        page_id = self._page_of.pop(key, None)
        if page_id is not None:
            del self._key_of[page_id]
            self.pages.drop(page_id)

    def clear(self, mark: bytes = b"") -> None:
        """Forgets the keys that begin with a tenant's mark, or all."""
        for key in [key for key in self._page_of if key.startswith(mark)]:
            self.forget(key)

    def reset(self) -> None:
        """Forgets everything, and whose the pages were."""
        self._page_of.clear()
        self._key_of.clear()
        self.pages.reset()

    def _evicted(self, page_id: int) -> None:
        key = self._key_of.pop(page_id)
        del self._page_of[key]
        self._on_evict(key, page_id)
