"""`megalith data preprocess` as it is typed: Megatron's flags, exit codes, what is imported, what is printed."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys

import pytest

from megalith.cli import preprocess as command
from megalith.data.indexed.mmap import open_indexed
from megalith.errors import DataError
from tests.data.preprocessing import expected_files, json_lines, make_texts, make_tokenizer, output

TEXTS = make_texts(50)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, make_tokenizer(folder)


@pytest.fixture
def folder(tmp_path, tokenizer_folder):
    os.symlink(tokenizer_folder[0], tmp_path / "tok")
    (tmp_path / "c.jsonl").write_bytes(json_lines(TEXTS))
    return tmp_path


def megalith(folder, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "megalith", "data", "preprocess", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_megatrons_command_line(folder, tokenizer_folder):
    """The README of Megatron-DeepSpeed, its flags and its spelling."""
    done = megalith(
        folder,
        *(
            "--input",
            "c.jsonl",
            "--output-prefix",
            "out",
            "--vocab",
            "tok/vocab.json",
            "--dataset-impl",
            "mmap",
        ),
        *("--tokenizer-type", "GPT2BPETokenizer", "--merge-file", "tok/merges.txt", "--append-eod"),
        *(
            "--workers",
            "2",
            "--chunk-size",
            "25",
            "--log-interval",
            "100",
            "--partitions",
            "2",
            "--json-key",
            "text",
        ),
    )
    assert output(folder) == expected_files(tokenizer_folder[1], TEXTS, append_eod=True)
    documents = sum(map(bool, TEXTS))
    assert re.search(rf"documents +{documents} ", done.stdout)
    assert re.search(r"duplicates +\d+ ", done.stdout)
    assert "MB/s" in done.stdout
    assert "█" in done.stdout
    assert "--partitions 2 changes nothing" in done.stderr


def test_several_values_after_one_flag(folder, tokenizer_folder):
    lines = [json.dumps({"text": text, "title": "t"}) for text in TEXTS]
    (folder / "d.jsonl").write_text("\n".join(lines))
    (folder / "e.jsonl").write_text("\n".join(lines))
    megalith(
        folder,
        *("--json-keys", "title", "text", "--input", "d.jsonl", "e.jsonl", "--output-prefix=out"),
        *("--tokenizer-model", "tok"),
    )
    assert output(folder) == expected_files(tokenizer_folder[1], TEXTS * 2)
    assert len(open_indexed(folder / "out_title_document")) == 2 * len(TEXTS)


def test_flags_may_be_abbreviated_and_misspelt_ones_are_named(folder, tokenizer_folder):
    megalith(
        folder,
        "--inp",
        "c.jsonl",
        "--output-p",
        "out",
        "--vocab",
        "tok/vocab.json",
        "--merge",
        "tok/merges.txt",
    )
    assert output(folder) == expected_files(tokenizer_folder[1], TEXTS)
    done = megalith(folder, "--input", "c.jsonl", "--output-prefix", "out", "--apend-eod", code=2)
    assert "--apend-eod: there is no such flag" in done.stderr
    assert "did you mean --append-eod?" in done.stderr
    done = megalith(folder, "--inptu", "c.jsonl", code=2)  # not "--input is required"
    assert "--inptu: there is no such flag" in done.stderr
    done = megalith(folder, "--input", "c.jsonl", "--output-prefix", "out", "--workers", "two", code=2)
    assert "--workers: invalid int value: 'two'" in done.stderr


def test_typer_reaches_the_same_command(folder, tokenizer_folder, monkeypatch):
    """`main` goes there directly; through the table of commands it is the same."""
    from typer.testing import CliRunner

    from megalith.cli import data

    monkeypatch.chdir(folder)
    arguments = [
        "preprocess",
        "--input",
        "c.jsonl",
        "c.jsonl",
        "--output-prefix",
        "out",
        "--tokenizer",
        "tok",
    ]
    result = CliRunner().invoke(data.app, arguments)
    assert result.exit_code == 0, result.output
    assert output(folder) == expected_files(tokenizer_folder[1], TEXTS * 2)


def test_exit_codes_and_messages(folder):
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"no": "text"}\n')
    common = ("--output-prefix", "out", "--tokenizer", "tok")
    done = megalith(folder, "--input", "bad.jsonl", *common, code=1)
    assert "1 of 2 lines (50 %) are bad, more than 0.1 %; nothing was published" in done.stderr
    assert '\nthe first: bad.jsonl, line 2: no key \'text\': {"no": "text"}\n' in done.stderr
    assert "--max-rejected" in done.stderr
    done = megalith(folder, "--input", "bad.jsonl", *common, "--max-rejected", "0.5")
    assert "1 bad lines are in out.rejected.jsonl" in done.stderr
    assert "resumed: 1 of 1 parts" in done.stdout
    done = megalith(folder, "--input", "nothing.jsonl", *common, code=2)
    assert "nothing.jsonl: no such file" in done.stderr
    done = megalith(folder, "--input", "c.jsonl", *common, "--split-sentences", "--lang", "klingon", code=2)
    assert "--lang: no sentence splitter for 'klingon'" in done.stderr
    done = megalith(folder, "--input", "c.jsonl", *common, "--keep-newlines", code=2)
    assert "add --split-sentences" in done.stderr
    done = megalith(folder, "--input", "c.jsonl", *common, "--tokenizer-type", "NullTokenizer", code=2)
    assert "NullTokenizer is not built yet" in done.stderr
    done = megalith(folder, "--input", "c.jsonl", "--output-prefix", "out", code=2)
    assert "needs vocab_file" in done.stderr
    megalith(folder, "--output-prefix", "out", code=2)


def test_help_has_an_example(folder):
    done = megalith(folder, "--help")
    for word in ("Example", "--append-eod", "--json-keys", "--vocab", "--max-rejected", "PREFIX.parts"):
        assert word in done.stdout


def test_it_imports_little(folder):
    """Process start counts: torch alone takes 1.6 s, typer's pydantic 0.1 s."""
    script = (
        "import sys\n"
        "from megalith.cli.main import main\n"
        "try:\n"
        "    main(['data', 'preprocess', '--input', 'c.jsonl', '--output-prefix', 'out', '--tokenizer', 'tok'])\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "heavy = 'torch numba pydantic megalith.config hydra omegaconf lightning awkward transformers rich pandas scipy'.split()\n"
        "print('imported:', [name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert "imported: []" in done.stdout, done.stdout + done.stderr


def test_progress_lines_of_a_log(monkeypatch, capsys):
    from megalith.data.preprocess import report
    from megalith.data.preprocess.sources import Source
    from megalith.data.preprocess.wire import Job

    now = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    sources = [Source("a", False, "", 1_000_000, 0, ""), Source("b", False, "gzip", 1_000_000, 0, "")]
    progress = report.PlainProgress(report.Meter(sources, 0.0), log_interval=100)
    for number, (seconds, documents) in enumerate(
        [(1, 50), (2.5, 90), (3, 150), (4, 400), (10, 420), (11, 550)]
    ):
        now[0] = seconds
        job = Job(number, 0, number * 100_000, (number + 1) * 100_000, (number + 1) * 100_000, False)
        progress.update(job, documents)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "Processed 150 documents (50.0 docs/s, 0.1 MB/s), 15 %, 17 s left",
        "Processed 420 documents (42.0 docs/s, 0.1 MB/s), 25 %, 30 s left",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo terminal")
def test_a_terminal_sees_a_bar_on_a_long_run(folder, monkeypatch, capsys):
    from megalith.data.preprocess.report import Meter
    from megalith.data.preprocess.sources import find_sources
    from megalith.data.preprocess.wire import Job

    source = find_sources([str(folder / "c.jsonl")])
    bar = command._Bar(Meter(source, -10.0))
    bar.update(Job(0, 0, 0, 10, source[0].size // 2, False), 7)
    assert bar._progress is not None
    assert bar._progress.tasks[0].completed == source[0].size // 2
    bar.update(Job(1, 0, 10, 20, source[0].size, True), 9)
    assert bar._progress.finished


def test_the_bar_is_gone_before_an_error_is_told(folder, monkeypatch):
    seen = []

    def stopped(options, *, notify, show, started):
        from megalith.data.preprocess.report import Meter

        show(Meter([], started))
        raise DataError("stopped", where="x")

    monkeypatch.setattr("megalith.data.preprocess.run.preprocess", stopped)
    monkeypatch.setattr(command._Bar, "stop", lambda self: seen.append("bar stopped"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with pytest.raises(DataError):
        command.main(["--input", "c.jsonl", "--output-prefix", "out"])
    gc.enable()
    assert seen == ["bar stopped"]
