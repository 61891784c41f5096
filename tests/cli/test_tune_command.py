"""`megalith tune`, `prompt-tune` and `finetune`: help, what they print, and how a mistake ends."""

from __future__ import annotations

import pytest

from megalith.cli.main import main
from tests.tasks.tuning import make_base, overrides, prompts


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    "command",
    [["tune", "soft-prompt"], ["tune", "p-tuning"], ["tune", "lora"], ["prompt-tune"], ["finetune", "gpt"]],
)
def test_help_has_an_example(command, capsys):
    assert call(*command, "--help") == 0
    said = capsys.readouterr().out
    assert f"Example: megalith {' '.join(command)} restore_from_path=" in said
    assert "--show-batch" in said


def test_a_batch_is_shown_and_nothing_written(base, tmp_path, capsys):
    asked = overrides(base, tmp_path / "run", *prompts("A"), "model.calc_loss_on_answer_only=true")
    assert call("prompt-tune", *asked, "--show-batch", "2") == 0
    said = capsys.readouterr().out
    assert "step 2 (0 is the first) reads samples 8 to 11" in said
    assert said.count("⟨A: 4 virtual tokens⟩⟦w") == 4
    assert "a.jsonl:" in said
    assert "targets count" in said
    assert not (tmp_path / "run").exists()


def test_a_batch_of_two_sides(tmp_path, capsys):
    base = make_base(tmp_path / "t5", "t5")
    assert call("tune", "lora", *overrides(base, tmp_path / "run"), "--show-batch", "0") == 0
    said = capsys.readouterr().out
    assert "encoder  ⟦w" in said
    assert "decoder  ⟦[BOS]⟧" in said


def test_the_configuration_is_printed_with_the_models_own_architecture(base, tmp_path, capsys):
    asked = overrides(base, tmp_path / "run", *prompts("A"))
    assert call("tune", "soft-prompt", *asked, "--print-config", "--derived") == 0
    printed = capsys.readouterr().out
    for line in (
        "  hidden_size: 16\n",
        "  num_layers: 2\n",
        "  encoder_seq_length: 32\n",
        "  tuning_method: soft-prompt\n",
    ):
        assert line in printed
    assert "rows are as long as they are" in printed
    assert "FLOPs" not in printed.split("# derived")[1], "samples are shorter than the model reaches"
    (tmp_path / "mine.yaml").write_text(printed)
    assert (
        call("tune", "soft-prompt", "--config", str(tmp_path / "mine.yaml"), "--print-config", "--derived")
        == 0
    )
    assert capsys.readouterr().out == printed


def test_a_mistake_is_one_message_and_code_2(base, tmp_path, capsys):
    asked = overrides(base, tmp_path / "run", *prompts("A"))
    assert call("prompt-tune", *asked, "model.num_promt_tokens=3") == 2
    assert "num_prompt_tokens" in capsys.readouterr().err
    assert call("prompt-tune", *asked, "model.data.train_ds=gone.jsonl") == 2
    assert "gone.jsonl: no such file" in capsys.readouterr().err
    assert call("prompt-tune", "model.new_prompt_tags=[A]") == 2
    said = capsys.readouterr().err
    assert "restore_from_path" in said
    assert "train_ds" in said, "all problems at once"
    assert call("finetune", "gpt", *asked) == 2
    assert "has no prompts" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_keys_of_tuning_are_explained(capsys):
    assert call("explain", "model.num_prompt_tokens") == 0
    assert "Virtual tokens of each new prompt" in capsys.readouterr().out
    assert call("explain", "lora.rank", "--config-name", "megatron_gpt_peft_tuning_config") == 0
    assert "32" in capsys.readouterr().out
