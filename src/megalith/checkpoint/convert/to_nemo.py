"""An archive that NeMo restores: one uncompressed tar, a torch file for each rank, the configuration, the tokenizer's files.

    DST.nemo: model_config.yaml, <hash>_<name>, [mp_rank_TT/ | tp_rank_TT_pp_rank_PPP/] model_weights.ckpt, conversion.json

Files of one stage's ranks are written side by side, each at its place in the archive. Names of tensors and keys are
`formats.nemo_*`'s business.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from megalith.checkpoint.convert.megatron_optimizer import in_module_order
from megalith.checkpoint.convert.output import Within, write_files
from megalith.checkpoint.convert.source import Source
from megalith.checkpoint.convert.to_megatron import Sizes, family_of, refuse_sizes
from megalith.checkpoint.convert.views import reading_once
from megalith.checkpoint.exported import Cut, foreigns
from megalith.checkpoint.files import FileRecord, Progress
from megalith.checkpoint.formats.foreign import heads_of
from megalith.checkpoint.formats.megatron_export import padded_rows, refuse_differences
from megalith.checkpoint.formats.megatron_stages import divide
from megalith.checkpoint.formats.megatron_tables import legacy
from megalith.checkpoint.formats.nemo_archive import SUFFIX, WEIGHTS
from megalith.checkpoint.formats.nemo_config import CONFIG, arguments, written
from megalith.checkpoint.formats.nemo_prompts import SoftPrompts, keys_of, state_of
from megalith.checkpoint.formats.nemo_read import CURRENT, folder_of, nemo_names
from megalith.checkpoint.formats.nemo_tar import append, begin, lay_out
from megalith.checkpoint.formats.nemo_tokenizer import MARK, as_files
from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.pickles.writer import torch_chunks, torch_size
from megalith.errors import CheckpointError
from megalith.tokenizers.base import Tokenizer

WHERE = "--to nemo"
FIX = "--to native or --to huggingface, which may have it"


class Writer:
    """Writes a source's tensors (in their final dtypes). `notices`: what a person should know of what stays behind."""

    def __init__(
        self,
        source: Source,
        tensors: Mapping[str, Lazy],
        tokenizer: Tokenizer | None,
        sizes: Sizes,
        *,
        prompts: SoftPrompts | None = None,
    ) -> None:
        """Errors: `CheckpointError` for sizes that do not divide the model, and for models and `prompts` that NeMo has nothing like."""
        refuse_sizes(source, sizes, CURRENT, where=WHERE)
        if sizes.chunks > 1:
            raise CheckpointError("NeMo's archives have no virtual stages", where=WHERE)
        self.source, self.sizes = source, sizes
        config, ranks = source.config, sizes.ranks
        self.table = legacy(CURRENT, family_of(source))
        rows = padded_rows(config.vocab_size, ranks)
        try:
            self.cuts = foreigns(
                self.table, tensors, heads_of(config), tensor_parallel=ranks, vocabulary_rows=rows
            )
        except CheckpointError as error:
            raise CheckpointError(error.problem.what, where=WHERE, fix=FIX) from None
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        keys = written(source.family, config, (ranks, sizes.stages), dtype)
        self.prompts = OrderedDict[str, torch.Tensor]()
        if prompts:
            keys |= keys_of(prompts, keys, sizes.stages)
            self.prompts = state_of(prompts, tensors)
        told = arguments(keys, where=WHERE)
        refuse_differences(config, told, self.table, self.cuts, to="NeMo")
        self.parts = divide(self.table, list(self.cuts), sizes.stages)
        named, artifacts, self.notices = as_files(source.tokenizer, tokenizer)
        self.texts = {_hashed(name, content): content for name, content in artifacts.items()}
        marks = {name: f"{MARK}{hashed}" for name, hashed in zip(artifacts, self.texts, strict=True)}
        keys["tokenizer"] = {key: marks.get(str(value), value) for key, value in named.items()}
        self.texts[CONFIG] = yaml.safe_dump(keys, sort_keys=False).encode()
        self.laid = lay_out({**self._places(), **{name: len(text) for name, text in self.texts.items()}})

    @property
    def nbytes(self) -> int:
        """Bytes of its members."""
        return self.laid.size

    def write(self, folder: Path, progress: Progress) -> dict[str, FileRecord]:
        """Writes the archive into a folder → every member."""
        path = folder / ARCHIVE
        begin(path, self.laid)
        records: dict[str, FileRecord] = {}
        stages = [{name: iter([text]) for name, text in self.texts.items()}]
        for stage in range(-1, self.sizes.stages):
            contents = stages[0] if stage < 0 else self._contents(stage)
            places = {name: Within(path, self.laid.places[name]) for name in contents}
            done = write_files({places[name]: chunks for name, chunks in contents.items()}, progress)
            records |= {name: done[place] for name, place in places.items()}
        return records

    def add(self, folder: Path, name: str, content: bytes) -> None:
        """One more member, behind the others."""
        append(folder / ARCHIVE, self.laid, name, content)

    def _places(self) -> dict[str, int]:
        """Member of a rank's weights → its bytes."""
        return {
            f"{folder_of(rank, stage, (self.sizes.ranks, self.sizes.stages))}{WEIGHTS}": torch_size(
                self._state(stage, rank, self.cuts)
            )
            for stage in range(self.sizes.stages)
            for rank in range(self.sizes.ranks)
        }

    def _contents(self, stage: int) -> dict[str, Any]:
        """Member → its bytes, for each rank of a stage; a tensor is read once for all of them."""
        part = self.parts[stage]
        names = list(dict.fromkeys(part[local] for local in in_module_order(self.table, part)))
        turn = iter(reading_once([cut for name in names for cut in self.cuts[name]]))
        cuts = {name: tuple(next(turn) for _ in self.cuts[name]) for name in names}
        return {
            f"{folder_of(rank, stage, (self.sizes.ranks, self.sizes.stages))}{WEIGHTS}": torch_chunks(
                self._state(stage, rank, cuts)
            )
            for rank in range(self.sizes.ranks)
        }

    def _state(self, stage: int, rank: int, cuts: Mapping[str, tuple[Cut, ...]]) -> OrderedDict[str, Any]:
        """The state_dict of a rank, as a Lightning module of NeMo's has it."""
        alone = self.sizes.stages == 1
        state: OrderedDict[str, Any] = OrderedDict(
            (given, cuts[self.parts[stage][local]][rank])
            for local in in_module_order(self.table, self.parts[stage])
            for given in nemo_names(local, self.source.family, first=stage == 0, alone=alone)
        )
        state.update(self.prompts)
        return state


ARCHIVE = f"archive{SUFFIX}"
"""What it is called until it gets its name."""


def _hashed(name: str, content: bytes) -> str:
    """The name of an artifact: 32 hexadecimal digits before it, as NeMo has them, but of the content."""
    return f"{hashlib.sha256(content).hexdigest()[:32]}_{name}"


def refuse_name(target: Path) -> None:
    """Errors: `CheckpointError` for a target that NeMo would not know for an archive."""
    if target.suffix != SUFFIX:
        raise CheckpointError(
            f"an archive is called …{SUFFIX}", where=str(target), fix=f"{target.with_suffix(SUFFIX)}"
        )
