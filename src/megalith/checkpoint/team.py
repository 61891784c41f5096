"""The processes of a run that save and load together: what one of them finds, all learn; where one fails, all do.

    together(work)  every process does its share ─▶ all results, or the same error everywhere
    lead(work)      the first process does it    ─▶ its result, or the same error everywhere

They talk over a gloo group of their own, so that a save that runs beside training never meets training's messages. With one
process there is no group, and both are a plain call. Knows no files and no tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megalith.errors import CheckpointError, ConfigError, MegalithError
from megalith.topology.topology import Topology

T = TypeVar("T")
PATIENCE = timedelta(hours=2)
"""How long processes wait for the slowest writer. One that died is noticed at once: its connections close."""


class Team:
    """One process alone, or every process of a topology, each of which must make it at the same point."""

    def __init__(self, topology: Topology | None = None) -> None:
        self.group = None
        self.rank, self.size = 0, 1
        if topology is not None and topology.mesh is not None:
            self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
            self.rank, self.size = dist.get_rank(), dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """Is this the process that decides, and that writes what is written once?"""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` returned on each process, by rank; it must return what can be pickled.

        Raises on every process what it raised on the first of those where it failed.
        """
        if self.group is None:
            return [work()]
        outcome, own = _attempt(work)
        everyone: list[Any] = [None] * self.size
        self._talk(lambda: dist.all_gather_object(everyone, outcome, group=self.group), own)
        for rank, (succeeded, value) in enumerate(everyone):
            if not succeeded:
                raise _error(rank, value, own) from own
        return [value for _, value in everyone]

    def lead(self, work: Callable[[], T]) -> T:
        """What `work` returned on the first process, which alone runs it."""
        if self.group is None:
            return work()
        outcome, own = _attempt(work) if self.is_main else (None, None)
        box: list[Any] = [outcome]
        self._talk(lambda: dist.broadcast_object_list(box, src=0, group=self.group), own)
        succeeded, value = box[0]
        if not succeeded:
            raise _error(0, value, own) from own
        return value

    def _talk(self, send: Callable[[], None], own: BaseException | None) -> None:
        try:
            send()
        except RuntimeError as error:
            raise CheckpointError(
                "another process of the run ended, or cannot be reached",
                fix="look at the output of the others; checkpoints saved before are untouched",
            ) from (own or error)
        if own is not None and not isinstance(
            own, Exception
        ):  # an interrupt here: the others know, it goes on
            raise own


def _attempt(work: Callable[[], Any]) -> tuple[tuple[bool, Any], BaseException | None]:
    """((succeeded, what the others are told), the error)."""
    try:
        return (True, work()), None
    except BaseException as error:
        if isinstance(error, MegalithError) and not isinstance(error, ConfigError):
            return (False, (type(error), error.problem)), error
        return (False, (None, f"{type(error).__name__}: {error}")), error


def _error(rank: int, told: tuple[Any, Any], own: BaseException | None) -> BaseException:
    kind, content = told
    if kind is not None:
        return kind(content.what, where=content.where, fix=content.fix)
    return own if own is not None else RuntimeError(f"process {rank}: {content}")
