"""Seeds of the process and the deterministic switch.

Nothing of ours draws from an ambient generator (weights, data order and dropout are hashes of the seed); what is seeded
here serves libraries that do. Knows no model.
"""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from megalith.errors import ConfigError, Problem


def seed_process(seed: int) -> None:
    """Seed Python, numpy and torch. Errors: `ConfigError` for a seed that is not a positive 32-bit number."""
    if not 0 < seed < 2**32:
        raise ConfigError([Problem("seed", f"{seed} is not a seed", "a whole number from 1 to 4294967295")])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def make_deterministic(enabled: bool = True) -> None:
    """Bit-identical repetition on one machine: deterministic kernels only, fresh memory filled with NaN.

    An operation without a deterministic kernel then raises instead of varying. Costs speed on a GPU; call it before the
    first CUDA operation, since cuBLAS reads its workspace setting once.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = enabled  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = enabled
