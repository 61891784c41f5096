"""The manifest of a step folder: which files belong to it, byte for byte, and which tensors lie in them.

    step_0001000/manifest.json = {format_version, step, sequence, metrics, files: {name → bytes, sha256},
                                  tensors: {name → dtype, shape, file or slices: {"0:48,0:32" → file}},
                                  dropped: [name], sha256 (of all that precedes)}

Knows what a complete folder is, and says everything that keeps one from being so. Never imports torch, never repairs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from megalith.checkpoint.files import FileRecord, Progress, file_digests, regular_size, replace_file
from megalith.checkpoint.header import ITEM_BYTES, HeaderError, read_header
from megalith.checkpoint.slices import Slice, from_text, problem, shape_of, to_text, whole

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer"
REQUIRED = (CONFIG, STATE)
MAX_MANIFEST = 1 << 30
THREADS = min(8, os.cpu_count() or 1)
"""Files hashed at the same time when a folder is verified."""
WORTH_THREADS = 16 << 20
"""Bytes below which one thread hashes sooner than several have started."""


class ManifestError(ValueError):
    """The manifest is missing or cannot be what we wrote; the message says why."""


@dataclass(frozen=True)
class TensorRecord:
    """What a manifest says of a tensor: `dtype` as safetensors names it, whole `shape`, and which file holds which slice.

    The slices cover the tensor exactly: each element is in one of them.
    """

    dtype: str
    shape: tuple[int, ...]
    slices: Mapping[Slice, str]

    @property
    def files(self) -> set[str]:
        """The files that hold any of it."""
        return set(self.slices.values())

    @property
    def is_whole(self) -> bool:
        """Whether one file holds all of it, under its plain name."""
        return list(self.slices) == [whole(self.shape)]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes it takes in its files."""
        return self.elements * ITEM_BYTES[self.dtype]


def entry_name(name: str, part: Slice, shape: tuple[int, ...]) -> str:
    """What a slice is called in its file: the tensor's name, with its place behind it unless it is all of the tensor."""
    return name if part == whole(shape) else f"{name}[{to_text(part)}]"


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    `sequence` counts the saves into one checkpoints folder: the order of publication, which is not the order of steps once
    a run went back. `metrics` are exact (the names of links round them). `dropped` files were part of the folder and may
    still lie there if the process died while removing them: they are neither read nor missed.
    """

    step: int
    sequence: int
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    metrics: Mapping[str, float] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """The file's content."""
        body = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "sequence": self.sequence,
            "metrics": {k: v if math.isfinite(v) else repr(v) for k, v in self.metrics.items()},
            "files": {k: {"bytes": f.size, "sha256": f.sha256} for k, f in sorted(self.files.items())},
            "tensors": {k: _encoded(t) for k, t in sorted(self.tensors.items())},
            "dropped": list(self.dropped),
        }
        return (json.dumps(body | {"sha256": _own_digest(body)}, indent=1) + "\n").encode()


def _encoded(tensor: TensorRecord) -> dict[str, Any]:
    head: dict[str, Any] = {"dtype": tensor.dtype, "shape": list(tensor.shape)}
    if tensor.is_whole:
        return head | {"file": next(iter(tensor.slices.values()))}
    return head | {"slices": {to_text(part): file for part, file in sorted(tensor.slices.items())}}


