"""Automatic choices follow the hardware and say why."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch

from megalith.errors import ConfigError
from megalith.topology import hardware
from megalith.topology.determinism import make_deterministic, seed_process
from megalith.topology.memory_allocator import tune_allocator
from megalith.topology.precision import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("features", "expected"),
    [({"avx512_bf16", "avx2"}, "bf16-mixed"), ({"amx_bf16"}, "bf16-mixed"), ({"avx2"}, "32"), (set(), "32")],
)
def test_precision_follows_the_cpu(monkeypatch, features, expected):
    monkeypatch.setattr(hardware, "cpu_features", lambda: frozenset(features))
    decision = hardware.resolve_precision("auto", CPU)
    assert decision.value == expected
    assert "bf16" in decision.reason


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), "bf16-mixed"), ((9, 0), "bf16-mixed"), ((7, 5), "32")]
)
def test_precision_follows_the_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    decision = hardware.resolve_precision("auto", torch.device("cuda"))
    assert decision.value == expected
    assert "Some GPU" in decision.reason


def test_cpu_features_agree_with_linux():
    info = Path("/proc/cpuinfo")
    if not info.exists():
        pytest.skip("no /proc/cpuinfo")
    words = set(info.read_text().split())
    assert hardware.cpu_features() >= {"avx2", "avx512_bf16"} & words


def test_precision_names():
    assert precision(16).name == "16-mixed"
    assert precision("bf16") is precision("bf16-mixed")
    assert precision("64").parameters == torch.float64
    assert precision("bf16-mixed").parameters == torch.float32
    with pytest.raises(ConfigError, match="bf16-mixed"):
        precision("bf16-true")
    assert hardware.resolve_precision("bf16", CPU).value == "bf16-mixed"


def test_compile_is_off_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    decision = hardware.resolve_compile("auto", CPU)
    assert not decision.on
    assert "no C++ compiler (no-such-compiler)" in decision.reason
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        hardware.resolve_compile(True, CPU)


def test_compile_needs_the_headers(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "true")  # a program that exists everywhere
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "headers" in hardware.compiler_problem(CPU)


def test_compile_is_off_for_short_runs(monkeypatch):
    monkeypatch.setattr(hardware, "compiler_problem", lambda device: "")
    assert not hardware.resolve_compile("auto", CPU, planned_flops=1e12).on
    assert hardware.resolve_compile("auto", CPU, planned_flops=1e16).on
    assert hardware.resolve_compile("true", CPU, planned_flops=1.0).on
    assert not hardware.resolve_compile(False, CPU, planned_flops=1e16).on
    with pytest.raises(ConfigError, match="auto, true or false"):
        hardware.resolve_compile("perhaps", CPU)


def test_seeds_repeat_and_are_checked():
    seed_process(7)
    first = torch.rand(3)
    seed_process(7)
    assert torch.equal(first, torch.rand(3))
    for wrong in (0, -1, 2**32):
        with pytest.raises(ConfigError, match="is not a seed"):
            seed_process(wrong)


def test_deterministic_switch_fills_fresh_memory():
    make_deterministic()
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.empty(1000).isnan().all()
    finally:
        make_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_allocator_is_left_alone_without_glibc(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("musl", "1.2"))
    decision = tune_allocator()
    assert not decision.on
    assert "glibc" in decision.reason
