"""The native checkpoint: safetensors and JSON, published at once, verified by hash, read back in place.

    save ─ (stage) ─▶ step_0001000.partial/ ─ fsync ─ rename ─▶ step_0001000/ ─▶ latest ─▶ retention
                      model.safetensors  optim.safetensors  config.yaml  state.json  tokenizer/  manifest.json

At every instant the checkpoints folder holds a complete checkpoint, whatever kills the process: a folder gets its name only
when it is whole and on disk, `latest` moves after that, and nothing older goes before that.

Knows tensors by name and a state of plain JSON. Knows nothing of models, optimizers or the training loop. Many processes
write through another `Writer`; the one here is for one process, whose files Hugging Face libraries can open.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
from megalith.checkpoint.reading import load, read_config, read_state, read_tensors
from megalith.checkpoint.retention import Retention
from megalith.checkpoint.staging import Staging
from megalith.checkpoint.tensor_files import describe, write_tensors
from megalith.errors import CheckpointError, UnsupportedError
from megalith.topology.topology import Topology

__all__ = [
    "Checkpointer",
    "Writer",
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


class Writer(Protocol):
    """How the tensors of a save get into its partial folder."""

    def __call__(
        self, folder: Path, tensors: Mapping[str, torch.Tensor], hasher: Hasher
    ) -> tuple[dict[str, FileRecord], dict[str, TensorRecord]]:
        """Writes and forces to disk the tensor files; returns what the manifest says of files and tensors."""
        ...


def write_whole(
    folder: Path, tensors: Mapping[str, torch.Tensor], hasher: Hasher
) -> tuple[dict[str, FileRecord], dict[str, TensorRecord]]:
    """The `Writer` of one process: one file for each first word of the names (`model.…` → model.safetensors)."""
    files: dict[str, FileRecord] = {}
    table: dict[str, TensorRecord] = {}
    for group, members in _groups(tensors).items():
        file = f"{group}.safetensors"
        files[file] = write_tensors(folder / file, members, hasher)
        table |= {name: TensorRecord(*describe(tensor), file) for name, tensor in members.items()}
    return files, table


def writer_for(topology: Topology) -> Writer:
    """The writer that fits the processes of a run. Raises `UnsupportedError` for more than one."""
    if topology.mesh is not None:
        raise UnsupportedError("checkpoints are saved by one process so far", fix="run on one process")
    return write_whole


def _groups(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        group, dot, rest = name.partition(".")
        if not (dot and rest and group.isidentifier()):
            raise ValueError(
                f"{name!r}: the name of a saved tensor starts with its kind, as in 'model.{name}'"
            )
        groups.setdefault(group, {})[name] = tensor
    return groups


@dataclass(frozen=True)
class _Job:
    """One save, with everything it needs in its final form: nothing here changes while it is written."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    texts: Mapping[str, bytes]
    metrics: Mapping[str, float]


class Checkpointer:
    """Saves into one checkpoints folder, one save at a time.

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
        self._writer = writer_for(topology)
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        try:
            self.notices = names.clean_leftovers(self.root)
        except OSError as error:
            raise self._unusable(error) from error
        for notice in self.notices:
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

        `tensors` by full name (`model.…`, `optim.…`); `state` is plain JSON; `tokenizer` a file or a flat folder that is
        copied to `tokenizer/`; `metrics` by name, for the retention and the names of the links. Raises `CheckpointError` for a
        full disk or a failed earlier save (the checkpoints that were there stay), `ValueError` and `TypeError` for arguments
        that could not be read back.
        """
        self.wait()
        texts = _texts(step, state, config_yaml, tokenizer)
        counters = {name: state[name] for name in COUNTERS if isinstance(state.get(name), int | float)}
        values = {name: float(value) for name, value in (counters | dict(metrics or {})).items()}
        for tensor in tensors.values():
            describe(tensor)
        _groups(tensors)
        self._make_room(step, sum(t.nbytes for t in tensors.values()) + sum(map(len, texts.values())))
        if self.asynchronous:
            job = _Job(step, self._staging.copy(tensors), texts, values)
            self._thread = threading.Thread(
                target=self._background, args=(job, Hasher()), name="checkpoint-write"
            )
            self._thread.start()
        else:
            self._write(_Job(step, tensors, texts, values), Hasher())
        return self.root / names.step_name(step)

    def wait(self) -> None:
        """Returns when no save is under way; raises the error of the last one, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _background(self, job: _Job, hasher: Hasher) -> None:
        try:
            self._write(job, hasher)
        except BaseException as error:
            logger.error("saving step %d failed: %s", job.step, error)
            self._error = error

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
        name = names.step_name(job.step)
        try:
            self._refuse_other_writer(name)
            self._write_claimed(job, hasher, self.root / name)
        except OSError as error:
            raise CheckpointError(
                f"saving step {job.step} failed ({error.strerror or error})",
                where=str(self.root),
                fix="free disk space or check the file system; the checkpoints saved before are untouched",
            ) from error
        finally:
            hasher.close()

    def _write_claimed(self, job: _Job, hasher: Hasher, final: Path) -> None:
        partial = final.with_name(f"{final.name}.partial")
        try:
            for notice in names.restore_replaced(self.root):
                logger.warning(notice)
            names.claim(self.root, final.name)
            self._fill(partial, job, hasher)
            self._publish(partial, final)
            self._retain()
        except BaseException:
            self._abandon(partial)
            raise
        names.release(self.root, final.name)

    def _refuse_other_writer(self, name: str) -> None:
        other = names.writer_of(self.root, name)
        if other is not None and other != names.Owner.me():
            raise CheckpointError(
                f"process {other.pid} on {other.host} is writing {name} here",
                where=str(self.root),
                fix="two runs must not save into one folder: stop one, or give it another exp_manager.name",
            )

    def _fill(self, partial: Path, job: _Job, hasher: Hasher) -> None:
        """Writes the whole content of a step folder and forces it to disk, under its temporary name."""
        remove_tree(partial)
        os.mkdir(partial)
        files, table = self._writer(partial, job.tensors, hasher)
        for name, content in job.texts.items():
            if "/" in name:
                (partial / name).parent.mkdir(exist_ok=True)
            files[name] = write_file(partial / name, [content])
        manifest = Manifest(job.step, names.next_sequence(self.root), files, table, job.metrics)
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
