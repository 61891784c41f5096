"""A run of NeMo's moves here: its checkpoints compute what `transformers` does, and every moment lands on its weight."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.foreign import find, open_foreign
from megalith.checkpoint.reading import read_tensors
from megalith.errors import CheckpointError
from megalith.generate.loading import load_model
from tests.golden import nemo_sided_files, tiny, tiny_sides
from tests.golden.nemo_files import Layout, gpt_keys
from tests.golden.nemo_lightning_files import (
    NAME,
    SAMPLES,
    STEP,
    Run,
    write_bert_run,
    write_run,
    write_t5_run,
)
from tests.golden.sides import from_megatron_bert, from_pegasus
from tests.golden.whole import from_gpt2


@pytest.fixture(scope="module")
def gpt2():
    model = tiny.rounded(tiny.gpt2(), torch.float16)
    return from_gpt2(model), tiny.logits(model)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_logits(tmp_path, gpt2, tp, pp):
    whole, theirs = gpt2
    folder = write_run(tmp_path, whole, Run(Layout(tp, pp)), gpt_keys())
    rank = next(folder.rglob(NAME))
    for path in (tmp_path, folder, rank, rank.parent):
        assert find(path).kind == "nemo-lightning"
    loaded = load_model(rank, device="cpu", precision="64")
    with torch.no_grad():
        ours = loaded.model.logits(loaded.model(tiny.tokens()))
    assert (ours[..., : tiny.VOCABULARY] - theirs).abs().max() <= 1e-10


def moments_on_their_weights(folder, tmp_path):
    """The folder of a conversion, of which each moment is what its weight makes it."""
    done = convert(folder, tmp_path / "native", Plan("native", untrained=True))
    saved = {lazy.name: lazy.read() for lazy in read_tensors(done.folder)}
    moments = {lazy.name: lazy.read() for lazy in read_tensors(done.folder, "optim.")}
    assert len(moments) == 2 * len(saved)
    for name, weight in saved.items():
        own = name.removeprefix("model.")
        assert weight.dtype == torch.float32
        assert torch.equal(moments[f"optim.{own}.exp_avg"], 2 * weight)
        assert torch.equal(moments[f"optim.{own}.exp_avg_sq"], weight.square())
    return done


@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(2, 1), Layout(1, 2)])
def test_a_bert_brings_its_moments(tmp_path, layout):
    model = tiny.rounded(tiny_sides.megatron_bert(), torch.float16)
    keys = nemo_sided_files.keys("bert", micro_batch_size=4)
    folder = write_bert_run(tmp_path, from_megatron_bert(model), Run(layout), keys)
    moments_on_their_weights(folder, tmp_path)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_t5_brings_its_moments(tmp_path, tp):
    model, table = tiny_sides.megatron_t5()
    whole = from_pegasus(tiny.rounded(model, torch.float16), table.half().to(table.dtype))
    folder = write_t5_run(
        tmp_path, whole, Run(Layout(tp, 1)), nemo_sided_files.keys("t5", micro_batch_size=4)
    )
    moments_on_their_weights(folder, tmp_path)


@pytest.mark.parametrize("run", [
    Run(Layout(1, 1)),
    Run(Layout(2, 1), apex=False),
    Run(Layout(1, 2)),
    Run(Layout(2, 2, tree="O2"), masters=True),
], ids=["whole", "tp2", "pp2", "O2 on both"])  # fmt: skip
def test_every_moment_lands_on_its_weight(tmp_path, gpt2, run):
    folder = write_run(tmp_path, gpt2[0], run, gpt_keys(global_batch_size=8))
    done = moments_on_their_weights(folder, tmp_path)
    state = json.loads((done.folder / "state.json").read_text())
    assert (state["step"], state["consumed_samples"], state["updates"]["step"]) == (STEP, SAMPLES, STEP)
    assert state["scaler"] == {"scale": 4096.0}


def test_samples_that_no_name_tells_are_counted_by_steps(tmp_path, gpt2):
    run = Run(Layout(), name="gpt-last.ckpt")
    foreign = open_foreign(write_run(tmp_path, gpt2[0], run, gpt_keys(global_batch_size=8)))
    assert foreign.state == {"step": STEP, "consumed_samples": 8 * STEP}
    assert any("consumed_samples" in notice for notice in foreign.notices)


def test_the_configuration_of_a_run_beside_it(tmp_path, gpt2):
    folder = write_run(tmp_path, gpt2[0], Run(Layout()), gpt_keys())
    path = next(folder.rglob(NAME))
    content = torch.load(path, weights_only=False)
    content["hyper_parameters"] = {}
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        open_foreign(path)
    lines = [f"  {name}: {value}" for name, value in gpt_keys().items() if isinstance(value, int)]
    (tmp_path / "hparams.yaml").write_text("\n".join(["cfg:", *lines]))
    assert open_foreign(path).config.num_attention_heads == tiny.HEADS


def test_a_folder_without_a_last_one(tmp_path, gpt2):
    folder = write_run(tmp_path, gpt2[0], Run(Layout(2), name="a--val_loss=0.30.ckpt"), gpt_keys())
    assert open_foreign(folder).config.num_layers == tiny.LAYERS
    write_run(tmp_path, gpt2[0], Run(Layout(2), name="a--val_loss=0.29.ckpt"), gpt_keys())
    with pytest.raises(CheckpointError, match="it holds 2 checkpoints"):
        find(folder)


def test_a_missing_rank(tmp_path, gpt2):
    folder = write_run(tmp_path, gpt2[0], Run(Layout(2, 2)), gpt_keys())
    shutil.rmtree(folder / "tp_rank_01_pp_rank_000")
    with pytest.raises(CheckpointError, match="files of ranks are missing: tp_rank_01_pp_rank_000"):
        open_foreign(folder)


def test_an_optimizer_that_is_not_read(tmp_path, gpt2):
    folder = write_run(tmp_path, gpt2[0], Run(Layout()), gpt_keys())
    path = next(folder.rglob(NAME))
    content = torch.load(path, weights_only=False)
    content["optimizer_states"] = [{"state": {}, "param_groups": [], "buckets": [torch.zeros(4)]}]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="its optimizer has 0 parameters"):
        convert(path, tmp_path / "native", Plan("native", untrained=True))
    done = convert(path, tmp_path / "native", Plan("native", untrained=True, optimizer=False))
    assert not list(read_tensors(done.folder, "optim."))


def test_an_optimizer_in_the_order_of_other_modules_stays_behind(tmp_path, gpt2):
    folder = write_run(tmp_path, gpt2[0], Run(Layout(tree="core")), gpt_keys())
    done = convert(folder, tmp_path / "native", Plan("native", untrained=True))
    assert any(
        "in the order of megatron-core's modules, which is left behind" in said for said in done.notices
    )
    with pytest.raises(CheckpointError, match="in the order of megatron-core's modules"):
        convert(folder, tmp_path / "another", Plan("native", untrained=True, optimizer=True))
