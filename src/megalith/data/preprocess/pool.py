"""The worker processes: forked, listened to, and ended together with the run.

```
fork ─▶ Worker × n      each with a pipe of its own; a pipe that closes without `Failed` is a worker that died
```
Knows processes. Refuses to know what jobs are.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, Protocol

import msgspec

from megalith.data.preprocess.wire import Failed, FromWorker, ToWorker
from megalith.data.preprocess.worker import ParentGone, Worker, send, serve
from megalith.errors import DataError

_DECODER = msgspec.msgpack.Decoder(FromWorker)


class Readable(Protocol):
    def fileno(self) -> int: ...


class Child:
    """A forked process and the parent's end of its pipe."""

    def __init__(
        self, name: str, body: Callable[[Connection], NoReturn], others: Iterable[Connection]
    ) -> None:
        self.name = name
        self.connection, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for connection in (self.connection, *others):
                connection.close()
            body(theirs)
        theirs.close()

    def died(self) -> DataError:
        """What to say when its pipe closed without a word."""
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        code = os.waitstatus_to_exitcode(status)
        how = (
            f"was killed by signal {-code} ({_signal_name(-code)})" if code < 0 else f"ended with code {code}"
        )
        fix = "run the same command again: finished parts are kept"
        if code == -signal.SIGKILL:
            fix = "if memory ran out, use fewer --workers; " + fix
        return DataError(f"{self.name} {how}", fix=fix)

    def kill(self) -> None:
        """End the process, without waiting until it is gone."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        if self.pid:
            os.waitpid(self.pid, 0)
            self.pid = 0
        self.connection.close()

    def receive(self) -> FromWorker:
        """The next message; DataError for a user's mistake or a death in the child, RuntimeError for a defect."""
        try:
            message: FromWorker = _DECODER.decode(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise self.died() from None
        if isinstance(message, Failed):
            if not message.where:
                raise RuntimeError(f"{self.name} failed:\n{message.what}")
            raise DataError(message.what, where=message.where, fix=message.fix)
        return message


class Pool:
    """`count` workers made by `make(number, connection)`; `strangers` are pipes that they must not keep open."""

    def __init__(
        self, count: int, make: Callable[[int, Connection], Worker], strangers: Iterable[Connection] = ()
    ) -> None:
        self._children: list[Child] = []
        parent = os.getpid()
        try:
            for number in range(count):

                def body(connection: Connection, number: int = number) -> NoReturn:
                    serve(lambda: make(number, connection), connection, parent)

                others = [*strangers, *(child.connection for child in self._children)]
                self._children.append(Child(f"worker {number + 1}", body, others))
        except OSError as error:
            self.close()
            raise no_process(error) from None

    def __len__(self) -> int:
        return len(self._children)

    def send(self, worker: int, message: ToWorker) -> None:
        try:
            send(self._children[worker].connection, message)
        except ParentGone:
            raise self._children[worker].died() from None

    def messages(self, also: Iterable[Readable], timeout: float) -> Iterator[tuple[int, FromWorker]]:
        """Wait for something to happen (one of `also` being readable counts), then what each worker said."""
        numbers = {child.connection: number for number, child in enumerate(self._children)}
        waiting: list[Any] = [*numbers, *also]
        for ready in wait(waiting, timeout):
            number = numbers.get(ready)  # type: ignore[call-overload]
            if number is not None:
                yield number, self._children[number].receive()

    def stop(self) -> None:
        """Tell every process to end at once; they hold nothing that is not in the parent's files."""
        for child in self._children:
            child.kill()

    def close(self) -> None:
        """Stop, and wait until all are gone."""
        self.stop()
        for child in self._children:
            child.close()
        self._children = []


def no_process(error: OSError) -> DataError:
    return DataError(f"no process could be started: {error.strerror}", fix="use fewer --workers")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
