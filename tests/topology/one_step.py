"""One training step on all processes that the launcher started; every process prints its number and the same loss."""

from __future__ import annotations

import sys

from megalith.models.config import ModelConfig
from megalith.testing.parity import Case, make_batch, make_engine, share
from megalith.topology import launch
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology

CASE = Case(
    ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=64, max_position_embeddings=8)
)


def main():
    with launch.start("cpu", timeout=60) as member:
        topology = Topology.of(Sizes(replicate=member.world), member.device)
        engine = make_engine(CASE, topology)
        member.watch(topology, engine.stages)
        result = engine.train_step(share(make_batch(CASE, 0), topology))
        member.beat()
        how = member.launched.launcher if member.launched else "alone"
        line = f"{how} {member.rank} of {member.world}: {result.loss:.12f} {result.grad_norm:.12f}\n"
        (sys.stderr if member.rank else sys.stdout).write(line)


if __name__ == "__main__":
    main()
