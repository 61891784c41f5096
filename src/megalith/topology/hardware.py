"""What this machine is good at, and the choices that follow: precision, compilation. Each choice carries its reason.

Asks the machine; changes nothing. `megalith doctor` prints the reasons, training acts on the values.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from megalith.errors import ConfigError, Problem
from megalith.topology.precision import precision


@dataclass(frozen=True)
class Decision:
    """A value and why. `str` gives 'value: reason'; a choice between two has the values "on" and "off"."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value}: {self.reason}"

    @property
    def on(self) -> bool:
        """Was "on" chosen?"""
        return self.value == "on"


def cpu_features() -> frozenset[str]:
    """Instruction sets that matter for half precision: names as Linux prints them (avx512_bf16, amx_bf16, …)."""
    wanted = ("avx2", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # newer torch than 2.11
    if capabilities is not None:
        found = capabilities()
        return frozenset(name for name in wanted if found.get(name))
    info = Path("/proc/cpuinfo")
    words = info.read_text().split() if info.exists() else []
    return frozenset(wanted) & frozenset(words)


def resolve_precision(name: str | int, device: torch.device) -> Decision:
    """Precision name for a device; "auto" takes bf16 where the hardware multiplies it natively, else fp32."""
    if name != "auto":
        return Decision(precision(name).name, "as asked for")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        model = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
        if major >= 8 or torch.version.hip:
            return Decision("bf16-mixed", f"{model} multiplies bf16 natively")
        return Decision("32", f"{model} has no fast bf16; 16-mixed may be faster")
    fast = sorted(cpu_features() & {"avx512_bf16", "amx_bf16"})
    if fast:
        return Decision("bf16-mixed", f"this CPU multiplies bf16 natively ({', '.join(fast)})")
    return Decision("32", "this CPU has neither AVX512-BF16 nor AMX: bf16 would be slower than fp32")


def compiler_problem(device: torch.device) -> str:
    """Why `torch.compile` cannot work on this machine for that device; empty when it can.

    Inductor builds C++ for the CPU with $CXX (or g++, on macOS clang++) and Python's headers; on a GPU it goes through
    Triton, whose launcher needs a C compiler and the same headers.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        compiler = os.environ.get("CC") or "gcc"
        found = any(shutil.which(name) for name in (compiler, "clang"))
    else:
        compiler = os.environ.get("CXX") or ("clang++" if platform.system() == "Darwin" else "g++")
        found = shutil.which(compiler) is not None
    if not found:
        return f"no C++ compiler ({compiler}) on the PATH"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return "" if headers.exists() else f"Python's headers are missing ({headers})"


COMPILE_PAYS = {"cpu": 1e14, "cuda": 3e16}
"""FLOPs of a run above which compiling its blocks pays. It costs 11–36 s of start-up (measured, 2 CPU cores) and saves
about a tenth, so a run must last some five minutes: 0.3 TFLOP/s on such a CPU, 100 TFLOP/s on a data-centre GPU."""


def resolve_compile(
    setting: str | bool, device: torch.device, *, planned_flops: float | None = None
) -> Decision:
    """Should blocks be compiled? `setting`: auto, true or false; `planned_flops`: of the whole run, for auto.

    Errors: `ConfigError` when compilation is demanded where it cannot work.
    """
    text = str(setting).lower()
    if text not in ("auto", "true", "false"):
        raise ConfigError([Problem("compile", f"{setting!r} is not a choice", "auto, true or false")])
    if text == "false":
        return Decision("off", "as asked for")
    problem = compiler_problem(device)
    if text == "true":
        if problem:
            raise ConfigError([Problem("compile", problem, "install it, or compile=auto")])
        return Decision("on", "as asked for")
    if problem:
        return Decision("off", problem)
    if planned_flops is not None and planned_flops < COMPILE_PAYS[device.type]:
        return Decision("off", f"a short run ({planned_flops:.1e} FLOPs) would not earn its 10–40 s back")
    return Decision("on", "a compiler is there and the run is long enough")
