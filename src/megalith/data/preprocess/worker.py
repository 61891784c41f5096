"""One worker: jobs in, tokens out through shared memory, one job after another.

```
Job ─▶ batches ─▶ parser ─▶ encoder ─▶ emitter ─▶ Chunk … Done
              ╰▶ a Span (too large to load): NeedTurn, then `long`
```
Knows the order of these steps and the size of its own process. Refuses to know output files and other workers.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import Connection
from typing import NoReturn

import msgspec
import numpy as np

from megalith.data.preprocess.batches import (
    Limits,
    LineReader,
    PlainFile,
    Span,
    memory_batches,
)
from megalith.data.preprocess.emit import Emitter, OpenDocument
from megalith.data.preprocess.long import BadRecord, LongRecord
from megalith.data.preprocess.parse import BOM, JsonLines, Paragraphs, Parser, TextLines, WholeText, excerpt
from megalith.data.preprocess.sources import Source
from megalith.data.preprocess.wire import (
    OUTPUT_SLOTS,
    Done,
    Failed,
    FromWorker,
    Job,
    NeedTurn,
    Reject,
    Release,
    SharedMemory,
    ToWorker,
    Turn,
)
from megalith.data.sentences import Sentences
from megalith.errors import MegalithError
from megalith.tokenizers.fast import Encoder

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_MOST_TOKENS = 2**31 - 1
_GC_THRESHOLD = 200_000
"""A batch of parsed lines is many objects at once, none of them garbage before its end."""
_WATCHED_BYTES = 4 << 20
"""How much text is encoded between two looks at the process's own size."""
_ENCODED_AT_ONCE = 8192
"""Documents: an array for each is dear when they are a letter long."""


@dataclass(frozen=True)
class Task:
    """What all jobs of a run have in common. `eod` is None if none is appended; `cache_bytes` and `sentences` see
    `Options`.
    """

    sources: Sequence[Source]
    keys: tuple[str, ...]
    eod: int | None
    txt_documents: str
    cache_bytes: int
    limits: Limits
    sentences: Sentences | None = None


class ParentGone(Exception):
    """The parent closed its end, or died."""


