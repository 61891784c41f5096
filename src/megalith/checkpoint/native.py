"""The native checkpoint: safetensors and JSON, published at once, verified by hash, read back in place.

    save ─ (stage) ─▶ step_0001000.partial/ ─ fsync ─ rename ─▶ step_0001000/ ─▶ latest ─▶ retention
                      model.safetensors  optim.safetensors  config.yaml  state.json  tokenizer/  manifest.json

Many processes plan a save together, each writes its own slices (`model-00001-of-00004.safetensors`), and the first of them
does the rest. Where one fails, the save fails on all.

At every instant the checkpoints folder holds a complete checkpoint, whatever kills the process: a folder gets its name only
when it is whole and on disk, `latest` moves after that, and nothing older goes before that.

Knows tensors by name and a state of plain JSON. Knows nothing of models, optimizers or the training loop.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from megalith.checkpoint import layout as names
from megalith.checkpoint.files import (
    FileRecord,
    Hasher,
    free_bytes,
    readable_bytes,
    remove_tree,
    sync_folder,
    write_file,
)
from megalith.checkpoint.layout import newest_verified
from megalith.checkpoint.manifest import (
    CONFIG,
    FORMAT_VERSION,
    MANIFEST,
    STATE,
    TOKENIZER,
    Manifest,
    TensorRecord,
    verify,
)
from megalith.checkpoint.plan import Files, Plan, make_plan, offers
from megalith.checkpoint.reading import load, read_config, read_state, read_tensors
from megalith.checkpoint.retention import Retention
from megalith.checkpoint.staging import Staging
from megalith.checkpoint.team import Team
from megalith.checkpoint.tensor_files import write_tensors
from megalith.errors import CheckpointError
from megalith.topology.topology import Topology

__all__ = [
    "Checkpointer",
    "load",
    "newest_verified",
    "read_config",
    "read_state",
    "read_tensors",
    "verify",
]

logger = logging.getLogger(__name__)

COUNTERS = ("consumed_samples", "consumed_tokens", "epoch")
"""Keys of the state that the names of links may use like a metric."""
MARGIN = 1 << 20
"""Bytes for names, blocks and the manifest beyond those of the content, when a save looks for room."""


T = TypeVar("T")


@dataclass(frozen=True)
class _Job:
    """One save, with everything it needs in its final form: nothing here changes while it is written."""

    step: int
    files: Files
    table: Mapping[str, TensorRecord]
    texts: Mapping[str, bytes]
    metrics: Mapping[str, float]


class Checkpointer:
    """Saves into one checkpoints folder, one save at a time. Every process of the topology makes one, and calls alike.

    `asynchronous` copies the tensors to host memory and writes in a thread of its own; `wait` (called by the next save, too)
    raises what went wrong there. The process does not end before a save that has begun, except by a signal that kills it.
    `retention` decides after each save which older ones go. `notices` says what dead processes had left and was cleaned.
    """

    def __init__(
        self,
        root: Path,
        topology: Topology,
        *,
        asynchronous: bool = False,
        retention: Retention | None = None,
    ) -> None:
        self.root = Path(root).absolute()
        self.asynchronous = asynchronous
        self.retention = retention
        self.team = Team(topology)
        """The processes that save here; `load` and decisions that all must share go through it."""
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.notices = self.team.lead(self._clean)
        for notice in self.notices if self.team.is_main else ():
            logger.warning(notice)

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        *,
        config_yaml: str,
        tokenizer: Path | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Path:
        """Saves step `step`, and returns the folder that it is, or asynchronously will be, published as.

        `tensors` by full name (`model.…`, `optim.…`), plain or DTensors, as far as this process has them; the rest is taken
        from the first process: `state` is plain JSON; `tokenizer` a file or a flat folder that is
        copied to `tokenizer/`; `metrics` by name, for the retention and the names of the links. Raises `CheckpointError` for a
        full disk or a failed earlier save (the checkpoints that were there stay), `ValueError` and `TypeError` for arguments
        that could not be read back.
        """
        self.wait()
        texts: dict[str, bytes] = {}

        def prepare() -> Any:
            if self.team.is_main:
                texts.update(_texts(step, state, config_yaml, tokenizer))
            return offers(tensors)

        plan = make_plan(tensors, self.team.together(prepare), self.team.rank)
        self.team.lead(lambda: self._make_room(step, plan.nbytes + sum(map(len, texts.values()))))
        counters = {name: state[name] for name in COUNTERS if isinstance(state.get(name), int | float)}
        values = {name: float(value) for name, value in (counters | dict(metrics or {})).items()}
        if self.asynchronous:
            job = _Job(step, self._staged(plan), plan.table, texts, values)
            self._thread = threading.Thread(
                target=self._background, args=(job, Hasher()), name="checkpoint-write"
            )
            self._thread.start()
        else:
            self._write(_Job(step, plan.files, plan.table, texts, values), Hasher())
        return self.root / names.step_name(step)

    def wait(self) -> None:
        """Returns when no save is under way; raises the error of the last one, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _staged(self, plan: Plan) -> Files:
        """The plan's files over private copies of what this process writes."""
        copies = self._staging.copy({n: t for entries in plan.files.values() for n, t in entries.items()})
        return {file: {name: copies[name] for name in entries} for file, entries in plan.files.items()}

    def _background(self, job: _Job, hasher: Hasher) -> None:
        try:
            self._write(job, hasher)
        except BaseException as error:
            if self.team.is_main:
                logger.error("saving step %d failed: %s", job.step, error)
            self._error = error

    def _clean(self) -> list[str]:
        try:
            return names.clean_leftovers(self.root)
        except OSError as error:
            raise self._unusable(error) from error

    def _make_room(self, step: int, needed: int) -> None:
        """Creates the checkpoints folder and refuses early where the save cannot fit."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            free = free_bytes(self.root)
        except OSError as error:
            raise self._unusable(error) from error
        needed += MARGIN
        if free < needed:
            raise CheckpointError(
                f"saving step {step} needs {readable_bytes(needed)}, and {readable_bytes(free)} are free",
                where=str(self.root),
                fix="free disk space or lower exp_manager.checkpoint_callback_params.save_top_k; "
                "the checkpoints saved so far are untouched",
            )

    def _unusable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"checkpoints cannot be saved here ({error.strerror or error})",
            where=str(self.root),
            fix="choose a writable folder (exp_manager.exp_dir or exp_manager.checkpoint_callback_params.dirpath)",
        )

    def _write(self, job: _Job, hasher: Hasher) -> None:
        final = self.root / names.step_name(job.step)
        try:
            self.team.lead(lambda: self._refuse_other_writer(final.name))
            self._write_claimed(job, hasher, final)
        finally:
            hasher.close()

    def _write_claimed(self, job: _Job, hasher: Hasher, final: Path) -> None:
        partial = final.with_name(f"{final.name}.partial")

        def mine() -> dict[str, FileRecord]:
            return {file: write_tensors(partial / file, t, hasher) for file, t in job.files.items()}

        def finish() -> None:
            self._fill(partial, job, {file: record for each in written for file, record in each.items()})
            self._publish(partial, final)
            self._retain()
            names.release(self.root, final.name)

        try:
            self.team.lead(lambda: self._on_disk(job, lambda: self._begin(partial)))
            written = self.team.together(lambda: self._on_disk(job, mine))
            self.team.lead(lambda: self._on_disk(job, finish))
        except BaseException:
            if self.team.is_main:
                self._abandon(partial)
            raise

    def _on_disk(self, job: _Job, work: Callable[[], T]) -> T:
        """`work`, with an error of the disk in the user's words."""
        try:
            return work()
        except OSError as error:
            raise CheckpointError(
                f"saving step {job.step} failed ({error.strerror or error})",
                where=str(self.root),
                fix="free disk space or check the file system"
                + (", which all processes must share" if self.team.size > 1 else "")
                + "; the checkpoints saved before are untouched",
            ) from error

    def _refuse_other_writer(self, name: str) -> None:
        other = names.writer_of(self.root, name)
        if other is not None and other != names.Owner.me():
            raise CheckpointError(
                f"process {other.pid} on {other.host} is writing {name} here",
                where=str(self.root),
                fix="two runs must not save into one folder: stop one, or give it another exp_manager.name",
            )

    def _begin(self, partial: Path) -> None:
        """An empty folder under the temporary name, and word of who fills it."""
        for notice in names.restore_replaced(self.root):
            logger.warning(notice)
        names.claim(self.root, partial.stem)
        remove_tree(partial)
        os.mkdir(partial)

    def _fill(self, partial: Path, job: _Job, files: dict[str, FileRecord]) -> None:
        """All that is not tensors, forced to disk with the folder itself: then it is complete under its temporary name."""
        for name, content in job.texts.items():
            if "/" in name:
                (partial / name).parent.mkdir(exist_ok=True)
            files[name] = write_file(partial / name, [content])
        manifest = Manifest(job.step, names.next_sequence(self.root), files, job.table, job.metrics)
        write_file(partial / MANIFEST, [manifest.encode()])
        if (partial / TOKENIZER).is_dir():
            sync_folder(partial / TOKENIZER)
        sync_folder(partial)

    def _publish(self, partial: Path, final: Path) -> None:
        """Gives the folder its name, then lets `latest` name it.

        One that has this name already steps aside as `.old`, which `newest_verified` knows, until the new one is in place.
        """
        replaced = final.with_name(f"{final.name}.old")
        if final.exists():
            remove_tree(replaced)
            os.rename(final, replaced)
        try:
            os.rename(partial, final)
        except OSError:
            if replaced.exists():
                os.rename(replaced, final)
            raise
        sync_folder(self.root)
        names.write_latest(self.root, final)
        remove_tree(replaced)

    def _retain(self) -> None:
        """Failing to tidy up is no reason to stop a run whose checkpoint is safe."""
        try:
            if self.retention is not None:
                self.retention.apply(self.root)
        except OSError as error:
            logger.warning("older checkpoints could not be tidied up: %s", error)

    def _abandon(self, partial: Path) -> None:
        try:
            remove_tree(partial)
            names.release(self.root, partial.stem)
        except OSError as error:
            logger.warning("%s could not be removed: %s", partial, error)