def _own_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks `folder/manifest.json`. Raises `ManifestError`; touches no other file."""
    path = folder / MANIFEST
    try:
        if regular_size(path) > MAX_MANIFEST:
            raise ManifestError(f"{MANIFEST} is too large to be one")
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ManifestError(f"no {MANIFEST}") from None
    except OSError as error:
        raise ManifestError(f"{MANIFEST} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{MANIFEST} is not JSON ({error})") from None
    if not isinstance(body, dict) or "format_version" not in body:
        raise ManifestError(f"{MANIFEST} is not a manifest of a checkpoint")
    version = body["format_version"]
    if version != FORMAT_VERSION:
        raise ManifestError(
            f"{MANIFEST} has format version {version!r}; this Megalith reads {FORMAT_VERSION}: a newer one may have written it"
        )
    claimed = body.pop("sha256", None)
    if claimed != _own_digest(body):
        raise ManifestError(f"{MANIFEST} does not match its own SHA-256: it was damaged or edited")
    try:
        return _decoded(body)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ManifestError(f"{MANIFEST} is malformed ({error})") from None


def _decoded(body: dict[str, Any]) -> Manifest:
    files = {name: FileRecord(int(f["bytes"]), str(f["sha256"])) for name, f in body["files"].items()}
    tensors = {name: _decoded_tensor(t) for name, t in body["tensors"].items()}
    manifest = Manifest(
        int(body["step"]),
        int(body["sequence"]),
        files,
        tensors,
        {name: float(value) for name, value in body["metrics"].items()},
        tuple(body["dropped"]),
    )
    for name in (*files, *manifest.dropped):
        _check_name(name)
    for name, tensor in tensors.items():
        if tensor.dtype not in ITEM_BYTES or not tensor.files <= files.keys():
            raise ValueError(f"tensor {name}: {tensor.dtype} in {', '.join(sorted(tensor.files))}")
        if wrong := problem(tensor.shape, tensor.slices):
            raise ValueError(f"tensor {name}: {wrong}")
    absent = [name for name in REQUIRED if name not in files]
    if absent:
        raise ValueError(f"it lists no {' and no '.join(absent)}")
    return manifest


def _decoded_tensor(body: dict[str, Any]) -> TensorRecord:
    shape = tuple(int(n) for n in body["shape"])
    if "file" in body:
        return TensorRecord(body["dtype"], shape, {whole(shape): body["file"]})
    return TensorRecord(body["dtype"], shape, {from_text(k): file for k, file in body["slices"].items()})


def _check_name(name: str) -> None:
    """Refuses a name that could lead out of the folder, or to the manifest itself."""
    path = PurePosixPath(name)
    plain = path.parts and not path.is_absolute() and ".." not in path.parts and str(path) == name
    if not plain or "\0" in name or "\\" in name or name == MANIFEST:
        raise ValueError(f"it lists the file {name!r}, which is not a place inside the folder")


def entries_by_file(tensors: Mapping[str, TensorRecord]) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """file → name of an entry in it → its dtype and shape."""
    files: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, tensor in tensors.items():
        for part, file in tensor.slices.items():
            entries = files.setdefault(file, {})
            entries[entry_name(name, part, tensor.shape)] = (tensor.dtype, shape_of(part))
    return files


def rewrite_manifest(folder: Path, manifest: Manifest) -> None:
    """Replaces the manifest at once. Its temporary file lies outside the folder, whose exact set of files counts."""
    replace_file(folder / MANIFEST, manifest.encode(), temporary=folder.with_name(f".{folder.name}.manifest"))


def present_files(folder: Path) -> set[str]:
    """Everything below a folder that is not a real folder itself, by its path relative to it."""
    found: set[str] = set()
    todo = [folder]
    while todo:
        for entry in os.scandir(todo.pop()):
            if entry.is_dir(follow_symlinks=False):
                todo.append(Path(entry.path))
            else:
                found.add(Path(entry.path).relative_to(folder).as_posix())
    return found


def quick_problems(folder: Path) -> tuple[Manifest | None, list[str]]:
    """All that is wrong with a folder as far as the manifest, the set of files and their sizes tell; reads no content."""
    try:
        manifest = read_manifest(folder)
        present = present_files(folder) - {MANIFEST}
    except ManifestError as error:
        return None, [str(error)]
    except OSError as error:
        return None, [f"{folder} cannot be read ({error.strerror or error})"]
    problems = [f"{name}: missing" for name in sorted(set(manifest.files) - present)]
    known = set(manifest.files) | set(manifest.dropped)
    problems += [
        f"{name}: not in the manifest; nothing else may lie in this folder"
        for name in sorted(present - known)
    ]
    for name, record in manifest.files.items():
        if name not in present:
            continue
        try:
            size = regular_size(folder / name)
        except OSError as error:
            problems.append(f"{name}: cannot be read ({error.strerror or error})")
        else:
            if size != record.size:
                problems.append(f"{name}: {size} bytes, the manifest says {record.size}")
    return manifest, problems


def verify(
    folder: Path,
    *,
    only: Iterable[str] | None = None,
    share: tuple[int, int] = (0, 1),
    threads: int = THREADS,
    progress: Progress | None = None,
) -> list[str]:
    """Everything that is wrong with a step folder, one line each; an empty list says that it is exactly what was saved.

    Checks the set of files and the sizes of all, then the SHA-256 of each (of those named by `only`, where given) and that
    the tensor files hold the tensors that the manifest names. `share` (i, n): of these files the i-th share of n, so that n
    processes read everything once. `progress` is told the number of bytes as they are read.
    """
    folder = Path(folder)
    manifest, problems = quick_problems(folder)
    if manifest is None:
        return problems
    suspect = {problem.partition(": ")[0] for problem in problems}
    chosen = manifest.files.keys() if only is None else manifest.files.keys() & set(only)
    first, step = share
    names = [name for name in sorted(chosen)[first::step] if name not in suspect]
    if sum(manifest.files[name].size for name in names) < WORTH_THREADS:
        threads = 1
    digests = file_digests([folder / name for name in names], threads=threads, progress=progress)
    sound = []
    for name, digest in zip(names, digests, strict=True):
        if isinstance(digest, OSError):
            problems.append(f"{name}: cannot be read ({digest.strerror or digest})")
        elif digest != manifest.files[name].sha256:
            problems.append(
                f"{name}: its content changed (SHA-256 {digest[:12]}…, saved as {manifest.files[name].sha256[:12]}…)"
            )
        else:
            sound.append(name)
    return problems + _content_problems(folder, manifest, sound)


def _content_problems(folder: Path, manifest: Manifest, sound: list[str]) -> list[str]:
    """Files whose hash is right but which say something else than the manifest."""
    problems = []
    if STATE in sound:
        try:
            step = json.loads((folder / STATE).read_bytes())["step"]
        except (OSError, ValueError, TypeError, KeyError):
            problems.append(f"{STATE}: not the state of a checkpoint")
        else:
            if step != manifest.step:
                problems.append(f"{STATE}: step {step}, the manifest says {manifest.step}")
    expected = entries_by_file(manifest.tensors)
    for name in (n for n in sound if n.endswith(".safetensors")):
        listed = expected.get(name, {})
        try:
            held = {k: (e.dtype, e.shape) for k, e in read_header(folder / name).entries.items()}
        except (HeaderError, OSError) as error:
            problems.append(f"{name}: {error}")
        else:
            different = sorted(k for k in listed.keys() | held.keys() if listed.get(k) != held.get(k))
            if different:
                problems.append(
                    f"{name}: {', '.join(different[:5])} not as the manifest says ({len(different)} tensors)"
                )
    return problems
