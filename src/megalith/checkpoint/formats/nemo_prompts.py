"""Soft prompts in NeMo's archives (1.6 to 1.8): for each tag a matrix of virtual tokens and one of their positions.

    model.language_model.prompt_table.prompt_table.<TAG>.prompt_embeddings.weight      (P, D)
    model.language_model.prompt_table.prompt_table.<TAG>.position_embeddings.weight    (P, D)
    model_config.yaml: use_soft_prompts, num_prompt_tokens (P of all), existing_prompt_tags [[TAG, id from 1], …]

Every tensor rank has all of them. Knows names and keys; not what a prompt does.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalith.checkpoint.formats.nemo_archive import Archive, open_archive
from megalith.checkpoint.formats.nemo_config import CONFIG, OLDEST, read_model_config
from megalith.checkpoint.formats.nemo_read import open_member, places_of
from megalith.checkpoint.lazy import Lazy
from megalith.errors import CheckpointError

TOKENS, POSITIONS = "prompt_embeddings.weight", "position_embeddings.weight"
TABLE = "model.language_model.prompt_table.prompt_table"
ROWS = "position_embedding.weight"
"""Our name of the model's own positions."""
_NAME = re.compile(
    rf"(?:^|\.)prompt_table\.prompt_table\.(.+)\.({re.escape(TOKENS)}|{re.escape(POSITIONS)})$"
)

Pair = tuple[torch.Tensor, torch.Tensor | None]
"""Tokens and positions (P, D); None: the model's positions 0 … P−1."""


@dataclass(frozen=True)
class SoftPrompts:
    """`tables` by tag, in the order of their ids."""

    tables: Mapping[str, Pair] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tables)


def prompts_of(path: Path) -> SoftPrompts:
    """Those of an archive or an unpacked folder; of tensor ranks the first one's. Errors: `CheckpointError` for damage."""
    archive = open_archive(path)
    member = places_of(archive).get((0, 0))
    state = {} if member is None else open_member(archive, member)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in state.items() if isinstance(state, dict) else ():
        match = _NAME.search(str(name))
        if match is not None and hasattr(value, "read"):
            halves.setdefault(match[1], {})[match[2]] = value.read()
    lacking = sorted(tag for tag, parts in halves.items() if len(parts) < 2)
    if lacking:
        raise CheckpointError(
            f"of the prompts of {', '.join(lacking)} it has tokens or positions only", where=str(path)
        )
    return SoftPrompts(
        {tag: (halves[tag][TOKENS], halves[tag][POSITIONS]) for tag in _ordered(archive, halves)}
    )


def _ordered(archive: Archive, halves: Mapping[str, Any]) -> list[str]:
    """Tags by their ids; those that no key lists behind them, by name. Errors: `CheckpointError` for listed ones that are not there."""
    keys = read_model_config(archive.read(CONFIG), where=archive.where(CONFIG))
    listed: dict[str, int] = {}
    for number, entry in enumerate(keys.get("existing_prompt_tags") or (), 1):
        pair = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (entry, number)
        listed[str(pair[0])] = int(pair[1]) if str(pair[1]).isdecimal() else number
    missing = [tag for tag in listed if tag not in halves]
    if missing and halves:
        raise CheckpointError(
            f"its existing_prompt_tags name {', '.join(missing)}, but its prompts are {', '.join(sorted(halves))}",
            where=archive.where(CONFIG),
        )
    return sorted(halves, key=lambda tag: (listed.get(tag, len(listed) + len(halves)), tag))


def keys_of(prompts: SoftPrompts, keys: Mapping[str, Any], stages: int) -> dict[str, Any]:
    """What model_config.yaml says of prompts. Errors: `CheckpointError` with all that NeMo's archives have no place for."""
    lengths = {len(tokens) for tokens, _ in prompts.tables.values()}
    wrong = []
    if not str(keys["target"]).endswith("MegatronGPTModel") or keys["nemo_version"] != OLDEST:
        wrong.append(
            "only a GPT with learned positions, as NeMo 1.8 knows it, has soft prompts in its archive"
        )
    if len(lengths) > 1:
        wrong.append(
            f"all tags have as many virtual tokens there, these have {', '.join(map(str, sorted(lengths)))}"
        )
    if stages > 1:
        wrong.append("NeMo reads soft prompts without a pipeline only")
    wrong += [
        f"a tag without letters, or with a dot, is no name there: {tag!r}"
        for tag in prompts.tables
        if not tag or "." in tag
    ]
    if wrong:
        raise CheckpointError(
            "\n    ".join(["these prompts do not go into an archive", *wrong]),
            where="--to nemo",
            fix="keep them as an artefact beside the model",
        )
    tags = [[tag, number] for number, tag in enumerate(prompts.tables, 1)]
    return {
        "use_soft_prompts": True,
        "num_prompt_tokens": lengths.pop(),
        "existing_prompt_tags": tags,
        "new_prompt_tags": [],
    }


def state_of(prompts: SoftPrompts, tensors: Mapping[str, Lazy]) -> OrderedDict[str, torch.Tensor]:
    """What stands in every rank's state_dict, in the dtype of the model's `tensors` (by our names)."""
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    dtype = next(iter(tensors.values())).dtype
    for tag, (tokens, positions) in prompts.tables.items():
        if positions is None:
            positions = tensors[ROWS].rows(0, len(tokens))
        state[f"{TABLE}.{tag}.{TOKENS}"] = tokens.to(dtype)
        state[f"{TABLE}.{tag}.{POSITIONS}"] = positions.to(dtype)
    return state
