"""From which checkpoint a run starts: its own newest, another one that the user named, or none.

    the run has checkpoints ──▶ go on from the newest that is whole
    NeMo began the run, and it has no checkpoints of our own ──▶ go on from the newest of NeMo's that is whole
    model.resume_from_checkpoint ──▶ that one, once: started again, the run goes on from its own
    model.init_from ──▶ its weights at step 0, once
    otherwise ──▶ fresh

A path that the user typed and that leads nowhere is an error, never a fresh start. Changes nothing on the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megalith.checkpoint.convert.continued import KINDS, open_continued
from megalith.checkpoint.foreign import Found, find, open_foreign
from megalith.checkpoint.formats.foreign import Foreign
from megalith.checkpoint.formats.nemo_runs import newest_of_run
from megalith.checkpoint.native import newest_verified, read_state, verify
from megalith.errors import CheckpointError
from megalith.hub.catalogue import entry_of
from megalith.models.config import ModelConfig


@dataclass(frozen=True)
class Start:
    """`folder` has been verified; of weights it may be another program's (a file, too). `origin` goes into the run's checkpoints, so that a later start knows what this one did.

    `state` is `state.json` of the checkpoint that the run goes on from; empty for a run that begins.
    """

    kind: Literal["fresh", "resume", "weights"]
    folder: Path | None
    origin: dict[str, str]
    notices: tuple[str, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)


def choose_start(
    checkpoints: Path,
    *,
    resume_if_exists: bool,
    ignore_no_checkpoint: bool = False,
    resume_from: str | Path | None = None,
    init_from: str | Path | None = None,
    key: str = "model.init_from",
) -> Start:
    """Decide. `key`: what `init_from` is called, for messages.

    Errors: `CheckpointError` for a path that leads nowhere, damage without an older whole checkpoint, both paths
    at once, and for a run without checkpoints unless `ignore_no_checkpoint` or a path was given."""
    if resume_from and init_from:
        raise CheckpointError(
            "both are given",
            where="model.resume_from_checkpoint, model.init_from",
            fix="resume_from_checkpoint goes on at its step, init_from takes the weights to step 0: keep one",
        )
    asked = _origin(resume_from, init_from)
    own: Path | None
    own, notices = newest_verified(checkpoints) if resume_if_exists else (None, [])
    if own is not None:
        state = read_state(own)
        before = state.get("origin", {})
        if init_from and before != asked:
            raise CheckpointError(
                f"this run has checkpoints already, and did not begin with the weights of {init_from}",
                where=str(checkpoints),
                fix=f"another exp_manager.name for a new run; {_as_before(key, before)} to go on with this one",
            )
        if not resume_from or before == asked:
            return Start("resume", own, before, tuple(notices), state)
    elif notices and not (resume_from or init_from):
        raise CheckpointError(
            "\n    ".join(["no checkpoint of this run is whole", *notices]),
            where=str(checkpoints),
            fix="give the run another exp_manager.name to begin anew, or model.resume_from_checkpoint",
        )
    if resume_from:
        return _go_on(find(resume_from), asked, notices)
    if resume_if_exists and (theirs := _begun_elsewhere(checkpoints, init_from)) is not None:
        return theirs
    if init_from:
        found = find(init_from)
        folder = _own(found) if found.is_native else found.folder
        return Start("weights", folder, asked, tuple(notices))
    if resume_if_exists and not ignore_no_checkpoint:
        raise CheckpointError(
            "there is no checkpoint to resume from",
            where=str(checkpoints),
            fix="exp_manager.resume_ignore_no_checkpoint=true begins anew where there is none",
        )
    return Start("fresh", None, asked)


def _as_before(key: str, before: dict[str, str]) -> str:
    """What a run that goes on is told of its beginning."""
    return f"{key}={before['init_from']}" if "init_from" in before else f"without {key}"


def _begun_elsewhere(checkpoints: Path, init_from: str | Path | None) -> Start | None:
    """The start of a run that NeMo began in this folder; None where it saved nothing there."""
    file, said = newest_of_run(checkpoints)
    if file is None:
        return None
    if init_from:
        raise CheckpointError(
            f"this run has checkpoints already, NeMo's: {file.name}",
            where=str(checkpoints),
            fix="another exp_manager.name for a new run; without model.init_from to go on with this one",
        )
    return _go_on(find(file), {"nemo": str(file)}, said)


def _go_on(found: Found, origin: dict[str, str], notices: Sequence[str]) -> Start:
    """From a step folder of our own, or from a checkpoint of another program's run."""
    if not found.is_native and found.kind in KINDS:
        theirs = open_continued(open_foreign(found.folder))
        return Start("resume", found.folder, origin, (*notices, *theirs.notices), dict(theirs.state))
    folder = _own(found)
    return Start("resume", folder, origin, tuple(notices), read_state(folder))


def _origin(resume_from: str | Path | None, init_from: str | Path | None) -> dict[str, str]:
    given = {"resume_from_checkpoint": resume_from, "init_from": init_from}
    return {key: _lasting(path) for key, path in given.items() if path}


def _lasting(path: str | Path) -> str:
    """What means the same from another folder, and on another machine where it is a published name."""
    entry = None if Path(path).exists() else entry_of(str(path))
    return entry.name if entry is not None else str(Path(path).expanduser().absolute())


def _own(found: Found) -> Path:
    """A whole step folder of our own."""
    folder = found.folder
    if not found.is_native:
        raise CheckpointError(
            f"another program wrote it ({found.kind}): a run cannot go on at its step",
            where=str(folder),
            fix="model.init_from takes its weights to step 0 of a new run",
        )
    problems = verify(folder)
    if problems:
        raise CheckpointError(
            "\n    ".join(["the checkpoint is damaged", *problems]),
            where=str(folder),
            fix="give another step of that run",
        )
    return folder


def weights_of_others(folder: Path, architecture: ModelConfig) -> Foreign | None:
    """What another program saved, opened for a model of this architecture; None for a step folder of our own.

    The number of heads and the true vocabulary, which its files may not say, are the architecture's.
    """
    if find(folder).is_native:
        return None
    known = {"num_attention_heads": architecture.num_attention_heads}
    return open_foreign(folder, config_file=known, vocab_size=architecture.vocab_size)
