"""What a step folder holds, told from its manifest, its state and its configuration, without reading a tensor.

Knows the small files of a step folder. Never imports torch, so that `megalith checkpoint inspect` answers at once.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megalith.checkpoint.files import readable_bytes
from megalith.checkpoint.manifest import CONFIG, STATE, Manifest, read_manifest, verify
from megalith.errors import CheckpointError

SHOWN_KEYS = (
    "name",
    "trainer.precision",
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_attention_heads",
    "model.encoder_seq_length",
    "model.max_position_embeddings",
    "model.micro_batch_size",
    "model.global_batch_size",
    "model.tokenizer.library",
    "model.tokenizer.type",
    "model.optim.name",
    "model.optim.lr",
    "model.optim.sched.name",
    "model.init_from",
)
"""Keys of the configuration that the table shows; `--json` gives all of it."""
SHOWN_SOURCES = 8
LINE = 160
"""Characters that the table shows of a line of the data plan."""


def summarise(folder: Path) -> dict[str, Any]:
    """Everything about a step folder as plain JSON: step, counters, metrics, tensors by kind, configuration, state, files.

    Raises `CheckpointError` where its small files are not what was saved.
    """
    problems = verify(folder, only=(STATE, CONFIG))
    if problems:
        raise CheckpointError(
            "\n    ".join(["the checkpoint is damaged", *problems]),
            where=str(folder),
            fix="give the run folder, and the newest complete checkpoint is taken",
        )
    manifest = read_manifest(folder)
    state = json.loads((folder / STATE).read_bytes())
    return {
        "path": str(folder),
        "step": manifest.step,
        "sequence": manifest.sequence,
        "consumed_samples": state.get("consumed_samples"),
        "consumed_tokens": state.get("consumed_tokens"),
        "metrics": {
            name: value if value - value == 0 else repr(value) for name, value in manifest.metrics.items()
        },
        "bytes": sum(record.size for record in manifest.files.values()),
        "tensors": _tensors(manifest),
        "config": _config(folder),
        "state": state,
        "files": {name: {"bytes": f.size, "sha256": f.sha256} for name, f in sorted(manifest.files.items())},
        "dropped": list(manifest.dropped),
    }


def _config(folder: Path) -> Any:
    text = (folder / CONFIG).read_text(encoding="utf-8")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _tensors(manifest: Manifest) -> dict[str, Any]:
    """kind → how many tensors, elements, bytes, files, slices in them, and tensors of each dtype."""
    kinds: dict[str, Any] = {}
    for kind in sorted({name.partition(".")[0] for name in manifest.tensors}):
        members = [t for name, t in manifest.tensors.items() if name.partition(".")[0] == kind]
        kinds[kind] = {
            "count": len(members),
            "elements": sum(t.elements for t in members),
            "bytes": sum(t.nbytes for t in members),
            "files": len(set().union(*(t.files for t in members))),
            "slices": sum(len(t.slices) for t in members),
            "dtypes": dict(Counter(t.dtype for t in members).most_common()),
        }
    return kinds


def describe(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The summary as (what, value) lines for a person."""
    lines = [("folder", summary["path"]), ("step", f"{summary['step']:,}")]
    for key in ("consumed_samples", "consumed_tokens"):
        if summary[key] is not None:
            lines.append((key.replace("_", " "), f"{summary[key]:,}"))
    lines += [
        (name, str(value)) for name, value in summary["metrics"].items() if name not in summary["state"]
    ]
    for kind, t in summary["tensors"].items():
        dtypes = ", ".join(f"{dtype} × {count}" for dtype, count in t["dtypes"].items())
        held = f"{t['count']} tensors, {t['elements']:,} numbers, {readable_bytes(t['bytes'])} ({dtypes})"
        cut = t["files"] > 1 or t["slices"] > t["count"]
        lines.append((kind, held + (f" in {t['slices']} slices, {t['files']} files" if cut else "")))
    if summary["dropped"]:
        lines.append(("dropped", ", ".join(summary["dropped"])))
    config = [(key, _lookup(summary["config"], key)) for key in SHOWN_KEYS]
    lines += [(key, str(value)) for key, value in config if value is not None]
    lines += [("data plan", line) for line in _plan(summary["state"].get("data_plan"))]
    lines.append(("state", ", ".join(sorted(summary["state"]))))
    lines += [("file", line) for line in _files(summary["files"])]
    return lines


_NUMBERED = re.compile(r"(.+-)\d{5}(-of-\d{5}\.safetensors)")


def _files(files: Mapping[str, Any]) -> list[str]:
    """A line each; one for all files that many processes wrote of a kind."""
    groups: dict[str, list[int]] = {}
    for name, record in files.items():
        groups.setdefault(_NUMBERED.sub(r"\1*\2", name), []).append(record["bytes"])
    return [
        f"{name}  " + (f"{len(sizes)} files, " if "*" in name else "") + readable_bytes(sum(sizes))
        for name, sizes in groups.items()
    ]


def _lookup(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return None if isinstance(config, dict | list) else config


def _plan(plan: Any) -> list[str]:
    """A data plan in short: for each split its plain values, then a line for each of its first sources, without hashes."""
    if not isinstance(plan, dict):
        return [] if plan is None else [_cut(json.dumps(plan))]
    lines = []
    for split, content in plan.items():
        lines.append(_cut(f"{split}: {_plain(content)}"))
        sources = content.get("sources") if isinstance(content, dict) else None
        if isinstance(sources, list):
            lines += [_cut(f"  from {_plain(source)}") for source in sources[:SHOWN_SOURCES]]
            lines += [f"  and {len(sources) - SHOWN_SOURCES} more"] if len(sources) > SHOWN_SOURCES else []
    return lines


def _plain(value: Any) -> str:
    """The values of an object that are neither objects nor hashes: `order native, samples 360`."""
    if not isinstance(value, dict):
        return json.dumps(value)
    shown = (f"{k} {v}" for k, v in value.items() if not isinstance(v, dict | list) and "sha256" not in k)
    return ", ".join(shown)


def _cut(text: str) -> str:
    return text if len(text) <= LINE else f"{text[: LINE - 1]}…"
