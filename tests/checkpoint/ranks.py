"""What one of four ranks does in the tests of saving with many processes. Content is a function of the step and the name."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megalith.checkpoint.local import held
from megalith.checkpoint.native import Checkpointer, load
from megalith.checkpoint.retention import Policy, Retention
from megalith.checkpoint.team import Team
from megalith.errors import CheckpointError
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology

SIZES = Sizes(shard=2, tensor=2, zero_stage=3)
SHAPES = {
    "model.table": (11, 6), "model.up.weight": (8, 5), "model.down.weight": (5, 8), "model.norm": (6,),
    "model.scale": (), "model.empty": (0, 3), "model.alone": (4,), "model.few": (1, 4),
    "optim.table.exp_avg": (11, 6), "optim.down.exp_avg": (5, 8),
}  # fmt: skip
PLACES = {
    "table": (Shard(0), Replicate()),
    "up": (Replicate(), Shard(0)),
    "down": (Shard(0), Shard(1)),
    "few": (Shard(0), Replicate()),
}


def whole_tensors(step: int) -> dict[str, torch.Tensor]:
    """What the ranks hold together."""
    draw = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in SHAPES.items()}


def tensors_of(topology: Topology, step: int) -> dict[str, torch.Tensor]:
    """This rank's: some are shared over one axis or two, with an empty shard; some are copies; one is on rank 3 alone."""
    assert topology.mesh is not None
    mesh, found = topology.mesh["shard", "tensor"], whole_tensors(step)
    for name in list(found):
        places = PLACES.get(name.split(".")[1])
        if places:
            found[name] = distribute_tensor(found[name], mesh, places, src_data_rank=None)
    if topology.global_rank != 3:
        del found["model.alone"]
    return found


