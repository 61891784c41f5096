"""Names of logical axes: a layer's only statement about distribution.

A layer's `axes` says what each dimension of its `weight` counts, output first, as stored. The rules table of
`parallel` maps these names to axes of the mesh; nothing here knows of one.
"""

from __future__ import annotations

from typing import Literal, get_args

Axis = Literal[
    "vocab",
    "embed",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "experts",
    "layers",
    "position",
    "types",
    "labels",
    "norm",
]
AXES: tuple[str, ...] = get_args(Axis)
