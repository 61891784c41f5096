"""Tuning runs on nano models, whole: every method and family, going on, the second task, what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from megalith.adapt.adapter import Adapter
from megalith.adapt.adapter import Base as Fingerprint
from megalith.adapt.artefact import open_adapter
from megalith.adapt.fingerprint import fingerprint_of
from megalith.adapt.lora import LoRA
from megalith.adapt.method import Tag
from megalith.checkpoint.formats.nemo_prompts import prompts_of
from megalith.checkpoint.reading import read_state
from megalith.errors import EXIT_SUCCESS, CheckpointError, ConfigError, DataError, MegalithError
from megalith.generate.adapting import load_adapted
from megalith.generate.loading import load_model
from megalith.generate.manner import manner_of
from megalith.tasks.tuning import check_tags, prepare_tuning
from megalith.tasks.tuning_base import tokenizer_of
from megalith.tokenizers.config import TokenizerConfig
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.train import TrainingOptions, train_bpe

from .nano import losses, make_corpus, pretrain, rows
from .tuning import P, make_base, prompts, settled, tune

RUNS = [
    ("soft-prompt", "gpt"), ("soft-prompt", "t5"), ("soft-prompt", "bart"), ("p-tuning", "gpt"), ("p-tuning", "t5"),
    ("lora", "gpt"), ("lora", "bart"), ("full", "gpt"),
]  # fmt: skip
METHODS = {"soft-prompt": prompts("A"), "p-tuning": prompts("A"), "lora": ("model.lora.rank=2",), "full": ()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(family):
        if family not in made:
            made[family] = make_base(tmp_path_factory.mktemp(family), family)
        return made[family]

    return base


@pytest.fixture(scope="module")
def first(bases, tmp_path_factory):
    """A complete run on task A, with an archive."""
    folder = tmp_path_factory.mktemp("first") / "first"
    more = ["exp_manager.checkpoint_callback_params.save_nemo_on_train_end=true"]
    code, text = tune("soft-prompt", bases("gpt"), folder, *prompts("A"), *more)
    assert code == EXIT_SUCCESS, text
    return folder, text


@pytest.mark.parametrize(("method", "family"), RUNS)
def test_a_run_tunes_validates_and_saves(bases, tmp_path, method, family):
    folder, base = tmp_path / "run", bases(family)
    code, text = tune(method, base, folder, *METHODS[method])
    assert code == EXIT_SUCCESS, text
    assert "done: step 4 of 4, validation loss" in text
    found = losses(folder)
    assert list(found) == [1, 2, 3, 4]
    assert list(losses(folder, "val_loss")) == [2, 4]
    (row,) = (row for row in rows(folder) if row["step"] == 4 and "val_loss" in row)
    assert row["consumed_samples"] == 16
    assert row["val_targets"] >= 5, "each row of the file counts, and no filling"
    step = folder / "checkpoints/step_0000004"
    names = set(load_file(step / "model.safetensors"))
    if method == "full":
        assert names == set(load_file(base / "base/checkpoints/step_0000003/model.safetensors"))
        assert not (folder / "adapter").exists()
        return
    assert names, "what trains"
    assert all("prompts." in name or "lora_" in name for name in names), "and nothing else"
    adapter = open_adapter(folder)
    assert (adapter.method, adapter.family) == (method, family)
    assert adapter.base.fingerprint == fingerprint_of(base / "base")
    assert adapter.names == (() if method == "lora" else ("A",))
    if method != "lora":
        assert adapter.tensors["prompts.0.tokens"].shape == (P, 16)


def test_the_run_says_what_it_tunes(first):
    folder, text = first
    assert f"tuned      soft-prompt of A ({P} virtual tokens): {2 * P * 16:,} parameters" in text
    assert "13 samples of a.jsonl (A 13)" in text
    assert "from the weights of" in text
    size = sum(path.stat().st_size for path in (folder / "adapter").iterdir())
    assert size < 5000, "kilobytes"
    assert {"adapter", "checkpoints", "config.yaml", "metrics.jsonl"} <= {p.name for p in folder.iterdir()}


def test_going_on_is_bit_identical(bases, first, tmp_path):
    folder = tmp_path / "first"
    assert tune("soft-prompt", bases("gpt"), folder, *prompts("A"), "trainer.max_steps=2")[0] == EXIT_SUCCESS
    code, text = tune("soft-prompt", bases("gpt"), folder, *prompts("A"))
    assert code == EXIT_SUCCESS
    assert "going on from step 2" in text
    # The schedule of a run of two steps is another one: only what does not hang on it is compared with the whole run.
    assert [row["consumed_samples"] for row in rows(folder) if "train_loss" in row] == [4, 8, 12, 16]
    assert losses(folder)[1] == losses(first[0])[1]
    again, _ = tune("soft-prompt", bases("gpt"), folder, *prompts("A"))
    assert again == EXIT_SUCCESS


@pytest.mark.parametrize("method", ["soft-prompt", "p-tuning", "lora"])
def test_a_run_that_was_cut_ends_as_one_that_was_not(bases, tmp_path, method):
    every = "exp_manager.checkpoint_callback_params.every_n_train_steps=3"
    constant = ["model.optim.sched.name=constant", "model.optim.sched.min_lr=0"]
    more = [*METHODS[method], *constant, every, "trainer.limit_val_batches=0"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tune(method, bases("gpt"), whole, *more, steps=6)
    tune(method, bases("gpt"), cut, *more, steps=3)
    code, text = tune(method, bases("gpt"), cut, *more, steps=6)
    assert (code, "going on from step 3" in text) == (EXIT_SUCCESS, True)
    assert losses(cut) == losses(whole)
    one, two = (open_adapter(folder).tensors for folder in (whole, cut))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def second(bases, folder, path, *more):
    base = bases("gpt")
    data = [
        f"model.data.train_ds={base}/b.jsonl",
        f"model.data.valid_ds={base}/valid_b.jsonl",
        f"restore_from_path={path}",
    ]
    return tune("soft-prompt", base, folder, *prompts("B"), *data, *more)


@pytest.mark.parametrize("kind", ["archive", "artefact", "run"])
def test_a_second_task_leaves_the_first_as_it_is(bases, first, tmp_path, kind):
    path = {
        "archive": first[0] / "checkpoints/first.nemo",
        "artefact": first[0] / "adapter",
        "run": first[0],
    }[kind]
    existing = "model.existing_prompt_tags=[A]" if kind != "run" else "model.existing_prompt_tags=[[A,1]]"
    code, text = second(bases, tmp_path / "second", path, existing)
    assert code == EXIT_SUCCESS, text
    assert (
        f"tuned      soft-prompt of B ({P} virtual tokens): {2 * P * 16:,} parameters; as they are: A" in text
    )
    before, after = open_adapter(first[0]), open_adapter(tmp_path / "second")
    assert after.names == ("A", "B")
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)
    assert not torch.equal(after.tensors["prompts.1.tokens"], after.tensors["prompts.0.tokens"])
    assert after.base.fingerprint == before.base.fingerprint


def test_the_archive_holds_the_model_and_its_prompts(first):
    held = prompts_of(first[0] / "checkpoints/first.nemo")
    adapter = open_adapter(first[0])
    assert list(held.tables) == ["A"]
    assert torch.equal(held.tables["A"][0], adapter.tensors["prompts.0.tokens"])
    assert fingerprint_of(first[0] / "checkpoints/first.nemo") == adapter.base.fingerprint


def test_what_changes_the_model_leaves_its_prompts_out_and_says_so(bases, first, tmp_path):
    more = [f"restore_from_path={first[0]}", "model.lora.rank=2"]
    composed, said = settled("lora", bases("gpt"), tmp_path / "run", *more), []
    prepare_tuning(composed, said.append)
    assert any("first/adapter (A) are left out" in text for text in said), said


def test_two_tasks_in_one_run(bases, tmp_path):
    base = bases("gpt")
    more = prompts(
        "A,B", "model.new_prompt_init_methods=[text,random]", "model.new_prompt_init_text=[w03,unused]"
    )
    code, text = tune(
        "soft-prompt",
        base,
        tmp_path / "two",
        *more,
        f"model.data.train_ds=[{base}/mixed.jsonl,{base}/b.jsonl]",
    )
    assert code == EXIT_SUCCESS
    assert "25 samples of mixed.jsonl, b.jsonl (A 6, B 19)" in text
    assert open_adapter(tmp_path / "two").names == ("A", "B")


def test_templates_say_where_virtual_tokens_stand(bases, tmp_path):
    base, file = bases("gpt"), tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"taskname": "t", "one": "w01 w02", "two": f" w{i:02d}"}) + "\n" for i in range(9))
    )
    template = (
        "{taskname:t,prompt_template:'<|VIRTUAL_PROMPT_0|>{one} so<|VIRTUAL_PROMPT_1|>{two}',total_virtual_tokens:3,"
        "virtual_token_splits:[2,1]}"
    )
    files = [f"model.data.train_ds={file}", f"model.data.valid_ds={file}"]
    code, text = tune("p-tuning", base, tmp_path / "run", f"model.task_templates=[{template}]", *files)
    assert code == EXIT_SUCCESS, text
    assert "p-tuning of t (3 virtual tokens)" in text
    adapter = open_adapter(tmp_path / "run")
    assert adapter.tags[0].length == 3
    assert adapter.tasks["t"]["virtual_token_splits"] == [2, 1]


def test_the_same_folder_for_another_task_is_refused(bases, first):
    before = sorted(p.name for p in first[0].rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        second(bases, first[0], first[0] / "checkpoints/first.nemo")
    assert f"new tags: A ({P}) there, B ({P}) here" in str(caught.value)
    assert "another exp_manager.name" in str(caught.value)
    assert sorted(p.name for p in first[0].rglob("*")) == before


def test_tags_that_do_not_fit_the_file_are_refused(bases, first, tmp_path):
    archive = first[0] / "checkpoints/first.nemo"
    with pytest.raises(ConfigError) as caught:
        second(
            bases,
            tmp_path / "x",
            archive,
            "model.new_prompt_tags=[A]",
            "model.existing_prompt_tags=[C]",
            "model.num_prompt_tokens=5",
        )
    said = str(caught.value)
    for part in ("C is not in", "it has A", "A is tuned already", f"5, and the prompts of A have {P}"):
        assert part in said
    assert not (tmp_path / "x").exists()


def test_lengths_are_those_of_the_file(bases, first, tmp_path):
    """A template that said more would ask for virtual tokens of the next tag, or of none."""
    template = (
        "{{taskname:{0},prompt_template:'<|VIRTUAL_PROMPT_0|>{{text}}{{answer}}',total_virtual_tokens:{1}}}"
    )
    both = f"model.task_templates=[{template.format('A', P + 1)},{template.format('B', 2)}]"
    with pytest.raises(ConfigError) as caught:
        second(bases, tmp_path / "x", first[0], both)
    assert f"A: total_virtual_tokens is {P + 1}, and its prompt in {first[0]} has {P}" in str(caught.value)
    assert not (tmp_path / "x").exists()
    held = Adapter("soft-prompt", "gpt", {}, (Tag("A", P), Tag("B", P + 1)))

    def check(length):
        more = f"model.num_prompt_tokens={length}"
        composed = settled("soft-prompt", bases("gpt"), tmp_path / "x", *prompts("C"), more)
        check_tags(composed.config, SimpleNamespace(adapter=held))

    check(P)
    check(P + 1)
    with pytest.raises(ConfigError, match=f"the prompts of A, B have {P}, {P + 1}"):
        check(P + 2)


def test_texts_that_no_prompt_begins_from_are_not_read(bases, tmp_path):
    more = ["model.new_prompt_init_methods=[random]", "model.new_prompt_init_text=[w01,w02]"]
    composed = settled("soft-prompt", bases("gpt"), tmp_path / "x", *prompts("A"), *more)
    assert composed.config.model.init_texts == {"A": None}


def test_a_tokenizer_that_prompts_were_not_tuned_with_is_refused(bases, tmp_path):
    """A model that comes without one takes the configuration's."""
    tokens = bases("gpt") / "base/checkpoints/step_0000003/tokenizer"
    other = train_bpe(["w01 w02 w03 " * 9], TrainingOptions(vocab_size=270))
    other.save(tmp_path / "other")
    held = Adapter("soft-prompt", "gpt", {}, base=Fingerprint(tokenizer=load_tokenizer(tokens).hash()))
    base = SimpleNamespace(tokens=None, adapter=held)

    def config(path):
        return SimpleNamespace(model=SimpleNamespace(tokenizer=TokenizerConfig(file=str(path))))

    assert tokenizer_of(config(tokens), base).hash() == held.base.tokenizer
    with pytest.raises(CheckpointError, match="another one than its prompts were tuned with"):
        tokenizer_of(config(tmp_path / "other"), base)


