"""A plan as a picture: what it is, memory against the device, what is sent, how long it takes. Words and bars; no arithmetic.

The same on a terminal and in a file, but for the colours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megalith.tools.plan.estimate import Estimate
from megalith.tools.plan.plan import Plan
from megalith.tools.plan.rehearsal import ACTIVATIONS, PARTS
from megalith.tools.plan.remedies import Remedy
from megalith.tools.plan.speed import STEP_TIME
from megalith.topology.traffic import GATHER, SCATTER, SEND, SUM

GIB = 2**30
COLOURS = dict(zip(PARTS, ("blue", "cyan", "magenta", "bright_blue", "bright_black", "green", "yellow", "bright_yellow", "white"), strict=True))  # fmt: skip
BAR = 24
WORDS = {SUM: "sums", GATHER: "gathers", SCATTER: "scatters", SEND: "sends"}
MARKS = {"fits": "green", "tight": "yellow", "does not fit": "red"}


def show(plan: Plan, offered: Sequence[Remedy], console: Console) -> None:
    """Print it."""
    console.print(picture(plan, offered))


def picture(plan: Plan, offered: Sequence[Remedy]) -> RenderableType:
    """All of it."""
    parts: list[RenderableType] = [Padding(Group(*_head(plan)), (0, 0, 1, 0)), _memory(plan)]
    parts += [Padding(Group(*_verdict(plan, offered)), (1, 0, 0, 0))]
    if plan.exchange:
        parts.append(Padding(_exchange(plan), (1, 0, 0, 0)))
    parts.append(Padding(_time(plan), (1, 0, 0, 0)))
    return Group(*parts)


def _head(plan: Plan) -> Iterator[Text]:
    model, case, batch = plan.model, plan.case, plan.batch
    heads = f"{model.num_attention_heads} heads"
    if model.kv_heads != model.num_attention_heads:
        heads += f" on {model.kv_heads} key-value heads"
    yield Text.assemble(
        (f"{_count(plan.parameters)} parameters", "bold"),
        f"   {model.num_layers} layers, width {model.hidden_size:,}, {heads}, vocabulary {model.vocab_size:,}"
        f" ({plan.vocabulary})",
    )
    world = plan.sizes.world
    yield Text.assemble(
        (
            f"{world:,} × {plan.device.name}"
            if plan.device.is_gpu
            else f"{world} process{'es' * (world > 1)}",
            "bold",
        ),
        f"   {plan.sizes.describe()}" if world > 1 else "",
        f"   {case.precision}, {_recomputation(plan)}",
    )
    yield Text.assemble(
        (f"{batch.samples:,} samples of {case.length:,} tokens a step", "bold"),
        f"   {_count(batch.tokens)} tokens: {batch.micro_batches} micro-batches of {case.micro_batch} on each of "
        f"{plan.sizes.data} data-parallel ranks",
    )


def _recomputation(plan: Plan) -> str:
    how = plan.case.recompute
    if how is None:
        return "nothing recomputed"
    if how.granularity == "selective":
        return "attention recomputed"
    return f"{'all layers' if how.method == 'uniform' else f'{how.layers} layers a stage'} recomputed"


# -- memory ----------------------------------------------------------------------------------------------------------


def _memory(plan: Plan) -> Table:
    several, worst = len(plan.estimates) > 1, plan.worst
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(Text("Memory at its fullest, GiB"), no_wrap=True)
    for found in plan.estimates:
        fullest = several and found is worst
        title = Text(f"rank {found.stage}" if several else "", "bold" if fullest else "dim")
        table.add_column(title, justify="right", no_wrap=True, style="" if fullest or not several else "dim")
    table.add_column("", no_wrap=True)
    for part in PARTS:
        if any(found.peak[part] for found in plan.estimates):
            note = f" ({worst.in_flight} in flight)" if part == ACTIVATIONS and worst.in_flight > 1 else ""
            bar = _bar(worst.peak[part], max(plan.device.memory, plan.need), COLOURS[part])
            table.add_row(part + note, *(_gib(found.peak[part]) for found in plan.estimates), bar)
    total = _bar(plan.need, max(plan.device.memory, plan.need), MARKS[plan.verdict])
    table.add_row(Text("all", "bold"), *(Text(_gib(found.total), "bold") for found in plan.estimates), total)
    table.add_row(Text("between steps", "dim"), *(Text(_gib(f.resting), "dim") for f in plan.estimates), "")
    return table


def _bar(size: int, whole: int, colour: str) -> Text:
    eighths = round(size / whole * BAR * 8) if whole else 0
    full, rest = divmod(eighths, 8)
    drawn = "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")
    return Text.assemble((drawn or ("▏" if size else ""), colour))


def _verdict(plan: Plan, offered: Sequence[Remedy]) -> Iterator[RenderableType]:
    memory, need = plan.device.memory, plan.need
    of = f"{_gib(memory)} GiB of {plan.device.name}"
    share = f"{need / memory:.0%}" if memory else "?"
    where = f" on pipeline rank {plan.worst.stage} of {plan.sizes.pipeline}, in the {plan.worst.phase}" if len(plan.estimates) > 1 else ""  # fmt: skip
    said = {
        "fits": f"Fits: {_gib(need)} of {of}, {share}{where}.",
        "tight": f"Tight: {_gib(need)} of {of}, {share}{where}. Driver, NCCL and fragmentation need some, too.",
        "does not fit": f"Does not fit: {_gib(need)} of {of}, {share}{where}.",
    }[plan.verdict]
    yield Text(said, f"bold {MARKS[plan.verdict]}")
    for remedy in offered:
        verb = "would fit with" if remedy.fits else "still too much with"
        yield Text.assemble(
            "  ", (f"{_gib(remedy.need)} GiB", "bold"), f"  {verb}  ", (" ".join(remedy.keys), "cyan")
        )
    if offered and not offered[0].fits:
        yield Text("  It needs more devices, or larger ones.")


# -- exchange and time -------------------------------------------------------------------------------------------------


def _exchange(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("Sent in a step, GiB", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("")
    for row in plan.exchange:
        kinds = [WORDS.get(kind, kind) for (axis, kind), size in sorted(plan.worst.sent.items()) if axis == row.axis and size]  # fmt: skip
        time = (
            f"; {_seconds(row.seconds)} at {row.over}, were nothing else done"
            if row.seconds is not None
            else ""
        )
        table.add_row(row.axis, _gib(row.size), Text(f"{', '.join(kinds)}{time}", "dim"))
    return table


def _time(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("Time", no_wrap=True)
    table.add_column("")
    for name, value in _time_rows(plan):
        table.add_row(name, value)
    return table


def _time_rows(plan: Plan) -> Iterator[tuple[str, str | Text]]:
    tokens, flops, sizes = plan.batch.tokens, plan.flops, plan.sizes
    yield (
        "FLOPs a step",
        f"model {flops.model * tokens:.4g}, hardware {flops.hardware * tokens:.4g}"
        + (" (with recomputation)" if plan.case.recompute else ""),
    )
    if sizes.pipeline > 1:
        yield "bubble", f"{plan.bubble:.1%}: idle ÷ working time of the {sizes.schedule} pipeline"
    if plan.seconds is not None and plan.peak is not None:
        yield from _predicted(plan, plan.seconds, plan.peak)
    elif plan.measured is None:
        yield "step", "not predicted: no peak is known; --device names a GPU"
    if plan.measured is not None:
        yield from _measured(plan, plan.measured)


def _predicted(plan: Plan, seconds: float, peak: float) -> Iterator[tuple[str, str | Text]]:
    found = plan.efficiency
    yield "predicted", Text.assemble((f"{_seconds(seconds)} a step", "bold"), f" = {STEP_TIME}")
    yield "", Text(
        f"{plan.flops.hardware * plan.batch.tokens:.4g} ÷ ({plan.sizes.world:,} × {peak / 1e12:g} TFLOP/s × "
        f"{found.value:.1%}) × (1 + {plan.bubble:.3f})", "dim",
    )  # fmt: skip
    yield "efficiency", f"{found.value:.1%}, from {found.source}" if found.source != "--efficiency" else f"{found.value:.1%}, as given"  # fmt: skip
    if found.slowest is not None and found.fastest is not None:
        low, high = seconds / (1 + found.fastest), seconds / (1 + found.slowest)
        yield "spread", f"{_seconds(low)} to {_seconds(high)}: as far as those runs lie from it ({found.slowest:+.0%} to {found.fastest:+.0%} in speed)"  # fmt: skip
    yield from _speeds(plan, seconds)


def _measured(plan: Plan, seconds: float) -> Iterator[tuple[str, str | Text]]:
    yield "measured", Text(f"{_seconds(seconds)} a step (--step-time)", "bold")
    yield from _speeds(plan, seconds)


def _speeds(plan: Plan, seconds: float) -> Iterator[tuple[str, str | Text]]:
    done = plan.achieved(seconds)
    for name, value, use in (("hardware", done.hardware, "HFU"), ("model", done.model, "MFU")):
        share = f", {value / plan.peak:.1%} {use}" if plan.peak else ""
        yield "", f"{value / 1e12:.1f} {name} TFLOP/s a device{share}"
    rate = plan.batch.tokens / seconds
    yield (
        "run",
        (
            f"{plan.batch.steps:,} steps, {_count(plan.batch.run_tokens)} tokens at {_count(rate)} a second: "
            f"{_days(plan.run_seconds(seconds))}"
        ),
    )


# -- words --------------------------------------------------------------------------------------------------------------


def _gib(size: float) -> str:
    value = size / GIB
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.005 or not size else "0.00"  # fmt: skip


def _count(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return f"{number:.4g}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _days(seconds: float) -> str:
    if seconds >= 172800:
        return f"{seconds / 86400:.1f} days"
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds / 60:.1f} minutes"


def as_json(plan: Plan, offered: Sequence[Remedy]) -> dict[str, object]:
    """Everything, as plain values: bytes, seconds, FLOPs."""
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
