"""Order = f(plan, consumed samples): every sample once an epoch, the same stream whatever happens on the way."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalith.data import blend as blend_module
from megalith.data.blend import blend, normalised
from megalith.data.index import samples_in
from megalith.data.plan import DataPlan, Source, Wish
from megalith.errors import CheckpointError, ConfigError, DataError
from tests.data.corpus import random_lengths, run_data, tokens_of, write

ORDERS = ["native", "megatron"]


@pytest.fixture(scope="module", autouse=True)
def _short_chunks():
    """A blend is made in stretches of a million samples; here a few hundred are read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend_module, "_CHUNK", 512)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {
        name: write(folder / name, random_lengths(seed, items), first=100 * seed)
        for seed, (name, items) in enumerate({"a": 30, "b": 12, "c": 50}.items())
    }


def stored(data):
    """What a checkpoint gives back."""
    return json.loads(json.dumps(data.state()))


def resumed(data, consumed, prefix, **options):
    return run_data(prefix, request={"stored": stored(data), "consumed": consumed}, **options)


# ---- every sample exactly once ----


def test_native_reads_every_token_once_an_epoch(files):
    stream = run_data(files["a"]).train
    for epoch in range(3):
        inputs = [
            t
            for row in tokens_of(stream, range(epoch * stream.once, (epoch + 1) * stream.once))
            for t in row[:-1]
        ]
        assert len(inputs) == len(set(inputs)) == 8 * stream.once
        assert sum(random_lengths(0)) - 1 - len(inputs) < 8


@pytest.mark.parametrize("order", ORDERS)
def test_a_blend_reads_each_source_in_its_own_order(files, order):
    """Sample c of a source is what the source alone would give as its c-th: nothing skipped, nothing twice."""
    both = run_data([0.3, files["a"], 0.7, files["b"]], order=order, samples=200).train
    sources, numbers, _ = blend(normalised([0.3, 0.7]), 200)
    located = both.locate(np.arange(200))
    assert located[0].tolist() == sources.tolist()
    assert located[1].tolist() == numbers.tolist()
    for source in (0, 1):
        mine = np.flatnonzero(sources == source)
        alone = [both.dataset(source)[i].tolist() for i in range(len(mine))]
        assert tokens_of(both, mine) == alone


def test_megatron_reads_every_sample_of_its_index_once(files):
    data = run_data(files["a"], order="megatron", samples=60)
    whole = data.train.dataset(0).order.once
    assert whole >= 60
    again = resumed(data, 60, files["a"], order="megatron", samples=whole)
    assert stored(again)["train"]["sources"] == stored(data)["train"]["sources"], (
        "the index holds enough already"
    )
    rows = [int(again.train.dataset(0).order.find(i)[1]) for i in range(whole)]
    assert sorted(rows) == list(range(whole))


# ---- the run's length, batches, resuming ----


@given(first=st.integers(1, 200), longer=st.integers(1, 300))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("blended", [False, True])
def test_native_does_not_know_how_long_the_run_is(files, blended, first, longer):
    prefix = [0.6, files["a"], 0.4, files["c"]] if blended else files["a"]
    one, other = (run_data(prefix, samples=n).train for n in (first, first + longer))
    assert tokens_of(one, range(80)) == tokens_of(other, range(80))


@given(
    first=st.integers(1, 150),
    longer=st.integers(1, 200),
    consumed=st.integers(0, 150),
    blended=st.booleans(),
    order=st.sampled_from(ORDERS),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lengthening_moves_nothing(files, first, longer, consumed, blended, order):
    prefix = [0.6, files["a"], 0.4, files["c"]] if blended else files["a"]
    data = run_data(prefix, samples=first, order=order)
    planned = tokens_of(data.train, range(first))
    after = resumed(data, min(consumed, first), prefix, samples=first + longer, order=order)
    assert tokens_of(after.train, range(first)) == planned
    everything = [
        tuple(pair) for pair in np.stack(after.train.locate(np.arange(first + longer)), axis=1).tolist()
    ]
    assert len(set(everything)) == first + longer, "no sample of a source is given twice"
    for source in {pair[0] for pair in everything}:
        numbers = sorted(pair[1] for pair in everything if pair[0] == source)
        assert numbers == list(range(len(numbers))), "none is left out"


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5), order=st.sampled_from(ORDERS))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lengthened_again_and_again(files, lengths, order):
    """A plan that grew step by step still says what it said at every earlier time."""
    total = lengths[0]
    data = run_data(files["b"], samples=total, order=order)
    seen = tokens_of(data.train, range(total))
    for more in lengths[1:]:
        data = resumed(data, total, files["b"], samples=total + more, order=order)
        assert tokens_of(data.train, range(total)) == seen
        total += more
        seen = tokens_of(data.train, range(total))


