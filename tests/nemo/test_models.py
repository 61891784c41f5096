"""Models with NeMo's methods: what is restored is what was saved, at any layout; what was typed lies on top of the archive."""

from __future__ import annotations

import tarfile

import pytest
import torch

import megalith
from megalith.config.compose import compose
from megalith.errors import CheckpointError, ConfigError, TopologyError, UnsupportedError
from megalith.nemo.models import MODELS, GPTModel, MegatronGPTModel
from megalith.nemo.trainer import NLPDDPPlugin, Trainer, exp_manager
from megalith.tasks.pretrain_config import PretrainGPTConfig
from tests.checkpoint.nemo_archives import nemo_archive
from tests.tasks.nano import losses, make_corpus, pretrain, steps_in

HERE = {"accelerator": "cpu", "devices": 1, "precision": 32, "max_steps": 4, "enable_progress_bar": False}
BATCHES = {"limit_val_batches": 2, "limit_test_batches": 2, "val_check_interval": 2}


def trainer(**more):
    return Trainer(plugins=[NLPDDPPlugin()], **{**HERE, **BATCHES, **more})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pretrain(corpus, folder, steps=4)
    return folder


@pytest.fixture(scope="module")
def archive(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "nano.nemo"
    return GPTModel.restore_from(run, map_location="cpu").save_to(path)


def over(corpus, **model):
    """What the archive does not hold: NeMo reads no tokenizer like this corpus's."""
    return {
        "tokenizer": {"file": str(corpus / "tok")},
        "data": {"data_prefix": [f"{corpus}/nano"], "splits_string": "80,10,10", "num_workers": 0},
        "micro_batch_size": 2,
        "global_batch_size": 4,
        **model,
    }


def measured(path, override=None, **more):
    """What `trainer.test` returns, and the model."""
    lightning = trainer(**more)
    model = GPTModel.restore_from(path, trainer=lightning, override_config_path=override)
    (found,) = lightning.test(model=model, ckpt_path=None, verbose=False)
    return found, model


def parts_of(path):
    with tarfile.open(path) as file:
        return sorted(name for name in file.getnames() if name.endswith("model_weights.ckpt"))


# ---- there and back ----


def test_what_is_restored_is_what_was_saved(corpus, run, archive):
    theirs, model = measured(run)
    ours, back = measured(archive, over(corpus))
    assert ours == pytest.approx(theirs, abs=1e-9)
    assert ours["test_loss"] > 1
    for name, tensor in model.engine.tensors().items():
        if name.startswith("model."):
            other = back.engine.tensors()[name]
            rows = model.tokenizer.vocab_size if name == "model.token_embedding.weight" else len(tensor)
            assert torch.equal(other[:rows], tensor[:rows]), name
    assert parts_of(archive) == ["./model_weights.ckpt"]
    assert model.generate(["w00 w07"], {"max_length": 4}) == back.generate(["w00 w07"], {"max_length": 4})


def test_fit_goes_on_where_the_folder_ends(corpus, archive, tmp_path):
    """The same script again, as NeMo's auto-resume: to the last bit what one run would have come to."""
    learning = {"lr": 1e-2, "sched": {"name": "constant", "min_lr": 0}}

    def script(folder, steps):
        lightning = trainer(max_steps=steps)
        resume = {"resume_if_exists": True, "resume_ignore_no_checkpoint": True}
        exp_manager(
            lightning, {"explicit_log_dir": str(folder), "create_tensorboard_logger": False, **resume}
        )
        model = GPTModel.restore_from(
            archive, trainer=lightning, override_config_path=over(corpus, optim=learning)
        )
        lightning.fit(model)
        return model

    whole = script(tmp_path / "whole", 6)
    script(tmp_path / "run", 4)
    again = script(tmp_path / "run", 6)
    held = losses(tmp_path / "run", "val_loss")
    assert (list(held), held) == ([2, 4, 6], losses(tmp_path / "whole", "val_loss"))
    for name, tensor in whole.engine.tensors().items():
        assert torch.equal(tensor, again.engine.tensors()[name]), name


def test_validation_and_training_of_what_was_restored(corpus, archive, tmp_path):
    lightning = trainer(max_steps=6)
    exp_manager(lightning, {"explicit_log_dir": str(tmp_path / "run"), "create_tensorboard_logger": False})
    learning = {"lr": 1e-2, "sched": {"name": "constant", "min_lr": 0}}
    model = megalith.GPTModel.restore_from(
        archive, trainer=lightning, override_config_path=over(corpus, optim=learning)
    )
    (before,) = lightning.validate(model=model, verbose=False)
    lightning.fit(model)
    (after,) = lightning.validate(model=model, verbose=False)
    assert after["val_loss"] < before["val_loss"]
    assert (model.engine.step, steps_in(tmp_path / "run")[-1]) == (6, 6)
    saved = GPTModel.restore_from(tmp_path / "run", trainer=trainer(max_steps=6))
    assert torch.equal(
        saved.engine.tensors()["model.final_norm.bias"], model.engine.tensors()["model.final_norm.bias"]
    )
    # What a trainer that was told nothing fits leaves nothing behind; an archive of the same name is replaced.
    place = tmp_path / "here" / "x.nemo"
    model.save_to(place)
    first = place.read_bytes()
    model.engine.tensors()["model.final_norm.bias"].add_(1)
    model.save_to(place)
    assert place.read_bytes() != first
    assert [path.name for path in place.parent.iterdir()] == ["x.nemo"]


def tensor_parallel(path, override, target, size):
    """On each rank: losses and an answer of a model on `size` tensor ranks, which is saved."""
    found, model = measured(path, {**override, "tensor_model_parallel_size": size}, devices="auto")
    said = model.generate(["w00 w07"], {"max_length": 4})["sentences"]
    model.save_to(target)
    return found["test_loss"], said


def answered(path, override):
    """On each rank: an answer."""
    model = GPTModel.restore_from(path, trainer=trainer(devices="auto"), override_config_path=override)
    return model.generate(["w00 w07"], {"max_length": 4})["sentences"]


@pytest.mark.parametrize(
    "layout",
    [
        {"pipeline_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ],
    ids=["pipeline", "sequence"],
)
def test_a_model_in_two_parts_answers(rank_pool, corpus, archive, layout):
    model = GPTModel.restore_from(archive, trainer=trainer(), override_config_path=over(corpus))
    said = model.generate(["w00 w07"], {"max_length": 4})["sentences"]
    assert rank_pool.run(answered, 2, archive, over(corpus, **layout)) == [said, said]


def test_two_processes_and_back(rank_pool, corpus, run, archive, tmp_path):
    whole, model = measured(run)
    two = tmp_path / "two.nemo"
    answers = rank_pool.run(tensor_parallel, 2, archive, over(corpus), two, 2)
    assert parts_of(two) == ["./mp_rank_00/model_weights.ckpt", "./mp_rank_01/model_weights.ckpt"]
    assert [loss for loss, _ in answers] == pytest.approx([whole["test_loss"]] * 2, abs=1e-5)
    said = model.generate(["w00 w07"], {"max_length": 4})["sentences"]
    assert [text for _, text in answers] == [said, said]
    found, back = measured(two, over(corpus))  # the archive's two ranks do not fit one process
    assert found == pytest.approx(whole, abs=1e-5)
    assert back.cfg.tensor_model_parallel_size == 1


# ---- the archive first, the user on top ----


def test_the_archives_keys_first_and_the_users_on_top(tmp_path):
    keys = {
        "optim": {"name": "fused_adam", "lr": 3e-4, "sched": {"name": "CosineAnnealing", "min_lr": 1e-6}},
        "global_batch_size": 16,
        "hidden_dropout": 0.2,
        "native_amp_init_scale": 1024,
        "megatron_amp_O2": True,
        "no_such_key": 1,
    }
    path = nemo_archive(tmp_path / "a.nemo", keys=keys)
    own = GPTModel.restore_from(path, return_config=True)
    assert (own.optim.lr, own.global_batch_size, own.hidden_dropout) == (3e-4, 16, 0.2)
    assert (own.initial_loss_scale, own.num_layers, own.encoder_seq_length) == (1024, 2, 12)
    (tmp_path / "over.yaml").write_text("model:\n  optim:\n    lr: 1.0e-2\n")
    typed = ["model.optim.lr=1e-2", "model.data.data_prefix=x"]
    composed = compose(PretrainGPTConfig, overrides=typed)
    for override in ({"optim": {"lr": 1e-2}}, tmp_path / "over.yaml", composed):
        mixed = GPTModel.restore_from(path, return_config=True, override_config_path=override)
        assert (mixed.optim.lr, mixed.optim.sched.min_lr, mixed.global_batch_size) == (1e-2, 1e-6, 16)


def test_keys_of_the_archive_that_cannot_be_are_left_out_and_told(tmp_path):
    path = nemo_archive(tmp_path / "a.nemo", keys={"optim": {"name": "novograd", "lr": 3e-4}})
    model = GPTModel.restore_from(path, map_location="cpu")
    assert model.cfg.optim.lr == 3e-4
    assert any("a.nemo: model.optim.name left out" in notice for notice in model.notices)


def test_an_override_that_changes_a_shape_is_refused_with_both_values(tmp_path):
    path = nemo_archive(tmp_path / "a.nemo")
    with pytest.raises(CheckpointError, match=r"model\.num_layers: 2 in the checkpoint, 3 here") as caught:
        GPTModel.restore_from(path, override_config_path={"num_layers": 3, "ffn_hidden_size": 32})
    assert "model.ffn_hidden_size: 64 in the checkpoint, 32 here" in str(caught.value)
    longer = {"max_position_embeddings": 24}
    for strict in (True, False):
        with pytest.raises(
            CheckpointError,
            match=r"position_embedding\.weight: \[12, 16\] in the checkpoint, \[24, 16\] here",
        ):
            GPTModel.restore_from(path, override_config_path=longer, strict=strict)


def test_what_only_one_side_has_when_not_strict(tmp_path):
    path = nemo_archive(tmp_path / "a.nemo")
    model = GPTModel.restore_from(
        path, override_config_path={"num_layers": 3}, strict=False, map_location="cpu"
    )
    assert "model.blocks.2.mlp.up.weight: begins anew" in model.notices
    model = GPTModel.restore_from(
        path, override_config_path={"num_layers": 1}, strict=False, map_location="cpu"
    )
    assert "model.blocks.1.mlp.up.weight: left out" in model.notices


def test_keys_that_are_none_are_answered_as_on_the_command_line(tmp_path):
    path = nemo_archive(tmp_path / "a.nemo")
    with pytest.raises(ConfigError, match="hidden_size") as caught:
        GPTModel.restore_from(path, override_config_path={"hiden_size": 3, "fp8": True})
    assert len(caught.value.problems) == 2


# ---- families, names, trainers ----


def test_another_family_is_told_its_class(tmp_path):
    path = nemo_archive(tmp_path / "a.nemo")
    with pytest.raises(
        CheckpointError, match=r"holds a GPT, not a BERT(?s:.)*megalith\.GPTModel\.restore_from"
    ):
        megalith.BertModel.restore_from(path)
    assert MegatronGPTModel is GPTModel is megalith.GPTModel


def test_every_family(tmp_path):
    pytest.importorskip("transformers")
    from tests.golden import tiny_sides
    from tests.golden.nemo_files import Layout
    from tests.golden.nemo_sided_files import keys, write
    from tests.golden.sides import from_megatron_bert, from_pegasus

    bert = from_megatron_bert(tiny_sides.megatron_bert())
    both = from_pegasus(*tiny_sides.megatron_t5())
    for model_class in MODELS[1:]:
        family = model_class.family
        path = write(tmp_path / f"{family}.nemo", bert if family == "bert" else both, Layout(), keys(family))
        model = model_class.restore_from(path, map_location="cpu")
        assert model.restored.archive.family == family
        if family == "bart":  # a T5 by its tensors
            continue
        again = model_class.restore_from(model.save_to(tmp_path / "again" / path.name), map_location="cpu")
        for name, tensor in model.engine.tensors().items():
            if name.startswith("model.") and "embedding" not in name and "output_bias" not in name:
                assert torch.equal(again.engine.tensors()[name], tensor), name


def test_published_names():
    infos = megalith.BertModel.list_available_models()
    names = [info.pretrained_model_name for info in infos]
    assert {"megatron-bert-345m-uncased", "megatron-bert-345m-cased", "biomegatron-bert-345m-cased"} <= {
        *names
    }
    assert all(info.location.startswith("https://") and info.description for info in infos)
    assert GPTModel.get_available_model_names() == ["megatron-gpt2-345m"]
    assert megalith.T5Model.list_available_models() == []
    with pytest.raises(CheckpointError, match="did you mean megatron-bert-345m-uncased"):
        megalith.BertModel.from_pretrained("megatron-bert-345m-uncase")
    with pytest.raises(CheckpointError, match="no GPT of this name"):
        GPTModel.from_pretrained("megatron-bert-345m-uncased")


def test_trainers(archive):
    import lightning.pytorch as pl

    with pytest.raises(ConfigError, match="max_steps"):
        Trainer(max_step=3)
    with pytest.raises(ConfigError, match="values, not objects"):
        Trainer(plugins=[object()])
    with pytest.raises(TopologyError, match="torchrun --nproc-per-node 2"):
        Trainer(accelerator="cpu", devices=2)
    with pytest.raises(TopologyError, match=r"megalith\.Trainer"):
        GPTModel.restore_from(archive, trainer=pl.Trainer(logger=False, enable_checkpointing=False))
    with pytest.raises(UnsupportedError, match="has no engine"):
        trainer().test(pl.LightningModule(), verbose=False)


def test_files_that_are_not_named(archive, corpus):
    lightning = trainer()
    tokens = {"tokenizer": {"file": str(corpus / "tok")}}
    model = GPTModel.restore_from(archive, trainer=lightning, override_config_path=tokens)
    with pytest.raises(ConfigError, match=r"data_prefix.*names no files"):
        lightning.test(model=model, verbose=False)
    files = {"data_prefix": f"{corpus}/nano", "splits_string": "80,10,10"}
    model.setup_test_data(test_data_config=files)
    (found,) = lightning.test(model=model, verbose=False)
    assert found["test_loss"] > 1
    with pytest.raises(ConfigError, match="data_prefix"):
        model.setup_test_data({"data_prefx": "x"})


def test_settings_of_generate(archive, corpus):
    model = GPTModel.restore_from(archive, override_config_path=over(corpus), map_location="cpu")
    params = {"use_greedy": True, "temperature": 0.7, "top_k": 5, "compute_logprob": True, "add_BOS": False}
    found = model.generate(["w00 w07"], {"max_length": 3, "min_length": 3}, params)
    assert len(found["token_ids"][0]) == len(found["answers"][0].logprobs) == 3
    assert found["sentences"][0].startswith("w00 w07")
    with pytest.raises(ConfigError, match="max_len"):
        model.generate(["x"], {"max_len": 3})


def test_names_that_are_none_of_an_archive(archive, tmp_path):
    model = GPTModel.restore_from(archive, map_location="cpu")
    with pytest.raises(CheckpointError, match=r"an archive is called …\.nemo"):
        model.save_to(tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []
