"""A plan as a picture: what it is, memory against the device, what is sent, how long it takes. Words and bars; no arithmetic.

The same on a terminal and in a file, but for the colours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megalith.tools.plan.plan import Plan
from megalith.tools.plan.rehearsal import PARTS
from megalith.tools.plan.remedies import Remedy
from megalith.tools.plan.speed import STEP_TIME
from megalith.topology.traffic import GATHER, SCATTER, SEND, SUM

COLOURS = dict(zip(PARTS, ("blue", "cyan", "magenta", "bright_blue", "bright_black", "green", "yellow", "bright_yellow", "white", "bright_red"), strict=True))  # fmt: skip
NAMES, BAR = 23, 28
"""Columns of the names, and of a bar that is as long as the device has memory."""
WORDS = {SUM: "sums", GATHER: "gathers", SCATTER: "scatters", SEND: "sends"}
MARKS = {"fits": "green", "tight": "yellow", "does not fit": "red"}


def show(plan: Plan, offered: Sequence[Remedy], console: Console) -> None:
    """Print it."""
    console.print(picture(plan, offered))


def picture(plan: Plan, offered: Sequence[Remedy]) -> RenderableType:
    """All of it."""
    parts: list[RenderableType] = [_rows("Plan", _head(plan)), _memory(plan), Group(*_verdict(plan, offered))]
    parts += [_exchange(plan)] if plan.exchange else []
    parts.append(_rows("Time", _time_rows(plan)))
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts[:-1]), parts[-1])


def _rows(title: str, rows: Iterable[tuple[str, str | Text]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(title, no_wrap=True, min_width=NAMES)
    table.add_column("")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _head(plan: Plan) -> Iterator[tuple[str, str | Text]]:
    model, case, batch, sizes = plan.model, plan.case, plan.batch, plan.sizes
    heads = f"{model.num_attention_heads} heads"
    if model.kv_heads != model.num_attention_heads:
        heads += f" on {model.kv_heads} of keys and values"
    yield (
        "model",
        Text.assemble(
            (f"{_count(plan.parameters)} parameters", "bold"),
            f": {' + '.join(map(str, model.depths))} layers, width {model.hidden_size:,}, {heads}, vocabulary {model.vocab_size:,}"
            + ("" if plan.vocabulary == "model.vocab_size" else f" ({plan.vocabulary})"),
        ),
    )
    name = plan.device.name if plan.device.is_gpu else "processes"
    yield (
        "devices",
        Text.assemble((f"{sizes.world:,} × {name}", "bold"), f": {sizes.describe()}")
        if (sizes.world > 1)
        else Text(plan.device.name, "bold"),
    )
    yield "numbers", f"{case.precision}; {_recomputation(plan)}"
    each = f"{batch.micro_batches:,} micro-batch{'es' * (batch.micro_batches > 1)} of {case.micro_batch}"
    where = f" on each of {sizes.data} data-parallel ranks" if sizes.data > 1 else ""
    yield (
        "step",
        Text.assemble(
            (f"{_count(batch.tokens)} tokens", "bold"),
            f": {batch.samples:,} samples of {case.length:,}"
            + (f" + {case.decoder_length:,}" if case.decoder_length else "")
            + f", {each}{where}",
        ),
    )


def _recomputation(plan: Plan) -> str:
    how = plan.case.recompute
    if how is None:
        return "nothing is computed twice"
    if how.granularity == "selective":
        return "attention is recomputed"
    return f"{'all layers are' if how.method == 'uniform' else f'{how.layers} layers a stage are'} recomputed"


# -- memory ----------------------------------------------------------------------------------------------------------


def _memory(plan: Plan) -> Table:
    """The fullest process's parts one behind the other, as a staircase; the line is where the device ends."""
    several, worst, size = len(plan.estimates) > 1, plan.worst, _unit(plan)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(f"Memory, {size.name}", no_wrap=True, min_width=NAMES)
    for found in plan.estimates:
        fullest = found is worst
        title = Text(f"rank {found.stage}" if several else "", "bold" if fullest else "dim")
        table.add_column(title, justify="right", no_wrap=True, style="" if fullest else "dim")
    table.add_column("", no_wrap=True)
    begin = 0
    for part in PARTS:
        if any(found.peak[part] for found in plan.estimates):
            bar = _bar(plan, begin, worst.peak[part], COLOURS[part])
            table.add_row(part, *(size(found.peak[part]) for found in plan.estimates), bar)
            begin += worst.peak[part]
    total = _bar(plan, 0, worst.total, MARKS[plan.verdict])
    table.add_row(
        Text("at its fullest", "bold"), *(Text(size(f.total), "bold") for f in plan.estimates), total
    )
    table.add_row(Text("between steps", "dim"), *(Text(size(f.resting), "dim") for f in plan.estimates), "")
    if any(found.in_flight > 1 for found in plan.estimates):
        name = Text("micro-batches in flight", "dim")
        table.add_row(name, *(Text(str(found.in_flight), "dim") for found in plan.estimates), "")
    return table


