"""`megalith pretrain gpt` up to the point where training begins, and `megalith explain`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml

from megalith.cli.main import main
from megalith.config.compose import compose
from megalith.tasks.pretrain_config import PretrainGPTConfig


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def go(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return go


def test_without_data_there_is_one_problem(run):
    code, _, err = run("pretrain", "gpt")
    assert code == 2
    assert err.startswith("✗ model.data.data_prefix")


def test_a_misspelt_key_a_wrong_type_and_an_impossible_combination_at_once(run):
    code, out, err = run(
        "pretrain",
        "gpt",
        "model.hiden_size=3",
        "model.optim.lr=fast",
        "model.num_attention_heads=7",
        "model.data.data_prefix=x",
    )
    assert (code, out) == (2, "")
    assert "3 problems in the configuration" in err
    assert "model.hiden_size (command line): is not a key\n      → did you mean model.hidden_size?" in err
    assert 'model.optim.lr (command line): expected a number of at least 0, got the text "fast"' in err
    assert "768 does not divide into 7 heads" in err


def test_print_config_is_a_configuration_again(run, tmp_path):
    code, out, err = run(
        "pretrain",
        "gpt",
        "--print-config",
        "model.data.data_prefix=x",
        "model.preset=gpt-nano",
        "trainer.gpus=1",
    )
    assert code == 0
    assert "! trainer.gpus is called trainer.devices here" in err
    (tmp_path / "printed.yaml").write_text(out, encoding="utf-8")
    printed = compose(PretrainGPTConfig, config_file=tmp_path / "printed.yaml")
    assert printed.config.model.num_layers == 3
    assert printed.notices == []


def test_derived_numbers_are_comments_beneath(run):
    _, out, _ = run(
        "pretrain", "gpt", "--print-config", "--derived", "model.data.data_prefix=x", "model.vocab_size=50257"
    )
    assert yaml.safe_load(out)["model"]["vocab_size"] == 50257
    assert "#   padded vocabulary" in out
    assert "50,304" in out


def test_print_config_shows_a_wrong_configuration_and_says_so(run):
    code, out, err = run("pretrain", "gpt", "--print-config", "model.hidden_size=wide")
    assert code == 2
    assert yaml.safe_load(out)["model"]["hidden_size"] == "wide"
    assert "model.hidden_size (command line): expected a whole number" in err


def test_config_files_and_folders(run, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [megatron_gpt_config]\nname: mine\nmodel: {data: {data_prefix: x}}\n"
    )
    for where in (
        ["--config", "mine.yaml"],
        ["--config-path", ".", "--config-name", "mine"],
        ["--config-path=.", "--config-name=mine.yaml"],
    ):
        code, out, _ = run("pretrain", "gpt", "--print-config", *where)
        assert code == 0
        assert yaml.safe_load(out)["name"] == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "none.yaml"], "no such file"),
        (["--config-name", "megatron_gtp_config"], "did you mean megatron_gpt_config?"),
        (["--config", "list.yaml"], "holds a list"),
        (["--config", "bytes.yaml"], "is not UTF-8"),
        (["--config", "twice.yaml"], "twice.yaml:2: a is written twice"),
        (["model"], "is not key=value"),
        ([""], "an empty argument"),
        (["model=3"], "is a section"),
        (["~model.optim.lrr"], "did you mean ~model.optim.lr?"),
    ],
)
def test_what_cannot_be_read(run, tmp_path, arguments, said):
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\n")
    (tmp_path / "twice.yaml").write_text("a: 1\na: 2\n")
    code, _, err = run("pretrain", "gpt", *arguments)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


def test_explain(run):
    code, out, _ = run("explain", "model.hidden_size", "model.preset=gpt2-345m")
    assert code == 0
    assert "Width of the residual stream." in out
    assert "1024   (from: model.preset=gpt2-345m)" in out
    assert run("explain", "hiden_size")[0] == 2
    assert "Did you mean model.hidden_size or" in run("explain", "hiden_size")[1]
    assert "persist_layer_norm is accepted without effect" in run("explain", "persist_layer_norm")[1]
    assert "exp_manager." in run("explain")[1]
    two = run("explain", "trainer", "model.optim")[1]
    assert "log_every_n_steps" in two
    assert "weight_decay" in two


def test_explaining_and_printing_import_no_torch(tmp_path):
    code = (
        "import sys\nfrom megalith.cli.main import main\n"
        "for words in (['explain', 'model'], ['pretrain', 'gpt', 'model=3']):\n"
        "    try:\n        main(words)\n    except SystemExit:\n        pass\n"
        "print([m for m in ('torch', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ}
    )
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


@pytest.mark.parametrize("key", ["data_prefix", "train_data_path"])
def test_token_files_that_are_not_there_are_an_error_before_torch_is_imported(tmp_path, key):
    code = (
        "import sys\nfrom megalith.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as stop: print(stop.code, 'torch' in sys.modules)\n"
    )
    command = [
        "pretrain",
        "gpt",
        f"model.data.{key}=nowhere",
        "model.preset=gpt-nano",
        "model.vocab_size=300",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "2 False\n", done.stderr
    assert "✗ nowhere: no such token files" in done.stderr


@pytest.mark.parametrize("family", ["bert", "t5", "bart"])
def test_each_family_prints_its_configuration_and_numbers(run, tmp_path, family):
    given = ["model.data.data_prefix=x", "model.vocab_size=29096", f"model.preset={family}-base"]
    given[2] = "model.preset=bert-110m" if family == "bert" else given[2]
    code, out, _ = run("pretrain", family, "--print-config", "--derived", *given)
    assert code == 0
    assert f"name: megatron_{family}" in out
    assert "#   FLOPs a token" in out
    (tmp_path / "mine.yaml").write_text(out, encoding="utf-8")
    code, out, _ = run("explain", "model.data.masked_lm_prob", "--config", str(tmp_path / "mine.yaml"))
    assert (code, "0.15" in out) == (0, True)


def test_nemos_words_of_a_t5(run):
    more = ["model.seq_length=256", "model.encoder_arch=transformer", "model.data.data_prefix=x"]
    code, out, err = run("pretrain", "t5", "--print-config", *more)
    assert code == 0
    assert yaml.safe_load(out)["model"]["encoder_seq_length"] == 256
    assert "model.seq_length is called model.encoder_seq_length here" in err
    code, _, err = run("pretrain", "t5", "model.decoder_arch=retro", "model.data.data_prefix=x")
    assert code == 2
    assert "both sides are transformers" in err
