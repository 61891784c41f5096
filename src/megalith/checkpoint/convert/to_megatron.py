"""A folder that Megatron-LM loads: the tracker, and for each tensor-parallel rank of each stage a torch file.

    DST/latest_checkpointed_iteration.txt ("release", or the iteration where optimizer state goes along)
        release | iter_XXXXXXX / mp_rank_TT[_PPP] / model_optim_rng.pt

A file holds tensors, containers and numbers alone and loads under `torch.load(weights_only=True)`. Megatron's `args` is a
pickled Namespace, so it is left out, which Megatron's loader allows; the same values lie under `arguments` and in
arguments.json. Knows files; names of tensors and arguments are `formats.megatron_*`'s business.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megalith.checkpoint.convert.megatron_optimizer import by_kind, in_module_order, optimizer_content
from megalith.checkpoint.convert.output import write_files
from megalith.checkpoint.convert.source import Optimizer, Source
from megalith.checkpoint.convert.tokenizer_files import files_of_tokenizer
from megalith.checkpoint.convert.views import reading_once
from megalith.checkpoint.exported import Cut, foreigns
from megalith.checkpoint.files import FileRecord, Progress, write_file
from megalith.checkpoint.formats.foreign import heads_of
from megalith.checkpoint.formats.megatron_export import padded_rows, refuse_differences, write_arguments
from megalith.checkpoint.formats.megatron_files import RANK_FILES, TRACKER
from megalith.checkpoint.formats.megatron_stages import divide
from megalith.checkpoint.formats.megatron_tables import VERSIONS, legacy
from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.pickles.writer import torch_chunks
from megalith.errors import CheckpointError
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.tokenizers.base import Tokenizer

ARGUMENTS = "arguments.json"
OLD_NAMES = (("encoder", "transformer"), ("self_attention", "attention"))
"""What Megatron's code of checkpoint_version 0 and 1 calls the body and its attention."""


@dataclass(frozen=True)
class Sizes:
    """Tensor-parallel ranks, pipeline stages, chunks of a stage."""

    ranks: int = 1
    stages: int = 1
    chunks: int = 1


def family_of(source: Source) -> str:
    """What Megatron calls the model. Its T5's wiring is what NeMo's BART has, too."""
    return "t5" if source.family == "bart" else source.family