@pytest.mark.parametrize("order", ORDERS)
def test_a_shorter_run_is_the_beginning_of_the_longer_one(files, order):
    data = run_data(files["a"], samples=100, order=order)
    shorter = resumed(data, 10, files["a"], samples=20, order=order)
    assert tokens_of(shorter.train, range(20)) == tokens_of(data.train, range(20))


@pytest.mark.parametrize("order", ORDERS)
def test_an_unchanged_plan_is_equal(files, order):
    data = run_data([1, files["a"], 2, files["b"]], order=order)
    assert stored(resumed(data, 17, [1, files["a"], 2, files["b"]], order=order)) == stored(data)


def test_beyond_the_plan(files):
    stream = run_data(files["a"], samples=20, order="megatron").train
    with pytest.raises(DataError, match="sample 20 is not in the plan, which covers 20 samples"):
        stream.read(np.array([19, 20]))


# ---- other weights, other sources ----


@given(
    consumed=st.integers(0, 120),
    weights=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    order=st.sampled_from(ORDERS),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_other_weights_lose_and_repeat_nothing(files, consumed, weights, order):
    data = run_data([5, files["a"], 5, files["b"]], samples=120, order=order)
    before = tokens_of(data.train, range(consumed))
    notices: list[str] = []
    changed = [weights[0], files["a"], weights[1], files["b"]]
    after = run_data(
        changed,
        samples=260,
        order=order,
        request={"stored": stored(data), "consumed": consumed, "notice": notices.append},
    )
    assert tokens_of(after.train, range(consumed)) == before
    pairs = [tuple(p) for p in np.stack(after.train.locate(np.arange(260)), axis=1).tolist()]
    for source in (0, 1):
        assert [i for s, i in pairs if s == source] == list(range(sum(s == source for s, _ in pairs)))
    told = weights[0] != weights[1]
    assert len(notices) == told, "a change is announced"
    assert len(after.train.plan.segments) == 1 + (told and consumed > 0)
    share = Counter(s for s, _ in pairs[consumed:])[0] / (260 - consumed)
    assert share == pytest.approx(weights[0] / sum(weights), abs=0.02)


def test_a_source_comes_and_another_goes(files):
    data = run_data([1, files["a"], 1, files["b"]])
    second = resumed(data, 40, [1, files["b"], 1, files["c"]])
    third = resumed(second, 70, [1, files["a"], 1, files["c"]])
    stream = third.train
    paths = [[stream.provenance(i).path for i in span] for span in (range(40), range(40, 70), range(70, 90))]
    assert [set(map(str, span)) for span in paths] == [
        {files["a"], files["b"]},
        {files["b"], files["c"]},
        {files["a"], files["c"]},
    ]
    pairs = np.stack(stream.locate(np.arange(90)), axis=1).tolist()
    for source in range(3):
        mine = [i for s, i in pairs if s == source]
        assert mine == list(range(len(mine))), "each goes on where it stopped"


def test_sources_without_weights_count_by_their_tokens(files):
    plan = run_data([files["a"], files["b"]]).train.plan
    tokens = [sum(random_lengths(seed, items)) for seed, items in ((0, 30), (1, 12))]
    assert [m.weight for m in plan.segments[0].members] == pytest.approx([t / sum(tokens) for t in tokens])


def test_the_same_file_twice(files):
    data = run_data([1, files["a"], 1, files["a"]])
    again = resumed(data, 10, [1, files["a"], 1, files["a"]])
    assert stored(again) == stored(data)


# ---- what cannot change ----


def test_a_moved_file_is_the_same_file(files, tmp_path):
    data = run_data(files["a"])
    for suffix in (".bin", ".idx"):
        shutil.copy(files["a"] + suffix, tmp_path / f"moved{suffix}")
    after = resumed(data, 10, str(tmp_path / "moved"))
    assert tokens_of(after.train, range(40)) == tokens_of(data.train, range(40))
    assert after.train.plan.sources[0].path == str(tmp_path / "moved")


@pytest.mark.parametrize("order", ORDERS)
def test_a_changed_file_is_refused_by_name(tmp_path, order):
    path = write(tmp_path / "x", random_lengths(0))
    data = run_data(path, order=order)
    write(tmp_path / "x", random_lengths(9))
    with pytest.raises(DataError, match=r"x\.idx: the file has changed since the run read it"):
        resumed(data, 10, path, order=order)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"order": "megatron"}, "model.data.order"),
        ({"seq_length": 4}, "model.encoder_seq_length"),
        ({"seed": 2}, "model.seed"),
        ({"splits_string": "1,1,0"}, "model.data.splits_string"),
    ],
)
def test_keys_that_would_move_what_was_read(files, change, where):
    data = run_data(files["a"])
    with pytest.raises(ConfigError) as caught:
        resumed(data, 10, files["a"], **change)
    (problem,) = caught.value.problems
    assert problem.where == where
    assert "cannot change while a run goes on" in problem.what
    assert "model.init_from" in problem.fix


