"""What a person says of a Megatron checkpoint that does not say it itself: a file of arguments, a tokenizer, a size.

Knows JSON and YAML; not what arguments mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megalith.errors import CheckpointError


@dataclass(frozen=True)
class Told:
    """What a person says of a checkpoint that does not say it itself."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    vocab_size: int | None = None
    tokenizer: Path | None = None

    @classmethod
    def of(
        cls,
        config_file: str | Path | Mapping[str, Any] | None,
        vocab_size: int | None,
        tokenizer: str | Path | None,
    ) -> Told:
        """From a file (JSON, YAML) or the values themselves."""
        named = None if tokenizer is None else Path(tokenizer).expanduser()
        if isinstance(config_file, str | Path):
            path = Path(config_file)
            return cls(read_config_file(path), path.name, vocab_size, named)
        return cls(dict(config_file or {}), "the model's keys", vocab_size, named)


def read_config_file(path: Path) -> dict[str, Any]:
    """Arguments from JSON or YAML; hyphens are underscores. Errors: `CheckpointError` where it is neither."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror or error})", where=str(path)) from None
    except (ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"is neither JSON nor YAML ({error})", where=str(path)) from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict):
        raise CheckpointError("does not hold keys and values", where=str(path), fix="num-attention-heads: 16")
    return dict(_plain(content))


def _plain(content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        yield str(key).lstrip("-").replace("-", "_"), value
