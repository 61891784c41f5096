"""Finds and opens a tokenizer: from a config section, a tokenizer.json, a .model, or a folder (ours or Hugging Face's).

Knows which files a type needs and where a folder notes its special tokens. A published vocabulary is found by its name where
it is on this machine. Refuses to download anything.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from megalith.errors import DataError, UnsupportedError
from megalith.hub.store import vocabulary_files
from megalith.tokenizers.base import END_OF_TEXT, ROLES, sentinel
from megalith.tokenizers.bpe import FOLDER_VERSION, ROLES_FILE, TOKENIZER_FILE, DefinedTokenizer
from megalith.tokenizers.definition import (
    read_definition,
    read_gpt2_files,
    vocabulary,
    with_special_tokens,
)
from megalith.tokenizers.folders import tokenizer_of_folder
from megalith.tokenizers.names import (
    GPT2_BPE,
    GPT_SENTENCE_PIECE,
    HUGGING_FACE,
    SENTENCE_PIECE,
    SENTENCE_PIECE_TYPES,
    WORD_PIECE_LOWER,
    WORD_PIECE_TYPES,
    TokenizerFiles,
    TokenizerSource,
    known_library,
    known_type,
    published_name,
)
from megalith.tokenizers.sentencepiece import (
    MODEL_FILE,
    SentencePieceTokenizer,
    read_model,
    sentence_piece_tokenizer,
)
from megalith.tokenizers.wordpiece import word_piece_tokenizer

LoadedTokenizer = DefinedTokenizer | SentencePieceTokenizer
_EOD_CANDIDATES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_HUGGING_FACE_ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")


def load_tokenizer(source: TokenizerSource | str | os.PathLike[str]) -> LoadedTokenizer:
    """Open the tokenizer of a config section, of a tokenizer.json or a .model, or of a folder.

    DataError for files that are missing, damaged or of another kind, UnsupportedError for types not built.
    """
    config = TokenizerFiles(file=os.fspath(source)) if isinstance(source, str | os.PathLike) else source
    config = _with_published_files(config)
    library = known_library(config.library)
    overrides = _checked_roles(config.special_tokens or {})
    extra_ids = config.num_sentinel_tokens or 0
    location = config.file or config.model
    if library == "huggingface":
        location = location or config.type
        if not location:
            raise DataError(
                "no tokenizer named", where="tokenizer.type", fix="give a tokenizer.json or a folder"
            )
        return _load_path(Path(location), None, overrides, extra_ids)
    type = SENTENCE_PIECE if library == "sentencepiece" else known_type(config.type or GPT2_BPE)
    if config.file or (location and type in (HUGGING_FACE, *SENTENCE_PIECE_TYPES)):
        _refuse_both(config)
        kind = type if type in SENTENCE_PIECE_TYPES else None
        return _load_path(Path(location or ""), kind, overrides, extra_ids)
    if type in (HUGGING_FACE, *SENTENCE_PIECE_TYPES):
        what = "a tokenizer.json" if type == HUGGING_FACE else "a SentencePiece .model"
        raise DataError(
            f"{type} needs {what}",
            where="tokenizer.model",
            fix="give `model` (--tokenizer-model): the file, or a folder with it; nothing is downloaded",
        )
    if type in WORD_PIECE_TYPES:
        return _load_word_piece(config, type, overrides, extra_ids)
    return _with_sentinels(_load_gpt2(config, overrides), extra_ids)


def _with_published_files(config: TokenizerSource) -> TokenizerSource:
    """A published name replaced by its type and files. Errors: `DataError` where these are not on this machine."""
    name = published_name(config)
    files = vocabulary_files(name) if name else None
    if files is None:
        return config
    return TokenizerFiles(
        **files, special_tokens=config.special_tokens, num_sentinel_tokens=config.num_sentinel_tokens
    )


def _load_word_piece(
    config: TokenizerSource, type: str, overrides: Mapping[str, str], extra_ids: int
) -> DefinedTokenizer:
    if config.merge_file:
        raise DataError(
            f"{type} has no merges", where="tokenizer.merge_file", fix="leave it out; give vocab_file alone"
        )
    if not config.vocab_file:
        case = "uncased" if type == WORD_PIECE_LOWER else "cased"
        raise DataError(
            f"{config.type} needs vocab_file: the vocab.txt of its model",
            where="tokenizer.vocab_file",
            fix=f"give the file (--vocab-file), or name the published one: --tokenizer-type megatron-bert-{case}",
        )
    return word_piece_tokenizer(
        Path(config.vocab_file),
        type=type,
        extra_ids=extra_ids,
        roles=overrides,
    )


def _with_sentinels(tokenizer: DefinedTokenizer, count: int) -> DefinedTokenizer:
    """The tokenizer with T5's `count` sentinels behind its vocabulary, those that it lacks."""
    if not count:
        return tokenizer
    definition = with_special_tokens(tokenizer.definition, map(sentinel, range(count)))
    return DefinedTokenizer(definition, tokenizer.roles, type=tokenizer.type, where=tokenizer.where)


