"""What every way of tuning is: a few new parameters in a model that stays as it is.

    meta model ─ install ─▶ rules ─ build ─▶ stages ─ base weights ─ begin | fill ─▶ training (only `trains` moves) ─ tensors ─▶ file

Knows names of parameters and where they come from. Knows no optimizer, no data and no file: an artefact is `tensors` beside the
JSON of `describe`, and both come back by `understand`, `install` and `fill`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn

from megalith.models.stack import LanguageModel, Rule
from megalith.topology.topology import Topology


@dataclass(frozen=True)
class Tag:
    """The name by which samples ask for a prompt, and its length P in virtual tokens.

    `positions`: it has P rows of positions of its own; else its tokens get the model's, where they stand.
    """

    name: str
    length: int
    positions: bool = False


class Method(ABC):
    """One way of tuning. `tags`: the prompts that it brings, in the order of their ids; none where samples need none."""

    name: ClassVar[str]
    tags: tuple[Tag, ...] = ()

    @abstractmethod
    def install(self, model: LanguageModel) -> list[Rule]:
        """Put the new parameters into a whole model, on meta. → how they begin, before the model's own rules.

        `build(adapt=…)` takes it as it is. Errors: `UnsupportedError` for a model that has no place for them.
        """

    @property
    @abstractmethod
    def trains(self) -> tuple[str, ...]:
        """Patterns of the names of parameters that are tuned."""

    @property
    @abstractmethod
    def brings(self) -> tuple[str, ...]:
        """Patterns of the names of all parameters that a base model lacks, tuned now or before."""

    @property
    def frozen(self) -> tuple[str, ...]:
        """One pattern that matches every parameter but those tuned, as `Engine(frozen=…)` wants it."""
        return (rf"^(?!.*({'|'.join(self.trains)}))",) if self.trains else ("^",)

    def begin(self, stages: Sequence[nn.Module], topology: Topology) -> None:  # noqa: B027 - need not do anything
        """Numbers that depend on the base model's, once these are in place. Every process calls it; nothing by default."""

    @abstractmethod
    def tensors(self, stages: Sequence[nn.Module], topology: Topology) -> dict[str, torch.Tensor]:
        """What is kept: whole tensors by their names in an artefact, at least on the main process. Every process calls it."""

    @abstractmethod
    def fill(self, stages: Sequence[nn.Module], tensors: Mapping[str, torch.Tensor]) -> None:
        """The reverse, on any layout: an artefact's tensors into an installed model; parameters that it lacks stay.

        Errors: `CheckpointError` for a tensor of another shape, or one that no parameter takes.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that `understand` needs, as JSON."""

    @classmethod
    @abstractmethod
    def understand(cls, described: Mapping[str, Any]) -> Self:
        """The method of an artefact: everything in it is there to be used, nothing to be tuned anew."""
