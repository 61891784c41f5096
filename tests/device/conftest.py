"""The device of these tests: the first GPU, or what MEGALITH_TEST_DEVICE names (cpu: the bodies that need no GPU run there)."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """Where the tests run; skips when it is not there."""
    name = os.environ.get("MEGALITH_TEST_DEVICE", "cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(name)


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The same, and it must be a GPU."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    return device


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """No graph of one test is found by another."""
    torch._dynamo.reset()
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
