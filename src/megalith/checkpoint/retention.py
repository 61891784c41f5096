"""Which checkpoints stay, and the links that people know them by.

    published and verified ─▶ new links ─▶ old links go ─▶ old folders renamed away ─▶ removed

Knows manifests (where the exact metrics are) and names. Everything is decided anew from what lies in the folder, so there is
no list that a crash could leave out of step, and whichever step of the above is the last one done, what is left can be loaded.
"""

from __future__ import annotations

import logging
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from megalith.checkpoint.files import remove_tree, replace_link, sync_folder
from megalith.checkpoint.layout import by_publication, step_of
from megalith.checkpoint.manifest import Manifest, quick_problems, rewrite_manifest, verify
from megalith.checkpoint.naming import LAST, Template

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """What to keep, in the words of `exp_manager.checkpoint_callback_params`.

    The checkpoint published last always stays: a run resumes from it. Beyond it stay the `save_top_k` best by `monitor`
    (`mode` min or max; −1 all), and every step that `keep_every_n_steps` divides (None: no such). Places that no value of
    `monitor` fills (it is None, or few steps had a validation, or it was NaN) go to the most recent ones.
    `filename` is the template of the links (None: no links), `save_last` makes the `-last` one. `drop_optimizer` removes the
    optimizer's state of all but the last.
    """

    monitor: str | None = "val_loss"
    mode: str = "min"
    save_top_k: int = 3
    save_last: bool = True
    keep_every_n_steps: int | None = None
    filename: str | None = None
    drop_optimizer: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode {self.mode!r} is neither min nor max")
        if self.save_top_k < -1:
            raise ValueError(f"save_top_k {self.save_top_k}: a number of checkpoints, or -1 for all")
        if self.keep_every_n_steps is not None and self.keep_every_n_steps < 1:
            raise ValueError(f"keep_every_n_steps {self.keep_every_n_steps}: at least 1")
        if self.filename is not None:
            Template(self.filename)


@dataclass(frozen=True)
class _Kept:
    folder: Path
    manifest: Manifest


