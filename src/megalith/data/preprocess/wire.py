"""What the parent and its workers say to each other, and the memory they share.

```
parent ── Job, Release, Turn ──▶ worker          messages: msgpack over a pipe
parent ◀─ Chunk, NeedTurn, Done, Failed ── worker
        shared memory: per worker two output slots (tokens │ lengths │ counts │ hashes), and input slots for streamed files
```
Knows layouts. Refuses to know what tokens or lines are worth.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

OUTPUT_SLOTS = 2
"""A worker fills one while the other waits for its turn to be written."""
_ALIGNMENT = 4096


class Job(msgspec.Struct, tag=True, array_like=True):
    """A piece of one source.

    Lines that start in [start, stop) of a plain file; or `length` bytes in input slot `slot`; or all of the plain file
    `spill`; or, with none of these, the whole plain file as one document. `start` and `stop` are offsets into the
    uncompressed source, and `stop` is where the next job of the source begins (`last`: there is none). `read` is how far
    the file had been read, in bytes as stored.
    """

    number: int
    source: int
    start: int
    stop: int
    read: int
    last: bool
    slot: int = -1
    length: int = 0
    spill: str = ""


class Release(msgspec.Struct, tag=True, array_like=True):
    """Output slot `slot` was written and may be filled again."""

    slot: int


class Turn(msgspec.Struct, tag=True, array_like=True):
    """All jobs before this one are written: the worker may handle a long record, of which memory allows one at a time."""

    job: int


class Segment(msgspec.Struct, array_like=True):
    """A run of one key in a slot: `tokens` from element `token_start`, `items` (documents, or their sentences) ending in it
    from `item_start`, `documents` ending in it from `document_start`.
    """

    key: int
    token_start: int
    tokens: int
    item_start: int
    items: int
    document_start: int
    documents: int


class Reject(msgspec.Struct, array_like=True):
    """Line `line` of the job (from 0) was no document."""

    line: int
    reason: str
    excerpt: str


class Chunk(msgspec.Struct, tag=True, array_like=True):
    """A filled output slot, and rejects up to here."""

    job: int
    slot: int
    segments: list[Segment]
    rejects: list[Reject]


class NeedTurn(msgspec.Struct, tag=True, array_like=True):
    job: int


class Done(msgspec.Struct, tag=True, array_like=True):
    """A job's end: how many lines it had, how many of them were blank, empty documents by key."""

    job: int
    lines: int
    blank: int
    empty: list[int]


class Failed(msgspec.Struct, tag=True, array_like=True):
    """A user's error in a worker (`where`, `fix`), or a defect (`where` is empty, `what` a traceback)."""

    what: str
    where: str
    fix: str


class Checked(msgspec.Struct, tag=True, array_like=True):
    """The reference's `ids` (int32) and `lengths` (int64) of `documents`, and the tokenizer's hash; or why not, `failure`."""

    documents: list[bytes] = []
    ids: bytes = b""
    lengths: bytes = b""
    hash: str = ""
    failure: str = ""


ToWorker = Job | Release | Turn
FromWorker = Chunk | NeedTurn | Done | Failed | Checked


@dataclass(frozen=True)
class Slot:
    """Views of one output slot: `lengths` by item, `counts` of items and `hashes` by document."""

    tokens: npt.NDArray
    lengths: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    hashes: npt.NDArray[np.uint64]


class SharedMemory:
    """Anonymous memory that forked workers inherit: output slots by worker, and input slots."""

    def __init__(
        self, workers: int, dtype: np.dtype, slot_tokens: int, inputs: int, input_bytes: int
    ) -> None:
        self.dtype = dtype
        self.slot_tokens = slot_tokens
        self.slot_documents = max(1024, slot_tokens // 16)
        self.input_bytes = input_bytes
        self._slot_bytes = _aligned(slot_tokens * dtype.itemsize + self.slot_documents * 16)
        self._inputs_at = workers * OUTPUT_SLOTS * self._slot_bytes
        self._map = mmap.mmap(-1, self._inputs_at + inputs * _aligned(input_bytes) or _ALIGNMENT)

    def output(self, worker: int, slot: int) -> Slot:
        start = (worker * OUTPUT_SLOTS + slot) * self._slot_bytes
        hashes = np.frombuffer(self._map, np.uint64, self.slot_documents, start)
        start += hashes.nbytes
        lengths = np.frombuffer(self._map, np.int32, self.slot_documents, start)
        start += lengths.nbytes
        counts = np.frombuffer(self._map, np.int32, self.slot_documents, start)
        start += counts.nbytes
        return Slot(np.frombuffer(self._map, self.dtype, self.slot_tokens, start), lengths, counts, hashes)

    def input(self, slot: int) -> memoryview:
        start = self._inputs_at + slot * _aligned(self.input_bytes)
        return memoryview(self._map)[start : start + self.input_bytes]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
