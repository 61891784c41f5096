"""What becomes of each key that NeMo's files and command lines hold: the tables of the sections themselves, as Markdown.

Knows where the tables are; says nothing of its own. A test holds docs/nemo_python.md against it.
"""

from __future__ import annotations

from collections.abc import Iterator

from megalith.config.schema import ForeignKey, Section
from megalith.config.tree import section_of
from megalith.tasks.pretrain_config import ROOTS

HEADS = {
    "renamed": "Means something under another name, or in other words",
    "ignored": "Accepted without effect (one notice)",
    "refused": "Refused, for going on would be something else",
}
Row = tuple[str, str, str]
"""What becomes of it, its dotted name, why."""


def rows() -> list[Row]:
    """Every foreign key of every family's configuration, once."""
    found: dict[tuple[str, str], Row] = {}
    for root in ROOTS.values():
        for name, key in _keys(root, ""):
            found.setdefault((name, key.note), (key.action, name, key.note))
    return list(found.values())


def _keys(section: type[Section], prefix: str) -> Iterator[tuple[str, ForeignKey]]:
    for name, key in section.foreign_keys.items():
        yield f"{prefix}{name}", key
    for name, info in section.model_fields.items():
        if (inner := section_of(info.annotation)) is not None:
            yield from _keys(inner, f"{prefix}{name}.")


def tables() -> str:
    """A table for each thing that may become of a key; keys with the same reason share a row."""
    parts = []
    for action, head in HEADS.items():
        reasons: dict[str, list[str]] = {}
        for kind, name, note in rows():
            if kind == action:
                reasons.setdefault(note, []).append(name)
        lines = [f"| {_named(names)} | {note.replace('|', '/')} |" for note, names in reasons.items()]
        parts.append("\n".join([f"### {head}", "", "| key | why |", "| --- | --- |", *lines]))
    return "\n\n".join(parts) + "\n"


def _named(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
