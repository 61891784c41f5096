"""A published name stands where a checkpoint or a tokenizer's files could: a tiny Megatron release, fetched and computed with."""

from __future__ import annotations

import io
import shutil
import zipfile
from dataclasses import replace

import pytest
import torch

from megalith.checkpoint.foreign import find
from megalith.errors import CheckpointError, DataError
from megalith.generate.loading import load_model
from megalith.hub.obtain import obtain_vocabulary
from megalith.tokenizers.config import TokenizerConfig
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.names import TokenizerFiles
from megalith.tokenizers.train import TrainingOptions, train_bpe, write_trained
from tests.hub import published

TEXT = ["the cat sat on the mat and the dog sat on the cat"] * 20


@pytest.fixture
def release(mirror, tmp_path, monkeypatch):
    """The mirror has a tokenizer's two files as `words`, and as `tiny` a model whose file says nothing of itself."""
    transformers = pytest.importorskip("transformers")
    from tests.golden.megatron_files import Layout, write
    from tests.golden.tiny import scattered
    from tests.golden.whole import from_gpt2

    trained = tmp_path / "trained"
    write_trained(train_bpe(TEXT, TrainingOptions(270, 1, ("<|endoftext|>",))), trained)
    words = {name: (trained / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    config = transformers.GPT2Config(
        vocab_size=270, n_positions=24, n_embd=32, n_layer=2, n_head=8, activation_function="gelu_new"
    )
    model = scattered(transformers.GPT2LMHeadModel(config))
    write(
        tmp_path / "root",
        from_gpt2(model),
        Layout(version=None, args="absent", place="release", tree="V1"),
        {},
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for path in sorted((tmp_path / "root").rglob("*")):
            file.write(path, path.relative_to(tmp_path / "root"))
    mirror.files |= {f"/words/{name}": content for name, content in words.items()}
    mirror.files["/tiny/tiny_v0.zip"] = buffer.getvalue()
    files = tuple(published.file(name, content, known=True) for name, content in words.items())
    entries = (published.TINY, replace(published.VOCABULARY, files=files))
    monkeypatch.setattr("megalith.hub.catalogue.ENTRIES", entries)
    return model


def test_a_checkpoint_by_its_name(release):
    loaded = load_model("tiny")
    assert loaded.tokenizer.type == "GPT2BPETokenizer"
    assert loaded.model.config.vocab_size == loaded.tokenizer.vocab_size == 270
    ids = torch.tensor([loaded.tokenizer.encode("the cat sat on the dog")])
    with torch.no_grad():
        ours, theirs = loaded.model.logits(loaded.model(ids)), release(ids).logits
    assert (ours[..., :270] - theirs).abs().max() < 1e-10
    assert loaded.model.config.num_attention_heads == 8  # the catalogue's: neither file nor shapes say it
    assert find("tiny_by_alias").folder == loaded.folder


def test_a_name_that_is_nearly_one(release, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        find("tinny")
    assert caught.value.problem.fix == "did you mean tiny?"
    with pytest.raises(CheckpointError, match="is a vocabulary, not a model"):
        find("words")


SOURCES = [
    "words",
    TokenizerFiles(type="words-by-alias"),
    TokenizerFiles(library="huggingface", type="words"),
    TokenizerFiles(model="tiny"),
    TokenizerConfig(file="words"),
]


@pytest.mark.parametrize("source", SOURCES, ids=["path", "type", "library", "model", "config"])
def test_a_tokenizer_by_its_name(release, source):
    with pytest.raises(DataError, match="the vocabulary words is not on this machine"):
        load_tokenizer(source)
    obtain_vocabulary("words")
    assert load_tokenizer(source).vocab_size == 270


def test_files_win_over_a_name(release, tmp_path, monkeypatch):
    trained = tmp_path / "trained"
    files = {"vocab_file": str(trained / "vocab.json"), "merge_file": str(trained / "merges.txt")}
    assert load_tokenizer(TokenizerFiles(type="tiny", **files)).vocab_size == 270
    monkeypatch.chdir(tmp_path)
    trained.rename(tmp_path / "words")
    assert load_tokenizer("words").vocab_size == 270


def test_sentinels_and_roles_go_along(release):
    obtain_vocabulary("words")
    source = TokenizerFiles(type="words", num_sentinel_tokens=3, special_tokens={"pad": "<|endoftext|>"})
    loaded = load_tokenizer(source)
    assert (len(loaded.sentinels), loaded.special["pad"]) == (3, loaded.special["eod"])


@pytest.mark.parametrize(
    ("name", "place", "ids"),
    [
        ("megatron-bert-uncased", "bert-large-uncased/vocab.txt", [7592, 2088]),
        ("megatron-bert-cased", "bert-large-cased/vocab.txt", [8667, 1362]),
    ],
)
def test_the_real_vocabularies_put_there_by_hand(home, real_data, monkeypatch, name, place, ids):
    monkeypatch.setenv("MEGALITH_OFFLINE", "1")
    case = name.rpartition("-")[2]
    target = home / "hub" / place
    target.parent.mkdir(parents=True)
    shutil.copyfile(real_data("bert-vocab") / f"bert-base-{case}-vocab.txt", target)
    obtain_vocabulary(name)
    assert load_tokenizer(TokenizerConfig(type=name)).encode("Hello world") == ids
