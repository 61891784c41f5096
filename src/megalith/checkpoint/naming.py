"""Names of checkpoints from a template such as `megatron_gpt--{val_loss:.2f}-{step}-{consumed_samples}`.

Knows Lightning's and NeMo's rule: each field becomes `metric=value`; the last checkpoint has `-last` behind. Names are for
people: no number is ever read back out of one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter

LAST = "-last"
WHOLE = ("step", "epoch")
"""Fields that are whole numbers; all others are not, consumed_samples among them (`8000.0`, as NeMo writes it)."""
_NUMBER = r"[-+]?([-+\d.,e%_ ]+|nan%?|inf%?)"


@dataclass(frozen=True)
class Template:
    """A `filename` template, checked when it is made (`ValueError` says what is wrong with it)."""

    text: str

    def __post_init__(self) -> None:
        if not self.text or "\0" in self.text or self.text.startswith("."):
            raise ValueError(f"{self.text!r} cannot be the name of a file")
        for literal, metric, spec, conversion in self._parts():
            if "/" in literal:
                raise ValueError(f"{self.text!r} would lead into another folder")
            if metric == "":
                raise ValueError(f"{self.text!r} has a field without a name")
            if conversion:
                raise ValueError(f"{self.text!r}: write {{{metric}:…}} without !{conversion}")
            if metric is not None:
                format(1 if metric in WHOLE else 1.0, spec or "")

    def _parts(self) -> list[tuple[str, str | None, str | None, str | None]]:
        return list(Formatter().parse(self.text))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names in the fields, in order."""
        return tuple(metric for _, metric, _, _ in self._parts() if metric)

    def name(self, values: Mapping[str, float]) -> str:
        """The template filled in. A value that is not known is written as `nan`: never as a number that looks like one."""
        out = ""
        for literal, metric, spec, _ in self._parts():
            out += literal
            if metric is not None:
                out += f"{metric}={format(values.get(metric, float('nan')), spec or '')}"
        return out.replace("/", "_")

    def matches(self, name: str) -> bool:
        """Whether this template can have made `name`, with `-last` or the number of a clash (`-v1`) behind or without."""
        pattern = ""
        for literal, metric, _, _ in self._parts():
            pattern += re.escape(literal.replace("/", "_"))
            if metric is not None:
                pattern += re.escape(metric.replace("/", "_")) + "=" + _NUMBER
        return re.fullmatch(rf"{pattern}(-v\d+)?({LAST})?", name) is not None
