"""The section `model.data`: which token files, in which order, with which masks. NeMo's keys and meanings.

Knows the keys and which of them exclude each other. Opens no file and imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from megalith.config.schema import ForeignKey, Section, error, ignored, refused, setting, warning
from megalith.data.prefixes import FORMS, Prefixes, parse_prefixes
from megalith.data.splits import parse_splits
from megalith.errors import ConfigError, Problem

PrefixValue = str | list[float | str | list[float | str]]

PATH_KEYS = {"train": "train_data_path", "validation": "valid_data_path", "test": "test_data_path"}


class DataConfig(Section):
    """Token files → batches."""

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = {
        "exchange_indices_distributed": ignored("every process finds or builds its own index"),
        "delay_data_init": ignored("files are mapped, not read, at the start"),
        "delay_data_mmap": ignored("files are mapped, not read, at the start"),
        "shuffle_documents": refused("documents are always shuffled", harmless=(True,)),
        "pad_samples_to_global_batch_size": ignored("samples are drawn from an endless order"),
        "legacy_dataset": ignored(
            "there is one data set, with Megatron's bytes and Megatron's order on request"
        ),
        "no_seqlen_plus_one_input_tokens": refused("samples hold seq_length + 1 tokens"),
        "add_fim": refused("fill-in-the-middle is not built"),
        "mock": refused("give token files; `megalith quickstart` makes some from nothing"),
        "mock_dataset": refused("give token files; `megalith quickstart` makes some from nothing"),
    }

    data_prefix: PrefixValue | dict[str, PrefixValue] | None = setting(
        None,
        f"Token files, without .bin and .idx: {FORMS}. Weights are shares of the samples; without them each file counts "
        "by its tokens. Or a mapping train / validation / test, as the three *_data_path keys.",
        examples=["corpus/books_text_document", [0.3, "corpus/books_text_document", 0.7, "corpus/web_text_document"]],
    )  # fmt: skip
    train_data_path: PrefixValue | None = setting(
        None, "Token files to train on, in any form of data_prefix: instead of data_prefix and splits_string."
    )
    valid_data_path: PrefixValue | None = setting(None, "The same for validation.")
    test_data_path: PrefixValue | None = setting(None, "The same for the test at the end.")
    splits_string: str = setting(
        "900,50,50",
        "Shares of the documents of each file for train, validation and test, in file order.",
        examples=["969,30,1", "98/2/0"],
    )
    index_mapping_dir: str | None = setting(
        None,
        "Folder of the sample indexes; null: beside the data, else the user's cache folder, else memory.",
    )
    data_impl: Literal["mmap", "infer", "lazy", "cached"] = setting(
        "mmap", "Layout of the token files. They say so themselves; the value has no effect."
    )
    seq_length: int | None = setting(
        None, "Tokens of a sample; null: model.encoder_seq_length, which it must equal.", unit="tokens", ge=1
    )
    skip_warmup: bool = setting(
        True, "false: read the files once from end to end before training, so that they are in memory."
    )
    num_workers: int = setting(
        2, "Threads that read batches ahead; 0: batches are read when they are needed.", ge=0, le=256
    )
    order: Literal["native", "megatron"] = setting(
        "native",
        "native: each epoch shuffled by itself, so the length of the run never matters; megatron: Megatron-LM's index "
        "for the number of samples asked for, bit for bit.",
    )
    dataloader_type: Literal["single", "cyclic"] = setting(
        "single",
        "single: samples in the order of the plan; cyclic (order: megatron only): Megatron's random sampler, which goes "
        "round in a fixed data set and depends on micro_batch_size and the number of processes.",
    )
    data_sharding: bool = setting(
        True,
        "cyclic: each data-parallel rank draws from a part of its own, as Megatron; false: all from one.",
    )
    eod_mask_loss: bool = setting(
        False,
        "Drop one target at each end of document: with model.compat.eod_sense input (Megatron's meaning) the next "
        "document's first token, predicted from the end-of-document token; with target the end-of-document token.",
    )
    reset_position_ids: bool = setting(False, "Count positions anew behind each end-of-document token.")
    reset_attention_mask: bool = setting(False, "Tokens attend within their own document only.")
    validation_drop_last: bool = setting(
        True,
        "Validation and test use whole global batches only; false: the last samples too, in a batch filled up with rows "
        "that do not count.",
    )

    @field_validator("data_prefix", "train_data_path", "valid_data_path", "test_data_path", mode="after")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        for part in value.values() if isinstance(value, dict) else [value]:
            if part is not None:
                parse_prefixes(part)
        unknown = sorted(set(value) - set(PATH_KEYS)) if isinstance(value, dict) else []
        if unknown:
            raise ValueError(f"has no split {', '.join(unknown)}\nfix: train, validation, test")
        return value

    @property
    def shared_files(self) -> Prefixes | None:
        """Files that `splits_string` cuts into train, validation and test; None: each split has its own."""
        if self.data_prefix is None or isinstance(self.data_prefix, dict):
            return None
        return parse_prefixes(self.data_prefix)

    def own_files(self, split: str) -> Prefixes | None:
        """Files of a split ("train", "validation", "test") alone; None: it has none of its own."""
        mapping = self.data_prefix if isinstance(self.data_prefix, dict) else {}
        value = mapping.get(split) or getattr(self, PATH_KEYS[split])
        return parse_prefixes(value) if value else None

    def problems(self) -> Iterable[Problem]:
        yield from self._path_problems()
        if self.shared_files:
            try:
                parse_splits(self.splits_string)
            except ConfigError as wrong:
                yield from (error("splits_string", p.what, p.fix) for p in wrong.problems)
        if self.dataloader_type == "cyclic" and self.order == "native":
            yield error(
                "dataloader_type",
                "cyclic is Megatron's order, and order is native",
                "model.data.order=megatron; or model.data.dataloader_type=single: native shuffles every epoch anew already",
            )

    def _path_problems(self) -> Iterator[Problem]:
        own = [key for split, key in PATH_KEYS.items() if getattr(self, key)]
        if self.data_prefix and own:
            yield error("data_prefix", f"and {', '.join(own)} both name files", "keep one of the two ways")
        elif not self.data_prefix and not own:
            fix = "model.data.data_prefix=PREFIX, the output of `megalith data preprocess` without .bin"
            yield error("data_prefix", "names no files to train on", fix)
        elif not self.shared_files and not self.own_files("train"):
            yield error(
                own[0] if own else "data_prefix", "there are no files to train on", "add train_data_path"
            )
        elif self.shared_files is None and "splits_string" in self.model_fields_set and own:
            yield warning("splits_string", "has no effect: each split has files of its own")
