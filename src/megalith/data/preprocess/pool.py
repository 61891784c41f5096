"""The worker processes: forked, listened to, and ended together with the run.

```
fork ─▶ Worker × n      each with a pipe of its own; a pipe that closes without `Failed` is a worker that died
     ╰▶ checker         once: does the fast tokenizer agree with the reference on the first documents?
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
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        self.connection.close()


class Pool:
    """`count` workers made by `make(number, connection)`, and perhaps a checker whose only message is its verdict."""

    def __init__(
        self,
        count: int,
        make: Callable[[int, Connection], Worker],
        checker: Callable[[Connection], NoReturn] | None,
    ) -> None:
        self._decoder = msgspec.msgpack.Decoder(FromWorker)
        self._children: list[Child] = []
        self._checker: Child | None = None
        parent = os.getpid()
        try:
            if checker:
                self._checker = Child("the tokenizer's check", checker, [])
            for number in range(count):

                def body(connection: Connection, number: int = number) -> NoReturn:
                    serve(lambda: make(number, connection), connection, parent)

                others = [child.connection for child in self.children]
                self._children.append(Child(f"worker {number + 1}", body, others))
        except OSError as error:
            self.close()
            raise DataError(
                f"no process could be started: {error.strerror}", fix="use fewer --workers"
            ) from None

    def __len__(self) -> int:
        return len(self._children)

    @property
    def children(self) -> list[Child]:
        return [*self._children, *([self._checker] if self._checker else [])]

    def send(self, worker: int, message: ToWorker) -> None:
        try:
            send(self._children[worker].connection, message)
        except ParentGone:
            raise self._children[worker].died() from None

    def messages(self, also: Readable | None, timeout: float) -> Iterator[tuple[int, FromWorker]]:
        """Wait for something to happen (`also` being readable counts), then what each worker said."""
        numbers = {child.connection: number for number, child in enumerate(self._children)}
        waiting: list[Any] = [*numbers]
        if also is not None:
            waiting.append(also)
        if self._checker:
            waiting.append(self._checker.connection)
        for ready in wait(waiting, timeout):
            number = numbers.get(ready)  # type: ignore[call-overload]
            if number is not None:
                yield number, self._receive(self._children[number])

    def verdict(self, *, block: bool = False) -> str | None:
        """The checker's notice ("" if all is well), or None while it is at work, and ever after."""
        if self._checker is None or not (block or self._checker.connection.poll()):
            return None
        message = self._receive(self._checker)
        assert isinstance(message, Failed)
        self._checker.kill()
        self._checker = None
        return message.what

    @property
    def checking(self) -> bool:
        return self._checker is not None

    def _receive(self, child: Child) -> FromWorker:
        try:
            message = self._decoder.decode(child.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise child.died() from None
        if isinstance(message, Failed) and child is not self._checker:
            if not message.where:
                raise RuntimeError(f"{child.name} failed:\n{message.what}")
            raise DataError(message.what, where=message.where, fix=message.fix)
        return message

    def close(self) -> None:
        """End every process at once; they hold nothing that is not in the parent's files."""
        for child in self.children:
            child.kill()
        self._children, self._checker = [], None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
