"""What one rank does in the reshard tests: train a few steps from a checkpoint or from the start, save, look."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megalith.checkpoint.local import held
from megalith.checkpoint.native import Checkpointer, read_tensors
from megalith.engine.engine import Engine
from megalith.testing.parity import Case, make_batch, make_engine, share
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology
from megalith.training.saving import Saver

OTHER_SEED = 99
"""Of an engine that is about to be loaded: every number of it is another, so that none can be forgotten."""


@dataclass(frozen=True)
class Leg:
    """From `source` (None: the beginning) to step `upto`, then saved below `target` (None: not saved)."""

    source: str | None
    target: str | None
    upto: int
    asynchronous: bool = False
    weights: bool = False


def go(case: Case, sizes: Sizes, leg: Leg) -> tuple[list[float], str]:
    """→ the losses of the steps made, and the folder saved."""
    topology = topology_of(sizes)
    engine = make_engine(replace(case, seed=OTHER_SEED) if leg.source else case, topology)
    root = Path(leg.target or "unused")
    saver = Saver(engine, Checkpointer(root, topology, asynchronous=leg.asynchronous), config_yaml="a: 1\n")
    if leg.source:
        (saver.load_weights if leg.weights else saver.load)(Path(leg.source))
    losses = train(engine, case, leg.upto)
    folder = str(saver.save()) if leg.target else ""
    saver.wait()
    return losses, folder


def train(engine: Engine, case: Case, upto: int) -> list[float]:
    """Steps until the engine has made `upto`."""
    return [
        engine.train_step(share(make_batch(case, engine.step), engine.topology)).loss
        for _ in range(engine.step, upto)
    ]


def save_and_compare(case: Case, sizes: Sizes, root: str) -> tuple[str, list[str], list[int]]:
    """One step and a save. → its folder, the tensors whose part here is not what the files hold, and sizes of parts."""
    topology = topology_of(sizes)
    engine = make_engine(case, topology)
    train(engine, case, 1)
    saver = Saver(engine, Checkpointer(Path(root), topology), config_yaml="")
    folder = saver.save()
    return str(folder), different(engine, folder), [h.memory.numel() for h in held(engine.tensors()).values()]


def load_and_compare(case: Case, sizes: Sizes, folder: str, again: str) -> list[str]:
    """Loads on this layout and saves below `again`. → as above."""
    topology = topology_of(sizes)
    engine = make_engine(replace(case, seed=OTHER_SEED), topology)
    saver = Saver(engine, Checkpointer(Path(again), topology), config_yaml="")
    saver.load(Path(folder))
    saver.save()
    return different(engine, Path(folder))


def different(engine: Engine, folder: Path) -> list[str]:
    """Names of tensors whose part on this rank differs in any bit from the files', read here as whole tensors."""
    files = {t.name: t for prefix in ("model.", "optim.") for t in read_tensors(folder, prefix)}
    wrong = []
    for name, mine in held(engine.tensors()).items():
        index = tuple(slice(a, b) for a, b in mine.part)
        if not torch.equal(bits(files[name].read()[index]), bits(mine.memory)):
            wrong.append(name)
    return wrong


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """So that −0 and NaN are compared as they are."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def topology_of(sizes: Sizes) -> Topology:
    """Of this rank; of this process where one is enough."""
    return Topology.of(sizes, "cpu") if sizes.world > 1 else Topology.single("cpu")


def on(pool, function, sizes: Sizes, *arguments):
    """The results of a rank function on each rank of a layout; one process needs no pool."""
    if sizes.world == 1:
        return [function(*arguments)]
    return pool.run(function, sizes.world, *arguments)


def foreign_differences(case: Case, sizes: Sizes, path: str, expected: dict[str, torch.Tensor]) -> list[str]:
    """Loads another program's weights on this layout. → names of tensors whose part here is not the expected one."""
    topology = topology_of(sizes)
    engine = make_engine(case, topology)
    Saver(engine, Checkpointer(Path(path), topology), config_yaml="").load_weights(Path(path))
    wrong = []
    for name, mine in held(engine.tensors()).items():
        if name.startswith("model."):
            index = tuple(slice(a, b) for a, b in mine.part)
            if not torch.equal(expected[name.removeprefix("model.")][index], mine.memory):
                wrong.append(name)
    return wrong