def blank(topology: Topology) -> dict[str, torch.Tensor]:
    """The same shapes, other numbers."""
    return {name: torch.full_like(tensor, 7.0) for name, tensor in tensors_of(topology, 0).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal in every part that this rank holds."""
    mine, theirs = held(one), held(other)
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[name].memory, theirs[name].memory) for name in mine
    )


def saver(root: str, topology: Topology, **options: Any) -> Checkpointer:
    retention = Retention(Policy(**options.pop("policy"))) if "policy" in options else None
    return Checkpointer(Path(root), topology, retention=retention, **options)


def attempt(work: Any) -> str:
    """What `work` raised, in words."""
    try:
        work()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def save_steps(root: str, steps: list[int], asynchronous: bool, policy: dict[str, Any] | None = None) -> bool:
    """Saves, overwriting the live tensors as soon as each save returns; then loads each into others."""
    topology = Topology.of(SIZES)
    options = {"policy": policy} if policy else {}
    keeper = saver(root, topology, asynchronous=asynchronous, **options)
    for step in steps:
        live = tensors_of(topology, step)
        folder = keeper.save(step, live, {"seed": step}, config_yaml="x", metrics={"val_loss": 1.0 / step})
        for tensor in live.values():
            tensor.fill_(-1)
    keeper.wait()
    live = blank(topology)
    return load(folder, live, team=keeper.team)["seed"] == steps[-1] and same(
        live, tensors_of(topology, steps[-1])
    )


def load_here(folder: str) -> tuple[str, bool]:
    """(error, whether this rank now holds the step's numbers) and asserts that an error touched nothing."""
    topology = Topology.of(SIZES)
    team, live, before = Team(topology), blank(topology), blank(topology)
    error = attempt(lambda: load(Path(folder), live, team=team))
    assert not error or same(live, before), "an error, and something was touched"
    return error, same(live, tensors_of(topology, 1))


def load_a_stranger(folder: str) -> str:
    """Rank 2 brings a tensor of another shape and one that nobody saved."""
    topology = Topology.of(SIZES)
    live = blank(topology)
    if topology.global_rank == 2:
        live["model.new"] = torch.zeros(2)
    live["model.norm"] = torch.zeros(7, dtype=torch.float64)
    live.pop("model.alone", None)
    return attempt(lambda: load(Path(folder), live, team=Team(topology)))


FAULTS = {
    "disk full": ("write", OSError(28, "No space left on device")),
    "input/output error": ("fsync", OSError(5, "Input/output error")),
    "interrupt": ("write", KeyboardInterrupt()),
    "a bug": ("write", ZeroDivisionError("by zero")),
}


def save_with_a_fault(root: str, fault: str, guilty: int, asynchronous: bool) -> tuple[str, list[str], bool]:
    """(error, what lies in the folder after it, whether the next save and load are fine)."""
    topology = Topology.of(SIZES)
    keeper = saver(root, topology, asynchronous=asynchronous)
    keeper.save(1, tensors_of(topology, 1), {}, config_yaml="x")
    keeper.wait()
    call, error = FAULTS[fault]
    real, main = getattr(os, call), threading.main_thread() if not asynchronous else None

    def broken(*arguments: Any) -> Any:
        if threading.current_thread() is main or threading.current_thread().name == "checkpoint-write":
            raise error
        return real(*arguments)

    if topology.global_rank == guilty:
        setattr(os, call, broken)

    def save() -> None:
        keeper.save(2, tensors_of(topology, 2), {}, config_yaml="x")
        keeper.wait()

    said = attempt(save)
    setattr(os, call, real)
    topology.barrier()
    left = sorted(os.listdir(root))
    topology.barrier()
    keeper.save(3, tensors_of(topology, 3), {}, config_yaml="x")
    keeper.wait()
    live = blank(topology)
    load(Path(root) / "step_0000003", live, team=keeper.team)
    return said, left, same(live, tensors_of(topology, 3))


def refused_arguments(root: str) -> list[str]:
    """Errors of saves that may not begin, whoever brings what is wrong with them."""
    topology = Topology.of(SIZES)
    keeper, main = saver(root, topology, asynchronous=True), topology.is_main
    fine = tensors_of(topology, 1)
    said = [
        attempt(lambda: keeper.save(1, fine, {"a": (1,)} if main else {}, config_yaml="")),
        attempt(
            lambda: keeper.save(1, fine if main else {**fine, "x": fine["model.norm"]}, {}, config_yaml="")
        ),
        attempt(
            lambda: keeper.save(
                1, {n: t for n, t in fine.items() if main or n != "model.table"}, {}, config_yaml=""
            )
        ),
        attempt(lambda: keeper.save(1, fine, {}, config_yaml="", tokenizer=Path("/nowhere/at/all"))),
    ]
    keeper.wait()
    return said


def save_into_folders_of_their_own(root: str) -> str:
    """As on machines without a common file system."""
    topology = Topology.of(SIZES)
    own = Path(root) / str(topology.global_rank)
    return attempt(lambda: saver(str(own), topology).save(1, tensors_of(topology, 1), {}, config_yaml=""))


def decide(root: str) -> list[Any]:
    """The first process decides; its errors are everybody's."""
    topology = Topology.of(SIZES)
    team = Team(topology)

    def fail() -> None:
        raise CheckpointError("no", where=f"rank {topology.global_rank}", fix="yes")

    return [
        team.lead(lambda: topology.global_rank * 10 + 5),
        team.together(lambda: topology.global_rank),
        attempt(lambda: team.lead(fail)),
        attempt(lambda: team.together(lambda: fail() if topology.global_rank > 1 else None)),
    ]


# Memory -------------------------------------------------------------------------------------------------------------


def large(rows: int, topology: Topology | None) -> dict[str, torch.Tensor]:
    """Twelve tables of `rows` × 1024, of which a rank holds a quarter: rows of one half of them, columns of the other."""
    found: dict[str, torch.Tensor] = {}
    for number in range(12):
        name = f"{'model' if number < 4 else 'optim'}.w{number}"
        if topology is None:
            found[name] = torch.full((rows, 1024), float(number))
            continue
        assert topology.mesh is not None
        dim = number % 2
        piece = torch.full((rows // 4, 1024) if dim == 0 else (rows, 256), -1.0)
        found[name] = DTensor.from_local(piece, topology.mesh["tensor"], [Shard(dim)], run_check=False)
    return found


def memory_of_load_and_save(folder: str, root: str, rows: int) -> dict[str, float]:
    """Megabytes by which the peak of this process's memory rose, and bytes read from files."""
    topology = Topology.of(Sizes(tensor=4))
    live, team = large(rows, topology), Team(topology)
    total, real = [0], os.preadv

    def preadv(descriptor: int, views: Any, offset: int) -> int:
        count = real(descriptor, views, offset)
        total[0] += count
        return count

    os.preadv = preadv  # type: ignore[assignment]
    try:
        loading = rise(lambda: load(Path(folder), live, team=team))
    finally:
        os.preadv = real
    right = all((mine.memory == float(n.rpartition("w")[2])).all() for n, mine in held(live).items())
    keeper = saver(root, topology)
    saving = rise(lambda: keeper.save(1, live, {}, config_yaml=""))
    holds = sum(mine.memory.nbytes for mine in held(live).values())
    return {"load": loading, "save": saving, "read": total[0] / holds, "holds": holds / 2**20, "right": right}


def rise(work: Any) -> float:
    """How far the peak of resident memory goes beyond what it is now, in MiB."""
    with contextlib.suppress(OSError):  # without it the peak is an older, higher one
        Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    work()
    return peak() - before


def peak() -> float:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024
