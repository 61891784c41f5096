"""The parent's loop: hands jobs to workers as they ask, writes what comes back in the order of the input.

```
Feed ─ jobs ─▶ workers (two jobs each, so that none waits) ─ chunks, in any order ─▶ queues by job
                                     head of the queue only ─▶ Store.append … Store.commit ─▶ Release
```
Knows order. Refuses to know text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from megalith.data.preprocess.check import Checker, Disagreement
from megalith.data.preprocess.feed import Feed
from megalith.data.preprocess.journal import Store
from megalith.data.preprocess.pool import Pool, Readable
from megalith.data.preprocess.sources import Source
from megalith.data.preprocess.wire import Chunk, Done, FromWorker, Job, NeedTurn, Release, SharedMemory, Turn
from megalith.errors import EXIT_FAILURE, MegalithError
from megalith.tokenizers.fast import FastEncoder

_JOBS_AHEAD = 2
_WAIT_SECONDS = 1.0
_HOPELESS_LINES = 10_000
_HOPELESS_SHARE = 0.5


class TooManyRejected(MegalithError):
    """More lines were bad than `--max-rejected` allows."""

    exit_code = EXIT_FAILURE


class Progress(Protocol):
    """Told after every part."""

    def update(self, job: Job, documents: int) -> None:
        """`job` is written; `documents` are written by this process so far."""
        ...


@dataclass
class _Order:
    """A job under way: whose it is, and what has come of it."""

    job: Job
    worker: int
    messages: deque[FromWorker] = field(default_factory=deque)


@dataclass(frozen=True)
class Trial:
    """An encoder at work whose check is still under way."""

    checker: Checker
    encoder: FastEncoder


class Pipeline:
    """One pass over what is left to do. `run` returns when all of it is in the store."""

    def __init__(
        self,
        store: Store,
        feed: Feed,
        pool: Pool,
        shared: SharedMemory,
        sources: Sequence[Source],
        trial: Trial | None,
    ) -> None:
        self._store = store
        self._feed = feed
        self._pool = pool
        self._shared = shared
        self._sources = sources
        self._trial = trial
        self._orders: deque[_Order] = deque()
        self._by_number: dict[int, _Order] = {}
        self._load = [0] * len(pool)
        self._documents = 0

    def run(self, progress: Progress) -> None:
        """Raises `Disagreement`, `TooManyRejected` once most lines are bad, and every error of feed, workers and store."""
        try:
            while not self._feed.finished or self._orders:
                self._turn(progress)
        except MegalithError:
            with suppress(MegalithError, Disagreement):  # what is finished is worth keeping
                self._settle(block=True)
            raise
        self._settle(block=True)

    def _turn(self, progress: Progress) -> None:
        """Hand out, listen, write."""
        self._hand_out()
        self._settle(block=False)
        also: list[Readable] = [] if self._trial is None else [self._trial.checker.connection]
        if not self._feed.finished and min(self._load) < _JOBS_AHEAD:
            also.append(self._feed)
        for worker, message in self._pool.messages(also, _WAIT_SECONDS):
            assert isinstance(message, Chunk | NeedTurn | Done)
            self._by_number[message.job].messages.append(message)
            self._load[worker] -= isinstance(message, Done)
        while self._orders and self._advance(self._orders[0], progress):
            self._orders.popleft()

    def _settle(self, *, block: bool) -> None:
        """Parts count once the encoder was found right."""
        if self._trial is not None and self._trial.checker.verdict(self._trial.encoder, block=block):
            self._trial = None
            self._store.trust()

    def _hand_out(self) -> None:
        while min(self._load) < _JOBS_AHEAD:
            job = self._feed.next()
            if job is None:
                return
            worker = self._load.index(min(self._load))
            self._load[worker] += 1
            order = _Order(job, worker)
            self._orders.append(order)
            self._by_number[job.number] = order
            self._pool.send(worker, job)

    def _advance(self, order: _Order, progress: Progress) -> bool:
        """Write what has come of the first job in line; whether it is done."""
        while order.messages:
            message = order.messages.popleft()
            if isinstance(message, Chunk):
                self._write(order, message)
            elif isinstance(message, NeedTurn):
                self._pool.send(order.worker, Turn(message.job))
            else:
                assert isinstance(message, Done)
                self._finish(order, message, progress)
                return True
        return False

    def _write(self, order: _Order, chunk: Chunk) -> None:
        slot = self._shared.output(order.worker, chunk.slot)
        for segment in chunk.segments:
            first, last = segment.document_start, segment.document_start + segment.documents
            self._store.append(
                segment.key,
                slot.tokens[segment.token_start : segment.token_start + segment.tokens],
                slot.lengths[segment.item_start : segment.item_start + segment.items],
                slot.counts[first:last],
                slot.hashes[first:last],
            )
            self._documents += segment.documents if segment.key == 0 else 0
        self._pool.send(order.worker, Release(chunk.slot))
        if chunk.rejects:
            path, line = self._sources[order.job.source].path, self._store.state.line
            lines = [
                msgspec.json.encode(
                    {"file": path, "line": line + r.line + 1, "reason": r.reason, "excerpt": r.excerpt}
                )
                for r in chunk.rejects
            ]
            self._store.reject(b"\n".join(lines) + b"\n", len(lines))

    def _finish(self, order: _Order, done: Done, progress: Progress) -> None:
        job, state = order.job, self._store.state
        state.source, state.offset = (job.source + 1, 0) if job.last else (job.source, job.stop)
        state.line = 0 if job.last else state.line + done.lines
        state.lines += done.lines
        state.blank += done.blank
        state.empty = [old + new for old, new in zip(state.empty, done.empty, strict=True)]
        self._store.commit()
        self._feed.release(job)
        del self._by_number[job.number]
        progress.update(job, self._documents)
        if state.rejected > _HOPELESS_LINES and state.rejected > _HOPELESS_SHARE * (
            state.lines - state.blank
        ):
            raise TooManyRejected("most lines are bad")
