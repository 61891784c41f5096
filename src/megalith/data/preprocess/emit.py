"""A worker's side of the output: ids into shared slots, with document lengths and hashes.

Knows slots and how a document is closed. Refuses to know where ids come from and where slots go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

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
        self._tokens = 0
        self._documents = 0

    def reject(self, reject: Reject) -> None:
        self._rejects.append(reject)
        if len(self._rejects) >= _MOST_REJECTS:
            self.flush()

    def documents(self, key: int, ids: npt.NDArray, lengths: npt.NDArray[np.int64]) -> None:
        """Whole documents: `ids` back to back, `lengths` of each, zeros allowed."""
        full = lengths[lengths > 0]
        self.empty[key] += len(lengths) - len(full)
        extra = self.eod is not None
        ends = np.cumsum(full)
        start = done = 0
        while done < len(full):
            fit = self._fitting(ends, done, start, extra)
            if fit == 0:
                if self._segments:
                    self.flush()
                    continue
                self._oversized(key, ids[start : ends[done]])
                fit = 1
            else:
                self._pack(key, ids[start : ends[done + fit - 1]], full[done : done + fit])
            done += fit
            start = int(ends[done - 1])

    def flush(self) -> None:
        """Hand over what is in the slot, if there is anything."""
        if not (self._segments or self._rejects):
            return
        self._slot()
        self._send(Chunk(self._job, self._current, self._segments, self._rejects))
        self._segments, self._rejects = [], []
        self._tokens = self._documents = 0
        self._current = -1

    def open_document(self, key: int) -> OpenDocument:
        return OpenDocument(self, key)

    def _fitting(self, ends: npt.NDArray, done: int, start: int, extra: bool) -> int:
        """How many documents from number `done` on fit into the slot."""
        slot = self._slot()
        room = len(slot.tokens) - self._tokens
        totals = ends[done : done + len(slot.lengths) - self._documents] - start
        if extra:
            totals = totals + np.arange(1, len(totals) + 1)
        return int(np.searchsorted(totals, room, side="right"))

    def _slot(self) -> Slot:
        if self._current < 0:
            self._current = self._acquire()
        return self._slots[self._current]

    def _segment(self, key: int) -> Segment:
        """The run of a key at the end of the slot."""
        if not self._segments or self._segments[-1].key != key:
            self._segments.append(Segment(key, self._tokens, 0, self._documents, 0))
        return self._segments[-1]

    def _pack(self, key: int, ids: npt.NDArray, lengths: npt.NDArray[np.int64]) -> None:
        slot, segment, at, count = self._slot(), self._segment(key), self._tokens, len(lengths)
        if self.eod is not None:
            lengths = lengths + 1
        ends = np.cumsum(lengths)
        total = int(ends[-1])
        _interleave(slot.tokens[at : at + total], ids, ends, self.eod)
        first = self._documents
        slot.lengths[first : first + count] = lengths
        slot.hashes[first : first + count] = self._hashes(at, ends)
        segment.tokens += total
        segment.documents += count
        self._tokens += total
        self._documents += count

    def _hashes(self, at: int, ends: npt.NDArray) -> npt.NDArray[np.uint64]:
        """First 8 bytes of the SHA-256 of each document's stored tokens."""
        view, size, sha256 = self._bytes[self._current], self._itemsize, hashlib.sha256
        borders = ((ends + at) * size).tolist()
        starts = [at * size, *borders[:-1]]
        digests = [sha256(view[a:b]).digest()[:8] for a, b in zip(starts, borders, strict=True)]
        return np.frombuffer(b"".join(digests), np.uint64)

    def _oversized(self, key: int, ids: npt.NDArray) -> None:
        document = self.open_document(key)
        document.add(ids)
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

    def end_part(self, key: int, length: int, digest: bytes) -> None:
        """Close the document whose last tokens are in the slot."""
        if self._documents == len(self._slot().lengths):
            self.flush()
        slot, segment = self._slot(), self._segment(key)
        slot.lengths[self._documents] = length
        slot.hashes[self._documents] = np.frombuffer(digest, np.uint64)[0]
        segment.documents += 1
        self._documents += 1


class OpenDocument:
    """A document that comes in pieces, whatever the slots' size."""

    def __init__(self, emitter: Emitter, key: int) -> None:
        self._emitter = emitter
        self._key = key
        self._length = 0
        self._digest = hashlib.sha256()

    def add(self, ids: npt.NDArray) -> None:
        while len(ids):
            stored = self._emitter.part(self._key, ids)
            count = len(stored) // self._emitter._itemsize
            self._digest.update(stored)
            self._length += count
            ids = ids[count:]

    def close(self) -> None:
        """Append the end-of-document token and count the document; one without tokens is left out."""
        if not self._length:
            self._emitter.empty[self._key] += 1
            return
        if self._emitter.eod is not None:
            self.add(np.array([self._emitter.eod]))
        self._emitter.end_part(self._key, self._length, self._digest.digest()[:8])


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
