"""A worker's side of the output: ids into shared slots, with lengths and document hashes.

An item is a document, or with split sentences one of its sentences.

Knows slots and how a document is closed. Refuses to know where ids come from and where slots go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megalith.data.preprocess.wire import OUTPUT_SLOTS, Chunk, Reject, Segment, SharedMemory, Slot

_MOST_REJECTS = 4096
_LONG_DOCUMENT = 256
"""Mean tokens a document from which copying them one by one beats one scatter over all."""


class Emitter:
    """Packs documents into the worker's slots; `send(chunk)` hands one over, `acquire()` waits for a free one.

    `eod` is appended to every document that has tokens; documents without are counted in `empty` and left out.
    """

    def __init__(
        self,
        shared: SharedMemory,
        worker: int,
        send: Callable[[Chunk], None],
        acquire: Callable[[], int],
    ) -> None:
        self._slots: list[Slot] = [shared.output(worker, number) for number in range(OUTPUT_SLOTS)]
        self._bytes = [slot.tokens.data.cast("B") for slot in self._slots]
        self._itemsize = shared.dtype.itemsize
        self._send = send
        self._acquire = acquire
        self._current = -1
        self.eod: int | None = None

    def begin(self, job: int, keys: int) -> None:
        self._job = job
        self.empty = [0] * keys
        self._segments: list[Segment] = []
        self._rejects: list[Reject] = []
        self._tokens = self._items = self._documents = 0

    def reject(self, reject: Reject) -> None:
        self._rejects.append(reject)
        if len(self._rejects) >= _MOST_REJECTS:
            self.flush()

    def documents(
        self, key: int, ids: npt.NDArray, lengths: npt.NDArray[np.int64], counts: npt.NDArray | None = None
    ) -> None:
        """Whole documents: `ids` back to back, `lengths` of their items, zeros allowed, `counts` items of each document;
        None where each item is a document.
        """
        documents = _Documents.of(lengths, counts)
        self.empty[key] += (len(lengths) if counts is None else len(counts)) - len(documents.counts)
        done = 0
        while done < len(documents.counts):
            fit = self._fitting(documents, done)
            if fit == 0:
                if self._segments:
                    self.flush()
                    continue
                self._oversized(key, documents.some(ids, done, 1))
                fit = 1
            else:
                self._pack(key, documents.some(ids, done, fit))
            done += fit

    def flush(self) -> None:
        """Hand over what is in the slot, if there is anything."""
        if not (self._segments or self._rejects):
            return
        self._slot()
        self._send(Chunk(self._job, self._current, self._segments, self._rejects))
        self._segments, self._rejects = [], []
        self._tokens = self._items = self._documents = 0
        self._current = -1

    def open_document(self, key: int) -> OpenDocument:
        return OpenDocument(self, key)

    def _fitting(self, documents: _Documents, done: int) -> int:
        """How many documents from number `done` on fit into the slot."""
        slot = self._slot()
        most = len(slot.counts) - self._documents
        first_token, first_item = documents.starts(done)
        tokens = documents.token_ends[done : done + most] - first_token
        items = documents.item_ends[done : done + most] - first_item
        if self.eod is not None:
            tokens = tokens + np.arange(1, len(tokens) + 1)
        fit = np.searchsorted(tokens, len(slot.tokens) - self._tokens, side="right")
        return min(int(fit), int(np.searchsorted(items, len(slot.lengths) - self._items, side="right")))

    def _slot(self) -> Slot:
        if self._current < 0:
            self._current = self._acquire()
        return self._slots[self._current]

    def _segment(self, key: int) -> Segment:
        """The run of a key at the end of the slot."""
        if not self._segments or self._segments[-1].key != key:
            self._segments.append(Segment(key, self._tokens, 0, self._items, 0, self._documents, 0))
        return self._segments[-1]

    def _pack(self, key: int, some: _Some) -> None:
        slot, segment, at = self._slot(), self._segment(key), self._tokens
        last = np.cumsum(some.counts) - 1
        lengths = some.lengths
        if self.eod is not None:
            lengths = lengths.copy()
            lengths[last] += 1
        ends = np.cumsum(lengths)[last]
        total, items, documents = int(ends[-1]), len(lengths), len(some.counts)
        _interleave(slot.tokens[at : at + total], some.ids, ends, self.eod)
        slot.lengths[self._items : self._items + items] = lengths
        slot.counts[self._documents : self._documents + documents] = some.counts
        slot.hashes[self._documents : self._documents + documents] = self._hashes(at, ends)
        segment.tokens += total
        segment.items += items
        segment.documents += documents
        self._tokens += total
        self._items += items
        self._documents += documents

    def _hashes(self, at: int, ends: npt.NDArray) -> npt.NDArray[np.uint64]:
        """First 8 bytes of the SHA-256 of each document's stored tokens."""
        view, size, sha256 = self._bytes[self._current], self._itemsize, hashlib.sha256
        borders = ((ends + at) * size).tolist()
        starts = [at * size, *borders[:-1]]
        digests = [sha256(view[a:b]).digest()[:8] for a, b in zip(starts, borders, strict=True)]
        return np.frombuffer(b"".join(digests), np.uint64)

    def _oversized(self, key: int, some: _Some) -> None:
        document = self.open_document(key)
        start = 0
        for length in some.lengths.tolist():
            document.add(some.ids[start : start + length])
            document.end_item()
            start += length
        document.close()

    def part(self, key: int, ids: npt.NDArray) -> memoryview:
        """As many of `ids` as the slot takes, of a document that goes on; returns them as stored."""
        if self._tokens == len(self._slot().tokens):
            self.flush()
        slot, segment, at = self._slot(), self._segment(key), self._tokens
        count = min(len(ids), len(slot.tokens) - at)
        slot.tokens[at : at + count] = ids[:count]
        segment.tokens += count
        self._tokens += count
        return self._bytes[self._current][at * self._itemsize : (at + count) * self._itemsize]

    def end_item(self, key: int, length: int) -> None:
        """Close the item whose last tokens are in the slot."""
        if self._items == len(self._slot().lengths):
            self.flush()
        slot, segment = self._slot(), self._segment(key)
        slot.lengths[self._items] = length
        segment.items += 1
        self._items += 1

    def end_document(self, key: int, items: int, digest: bytes) -> None:
        """Close the document whose last item was ended."""
        if self._documents == len(self._slot().counts):
            self.flush()
        slot, segment = self._slot(), self._segment(key)
        slot.counts[self._documents] = items
        slot.hashes[self._documents] = np.frombuffer(digest, np.uint64)[0]
        segment.documents += 1
        self._documents += 1


