"""What soft prompts and p-tuning share: tags, their virtual ids, tables in the model, and matrices in a file.

    tags     a (P₀)           b (P₁)                    names of samples' tags
    ids      V … V+P₀−1       V+P₀ … V+P₀+P₁−1          what stands in their tokens
    tables   prompts.tables.0 prompts.tables.1          parameters, whole on every process of the first pipeline stage
    file     prompts.0.tokens [prompts.0.positions] …   whatever made the matrices

Knows the order of tags. Knows no text and no token of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn

from megalith.adapt.method import Method, Tag
from megalith.errors import CheckpointError, ConfigError, Problem, UnsupportedError
from megalith.models.stack import LanguageModel, Rule
from megalith.nn.prompt import DROPOUT, PromptEncoder, Prompts, SoftPrompt
from megalith.parallel.data import reshard, whole
from megalith.topology.topology import Topology


@dataclass(frozen=True)
class NewPrompt:
    """A prompt to be tuned: its tag, its length P, and the token ids that it begins from (none: from random numbers)."""

    name: str
    length: int
    ids: tuple[int, ...] = ()


def virtual_ids(first_id: int, tags: Iterable[Tag]) -> dict[str, range]:
    """The ids of each tag's virtual tokens; `first_id` is the model's true vocabulary size."""
    found = {}
    for tag in tags:
        found[tag.name] = range(first_id, first_id + tag.length)
        first_id += tag.length
    return found


class Prompted(Method):
    """Prompts of `earlier` tags, which stay as they are, and behind them the `new` ones.

    `dropout`: of all prompts in training. Errors: `ConfigError` for a tag used twice, without a name or a token.
    """

    def __init__(
        self, new: Sequence[NewPrompt] = (), earlier: Sequence[Tag] = (), *, dropout: float = DROPOUT
    ) -> None:
        self.new, self.earlier, self.dropout = tuple(new), tuple(earlier), dropout
        self.tags = (*self.earlier, *(Tag(prompt.name, prompt.length) for prompt in self.new))
        check_tags(self.tags)

    new_are_matrices: ClassVar[bool] = True
    """Can a file's matrices be put into new prompts?"""

    @abstractmethod
    def table(self, prompt: NewPrompt, width: int, *, positions: bool) -> SoftPrompt | PromptEncoder:
        """The module of a new prompt; `positions`: the model has learned ones."""

    @abstractmethod
    def rules(self, prompt: NewPrompt, width: int) -> list[Rule]:
        """How its parameters begin, by patterns that their names in the module match from the start."""

    @property
    def numbered(self) -> list[tuple[int, NewPrompt]]:
        """The new prompts with the numbers of their tables."""
        return list(enumerate(self.new, start=len(self.earlier)))

    def install(self, model: LanguageModel) -> list[Rule]:
        """The tables; also says in `tags` which of them have positions of their own.

        Errors: `ConfigError` for ids that the model has not, and for more virtual tokens than positions.
        """
        if not model.accepts_prompts:
            raise UnsupportedError(
                f"{type(model).__name__} has no place for virtual tokens",
                where=self.name,
                fix="tune a GPT, a T5 or a BART",
            )
        self._check_new(model.config.vocab_size, model.config.max_positions)
        model.pick_targets()
        width, learned = model.config.hidden_size, model.input_positions is not None
        tables = [SoftPrompt(tag.length, width, own_positions=tag.positions) for tag in self.earlier]
        tables += [self.table(prompt, width, positions=learned) for prompt in self.new]
        model.prompts = Prompts(model.config.vocab_size, tables, self.dropout)
        own = [isinstance(table, SoftPrompt) and table.positions is not None for table in tables]
        self.tags = tuple(Tag(tag.name, tag.length, has) for tag, has in zip(self.tags, own, strict=True))
        rules: list[Rule] = [
            (rf"^prompts\.tables\.{number}\.{pattern}", distribution)
            for number, prompt in self.numbered
            for pattern, distribution in self.rules(prompt, width)
        ]
        return [*rules, (r"^prompts\.tables\.", 0.0)]

    def _check_new(self, vocabulary: int, positions: int | None) -> None:
        problems = [
            Problem(
                "prompt",
                f"{prompt.name!r} begins from token {max(prompt.ids)}",
                f"ids are below {vocabulary}",
            )
            for prompt in self.new
            if prompt.ids and not 0 <= min(prompt.ids) <= max(prompt.ids) < vocabulary
        ]
        problems += [
            Problem(
                "num_prompt_tokens",
                f"{tag.length} virtual tokens of {tag.name!r} leave no room for text in {positions} positions",
                f"use fewer than {positions}, by as much as texts and answers need",
            )
            for tag in self.tags
            if positions is not None and tag.length >= positions
        ]
        if problems:
            raise ConfigError(problems)

    @property
    def trains(self) -> tuple[str, ...]:
        return tuple(rf"^prompts\.tables\.{number}\." for number, _ in self.numbered)

    @property
    def brings(self) -> tuple[str, ...]:
        return (r"^prompts\.",)

    @torch.no_grad()
    def tensors(self, stages: Sequence[nn.Module], topology: Topology) -> dict[str, torch.Tensor]:
        """On the processes of the first pipeline stage, the main one among them; nothing elsewhere."""
        found: dict[str, torch.Tensor] = {}
        for number, table in enumerate(tables_of(stages)):
            both = zip(("tokens", "positions"), table(), strict=True)
            found |= {f"prompts.{number}.{n}": t.detach().clone() for n, t in both if t is not None}
        return found

    @torch.no_grad()
    def fill(self, stages: Sequence[nn.Module], tensors: Mapping[str, torch.Tensor]) -> None:
        """Matrices of earlier prompts, or of soft prompts that are tuned further."""
        self._check(tensors, stages[0].config.hidden_size)  # type: ignore[union-attr]
        for number, table in enumerate(tables_of(stages)):
            for name, parameter in table.named_parameters():
                if (tensor := tensors.get(f"prompts.{number}.{name}")) is not None:
                    parameter.copy_(tensor)

    def _check(self, tensors: Mapping[str, torch.Tensor], width: int) -> None:
        """On every process alike, whatever it holds."""
        tags = self.tags if self.new_are_matrices else self.earlier
        shapes = {
            f"prompts.{number}.{part}": (tag.length, width)
            for number, tag in enumerate(tags)
            for part in ("tokens", *["positions"] * tag.positions)
        }
        for name, tensor in tensors.items():
            shape = tuple(tensor.shape)
            if shape != shapes.get(name):
                wants = "no such prompt here" if name not in shapes else f"this model wants {shapes[name]}"
                raise CheckpointError(
                    f"{name} has shape {shape}, and {wants}",
                    where="prompts",
                    fix="use prompts that were tuned on this model, with their tags in the same order",
                )

    def describe(self) -> dict[str, Any]:
        return {"tags": [asdict(tag) for tag in self.tags], "dropout": self.dropout}

    @classmethod
    def understand(cls, described: Mapping[str, Any]) -> Self:
        tags = [Tag(t["name"], int(t["length"]), bool(t["positions"])) for t in described["tags"]]
        return cls(earlier=tags, dropout=float(described.get("dropout", DROPOUT)))


