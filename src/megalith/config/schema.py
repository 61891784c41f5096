"""The base of every config section, and the way a field says what it means.

A section is a frozen pydantic model that refuses unknown keys. Its fields are made by `setting`, which carries the
meaning and the unit that `megalith explain` prints. Knows no section of its own: each lives with its owner.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen config section. Unknown keys are refused; `compose` turns that into a did-you-mean."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=False, arbitrary_types_allowed=False
    )


def setting(default: Any = ..., meaning: str = "", *, unit: str = "", **constraints: Any) -> Any:
    """A field of a section.

    `default` is the value (omit it for a mandatory key, `???` in YAML), `meaning` one sentence, `unit` what a number
    counts ("steps", "samples", "tokens", "minutes"). `constraints` go to pydantic (`gt`, `ge`, `le`, `examples`, …).
    A mutable default (list, dict, section class) is copied for each instance.
    """
    extra: Any = {"unit": unit} if unit else None
    if callable(default) and default is not ...:
        return Field(default_factory=default, description=meaning, json_schema_extra=extra, **constraints)
    return Field(default, description=meaning, json_schema_extra=extra, **constraints)
