"""Who writes what: everything once, evenly, and nothing at all where the processes do not hold a whole model."""

from __future__ import annotations

import pytest
import torch

from megalith.checkpoint import plan as plans
from megalith.checkpoint.plan import Offer, file_name, make_plan, offers
from megalith.checkpoint.slices import elements, problem, whole

from .helpers import tensors_of


def copies(ranks: int, **shapes: tuple[int, ...]) -> list[dict[str, Offer]]:
    """Every rank holds everything."""
    return [{f"model.{n}": Offer("F32", s, whole(s)) for n, s in shapes.items()} for _ in range(ranks)]


def written(everyone, tensors) -> list[int]:
    """Elements that each process writes."""
    made = [make_plan(tensors, everyone, rank) for rank in range(len(everyone))]
    assert all(plan.table == made[0].table for plan in made)
    return [sum(t.numel() for entries in plan.files.values() for t in entries.values()) for plan in made]


def test_one_process_writes_whole_tensors_under_plain_names():
    tensors = tensors_of(1)
    plan = make_plan(tensors, [offers(tensors)], 0)
    assert set(plan.files) == {"model.safetensors", "optim.safetensors"}
    assert {name for entries in plan.files.values() for name in entries} == tensors.keys()
    assert all(record.is_whole for record in plan.table.values())
    assert plan.nbytes == sum(t.nbytes for t in tensors.values())
    for entries in plan.files.values():
        assert all(t.data_ptr() == tensors[n].data_ptr() for n, t in entries.items()), "nothing is copied"


def test_what_all_hold_is_written_once_and_evenly():
    shapes = {f"w{number}": (10 + number, 4) for number in range(40)} | {"bias": (3,), "scale": ()}
    tensors = {f"model.{n}": torch.zeros(s) for n, s in shapes.items()}
    loads = written(copies(4, **shapes), tensors)
    assert sum(loads) == sum(t.numel() for t in tensors.values())
    assert max(loads) - min(loads) <= 4


def test_a_large_table_is_shared_by_those_who_hold_it(monkeypatch):
    monkeypatch.setattr(plans, "LARGEST", 4 * 4 * 10)
    tensors = {"model.table": torch.zeros(100, 4)}
    everyone = copies(4, table=(100, 4))
    assert written(everyone, tensors) == [120, 120, 80, 80]
    record = make_plan(tensors, everyone, 0).table["model.table"]
    assert len(record.slices) == 10
    assert problem(record.shape, record.slices) == ""


def test_who_has_more_to_write_alone_gets_less_of_the_rest():
    everyone = copies(2, a=(30,), b=(20,))
    everyone[0]["model.own"] = Offer("F32", (50,), whole((50,)))
    tensors = {"model.a": torch.zeros(30), "model.b": torch.zeros(20), "model.own": torch.zeros(50)}
    assert written(everyone, tensors) == [50, 50]


def test_slices_of_each_rank_with_an_empty_one_and_replicas():
    """Six rows over four shards, twice: 2 2 2 0 and again."""
    bounds = [(0, 2), (2, 4), (4, 6), (6, 6)] * 2
    everyone = [{"model.x": Offer("F32", (6, 3), (rows, (0, 3)))} for rows in bounds]
    table = make_plan({"model.x": torch.zeros(2, 3)}, everyone, 0).table
    record = table["model.x"]
    assert sum(map(elements, record.slices)) == 18
    assert record.files <= {file_name("model", rank, 8) for rank in (0, 1, 2, 4, 5, 6)}


def test_every_process_has_a_file_of_each_kind_even_if_nothing_is_left_for_it():
    everyone, bias = copies(3, bias=(2,)), {"model.bias": torch.ones(2)}
    files = [make_plan(bias, everyone, rank).files for rank in range(3)]
    assert [list(f) for f in files] == [[file_name("model", rank, 3)] for rank in range(3)]
    assert [list(entries) for f in files for entries in f.values()] == [["model.bias"], [], []]


def test_what_does_not_fit_together_is_refused():
    whole_model = copies(2, w=(4, 2))
    tensors = {"model.w": torch.zeros(4, 2)}
    hole = [{"model.w": Offer("F32", (4, 2), ((0, 2), (0, 2)))}, {}]
    with pytest.raises(ValueError, match=r"model\.w cannot be saved: its slices hold 4 of 8 elements"):
        make_plan({"model.w": tensors["model.w"][:2]}, hole, 1)
    with pytest.raises(ValueError, match="is there twice"):
        make_plan(tensors, [whole_model[0], hole[0]], 1)
    for other in (Offer("F32", (4, 3), ((0, 4), (0, 3))), Offer("BF16", (4, 2), ((0, 4), (0, 2)))):
        with pytest.raises(ValueError, match=r"on process 1, .* on one before it"):
            make_plan(tensors, [whole_model[0], {"model.w": other}], 0)
