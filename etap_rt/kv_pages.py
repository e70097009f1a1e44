"""Which page belongs to whom: the bookkeeping of the paged KV cache. Plain host integers, no tokens."""

from __future__ import annotations

import operator
from array import array
from typing import Any, NamedTuple

import numpy as np

from etap_rt.errors import ArgumentError, OutOfPagesError

IntArray = np.ndarray[Any, np.dtype[np.int32]]


class Sequence:
    """The pages of one sequence, in order; the last one may be partly filled."""

    __slots__ = ("length", "pages", "row", "sent")

    def __init__(self, length: int, pages: array[int]) -> None:
        self.length = length  # tokens
        self.pages = pages
        self.row = -1  # the row of the block table that last got this sequence
        self.sent = 0  # leading pages for which that row still is right


class Reservation(NamedTuple):
    """New tokens of a step."""

    slots: IntArray  # (tokens,), sequence after sequence
    copies: IntArray  # (n, 3): from page, to page, filled tokens; to be copied before the slots are written
    pages: IntArray  # that the slots lie in
    moment: int  # of the pool's clock


class PagePool:
    """Pages with a free list and owner counts. A page with several owners is never written by one of them.

    Attributes: num_pages; page_size in tokens; max_length of a sequence in tokens; owners, the number of sequences
    that hold each page (num_pages,); moment, a clock that ticks when slots handed out earlier go stale.
    """

    def __init__(self, num_pages: int, page_size: int, max_pages_per_sequence: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.max_length = max_pages_per_sequence * page_size
        self.owners = np.zeros(num_pages, np.int32)
        self.moment = 0
        self._owners = self.owners.data  # the same counts, quicker to read one by one
        self._stale_since = np.zeros(num_pages, np.int64)
        self._free = array("i", np.arange(num_pages - 1, -1, -1, dtype=np.int32).tobytes())  # page 0 goes first

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def reserve(self, sequences: list[Sequence], counts: list[int]) -> Reservation:
        """Append counts[i] tokens to sequences[i], each of which comes once.

        All or nothing: raises ArgumentError if one would become too long, OutOfPagesError if there are too few
        free pages for all of them.
        """
        size = self.page_size
        starts = [s.length for s in sequences]
        self._check_lengths(starts, counts)
        added = [-(-(s.length + n) // size) - len(s.pages) for s, n in zip(sequences, counts, strict=True)]
        shared = self._shared_tails(sequences, counts)
        fresh = self._take(sum(added) + len(shared))

        copies = array("i")
        for s in shared:
            tail, copy = s.pages[-1], fresh.pop()
            copies.extend((tail, copy, s.length % size))
            s.pages[-1] = copy
            s.sent = min(s.sent, len(s.pages) - 1)
            self._owners[tail] -= 1
        touched = array("i")
        taken = 0
        for s, n, more in zip(sequences, counts, added, strict=True):
            if n:
                if more:
                    s.pages += fresh[taken : taken + more]
                    taken += more
                touched += s.pages[s.length // size :]
                s.length += n

        pages, triples = np.array(touched, np.int32), np.array(copies, np.int32).reshape(-1, 3)
        self._mark_stale(triples[:, 0])
        return Reservation(slots_in(pages, starts, counts, size), triples, pages, self.moment)

    def fork(self, sequence: Sequence) -> Sequence:
        """A new sequence with the same tokens; all pages become shared."""
        self.owners[np.array(sequence.pages, np.int32)] += 1
        return Sequence(sequence.length, sequence.pages[:])

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Drop the tokens from `length` on, which is at most the sequence's length."""
        if length == sequence.length:
            return
        keep = -(-length // self.page_size)
        dropped = sequence.pages[keep:]
        del sequence.pages[keep:]
        self._release(dropped)
        if length % self.page_size and self._owners[sequence.pages[-1]] == 1:
            self._mark_stale(np.array(sequence.pages[-1:], np.int32))
        sequence.length = length
        sequence.sent = min(sequence.sent, keep)

    def free(self, sequence: Sequence) -> None:
        """Give back all pages that no other sequence holds."""
        self._release(sequence.pages)
        sequence.pages = array("i")
        sequence.length = 0

    def is_stale(self, reservation: Reservation) -> bool:
        """Whether pages of a reservation were given back, cut or copied for a fork after it was made."""
        if self.moment == reservation.moment:
            return False
        return bool((self._stale_since[reservation.pages] > reservation.moment).any())

    def _check_lengths(self, starts: list[int], counts: list[int]) -> None:
        if self.max_length >= self.num_pages * self.page_size:
            return  # pages run out first, which is another error
        if max(map(operator.add, starts, counts), default=0) <= self.max_length:
            return
        for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
            if start + count > self.max_length:
                most = self.max_length - start
                limit = f"at most {most}: a sequence holds {self.max_length} tokens (max_pages_per_sequence)"
                raise ArgumentError(f"counts[{i}]", str(count), limit)

    def _shared_tails(self, sequences: list[Sequence], counts: list[int]) -> list[Sequence]:
        """The sequences that must leave a shared, partly filled last page before they can write into it.

        If all owners of a page are about to write, the last of them may keep it.
        """
        leaving: list[Sequence] = []
        left: dict[int, int] = {}  # owners of a page that leave it
        owners, size = self._owners, self.page_size
        for s, n in zip(sequences, counts, strict=True):
            if n and s.length % size and owners[s.pages[-1]] > 1:
                gone = left.get(s.pages[-1], 0)
                if owners[s.pages[-1]] - gone > 1:
                    left[s.pages[-1]] = gone + 1
                    leaving.append(s)
        return leaving

    def _take(self, count: int) -> array[int]:
        """Pages off the free list, with one owner each."""
        rest = len(self._free) - count
        if rest < 0:
            raise OutOfPagesError(count, len(self._free))
        pages = self._free[rest:]
        del self._free[rest:]
        pages.reverse()
        self.owners[np.array(pages, np.int32)] = 1
        return pages

    def _release(self, pages: array[int]) -> None:
        if not pages:
            return
        held = np.array(pages, np.int32)
        self.owners[held] -= 1
        orphans = held[self.owners[held] == 0]
        self._free.frombytes(orphans[::-1].tobytes())
        self._mark_stale(orphans)

    def _mark_stale(self, pages: IntArray) -> None:
        """Slots in these pages that were handed out before now must not be written any more."""
        if pages.size:
            self.moment += 1
            self._stale_since[pages] = self.moment


def slots_in(pages: IntArray, starts: list[int], counts: list[int], page_size: int) -> IntArray:
    """Slots of counts[i] tokens from position starts[i] on, where `pages` are just the pages they lie in, in order."""
    count = np.array(counts, np.int64)
    offset = np.array(starts, np.int64) % page_size  # of the first token in its page
    pages_each = np.where(count > 0, -(-(offset + count) // page_size), 0)
    # As if the pages lay one after the other: where a sequence begins, less the tokens that come before it.
    begin = (pages_each.cumsum() - pages_each) * page_size + offset - (count.cumsum() - count)
    place = np.repeat(begin, count) + np.arange(count.sum())
    page, token = np.divmod(place, page_size)
    return (pages[page] * page_size + token).astype(np.int32)
