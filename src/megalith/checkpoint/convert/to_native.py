"""A step folder of our own: whole tensors, state, configuration, tokenizer, manifest.

Knows what a step folder holds. The manifest is written last, again once the certificate is there: it lists that, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megalith.checkpoint.convert.output import write_files
from megalith.checkpoint.convert.source import Optimizer, Source
from megalith.checkpoint.convert.tokenizer_files import files_of_tokenizer
from megalith.checkpoint.files import FileRecord, Progress, write_file
from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.manifest import (
    CONFIG,
    FORMAT_VERSION,
    MANIFEST,
    STATE,
    TOKENIZER,
    Manifest,
    TensorRecord,
)
from megalith.checkpoint.slices import whole
from megalith.checkpoint.tensor_files import NAMES, tensor_chunks
from megalith.models.family import describe
from megalith.tokenizers.base import Tokenizer


class Writer:
    """Writes a source's tensors (in their final dtypes), and its optimizer state where there is one, as a step folder."""

    def __init__(
        self,
        source: Source,
        tensors: Mapping[str, Lazy],
        tokenizer: Tokenizer | None,
        optimizer: Optimizer | None = None,
    ) -> None:
        self.source, self.tokenizer, self.optimizer = source, tokenizer, optimizer
        weights = tensors if optimizer is None or not optimizer.masters else optimizer.masters
        self.files = {"model.safetensors": {f"model.{name}": lazy for name, lazy in weights.items()}}
        if optimizer is not None:
            moments = {f"optim.{name}": lazy for name, lazy in optimizer.moments.items()}
            self.files["optim.safetensors"] = moments
        self._records: dict[str, FileRecord] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(lazy.nbytes for tensors in self.files.values() for lazy in tensors.values())

    @property
    def step(self) -> int:
        return int(self.source.state.get("step", 0))

    def write(self, folder: Path, progress: Progress) -> dict[str, FileRecord]:
        """→ every file that was written but the manifest, which the certificate will change."""
        records: dict[str, FileRecord] = {}
        for name, tensors in self.files.items():
            chunks = tensor_chunks(tensors)
            records[name] = write_files({folder / name: chunks}, progress)[folder / name]
        texts = {CONFIG: self._config().encode(), STATE: self._state()}
        if self.source.tokenizer is not None and self.tokenizer is not None:
            (folder / TOKENIZER).mkdir()
            found = files_of_tokenizer(self.source.tokenizer)
            texts |= {f"{TOKENIZER}/{name}": content for name, content in found.items()}
        records |= {name: write_file(folder / name, [content]) for name, content in texts.items()}
        self._records = records
        self._write_manifest(folder)
        return records

    def add(self, folder: Path, name: str, record: FileRecord) -> None:
        """Lets the manifest list one more file."""
        self._records = self._records | {name: record}
        (folder / MANIFEST).unlink()
        self._write_manifest(folder)

    def _write_manifest(self, folder: Path) -> None:
        table = {
            name: TensorRecord(NAMES[lazy.dtype], tuple(lazy.shape), {whole(lazy.shape): file})
            for file, tensors in self.files.items()
            for name, lazy in tensors.items()
        }
        write_file(folder / MANIFEST, [Manifest(self.step, 1, self._records, table).encode()])

    def _state(self) -> bytes:
        source = self.source
        state: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": self.step, **source.state}
        state |= describe(source.family, source.config)
        if not source.is_native:
            state["provenance"] = {"kind": source.kind, **source.provenance}
            if self.tokenizer is not None:
                state["tokenizer"] = {"hash": self.tokenizer.hash()}
            if self.optimizer is not None:
                state |= counters(source, self.optimizer)
        return (json.dumps(state, indent=1) + "\n").encode()

    def _config(self) -> str:
        if self.source.config_yaml is not None:
            return self.source.config_yaml
        fields = self.source.config.model_dump(mode="json", exclude={"vocab_size"})
        model = {name: value for name, value in fields.items() if value is not None}
        head = f"# The architecture of what `megalith checkpoint convert` made of a {self.source.kind} checkpoint.\n"
        return head + yaml.safe_dump({"model": model}, sort_keys=False)


def counters(source: Source, optimizer: Optimizer) -> dict[str, Any]:
    """What a run goes on with, as far as the other program keeps it."""
    samples = int(source.state.get("consumed_samples", 0))
    args = source.provenance.get("args") or {}
    tokens = samples * int(args.get("seq_length") or source.config.max_position_embeddings)
    scaler = {} if optimizer.scale is None else {"scaler": {"scale": optimizer.scale}}
    return {
        "consumed_samples": samples,
        "consumed_tokens": tokens,
        "updates": {"step": optimizer.updates, "samples": samples, "tokens": tokens},
        "skipped": 0,
        "skipped_in_a_row": 0,
        "scaler": {"scale": 1.0},
        "seed": int(args.get("seed") or 1234),
        **scaler,
    }