def _bar(plan: Plan, begin: int, size: int, colour: str) -> Text:
    scale = BAR / max(plan.device.memory if _near(plan) else 0, plan.worst.total, 1)
    first, last, wall = (round(n * scale) for n in (begin, begin + size, plan.device.memory))
    cells = [("█", colour) if first <= i < last else (" ", "") for i in range(BAR + 1)]
    if size and first == last:
        cells[min(first, BAR)] = ("▏", colour)
    if wall <= BAR and cells[wall][0] == " ":
        cells[wall] = ("│", "dim")
    return Text.assemble(*cells)


def _near(plan: Plan) -> bool:
    """Would a bar be seen at all beside the device's memory?"""
    return plan.worst.total > 0.1 * plan.device.memory


@dataclass(frozen=True)
class Unit:
    """Bytes as numbers in one unit."""

    name: str
    size: int

    def __call__(self, number: float) -> str:
        value = number / self.size
        return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _unit(plan: Plan) -> Unit:
    return Unit("GiB", 2**30) if plan.need >= 2**30 else Unit("MiB", 2**20)


def _verdict(plan: Plan, offered: Sequence[Remedy]) -> Iterator[RenderableType]:
    size, own = Unit("GiB", 2**30), _unit(plan)
    share = f" ({plan.need / plan.device.memory:.1%})" if plan.device.memory else ""
    need = size(plan.need) if own == size else f"{own(plan.need)} {own.name}"
    of = f"{need} of the {size(plan.device.memory)} GiB of {plan.device.name}{share}"
    where = (
        f", on pipeline rank {plan.worst.stage} of {plan.sizes.pipeline}" if plan.sizes.pipeline > 1 else ""
    )
    more = ". Driver, NCCL and fragmentation need some, too" if plan.verdict == "tight" else ""
    host = "; weights, gradients and optimizer state are in the host's memory" if plan.sizes.offload else ""
    yield Text(f"{plan.verdict.capitalize()}: {of}{where}, in the {plan.worst.phase}{host}{more}.", f"bold {MARKS[plan.verdict]}")  # fmt: skip
    for remedy in offered:
        verb = "fits with" if remedy.fits else "still too much with"
        yield Text.assemble("  ", (f"{size(remedy.need):>6} GiB", "bold"), f"  {verb}  ", (" ".join(remedy.keys), "cyan"))  # fmt: skip
    if offered and not offered[0].fits:
        yield Text("  It needs more devices, or larger ones.")


# -- exchange and time -------------------------------------------------------------------------------------------------


def _exchange(plan: Plan) -> Table:
    size = Unit("GiB", 2**30) if max(row.size for row in plan.exchange) >= 2**30 else Unit("MiB", 2**20)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(f"Sent in a step, {size.name}", no_wrap=True, min_width=NAMES)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", style="dim")
    for row in plan.exchange:
        kinds = [
            WORDS.get(kind, kind)
            for (axis, kind), n in sorted(plan.worst.sent.items())
            if axis == row.axis and n
        ]
        time = f"; {_seconds(row.seconds)} at {row.over}" if row.seconds is not None else ""
        table.add_row(row.axis, size(row.size), f"{', '.join(kinds)}{time}")
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
        f"= {plan.flops.hardware * plan.batch.tokens:.4g} ÷ ({plan.sizes.world:,} × {peak / 1e12:g} TFLOP/s × "
        f"{found.value:.1%}) × (1 + {plan.bubble:.3f})", "dim",
    )  # fmt: skip
    yield "efficiency", f"{found.value:.1%}: {found.source}"
    if found.slowest is not None and found.fastest is not None:
        low, high = seconds / (1 + found.fastest), seconds / (1 + found.slowest)
        yield (
            "spread",
            (
                f"{_seconds(low)} to {_seconds(high)}: those runs are {found.slowest:+.0%} to {found.fastest:+.0%} as fast"
            ),
        )
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


def _count(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return f"{number:,.0f}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _days(seconds: float) -> str:
    if seconds >= 172800:
        return f"{seconds / 86400:.1f} days"
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds / 60:.1f} minutes"