def test_another_spelling_of_the_same_split(files):
    data = run_data(files["a"], splits_string="900,50,50")
    resumed(data, 10, files["a"], splits_string="90/5/5")


def test_cyclic_keeps_its_data_set(files):
    data = run_data(files["a"], order="megatron", dataloader_type="cyclic", samples=50)
    plan = data.train.plan
    assert plan.cycle == data.train.dataset(0).order.once
    longer = resumed(data, 50, files["a"], order="megatron", dataloader_type="cyclic", samples=500)
    assert longer.train.plan.cycle == plan.cycle
    assert longer.train.plan.sources == plan.sources
    with pytest.raises(ConfigError, match="dataloader_type"):
        resumed(data, 50, files["a"], order="megatron")
    with pytest.raises(ConfigError, match="data_prefix"):
        resumed(data, 50, [1, files["a"], 1, files["b"]], order="megatron", dataloader_type="cyclic")


# ---- JSON ----


SOURCE = Source("p", 9, 90, "aa", 180, None, 0, 9, 90)
WISH = Wish("train", "native", 8, 1, 100, (SOURCE,))


def test_json_round_trip():
    plan = DataPlan.make(WISH)
    assert DataPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("data", [None, {}, {"split": 1}, []])
def test_not_a_plan(data):
    with pytest.raises(CheckpointError, match="stored data plan"):
        DataPlan.from_json(data)


def test_a_newer_plan():
    with pytest.raises(CheckpointError, match="format 99"):
        DataPlan.from_json(DataPlan.make(WISH).to_json() | {"format_version": 99})


def test_what_megatron_is_asked_for():
    """⌈n · weight · 1.005⌉ of a weighted source, n of a bare one."""
    bare = DataPlan.make(Wish("train", "megatron", 8, 1, 1000, (SOURCE,)))
    assert bare.sources[0].chapters == (1000,)
    weighted = DataPlan.make(Wish("train", "megatron", 8, 1, 1000, (SOURCE, SOURCE), (1.0, 2.0)))
    assert [s.chapters for s in weighted.sources] == [(335,), (670,)]
    alone = DataPlan.make(Wish("train", "megatron", 8, 1, 1000, (SOURCE,), (0.3,)))
    assert alone.sources[0].chapters == (1005,)


def test_samples_of_an_epoch_are_the_rule_of_the_index():
    assert [samples_in(t, 8) for t in (0, 1, 8, 9, 16, 17)] == [0, 0, 0, 1, 1, 2]
