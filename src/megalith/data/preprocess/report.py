"""What a run tells people: lines while it works, and the summary at its end.

Knows numbers and columns. Refuses to know the terminal: whoever calls prints (`cli` has a bar for terminals).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from megalith.data.preprocess.publish import KeySummary
from megalith.data.preprocess.sources import Source
from megalith.data.preprocess.wire import Job

_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"
_FIRST_LINE_SECONDS = 2.0
_LINE_SECONDS = 2.0


@dataclass(frozen=True)
class Summary:
    """A finished run. `text_bytes` and `seconds` are of this process; `resumed_parts` were done before it."""

    keys: tuple[KeySummary, ...]
    lines: int
    blank: int
    rejected: int
    text_bytes: int
    seconds: float
    parts: int
    resumed_parts: int
    workers: int

    def details(self, key: KeySummary) -> dict[str, Any]:
        """What the side-car keeps: the same for every way of running."""
        return {
            "lines": self.lines,
            "blank_lines": self.blank,
            "rejected_lines": self.rejected,
            "empty_documents": key.empty,
            "duplicate_documents": key.duplicates,
            f"longest_{key.unit}": key.longest,
            "length_histogram": {str(1 << power): count for power, count in enumerate(key.histogram)},
        }


class Meter:
    """Counts what was done, for whoever shows it. Bytes are those of the files as stored, text bytes unpacked ones."""

    def __init__(self, sources: Sequence[Source], started: float) -> None:
        self._before = [0]
        for source in sources:
            self._before.append(self._before[-1] + source.size)
        self.started = started
        self.total = self._before[-1]
        self.done = 0
        self.first = -1
        self.text_bytes = 0
        self.documents = 0

    def update(self, job: Job, documents: int) -> None:
        if self.first < 0:
            self.first = self._before[job.source] + (job.start if not job.slot >= 0 else 0)
        self.done = self._before[job.source + 1] if job.last else self._before[job.source] + job.read
        self.text_bytes += job.stop - job.start
        self.documents = documents

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    @property
    def megabytes_per_second(self) -> float:
        return self.text_bytes / 1e6 / self.seconds

    @property
    def seconds_left(self) -> float:
        """At the speed so far."""
        done_here = max(self.done - max(self.first, 0), 1)
        return self.seconds * (self.total - self.done) / done_here


class PlainProgress:
    """Megatron's line, and how much is left, for logs: after every `log_interval` documents, two seconds apart at least."""

    def __init__(self, meter: Meter, log_interval: int, stream: TextIO | None = None) -> None:
        self._meter = meter
        self._log_interval = log_interval
        self._stream = stream or sys.stderr
        self._next = meter.started + _FIRST_LINE_SECONDS
        self._shown = 0

    def update(self, job: Job, documents: int) -> None:
        self._meter.update(job, documents)
        now = time.monotonic()
        if now < self._next or documents - self._shown < self._log_interval:
            return
        self._next, self._shown = now + _LINE_SECONDS, documents
        meter = self._meter
        print(
            f"Processed {documents} documents ({documents / meter.seconds:.1f} docs/s, "
            f"{meter.megabytes_per_second:.1f} MB/s), {100 * meter.done / max(meter.total, 1):.0f} %, "
            f"{duration(meter.seconds_left)} left",
            file=self._stream,
            flush=True,
        )


def duration(seconds: float) -> str:
    """`1:02:03`, `2:03`, `4 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe(summary: Summary) -> list[str]:
    """The summary, line by line."""
    lines: list[str] = []
    for key in summary.keys:
        lines += _describe_key(key)
    rate = summary.text_bytes / 1e6 / max(summary.seconds, 1e-9)
    workers = f"{summary.workers} worker" + "s" * (summary.workers != 1)
    lines.append(
        f"{summary.text_bytes / 1e6:,.1f} MB in {summary.seconds:.1f} s: {rate:.1f} MB/s with {workers}"
    )
    if summary.resumed_parts:
        lines.append(f"resumed: {summary.resumed_parts} of {summary.parts} parts were finished before")
    lines.append(
        f"lines {summary.lines:,}, of which {summary.blank:,} blank and {summary.rejected:,} rejected"
    )
    return lines


def _describe_key(key: KeySummary) -> list[str]:
    average = key.tokens / max(key.items, 1)
    sentences = [f"  sentences   {key.items:>14,}"] if key.unit == "sentence" else []
    lines = [
        f"{key.prefix}.bin, .idx",
        f"  documents   {key.documents:>14,}   (+ {key.empty:,} empty, left out)",
        *sentences,
        f"  tokens      {key.tokens:>14,}   ({average:,.1f} a {key.unit}, {key.longest:,} the longest)",
        f"  duplicates  {key.duplicates:>14,}   exact ({100 * key.duplicates / max(key.documents, 1):.1f} %)",
    ]
    return lines + ["    " + line for line in histogram(key.histogram, key.unit + "s")]


def histogram(counts: Sequence[int], units: str = "documents") -> list[str]:
    """Bars of documents or sentences by token count, a row for each power of two."""
    first = next((i for i, count in enumerate(counts) if count), 0)
    rows = []
    most = max(counts, default=0)
    for power in range(first, len(counts)):
        label = f"{1 << power:,} – {(2 << power) - 1:,}" if power else "1"
        rows.append((label, counts[power]))
    width = max((len(label) for label, _ in rows), default=0)
    digits = max((len(f"{count:,}") for _, count in rows), default=0)
    title = "tokens".rjust(width) + "  " + units.rjust(digits)
    return [title] + [
        f"{label:>{width}}  {count:>{max(digits, 9)},}  {_bar(count / most)}".rstrip()
        for label, count in rows
    ]


def _bar(share: float) -> str:
    eighths = round(share * _BAR * 8)
    if share and not eighths:
        eighths = 1
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