class OpenDocument:
    """A document that comes in pieces, whatever the slots' size. An item that was ended may yet get the end-of-document
    token: it is closed when the next one begins.
    """

    def __init__(self, emitter: Emitter, key: int) -> None:
        self._emitter = emitter
        self._key = key
        self._length = 0
        self._items = 0
        self._ended = False
        self._digest = hashlib.sha256()

    def add(self, ids: npt.NDArray) -> None:
        if self._ended and len(ids):
            self._close_item()
        self._append(ids)

    def end_item(self) -> None:
        """What comes next is another item; one without tokens is none."""
        self._ended = self._length > 0

    def close(self) -> None:
        """Append the end-of-document token and count the document; one without tokens is left out."""
        if not self._length:
            self._emitter.empty[self._key] += 1
            return
        if self._emitter.eod is not None:
            self._append(np.array([self._emitter.eod]))
        self._close_item()
        self._emitter.end_document(self._key, self._items, self._digest.digest()[:8])

    def _append(self, ids: npt.NDArray) -> None:
        while len(ids):
            stored = self._emitter.part(self._key, ids)
            count = len(stored) // self._emitter._itemsize
            self._digest.update(stored)
            self._length += count
            ids = ids[count:]

    def _close_item(self) -> None:
        self._emitter.end_item(self._key, self._length)
        self._items += 1
        self._length, self._ended = 0, False


class _Some(NamedTuple):
    """A few documents: their ids, the lengths of their items, how many items each has."""

    ids: npt.NDArray
    lengths: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Documents:
    """Documents that have tokens: `lengths` of their items, `counts` of items by document, and where each ends."""

    lengths: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    token_ends: npt.NDArray[np.int64]
    item_ends: npt.NDArray[np.int64]

    @classmethod
    def of(cls, lengths: npt.NDArray[np.int64], counts: npt.NDArray | None) -> _Documents:
        """Without the items, and documents, that have no tokens."""
        full = lengths > 0
        if counts is None:
            lengths = lengths[full]
            counts = np.ones(len(lengths), np.int64)
        else:
            owners = np.repeat(np.arange(len(counts)), counts)
            lengths = lengths[full]
            counts = np.bincount(owners[full], minlength=len(counts))
            counts = counts[counts > 0]
        item_ends = np.cumsum(counts)
        token_ends = np.cumsum(lengths)[item_ends - 1] if len(counts) else item_ends
        return cls(lengths, counts, token_ends, item_ends)

    def starts(self, number: int) -> tuple[int, int]:
        """First token and first item of a document."""
        return (int(self.token_ends[number - 1]), int(self.item_ends[number - 1])) if number else (0, 0)

    def some(self, ids: npt.NDArray, first: int, count: int) -> _Some:
        token, item = self.starts(first)
        last = first + count - 1
        return _Some(
            ids[token : self.token_ends[last]],
            self.lengths[item : self.item_ends[last]],
            self.counts[first : first + count],
        )


def _interleave(out: npt.NDArray, ids: npt.NDArray, ends: npt.NDArray, eod: int | None) -> None:
    """`out` = the documents with `eod` after each; `ends` are their ends in `out`."""
    if eod is None:
        out[:] = ids
        return
    if len(ids) > _LONG_DOCUMENT * len(ends):
        start = source = 0
        for end in ends.tolist():
            count = end - start - 1
            out[start : end - 1] = ids[source : source + count]
            start, source = end, source + count
    else:
        own = np.ones(len(out), bool)
        own[ends - 1] = False
        out[own] = ids
    out[ends - 1] = eod