class Writer:
    """Writes a source's tensors (in their final dtypes), and its optimizer state where there is one."""

    def __init__(
        self,
        source: Source,
        tensors: Mapping[str, Lazy],
        tokenizer: Tokenizer | None,
        sizes: Sizes,
        *,
        version: int = 3,
        optimizer: Optimizer | None = None,
    ) -> None:
        """Errors: `CheckpointError` for sizes that do not divide the model, and for models that Megatron has nothing like."""
        refuse_sizes(source, sizes, version, where="--to megatron")
        self.source, self.tokenizer, self.sizes, self.version = source, tokenizer, sizes, version
        self.optimizer, self.table = optimizer, legacy(version, family_of(source))
        self.cuts = self._cut(tensors)
        self.arguments = write_arguments(source.config, (sizes.ranks, sizes.stages, sizes.chunks))
        refuse_differences(source.config, self.arguments, self.table, self.cuts)
        self.parts = divide(self.table, list(self.cuts), sizes.stages * sizes.chunks)
        self.kinds = {
            kind: self._cut(each) for kind, each in (by_kind(optimizer) if optimizer else {}).items()
        }

    def _cut(self, tensors: Mapping[str, Lazy]) -> dict[str, tuple[Cut, ...]]:
        config, ranks = self.source.config, self.sizes.ranks
        rows = padded_rows(config.vocab_size, ranks)
        try:
            return foreigns(
                self.table, tensors, heads_of(config), tensor_parallel=ranks, vocabulary_rows=rows
            )
        except CheckpointError as error:
            fix = "--to native or --to huggingface, which may have it"
            raise CheckpointError(error.problem.what, where="--to megatron", fix=fix) from None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        families = (self.cuts, *self.kinds.values())
        return sum(
            cut.nbytes
            for cuts in families
            for part in self.parts
            for name in part.values()
            for cut in cuts[name]
        )

    def write(self, folder: Path, progress: Progress) -> dict[str, FileRecord]:
        """→ every file that was written."""
        step = int(self.source.state.get("step", 0))
        name = "release" if self.optimizer is None else f"iter_{step:07d}"
        records: dict[str, FileRecord] = {}
        for stage in range(self.sizes.stages):
            files = {}
            for rank, content in enumerate(self._stage(stage, step)):
                place = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if self.sizes.stages > 1 else "")
                path = folder / name / place / RANK_FILES[0]
                path.parent.mkdir(parents=True)
                files[path] = torch_chunks(content)
            written = write_files(files, progress)
            records |= {path.relative_to(folder).as_posix(): record for path, record in written.items()}
        texts = {
            TRACKER: b"release" if self.optimizer is None else str(step).encode(),
            ARGUMENTS: (json.dumps(self.arguments, indent=1) + "\n").encode(),
        }
        if self.source.tokenizer is not None and self.tokenizer is not None:
            texts |= files_of_tokenizer(self.source.tokenizer)
        return records | {each: write_file(folder / each, [text]) for each, text in texts.items()}

    def _stage(self, stage: int, step: int) -> Iterator[dict[str, Any]]:
        """What each rank's file of a stage holds."""
        chunks = [self.parts[v * self.sizes.stages + stage] for v in range(self.sizes.chunks)]
        order = [chunk[local] for chunk in chunks for local in in_module_order(self.table, chunk)]
        model = self._read_once(self.cuts, order)
        kinds = {kind: self._read_once(cuts, order) for kind, cuts in self.kinds.items()}
        for rank in range(self.sizes.ranks):
            trees = [
                self._tree({local: model[name][rank] for local, name in chunk.items()}) for chunk in chunks
            ]
            keys = ["model"] if self.sizes.chunks == 1 else [f"model{v}" for v in range(len(trees))]
            content: dict[str, Any] = {
                "checkpoint_version": float(self.version),
                "iteration": step,
                "arguments": self._said(),
                **dict(zip(keys, trees, strict=True)),
            }
            if self.optimizer is not None:
                mine = {kind: {name: cuts[name][rank] for name in order} for kind, cuts in kinds.items()}
                content["optimizer"] = optimizer_content(order, mine, settings(self.source), self.optimizer)
            yield content

    def _read_once(
        self, cuts: Mapping[str, tuple[Cut, ...]], names: Sequence[str]
    ) -> dict[str, tuple[Cut, ...]]:
        """The parts of all ranks, made from one reading of each tensor: the ranks' files are written side by side."""
        turn = iter(reading_once([cut for name in names for cut in cuts[name]]))
        return {name: tuple(next(turn) for _ in cuts[name]) for name in names}

    def _said(self) -> dict[str, Any]:
        samples, tokens = (self.source.state.get(f"consumed_{what}") for what in ("samples", "tokens"))
        counted = {} if samples is None else {"consumed_train_samples": int(samples)}
        length = {"seq_length": int(tokens) // int(samples)} if samples and tokens else {}
        return self.arguments | counted | length

    def _tree(self, flat: Mapping[str, Cut]) -> dict[str, Any]:
        """Megatron's nested dictionaries; the names of layers in the body stay flat."""
        tree: dict[str, Any] = {}
        for name, cut in flat.items():
            *path, last = _path(name, old=self.version < 2)
            place = tree
            for key in path:
                place = place.setdefault(key, {})
            place[last] = cut
        return tree


def settings(source: Source) -> dict[str, Any]:
    """What the run that a source belongs to set its optimizer to, as far as it says."""
    try:
        optim = (yaml.safe_load(source.config_yaml or "") or {})["model"]["optim"]
        numbers = {name: float(optim[name]) for name in ("lr", "eps", "weight_decay") if name in optim}
        betas = {"betas": tuple(map(float, optim["betas"]))} if "betas" in optim else {}
        return numbers | betas
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return {}


def _path(name: str, *, old: bool) -> list[str]:
    top, _, rest = name.partition(".")
    if top != "language_model":
        return [top, rest]
    part, _, rest = rest.partition(".")
    if part == "embedding":
        return [top, part, *rest.split(".")]
    if old:
        part = dict(OLD_NAMES).get(part, part)
        rest = rest.replace(".self_attention.", ".attention.")
    return [top, part, rest]


def refuse_sizes(source: Source, sizes: Sizes, version: int, *, where: str) -> None:
    """Errors: `CheckpointError` with every number that does not divide."""
    config, ranks = source.config, sizes.ranks
    wrong = [
        f"{count} {what} do not divide among {ranks} tensor-parallel ranks"
        for what, count in (
            ("attention heads", config.num_attention_heads),
            ("key-value heads", config.kv_heads),
            ("channels of the feed-forward layers", config.ffn_size),
            (
                "channels of the decoder's feed-forward layers",
                config.written_out().get("decoder_ffn_hidden_size", 0),
            ),
        )
        if count % ranks
    ]
    if version not in VERSIONS:
        wrong.append(f"checkpoint_version {version} is none of {', '.join(map(str, VERSIONS))}")
    elif version < 2 and config.kv_heads != config.num_attention_heads:
        wrong.append(f"checkpoint_version {version} has no grouped queries: 2 and 3 have")
    if sizes.chunks > 1 and sizes.stages < 2:
        wrong.append("virtual stages need at least two pipeline stages")
    if sizes.chunks > 1 and isinstance(config, EncoderDecoderConfig):
        wrong.append("an encoder and a decoder have no virtual stages in Megatron")
    if wrong:
        raise CheckpointError(
            "\n    ".join(["it cannot be cut so", *wrong]), where=where, fix="choose other sizes"
        )
