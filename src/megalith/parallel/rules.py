"""Which axis of the mesh shares which logical axis of a layer. One table for all models."""

from __future__ import annotations

from collections.abc import Sequence

RULES = {
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "experts": "expert",
}


def shared_dim(axes: Sequence[str], mesh_axis: str) -> int | None:
    """The dimension of a weight with these `axes` that `mesh_axis` shares; None when every rank holds it whole."""
    dims = [dim for dim, name in enumerate(axes) if RULES.get(name) == mesh_axis]
    if len(dims) > 1:
        raise ValueError(f"two dimensions of {tuple(axes)} would be shared along {mesh_axis}")
    return dims[0] if dims else None
