"""Runs of two processes, each with its own fault, all at the same time: forked from one process that has imported everything.

python -m tests.faults.ranks_zygote FOLDER TIMEOUT NAME…    → FOLDER/results.json, FOLDER/NAME-RANK.{out,err}
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed.fsdp  # what is imported at its first use would be so in every fork, while the others wait

import megalith.parallel.pipeline  # noqa: F401
from megalith.errors import DataError
from megalith.generate.crew import Crew
from megalith.generate.engine import decode
from megalith.generate.reading import prepare_for_reading
from megalith.generate.sampling import Sampling
from megalith.models.config import ModelConfig
from megalith.models.gpt import GPT
from megalith.parallel.apply import build
from megalith.testing.parity import Case, make_batch, make_engine, share
from megalith.topology import collectives, launch
from megalith.topology.environment import Launched
from megalith.topology.sizes import Sizes
from megalith.topology.spawn import free_port
from megalith.topology.topology import Topology

CASE = Case(
    ModelConfig(
        num_layers=4, hidden_size=16, num_attention_heads=2, vocab_size=64, max_position_embeddings=8
    ),
    micro_batches=4,
)


FOUR = Sampling(tokens_to_generate=4)


def once_in(owner, name, replacement, *, call):
    """The `call`-th call of `owner.name` is `replacement`'s."""
    original, calls = getattr(owner, name), iter(range(1_000_000))

    def replaced(*args, **kwargs):
        if next(calls) != call:
            return original(*args, **kwargs)
        setattr(owner, name, original)
        mark()
        return replacement(*args, **kwargs)

    setattr(owner, name, replaced)


def mark():
    """The moment of the fault, in the error file of the faulty process."""
    print(f"FAULT {time.time()}", file=sys.stderr, flush=True)


def skip_all_reduce(engine):
    once_in(collectives, "all_reduce", lambda x, group: x, call=1)


def skip_receive(engine):
    ((schedule, _),) = engine.forward.pipeline._schedules.values()
    stage = schedule._stage
    ask = stage.get_fwd_recv_ops

    def left_out(number):
        ask(number)  # takes the memory; nothing is put into it
        return []

    once_in(stage, "get_fwd_recv_ops", left_out, call=1)


def in_block(engine, action):
    def hook(module, args):
        mark()
        action()

    engine.stages[0].blocks["2"].register_forward_pre_hook(hook, prepend=True)


def sleep_for_ever():
    time.sleep(3600)


def skip_gather(engine):
    in_block(engine, sleep_for_ever)


def die(engine):
    in_block(engine, lambda: os.kill(os.getpid(), signal.SIGKILL))


def own_error(engine):
    def fail():
        raise ValueError("a mistake of ours")

    in_block(engine, fail)


def user_error(engine):
    raise DataError("a file is missing", where="corpus.bin", fix="look for it")


SCENARIOS = {
    "all_reduce": (Sizes(tensor=2), skip_all_reduce),
    "all_gather": (Sizes(shard=2, zero_stage=3), skip_gather),
    "receive": (Sizes(pipeline=2), skip_receive),
    "receive_of_4": (Sizes(pipeline=2, replicate=2), skip_receive),
    "killed": (Sizes(tensor=2), die),
    "own_error": (Sizes(shard=2, zero_stage=2), own_error),
    "user_error": (Sizes(replicate=2), user_error),
    "killed_writing": (Sizes(pipeline=2), die),
}


def train(name, rank, port, timeout):
    sizes, fault = SCENARIOS[name]
    launched = Launched(rank, sizes.world, rank, "127.0.0.1", port, "torchrun")
    with launch.start("cpu", timeout=timeout, launched=launched) as member:
        topology = Topology.of(sizes, member.device)
        engine = make_engine(CASE, topology)
        member.watch(topology, engine.stages)
        for step in range(20):
            if step == 2 and (rank == sizes.world - 1 or name == "user_error"):
                fault(engine)
            engine.train_step(share(make_batch(CASE, step), topology))
            member.beat()
            print(step, flush=True)


def write(name, rank, port, timeout):
    """As `train`, of processes that generate: the fault is in the third text."""
    sizes, fault = SCENARIOS[name]
    launched = Launched(rank, sizes.world, rank, "127.0.0.1", port, "torchrun")
    with launch.start("cpu", timeout=timeout, launched=launched) as member:
        crew = Crew(Topology.of(sizes, member.device), beat=member.beat)
        member.watch(crew.topology)
        stages = build(GPT, CASE.model, crew.topology, seed=1)
        model = prepare_for_reading(stages[0], None)
        for text in range(20):
            if text == 2 and rank == sizes.world - 1:
                fault(SimpleNamespace(stages=stages))
            for _ in decode(model, [[1, 2]], FOUR, eod=None, agree=crew.same, relay=crew.relay):
                pass
            print(text, flush=True)


def child(name, rank, port, timeout, folder):
    for number, kind in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{name}-{rank}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        os.dup2(file, number)
    code = 0
    try:
        (write if name == "killed_writing" else train)(name, rank, port, timeout)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(folder, timeout, *names):
    torch.set_num_threads(1)
    folder, processes = Path(folder), {}
    for name in names:
        port = free_port()
        for rank in range(SCENARIOS[name][0].world):
            pid = os.fork()
            if not pid:
                child(name, rank, port, float(timeout), folder)
            processes[pid] = (name, rank)
    results = {name: [None] * SCENARIOS[name][0].world for name in names}
    while processes:
        pid, status = os.wait()
        name, rank = processes.pop(pid)
        results[name][rank] = [os.waitstatus_to_exitcode(status), time.time()]
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
