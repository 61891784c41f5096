"""A folder that transformers loads: config.json, safetensors in shards of a bounded size, tokenizer, generation_config.json.

Knows the folder. What tensors are called there and what config.json says is `formats.huggingface_*`'s business.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megalith.checkpoint.convert.output import write_files
from megalith.checkpoint.convert.source import Source
from megalith.checkpoint.convert.tokenizer_files import files_of_tokenizer, for_transformers, ids_of_roles
from megalith.checkpoint.convert.views import reading_once
from megalith.checkpoint.exported import foreigns
from megalith.checkpoint.files import Buffer, FileRecord, Progress, write_file
from megalith.checkpoint.formats.foreign import heads_of
from megalith.checkpoint.formats.huggingface_export import WRITTEN_BY, write_config
from megalith.checkpoint.formats.huggingface_tables import TABLES
from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.tensor_files import tensor_chunks
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.tokenizers.base import Tokenizer

SHARD = 5_000_000_000
"""Bytes of tensors in a file at most, but for a single larger one."""
GENERATION = "generation_config.json"


class Writer:
    """Writes a source's tensors (in their final dtypes) as a folder of transformers."""

    def __init__(
        self, source: Source, tensors: Mapping[str, Lazy], tokenizer: Tokenizer | None, shard: int = SHARD
    ) -> None:
        """Errors: `CheckpointError` where no family of transformers is like the model."""
        self.source, self.tokenizer, self.shard = source, tokenizer, shard
        dtype = max(tensors.values(), key=lambda lazy: lazy.nbytes).dtype
        roles = {} if tokenizer is None else ids_of_roles(tokenizer)
        ids: dict[str, int | None] = {f"{role}_token_id": id for role, id in roles.items() if role != "unk"}
        ids |= {k: v for k, v in _read(source, "config.json").items() if k.endswith("_token_id")}
        if isinstance(source.config, EncoderDecoderConfig):  # what our decoders' rows begin with
            ids.setdefault("decoder_start_token_id", roles.get("bos", roles.get("pad")))
        self.ids = {k: v for k, v in ids.items() if isinstance(v, int | list)}
        self.config = write_config(source.config, dtype=str(dtype).removeprefix("torch."), ids=self.ids)
        self.cuts = [
            parts[0]
            for parts in foreigns(
                TABLES[self.config["model_type"]],
                tensors,
                heads_of(source.config),
                vocabulary_rows=source.config.vocab_size,
            ).values()
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(cut.nbytes for cut in self.cuts)

    def write(self, folder: Path, progress: Progress) -> dict[str, FileRecord]:
        """→ every file that was written."""
        shards = list(_shards(self.cuts, self.shard))
        names = [
            "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            for i in range(1, len(shards) + 1)
        ]
        records: dict[str, FileRecord] = {}
        for name, shard in zip(names, shards, strict=True):
            chunks: Iterator[Buffer] = tensor_chunks({cut.name: cut for cut in reading_once(shard)})
            records[name] = write_files({folder / name: chunks}, progress)[folder / name]
        texts = {"config.json": _json(self.config), GENERATION: self._generation()}
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": self.nbytes},
                "weight_map": {cut.name: n for n, shard in zip(names, shards, strict=True) for cut in shard},
            }
            texts["model.safetensors.index.json"] = _json(index)
        if self.source.tokenizer is not None and self.tokenizer is not None:
            texts |= for_transformers(files_of_tokenizer(self.source.tokenizer), self.tokenizer)
        return records | {name: write_file(folder / name, [text]) for name, text in texts.items()}

    def _generation(self) -> bytes:
        own = _read(self.source, GENERATION)
        return _json(own or {"_from_model_config": True, **self.ids, "transformers_version": WRITTEN_BY})


def _shards(cuts: list[Any], most: int) -> Iterator[list[Any]]:
    shard: list[Any] = []
    for cut in cuts:
        if shard and sum(each.nbytes for each in shard) + cut.nbytes > most:
            yield shard
            shard = []
        shard.append(cut)
    yield shard


def _read(source: Source, name: str) -> dict[str, Any]:
    """A JSON object of a source that is such a folder itself; empty for others."""
    path = source.folder / name
    if source.kind != "huggingface" or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
