"""What proves a conversion: weights and logits of both sides, from the files, and the hashes of all that was read and written.

    source files ───────────────┬─ every weight the same bits ─▶ names of others ─────────┐
    written files, opened anew ─┴─ our model, layer by layer ─▶ logits ─┐                 ├─▶ conversion.json
    written files ─ transformers, where it is installed ─▶ logits ──────┴─▶ differences ──┘

The configurations were compared when the written one was opened: the same weights under the same configuration are the same
logits. Where a weight differs, the source computes its own, which tells by how much. Where the conversion rounds (`--dtype`),
the source is rounded likewise before it is compared, and what that alone changes is told.
Knows logits and JSON. Writes nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megalith import __version__
from megalith.checkpoint.convert.independent import Theirs
from megalith.checkpoint.convert.passage import PASSAGE, Tokens, most, passage_loss
from megalith.checkpoint.convert.source import Source
from megalith.checkpoint.files import FileRecord
from megalith.models.config import num_parameters

FORMAT_VERSION = 1
SMALL = 50_000_000
"""Parameters up to which logits are computed in float64 whatever the dtype."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
INDEPENDENT_TOLERANCE = 1e-4
"""transformers computes norms and rotary angles in fp32 whatever it is asked for. All tolerances are relative to the largest logit, or 1."""

SHOWN = 5
"""Names of tensors told at most."""


class Failed(Exception):
    """The output does not compute what the source does, or is no model of English text: nothing is left of it."""


def precision_of(source: Source) -> torch.dtype:
    """In which dtype logits are computed."""
    few = num_parameters(source.config) <= SMALL
    return torch.float64 if few or source.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Computed:
    """Logits (T, V) by the source's files, by the written ones; `unrounded`: by the source's before they were rounded, if they were.

    Of `compared` tensors those called `different` are not the same on both sides, to the bit.
    """

    tokens: Tokens
    dtype: torch.dtype
    source: torch.Tensor
    written: torch.Tensor
    compared: int
    different: tuple[str, ...] = ()
    unrounded: torch.Tensor | None = None
    theirs: Theirs | None = None


def judge(computed: Computed, source: Source, *, untrained: bool) -> dict[str, Any]:
    """The findings, as JSON. Errors: `Failed` beyond a tolerance, for any weight that is not what it was, and for an imported model
    that has learnt nothing of English."""
    scale = max(1.0, float(computed.source.abs().max()))
    found: dict[str, Any] = {
        "token_ids": computed.tokens.ids.tolist(),
        "computed_in": _name(computed.dtype),
        "largest_logit": float(computed.source.abs().max()),
        "max_abs_logit_error": _difference(computed.source, computed.written),
        "tolerance": TOLERANCE[computed.dtype] * scale,
        "equal_tensors": computed.compared,
    }
    if computed.unrounded is not None:
        found["max_abs_logit_change_by_rounding"] = _difference(computed.unrounded, computed.source)
    _refuse(found["max_abs_logit_error"], found["tolerance"], "its own reader", _which(computed.different))
    if computed.different:
        raise Failed(f"what was written is not what the source holds{_which(computed.different)}")
    found["read_back_by"] = "self-consistent only"
    if computed.theirs is not None:
        error = _difference(computed.source, computed.theirs.logits)
        found["read_back_by"] = computed.theirs.reader
        found["reader_max_abs_logit_error"] = error
        found["reader_tolerance"] = INDEPENDENT_TOLERANCE * scale
        found["reader_tokenizer"] = computed.theirs.tokenizer
        _refuse(error, found["reader_tolerance"], computed.theirs.reader)
    return found | {"passage": _score(computed, source, untrained=untrained)}


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def _which(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"; other numbers were read back of {', '.join(names[:SHOWN])}{more}" if names else ""


def _refuse(error: float, tolerance: float, reader: str, why: str = "") -> None:
    if not error <= tolerance:
        raise Failed(
            f"what was written does not compute what the source does: logits differ by {error:.3g} "
            f"(tolerance {tolerance:.3g}) where {reader} reads it{why}"
        )


def _score(computed: Computed, source: Source, *, untrained: bool) -> dict[str, Any]:
    if source.is_native:
        return {"scored": False, "why": "the source is of Megalith's own"}
    if source.anew or not computed.tokens.scored:
        return {"scored": False, "why": source.anew or computed.tokens.why}
    loss, limit = passage_loss(computed.source, computed.tokens), most(source.config)
    if not loss <= limit and not untrained:
        raise Failed(
            f"its loss on English text is {loss:.2f}, guessing among all tokens gives {limit + 1:.2f}: the weights are not those "
            "of a trained model, were put together wrongly, or the tokenizer is another model's. If it is not meant to know "
            "English, or not trained: --untrained"
        )
    return {
        "scored": True,
        "text": PASSAGE,
        "tokens": computed.tokens.scored,
        "loss": loss,
        "limit": limit,
        "untrained": untrained,
    }


def document(
    source: Source,
    target: Mapping[str, Any],
    found: Mapping[str, Any],
    inputs: Mapping[str, FileRecord],
    outputs: Mapping[str, FileRecord],
    notices: Sequence[str],
) -> dict[str, Any]:
    """All of conversion.json. `target`: format, sizes, dtype, and the configuration as it was read back."""
    return {
        "format_version": FORMAT_VERSION,
        "source": {
            "format": source.kind,
            "path": str(source.folder),
            "dtype": _name(source.dtype),
            "config": source.config.model_dump(mode="json"),
            "provenance": dict(source.provenance),
            "files": _hashes(inputs),
        },
        "target": {**target, "files": _hashes(outputs)},
        **found,
        "notices": list(notices),
        "versions": {
            "megalith": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _hashes(records: Mapping[str, FileRecord]) -> dict[str, Any]:
    return {name: {"bytes": r.size, "sha256": r.sha256} for name, r in sorted(records.items())}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
