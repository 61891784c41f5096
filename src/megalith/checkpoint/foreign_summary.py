"""What another program's checkpoint holds, told from its heads: kind, tensors, configuration, provenance. No tensor is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.files import readable_bytes
from megalith.checkpoint.formats.foreign import Foreign
from megalith.checkpoint.mapped import Parts
from megalith.models.config import num_parameters

SHOWN = 12
"""Tensors that the table names; `--json` gives all."""


def summarise(foreign: Foreign) -> dict[str, Any]:
    """Everything about it as plain JSON. Errors: `CheckpointError` where its tensors do not fit its configuration."""
    foreign.tensors  # noqa: B018  # says what does not fit
    tensors = {name: _tensor(parts) for name, parts in foreign.parts.items()}
    return {
        "path": str(foreign.path),
        "kind": foreign.kind,
        "family": foreign.family,
        "parameters": num_parameters(foreign.config, padded=False),
        "bytes": sum(lazy.nbytes for parts in foreign.parts.values() for lazy in parts),
        "tensors": tensors,
        "architecture": foreign.config.model_dump(mode="json"),
        "state": dict(foreign.state),
        "tokenizer": None if foreign.tokenizer is None else str(foreign.tokenizer),
        "provenance": dict(foreign.provenance),
        "notices": list(foreign.notices),
    }


def _tensor(parts: Parts) -> dict[str, Any]:
    return {
        "dtype": str(parts[0].dtype).removeprefix("torch."),
        "shapes": [list(lazy.shape) for lazy in parts],
        "bytes": sum(lazy.nbytes for lazy in parts),
    }


def describe(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The summary as (what, value) lines for a person."""
    tensors = summary["tensors"]
    dtypes = Counter(tensor["dtype"] for tensor in tensors.values())
    kinds = ", ".join(f"{dtype} × {count}" for dtype, count in dtypes.most_common())
    lines = [
        ("path", summary["path"]),
        ("kind", summary["kind"]),
        *((name.replace("_", " "), f"{value:,}") for name, value in summary["state"].items()),
        ("parameters", f"{summary['parameters']:,}"),
        ("tensors", f"{len(tensors)}, {readable_bytes(summary['bytes'])} ({kinds})"),
    ]
    lines += [("tensor", _line(name, tensor)) for name, tensor in list(tensors.items())[:SHOWN]]
    if len(tensors) > SHOWN:
        lines.append(("tensor", f"and {len(tensors) - SHOWN} more (--json)"))
    architecture = {k: v for k, v in summary["architecture"].items() if v is not None}
    lines += [("model", f"{name} {value}") for name, value in architecture.items()]
    if summary["tokenizer"]:
        lines.append(("tokenizer", summary["tokenizer"]))
    told = {k: v for k, v in summary["provenance"].items() if k not in ("args", "origins") and v is not None}
    lines += [("provenance", f"{name}: {value}") for name, value in told.items()]
    lines += [
        ("provenance", f"{name}: by {origin}")
        for name, origin in summary["provenance"].get("origins", {}).items()
    ]
    return lines + [("notice", text) for text in summary["notices"]]


def _line(name: str, tensor: Mapping[str, Any]) -> str:
    shapes = tensor["shapes"]
    parts = f" in each of {len(shapes)} parts" if len(shapes) > 1 else ""
    return f"{name}  {tensor['dtype']} {shapes[0]}{parts}"
