"""A tokenizer as data: the contents of a Hugging Face `tokenizer.json`, from that file or from GPT-2's two files.

Knows the JSON and what in it decides ids. Refuses to tokenize: `bpe` and `fast` hand the definition to their engines.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from megalith.errors import DataError
from megalith.tokenizers.base import END_OF_TEXT

Definition = dict[str, Any]
"""A parsed tokenizer.json."""

_ADDED_SENTINEL = re.compile(r"<extra_id_\d+>").fullmatch
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def byte_level_definition(vocabulary: Mapping[str, int], merges: list[tuple[str, str]]) -> Definition:
    """GPT-2's scheme (byte-level BPE with its regular expression) over a vocabulary and its merges."""
    special = [special_token(END_OF_TEXT, vocabulary[END_OF_TEXT])] if END_OF_TEXT in vocabulary else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": dict(_BYTE_LEVEL),
        "post_processor": None,
        "decoder": dict(_BYTE_LEVEL),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocabulary),
            "merges": merges,
        },
    }


def special_token(content: str, id: int) -> dict[str, Any]:
    """An entry of `added_tokens`."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, **flags, "special": True}


def with_special_tokens(definition: Definition, tokens: Iterable[str]) -> Definition:
    """The definition with `tokens` behind the last id, those that it has already left where they are."""
    known = vocabulary(definition)
    first = max(known.values(), default=-1) + 1
    missing = [token for token in dict.fromkeys(tokens) if token not in known]
    added = [special_token(token, id) for id, token in enumerate(missing, start=first)]
    return {**definition, "added_tokens": [*(definition.get("added_tokens") or []), *added]}


def read_definition(path: Path) -> Definition:
    """Parse a tokenizer.json; DataError says what the file is when it is something else."""
    parsed = _read_json(path)
    if isinstance(parsed, dict) and isinstance(parsed.get("model"), dict):
        return parsed
    if isinstance(parsed, dict) and parsed and all(isinstance(id, int) for id in parsed.values()):
        raise DataError(
            "a vocabulary (vocab.json), not a tokenizer.json",
            where=str(path),
            fix="give it as vocab_file, together with merge_file=merges.txt",
        )
    raise DataError("JSON, but not a tokenizer.json: it has no `model`", where=str(path))


def read_gpt2_files(vocab_file: Path, merge_file: Path) -> Definition:
    """Definition of GPT-2's vocab.json and merges.txt, checked against each other."""
    vocabulary = _read_vocabulary(vocab_file)
    merges = _read_merges(merge_file)
    for number, (left, right) in enumerate(merges, start=1):
        if left + right not in vocabulary or left not in vocabulary or right not in vocabulary:
            raise DataError(
                f"merge {number} ({left!r} + {right!r}) has no entry in {vocab_file}",
                where=str(merge_file),
                fix="the two files belong to different tokenizers, or vocab_file is cut short",
            )
    return byte_level_definition(vocabulary, merges)


def _read_vocabulary(path: Path) -> dict[str, int]:
    parsed = _read_json(path)
    if isinstance(parsed, dict) and isinstance(parsed.get("model"), dict):
        raise DataError(
            "a tokenizer.json, not a vocab.json",
            where=str(path),
            fix="give it as `file` (tokenizer-file), without vocab_file and merge_file",
        )
    if not isinstance(parsed, dict) or not parsed or not all(type(id) is int for id in parsed.values()):
        raise DataError(
            "not a vocabulary: it must be a JSON object of pieces to ids",
            where=str(path),
            fix="give GPT-2's vocab.json (encoder.json) as vocab_file",
        )
    ids = set(parsed.values())
    if len(ids) != len(parsed) or min(ids) < 0:
        raise DataError("two pieces share an id, or an id is negative", where=str(path))
    return parsed


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Pairs of merges.txt. The `#version` line and blank lines at the end are skipped."""
    lines = read_text(path).rstrip("\r\n").split("\n")
    start = 1 if lines[0].startswith("#version") else 0
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines[start:], start=start + 1):
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2 or not all(parts):
            raise DataError(
                f"line {number} is not two pieces with a space between: {line[:60]!r}",
                where=str(path),
                fix="swap vocab_file and merge_file?"
                if line.lstrip().startswith("{")
                else "give GPT-2's merges.txt (vocab.bpe) as merge_file",
            )
        merges.append((parts[0], parts[1]))
    return merges


def read_text(path: Path) -> str:
    """A UTF-8 file; DataError for one that is none, or cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), fix="check the path") from None
    except IsADirectoryError:
        raise DataError("a folder, not a file", where=str(path)) from None
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            fix = "the file is cut short inside a character: copy it again"
        else:
            fix = "give a JSON or merges file as its library wrote it"
        raise DataError(
            f"not a text file: byte {error.start} is not UTF-8", where=str(path), fix=fix
        ) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _read_json(path: Path) -> Any:
    text = read_text(path)
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        first = text.lstrip()[:1]
        if first in ("{", "["):
            fix = "the file is cut short or damaged: copy it again"
        else:
            fix = "it looks like a merges file: swap vocab_file and merge_file?"
        raise DataError(f"not JSON ({error})", where=str(path), fix=fix) from None


