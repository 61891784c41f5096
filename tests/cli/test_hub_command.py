"""`megalith hub list|download|path`: what is printed, exit codes, and nothing asked of the network but by download."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from megalith.cli.main import main
from megalith.hub import catalogue
from megalith.hub.store import HOME, MIRROR, OFFLINE
from tests.hub import published
from tests.hub.server import Site, serving


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in (*OFFLINE, MIRROR, "http_proxy", "HTTP_PROXY", "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def mirror(home, monkeypatch):
    with serving(Site(files=dict(published.MIRRORED))) as site:
        monkeypatch.setattr(catalogue, "ENTRIES", published.ENTRIES)
        monkeypatch.setenv(MIRROR, site.url)
        yield site


@pytest.fixture
def run(capsys):
    """A function: arguments → (exit code, stdout, stderr)."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        return stop.value.code or 0, *capsys.readouterr()

    return call


def test_the_catalogue_as_a_table(home, run):
    code, out, err = run("hub", "list")
    rows = [line.split() for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert rows[0] == ["name", "kind", "size", "here", "also", "called", "what", "it", "is"]
    assert ["gpt2", "vocabulary", "1.5", "MB", "no", "GPT-2's", "byte-level", "BPE"] in rows
    assert {"megatron-bert-345m-uncased", "biomegatron-bert-345m-cased"} <= {row[0] for row in rows}
    assert not home.exists()


def test_the_catalogue_as_json(mirror, home, run):
    run("hub", "download", "words")
    by_name = {entry["name"]: entry for entry in json.loads(run("hub", "list", "--json")[1])}
    words, tiny = by_name["words"], by_name["tiny"]
    size = len(published.WORDS) + len(published.MERGES)
    assert (words["bytes"], words["bytes_on_disk"], words["path"]) == (
        size,
        size,
        str(home / "hub" / "words"),
    )
    assert (tiny["bytes"], tiny["bytes_on_disk"], tiny["path"]) == (None, None, None)
    assert tiny["files"][0]["url"] == f"{mirror.url}/tiny/tiny_v0.zip"
    assert tiny["files"][0]["publisher"] == "https://publisher.example/tiny_v0.zip"
    assert tiny["config"] == {"num_attention_heads": 8}
    assert run("hub", "list")[1].splitlines()[3].split() == [
        "words",
        "vocabulary",
        "0.1",
        "MB",
        "yes",
        "words-by-alias",
    ]


def test_download_and_path(mirror, home, tmp_path, run):
    code, out, err = run("hub", "path", "tiny")
    assert (code, out) == (2, "")
    assert "tiny is not on this machine" in err
    assert "megalith hub download tiny" in err
    code, out, err = run("hub", "download", "tiny_by_alias")
    assert (code, out) == (0, f"{home / 'hub' / 'tiny'}\n")
    assert "no checksum was published" in err
    asked = len(mirror.asked)
    assert run("hub", "path", "tiny") == (0, f"{home / 'hub' / 'tiny'}\n", "")
    assert run("hub", "download", "tiny")[:2] == (0, f"{home / 'hub' / 'tiny'}\n")
    assert len(mirror.asked) == asked
    there = tmp_path / "there"
    assert run("hub", "download", "single", "--to", str(there))[1] == f"{there / 'single' / 'M.pt'}\n"
    assert run("hub", "path", "single", "--to", str(there))[0] == 0
    assert run("hub", "path", "single")[0] == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [("gtp2", "did you mean gpt2?"), ("nothing-like-it", "megalith hub list shows all names")],
)
def test_names_that_are_none(home, run, name, words):
    code, _, err = run("hub", "download", name)
    assert (code, f"nothing is published as '{name}'" in err, words in err) == (2, True, True)


def test_a_wrong_checksum(mirror, home, run):
    mirror.files["/words/merges.txt"] = b"changed"
    code, out, err = run("hub", "download", "words")
    assert (code, out) == (2, "")
    assert "what came was removed" in err
    assert "Traceback" not in err


def test_offline(mirror, run, monkeypatch):
    monkeypatch.setenv("MEGALITH_OFFLINE", "1")
    code, _, err = run("hub", "download", "tiny")
    assert code == 2
    assert f"fetch {mirror.url}/tiny/tiny_v0.zip as" in err
    assert mirror.asked == []


@pytest.fixture
def trained(mirror, tmp_path, monkeypatch):
    """The mirror's `words` are the files of a tokenizer."""
    from megalith.tokenizers.train import TrainingOptions, train_bpe, write_trained

    write_trained(
        train_bpe(["a b ab ba"] * 9, TrainingOptions(260, 1, ("<|endoftext|>",))), tmp_path / "made"
    )
    contents = {name: (tmp_path / "made" / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    files = tuple(published.file(name, content, known=True) for name, content in contents.items())
    mirror.files |= {f"/words/{name}": content for name, content in contents.items()}
    monkeypatch.setattr(catalogue, "ENTRIES", (replace(published.VOCABULARY, files=files),))


BOTH = ["/words/vocab.json", "/words/merges.txt"]


def test_tokenizer_fetches_the_vocabulary_that_it_is_named(trained, mirror, run):
    for _ in range(2):
        code, out, err = run("tokenizer", "encode", "--tokenizer", "words", "--text", "ab ba", "--json")
        assert code == 0, err
        assert json.loads(out)["bytes"] == 5
    assert [path for path, _ in mirror.asked] == BOTH


def test_preprocess_and_pretrain_do_too(trained, mirror, home, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text('{"text": "ab ba"}\n')
    arguments = ["--input", "text.jsonl", "--output-prefix", "out", "--append-eod"]
    code, _, err = run("data", "preprocess", *arguments, "--tokenizer-type", "words-by-alias")
    assert code == 0, err
    assert [path for path, _ in mirror.asked] == BOTH
    shutil.rmtree(home)
    monkeypatch.setenv("MEGALITH_OFFLINE", "1")
    keys = ["model.preset=gpt-nano", "model.tokenizer.type=words", "trainer.max_steps=1"]
    for more in ([], ["--show-batch", "0"]):
        command = [
            "--config-name",
            "megatron_gpt_config",
            *keys,
            "model.data.data_prefix=[out_text_document]",
        ]
        code, _, err = run("pretrain", "gpt", *command, *more)
        assert (code, "words is not on this machine, and MEGALITH_OFFLINE" in err) == (2, True), err
