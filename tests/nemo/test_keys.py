"""The page about NeMo's Python says of every key what the code does; the flags of the original documents are answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalith.cli.main import DEAD_FLAGS, main
from megalith.config.compose import compose
from megalith.errors import ConfigError
from megalith.nemo.keys import rows, tables
from megalith.tasks.pretrain_config import PretrainBertConfig
from megalith.training.lightning_keys import LIGHTNING_KEYS

PAGE = Path(__file__).parents[2] / "docs/nemo_python.md"
MARK = "held by tests/nemo/test_keys.py -->\n\n"


def test_the_page_has_the_codes_own_tables():
    _, mark, written = PAGE.read_text("utf-8").partition(MARK)
    assert mark
    assert written == tables(), "write megalith.nemo.keys.tables() behind the mark of docs/nemo_python.md"


def test_every_table_is_in_it():
    found = {name: action for action, name, _ in rows()}
    assert {f"trainer.{name}": key.action for name, key in LIGHTNING_KEYS.items()}.items() <= found.items()
    assert found["model.fp8"] == "refused"
    assert found["model.megatron_amp_O2"] == "ignored"
    assert found["exp_manager.checkpoint_callback_params.async_save"] == "renamed"
    assert found["model.tokenizer.tokenizer_name"] == "renamed"


@pytest.mark.parametrize(
    "key", ["config_file", "lm_checkpoint", "nemo_file", "pretrained_model_name", "config.hidden_size"]
)
def test_keys_of_the_encoder_of_tasks(key):
    with pytest.raises(ConfigError, match=r"model\.init_from here"):
        compose(PretrainBertConfig, overrides=[f"model.language_model.{key}=x", "model.data.data_prefix=x"])


@pytest.mark.parametrize("flag", sorted(DEAD_FLAGS))
def test_dead_flags(flag, capsys):
    command = ["pretrain", "bert"] if "bert" in flag else ["generate"]
    with pytest.raises(SystemExit) as stop:
        main([*command, flag, "x"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"there is no option {flag}: it was NeMo's" in said
    assert DEAD_FLAGS[flag].split()[0] in said