def _refuse_both(config: TokenizerSource) -> None:
    if config.vocab_file or config.merge_file:
        raise DataError(
            "both `file` and `vocab_file`/`merge_file` are given",
            where="tokenizer",
            fix="give a tokenizer.json, or GPT-2's two files, not both",
        )


def _load_gpt2(config: TokenizerSource, overrides: Mapping[str, str]) -> DefinedTokenizer:
    for key, value, name in (
        ("vocab_file", config.vocab_file, "vocab.json"),
        ("merge_file", config.merge_file, "merges.txt"),
    ):
        if not value:
            if (config.vocab_file or "").endswith(".txt"):
                raise DataError(
                    "a vocab.txt without merges: BERT's?",
                    where="tokenizer.vocab_file",
                    fix=f"name its type (--tokenizer-type): {' or '.join(WORD_PIECE_TYPES)}",
                )
            raise DataError(
                f"GPT2BPETokenizer needs {key} (GPT-2's {name})",
                where=f"tokenizer.{key}",
                fix="give both files, or `file` with a tokenizer.json; `megalith tokenizer train` makes all three; the "
                "published ones have a name: --tokenizer-type megatron-gpt-345m",
            )
    return gpt2_tokenizer(Path(config.vocab_file or ""), Path(config.merge_file or ""), overrides)


def gpt2_tokenizer(
    vocab_file: Path, merge_file: Path, overrides: Mapping[str, str] | None = None
) -> DefinedTokenizer:
    """GPT2BPETokenizer of vocab.json and merges.txt; `<|endoftext|>` ends a document."""
    vocab_file, merge_file = vocab_file.expanduser(), merge_file.expanduser()
    definition = read_gpt2_files(vocab_file, merge_file)
    roles = dict.fromkeys(("eod", "bos", "eos"), END_OF_TEXT) if definition["added_tokens"] else {}
    return DefinedTokenizer(definition, {**roles, **(overrides or {})}, type=GPT2_BPE, where=str(vocab_file))


def _load_path(path: Path, kind: str | None, overrides: Mapping[str, str], extra_ids: int) -> LoadedTokenizer:
    """A file or folder; `kind` is the SentencePiece type that a .model is to be read as."""
    path = path.expanduser()
    if path.is_dir():
        return _load_folder(path, overrides, extra_ids)
    if not path.exists():
        raise DataError(
            "no such tokenizer file or folder",
            where=str(path),
            fix="check the path; nothing is downloaded: put the file there yourself",
        )
    if kind or path.suffix == ".model":
        return sentence_piece_tokenizer(
            path,
            type=kind or SENTENCE_PIECE,
            megatron=kind != GPT_SENTENCE_PIECE,
            extra_ids=extra_ids,
            roles=overrides,
        )
    return _with_sentinels(_load_json(path, HUGGING_FACE, None, overrides), extra_ids)