def check_tags(tags: Sequence[Tag]) -> None:
    """Errors: `ConfigError` with all that is wrong."""
    problems = [
        Problem("tags", f"the tag {name!r} is used {count} times", "give every task a tag of its own")
        for name, count in Counter(tag.name for tag in tags).items()
        if count > 1
    ]
    problems += [
        Problem("tags", "a tag has no name", "name the task as its samples do")
        for tag in tags
        if not tag.name
    ]
    problems += [
        Problem(
            "num_prompt_tokens", f"the prompt of {tag.name!r} has {tag.length} tokens", "a number from 1 up"
        )
        for tag in tags
        if tag.length < 1
    ]
    if problems:
        raise ConfigError(problems)


def tables_of(stages: Sequence[nn.Module]) -> list[SoftPrompt | PromptEncoder]:
    """The tables that this process holds: all of them, or on later pipeline stages none."""
    prompts = getattr(stages[0], "prompts", None)
    return [] if prompts is None else list(prompts.tables)


def rows_of(stage: nn.Module, table: nn.Module, rows: Sequence[int], topology: Topology) -> torch.Tensor:
    """(len(rows), D) rows of a table of the model's that may be shared out. Every process of its stage calls it alike."""
    reshard(stage)
    return whole(table.weight, topology.device)[list(rows)]
