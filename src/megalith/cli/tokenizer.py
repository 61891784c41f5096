"""`megalith tokenizer train|encode|inspect`: make a tokenizer, try a tokenizer, look into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from megalith.data.texts import Tally
    from megalith.tokenizers.load import LoadedTokenizer
    from megalith.tokenizers.names import TokenizerFiles
    from megalith.tokenizers.train import TrainingOptions

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Train, try and inspect tokenizers.",
)

WORTH_A_BAR = 20_000_000
"""Bytes of input below which training takes so few seconds that the library's four bars would only stand about."""

TokenizerPath = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        "--tokenizer-model",
        help="a SentencePiece .model, a tokenizer.json, or a folder with one",
        metavar="PATH",
    ),
]
TokenizerType = Annotated[
    str | None,
    typer.Option(
        "--tokenizer-type",
        help="Megatron's name: GPT2BPETokenizer, BertWordPieceLowerCase, BertWordPieceCase, SentencePieceTokenizer, …",
    ),
]
VocabFile = Annotated[
    Path | None, typer.Option("--vocab-file", "--vocab", help="GPT-2's vocab.json, or BERT's vocab.txt")
]
ExtraIds = Annotated[
    int, typer.Option("--vocab-extra-ids", min=0, help="T5's <extra_id_N> behind the vocabulary")
]
MergeFile = Annotated[Path | None, typer.Option("--merge-file", help="GPT-2's merges.txt")]


def tokenizer_config(
    path: Path | None,
    kind: str | None,
    vocab_file: Path | None,
    merge_file: Path | None,
    *,
    extra_ids: int = 0,
) -> TokenizerFiles | None:
    """The section that the options spell, None if none was given."""
    from megalith.tokenizers.names import TokenizerFiles

    given = {"file": path, "type": kind, "vocab_file": vocab_file, "merge_file": merge_file}
    values = {key: str(value) for key, value in given.items() if value is not None}
    return TokenizerFiles(**values, num_sentinel_tokens=extra_ids or None) if values else None


@app.command()
def train(
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            help="file, pattern or folder: .jsonl, .json, .txt, plain, .gz or .zst; may be repeated",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="folder to write")],
    kind: Annotated[
        str,
        typer.Option("--type", help="bpe (for GPT), wordpiece (for BERT) or sentencepiece-unigram (for T5)"),
    ] = "bpe",
    cased: Annotated[
        bool, typer.Option("--cased", help="wordpiece: tell capital letters from small")
    ] = False,
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="entries, special tokens included")] = 50257,
    min_frequency: Annotated[
        int, typer.Option("--min-frequency", help="how often a pair must occur to be merged")
    ] = 2,
    special_tokens: Annotated[
        list[str] | None,
        typer.Option("--special-token", help="may be repeated; default for bpe: <|endoftext|>"),
    ] = None,
    json_key: Annotated[
        str, typer.Option("--json-key", "--json-keys", help="where a JSON line has its text")
    ] = "text",
    max_megabytes: Annotated[
        float | None, typer.Option("--max-megabytes", help="stop reading after so much text")
    ] = None,
) -> None:
    """Learns a tokenizer from text and writes its files: tokenizer.json with GPT-2's or BERT's own, or tokenizer.model.

    Example: megalith tokenizer train --input corpus.jsonl --vocab-size 32000 --output tokenizer
    """
    import time

    from rich.console import Console

    from megalith.data.preprocess.sources import find_sources
    from megalith.data.texts import Tally, read_texts
    from megalith.errors import DataError
    from megalith.tokenizers.base import END_OF_TEXT
    from megalith.tokenizers.train import TrainingOptions, write_trained

    console = Console(stderr=True)
    learn = _learner(kind, cased)
    options = TrainingOptions(
        vocab_size, min_frequency, tuple(special_tokens or ([END_OF_TEXT] if kind == "bpe" else []))
    )
    if output.exists() and not output.is_dir():
        raise DataError(
            "cannot be written: a file, not a folder", where=str(output), fix="choose another folder"
        )
    tally, started = Tally(), time.perf_counter()
    limit = None if max_megabytes is None else int(max_megabytes * 1e6)
    sources = find_sources(inputs)
    slow = sum(source.size for source in sources) > WORTH_A_BAR
    texts = read_texts(sources, json_key, tally, max_bytes=limit)
    tokenizer = learn(texts, options, slow and console.is_terminal)
    if not tally.bytes:
        raise DataError(
            f"no text was found under the key {json_key!r}" if tally.bad_lines else "no text was found",
            where=", ".join(inputs),
            fix="name the key that has the text with --json-key" if tally.bad_lines else "check the files",
        )
    files = write_trained(tokenizer, output)
    _print_rows(_trained(tokenizer, tally, files, time.perf_counter() - started))
    _tell_shortfall(console, tally, tokenizer.vocab_size, options, json_key)


def _learner(kind: str, cased: bool) -> Callable[[Iterable[str], TrainingOptions, bool], LoadedTokenizer]:
    """The function of a `--type`: texts, options, whether to show bars."""
    from megalith.errors import DataError
    from megalith.tokenizers.names import WORD_PIECE_CASE, WORD_PIECE_LOWER
    from megalith.tokenizers.train import train_bpe, train_sentence_piece, train_word_piece

    if cased and kind != "wordpiece":
        raise DataError("only wordpiece has two cases", where="--cased", fix="leave it out")
    case = WORD_PIECE_CASE if cased else WORD_PIECE_LOWER
    learners: dict[str, Callable[[Iterable[str], TrainingOptions, bool], LoadedTokenizer]] = {
        "bpe": lambda texts, options, bars: train_bpe(texts, options, progress=bars),
        "wordpiece": lambda texts, options, bars: train_word_piece(texts, options, type=case, progress=bars),
        "sentencepiece-unigram": lambda texts, options, bars: train_sentence_piece(texts, options),
    }
    if kind not in learners:
        raise DataError(f"unknown type {kind!r}", where="--type", fix="one of " + ", ".join(learners))
    return learners[kind]


