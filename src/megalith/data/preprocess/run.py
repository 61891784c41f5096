"""`megalith data preprocess` as a function: files in, published pairs and a summary out.

```
sources, tokenizer ─▶ Pool (fork) ─▶ Store (new or resumed) ─▶ Pipeline ─▶ limit of rejects ─▶ publish ─▶ Summary
```
Knows the order of these steps, and how a run is stopped. Refuses to know flags and terminals.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from megalith.data.indexed.format import storage_dtype
from megalith.data.indexed.sidecar import TokenizerRecord
from megalith.data.preprocess.batches import Limits
from megalith.data.preprocess.check import Checker, Disagreement
from megalith.data.preprocess.feed import Feed, is_streamed
from megalith.data.preprocess.files import writing
from megalith.data.preprocess.journal import Store
from megalith.data.preprocess.options import Options
from megalith.data.preprocess.pipeline import Pipeline, Progress, TooManyRejected, Trial
from megalith.data.preprocess.pool import Pool
from megalith.data.preprocess.publish import publish, summarise
from megalith.data.preprocess.report import Meter, PlainProgress, Summary
from megalith.data.preprocess.sources import Source, check_unchanged, find_sources
from megalith.data.preprocess.wire import SharedMemory
from megalith.data.preprocess.worker import Task, Worker
from megalith.errors import EXIT_STOPPED, DataError, MegalithError
from megalith.tokenizers.base import Tokenizer
from megalith.tokenizers.fast import Encoder, ReferenceEncoder, unchecked_encoder
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.names import FILE_KEYS, WORD_PIECE_TYPES, TokenizerFiles

FAST = Limits()
REFERENCE = Limits(record=1 << 20, piece=1 << 19, uncut=1 << 21)
"""The reference tokenizer takes 200 bytes for every byte of text."""
_SLOT_SHARE = 2
"""Tokens of an output slot: block bytes over this."""

Notify = Callable[[str], None]
ShowProgress = Callable[[Meter], Progress]


class Interrupted(MegalithError):
    """Stopped by a signal; finished parts are kept."""

    exit_code = EXIT_STOPPED


def preprocess(
    options: Options,
    *,
    notify: Notify = print,
    show: ShowProgress | None = None,
    started: float | None = None,
) -> Summary:
    """Tokenize `options.inputs` and publish a pair for each key.

    DataError and its kin for a user's mistakes, a full disk and dead workers; `TooManyRejected` (exit code 1) publishes
    nothing but the reject file; `Interrupted` (exit code 3) after SIGINT or SIGTERM. In all these cases finished parts
    are kept, and the same call goes on from there.
    """
    return _Run(options, notify, show, time.monotonic() if started is None else started).run()


class _Run:
    def __init__(self, options: Options, notify: Notify, show: ShowProgress | None, started: float) -> None:
        self._options = options
        self._notify = notify
        self._started = started
        self._sources = find_sources(options.inputs)
        _check_keys(options, self._sources)
        self._tokenizer = load_tokenizer(options.tokenizer)
        self._eod = _eod(self._tokenizer) if options.append_eod else None
        if self._tokenizer.type in WORD_PIECE_TYPES and options.sentences is None:
            notify("BERT and T5 are trained on sentences: --split-sentences finds them")
        self._dtype = storage_dtype(self._tokenizer.vocab_size, options.implementation)
        self._meter = Meter(self._sources, started)
        self._progress = show(self._meter) if show else PlainProgress(self._meter, options.log_interval)

    def run(self) -> Summary:
        try:
            with (
                _stoppable(),
                closing(Checker(self._tokenizer, self._sources, self._options.keys)) as checker,
            ):
                encoder, notice = unchecked_encoder(self._tokenizer)
                if encoder is not None:
                    try:
                        return self._attempt(encoder, Trial(checker, encoder), fast=True)
                    except Disagreement as found:
                        notice = str(found)
                if notice:
                    self._notify(notice)
                return self._attempt(ReferenceEncoder(self._tokenizer), None, fast=not notice)
        except _Stop as stop:
            raise Interrupted(
                f"stopped by {stop}",
                where=str(self._options.output_prefix),
                fix="run the same command again: it goes on where it stopped, finished parts are kept",
            ) from None

    def _attempt(self, encoder: Encoder, trial: Trial | None, *, fast: bool) -> Summary:
        options, limits = self._options, FAST if fast else REFERENCE
        workers = self._count_workers(fast)
        streamed = any(is_streamed(source, options.txt_documents) for source in self._sources)
        input_slots = workers + 2 if streamed else 0
        slot_tokens = max(options.block_bytes // _SLOT_SHARE, 1 << 16)
        shared = SharedMemory(workers, self._dtype, slot_tokens, input_slots, limits.record + 1)
        task = Task(
            self._sources,
            options.keys,
            self._eod,
            options.txt_documents,
            options.cache_bytes(fast=fast),
            limits,
            options.sentences,
        )

        def make(number: int, connection: Connection) -> Worker:
            return Worker(task, encoder, shared, number, connection)

        strangers = [trial.checker.connection] if trial else []
        with closing(Pool(workers, make, strangers)) as pool, closing(self._open_store()) as store:
            if trial is None:
                store.trust()
            feed = Feed(
                self._sources,
                options.txt_documents,
                position=store.position,
                block_bytes=options.block_bytes,
                shared=shared,
                input_slots=input_slots,
                folder=store.folder,
            )
            with closing(feed):
                try:
                    Pipeline(store, feed, pool, shared, self._sources, trial).run(self._progress)
                except TooManyRejected:
                    self._refuse(store)
            pool.stop()
            return self._finish(store, (trial.checker.hash if trial else "") or self._tokenizer.hash())

    def _count_workers(self, fast: bool) -> int:
        options = self._options
        self._workers = options.affordable_workers(fast=fast)
        if self._workers < options.workers:
            self._notify(
                f"{options.workers} workers do not fit in {options.max_memory / 2**30:.3g} GiB: "
                f"using {self._workers} (--max-memory allows more)"
            )
        return self._workers

    def _open_store(self) -> Store:
        options = self._options
        plan = {
            "sources": [source.fingerprint() for source in self._sources],
            "tokenizer": [
                self._tokenizer.type,
                self._tokenizer.vocab_size,
                _files_hash(options.tokenizer),
            ],
            "keys": options.keys,
            "append_eod": options.append_eod,
            "implementation": options.implementation,
            "txt_documents": options.txt_documents,
            "split_sentences": options.sentences and asdict(options.sentences),
        }
        finals = [options.prefix(key).with_name(options.prefix(key).name + ".bin") for key in options.keys]
        return Store(options.parts, plan, finals, restart=options.restart)

    def _finish(self, store: Store, tokenizer_hash: str) -> Summary:
        """Publish, or say why not."""
        options, state = self._options, store.state
        if state.rejected > options.max_rejected * (state.lines - state.blank):
            self._refuse(store)
        check_unchanged(self._sources)
        store.begin_publishing()
        keys = [
            summarise(
                store,
                number,
                key,
                options.prefix(key),
                itemsize=self._dtype.itemsize,
                unit=options.unit,
            )
            for number, key in enumerate(options.keys)
        ]
        if not any(key.documents for key in keys):
            store.remove()
            raise DataError(
                f"no document with text in {state.lines:,} lines",
                where=self._sources[0].path,
                fix="check --input and --json-keys",
            )
        self._keep_rejects(store)
        summary = Summary(
            keys=tuple(keys),
            lines=state.lines,
            blank=state.blank,
            rejected=state.rejected,
            text_bytes=self._meter.text_bytes,
            seconds=0.0,
            parts=state.part,
            resumed_parts=store.resumed_parts,
            workers=self._workers,
        )
        for number, key in enumerate(keys):
            publish(
                store,
                number,
                key,
                dtype=self._dtype,
                implementation=options.implementation,
                tokenizer=self._tokenizer_record(tokenizer_hash),
                append_eod=options.append_eod,
                sources=[source.path for source in self._sources],
                details=summary.details(key),
            )
        store.remove()
        return replace(summary, seconds=time.monotonic() - self._started)

    def _tokenizer_record(self, tokenizer_hash: str) -> TokenizerRecord:
        tokenizer = self._tokenizer
        return TokenizerRecord(
            type=tokenizer.type,
            hash=tokenizer_hash,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            config=self._options.tokenizer.located(),
        )

    def _keep_rejects(self, store: Store) -> None:
        """`PREFIX.rejected.jsonl`: of this run, or none."""
        target = self._options.rejected
        with writing(target):
            if not store.state.rejected:
                target.unlink(missing_ok=True)
                return
            partial = target.with_name(target.name + ".partial")
            shutil.copyfile(store.path("rejected.jsonl"), partial)
            partial.replace(target)

    def _refuse(self, store: Store) -> NoReturn:
        self._keep_rejects(store)
        state, limit = store.state, self._options.max_rejected
        lines = state.lines - state.blank
        share = 100 * state.rejected / max(lines, 1)
        raise TooManyRejected(
            f"{state.rejected:,} of {lines:,} lines ({share:.3g} %) are bad, more than {100 * limit:g} %; "
            f"nothing was published{_first_reject(store)}",
            where=str(self._options.rejected),
            fix="mend the input and add --restart; or accept the loss with a larger --max-rejected: "
            "then nothing is tokenized twice",
        )


class _Stop(BaseException):
    """Raised by the signal handler, wherever the run is."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM raise `_Stop` inside. Only the main thread can be told of signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        for caught in before:
            signal.signal(caught, signal.SIG_IGN)  # what follows is short, and must not be interrupted
        raise _Stop(signal.Signals(number).name)

    before: dict[signal.Signals, Any] = {}
    for each in (signal.SIGINT, signal.SIGTERM):
        before[each] = signal.signal(each, stop)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _check_keys(options: Options, sources: Sequence[Source]) -> None:
    if len(options.keys) > 1:
        for source in sources:
            if source.text:
                raise DataError(
                    f"plain text has no keys, but --json-keys names {len(options.keys)}",
                    where=source.path,
                    fix="give one key: it names the output",
                )


def _eod(tokenizer: Tokenizer) -> int:
    if tokenizer.eod is None:
        raise DataError(
            "the tokenizer has no end-of-document token",
            where="--append-eod",
            fix="leave the flag out: a BERT vocabulary has no such token, and BERT and T5 need none; "
            "for GPT use a tokenizer with <|endoftext|> or </s>",
        )
    return tokenizer.eod


def _files_hash(files: TokenizerFiles) -> str:
    """SHA-256 of the tokenizer's files: enough to tell whether a stopped run used the same."""
    digest = hashlib.sha256()
    for key in FILE_KEYS:
        name = getattr(files, key)
        path = Path(name).expanduser() if name else None
        found = sorted(path.glob("*.[jtm][sxo]*")) if path and path.is_dir() else [path] if path else []
        for each in found:
            digest.update(each.name.encode() + b"\0" + each.read_bytes())
    return digest.hexdigest()


def _first_reject(store: Store) -> str:
    with store.path("rejected.jsonl").open("rb") as file:
        first = file.readline().decode()
    if not first:
        return ""
    record = msgspec.json.decode(first)
    return f"\nthe first: {record['file']}, line {record['line']}: {record['reason']}: {record['excerpt']}"
