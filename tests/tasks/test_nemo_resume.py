"""A run that NeMo began goes on in its own folder: the losses of the run that was never interrupted, at any layout."""

from __future__ import annotations

import shutil

import pytest
import torch
from omegaconf import OmegaConf

from megalith.checkpoint.foreign import find
from megalith.checkpoint.reading import read_tensors
from megalith.errors import EXIT_SUCCESS, CheckpointError
from megalith.tokenizers.load import load_tokenizer
from megalith.training.starting import choose_start
from tests.golden.nemo_files import Layout, place, state_dict
from tests.golden.nemo_lightning_files import modules
from tests.golden.whole import Whole
from tests.tasks.nano import BATCH, LENGTH, losses, make_corpus, pretrain

HEADS, LAYERS, STEP = 2, 2, 3
LAST = "mp_autoresume-last.ckpt"
NAMES = {
    "norm1": "norm_attention",
    "proj": "attention.out",
    "norm2": "norm_mlp",
    "up": "mlp.up",
    "down": "mlp.down",
}
SAME = ("model.hidden_dropout=0", "model.attention_dropout=0")
ON = (*SAME, "exp_manager.resume_if_exists=true")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole_run(corpus, tmp_path_factory):
    """Six steps, of which the third is kept."""
    folder = tmp_path_factory.mktemp("whole")
    more = (
        "exp_manager.checkpoint_callback_params.every_n_train_steps=3",
        "exp_manager.checkpoint_callback_params.save_top_k=-1",
    )
    pretrain(corpus, folder, *SAME, *more, steps=6)
    return folder


def plain(step, prefix: str, suffix: str, vocabulary: int) -> Whole:
    """Weights, or a moment of each, of a step folder under plain names."""
    found = {
        lazy.name.removeprefix(prefix).removesuffix(suffix): lazy.read()
        for lazy in read_tensors(step, prefix)
        if lazy.name.endswith(suffix)
    }
    layers = []
    for number in range(LAYERS):
        layer = {
            f"{plain}.{part}": found[f"blocks.{number}.{ours}.{part}"]
            for plain, ours in NAMES.items()
            for part in ("weight", "bias")
        }
        for part in ("weight", "bias"):
            heads = found[f"blocks.{number}.attention.qkv.{part}"].unflatten(0, (HEADS, 3, -1))
            layer |= {f"{name}.{part}": heads[:, i].flatten(0, 1) for i, name in enumerate("qkv")}
        layers.append(layer)
    norm = {part: found[f"final_norm.{part}"] for part in ("weight", "bias")}
    word = found["token_embedding.weight"][:vocabulary]
    return Whole(HEADS, HEADS, word, found["position_embedding.weight"], None, norm, layers)


def write_nemo(folder, whole_run, corpus, layout: Layout, name: str = LAST, step: int = STEP) -> None:
    """What NeMo would have saved at step 3 of that run: weights, FusedAdam's state, configuration."""
    vocabulary = load_tokenizer(corpus / "tok").vocab_size
    source = whole_run / f"checkpoints/step_{STEP:07d}"
    weights = plain(source, "model.", "", vocabulary)
    moments = {kind: plain(source, "optim.", f".{kind}", vocabulary) for kind in ("exp_avg", "exp_avg_sq")}
    for stage in range(layout.pp):
        for rank in range(layout.tp):
            state = state_dict(weights, layout, rank, stage)
            adam = {kind: state_dict(whole, layout, rank, stage) for kind, whole in moments.items()}
            path = folder / "checkpoints" / place(layout, rank, stage) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {
                "epoch": 0,
                "global_step": step,
                "pytorch-lightning_version": "1.6.5",
                "state_dict": state,
                "lr_schedulers": [{"last_epoch": step}],
                "optimizer_states": [fused_adam(state, adam)],
                "hyper_parameters": {"cfg": OmegaConf.create(keys(layout))},
            }
            torch.save(content, path)