def _tell_shortfall(
    console: Console, tally: Tally, entries: int, options: TrainingOptions, json_key: str
) -> None:
    """What was left out, and a vocabulary smaller than asked for."""
    if tally.bad_lines:
        console.print(
            f"{tally.bad_lines:,} lines without text under {json_key!r} were left out", style="yellow"
        )
    if entries < options.vocab_size:
        console.print(
            f"fewer than the {options.vocab_size:,} entries asked for: nothing else occurs often enough",
            style="yellow",
        )


def _trained(
    tokenizer: LoadedTokenizer, tally: Tally, files: Sequence[Path], seconds: float
) -> dict[str, str]:
    return {
        "text": f"{tally.bytes / 1e6:,.1f} MB in {tally.documents:,} documents",
        "vocabulary": f"{tokenizer.vocab_size:,} entries",
        "time": f"{seconds:.1f} s",
        "written": ", ".join(str(path) for path in files),
        "hash": tokenizer.hash(),
    }


@app.command()
def encode(
    text: Annotated[
        str | None, typer.Option("--text", help="the text; standard input if none is given")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", help="a UTF-8 file")] = None,
    tokenizer: TokenizerPath = None,
    tokenizer_type: TokenizerType = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    extra_ids: ExtraIds = 0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Prints the ids of a text and the vocabulary entry of each. Special tokens in the text are ordinary text.

    Example: megalith tokenizer encode --tokenizer tokenizer --text "Hello world"
    """
    from megalith.errors import DataError

    if text is not None and file is not None:
        raise DataError("both --text and --file are given", fix="give one of them")
    found = _open(tokenizer_config(tokenizer, tokenizer_type, vocab_file, merge_file, extra_ids=extra_ids))
    content = text if text is not None else _read(file)
    ids = found.encode(content)
    pieces = [found.piece(id) for id in ids]
    size = len(content.encode("utf-8"))
    if as_json:
        _print_json({"ids": ids, "tokens": pieces, "bytes": size})
        return
    _print_rows(
        {
            "ids": " ".join(map(str, ids)),
            "tokens": " ".join(pieces),
            "count": f"{len(ids):,} tokens, {size:,} bytes"
            + (f", {size / len(ids):.2f} bytes a token" if ids else ""),
        }
    )


@app.command()
def inspect(
    tokenizer: Annotated[Path | None, typer.Argument(help="a tokenizer.json, or a folder with one")] = None,
    tokenizer_type: TokenizerType = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    extra_ids: ExtraIds = 0,
    longest: Annotated[int, typer.Option("--longest", min=0, help="how many of the longest entries")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Shows a tokenizer's type, vocabulary size, special tokens, hash, and longest entries.

    Example: megalith tokenizer inspect tokenizer, or: … inspect --vocab-file vocab.json --merge-file merges.txt
    """
    found = _open(tokenizer_config(tokenizer, tokenizer_type, vocab_file, merge_file, extra_ids=extra_ids))
    special = {role: [found.piece(id), id] for role, id in found.special.items()}
    ids = sorted(found.vocabulary.values(), key=lambda id: (-len(found.piece(id)), id))[:longest]
    summary: dict[str, Any] = {
        "type": found.type,
        "vocab_size": found.vocab_size,
        "entries": len(found.vocabulary),
        "special_tokens": special,
        "sentinels": list(found.sentinels),
        "hash": found.hash(),
        "longest": [[id, found.piece(id), found.decode([id])] for id in ids],
    }
    if as_json:
        _print_json(summary)
        return
    names = [f"{role} = {token} ({id})" for role, (token, id) in special.items()]
    rows = {
        "type": found.type,
        "vocabulary size": f"{found.vocab_size:,}",
        "special tokens": ", ".join(names) or "none",
        "sentinels": _sentinels(found.sentinels),
        "hash": found.hash(),
    }
    _print_rows({name: text for name, text in rows.items() if text})
    if ids:
        _print_table(
            ("id", "longest entries", "as text"), [(str(i), p, repr(t)) for i, p, t in summary["longest"]]
        )


def _sentinels(ids: tuple[int, ...]) -> str:
    """T5's, first and last."""
    if not ids:
        return ""
    return f"{len(ids)}: <extra_id_0> ({ids[0]}) to <extra_id_{len(ids) - 1}> ({ids[-1]})"


def _open(config: TokenizerFiles | None) -> LoadedTokenizer:
    from megalith.cli.hub import fetch_vocabulary
    from megalith.errors import DataError
    from megalith.tokenizers.load import load_tokenizer

    if config is None:
        raise DataError(
            "no tokenizer is named",
            fix="give --tokenizer FOLDER, or --vocab-file vocab.json --merge-file merges.txt",
        )
    fetch_vocabulary(config)
    return load_tokenizer(config)


def _read(file: Path | None) -> str:
    import sys

    from megalith.errors import DataError

    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(file), fix="check the path") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = "standard input" if file is None else str(file)
        raise DataError(f"byte {error.start} is not UTF-8", where=where, fix="convert it to UTF-8") from None


def _print_rows(rows: dict[str, str]) -> None:
    from megalith.cli.output import print_rows

    print_rows(rows)


def _print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from megalith.cli.output import print_table

    print_table(head, rows)


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))
