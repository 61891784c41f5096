"""`megalith doctor`: always an answer, always exit code 0."""

from __future__ import annotations

import json

import pytest
import torch

from megalith.cli.main import main
from megalith.tools import doctor, machine
from megalith.topology.hardware import resolve_precision


@pytest.fixture
def run(capsys):
    def go(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main(["doctor", *arguments])
        return int(left.value.code or 0), capsys.readouterr().out

    return go


def test_the_report(run):
    code, out = run()
    assert code == 0
    for word in (
        "processor",
        "memory",
        "disk",
        "precision",
        "attention",
        "compile",
        "gloo",
        "python",
        "megalith quickstart",
    ):
        assert word in out


def test_json_says_the_same(run):
    code, out = run("--json")
    assert code == 0
    report = json.loads(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert report["training will use"]["precision"]["value"] == resolve_precision("auto", device).value
    assert report["training will use"]["device"]["value"] == device.type
    assert report["versions"]["torch"]["value"] == torch.__version__
    assert {"name", "value", "reason", "mark"} == set(report["machine"]["memory"])


def test_what_is_missing_says_what_it_enables_and_how_to_get_it(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("wandb", "numpy") else "1")
    assert [(line.name, line.reason) for line in doctor.missing_lines()] == [("wandb", "pip install wandb")]
    bad = [line for line in doctor.version_lines() if line.mark == "bad"]
    assert [(line.name, line.reason) for line in bad] == [("numpy", "pip install numpy")]


def test_no_compiler_is_a_note_with_the_reason(monkeypatch):
    monkeypatch.setattr(doctor, "compiler_problem", lambda device: "no C++ compiler (g++) on the PATH")
    line = doctor.compile_line(torch.device("cpu"))
    assert (line.value, line.mark) == ("off", "note")
    assert "no C++ compiler" in line.reason


def test_broken_attention_is_bad(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel\nmore")

    monkeypatch.setattr(doctor.F, "scaled_dot_product_attention", broken)
    assert doctor.attention_line(torch.device("cpu")) == doctor.Line(
        "attention", "broken", "no kernel", "bad"
    )


def test_little_disk_and_memory_and_a_read_only_folder(tmp_path):
    low = machine.Machine("s", "p", 2, 4 * 2**30, 2**30, 2**40, 2**30, tmp_path, writable=False)
    marks = {line.name: line.mark for line in doctor.machine_lines(low)}
    assert marks == {"system": "good", "processor": "good", "memory": "note", "disk": "note", "folder": "bad"}
    unknown = machine.Machine("s", "p", 2, None, None, 2**40, 2**40, tmp_path, writable=True)
    assert doctor.machine_lines(unknown)[2].value == "unknown"


def test_more_threads_than_cores_is_a_note(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    small = machine.Machine("s", "p", 2, 1, 1, 1, 1, tmp_path, writable=True)
    assert doctor.device_lines(small)[0].mark == "note"


def test_a_containers_limits_count(monkeypatch):
    tables = {
        "/proc/meminfo": [["MemTotal:", "1000", "kB"], ["MemAvailable:", "900", "kB"]],
        "/sys/fs/cgroup/memory.max": [["512000"]],
        "/sys/fs/cgroup/memory.current": [["112000"]],
        "/sys/fs/cgroup/cpu.max": [["50000", "100000"]],
    }
    monkeypatch.setattr(machine, "_table", lambda path: tables.get(path, []))
    assert machine.memory() == (512000, 400000)
    assert machine.cores() == 0.5
    tables["/sys/fs/cgroup/memory.max"] = [["max"]]
    tables["/sys/fs/cgroup/cpu.max"] = [["max", "100000"]]
    assert machine.memory() == (1024000, 921600)
    assert machine.cores() >= 1
    tables.clear()
    assert machine.memory()[1] is None


def test_problems_change_the_last_line(run, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "numpy" else "1")
    code, out = run()
    assert code == 0
    assert "Something does not work" in out


def test_gpus_are_listed_one_by_one(monkeypatch, tmp_path):
    class Properties:
        name, major, minor, multi_processor_count, total_memory = "NVIDIA H200", 9, 0, 132, 141 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    host = machine.Machine("s", "p", 64, 1, 1, 1, 1, tmp_path, writable=True)
    lines = doctor.device_lines(host)
    assert [line.name for line in lines] == ["cpu", "cuda:0", "cuda:1"]
    assert lines[1].reason == "141 GiB, sm_90, 132 multiprocessors"
