"""The config section `model.tokenizer`: NeMo's keys.

Knows names. Refuses to open files (`load` does).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from megalith.config.schema import ForeignKey, Section, error, ignored, renamed, setting
from megalith.errors import Problem, UnsupportedError
from megalith.tokenizers.base import ROLES
from megalith.tokenizers.names import BUILT_TYPES, GPT2_BPE, absolute, known_library, known_type


class TokenizerConfig(Section):
    """Which tokenizer, and where its files are. Relative paths are relative to the working directory."""

    library: str = setting(
        "megatron",
        "Whose naming `type` follows: megatron, huggingface (`type` is then a path), or sentencepiece (`model` is a .model).",
    )
    type: str | None = setting(GPT2_BPE, "Megatron's name of the tokenizer.", examples=[*BUILT_TYPES])
    model: str | None = setting(
        None, "A SentencePiece .model, or a tokenizer.json or its folder (Megatron's --tokenizer-model)."
    )
    vocab_file: str | None = setting(None, "GPT-2's vocab.json, or BERT's vocab.txt.")
    merge_file: str | None = setting(None, "GPT-2's merges.txt.")
    delimiter: str | None = setting(
        None, "Field separator of NeMo's tabular tokenizer; nothing else reads it."
    )
    file: str | None = setting(
        None, "A tokenizer.json, or a folder with one (a checkpoint's tokenizer/, say)."
    )
    special_tokens: dict[str, str] | None = setting(
        None, "Token of each role (eod, bos, eos, pad, unk, cls, sep, mask), where the files do not say."
    )

    num_sentinel_tokens: int | None = setting(
        None,
        "How many of T5's <extra_id_N> follow the vocabulary (Megatron's --vocab-extra-ids); none is added twice.",
        ge=0,
    )

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = {
        "sentencepiece_legacy": ignored(
            "Megatron's special tokens are added behind a .model's pieces", silent=True
        ),
        "use_fast": ignored("the fast tokenizer is used wherever it gives the same ids", silent=True),
        "tokenizer_name": renamed("type"),
        "tokenizer_model": renamed("model"),
        "vocab_extra_ids": renamed("num_sentinel_tokens"),
    }

    def problems(self) -> Iterable[Problem]:
        """Names that are unknown or not built, files that contradict each other."""
        library = self.library
        for check, where, name in ((known_library, "library", library), (known_type, "type", self.type)):
            if where == "type" and (name is None or library in ("huggingface", "sentencepiece")):
                continue
            try:
                check(name or "")
            except UnsupportedError as refusal:
                yield error(where, refusal.problem.what, refusal.problem.fix)
        for role in self.special_tokens or {}:
            if role not in ROLES:
                yield error(f"special_tokens.{role}", "unknown role", "roles: " + ", ".join(ROLES))
        if self.file and (self.vocab_file or self.merge_file):
            yield error("file", "given together with vocab_file or merge_file", "give one or the other")

    def located(self) -> dict[str, Any]:
        """The keys that were set, files as absolute paths: enough to load the same tokenizer from anywhere."""
        return absolute(self.model_dump(exclude_unset=True, exclude_none=True))
