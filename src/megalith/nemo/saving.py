"""`save_to`: a live model as a `.nemo`, one part for each of its tensor and pipeline ranks.

    engine ─ every process its slices ─▶ a step folder beside the target ─ main process: convert, certificate ─▶ rename

Knows the converter. A kill at any moment leaves the target as it was.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from megalith.checkpoint.convert.certificate import Failed
from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.convert.to_megatron import Sizes
from megalith.checkpoint.convert.to_nemo import refuse_name
from megalith.checkpoint.native import Checkpointer
from megalith.errors import CheckpointError
from megalith.models.family import describe
from megalith.nemo.restored import Restored


def save_nemo(restored: Restored, target: Path) -> Path:
    """Every process calls it. Errors: `CheckpointError`; then nothing is written."""
    target = target.expanduser().absolute()
    refuse_name(target)
    topology, team = restored.topology, restored.saver.checkpointer.team
    beside = team.lead(lambda: _folder_beside(target))
    try:
        tokens = _tokenizer(restored, beside) if topology.is_main else None
        checkpointer = Checkpointer(beside / "model", topology)
        step = checkpointer.save(
            restored.engine.step,
            {name: t for name, t in restored.engine.tensors().items() if name.startswith("model.")},
            {**describe(restored.composed.config.model.family, restored.architecture)},
            config_yaml=restored.composed.yaml(),
            tokenizer=tokens,
        )
        sizes = Sizes(ranks=topology.sizes.tensor, stages=topology.sizes.pipeline)
        team.lead(lambda: _convert(step, beside / target.name, target, sizes))
    finally:
        team.lead(lambda: shutil.rmtree(beside, ignore_errors=True))
    return target


def _folder_beside(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{target.stem}-", dir=target.parent))
    except OSError as error:
        raise CheckpointError(
            f"cannot be written ({error.strerror or error})",
            where=str(target),
            fix="name a folder that you may write to",
        ) from None


def _tokenizer(restored: Restored, folder: Path) -> Path | None:
    if restored.tokenizer is None:
        return None
    tokens = folder / "tokenizer"
    restored.tokenizer.save(tokens)
    return tokens


def _convert(step: Path, made: Path, target: Path, sizes: Sizes) -> None:
    """What somebody trained is written as it is, good or not."""
    try:
        convert(step, made, Plan("nemo", sizes, untrained=True))
    except Failed as failure:
        raise CheckpointError(str(failure), where=str(target), fix="nothing was written") from failure
    os.replace(made, target)
