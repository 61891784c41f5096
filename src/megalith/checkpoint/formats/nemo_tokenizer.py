"""The tokenizer in a NeMo archive: files under `nemo:<hash>_<name>`, or under the names of their keys in older ones.

    tokenizer: {library, type, model, vocab_file, merge_file} + members ─▶ a temporary folder that `load_tokenizer` opens
    a tokenizer of ours ─▶ the same keys and files, where NeMo's code makes the same ids of them

Knows names of members and keys. What the files mean is `tokenizers`' business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalith.checkpoint.formats.nemo_archive import Archive, Temporary
from megalith.errors import DataError, MegalithError
from megalith.tokenizers.base import Tokenizer
from megalith.tokenizers.bpe import DefinedTokenizer
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.names import SENTENCE_PIECE, WORD_PIECE_TYPES, TokenizerFiles
from megalith.tokenizers.sentencepiece import SentencePieceTokenizer

Written = tuple[dict[str, Any], dict[str, bytes], tuple[str, ...]]
"""Keys, files, notices."""
SAMPLES = (
    "Hello, world! It's 12:45.\n\n  def f(x): return x**2",
    "naïve café – Größe, 数学 😀",
    " leading",
    "trailing ",
)
"""Texts that tokenizers of different kinds spell differently."""
MARK = "nemo:"
"""What stands before the name of a member in a configuration."""
VOCABULARY = "tokenizer_vocab_dict.json"
"""Token → id, as NeMo writes the vocabulary of a tokenizer of transformers."""
OWN = ("tokenizer.json", "megalith_tokenizer.json")
"""Files of a tokenizer of ours that NeMo has nothing like: members that it does not look at."""
KEYS = {
    "model": ("model", "tokenizer_model"),
    "vocab_file": ("vocab_file",),
    "merge_file": ("merge_file", "merges_file"),
}
"""Field of `TokenizerFiles` → NeMo's keys."""
NAMES = {"model": "tokenizer.model", "vocab_file": "vocab.txt", "merge_file": "merges.txt"}
"""What a file is called where it is laid down for reading."""


def find_own(archive: Archive, keys: Any) -> tuple[Path | None, tuple[str, ...]]:
    """The archive's own tokenizer (a temporary folder), and what to say where it has none or one that cannot be read."""
    keys = keys if isinstance(keys, Mapping) else {}
    members = {field: member for field in KEYS if (member := _member(archive, keys, field))}
    if not members and VOCABULARY not in archive.members:
        return _kept(archive), ()
    sources, folder = Temporary.folder(), Temporary.folder()
    try:
        files = _lay_down(archive, members, sources)
        sentinels = keys.get("num_sentinel_tokens")
        loaded = load_tokenizer(
            TokenizerFiles(
                type=_type(keys),
                library=str(keys.get("library") or "megatron"),
                num_sentinel_tokens=sentinels if isinstance(sentinels, int) else None,
                model=files.get("model"),
                vocab_file=files.get("vocab_file"),
                merge_file=files.get("merge_file"),
            )
        )
        loaded.save(folder)
    except (MegalithError, OSError) as error:
        what = error.problem.what if isinstance(error, MegalithError) else str(error.strerror or error)
        return None, (f"its tokenizer is left out: {what} (--tokenizer takes another)",)
    return folder, ()


def _kept(archive: Archive) -> Path | None:
    """A tokenizer that NeMo has nothing like, as we keep it in an archive of ours."""
    found = {own: name for name in archive.members for own in OWN if name.split("_", 1)[1:] == [own]}
    if len(found) < len(OWN):
        return None
    folder = Temporary.folder()
    for own, name in found.items():
        (folder / own).write_bytes(archive.read(name))
    return folder


def _member(archive: Archive, keys: Mapping[str, Any], field: str) -> str | None:
    for key in KEYS[field]:
        value = keys.get(key)
        named = value.removeprefix(MARK) if isinstance(value, str) else ""
        for name in (named, f"tokenizer.{key}"):
            if name in archive.members:
                return name
    return None


