"""A small tree of sections for tests of `config` alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from megalith.config.schema import (
    ForeignKey,
    Section,
    error,
    ignored,
    refused,
    renamed,
    setting,
    translated,
    warning,
)
from megalith.errors import Problem


class Sched(Section):
    """The schedule."""

    name: Literal["Cosine", "Linear"] = setting("Cosine", "Shape.")
    warmup_steps: int | None = setting(None, "Warm-up.", unit="steps", ge=0)


class Optim(Section):
    """The optimizer."""

    lr: float = setting(1e-4, "Peak learning rate.", gt=0)
    betas: tuple[float, float] = setting((0.9, 0.98), "Moments.")
    sched: Sched = setting(Sched, "Schedule.")


class Data(Section):
    """The data."""

    prefix: list[str | float] = setting(..., "Token files.", examples=[["a"]])
    length: int | None = setting(None, "Tokens of a sample.", unit="tokens")


class Scaling(Section):
    """May be absent."""

    factor: float = setting(..., "How much.", ge=1)


def _mode(value: Any) -> dict[str, Any]:
    if value not in (1, 2):
        raise ValueError(f"there is no mode {value}")
    return {"width": 100 * value}


class Model(Section):
    """The model."""

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = {
        "old_width": renamed("width", "is called width here"),
        "learning_rate": renamed("model.optim.lr", "is called model.optim.lr here"),
        "mode": translated("is a width here", _mode),
        "hint": translated("hints at a width", lambda v: {"width": v}, weak=True),
        "dead": ignored("nothing reads it"),
        "quiet": ignored("nothing reads it", silent=True),
        "harmful": refused("it would do something else", harmless=(0,)),
    }

    width: int = setting(768, "Width.", unit="channels", gt=0, le=100000)
    heads: int = setting(12, "Heads.", gt=0)
    rate: float = setting(0.1, "Dropout.", ge=0, lt=1)
    kind: Literal["gelu", "swiglu"] | None = setting(None, "Activation.")
    flag: bool = setting(False, "A switch.")
    free: dict[str, Any] = setting(dict, "Anything.")
    preset: str | None = setting(None, "A shape.")
    scaling: Scaling | None = setting(None, "Scaling.")
    data: Data = setting(Data, "Data.")
    optim: Optim = setting(Optim, "Optimizer.")

    @field_validator("preset")
    @classmethod
    def _preset(cls, value: str | None) -> str | None:
        if value not in (None, "big"):
            raise ValueError(f"there is no preset {value}\nfix: big")
        return value

    @classmethod
    def implied(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"width": 1200, "heads": 20} if values.get("preset") == "big" else {}

    def problems(self) -> Iterable[Problem]:
        if self.width % self.heads:
            yield error("width", f"{self.width} does not divide into {self.heads} heads", "model.heads=1")
        if self.optim.lr > 1:
            yield warning("optim.lr", f"{self.optim.lr:g} is large", "a thousandth")


class Trainer(Section):
    """The trainer."""

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = {
        "gpus": renamed("devices", "is called trainer.devices here")
    }

    devices: int | str = setting("auto", "Devices.")
    max_steps: int = setting(100, "Length.", unit="steps", ge=1)


class Logs(Section):
    """May be switched off by null."""

    null_means: ClassVar[Mapping[str, Any] | None] = {"on": False}

    on: bool = setting(True, "Switch.")
    name: str | None = setting(None, "Name.")


class Root(Section):
    """Everything."""

    foreign_keys: ClassVar[Mapping[str, ForeignKey]] = {"hydra": ignored("there is no Hydra")}

    name: str = setting("toy", "Name.")
    trainer: Trainer = setting(Trainer, "Trainer.")
    logs: Logs = setting(Logs, "Logs.")
    model: Model = setting(Model, "Model.")

    def problems(self) -> Iterable[Problem]:
        if self.model.data.length and self.model.data.length > 10 * self.trainer.max_steps:
            yield error("trainer.max_steps", f"is too small for length {self.model.data.length}")
