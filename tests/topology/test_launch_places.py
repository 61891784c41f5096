"""Stacks of frames in a person's words: the operation, and the module, backward pass or function that asked for it."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from megalith.topology import collectives, places

X = torch.ones(2, requires_grad=True)


class Asks(nn.Module):
    def forward(self, x):
        return collectives.reduce(x, None)  # there is no process group: an error out of torch.distributed


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({"4": nn.Sequential(Asks()), "5": nn.Sequential(Asks())})

    def forward(self, x):
        return self.blocks["5"](x)


def place_of(function, names=()):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        function()
    return places.of_error(caught.value, dict(names))


def test_a_module():
    stage = Stage()
    assert str(place_of(lambda: stage(X), places.module_names([stage]))) == "all_reduce in blocks.5.0"


def test_a_module_without_a_name_of_its_own_gives_the_block():
    stage = Stage()
    names = places.module_names([stage])
    del names[id(stage.blocks["5"][0])]
    assert str(place_of(lambda: stage(X), names)) == "all_reduce in blocks.5"


def test_a_stage_is_called_after_its_blocks():
    stage = Stage()
    assert places.module_names([stage])[id(stage)] == "the stage of blocks 4 to 5"
    assert places.module_names([nn.Linear(1, 1)]).popitem()[1] == "a stage without blocks"


def test_a_backward_pass():
    found = place_of(lambda: collectives.copy(X, None).sum().backward())
    assert str(found) == "all_reduce in the backward pass (_Copy)"


def test_the_cause_inside_what_pipelining_wraps():
    stage = Stage()

    def run():
        try:
            stage(X)
        except ValueError as error:
            raise RuntimeError("failed to run forward") from error

    assert str(place_of(run, places.module_names([stage]))) == "all_reduce in blocks.5.0"


def test_what_does_not_communicate_has_no_operation():
    found = place_of(lambda: int("x"))
    assert found.operation == ""
    assert "test_launch_places.py" in str(found)


def test_the_main_thread_is_found_from_another_one():
    found, ready = [], threading.Event()

    def look():
        ready.wait()
        found.append(places.of_process({}, [threading.get_ident()]))

    thread = threading.Thread(target=look)
    thread.start()
    ready.set()
    thread.join()
    assert found[0].operation == ""
    assert "threading.py" in str(found[0]) or "test_launch_places.py" in str(found[0])


def test_compiled_code_waits_for_the_collective_that_it_began(tmp_path):
    file = tmp_path / "inductor_code.py"
    file.write_text(
        "def call(torch):\n"
        "    torch.ops._c10d_functional.all_gather_into_tensor.default(0)\n"
        "    torch.ops._c10d_functional.all_reduce_.default(0)\n"
        "    torch.ops._c10d_functional.wait_tensor.default(0)\n"
        "    torch.ops._c10d_functional.reduce_scatter_tensor.default(0)\n"
    )

    class Operations:
        def __getattr__(self, name):
            if name == "wait_tensor":
                raise RuntimeError("Connection closed by peer")
            return self if name != "default" else lambda _: None

    code = {}
    exec(compile(file.read_text(), str(file), "exec"), code)
    assert place_of(lambda: code["call"](Operations())).operation == "all_reduce"
