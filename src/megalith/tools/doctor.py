"""`megalith doctor`: what training will use on this machine and why, and what is missing.

Knows where to look and what to make of it. The choices themselves (precision, compilation) are `topology.hardware`'s: what
is printed here is what a run does. Changes nothing.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, Literal

import torch
import torch.nn.functional as F

from megalith import __version__
from megalith.tools.machine import Machine, look
from megalith.topology.backends import communication_backends
from megalith.topology.hardware import (
    COMPILE_PAYS,
    Decision,
    compiler_problem,
    cpu_features,
    resolve_compile,
    resolve_precision,
)

Mark = Literal["good", "note", "bad"]
GIB = 2**30

NEEDED = (
    "torch", "lightning", "numpy", "safetensors", "tokenizers", "gigatoken", "sentencepiece", "msgspec", "zstandard",
    "omegaconf", "hydra-core", "pydantic", "typer", "rich", "tensorboard",
)  # fmt: skip
OPTIONAL = (
    ("wandb", "logging to Weights & Biases", "pip install wandb"),
    ("numba", "faster index building on very large corpora", "pip install numba"),
    ("transformers", "an independent check of conversions", 'pip install "megalith[hf]"'),
    ("torchmetrics", "metrics of the NLP tasks", 'pip install "megalith[tasks]"'),
    ("seqeval", "entity F1", 'pip install "megalith[tasks]"'),
    ("fastapi", "the server", 'pip install "megalith[serve]"'),
    ("plotly", "run reports", 'pip install "megalith[report]"'),
)


@dataclass(frozen=True)
class Line:
    """One finding. `mark`: good, note (works, but could be better), bad (does not work)."""

    name: str
    value: str
    reason: str = ""
    mark: Mark = "good"


@dataclass
class Report:
    """Findings under headings, in the order in which they are read."""

    sections: dict[str, list[Line]] = field(default_factory=dict)

    @property
    def advice(self) -> list[Line]:
        """Everything that is not good."""
        return [line for lines in self.sections.values() for line in lines if line.mark != "good"]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {title: {line.name: asdict(line) for line in lines} for title, lines in self.sections.items()}


def examine() -> Report:
    """Look at everything. Takes about a second, torch's import aside."""
    machine = look()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report()
    report.sections["machine"] = machine_lines(machine)
    report.sections["devices"] = device_lines(machine)
    report.sections["training will use"] = choice_lines(device)
    report.sections["processes"] = process_lines()
    report.sections["versions"] = version_lines()
    report.sections["not installed"] = missing_lines()
    return report


def machine_lines(machine: Machine) -> list[Line]:
    """Processor, memory, disk."""
    memory = Line("memory", "unknown", mark="note")
    if machine.memory is not None:
        free = machine.memory_free
        little = free is not None and free < 2 * GIB
        said = f"{machine.memory / GIB:.1f} GiB" + (
            f", {free / GIB:.1f} GiB free" if free is not None else ""
        )
        memory = Line(
            "memory", said, "little: use a small micro-batch" if little else "", "note" if little else "good"
        )
    little = machine.disk_free < 5 * GIB
    disk = Line(
        "disk",
        f"{machine.disk_free / GIB:.1f} GiB free",
        f"{machine.folder}" + (": checkpoints of GPT-2 124M take 1.5 GB each" if little else ""),
        "note" if little else "good",
    )
    lines = [
        Line("system", machine.system),
        Line("processor", machine.processor, f"{machine.cores:g} cores"),
        memory,
        disk,
    ]
    if not machine.writable:
        lines.append(
            Line("folder", "not writable", f"{machine.folder}: runs and indexes go elsewhere", "bad")
        )
    return lines


def device_lines(machine: Machine) -> list[Line]:
    """The CPU and every GPU."""
    features = ", ".join(sorted(cpu_features())) or "no AVX2"
    threads = torch.get_num_threads()
    lines = [Line("cpu", f"{threads} thread{'s' * (threads != 1)}", features)]
    if threads > machine.cores:
        lines[0] = Line(
            "cpu", lines[0].value, f"more threads than cores ({machine.cores:g}): set OMP_NUM_THREADS", "note"
        )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            kind = f"sm_{found.major}{found.minor}, {found.multi_processor_count} multiprocessors"
            lines.append(Line(f"cuda:{index}", found.name, f"{found.total_memory / GIB:.0f} GiB, {kind}"))
    else:
        lines.append(Line("gpu", "none", _why_no_gpu()))
    return lines


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this build of torch is for CPUs"
    return f"torch was built for {'ROCm' if torch.version.hip else 'CUDA ' + str(torch.version.cuda)}, but sees no device"


def choice_lines(device: torch.device) -> list[Line]:
    """What `auto` means here, with the reasons."""
    precision = resolve_precision("auto", device)
    return [
        Line("device", device.type, "trainer.accelerator=auto"),
        Line("precision", precision.value, f"{precision.reason}; {speed_of_halves(device)}"),
        attention_line(device),
        compile_line(device),
    ]


def speed_of_halves(device: torch.device) -> str:
    """Matrix products in bf16 against fp32, measured: "bf16 2.1× as fast as fp32 (measured)"."""
    size = 512 if device.type == "cpu" else 4096
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        seconds[dtype] = _best_time(lambda m=matrix: m @ m, device)
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    return f"a {size}² product in bf16 takes {1 / ratio:.2g}× the time of fp32 (measured)"


def _best_time(work: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def attention_line(device: torch.device) -> Line:
    """The attention core of `model.attention_core: auto`, tried out once."""
    masks = "flex attention" if device.type == "cuda" else "one causal call a document"
    reason = f"torch's scaled_dot_product_attention; with reset_attention_mask {masks}; with attention_dropout eager"
    try:
        q = torch.ones(1, 2, 8, 16, device=device)
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    except RuntimeError as problem:
        return Line("attention", "broken", str(problem).splitlines()[0], "bad")
    return Line("attention", "sdpa", reason)


def compile_line(device: torch.device) -> Line:
    """Whether blocks are compiled."""
    problem = compiler_problem(device)
    if problem:
        return Line("compile", "off", f"{problem}; training works without, some 10 % slower", "note")
    choice: Decision = resolve_compile("auto", device)
    if not choice.on:
        return Line("compile", choice.value, choice.reason)
    pays = f"its 10–40 s of start-up pay from {COMPILE_PAYS[device.type]:.0e} FLOPs a run"
    return Line("compile", "on for long runs", f"a compiler is there; {pays}")


def process_lines() -> list[Line]:
    """Libraries that several processes would talk through."""
    return [
        Line(name, "no" if problem else "yes", problem) for name, problem in communication_backends().items()
    ]


def version_lines() -> list[Line]:
    """Python and the packages that Megalith needs."""
    lines = [Line("megalith", __version__), Line("python", platform.python_version())]
    for name in NEEDED:
        version = _version(name)
        lines.append(Line(name, version) if version else Line(name, "missing", f"pip install {name}", "bad"))
    return lines


def missing_lines() -> list[Line]:
    """Optional packages that are not there, and what each would enable."""
    return [Line(name, enables, install) for name, enables, install in OPTIONAL if _version(name) is None]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
