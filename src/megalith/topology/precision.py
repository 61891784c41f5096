"""Names of precisions and what each means in dtypes. Knows no device and no model.

`-mixed`: matrix products in the half type by the layers' own casts; master weights, gradients and the residual stream
in fp32. Neither autocast nor a wrapper decides numerics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalith.errors import ConfigError, Problem


@dataclass(frozen=True)
class Precision:
    """One precision: `parameters` (masters, gradients, moments), `compute` (None: as the parameters), `scaled` (fp16)."""

    name: str
    parameters: torch.dtype
    compute: torch.dtype | None
    scaled: bool = False


PRECISIONS = {
    p.name: p
    for p in (
        Precision("32", torch.float32, None),
        Precision("bf16-mixed", torch.float32, torch.bfloat16),
        Precision("16-mixed", torch.float32, torch.float16, scaled=True),
        Precision("64", torch.float64, None),
    )
}
ALIASES = {
    "fp32": "32",
    "32-true": "32",
    "float32": "32",
    "bf16": "bf16-mixed",
    "16": "16-mixed",
    "fp16": "16-mixed",
    "64-true": "64",
    "float64": "64",
}
"""What NeMo and Lightning users also type. Pure half precisions (`bf16-true`) are not among them: masters stay fp32."""


def precision(name: str | int) -> Precision:
    """The precision of a name or alias. Errors: `ConfigError` naming the legal ones."""
    text = str(name)
    text = ALIASES.get(text, text)
    if text not in PRECISIONS:
        fix = f"one of auto, {', '.join(PRECISIONS)}"
        raise ConfigError([Problem("trainer.precision", f"no precision is called {name!r}", fix)])
    return PRECISIONS[text]
