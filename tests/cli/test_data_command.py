"""`megalith data merge|inspect|verify` from the command line: what they print, exit codes, no traceback."""

import json
import subprocess
import sys

import numpy as np
import pytest

from megalith.cli.main import main
from megalith.data.indexed.builder import IndexedWriter
from megalith.data.indexed.mmap import open_indexed
from tests.data.indexed.corpus import TEXTS, make_pair, make_tokenizer


@pytest.fixture
def megalith(capsys):
    """A function: arguments → (exit code, stdout, stderr). A bug's exit code (70) or a traceback fails the test."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["data", *(str(argument) for argument in arguments)])
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        assert "bug" not in output.err
        return stop.value.code or 0, output.out, output.err

    return run


@pytest.fixture
def folder(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "parts").mkdir()
    for name in ("a", "b"):
        make_pair(tmp_path / "parts" / name, tmp_path / "tokenizer")
    return tmp_path


def test_merge_then_verify_then_inspect(megalith, folder):
    code, out, err = megalith("merge", "--input", folder / "parts", "--output-prefix", folder / "out")
    assert (code, err) == (0, "")
    assert "documents        6" in out
    code, out, err = megalith("verify", folder / "out.bin")
    assert (code, err) == (0, "")
    assert "whole, 6 documents" in out
    code, out, err = megalith("inspect", folder / "out", "--document", 3)
    assert (code, err) == (0, "")
    assert TEXTS[0] in out
    assert "a.jsonl, b.jsonl" in out


def test_several_inputs_after_one_option(megalith, folder):
    parts = folder / "parts"
    assert megalith("merge", "--input", parts / "b", parts / "a", "--output-prefix", folder / "out")[0] == 0
    assert (
        megalith("merge", "--input", parts / "b", "--input", parts / "a", "--output-prefix", folder / "two")[
            0
        ]
        == 0
    )
    assert (folder / "out.bin").read_bytes() == (folder / "two.bin").read_bytes()
    assert len(open_indexed(folder / "out")) == 6


def test_merge_refuses_another_tokenizer_until_forced(megalith, folder):
    make_tokenizer(folder / "other", 260)
    make_pair(folder / "parts" / "c", folder / "other")
    arguments = ("merge", "--input", folder / "parts", "--output-prefix", folder / "out")
    code, _, err = megalith(*arguments)
    assert code == 2
    assert "another tokenizer" in err
    code, _, err = megalith(*arguments, "--force")
    assert code == 0
    assert "note:" in err


def test_inspect_as_json(megalith, folder):
    code, out, _ = megalith("inspect", folder / "parts" / "a", "--json")
    values = json.loads(out)
    assert code == 0
    assert (values["documents"], values["samples"][1]["text"]) == (3, TEXTS[1] + "<|endoftext|>")


def test_inspect_with_another_tokenizer(megalith, folder):
    (folder / "parts" / "a.meta.json").unlink()
    code, out, err = megalith("inspect", folder / "parts" / "a", "--tokenizer", folder / "tokenizer")
    assert code == 0
    assert TEXTS[2] in out
    code, out, err = megalith("inspect", folder / "parts" / "a")
    assert TEXTS[2] not in out
    assert "no tokenizer is known" in err


def test_verify_lists_every_problem_and_exits_with_1(megalith, folder):
    path = folder / "parts" / "a.bin"
    path.write_bytes(b"\xff\xff" + path.read_bytes()[2:-2])
    code, out, _ = megalith("verify", folder / "parts" / "a")
    assert code == 1
    for words in ("truncated by 2 bytes", "outside the vocabulary", "SHA-256 differs", "the side-car says"):
        assert words in out
    code, out, _ = megalith("verify", folder / "parts" / "a", "--json")
    values = json.loads(out)
    assert (code, values["whole"], len(values["problems"])) == (1, False, 4)


def test_verify_without_side_car_says_what_it_could_not_check(megalith, folder):
    (folder / "parts" / "a.meta.json").unlink()
    code, _, err = megalith("verify", folder / "parts" / "a", "--vocab-size", 300)
    assert code == 0
    assert "no side-car" in err
    assert megalith("verify", folder / "parts" / "a", "--vocab-size", 50)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{base}/nothing"], "no such token files"),
        (["inspect", "{base}/part"], "no such token files"),
        (["inspect", "{base}/parts"], "did you mean"),
        (["inspect", "{base}/parts/a", "--document", "3"], "documents go from 0 to 2"),
        (["inspect", "{base}/parts/a", "--tokenizer", "{base}/nothing"], "no such tokenizer"),
        (["verify", "{base}/nothing"], "no such token files"),
        (["verify", "{base}/parts"], "a folder"),
        (["verify", "."], "a folder"),
        (["merge", "--output-prefix", "{base}/out"], "no input is given"),
        (["merge", "--input", "{base}/nothing", "--output-prefix", "{base}/out"], "no such token files"),
        (["merge", "--input", "{base}/tokenizer", "--output-prefix", "{base}/out"], "holds no token files"),
        (["merge", "--input", "{base}/parts", "--output-prefix", "{base}/parts/a"], "also an input"),
        (["merge", "--input", "{base}/parts", "--output-prefix", "{base}/no/out"], "no such folder"),
    ],
)
def test_mistakes_are_answered_with_exit_code_2(megalith, folder, arguments, message):
    code, _, err = megalith(*(text.format(base=folder) for text in arguments))
    assert code == 2
    assert message in err


def test_files_without_documents(megalith, tmp_path):
    IndexedWriter(tmp_path / "x", np.uint16).finish()
    assert megalith("inspect", tmp_path / "x")[0] == 0
    assert megalith("verify", tmp_path / "x")[0] == 0
    assert megalith("merge", "--input", tmp_path / "x", "--output-prefix", tmp_path / "y")[0] == 2


@pytest.mark.parametrize("command", ["merge", "inspect", "verify"])
def test_help_has_an_example(megalith, command):
    code, out, _ = megalith(command, "--help")
    assert code == 0
    assert f"megalith data {command}" in " ".join(out.split())


def test_the_list_of_commands_names_preprocess_first(megalith):
    out = megalith("--help")[1].partition("Commands")[2]
    assert out.index("preprocess") < out.index("merge") < out.index("inspect") < out.index("verify")


def test_no_torch_is_imported(folder):
    code = (
        "import sys\nfrom megalith.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'numba', 'transformers', 'lightning') if name in sys.modules])"
    )
    for arguments in (
        ["data", "verify", "parts/a"],
        ["data", "inspect", "parts/a"],
        ["data", "merge", "--input", "parts", "--output-prefix", "out"],
        ["tokenizer", "encode", "--tokenizer", "tokenizer", "--text", "x"],
    ):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]", arguments
