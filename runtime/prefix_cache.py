"""Contexts that stay in the page pool after their request, and the room that running requests were promised.

A new prompt begins with the longest run of whole pages it shares with a context that is kept, so a document is read
once and asked many times. Kept contexts use only what is not promised: they go, least recently used first, when a
request needs their room or they outgrow the budget. Pages shared by several contexts or requests count once.

The surprising rule: the first page of a context is exact and belongs to its sequence, so it is kept in host memory and
copied back; only quantized pages are shared. The newest, incomplete page is not kept: its tokens are read again, which
is what makes an answer the same whether its context was kept or saved and restored. Not for several threads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lcconvert.runtime.sidecar import PAGE

if TYPE_CHECKING:
    from lcconvert.runtime.engine import Engine
    from lcconvert.runtime.kv_cache import Sequence


@dataclass(eq=False)
class Kept:
    """A context of `1 + len(pages)` whole pages; `ids` int32 [128 * that]."""

    ids: np.ndarray
    sink: torch.Tensor  # host copy of the exact first page, [K and V, layers, Hkv, 128, D]
    pages: list[int]
    session: str | None = None


@dataclass(eq=False)
class Lease:
    """A sequence for one request, and what was promised to it."""

    sequence: Sequence
    cached: int  # tokens it began with
    pages: list[int]  # of the pool that it holds, by what is known of it
    new_pages: int  # that it can come to need besides
    kept: Kept | None = None  # its own context, once read


class PrefixCache:
    """What the pool of `engine` holds. `budget`: tokens to keep beyond running requests; None is the whole context, 0
    keeps nothing."""

    def __init__(self, engine: Engine, budget: int | None = None):
        self._engine = engine
        self._capacity = pages_of(engine.max_context)
        self._budget = self._capacity if budget is None else min(budget // PAGE, self._capacity)
        self._kept: list[Kept] = []  # the most recently used last
        self._leases: list[Lease] = []
        self._used: Counter[int] = Counter()  # kept contexts and leases that hold a page
        self._leased: Counter[int] = Counter()  # leases alone
        self.evicted = 0

    @property
    def kept_tokens(self) -> int:
        """Tokens of kept contexts in pages of the pool; shared ones count once."""
        return PAGE * len({page for kept in self._kept for page in kept.pages})

    @property
    def free_tokens(self) -> int:
        """Tokens that are not promised to running requests; kept contexts would make room. Any thread may ask."""
        leases = list(self._leases)
        return PAGE * max(self._capacity - len(self._leased) - sum(lease.new_pages for lease in leases), 0)

    def longest(self, ids: np.ndarray) -> tuple[Kept | None, int]:
        """The kept context that shares most whole pages with `ids` int32 [T], and how many tokens that is. At least one
        token is left to read."""
        best, most, limit = None, 0, (len(ids) - 1) // PAGE * PAGE
        for kept in reversed(self._kept):
            size = common_tokens(kept.ids, ids[:limit])
            if size > most:
                best, most = kept, size
        return best, most

    def lease(self, ids: np.ndarray, tokens: int) -> Lease | None:
        """A sequence that holds what is kept of `ids` and may grow to `tokens`; None while running requests leave no
        room for it."""
        kept, cached = self.longest(ids)
        shared = kept.pages[: cached // PAGE - 1] if kept else []
        new_pages = pages_of(tokens) - len(shared)
        promised = sum(lease.new_pages for lease in self._leases) + new_pages
        if promised + len(self._leased.keys() | set(shared)) > self._capacity:
            return None
        lease = Lease(self._engine.new_sequence(), cached, shared, new_pages)
        if kept:
            self._kept.remove(kept)
            self._kept.append(kept)
            self._fill(lease.sequence, kept, cached)
        self._leases.append(lease)
        self._used.update(shared)
        self._leased.update(shared)
        while self._kept and promised + len(self._used) > self._capacity:
            self._evict()
        return lease

    def keep(self, lease: Lease, session: str | None = None) -> None:
        """Keeps the whole pages that the lease's sequence holds by now, for a session if that is named."""
        seq = lease.sequence
        more = seq.pages[len(lease.pages) :]
        lease.pages += more
        lease.new_pages -= len(more)
        self._used.update(more)
        self._leased.update(more)
        if seq.length < PAGE:
            return
        ids = np.array(seq.ids[: PAGE * (1 + len(seq.pages))], np.int32)
        sink = lease.kept.sink if lease.kept else self._read_sink(seq)
        lease.kept = new = Kept(ids, sink, list(seq.pages), session)
        if not self._budget:
            return
        for old in [old for old in self._kept if common_tokens(old.ids, ids) == len(old.ids)]:  # `new` continues it
            new.session = new.session or old.session
            self._forget(old)
        self._kept.append(new)
        self._used.update(new.pages)
        self._engine.pool.hold(new.pages)

    def end(self, lease: Lease) -> None:
        """Gives the lease's sequence and promise back. What was kept of it stays, within the budget."""
        self._leases.remove(lease)
        _take_away(self._leased, lease.pages)
        _take_away(self._used, lease.pages)
        self._engine.free(lease.sequence)
        while self._kept and self.kept_tokens > PAGE * self._budget:
            self._evict()

    def clear(self) -> None:
        while self._kept:
            self._forget(self._kept[0])

    def named(self, session: str) -> Kept | None:
        """The newest kept context of a session."""
        return next((kept for kept in reversed(self._kept) if kept.session == session), None)

    def _evict(self) -> None:
        self._forget(self._kept[0])
        self.evicted += 1

    def _forget(self, kept: Kept) -> None:
        self._kept.remove(kept)
        _take_away(self._used, kept.pages)
        self._engine.pool.release(kept.pages)

    @torch.inference_mode()
    def _fill(self, seq: Sequence, kept: Kept, tokens: int) -> None:
        pool = self._engine.pool
        seq.ids = kept.ids[:tokens].tolist()
        seq.pages = kept.pages[: tokens // PAGE - 1]
        pool.hold(seq.pages)
        for exact, layers in zip((pool.exact_k, pool.exact_v), kept.sink, strict=True):
            for pages, sink in zip(exact, layers, strict=True):
                pages.data[seq.sink] = sink.to(pool.device)

    @torch.inference_mode()
    def _read_sink(self, seq: Sequence) -> torch.Tensor:
        pool = self._engine.pool
        return torch.stack(
            [torch.stack([pages.data[seq.sink] for pages in exact]) for exact in (pool.exact_k, pool.exact_v)]
        ).cpu()


def pages_of(tokens: int) -> int:
    """Pages to promise for a context of `tokens`, the first one included although it lies outside the pool."""
    return -(-tokens // PAGE)


def common_tokens(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two id arrays, rounded down to whole pages."""
    size = min(len(a), len(b)) // PAGE * PAGE
    if not size or not np.array_equal(a[:PAGE], b[:PAGE]):
        return 0
    different = a[:size] != b[:size]
    first = int(different.argmax())
    return (first if different[first] else size) // PAGE * PAGE


def _take_away(counter: Counter[int], pages: Iterable[int]) -> None:
    counter.subtract(pages)
    for page in pages:
        if counter[page] <= 0:
            del counter[page]
