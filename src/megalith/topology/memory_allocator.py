"""Tuning of the C library's allocator: keep freed memory instead of handing it back to the system.

A training step frees and asks for the same large buffers over and over. By default glibc maps each one anew, and the
kernel clears every 4 KiB page on its first touch; on virtual machines that can cost a third of a step. Knows nothing
of models. Costs memory: freed buffers stay in the process, so use it with the chunked loss.
"""

from __future__ import annotations

import ctypes
import platform

import torch

from megalith.topology.hardware import Decision

# malloc.h of glibc; the parameters of mallopt(3)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD = 256 * 2**20
"""Bytes that the heap grows by at a time."""


def tune_allocator() -> Decision:
    """Serve large buffers from a heap that is never given back (glibc only). Cannot be undone within the process."""
    libc, version = platform.libc_ver()
    if platform.system() != "Linux" or libc != "glibc":
        return Decision("off", "only glibc's allocator can be tuned")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return Decision("off", "the C library has no mallopt")
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, TOP_PAD))
    if not all(mallopt(parameter, value) for parameter, value in settings):
        return Decision("off", "mallopt refused")
    return Decision("on", f"glibc {version} keeps freed memory")


def resolve_allocator(setting: str | bool, device: torch.device) -> Decision:
    """Tunes the allocator of this process where it pays. `setting`: auto (on a CPU), true or false."""
    if str(setting).lower() == "false":
        return Decision("off", "as asked for")
    if str(setting).lower() == "auto" and device.type != "cpu":
        return Decision("off", "the GPU's memory has an allocator of its own")
    return tune_allocator()