def _type(keys: Mapping[str, Any]) -> str | None:
    """The type, or the name of a pretrained model that says it."""
    for key in ("type", "tokenizer_name"):
        if isinstance(keys.get(key), str) and keys[key]:
            return str(keys[key])
    return None


def _lay_down(archive: Archive, members: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The members as files in a folder: field → path."""
    contents = {field: archive.read(name) for field, name in members.items()}
    if "vocab_file" not in contents and "model" not in contents:
        contents["vocab_file"] = _lines(archive.read(VOCABULARY))
    return _write_down(contents, folder)


def as_files(path: Path | None, tokenizer: Tokenizer | None) -> Written:
    """NeMo's keys of a tokenizer that lies at `path`, name → content of their files, and what to say where NeMo has none like it."""
    keys = {"library": "megatron", "type": None, "model": None, "vocab_file": None, "merge_file": None}
    if path is None or tokenizer is None:
        return keys, {}, ()
    contents = _contents(path, tokenizer)
    if not contents or not _same(contents, tokenizer):
        said = f"its tokenizer ({tokenizer.type}) is kept for Megalith alone: NeMo would make other ids of its files"
        folder = Temporary.folder()
        tokenizer.save(folder)
        return (
            keys,
            {name: (folder / name).read_bytes() for name in OWN if (folder / name).is_file()},
            (said,),
        )
    names = _names(contents)
    library = "sentencepiece" if "model" in contents else "megatron"
    keys |= {"library": library, "type": None if "model" in contents else tokenizer.type}
    return keys | names, {names[field]: content for field, content in contents.items()}, ()


def _contents(path: Path, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Field → content of the files that NeMo reads; empty where it reads none like them."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        file = path / NAMES["model"] if path.is_dir() else path
        return {"model": file.read_bytes()} if file.is_file() else {}
    if not isinstance(tokenizer, DefinedTokenizer):
        return {}
    ids = tokenizer.vocabulary
    if tokenizer.type in WORD_PIECE_TYPES:
        return {"vocab_file": _lines(json.dumps(ids).encode())}
    if tokenizer.definition["model"].get("type") != "BPE":
        return {}
    pairs = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer.definition["model"]["merges"]
    ]
    merges = "".join(f"{pair}\n" for pair in ["#version: 0.2", *pairs])
    return {"vocab_file": json.dumps(ids, ensure_ascii=False).encode(), "merge_file": merges.encode()}


def _same(contents: Mapping[str, bytes], tokenizer: Tokenizer) -> bool:
    """Does what is read back make the same ids?"""
    folder = Temporary.folder()
    try:
        files = _write_down(contents, folder)
        kind = SENTENCE_PIECE if "model" in contents else tokenizer.type
        back = load_tokenizer(TokenizerFiles(type=kind, **files))  # type: ignore[arg-type]
    except MegalithError:
        return False
    return all(back.encode(text) == tokenizer.encode(text) for text in SAMPLES) and (
        back.vocab_size == tokenizer.vocab_size
    )


def _names(contents: Mapping[str, bytes]) -> dict[str, str]:
    """Field → what its file is called."""
    names = NAMES | ({"vocab_file": "vocab.json"} if "merge_file" in contents else {})
    return {field: names[field] for field in contents}


def _write_down(contents: Mapping[str, bytes], folder: Path) -> dict[str, str]:
    """Field → path of its file in a folder."""
    paths = {field: folder / name for field, name in _names(contents).items()}
    for field, path in paths.items():
        path.write_bytes(contents[field])
    return {field: str(path) for field, path in paths.items()}


def _lines(content: bytes) -> bytes:
    """A vocab.txt of a dictionary of ids."""
    try:
        ids = json.loads(content)
        tokens = sorted(ids, key=ids.__getitem__)
        if [ids[token] for token in tokens] != list(range(len(tokens))):
            raise ValueError("ids are missing")
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"is no dictionary of tokens ({error})", where=VOCABULARY) from None
    return "".join(f"{token}\n" for token in tokens).encode()
