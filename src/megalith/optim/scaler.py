"""Loss scaling for fp16: the dynamic rule with hysteresis, and a constant.

Knows one number and when to change it. Knows no tensor: the engine multiplies the loss, divides the gradients and says
whether they were finite.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class ConstantScaler:
    """A scale that never changes (1.0: none). Overflow still skips the step."""

    scale: float = 1.0

    def update(self, found_nonfinite: bool) -> None:
        """Nothing to do; here so that both scalers are used alike."""

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The configured scale wins: there is nothing to restore."""


@dataclass
class DynamicScaler:
    """Halves after `hysteresis` steps with non-finite gradients, doubles after `growth_interval` clean ones.

    Megatron-LM's rule: every bad step lowers a counter that only a whole clean interval refills. So with hysteresis 2 the first
    bad step changes nothing and each one after it halves the scale, until `growth_interval` clean steps in a row.
    """

    initial: float = 2.0**32
    growth_interval: int = 1000
    hysteresis: int = 2
    minimum: float = 1.0
    scale: float = field(init=False)
    clean: int = field(init=False, default=0)
    patience: int = field(init=False)

    def __post_init__(self) -> None:
        self.scale = float(self.initial)
        self.patience = self.hysteresis

    def update(self, found_nonfinite: bool) -> None:
        """Account for one step."""
        if found_nonfinite:
            self.clean = 0
            self.patience -= 1
            if self.patience <= 0:
                self.scale = max(self.scale / 2, self.minimum)
            return
        self.clean += 1
        if self.clean == self.growth_interval:
            self.clean = 0
            self.patience = self.hysteresis
            self.scale *= 2

    def state_dict(self) -> dict[str, Any]:
        """JSON: the scale and both counters (the settings come from the config)."""
        return {key: asdict(self)[key] for key in ("scale", "clean", "patience")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; a checkpoint of a run without a dynamic scale has no counters."""
        self.scale = float(state["scale"])
        self.clean = int(state.get("clean", 0))
        self.patience = int(state.get("patience", self.hysteresis))


Scaler = ConstantScaler | DynamicScaler


def make_scaler(
    precision: str,
    *,
    constant: float | None = None,
    initial: float = 2.0**32,
    growth_interval: int = 1000,
    hysteresis: int = 2,
    minimum: float = 1.0,
) -> Scaler:
    """The scaler of a precision: dynamic for `16-mixed` unless `constant` is given; 1.0 for the others unless it is."""
    if precision != "16-mixed" or constant is not None:
        return ConstantScaler(1.0 if constant is None else float(constant))
    return DynamicScaler(initial, growth_interval, hysteresis, minimum)