def _load_folder(folder: Path, overrides: Mapping[str, str], extra_ids: int) -> LoadedTokenizer:
    notes = _notes(folder / ROLES_FILE)
    if not (folder / TOKENIZER_FILE).is_file():
        if notes is not None and (folder / MODEL_FILE).is_file():
            return _checked_hash(_load_saved_model(folder, notes, overrides, extra_ids), notes, folder)
        vocab_file, merge_file = folder / "vocab.json", folder / "merges.txt"
        if vocab_file.is_file() and merge_file.is_file():
            return _with_sentinels(gpt2_tokenizer(vocab_file, merge_file, overrides), extra_ids)
        settings, roles = _notes(folder / "tokenizer_config.json") or {}, _hugging_face_roles(folder)
        alone = tokenizer_of_folder(folder, settings, {**roles, **overrides})
        if alone is not None:
            return _with_sentinels(alone, extra_ids) if isinstance(alone, DefinedTokenizer) else alone
        raise DataError(
            "a folder without tokenizer.json",
            where=str(folder),
            fix="give the folder or file that has it; name a .model or a vocab.txt itself, with its --tokenizer-type",
        )
    if notes is None:
        found = _load_json(folder / TOKENIZER_FILE, HUGGING_FACE, _hugging_face_roles(folder), overrides)
    else:
        roles = _checked_roles(notes.get("special_tokens") or {})
        type = known_type(str(notes.get("type") or HUGGING_FACE))
        found = _load_json(folder / TOKENIZER_FILE, type, roles, overrides, guess=False)
        _checked_hash(found, notes, folder)
    return _with_sentinels(found, extra_ids)


def _load_saved_model(
    folder: Path, notes: Mapping[str, Any], overrides: Mapping[str, str], extra_ids: int
) -> SentencePieceTokenizer:
    path = folder / MODEL_FILE
    loaded = SentencePieceTokenizer(
        read_model(path),
        {**_checked_roles(notes.get("special_tokens") or {}), **overrides},
        added=[*map(str, notes.get("added") or []), *map(sentinel, range(extra_ids))],
        type=known_type(str(notes.get("type") or SENTENCE_PIECE)),
        where=str(path),
    )
    loaded.check()
    return loaded


def _checked_hash(loaded: LoadedTokenizer, notes: Mapping[str, Any], folder: Path) -> LoadedTokenizer:
    if "hash" in notes and notes["hash"] != loaded.hash():
        raise DataError(
            f"the tokenizer was changed after it was saved: its hash differs from {ROLES_FILE}'s",
            where=str(folder),
            fix="restore the file; a tokenizer must not change under a trained model",
        )
    return loaded


def _load_json(
    path: Path,
    type: str,
    roles: Mapping[str, str] | None,
    overrides: Mapping[str, str],
    *,
    guess: bool = True,
) -> DefinedTokenizer:
    """A tokenizer.json; the roles that it fills are given, and `guess` finds an end-of-document token if they lack one."""
    definition = read_definition(path)
    try:
        known = vocabulary(definition)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError("damaged: its vocabulary or added tokens cannot be read", where=str(path)) from None
    if not known:
        raise DataError("its vocabulary is empty", where=str(path))
    if definition["model"].get("dropout"):
        raise UnsupportedError(
            "its `dropout` makes ids random: the same text would be stored differently each time",
            where=str(path),
            fix="set model.dropout to null in the file",
        )
    found = {role: token for role, token in (roles or {}).items() if token in known}
    candidates = (*_EOD_CANDIDATES[:1], found.get("eos", ""), *_EOD_CANDIDATES[1:])
    eod = next((token for token in candidates if token in known), None)
    if guess and eod is not None:
        found = {"eod": eod, **found}
    tokenizer = DefinedTokenizer(definition, {**found, **overrides}, type=type, where=str(path))
    tokenizer.check()
    return tokenizer


def _checked_roles(roles: Mapping[str, Any]) -> dict[str, str]:
    wrong = [role for role in roles if role not in ROLES]
    if wrong:
        raise DataError(
            f"unknown role {wrong[0]!r}", where="tokenizer.special_tokens", fix="roles: " + ", ".join(ROLES)
        )
    return {role: str(token) for role, token in roles.items()}


def _notes(path: Path) -> dict[str, Any] | None:
    """The parsed JSON object of a file, None where there is no such file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        notes = msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise DataError(f"damaged: {error}", where=str(path), fix="restore the file") from None
    if path.name == ROLES_FILE and notes.get("format_version", FOLDER_VERSION) > FOLDER_VERSION:
        raise DataError("written by a newer Megalith", where=str(path), fix="use that version")
    return notes


def _hugging_face_roles(folder: Path) -> dict[str, str]:
    """Special tokens that Hugging Face's companion files name; plain strings or objects with `content`."""
    roles: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        notes = _notes(folder / name) or {}
        for role in _HUGGING_FACE_ROLES:
            token = notes.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                roles[role] = token
    return roles