def vocabulary(definition: Definition) -> dict[str, int]:
    """Every piece and its id, added tokens included. Model vocabularies may be an object or a list of pairs."""
    stored = definition["model"].get("vocab") or {}
    if isinstance(stored, dict):
        pieces = dict(stored)
    else:
        pieces = {piece: id for id, (piece, *_) in enumerate(stored)}
    pieces.update((token["content"], token["id"]) for token in definition.get("added_tokens") or [])
    return pieces


def _stored_vocabulary(definition: Definition) -> dict[str, int]:
    """As `vocabulary`, without the sentinels that were added behind it."""
    kept = [token for token in definition.get("added_tokens") or [] if not _ADDED_SENTINEL(token["content"])]
    return vocabulary({**definition, "added_tokens": kept})


def model_type(definition: Definition) -> str:
    """BPE, Unigram, WordPiece or WordLevel; old files do not write it."""
    model = definition["model"]
    if "type" in model:
        return str(model["type"])
    if "merges" in model:
        return "BPE"
    return "Unigram" if isinstance(model.get("vocab"), list) else "WordPiece"


def guarded(definition: Definition) -> Definition:
    """A definition whose model cannot spell a special token out of text; the same object where it never could.

    Unigram, WordPiece, WordLevel and BPE with `ignore_merges` match whole pieces, `</s>` among them: such pieces get a
    name that no text has. Ids stay. Plain BPE reaches a piece by merges only, and special tokens have none.
    """
    model = definition["model"]
    special = {token["content"] for token in definition.get("added_tokens") or [] if token.get("special")}
    special.discard(model.get("unk_token"))
    if not special or (model_type(definition) == "BPE" and not model.get("ignore_merges")):
        return definition
    merged = {"".join(_pair(merge)) for merge in model.get("merges") or []}

    def name(piece: str) -> str:
        return f"\x00{piece}\x00" if piece in special and piece not in merged else piece

    vocab = model["vocab"]
    hidden = special - merged
    if isinstance(vocab, dict):
        renamed: Any = {name(piece): id for piece, id in vocab.items()}
        inside = hidden & vocab.keys()
    else:
        renamed = [[name(entry[0]), *entry[1:]] for entry in vocab]
        inside = hidden & {entry[0] for entry in vocab}
    # A hidden piece must not be added again under a new id; those outside the model keep the numbering of the rest.
    kept = [token for token in definition["added_tokens"] if token["content"] not in inside]
    return {**definition, "added_tokens": kept, "model": {**model, "vocab": renamed}}


def corpus_definition(definition: Definition) -> Definition:
    """What maps corpus text to ids: no special tokens to be parsed, no template, no truncation, no padding."""
    safe = guarded(definition)
    kept = [token for token in safe.get("added_tokens") or [] if not token.get("special")]
    cut = dict.fromkeys(("truncation", "padding", "post_processor"), None)
    return {**safe, "added_tokens": kept, **cut}


def fingerprint(definition: Definition) -> str:
    """SHA-256 (hex) of what decides ids, independent of spelling: offsets, templates, decoders do not count.

    Nor do T5's sentinels behind the vocabulary, which no text becomes: a corpus made without them is theirs, too.
    """
    model = {key: value for key, value in definition["model"].items() if value not in (None, "", False)}
    model.pop("merges", None)
    model["type"] = model_type(definition)
    model["vocab"] = sorted(_stored_vocabulary(definition).items(), key=lambda item: item[1])
    if model["type"] == "Unigram":
        model["scores"] = [score for _, score in definition["model"]["vocab"]]
    merges = definition["model"].get("merges") or []
    canonical = {
        "model": model,
        "merges": [_pair(merge) for merge in merges],
        "normalizer": definition.get("normalizer"),
        "pre_tokenizer": _without_offsets(definition.get("pre_tokenizer")),
        "added": [token for token in definition.get("added_tokens") or [] if not token.get("special")],
    }
    return hashlib.sha256(msgspec.json.encode(canonical, order="sorted")).hexdigest()


def _pair(merge: str | list[str] | tuple[str, str]) -> list[str]:
    """Both pieces of a merge; older files write them as one string."""
    return merge.split(" ", 1) if isinstance(merge, str) else list(merge)


def _without_offsets(part: Any) -> Any:
    """A pre-tokenizer without what never changes ids, defaults written out."""
    if isinstance(part, list):
        return [_without_offsets(piece) for piece in part]
    if not isinstance(part, dict):
        return part
    kept = {key: _without_offsets(value) for key, value in part.items() if key != "trim_offsets"}
    if kept.get("type") == "ByteLevel":
        kept.setdefault("use_regex", True)
    return kept
