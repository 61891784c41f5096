"""The source's files, hashed by a thread while both sides are compared: the same files are read at the same time.

Knows files and what a manifest said of them.
"""

from __future__ import annotations

import threading

from megalith.checkpoint.convert.source import Source
from megalith.checkpoint.files import FileRecord, file_digest
from megalith.errors import CheckpointError


class Hashing:
    """A thread that hashes the source's files while they are compared with what was written."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._found: dict[str, FileRecord] = {}
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="conversion-hash", daemon=True)
        self._thread.start()

    def finish(self) -> dict[str, FileRecord]:
        """Path → size and hash. Errors: `CheckpointError` where a step folder's file is not what its manifest says."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        for path, digest in self.source.known.items():
            if self._found[str(path)].sha256 != digest:
                raise CheckpointError(
                    f"{path.name} is damaged: its content changed since it was saved; nothing was written",
                    where=str(self.source.folder),
                    fix="megalith checkpoint verify tells more; give another step of the run",
                )
        return self._found

    def close(self) -> None:
        """Ends the thread, wherever it is."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for path in self.source.inputs:
                digest = file_digest(path, self._go_on)
                self._found[str(path)] = FileRecord(path.stat().st_size, digest)
        except Exception as error:  # raised by `finish`, in the caller's thread
            self._error = error

    def _go_on(self, count: int) -> None:
        if self._stop.is_set():
            raise InterruptedError("the conversion ended")
