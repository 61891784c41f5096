"""Tokenizers go into archives in the files that NeMo reads, and come out of them the same."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.foreign import open_foreign
from megalith.checkpoint.formats.nemo_tokenizer import as_files
from megalith.tokenizers.base import Tokenizer
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.names import TokenizerFiles
from tests.checkpoint.nemo_archives import nemo_archive

TEXTS = ["The quick brown fox", " naïve café — 数学", "w1 w2\n\nw3"]
PAIRS = ["Ġ t", "h e", "Ġt he"]


def gpt2_files(folder: Path) -> tuple[Path, Path]:
    """GPT-2's 256 bytes, a few merges, and the end of a text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(c) for c in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*letters, *("".join(pair.split()) for pair in PAIRS), "<|endoftext|>"]
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    merges.write_text("#version: 0.2\n" + "\n".join(PAIRS) + "\n", "utf-8")
    return vocab, merges


def word_piece(folder: Path) -> Path:
    path = folder / "vocab.txt"
    path.write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "quick", "##s", "fox", "w"]) + "\n"
    )
    return path


def marked(keys: dict[str, object], files: dict[str, Path]) -> tuple[dict[str, object], dict[str, bytes]]:
    """Keys and artifacts as NeMo has them: 32 hexadecimal digits before each name."""
    named = {key: f"{i:032x}_{path.name}" for i, (key, path) in enumerate(files.items())}
    artifacts = {name: files[key].read_bytes() for key, name in named.items()}
    return {**keys, **{key: f"nemo:{name}" for key, name in named.items()}}, artifacts


def same(one: Tokenizer, other: Tokenizer) -> bool:
    return all(one.encode(text) == other.encode(text) for text in TEXTS)


def test_gpt2_in_and_out(tmp_path):
    vocab, merges = gpt2_files(tmp_path)
    original = load_tokenizer(TokenizerFiles(vocab_file=str(vocab), merge_file=str(merges)))
    keys, artifacts = marked(
        {"library": "megatron", "type": "GPT2BPETokenizer", "model": None},
        {"vocab_file": vocab, "merge_file": merges},
    )
    weights = io.BytesIO()
    state = torch.load(io.BytesIO(plain_weights(tmp_path)))
    word = "model.language_model.embedding.word_embeddings.weight"
    torch.save({**state, word: torch.randn(384, 16)}, weights)
    source = nemo_archive(
        tmp_path / "a.nemo", keys={"tokenizer": keys}, artifacts=artifacts, weights=weights.getvalue()
    )
    foreign = open_foreign(source)
    assert foreign.tokenizer is not None
    assert same(load_tokenizer(foreign.tokenizer), original)
    assert foreign.config.vocab_size == 260
    assert foreign.provenance["vocabulary"] == "260 by its own tokenizer, 384 rows stored"
    done = convert(source, tmp_path / "b.nemo", Plan("nemo", untrained=True))
    assert not done.notices
    again = open_foreign(tmp_path / "b.nemo")
    assert again.tokenizer is not None
    assert same(load_tokenizer(again.tokenizer), original)
    with tarfile.open(tmp_path / "b.nemo") as archive:
        names = archive.getnames()
        said = yaml.safe_load(archive.extractfile("./model_config.yaml"))["tokenizer"]
    assert (said["library"], said["type"]) == ("megatron", "GPT2BPETokenizer")
    for key, name in (("vocab_file", "vocab.json"), ("merge_file", "merges.txt")):
        assert said[key].startswith("nemo:")
        hashed = said[key].removeprefix("nemo:")
        assert f"./{hashed}" in names
        assert (len(hashed.partition("_")[0]), hashed.partition("_")[2]) == (32, name)


def plain_weights(folder: Path) -> bytes:
    with tarfile.open(nemo_archive(folder / "plain.nemo")) as archive:
        return archive.extractfile("./model_weights.ckpt").read()


@pytest.mark.parametrize("name", ["megatron-bert-345m-uncased", "bert-large-uncased"])
def test_word_pieces_by_the_name_of_a_model(tmp_path, name):
    keys, artifacts = marked({"tokenizer_name": name}, {"vocab_file": word_piece(tmp_path)})
    foreign = open_foreign(nemo_archive(tmp_path / "a.nemo", keys={"tokenizer": keys}, artifacts=artifacts))
    assert foreign.tokenizer is not None
    loaded = load_tokenizer(foreign.tokenizer)
    assert loaded.encode("The quicks fox") == [5, 6, 7, 8]
    written, files, notices = as_files(foreign.tokenizer, loaded)
    assert (written["type"], list(files), notices) == ("BertWordPieceLowerCase", ["vocab.txt"], ())


def test_one_that_cannot_be_read_is_said(tmp_path):
    keys, artifacts = marked({"library": "yttm"}, {"model": word_piece(tmp_path)})
    foreign = open_foreign(nemo_archive(tmp_path / "a.nemo", keys={"tokenizer": keys}, artifacts=artifacts))
    assert foreign.tokenizer is None
    assert any("its tokenizer is left out" in notice for notice in foreign.notices)


def test_one_that_nemo_has_not_is_kept_for_ourselves(tmp_path):
    vocab, merges = gpt2_files(tmp_path)
    definition = load_tokenizer(TokenizerFiles(vocab_file=str(vocab), merge_file=str(merges))).definition
    spaced = {**definition, "normalizer": {"type": "Lowercase"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spaced))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    keys, files, (said,) = as_files(tmp_path / "tokenizer.json", loaded)
    assert set(keys.values()) == {"megatron", None}
    assert "NeMo would make other ids of its files" in said
    members = {f"0a1b_{name}": content for name, content in files.items()}
    archive = nemo_archive(tmp_path / "a.nemo", keys={"tokenizer": keys}, artifacts=members)
    back = open_foreign(archive).tokenizer
    assert back is not None
    assert load_tokenizer(back).hash() == loaded.hash()
