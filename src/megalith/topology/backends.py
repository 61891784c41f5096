"""Which libraries processes can talk through, on this machine and in this build of torch. Starts no process group."""

from __future__ import annotations

import torch
import torch.distributed as dist


def communication_backends() -> dict[str, str]:
    """Backend → why it can or cannot be used ("" means it can)."""
    if not dist.is_available():
        return dict.fromkeys(("gloo", "nccl"), "this build of torch has no torch.distributed")
    gloo = "" if dist.is_gloo_available() else "not in this build of torch"
    if dist.is_nccl_available():
        nccl = "" if torch.cuda.is_available() else "there is no GPU"
    else:
        nccl = "not in this build of torch"
    return {"gloo": gloo, "nccl": nccl}