def test_the_model_comes_with_its_own_architecture(bases, tmp_path):
    with pytest.raises(ConfigError) as caught:
        tune(
            "soft-prompt",
            bases("gpt"),
            tmp_path / "x",
            *prompts("A"),
            "model.num_layers=3",
            "model.encoder_seq_length=64",
            "model.hidden_size=16",
        )
    said = str(caught.value)
    assert "model.num_layers (command line): 3, and the model in step_0000003 has 2" in said
    assert "64 is beyond the 32 positions" in said
    assert "hidden_size" not in said, "the same value is no contradiction"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("more", "words", "kind"),
    [
        (("model.data.train_ds={base}/b.jsonl",), 'line 1: prompt_tag "B" is none of A', DataError),
        (("model.data.valid_ds={tmp}/empty.jsonl",), "there is no row in it", DataError),
        (("model.data.valid_ds=null",), "names no file to validate on", ConfigError),
        (("model.num_prompt_tokens=32",), "the 32 virtual tokens of A leave no room for text", ConfigError),
        (("model.num_prompt_tokens=30",), "rows are longer than 32 tokens", DataError),
        (("model.data.max_seq_length=33",), "33 is beyond the model's 32 positions", ConfigError),
        (("model.new_prompt_tags=['A,B']",), "fix: model.new_prompt_tags=[A,B]", ConfigError),
        (
            ("model.new_prompt_tags=[A,A]", "model.new_prompt_init_text=[x,y]"),
            "A stands in it 2 times",
            ConfigError,
        ),
        (("model.new_prompt_tags=['']",), "holds an empty name", ConfigError),
        (("model.new_prompt_tags=[]",), "names no task to tune", ConfigError),
        (("model.existing_prompt_tags=[A]",), "a prompt is tuned once", ConfigError),
        (("model.new_prompt_init_text=[w01,w02]",), "2 for 1 new tag", ConfigError),
        (("model.new_prompt_init_methods=[text,random]",), "2 for 1 new tag", ConfigError),
        (("model.new_prompt_init_methods=[words]",), "new_prompt_init_methods", ConfigError),
        (("model.use_soft_prompts=false",), "prompts are what is tuned", ConfigError),
        (("model.data.truncate_field=answer",), "is not what can be cut off", ConfigError),
        (("restore_from_path={tmp}/gone.nemo",), "gone.nemo", CheckpointError),
        (("model.rampup_batch_size=[2,2,8]",), "batches of one size", ConfigError),
    ],
)
def test_bad_input_ends_with_code_2_and_writes_nothing(bases, tmp_path, more, words, kind):
    (tmp_path / "empty.jsonl").write_text("\n")
    base = bases("gpt")
    more = [word.format(base=base, tmp=tmp_path) for word in more]
    with pytest.raises(MegalithError) as caught:
        tune("soft-prompt", base, tmp_path / "run", *prompts("A"), *more)
    assert isinstance(caught.value, kind)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_another_file_cannot_go_on(bases, first, tmp_path):
    folder, base = tmp_path / "run", bases("gpt")
    tune("soft-prompt", base, folder, *prompts("A"), steps=2)
    with pytest.raises(ConfigError, match="its samples are other ones than when the run began"):
        tune("soft-prompt", base, folder, *prompts("A"), "model.data.add_eos=false")


