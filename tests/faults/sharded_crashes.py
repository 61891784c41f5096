"""Kills one of two processes that save together and looks at what is left. Run by test_sharded_faults.py:

    python sharded_crashes.py kill RANK EVERY FOLDER    killed right before every EVERY-th of its changes of the disk
    python sharded_crashes.py end FOLDER                processes that end while a save is under way

Children are forked after torch is imported and before it has started a thread. The survivor must learn of the death and say
so, and the folder must hold a whole checkpoint. Prints one JSON object; any loss is an assertion that ends the script.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # what DTensors import when first used: once here, not in every child
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.checkpoint_crashes import die_at, tidy
from megalith.checkpoint.layout import newest_verified
from megalith.checkpoint.native import Checkpointer, load
from megalith.errors import CheckpointError
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology

FAILED_PROPERLY = 7
PATIENCE = 120.0
"""Seconds that a busy machine may take; a process that waited for a dead one would take hours."""


def whole(step: int) -> dict[str, torch.Tensor]:
    return {
        "model.table": torch.arange(10.0).view(5, 2) + 100 * step,
        "model.norm": torch.full((3,), float(step)),
        "optim.table.exp_avg": torch.arange(10.0).view(5, 2) - 100 * step,
    }


def tensors(topology: Topology, step: int) -> dict[str, torch.Tensor]:
    assert topology.mesh is not None
    mesh = topology.mesh["shard"]
    return {
        name: distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None) if "table" in name else tensor
        for name, tensor in whole(step).items()
    }


def rank_main(rank: int, root: Path, asynchronous: bool, die: int) -> int:
    """Saves steps 1 and 2; from then on the disk's `die`-th change kills (0: none); saves steps 3 and 3 again."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{root}.store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE))
    topology = Topology.of(Sizes(shard=2, zero_stage=3))
    saver = Checkpointer(root, topology, asynchronous=asynchronous)
    for step in (1, 2):
        saver.save(step, tensors(topology, step), {}, config_yaml="x")
    saver.wait()
    topology.barrier()
    if die:
        die_at(die, root)
    try:
        for _ in range(2):
            saver.save(3, tensors(topology, 3), {}, config_yaml="x")
            saver.wait()
    except CheckpointError as error:
        return FAILED_PROPERLY if "another process of the run ended" in str(error) else 1
    return 0


def fork(rank: int, work) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = work()
        except BaseException as error:
            print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(code)
    return pid


def codes(pids: list[int]) -> list[int]:
    """How children ended, negative for a signal; all must within `PATIENCE`."""
    found: dict[int, int] = {}
    limit = time.monotonic() + PATIENCE
    while len(found) < len(pids):
        for pid in pids:
            if pid not in found and (got := os.waitpid(pid, os.WNOHANG))[0]:
                found[pid] = os.waitstatus_to_exitcode(got[1])
        if time.monotonic() > limit:
            for pid in set(pids) - found.keys():
                os.kill(pid, signal.SIGKILL)
            raise AssertionError("a process hangs after the other one died")
        time.sleep(0.005)
    return [found[pid] for pid in pids]


def judge(root: Path) -> int:
    folder, _ = newest_verified(root)
    assert folder is not None, sorted(p.name for p in root.iterdir())
    live = {name: torch.zeros_like(tensor) for name, tensor in whole(0).items()}
    step = load(folder, live)["step"]
    assert all(torch.equal(live[name], tensor) for name, tensor in whole(step).items())
    return step


def kill(guilty: int, every: int, asynchronous: bool, folder: Path) -> dict[str, object]:
    found: dict[int, int] = {}
    for die in range(1, 10_000, every):
        root = folder / f"crash{die}-{asynchronous}"
        root.mkdir()
        deaths = [die if rank == guilty else 0 for rank in (0, 1)]
        pids = [fork(rank, partial(rank_main, rank, root, asynchronous, deaths[rank])) for rank in (0, 1)]
        ended = codes(pids)
        if ended == [0, 0]:
            return {"crashes": (die - 1) // every, "found": found}
        assert ended[guilty] == -signal.SIGKILL, ended
        assert ended[1 - guilty] in (FAILED_PROPERLY, 0), ended
        step = judge(root)
        assert step >= 2, "step 2 was saved"
        found[step] = found.get(step, 0) + 1
        again = Checkpointer(root, Topology.single())
        assert judge(root) == step, "cleaning up lost something"
        again.save(4, whole(4), {}, config_yaml="x")
        assert judge(root) == 4
        tidy(root)
        shutil.rmtree(root)
    raise AssertionError("the save never ended")


def end(folder: Path) -> dict[str, object]:
    """Both fall off the end of their program, with a save begun and slow disks."""
    root = folder / "end"

    def work(rank: int) -> int:
        store = dist.FileStore(f"{root}.store", 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        topology = Topology.of(Sizes(shard=2, zero_stage=3))
        saver = Checkpointer(root, topology, asynchronous=True)
        real = os.write
        os.write = lambda fd, data: (time.sleep(0.03), real(fd, data))[1]
        saver.save(1, tensors(topology, 1), {}, config_yaml="x")
        assert not (root / "step_0000001").exists(), "it is written later"
        sys.exit(3)

    pids = []
    for rank in (0, 1):
        pids.append(os.fork())
        if pids[-1] == 0:
            work(rank)  # ends as a program does: through the interpreter's own end, which waits
    ended = codes(pids)
    assert ended == [3, 3], ended
    return {"step": judge(root)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[-1])
    if sys.argv[1] == "end":
        print(json.dumps(end(where)))
    else:
        ways = {"sync": False, "async": True}
        print(json.dumps({way: kill(int(sys.argv[2]), int(sys.argv[3]), ways[way], where) for way in ways}))
