"""A conversation at the terminal: a prompt, its continuation as it is made, the next prompt.

Knows prompts, pieces of text and how a person stops one or leaves. Where they come from and go to is the caller's. On
several processes the main one alone hears the person, and the others do as it does.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megalith.errors import MegalithError
from megalith.generate.crew import Crew
from megalith.generate.jobs import Answer, Options, answer
from megalith.generate.loading import Loaded
from megalith.generate.sampling import Sampling

Ask = Callable[[], str]
"""The next prompt. Raises EOFError (Ctrl-D) or KeyboardInterrupt (Ctrl-C) to leave."""
Piece = TypeVar("Piece")
PATIENCE = timedelta(days=30)
"""How long the other processes wait for a person to type."""


def converse(
    loaded: Loaded,
    sampling: Sampling,
    options: Options,
    *,
    ask: Ask,
    write: Callable[[str], None],
    complain: Callable[[MegalithError], None],
    done: Callable[[Answer], None] = lambda row: None,
) -> int:
    """Answers prompts until there is none; returns how many. A GPT's is written again before its continuation, so that the
    text stands whole; an empty one is asked again.

    Ctrl-C ends a continuation, not the conversation. Prompt i draws as row i, so a prompt given twice has two answers where
    tokens are drawn. A prompt that cannot be continued is complained about; `done` gets every whole continuation.
    """
    number = 0
    with ears(loaded.crew) as ear:
        while True:
            try:
                prompt = ear.next(ask)
            except (EOFError, KeyboardInterrupt):
                return number
            if not prompt:
                continue
            head = prompt if loaded.family == "gpt" else ""
            try:
                for piece in ear.until_stopped(answer(loaded, prompt, sampling, options, number=number)):
                    if isinstance(piece, str):
                        write(head + piece)
                    else:
                        write(head + "\n")
                        done(piece)
                    head = ""
            except KeyboardInterrupt:
                write("\n")
            except MegalithError as error:
                complain(error)
            number += 1


class Ear:
    """One process alone: prompts and Ctrl-C come as they are."""

    def next(self, ask: Ask) -> str:
        """The next prompt. Errors: EOFError, KeyboardInterrupt."""
        return ask()

    def until_stopped(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """The pieces. Errors: KeyboardInterrupt, wherever it strikes."""
        yield from pieces


class SharedEar(Ear):
    """One of several: no process may stop at another token than the others, so they agree after every piece."""

    def __init__(self, crew: Crew) -> None:
        self.is_main, self.asking, self.struck = crew.is_main, False, False
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def next(self, ask: Ask) -> str:
        """The main process's prompt. Errors: EOFError on all when the person left."""
        self.struck = False
        prompt = self._tell(self._hear(ask) if self.is_main else None)
        if prompt is None:
            raise EOFError
        return str(prompt)

    def until_stopped(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """The pieces. Errors: KeyboardInterrupt on all, behind the same piece."""
        for piece in pieces:
            yield piece
            if self._tell(self.struck):
                raise KeyboardInterrupt

    def strike(self, *_: object) -> None:
        """Ctrl-C: leaves where a prompt is asked for, else waits for the end of the piece."""
        if self.asking:
            raise KeyboardInterrupt
        self.struck = self.is_main

    def _hear(self, ask: Ask) -> str | None:
        self.asking = True
        try:
            return ask()
        except (EOFError, KeyboardInterrupt):
            return None
        finally:
            self.asking = False

    def _tell(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]


@contextmanager
def ears(crew: Crew) -> Iterator[Ear]:
    """Of this process. Several processes all get Ctrl-C, which would stop each of them somewhere else."""
    if crew.alone:
        yield Ear()
        return
    ear = SharedEar(crew)
    before = signal.signal(signal.SIGINT, ear.strike)
    try:
        yield ear
    finally:
        signal.signal(signal.SIGINT, before)