def test_a_run_without_decay_is_told_with_the_fix(bases, tmp_path):
    from megalith.config.compose import settle
    from megalith.tasks.tuning_base import gather_tuning

    from .tuning import overrides

    long = ["model.optim.sched.warmup_steps=320", "model.optim.sched.constant_steps=2240"]
    root, gathered = gather_tuning(
        "soft-prompt", overrides=overrides(bases("gpt"), tmp_path, *prompts("A"), *long)
    )
    (notice,) = (notice for notice in settle(root, gathered).notices if "no decay phase" in notice)
    assert "model.optim.sched.warmup_steps=1 model.optim.sched.constant_steps=0" in notice


def test_the_frozen_model_computes_without_dropout_unless_told(bases, tmp_path):
    """NeMo left it in training mode. The base was trained with dropout 0.1."""
    found = {}
    for switch in ("false", "true"):
        folder = tmp_path / f"is_{switch}"
        tune(
            "lora",
            bases("gpt"),
            folder,
            f"model.compat.frozen_dropout={switch}",
            "model.lora.rank=2",
            "trainer.limit_val_batches=0",
            steps=1,
        )
        found[switch] = losses(folder)[1]
    whole = tmp_path / "whole"
    tune("full", bases("gpt"), whole, "model.hidden_dropout=0", "trainer.limit_val_batches=0", steps=1)
    assert found["false"] == losses(whole)[1], "LoRA begins as the model, and no dropout is in it"
    assert found["true"] != found["false"]