def _texts(step: int, state: Mapping[str, Any], config_yaml: str, tokenizer: Path | None) -> dict[str, bytes]:
    """The small files of a step folder, by name."""
    body = {"format_version": FORMAT_VERSION, "step": step}
    for key in body.keys() & state.keys():
        if state[key] != body[key]:
            raise ValueError(f"state[{key!r}] is {state[key]!r}, the save is of {body[key]!r}")
    body |= state
    problem = _not_json(body, "state")
    if problem:
        raise TypeError(problem)
    texts = {CONFIG: config_yaml.encode(), STATE: (json.dumps(body, indent=1) + "\n").encode()}
    return texts | (_tokenizer_files(Path(tokenizer)) if tokenizer is not None else {})


def _not_json(value: Any, path: str) -> str:
    """Says which part of a state would not come back from JSON as it is; empty when all of it does."""
    if value is None or isinstance(value, str | bool | int | float):
        return ""
    if isinstance(value, list):
        return next(filter(None, (_not_json(v, f"{path}[{i}]") for i, v in enumerate(value))), "")
    if isinstance(value, dict):
        for key, item in value.items():
            problem = (
                _not_json(item, f"{path}[{key!r}]")
                if isinstance(key, str)
                else f"{path} has the key {key!r}, not a text"
            )
            if problem:
                return problem
        return ""
    return f"{path} is a {type(value).__name__}, which JSON would not give back"


def _tokenizer_files(source: Path) -> dict[str, bytes]:
    """The files of a tokenizer (one file, or a folder without folders in it), by their name in the checkpoint."""
    try:
        paths = [source] if source.is_file() else sorted(source.iterdir())
        return {f"{TOKENIZER}/{path.name}": path.read_bytes() for path in paths}
    except OSError as error:
        raise CheckpointError(
            f"the tokenizer cannot be copied into the checkpoint ({error.strerror or error})",
            where=str(error.filename or source),
            fix="give a tokenizer file, or a folder that holds nothing but the files of one",
        ) from error
