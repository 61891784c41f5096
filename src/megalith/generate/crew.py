"""The processes that read one model together: who computes which batch, and how all of them come to one answer.

    tensor ranks     share every product   ┐ and take the first one's tokens:
    pipeline ranks   share the layers      ┘ none may go another way by a rounding
    data ranks       take batches in turn; all get all results, in the order of the batches

With one process each of these is a plain call. Knows processes, no text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import gcd
from typing import TypeVar

import torch
import torch.distributed as dist

from megalith.checkpoint.team import Team
from megalith.errors import ConfigError, Problem
from megalith.generate.layout import SHARING, Layout
from megalith.generate.relay import Relay
from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.topology.environment import environment
from megalith.topology.launch import start
from megalith.topology.sizes import Divisible
from megalith.topology.topology import Topology

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def _nothing() -> None:
    """The beat of a process that nobody waits for."""


@dataclass(frozen=True)
class Crew:
    """This process among those that read together; `beat` says that it is getting on."""

    topology: Topology = field(default_factory=Topology.single)
    team: Team = field(default_factory=Team)
    beat: Callable[[], None] = _nothing

    @property
    def is_main(self) -> bool:
        """Is this the one process that prints and writes?"""
        return self.topology.is_main

    @property
    def alone(self) -> bool:
        """Is there no other process?"""
        return self.topology.mesh is None

    @cached_property
    def relay(self) -> Relay:
        """What passes between the pipeline stages of this process's copy of the model."""
        return Relay.of(self.topology)

    @cached_property
    def _sharing(self) -> list[dist.ProcessGroup]:
        """The groups of the axes along which a copy is shared."""
        groups = (self.topology.group(axis) for axis in SHARING)
        return [group for group in groups if group is not None]

    def same(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens that the first process of those that share a copy of the model chose, on all of them."""
        self.beat()
        for group in self._sharing:
            tokens = tokens.contiguous()
            dist.broadcast(tokens, group=group, group_src=0)
        return tokens

    def divide(
        self,
        batches: Sequence[Batch],
        work: Callable[[Batch], Result],
        report: Callable[[int], None] | None = None,
    ) -> list[Result]:
        """`work` of every batch, in order, on every process; each data rank does every n-th of them.

        `report` is told how many batches are done, as far as this process can know. Results must be picklable.
        """
        first, step = self.topology.data_rank, self.topology.data_size
        found = {}
        for number in range(first, len(batches), step):
            found[number] = work(batches[number])
            self.beat()
            if report is not None:
                report(min(number - first + step, len(batches)))
        if step > 1:
            mine = found if not any(self.topology.rank(axis) for axis in SHARING) else {}
            found = {
                number: result for part in self.team.together(lambda: mine) for number, result in part.items()
            }
        return [found[number] for number in range(len(batches))]

    def lead(self, work: Callable[[], Result]) -> Result:
        """What `work` returned on the main process, which alone runs it; its error on all."""
        return self.team.lead(work)

    def check(self, config: ModelConfig) -> None:
        """Errors: `ConfigError` when the model cannot be shared by so many tensor and pipeline ranks."""
        ffn = config.ffn_size
        if isinstance(config, EncoderDecoderConfig):
            ffn = gcd(ffn, config.decoder_ffn_size)
        numbers = Divisible(
            layers=config.depths,
            heads=config.num_attention_heads,
            kv_heads=config.kv_heads,
            ffn=ffn,
            vocab=config.padded_vocab_size,
        )
        problems = self.topology.sizes.problems(numbers)
        if problems:
            raise ConfigError([Problem(f"model.{p.where}", p.what, p.fix) for p in problems])


@contextmanager
def joined(layout: Layout, *, patient: bool = False) -> Iterator[Crew]:
    """Within, this process is one of those that the layout asks for, which have been started.

    `patient`: the processes may wait for a person, however long. Errors: `ConfigError` when their number does not fit.
    """
    launched = environment()
    sizes = layout.sizes(launched.world if launched else 1)
    device = layout.device(launched.local_rank if launched else 0)
    with start(device, timeout=layout.timeout, launched=launched) as member:
        topology = Topology.of(sizes, member.device)
        crew = Crew(topology, Team(topology), _nothing if patient else member.beat)
        if not patient:
            member.watch(topology)
        yield crew
