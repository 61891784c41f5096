"""The same run in several processes: one folder, one set of files, the losses of one process; any layout goes on."""

from __future__ import annotations

import signal

import pytest

from megalith.errors import EXIT_STOPPED, EXIT_SUCCESS, ConfigError, MegalithError, TopologyError
from megalith.tasks.processes import agreed, device_of, processes_wanted
from megalith.testing.pool import RankFailure
from megalith.topology.launch import Launched
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology
from megalith.training.config import TrainerConfig

from .nano import losses, make_corpus, pretrain, rows, steps_in

EXACT = ("trainer.precision=64", "model.micro_batch_size=1")
CP2 = ("model.context_parallel_size=2",)
TP2_PP2 = ("model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2")


@pytest.fixture(scope="module")
def corpus(request, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), getattr(request, "param", "gpt"))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    pretrain(corpus, folder, *EXACT)
    return folder


def near(left, right, limit=1e-10):
    return left.keys() == right.keys() and all(abs(left[k] - right[k]) < limit for k in right)


PP2 = ("model.pipeline_model_parallel_size=2",)
SPLIT = ("model.pipeline_model_parallel_split_rank=1",)
TP2 = ("model.tensor_model_parallel_size=2",)


@pytest.mark.parametrize(
    ("corpus", "ranks", "layout"),
    [
        ("gpt", 2, ("model.zero_stage=3",)),
        ("gpt", 2, CP2),
        ("gpt", 2, PP2),
        ("gpt", 4, TP2_PP2),
        ("bert", 2, PP2),
        ("t5", 2, PP2 + SPLIT),
        ("t5", 2, TP2),
        ("bart", 2, ("model.zero_stage=2",)),
    ],
    ids=str,
    indirect=["corpus"],
)
def test_a_run_begun_on_a_layout_ends_on_one_process(rank_pool, corpus, whole, tmp_path, ranks, layout):
    answers = rank_pool.run(pretrain, ranks, corpus, tmp_path, *EXACT, *layout, "trainer.max_steps=6")
    assert [code for code, _ in answers] == [EXIT_SUCCESS] * ranks
    assert "processes" in answers[0][1]
    assert all(text == "" for _, text in answers[1:])
    assert {p.name for p in tmp_path.glob("megalith_log*")} == {
        f"megalith_log_globalrank-{rank}_localrank-{rank}.txt" for rank in range(ranks)
    }
    code, text = pretrain(corpus, tmp_path, *EXACT)
    assert code == EXIT_SUCCESS
    assert "going on from step 6" in text
    assert near(losses(tmp_path), losses(whole))
    assert near(
        {k: v for k, v in losses(tmp_path, "val_loss").items() if k > 6},
        {k: v for k, v in losses(whole, "val_loss").items() if k > 6},
    )
    assert [row["consumed_samples"] for row in rows(tmp_path)][-1] == rows(whole)[-1]["consumed_samples"]


def test_a_run_begun_on_one_process_goes_on_on_a_layout(rank_pool, corpus, whole, tmp_path):
    pretrain(corpus, tmp_path, *EXACT, "trainer.max_steps=4")
    rank_pool.run(
        pretrain, 4, corpus, tmp_path, *EXACT, "model.tensor_model_parallel_size=2", "model.zero_stage=2"
    )
    assert near(losses(tmp_path), losses(whole))
    assert 12 in steps_in(tmp_path)


def test_a_run_goes_from_one_process_to_context_parallelism_and_back(rank_pool, corpus, whole, tmp_path):
    """Documents that restart positions and attention, ZeRO over the context ranks, evaluation in between."""
    masks = ("model.data.reset_position_ids=true", "model.data.reset_attention_mask=true")
    pretrain(corpus, tmp_path / "one", *EXACT, *masks)
    pretrain(corpus, tmp_path / "moved", *EXACT, *masks, "trainer.max_steps=4")
    rank_pool.run(
        pretrain,
        2,
        corpus,
        tmp_path / "moved",
        *EXACT,
        *masks,
        *CP2,
        "model.zero_stage=2",
        "trainer.max_steps=8",
    )
    pretrain(corpus, tmp_path / "moved", *EXACT, *masks)
    one, moved = (losses(tmp_path / name) for name in ("one", "moved"))
    assert near(moved, one)
    assert not near(one, losses(whole)), "the masks change something"
    validation = [losses(tmp_path / name, "val_loss") for name in ("one", "moved")]
    assert validation[0]
    assert near(*validation)


def test_weights_of_another_run_start_a_layout(rank_pool, corpus, whole, tmp_path):
    init = f"model.init_from={whole}"
    for ranks, folder, layout in ((1, "one", ()), (2, "two", ("model.tensor_model_parallel_size=2",))):
        rank_pool.run(
            pretrain, ranks, corpus, tmp_path / folder, *EXACT, init, *layout, "trainer.max_steps=2"
        )
    assert near(losses(tmp_path / "two"), losses(tmp_path / "one"))


