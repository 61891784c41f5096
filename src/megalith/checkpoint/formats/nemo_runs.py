"""Which checkpoint of a run that NeMo began is the one to go on from: by names, markers, ranks and steps.

    checkpoints/ [mp_rank_TT/ | tp_rank_TT_pp_rank_PPP/] NAME-last.ckpt, NAME--val_loss=0.35-epoch=1.ckpt ─▶ one file

The newest whole one, as NeMo's exp_manager means it; where NeMo refuses to choose, so does this. Reads steps, no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megalith.checkpoint.formats.nemo_archive import WEIGHTS
from megalith.checkpoint.formats.nemo_lightning import LAST, SUFFIX
from megalith.checkpoint.formats.nemo_read import rank_of
from megalith.checkpoint.pickles.reader import open_pickle
from megalith.errors import CheckpointError

END = "end.ckpt"
UNFINISHED = "-unfinished"
"""Behind a checkpoint's name without its suffix: a file that NeMo (from 1.21 on) removes when all ranks have written."""


def newest_of_run(folder: Path) -> tuple[Path | None, tuple[str, ...]]:
    """A file of the newest whole checkpoint in a run's checkpoints folder, and what to say; None where NeMo saved nothing.

    A name with `-last` is preferred among those of the same step. Errors: `CheckpointError` for several names with `-last`, for a
    run that is complete (`-end`), and where none is whole.
    """
    names = _names(folder)
    if not names:
        return None, ()
    _refuse_complete(folder, names)
    whole, said = _whole(folder, names)
    last = [name for name in whole if name.endswith(LAST)]
    if len(last) > 1:
        raise CheckpointError(
            f"it holds {len(last)} checkpoints that are called the last: {', '.join(last[:8])}",
            where=str(folder),
            fix="a save was killed: model.resume_from_checkpoint=FILE names the one to go on from, or move the others away",
        )
    if not whole:
        raise CheckpointError(
            "\n    ".join(["no checkpoint of this run is whole", *said]),
            where=str(folder),
            fix="give the run another exp_manager.name to begin anew, or model.resume_from_checkpoint",
        )
    chosen = max(whole, key=lambda name: (whole[name], name.endswith(LAST), name))
    if last and chosen != last[0]:
        said.append(
            f"{chosen} (step {whole[chosen]}) is newer than {last[0]} (step {whole[last[0]]}) and is taken"
        )
    return names[chosen][0], tuple(said)


def _names(folder: Path) -> dict[str, list[Path]]:
    """Name of a checkpoint → its files, the ranks' in their order."""
    names: dict[str, list[Path]] = {}
    for file in _files(folder):
        if file.name != WEIGHTS:
            names.setdefault(file.name, []).append(file)
    return names


def _files(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return
    yield from sorted(folder.glob(f"*{SUFFIX}"))
    for entry in _ranks(folder):
        yield from sorted(entry.glob(f"*{SUFFIX}"))


def _ranks(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.is_dir() and rank_of(f"{p.name}/_") is not None]


def _refuse_complete(folder: Path, names: dict[str, list[Path]]) -> None:
    ended = [name for name in names if name.endswith(END)]
    if ended:
        raise CheckpointError(
            f"the run is complete: there is {ended[0]}",
            where=str(folder),
            fix="model.resume_from_checkpoint=FILE goes on from it all the same; model.init_from takes its weights to a new run",
        )


def _whole(folder: Path, names: dict[str, list[Path]]) -> tuple[dict[str, int], list[str]]:
    """Name → step of those that all ranks have finished, and why others are left out."""
    ranks, steps, said = len(_ranks(folder)), {}, []
    for name, files in names.items():
        if (folder / f"{name.removesuffix(SUFFIX)}{UNFINISHED}").exists():
            said.append(
                f"{name} was being written when its run ended (there is its {UNFINISHED} marker): left out"
            )
        elif files[0].parent != folder and len(files) < ranks:
            said.append(f"{name} is there for {len(files)} of {ranks} ranks: left out")
        else:
            try:
                steps[name] = _step(files[0])
            except CheckpointError as error:
                said.append(f"{name} cannot be read: {error.problem.what}: left out")
    return steps, said


def _step(file: Path) -> int:
    content = open_pickle(file).content
    step = content.get("global_step") if isinstance(content, dict) else None
    if not isinstance(step, int):
        raise CheckpointError("it does not say its step", where=str(file))
    return step