def test_a_whole_model_is_asked_as_it_was_tuned(bases, tmp_path):
    folder = tmp_path / "whole"
    tune("full", bases("gpt"), folder, "model.data.add_bos=true", "trainer.limit_val_batches=0", steps=1)
    state = read_state(folder / "checkpoints/step_0000001")
    tokenizer = load_tokenizer(folder / "checkpoints/step_0000001/tokenizer")
    assert manner_of(state, tokenizer).before == (tokenizer.eod,)


@pytest.mark.parametrize("family", ["gpt", "t5"])
def test_a_model_with_lora_is_asked_as_it_was_tuned(bases, tmp_path, family):
    folder, base = tmp_path / "lora", bases(family)
    more = ["model.lora.rank=2", "model.data.add_bos=true", "trainer.limit_val_batches=0"]
    assert tune("lora", base, folder, *more, steps=1)[0] == EXIT_SUCCESS
    plain, loaded = load_model(base / "base"), load_adapted(base / "base", [folder])
    special = loaded.tokenizer.special
    bos = special.get("bos", special.get("eod"))
    assert (plain.manner.before, loaded.manner) == ((), replace(plain.manner, before=(bos,)))


def test_lora_of_another_family_is_told_by_its_name(bases, tmp_path):
    """Not as a target that the model has not."""
    said = LoRA(rank=2, targets=("cross.q",)).describe()
    tensors = {f"decoder.blocks.0.cross.q.lora_{half}": torch.ones(2, 2) for half in "ab"}
    of_t5 = Adapter("lora", "t5", tensors, settings=said, path="x")
    with pytest.raises(CheckpointError, match="x: it was made for a T5, the base model is a GPT"):
        load_adapted(bases("gpt") / "base", [of_t5])


def test_pretraining_does_not_go_on_with_a_tuning(bases, first, tmp_path):
    corpus, began = make_corpus(tmp_path, "gpt"), "model.encoder_seq_length=32"
    with pytest.raises(CheckpointError, match="this is the folder of a tuning run"):
        pretrain(corpus, first[0], began)
    with pytest.raises(CheckpointError, match="it holds what a tuning trains, not the model"):
        pretrain(corpus, tmp_path / "new", began, f"model.init_from={first[0]}")
    assert not (tmp_path / "new").exists()