def keys(layout: Layout) -> dict[str, object]:
    return {
        "num_layers": LAYERS,
        "hidden_size": 16,
        "ffn_hidden_size": 32,
        "num_attention_heads": HEADS,
        "max_position_embeddings": LENGTH,
        "global_batch_size": BATCH,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def fused_adam(state, adam) -> dict[str, object]:
    """Two groups: what decays, and biases and norms; each in the order of the modules."""
    names = [f"{m}.{part}" for m in modules(state) for part in ("weight", "bias") if f"{m}.{part}" in state]
    plain = [name for name in names if name.endswith("bias") or "layernorm" in name]
    groups = [[name for name in names if name not in plain], plain]
    order = [name for group in groups for name in group]
    return {
        "state": {i: {kind: adam[kind][name] for kind in adam} for i, name in enumerate(order)},
        "param_groups": [
            {"lr": 1e-2, "step": STEP, "params": [order.index(name) for name in group]} for group in groups
        ],
    }


@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(2, 1), Layout(2, 2)], ids=["one", "tp2", "tp2 pp2"])
def test_a_run_of_nemos_goes_on_in_its_folder(corpus, whole_run, tmp_path, layout):
    write_nemo(tmp_path, whole_run, corpus, layout)
    code, text = pretrain(corpus, tmp_path, *ON, steps=5)
    assert code == EXIT_SUCCESS
    assert "going on from step 3" in text
    assert "begun by NeMo" in text
    assert "its name does not say consumed_samples: 3 steps of 4 are counted" in text
    expected = losses(whole_run)
    assert losses(tmp_path) == pytest.approx({step: expected[step] for step in (4, 5)}, abs=1e-7)
    _, text = pretrain(corpus, tmp_path, *ON, steps=6)  # from its own checkpoint now
    assert "going on from step 5" in text
    assert "begun by NeMo" not in text
    assert losses(tmp_path)[6] == pytest.approx(expected[6], abs=1e-7)
    assert find(tmp_path).is_native


def test_on_two_processes(rank_pool, corpus, whole_run, tmp_path):
    write_nemo(tmp_path, whole_run, corpus, Layout())
    answers = rank_pool.run(
        pretrain, 2, corpus, tmp_path, *ON, "model.tensor_model_parallel_size=2", "trainer.max_steps=5"
    )
    assert "going on from step 3" in answers[0][1]
    expected = losses(whole_run)
    assert losses(tmp_path) == pytest.approx({step: expected[step] for step in (4, 5)}, abs=1e-5)


def test_a_file_that_is_named(corpus, whole_run, tmp_path):
    write_nemo(tmp_path / "theirs", whole_run, corpus, Layout())
    begin = f"model.resume_from_checkpoint={tmp_path}/theirs/checkpoints/{LAST}"
    pretrain(corpus, tmp_path / "ours", *SAME, begin, steps=4)
    assert losses(tmp_path / "ours") == pytest.approx({4: losses(whole_run)[4]}, abs=1e-7)


# ---- which of them ----


def test_which_checkpoint(corpus, whole_run, tmp_path):
    best = "mp_autoresume---val_loss=0.35-epoch=0.ckpt"
    for name, step in ((LAST, 3), (best, 2)):
        write_nemo(tmp_path, whole_run, corpus, Layout(2), name, step)
    root = tmp_path / "checkpoints"

    def chosen():
        return choose_start(root, resume_if_exists=True)

    assert chosen().folder == root / "mp_rank_00" / LAST
    # A metric-named one that was finished when the last was not begun.
    newer = best.replace("0.35-epoch=0", "0.34-epoch=1")
    write_nemo(tmp_path, whole_run, corpus, Layout(2), newer, 4)
    start = chosen()
    assert (start.folder.name, start.state["step"]) == (newer, 4)
    assert any("is newer than mp_autoresume-last.ckpt (step 3)" in notice for notice in start.notices)
    # One that was being written, by NeMo's marker, and by a rank that is missing.
    (root / f"{newer.removesuffix('.ckpt')}-unfinished").touch()
    (root / "mp_rank_01" / LAST).unlink()
    start = chosen()
    assert start.folder.name == best
    assert any("-unfinished marker" in notice for notice in start.notices)
    assert any("there for 1 of 2 ranks" in notice for notice in start.notices)
    (root / "mp_rank_00" / best).write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint of this run is whole.*cannot be read"):
        chosen()


def test_several_last_ones_are_refused_by_name(corpus, whole_run, tmp_path):
    names = ["gpt--val_loss=3.10-step=2-last.ckpt", "gpt--val_loss=3.00-step=3-last.ckpt"]
    write_nemo(tmp_path, whole_run, corpus, Layout(), names[0])
    shutil.copy(tmp_path / "checkpoints" / names[0], tmp_path / "checkpoints" / names[1])
    with pytest.raises(CheckpointError, match="2 checkpoints that are called the last") as caught:
        pretrain(corpus, tmp_path, *ON)
    assert all(name in str(caught.value) for name in names)
    assert "model.resume_from_checkpoint=FILE" in str(caught.value)


def test_what_cannot_go_on(corpus, whole_run, tmp_path):
    write_nemo(tmp_path, whole_run, corpus, Layout())
    root = tmp_path / "checkpoints"
    with pytest.raises(CheckpointError, match="this run has checkpoints already, NeMo's"):
        choose_start(root, resume_if_exists=True, init_from="anything")
    content = torch.load(root / LAST, weights_only=False)
    torch.save({**content, "optimizer_states": []}, root / LAST)
    with pytest.raises(CheckpointError, match=r"(?s)holds no optimizer state.*model\.init_from"):
        choose_start(root, resume_if_exists=True)
    (root / LAST).rename(root / "mp_autoresume-end.ckpt")
    with pytest.raises(CheckpointError, match="the run is complete"):
        choose_start(root, resume_if_exists=True)
