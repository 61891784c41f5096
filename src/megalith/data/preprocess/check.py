"""The fast tokenizer against the reference, on the user's own first documents, beside the first parts of the run.

```
fork ─▶ reference tokenizer built, first documents encoded, hash ─▶ Checked ─▶ parent: the same ids? Then parts count.
```
It takes a third of a second, most of it while the parent is still starting. Knows how samples are taken. Refuses to know
what happens on a disagreement.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from typing import NoReturn

import numpy as np

from megalith.data.preprocess.batches import memory_batches
from megalith.data.preprocess.parse import JsonLines, TextLines
from megalith.data.preprocess.pool import Child, no_process
from megalith.data.preprocess.sources import Source
from megalith.data.preprocess.streams import ByteStream
from megalith.data.preprocess.wire import Checked
from megalith.data.preprocess.worker import ParentGone, send
from megalith.errors import DataError
from megalith.tokenizers.base import Tokenizer
from megalith.tokenizers.fast import FastEncoder, ReferenceEncoder, check_documents, difference

_CHECKED_BYTES = 1 << 15


class Disagreement(Exception):
    """The fast tokenizer's ids are not the reference's; the message is the notice."""


class Checker:
    """The checking process. `verdict` is to be asked until it knows; then `hash` is the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer, sources: Sequence[Source], keys: tuple[str, ...]) -> None:
        self.hash = ""
        self.done = False

        def body(connection: Connection) -> NoReturn:
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                with suppress(ParentGone):
                    send(connection, _check(tokenizer, sources, keys))
            finally:
                os._exit(0)

        try:
            self._child = Child("the tokenizer's check", body, [])
        except OSError as error:
            raise no_process(error) from None

    @property
    def connection(self) -> Connection:
        return self._child.connection

    def verdict(self, encoder: FastEncoder, *, block: bool) -> bool:
        """Whether the encoder is known to be right by now. Raises `Disagreement` if it is wrong."""
        if self.done or not (block or self._child.connection.poll()):
            return self.done
        found = self._child.receive()
        assert isinstance(found, Checked)
        if found.failure:
            raise Disagreement(f"fast tokenizer off: it could not be checked ({found.failure})")
        ids, lengths = np.frombuffer(found.ids, np.int32), np.frombuffer(found.lengths, np.int64)
        if notice := difference(encoder, found.documents, ids, lengths):
            raise Disagreement(notice)
        self.hash, self.done = found.hash, True
        return True

    def close(self) -> None:
        self._child.close()


def _check(tokenizer: Tokenizer, sources: Sequence[Source], keys: tuple[str, ...]) -> Checked:
    try:
        documents = check_documents(first_documents(sources, keys), _CHECKED_BYTES)
        ids, lengths = ReferenceEncoder(tokenizer).encode(documents)
    except BaseException as error:
        return Checked(failure=repr(error))
    return Checked(documents, ids.astype(np.int32).tobytes(), lengths.tobytes(), tokenizer.hash())


def first_documents(sources: Sequence[Source], keys: tuple[str, ...], size: int = 1 << 18) -> list[bytes]:
    """Documents at the start of the first source that has any, good enough to try a tokenizer on."""
    for source in sources:
        head = memoryview(bytearray(size))
        with suppress(DataError), closing(ByteStream(source)) as stream:  # the run itself reports it
            head = head[: stream.fill(head)]
        parser = TextLines() if source.text else JsonLines(keys)
        found = [
            text
            for batch in memory_batches(head)
            for column in parser.parse(batch).columns
            for text in column
        ]
        if found:
            return found
    return []
