"""Composing the small tree from a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megalith.config.compose import Composed, compose
from megalith.errors import ConfigError
from tests.config.sections import Root

BASE = """\
name: toy
trainer:
  max_steps: 1e3
model:
  width: 768
  data:
    prefix: [a]
"""


@pytest.fixture
def composed(tmp_path: Path) -> Callable[..., Composed[Root]]:
    """text, overrides → the composed configuration."""

    def run(*overrides: str, text: str = BASE) -> Composed[Root]:
        file = tmp_path / "toy.yaml"
        file.write_text(text, encoding="utf-8")
        return compose(Root, config_file=file, overrides=overrides)

    return run


@pytest.fixture
def problems(composed) -> Callable[..., dict[str, tuple[str, str]]]:
    """text, overrides → the problems of the refused configuration: key → (what, fix)."""

    def run(*overrides: str, text: str = BASE) -> dict[str, tuple[str, str]]:
        with pytest.raises(ConfigError) as refused:
            composed(*overrides, text=text)
        found = refused.value.problems
        keys = [p.where.partition(" (")[0] for p in found]
        assert len(set(keys)) == len(keys), f"a key was reported twice: {keys}"
        return {key: (p.what, p.fix) for key, p in zip(keys, found, strict=True)}

    return run