class Worker:
    """Runs jobs until the parent closes the connection."""

    def __init__(
        self, task: Task, encoder: Encoder, shared: SharedMemory, number: int, connection: Connection
    ) -> None:
        self.task = task
        self._encoder = encoder
        self._shared = shared
        self._connection = connection
        self._jobs: deque[Job] = deque()
        self._free = deque(range(OUTPUT_SLOTS))
        self._turn = -1
        self._decoder = msgspec.msgpack.Decoder(ToWorker)
        self._emitter = Emitter(shared, number, self._send, self._acquire)
        self._emitter.eod = task.eod
        self._json = JsonLines(task.keys)
        self._reader = LineReader(record_bytes=task.limits.record)
        self._base = _resident_bytes()
        self._unwatched = 0

    def serve(self) -> None:
        while True:
            while not self._jobs:
                self._receive()
            self._run(self._jobs.popleft())

    def _run(self, job: Job) -> None:
        source = self.task.sources[job.source]
        parser = self._parser(source)
        self._emitter.begin(job.number, len(self.task.keys))
        lines = blank = 0
        path = job.spill or source.path
        file = PlainFile(path) if job.slot < 0 else None
        try:
            for item in self._items(job, source, file):
                if isinstance(item, Span):
                    assert file is not None
                    self._long(job, file, item, lines, json=not source.text)
                    lines += 1
                    continue
                parsed = parser.parse(item)
                for key, column in enumerate(parsed.columns):
                    for first in range(0, len(column), _ENCODED_AT_ONCE):
                        self._documents(key, column[first : first + _ENCODED_AT_ONCE])
                for reject in parsed.rejects:
                    reject.line += lines
                    self._emitter.reject(reject)
                lines += parsed.lines
                blank += parsed.blank
                del parsed
                self._limit_memory(len(item))
        finally:
            if file is not None:
                file.close()
        self._emitter.flush()
        self._send(Done(job.number, lines, blank, self._emitter.empty))

    def _documents(self, key: int, documents: list[bytes]) -> None:
        """Encode and emit whole documents, by sentence if that is asked for."""
        if self.task.sentences is None:
            self._emitter.documents(key, *self._encoder.encode(documents))
            return
        split = [self.task.sentences.split(document) for document in documents]
        counts = np.fromiter(map(len, split), np.int64, len(split))
        self._emitter.documents(key, *self._encoder.encode(list(chain.from_iterable(split))), counts)

    def _parser(self, source: Source) -> Parser:
        if not source.text:
            return self._json
        parsers: dict[str, type[Parser]] = {"file": WholeText, "line": TextLines, "paragraph": Paragraphs}
        return parsers[self.task.txt_documents]()

    def _items(self, job: Job, source: Source, file: PlainFile | None) -> Iterator[memoryview | Span]:
        """The job's batches and long records; a byte order mark at the start of plain text is cut off."""
        items = self._raw_items(job, source, file)
        if not source.text or job.start:
            yield from items
            return
        for number, item in enumerate(items):
            if number == 0 and isinstance(item, Span):
                assert file is not None
                item = Span(item.start + len(BOM) * (file.read(0, len(BOM)) == BOM), item.end)
            elif number == 0 and isinstance(item, memoryview) and bytes(item[: len(BOM)]) == BOM:
                item = item[len(BOM) :]
            if item.end > item.start if isinstance(item, Span) else len(item):
                yield item

    def _raw_items(self, job: Job, source: Source, file: PlainFile | None) -> Iterator[memoryview | Span]:
        whole = source.text and self.task.txt_documents != "line"
        if file is None:
            data = self._shared.input(job.slot)[: job.length]
            return iter([data]) if whole else memory_batches(data)
        if job.spill:
            return iter([Span(0, file.size)])
        if whole:
            return iter([self._whole(file)])
        return self._reader.batches(file, job.start, job.stop)

    def _whole(self, file: PlainFile) -> memoryview | Span:
        if file.size > self.task.limits.record:
            return Span(0, file.size)
        return memoryview(file.read(0, file.size))

    def _long(self, job: Job, file: PlainFile, span: Span, line: int, *, json: bool) -> None:
        """A record that is not loaded; it is written only once all of it was checked."""
        self._wait_for_turn(job)
        if not json and self.task.txt_documents != "file":
            ending = file.read(max(span.start, span.end - 16), min(16, span.end - span.start))
            span = Span(span.start, span.end - len(ending) + len(ending.rstrip(b"\r\n")))
        record = LongRecord(file, span, self._ids_of_each, self.task.limits)
        try:
            values: list[bytes | Span] = record.json(self._json) if json else [span]
            for value in values:
                if isinstance(value, Span):
                    self._check(record, value, json=json)
        except BadRecord as error:
            self._emitter.reject(Reject(line, str(error), excerpt(record.excerpt())))
            return
        for key, value in enumerate(values):
            document = self._emitter.open_document(key)
            for piece in [value] if isinstance(value, bytes) else self._pieces(record, value, json=json):
                self._add(document, piece)
                self._limit_memory(_WATCHED_BYTES)
            document.close()

    def _pieces(self, record: LongRecord, span: Span, *, json: bool) -> Iterator[bytes]:
        return (record.pieces if self.task.sentences is None else record.paragraphs)(span, json=json)

    def _add(self, document: OpenDocument, piece: bytes) -> None:
        if self.task.sentences is None:
            document.add(self._encoder.encode([piece])[0])
            return
        ids, lengths = self._encoder.encode(self.task.sentences.split(piece))
        for sentence in np.split(ids, np.cumsum(lengths)[:-1]):
            document.add(sentence)
            document.end_item()

    def _check(self, record: LongRecord, span: Span, *, json: bool) -> None:
        """`BadRecord` for what handing the pieces out would run into, or an item too long for the index (int32)."""
        size = sum(map(len, self._pieces(record, span, json=json)))
        if size < _MOST_TOKENS or self.task.sentences is not None:  # a sentence is no longer than a piece
            return
        tokens = 1
        for piece in self._pieces(record, span, json=json):
            tokens += len(self._encoder.encode([piece])[0])
            self._limit_memory(_WATCHED_BYTES)
        if tokens > _MOST_TOKENS:
            raise BadRecord(f"{tokens:,} tokens in one document; the format holds {_MOST_TOKENS:,} at most")

    def _ids_of_each(self, texts: list[bytes]) -> list[list[int]]:
        ids, lengths = self._encoder.encode(texts)
        return [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])]

    def _limit_memory(self, encoded: int) -> None:
        """Empty the tokenizer's word cache, which grows with every new word, before it fills the machine."""
        self._unwatched += encoded
        if self._unwatched < _WATCHED_BYTES:
            return
        self._unwatched = 0
        if _resident_bytes() - self._base > self.task.cache_bytes:
            self._encoder.reset()
            gc.collect()
            _trim_heap()
            self._base = max(self._base, _resident_bytes() - self.task.cache_bytes // 2)

    def _wait_for_turn(self, job: Job) -> None:
        if self._turn < job.number:
            self._emitter.flush()
            self._send(NeedTurn(job.number))
            while self._turn < job.number:
                self._receive()

    def _acquire(self) -> int:
        while not self._free:
            self._receive()
        return self._free.popleft()

    def _receive(self) -> None:
        try:
            message = self._decoder.decode(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise ParentGone from None
        if isinstance(message, Job):
            self._jobs.append(message)
        elif isinstance(message, Release):
            self._free.append(message.slot)
        else:
            assert isinstance(message, Turn)
            self._turn = message.job

    def _send(self, message: FromWorker) -> None:
        send(self._connection, message)


def send(connection: Connection, message: FromWorker | ToWorker) -> None:
    """Send one message; ParentGone if nobody listens any more."""
    try:
        connection.send_bytes(msgspec.msgpack.encode(message))
    except (BrokenPipeError, ConnectionResetError):
        raise ParentGone from None


def serve(make: Callable[[], Worker], connection: Connection, parent: int) -> NoReturn:
    """The body of a forked worker process: never returns to the code that forked it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # what was forked is left alone, so that its pages stay shared
    gc.set_threshold(_GC_THRESHOLD)
    gc.enable()
    code = 0
    try:
        _die_with_parent(parent)
        make().serve()
    except ParentGone:
        pass
    except MegalithError as error:
        code = _fail(connection, Failed(error.problem.what, error.problem.where, error.problem.fix))
    except BaseException:
        code = _fail(connection, Failed(traceback.format_exc(), "", ""))
    finally:
        os._exit(code)


def _fail(connection: Connection, failed: Failed) -> int:
    with suppress(ParentGone):
        send(connection, failed)
    return 1


def _die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent ends, where there is such a kernel."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            raise ParentGone


def _resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not tell cheaply."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _trim_heap() -> None:
    """Give freed memory back to the system (glibc only)."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