def stopped(corpus, folder, rank_that_hears):
    import os
    import threading

    import torch.distributed as dist

    if dist.get_rank() == rank_that_hears:
        threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    return pretrain(corpus, folder, *EXACT, "trainer.max_steps=100000", "trainer.val_check_interval=null")


def test_a_signal_to_one_process_stops_all_after_saving(rank_pool, corpus, tmp_path):
    answers = rank_pool.run(stopped, 2, corpus, tmp_path, 1)
    assert [code for code, _ in answers] == [EXIT_STOPPED] * 2
    (step,) = steps_in(tmp_path)
    assert list(losses(tmp_path))[-1] <= step


def test_what_cannot_be_is_one_report(rank_pool, corpus, tmp_path):
    with pytest.raises(RankFailure) as caught:
        rank_pool.run(pretrain, 3, corpus, tmp_path, "model.tensor_model_parallel_size=2")
    assert ConfigError.__name__ in caught.value.errors[0]
    assert "3 processes, but this layout needs 2" in caught.value.errors[0]
    assert not (tmp_path / "checkpoints").exists()


def test_every_batch_of_a_ramp_must_fit_the_layout(rank_pool, corpus, tmp_path):
    with pytest.raises(RankFailure) as caught:
        rank_pool.run(pretrain, 2, corpus, tmp_path, "model.rampup_batch_size=[2,2,8]")
    assert "model.rampup_batch_size: it reaches 2: 2 is not a multiple" in caught.value.errors[0]


def test_a_ramp_may_begin_with_fewer_micro_batches_than_stages(rank_pool, corpus, tmp_path):
    ramp = (*EXACT, "model.rampup_batch_size=[1,1,8]", "trainer.max_steps=6")
    pretrain(corpus, tmp_path / "one", *ramp)
    answers = rank_pool.run(
        pretrain, 2, corpus, tmp_path / "two", *ramp, "model.pipeline_model_parallel_size=2"
    )
    assert [code for code, _ in answers] == [EXIT_SUCCESS] * 2
    assert near(losses(tmp_path / "two"), losses(tmp_path / "one"))


def decide():
    raise TopologyError("no", where="here", fix="do")


def everyone_decides():
    topology = Topology.of(Sizes(replicate=2))
    try:
        agreed(topology, decide)
    except MegalithError as error:
        return type(error).__name__, str(error), error.exit_code


def test_an_error_of_the_one_that_decides_is_everyones(rank_pool):
    first, second = rank_pool.run(everyone_decides, 2)
    assert first == ("TopologyError", "here: no\n  fix: do", 2)
    assert second == ("MegalithError", *first[1:])


@pytest.mark.parametrize(
    ("trainer", "sizes", "expected"),
    [
        ({}, Sizes(), 1),
        ({}, Sizes(tensor=2, pipeline=2), 4),
        ({"devices": 3}, Sizes(), 3),
        ({"devices": 1}, Sizes(tensor=2), 1),
    ],
)
def test_how_many_processes_a_command_starts(trainer, sizes, expected):
    assert processes_wanted(TrainerConfig(accelerator="cpu", **trainer), sizes) == expected


def test_several_machines_need_a_launcher():
    with pytest.raises(TopologyError, match="torchrun"):
        processes_wanted(TrainerConfig(num_nodes=2), Sizes())


@pytest.mark.parametrize(
    ("trainer", "seen", "local_rank", "expected"),
    [
        ({"accelerator": "cpu"}, 8, 3, "cpu"),
        ({}, 8, 3, "cuda:3"),
        ({"accelerator": "gpu"}, 8, 3, "cuda:3"),
        ({"accelerator": "gpu"}, 1, 3, "cuda:0"),  # a launcher that shows each process its own GPU
        ({"devices": [2, 5]}, 8, 1, "cuda:5"),
        ({"devices": [2]}, 8, None, "cuda:2"),
        ({}, 0, 1, "cpu"),
    ],
)
def test_each_process_has_its_device(monkeypatch, trainer, seen, local_rank, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    monkeypatch.setattr("torch.cuda.is_available", lambda: seen > 0)
    launched = None if local_rank is None else Launched(local_rank, 8, local_rank, "localhost", 1, "slurm")
    assert str(device_of(TrainerConfig(**trainer), launched)) == expected


def test_a_process_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(TopologyError, match="process 3 of this host, but it has 2 GPUs"):
        device_of(TrainerConfig(accelerator="gpu"), Launched(2, 4, 2, "localhost", 1, "slurm"))
