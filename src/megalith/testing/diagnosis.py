"""From which numbers differ to what is probably missing: the list of differences of a layout, read from cause to effect.

    targets counted ▸ initial weights ▸ evaluation ▸ first loss ▸ gradients ▸ norm ▸ weights ▸ tokens
                                                                 └ which of them, and by a common factor?

Each finding presumes that everything before it agrees. Knows names of parameters and of axes; runs nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megalith.testing.parity import TOLERANCE, Difference
from megalith.topology.sizes import Sizes

PARTS_OF_A_SEQUENCE = re.compile(
    r"norm|(attention\.out|cross\.out|mlp\.down)\.bias$|^(\w+\.)?(position|type)_embedding|^lm_head"
)
"""Parameters that every tensor rank holds whole and applies to its own part of the sequence."""
TABLES = re.compile(r"(token|position)_embedding\.")
"""Parameters that stages at several places of a pipeline may hold."""
OF_THE_FIRST_POSITION = re.compile(r"^(pooler|binary_head)\.")
"""Parameters that see the first position alone, which one part of the sequence has."""


@dataclass(frozen=True)
class Cause:
    """A likely cause: a short name, and what to look at."""

    name: str
    text: str


def wrong(differences: Sequence[Difference], tolerance: float = TOLERANCE) -> list[Difference]:
    """Those that are not rounding, in the order of `compare`: the first is nearest to the cause."""
    return [difference for difference in differences if not difference.relative <= tolerance]


def diagnose(differences: Sequence[Difference], sizes: Sizes, tolerance: float = TOLERANCE) -> Cause | None:
    """What probably is missing; None when everything agrees."""
    differing = wrong(differences, tolerance)
    if not differing:
        return None
    names = {difference.name for difference in differing}
    first = {
        "counts": any(d.kind == "count" for d in differing),
        "initial": any(d.kind == "initial" for d in differing),
        "evaluation": any(re.fullmatch(r"evaluation .* before", name) for name in names),
        "loss": any(re.fullmatch(r"loss .* 0", name) for name in names),
        "gradients": any(d.kind == "gradient" for d in differing),
        "norm": "norm 0" in names,
        "weights": any(d.kind == "weight" for d in differing),
    }
    if first["counts"]:
        return Cause(
            "counts", "the number of targets of the data ranks, each counted once, before the first forward"
        )
    if first["initial"]:
        return Cause("initial", "the initial weights of a rank are not its slice of the whole model's")
    if first["evaluation"]:
        if first["loss"] and all(
            re.match(r"evaluation sop|loss (sop|loss) 0", name) for name in _early(names)
        ):
            return _FIRST_POSITION
        return _forward(sizes) if first["loss"] else _EVALUATION
    if first["loss"] or first["gradients"]:
        return _gradients(differences, differing, sizes, loss=first["loss"])
    if first["norm"]:
        text = "the gradient norm: squares not summed over the ranks that hold the rest, or replicas counted twice"
        return Cause("norm", text)
    if first["weights"]:
        text = "clipping or the update: gradients and norm agree, weights do not (weight decay groups, learning rate)"
        return Cause("update", text)
    return Cause("logits", "the logits behind the tokens: the gather of the vocabulary's parts")


_EVALUATION = Cause("evaluation", "the sum over ranks at the end of an evaluation; training agrees")


_FIRST_POSITION = Cause(
    "first position",
    "what is guessed from the first position, which one part of the sequence has: pooled by the tensor ranks from their own "
    "parts, counted on several context ranks, or its gradients added up though every tensor rank has all of them",
)


def _early(names: set[str]) -> list[str]:
    """Those of evaluations before the training, and of its first loss."""
    return [name for name in names if re.fullmatch(r"evaluation .* before|loss .* 0", name)]


def _forward(sizes: Sizes) -> Cause:
    parts = []
    if sizes.tensor > 1:
        parts.append(
            "a sum or gather over the tensor ranks in a layer, in the token table or in the cross entropy"
        )
    if sizes.context > 1:
        parts.append(
            "the keys and values gathered over the context ranks (a decoder's of its encoder, too), their order, their "
            "padding, and which tokens, types and places a rank has"
        )
    if sizes.pipeline > 1:
        parts.append("which layers a stage has, and what passes between stages")
    if sizes.data > 1:
        parts.append("which samples a data rank has, and gathered weights")
    return Cause("forward", "the forward pass: " + "; ".join(parts))


def _gradients(
    differences: Sequence[Difference], differing: Sequence[Difference], sizes: Sizes, *, loss: bool
) -> Cause:
    """The first step of training differs, while an evaluation with the same weights agrees."""
    known = [
        d for d in differences if d.kind == "gradient" and not (d.factor is not None and math.isnan(d.factor))
    ]
    bad = [d for d in differing if d.kind == "gradient"]
    names = [d.name.partition(" ")[2] for d in bad]
    if loss and not bad:
        return Cause(
            "reported loss", "the loss that a step reports is not summed over the ranks; its gradients agree"
        )
    factors = {round(d.factor, 6) for d in known if d.factor is not None}
    if len(bad) == len(known) and len(factors) == 1 and all(d.factor is not None for d in known):
        return _division(factors.pop(), sizes)
    if loss:
        text = "dropout masks that depend on the layout, or the division of the loss: training differs, evaluation agrees"
        return Cause("training", text)
    tables = [name.startswith("token_embedding") for name in names]
    if all(tables) or (any(tables) and all(TABLES.match(name) for name in names)):
        text = "the tied token table, or positions that both sides read: the stages that hold it do not add up their gradients"
        return Cause("tied", text)
    if all("relative_bias." in name for name in names):
        text = "the relative bias: its gradient is not summed over the stages that share it, or over the data and context ranks"
        return Cause("relative bias", text)
    if all(OF_THE_FIRST_POSITION.search(name) for name in names):
        return _FIRST_POSITION
    if sizes.tensor > 1 and all(PARTS_OF_A_SEQUENCE.search(name) for name in names):
        text = "sequence parallelism: gradients of what sees a part of the sequence are not summed over the tensor ranks"
        return Cause("sequence", text)
    return _backward(names, all_of_them=len(bad) == len(known), sizes=sizes)


def _division(factor: float, sizes: Sizes) -> Cause:
    averaged = sizes.copies > 1 and math.isclose(factor, 1 / sizes.copies, rel_tol=1e-5)
    how = (
        f"averaged instead of summed over the {_copies(sizes)} ranks"
        if averaged
        else "divided twice, or not at all"
    )
    return Cause("division", f"a division: every gradient is {factor:.6g} times what it should be: {how}")


def _copies(sizes: Sizes) -> str:
    """The axes over which a gradient is summed."""
    return " and ".join(axis for axis in ("data", "context") if getattr(sizes, axis) > 1)


def _backward(names: Sequence[str], *, all_of_them: bool, sizes: Sizes) -> Cause:
    parts = []
    if sizes.copies > 1 and all_of_them:
        parts.append(
            f"gradients not summed over the {_copies(sizes)} ranks, or not those of all micro-batches"
        )
    if sizes.context > 1:
        parts.append("gradients of keys and values not summed over the context ranks")
    if sizes.tensor > 1:
        parts.append(
            "a gradient not summed over the tensor ranks where it leaves a parallel region (copy, gather)"
        )
    if sizes.pipeline > 1:
        parts.append("gradients of activations between stages, or a micro-batch without its backward")
    where = f" (going backwards, {names[-1]} is the first)" if names else ""
    return Cause("backward", "the backward pass: " + ("; ".join(parts) or "one of its sums") + where)
