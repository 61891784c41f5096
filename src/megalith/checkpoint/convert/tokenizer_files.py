"""The files of a tokenizer, and which of them go into a folder of each format.

Knows file names and what Hugging Face's libraries look for. Knows no weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalith.errors import CheckpointError, MegalithError
from megalith.tokenizers.base import Tokenizer
from megalith.tokenizers.load import load_tokenizer

DEFINITION, SENTENCE_PIECE, HF_CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
KNOWN = (
    DEFINITION, SENTENCE_PIECE, HF_CONFIG, "megalith_tokenizer.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja",
)  # fmt: skip
"""What belongs to a tokenizer in a folder that holds other things too."""
ROLES = ("bos", "eos", "pad", "unk")


def read_tokenizer(path: Path | None, *, named: bool) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """The tokenizer, or none and what to say where a checkpoint's own cannot be read; one that a person `named` must be."""
    if path is None:
        return None, ()
    try:
        return load_tokenizer(path), ()
    except MegalithError as error:
        if named:
            raise
        return None, (f"its tokenizer is left out: {error.problem.what} ({path})",)


def files_of_tokenizer(path: Path) -> dict[str, bytes]:
    """Name → content. A single file gets the name by which a folder's is found."""
    try:
        if path.is_dir():
            return {name: (path / name).read_bytes() for name in KNOWN if (path / name).is_file()}
        name = (
            SENTENCE_PIECE if path.suffix == ".model" else DEFINITION if path.suffix == ".json" else path.name
        )
        return {name: path.read_bytes()}
    except OSError as error:
        raise CheckpointError(
            f"the tokenizer cannot be read ({error.strerror or error})", where=str(path)
        ) from error


def for_transformers(files: dict[str, bytes], tokenizer: Tokenizer) -> dict[str, bytes]:
    """With the file by which `AutoTokenizer` knows what to make of tokenizer.json."""
    if HF_CONFIG in files or DEFINITION not in files:
        return files
    told: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    told |= {f"{role}_token": tokenizer.piece(id) for role, id in ids_of_roles(tokenizer).items()}
    return files | {HF_CONFIG: (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode()}


def ids_of_roles(tokenizer: Tokenizer) -> dict[str, int]:
    """Role as Hugging Face names it → id; what ends a document ends a generation too."""
    special = dict(tokenizer.special)
    found = {role: special[role] for role in ROLES if role in special}
    return ({"eos": special["eod"]} if "eod" in special else {}) | found
