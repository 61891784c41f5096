"""What NeMo's files of ranks hold, put together under Megatron's names: every tensor whole, a part for each tensor rank.

    model_weights.ckpt | mp_rank_TT/… | tp_rank_TT_pp_rank_PPP/… ─ names ─ join stages ─▶ tensors

A flat state_dict of a Lightning module: what the module calls its model stands before every name. Knows names; not what they
mean, nor where files lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

import torch

from megalith.checkpoint.formats.megatron_read import side_by_side
from megalith.checkpoint.formats.megatron_stages import join
from megalith.checkpoint.formats.nemo_archive import WEIGHTS, Archive
from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.mapped import Parts
from megalith.checkpoint.pickles.reader import open_pickle
from megalith.errors import CheckpointError

T = TypeVar("T")
CURRENT = 3
"""checkpoint_version whose order of fused rows NeMo has had since 1.5, without saying so."""
_RANK = re.compile(r"mp_rank_(\d+)|tp_rank_(\d+)_pp_rank_(\d+)")
_MODULE = re.compile(r"^(?:model\.|module\.|enc_dec_model\.)+")
_ENCODER = "bert_model."
"""What a task's model calls the encoder behind which its head stands."""
_PROMPTS = "language_model.prompt_table."
_RENAMED = (
    (re.compile(r"^(?:en|de)coder_embedding\."), "language_model.embedding."),
    (re.compile(r"^((?:en|de)coder)\.model\."), r"language_model.\1."),
    (re.compile(r"^tokens_head\."), "lm_head."),
    (re.compile(r"^word_embeddings\.weight$"), "word_embeddings_for_head.weight"),
    (re.compile(r"\.dense_h_to_4h_2\."), ".dense_h_to_4h.values."),
)
_TRANSFORMERS = re.compile(
    r"^(?:bert\.|roberta\.)?(?:encoder|transformer)\.layer\.\d+\.|^(?:bert\.)?embeddings\."
)


def nemo_names(name: str, family: str, *, first: bool, alone: bool) -> tuple[str, ...]:
    """What NeMo's files call a tensor of Megatron's name: `first` says whether they are the first stage's, `alone` whether they are
    the only stage's. A decoder has the embedding under a name of its own, too."""
    name = name.replace("word_embeddings_for_head.", "word_embeddings.")
    if family in ("gpt", "bert"):
        return (f"model.{name}",)
    name = re.sub(r"^lm_head\.", "tokens_head.", name)
    name = re.sub(r"^language_model\.((?:en|de)coder)\.", r"enc_dec_model.\1.model.", name)
    rest = name.removeprefix("language_model.embedding.")
    if rest == name:
        return (f"enc_dec_model.{name}",)
    sides = ("encoder", "decoder") if alone else ("encoder",) if first else ("decoder",)
    return tuple(f"enc_dec_model.{side}_embedding.{rest}" for side in sides)


@dataclass(frozen=True)
class Weights:
    """`tensors` by Megatron's names; (ranks, stages); names of heads and of soft prompts, which were left."""

    tensors: dict[str, Parts]
    sizes: tuple[int, int]
    heads: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()


def open_member(archive: Archive, name: str) -> Any:
    """What a torch file in an archive holds; its tensors stay where they are. Errors: `CheckpointError` that names the member."""
    member = archive.members[name]
    try:
        return open_pickle(member.path, offset=member.offset, length=member.length).content
    except CheckpointError as error:
        problem = error.problem
        raise CheckpointError(problem.what, where=archive.where(name), fix=problem.fix) from None


def rank_of(name: str) -> tuple[int, int] | None:
    """(stage, tensor rank) that the folder of a file stands for; the only one where it is in none. None for another folder."""
    folder = PurePosixPath(name).parent.name
    match = _RANK.fullmatch(folder)
    if match is None:
        return (0, 0) if folder == "" else None
    return int(match[3] or 0), int(match[1] or match[2])


def places_of(archive: Archive) -> dict[tuple[int, int], str]:
    """(stage, tensor rank) → the member with its weights."""
    named = [name for name in archive.members if PurePosixPath(name).name == WEIGHTS]
    return {place: name for name in named if (place := rank_of(name)) is not None}


def in_grid(found: Mapping[tuple[int, int], T], *, where: str) -> list[list[T]]:
    """`[p][t]`: what there is of tensor rank t in stage p. Errors: `CheckpointError` naming the ranks that are missing."""
    stages, ranks = (1 + max((place[i] for place in found), default=-1) for i in (0, 1))
    missing = [
        folder_of(t, p, (max(ranks, 2), stages)).rstrip("/")
        for p in range(stages)
        for t in range(ranks)
        if (p, t) not in found
    ]
    if missing or not found:
        raise CheckpointError(
            f"files of ranks are missing: {', '.join(missing[:8]) or 'all of them'}",
            where=where,
            fix="copy all of it: every rank's file holds a part of each tensor",
        )
    return [[found[p, t] for t in range(ranks)] for p in range(stages)]


