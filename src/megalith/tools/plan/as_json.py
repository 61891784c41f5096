"""A plan as plain values for a file: bytes, seconds, FLOPs."""

from __future__ import annotations

from collections.abc import Sequence

from megalith.tools.plan.estimate import Estimate
from megalith.tools.plan.plan import Plan
from megalith.tools.plan.rehearsal import PARTS
from megalith.tools.plan.remedies import Remedy


def as_json(plan: Plan, offered: Sequence[Remedy]) -> dict[str, object]:
    """Everything, in the order in which it is shown."""
    seconds, case = plan.measured or plan.seconds, plan.case
    done = plan.achieved(seconds) if seconds else None
    return {
        "parameters": plan.parameters,
        "vocabulary": {"size": plan.model.vocab_size, "from": plan.vocabulary},
        "layout": plan.sizes.describe(),
        "processes": plan.sizes.world,
        "precision": case.precision,
        "device": {"name": plan.device.name, "memory": plan.device.memory, "source": plan.device.source},
        "verdict": plan.verdict,
        "need": plan.need,
        "worst_rank": plan.worst.stage,
        "ranks": [_rank(found) for found in plan.estimates],
        "batch": {**vars(plan.batch), "micro_batch_size": case.micro_batch},
        "flops_per_step": {k: getattr(plan.flops, k) * plan.batch.tokens for k in ("model", "hardware")},
        "bubble": plan.bubble,
        "efficiency": vars(plan.efficiency),
        "predicted_step_seconds": plan.seconds,
        "measured_step_seconds": plan.measured,
        "tflops_per_device": {k: getattr(done, k) / 1e12 for k in ("model", "hardware")} if done else None,
        "run_seconds": plan.run_seconds(seconds) if seconds else None,
        "remedies": [vars(remedy) for remedy in offered],
    }


def _rank(found: Estimate) -> dict[str, object]:
    sent = {f"{axis} {operation}": size for (axis, operation), size in sorted(found.sent.items())}
    return {
        "pipeline_rank": found.stage,
        "peak": {part: found.peak[part] for part in PARTS},
        "peak_total": found.total,
        "between_steps": dict(found.rest),
        "activations_of_a_micro_batch": found.kept,
        "in_flight": found.in_flight,
        "sent_per_step": sent,
    }