class Retention:
    """Applies a `Policy` to a checkpoints folder after each save."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._template = Template(policy.filename) if policy.filename is not None else None

    def apply(self, root: Path) -> list[Path]:
        """Makes the links, drops what the policy does not keep, and returns the folders removed.

        Nothing is dropped unless the folder published last verifies, hashes and all. Raises `OSError`.
        """
        everything = [_Kept(folder, manifest) for folder, manifest in by_publication(root) if manifest]
        if not everything:
            return []
        newest = everything[0]
        best = self._best(everything)
        keep = {k.folder for k in best} | {newest.folder}
        every = self.policy.keep_every_n_steps
        keep |= {k.folder for k in everything if every and k.manifest.step % every == 0}
        doomed = [k for k in everything if k.folder not in keep]
        fat = [k for k in everything[1:] if k.folder in keep and self._droppable(k)]
        if (doomed or fat) and (problems := verify(newest.folder, threads=1)):
            logger.error("%s is damaged, so nothing older is removed: %s", newest.folder, "; ".join(problems))
            doomed, fat = [], []
        try:
            self._link(root, best, newest, doomed)
        except OSError as error:
            logger.warning("links to checkpoints could not be made (%s); nothing else needs them", error)
        for kept in fat:
            _drop_optimizer(kept)
        for kept in doomed:
            _remove(kept.folder)
        return [k.folder for k in doomed]

    def _best(self, everything: list[_Kept]) -> list[_Kept]:
        """The `save_top_k` best of `everything` (newest first): best first, of equals the older (as Lightning), then the rest."""
        policy = self.policy
        if policy.save_top_k == -1:
            return everything
        known: list[tuple[float, int, _Kept]] = []
        rest: list[_Kept] = []
        sign = 1 if policy.mode == "min" else -1
        for kept in everything:
            value = kept.manifest.metrics.get(policy.monitor, math.nan) if policy.monitor else math.nan
            if math.isnan(value):
                rest.append(kept)
            else:
                known.append((sign * value, kept.manifest.sequence, kept))
        ranked = [kept for *_, kept in sorted(known, key=lambda k: k[:2])]
        return [*ranked, *rest][: policy.save_top_k]

    def _droppable(self, kept: _Kept) -> bool:
        held = any(name.startswith("optim.") for name in kept.manifest.tensors)
        leftover = any((kept.folder / name).exists() for name in kept.manifest.dropped)
        return self.policy.drop_optimizer and (held or leftover)

    def _link(self, root: Path, best: list[_Kept], newest: _Kept, doomed: list[_Kept]) -> None:
        wanted = self._wanted_links(best, newest)
        changed = False
        for name, target in wanted.items():
            path = root / name
            if path.is_symlink() and os.readlink(path) == target:
                continue
            if path.exists() and not path.is_symlink():
                logger.warning("%s is not a link of ours: it stays", path)
                continue
            replace_link(path, target, temporary=root / f".{target}.link")
            changed = True
        gone = {k.folder.name for k in doomed}
        for entry in list(os.scandir(root)):
            if entry.name not in wanted and self._stale(entry, gone):
                os.unlink(entry.path)
                changed = True
        if changed:
            sync_folder(root)

    def _wanted_links(self, best: list[_Kept], newest: _Kept) -> dict[str, str]:
        """Name of a link → name of the folder it leads to."""
        if self._template is None:
            return {}
        links: dict[str, str] = {}
        for kept in sorted(best, key=lambda k: k.manifest.sequence):
            name = plain = self._template.name(_values(kept.manifest))
            number = 0
            while name in links:
                number += 1
                name = f"{plain}-v{number}"
            links[name] = kept.folder.name
        if self.policy.save_last:
            links[self._template.name(_values(newest.manifest)) + LAST] = newest.folder.name
        return links

    def _stale(self, entry: os.DirEntry[str], gone: set[str]) -> bool:
        """A link into this folder whose target goes or is gone, or one that our template made and no longer wants."""
        if not entry.is_symlink():
            return False
        target = os.readlink(entry.path)
        if step_of(target) is None:
            return False
        dangling = target in gone or not os.path.exists(entry.path)
        return dangling or (self._template is not None and self._template.matches(entry.name))


def _values(manifest: Manifest) -> dict[str, float]:
    """What the fields of a template may name; steps and epochs are whole numbers there, all else is as it was given."""
    epoch = manifest.metrics.get("epoch", 0)
    return {**manifest.metrics, "epoch": int(epoch), "step": manifest.step}


def _drop_optimizer(kept: _Kept) -> None:
    """Takes the optimizer's files out of a folder: first out of its manifest, which still tolerates them, then off the disk."""
    manifest, problems = quick_problems(kept.folder)
    if manifest is None or problems:
        return
    files = _files(manifest, optimizer=True)
    if files & _files(manifest, optimizer=False):
        return
    if files:
        manifest = replace(
            manifest,
            files={name: record for name, record in manifest.files.items() if name not in files},
            tensors={name: t for name, t in manifest.tensors.items() if not t.files & files},
            dropped=(*manifest.dropped, *sorted(files)),
        )
        rewrite_manifest(kept.folder, manifest)
    for name in manifest.dropped:
        (kept.folder / name).unlink(missing_ok=True)
    sync_folder(kept.folder)


def _files(manifest: Manifest, *, optimizer: bool) -> set[str]:
    """The files that hold the optimizer's tensors, or those that hold others."""
    chosen = (t for name, t in manifest.tensors.items() if name.startswith("optim.") == optimizer)
    return set().union(*(t.files for t in chosen))


def _remove(folder: Path) -> None:
    """Removes a step folder; a reader never sees half of it under its own name."""
    away = folder.with_name(f"{re.sub(r'[.]old$', '', folder.name)}.deleted")
    remove_tree(away)
    os.rename(folder, away)
    sync_folder(folder.parent)
    remove_tree(away)