def folder_of(rank: int, stage: int, sizes: tuple[int, int]) -> str:
    """The folder of a rank of (ranks, stages), a slash behind it; empty where there is only one."""
    if sizes[1] > 1:
        return f"tp_rank_{rank:02d}_pp_rank_{stage:03d}/"
    return f"mp_rank_{rank:02d}/" if sizes[0] > 1 else ""


def weights_of(states: Sequence[Sequence[Any]], files: Sequence[Sequence[str]]) -> Weights:
    """`states[p][t]`: the state_dict of a rank; `files`, what they lie in, for messages.

    Errors: `CheckpointError` where a state_dict is none, or ranks differ.
    """
    stages, left = [], dict[str, None]()
    for ranks, names in zip(states, files, strict=True):
        found = [own_tensors(state, file) for state, file in zip(ranks, names, strict=True)]
        left |= dict.fromkeys(name for rank in found for name in rank[1])
        stages.append([side_by_side([_gated(tensors) for tensors, _ in found], names)])
    tensors = join(stages)
    foreign = next((name for name in tensors if _TRANSFORMERS.search(name)), None)
    if foreign is not None:
        raise CheckpointError(
            f"its encoder is one of transformers (there is {foreign})",
            where=files[0][0],
            fix="this version reads archives with Megatron's models in them",
        )
    prompts = tuple(name for name in left if _PROMPTS in name)
    return Weights(
        tensors, (len(states[0]), len(states)), tuple(n for n in left if n not in prompts), prompts
    )


def own_tensors(state: Any, file: str) -> tuple[dict[str, Lazy], list[str]]:
    """The tensors of a rank's language model by Megatron's names, in the order of the file, and names of what is left.

    Errors: `CheckpointError` where `state` is no state_dict.
    """
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError("it is no state_dict: names and tensors", where=file)
    tensors = {name: value for name, value in state.items() if hasattr(value, "rows")}
    if not tensors:
        held = ", ".join(str(name) for name in list(state)[:6]) or "nothing"
        raise CheckpointError(f"there are no tensors in it; it holds {held}", where=file)
    inside = any(name.startswith(_ENCODER) for name in tensors)
    found: dict[str, Lazy] = {}
    left: list[str] = []
    for name, lazy in tensors.items():
        bare = _MODULE.sub("", name.removeprefix(_ENCODER))
        if (inside and not name.startswith(_ENCODER)) or bare.startswith(_PROMPTS):
            left.append(name)
        else:
            found.setdefault(
                _megatron(bare), lazy
            )  # a decoder reads the encoder's tables, which it names again
    return found, left


def _megatron(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


def _gated(tensors: dict[str, Lazy]) -> dict[str, Lazy]:
    """Gates and values in one tensor, gates above, where a layer keeps them apart."""
    pairs = {name: name.replace(".values.", ".") for name in tensors if ".values." in name}
    both = {
        gate: Stacked(tensors[gate], tensors[values]) for values, gate in pairs.items() if gate in tensors
    }
    return {name: both.get(name, lazy) for name, lazy in tensors.items() if name not in pairs}


@dataclass(frozen=True)
class Stacked:
    """Rows of one tensor above those of another. Has the face of a `LazyTensor`."""

    above: Lazy
    below: Lazy

    @property
    def name(self) -> str:
        return self.above.name

    @property
    def dtype(self) -> torch.dtype:
        return self.above.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.above.shape[0] + self.below.shape[0], *self.above.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.above.nbytes + self.below.nbytes

    def read(self) -> torch.Tensor:
        return torch.cat([self.above.read(), self.below.read()])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.read()[start:stop]


def left_behind(weights: Weights) -> Iterable[str]:
    """What a person should know of tensors that are no part of the language model."""
    if weights.heads:
        shown = ", ".join(weights.heads[:6]) + (
            f" and {len(weights.heads) - 6} more" if len(weights.heads) > 6 else ""
        )
        yield f"it is the model of a task: its encoder is read, its head is left out ({shown})"
    if weights.prompts:
        tags = sorted({name.split(_PROMPTS, 1)[1].split(".")[1] for name in weights.prompts})
        yield f"it holds soft prompts ({', '.join(tags)}), which are read apart: --prompts takes it, too"
