"""How the quickstart shows its commands. The walk itself is a test of the smoke folder's commands."""

from __future__ import annotations

import shlex

import pytest

from megalith.tools.quickstart import command_line

WORDS = [
    "pretrain",
    "gpt",
    "--config-name",
    "gpt_quickstart",
    "model.data.data_prefix=[a folder/x]",
    "trainer.max_steps=8",
]


@pytest.mark.parametrize("width", [20, 40, 60, 200])
def test_a_command_that_is_too_long_goes_on_as_a_shell_reads_it(width):
    text = command_line(WORDS, width)
    assert shlex.split(text.replace("\\\n", " ")) == ["megalith", *WORDS]
    longest = max(len(shlex.quote(word)) for word in WORDS)
    assert all(len(line) <= max(width, longest + 6) for line in text.splitlines())
    assert ("\\\n" in text) is (width < 120)


def test_a_flag_stays_with_its_value():
    lines = command_line(WORDS, 30).splitlines()
    assert any("--config-name gpt_quickstart" in line for line in lines)
