"""Conversions through the files: what comes back, what the certificate says, and what is refused with nothing left."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from megalith.checkpoint.convert import to_megatron
from megalith.checkpoint.convert.certificate import Failed
from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.convert.to_megatron import Sizes
from megalith.checkpoint.convert.verify import problems_of_conversion
from megalith.checkpoint.foreign import open_foreign
from megalith.checkpoint.formats.megatron_tables import legacy
from megalith.checkpoint.manifest import verify
from megalith.checkpoint.reading import read_tensors
from megalith.errors import CheckpointError, DataError
from megalith.generate.loading import load_model
from megalith.models.config import ModelConfig
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.train import TrainingOptions, train_bpe, write_trained
from tests.checkpoint.foreign_files import GPT2_LIKE, LLAMA_LIKE, hugging_face, random_model

QWEN_LIKE = LLAMA_LIKE | {"qkv_bias": True, "share_embeddings_and_output_weights": True}
NEOX_LIKE = GPT2_LIKE | {
    "position_embedding_type": "rope",
    "rotary_percentage": 0.5,
    "activation": "gelu_erf",
    "share_embeddings_and_output_weights": False,
}
FAMILIES = {"gpt2": GPT2_LIKE, "llama": LLAMA_LIKE, "qwen2": QWEN_LIKE, "neox": NEOX_LIKE}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family → a folder of transformers with random weights in float64."""
    return {
        name: hugging_face(tmp_path_factory.mktemp(name), random_model(ModelConfig(**fields)))
        for name, fields in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["the quick brown fox jumps over the lazy dog " * 20]
    write_trained(train_bpe(texts, TrainingOptions(vocab_size=280)), folder)
    return folder


def weights(path):
    return {name: lazy.read() for name, lazy in open_foreign(path).tensors.items()}


def assert_same_weights(one, other, vocabulary=29):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        rows = vocabulary if name in ("token_embedding.weight", "head.weight") else len(tensor)
        assert torch.equal(tensor[:rows], other[name][:rows]), name


def every():
    """Family, checkpoint_version, ranks, stages: all that can be."""
    return [
        (family, version, ranks, stages)
        for family, fields in FAMILIES.items()
        for version in range(4)
        for ranks in (1, 2, 4)
        for stages in (1, 2)
        if not (fields.get("num_query_groups") and (version < 2 or ranks == 4))
    ]


def sample():
    """In every run one of each family and version, in sizes that change with them; all of them in `make test-all`."""
    draw, chosen = random.Random(1), {}
    for case in every():
        chosen.setdefault(case[:2], []).append(case)
    return [draw.choice(cases) for cases in chosen.values()]


def there_and_back(folder, root, case):
    family, version, ranks, stages = case
    plan = Plan("megatron", Sizes(ranks, stages), megatron_version=version)
    there = convert(folder, root / "there", plan)
    assert there.certificate["max_abs_logit_error"] == 0
    back = convert(there.folder, root / "back", Plan("huggingface")).folder
    assert_same_weights(weights(folder), weights(back))
    assert json.loads((back / "config.json").read_text())["model_type"] == family.replace("neox", "gpt_neox")


@pytest.mark.parametrize("case", sample(), ids=str)
def test_import_of_an_export_is_the_same(tmp_path, folders, case, monkeypatch):
    monkeypatch.setattr("megalith.checkpoint.convert.compare.ask_transformers", lambda *_: None)
    there_and_back(folders[case[0]], tmp_path, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", every(), ids=str)
def test_import_of_every_export_is_the_same(tmp_path, folders, case, monkeypatch):
    monkeypatch.setattr("megalith.checkpoint.convert.compare.ask_transformers", lambda *_: None)
    there_and_back(folders[case[0]], tmp_path, case)


def test_the_certificate_says_what_was_done(tmp_path, folders):
    done = convert(folders["llama"], tmp_path / "out", Plan("megatron", Sizes(2, 2), dtype="bf16"))
    said = json.loads((tmp_path / "out/conversion.json").read_text())
    assert said == json.loads(json.dumps(done.certificate))
    assert said["source"]["files"].keys() == {
        str(folders["llama"] / n) for n in ("config.json", "model.safetensors")
    }
    assert "release/mp_rank_01_001/model_optim_rng.pt" in said["target"]["files"]
    assert said["target"]["dtype"] == "bfloat16"
    assert said["target"]["tensor_model_parallel_size"] == said["target"]["pipeline_model_parallel_size"] == 2
    assert said["source"]["config"]["num_query_groups"] == said["target"]["config"]["num_query_groups"] == 2
    assert said["max_abs_logit_error"] <= said["tolerance"]
    assert said["equal_tensors"] == len(open_foreign(tmp_path / "out").tensors)
    assert said["max_abs_logit_change_by_rounding"] > 1e-4
    assert max(said["token_ids"]) == 28
    assert said["read_back_by"] == "self-consistent only"
    assert problems_of_conversion(tmp_path / "out") == []


def test_changed_files_are_found(tmp_path, folders):
    out = convert(folders["gpt2"], tmp_path / "out", Plan("megatron", Sizes(2))).folder
    file = out / "release/mp_rank_01/model_optim_rng.pt"
    content = bytearray(file.read_bytes())
    content[-5000] ^= 1
    file.write_bytes(content)
    (out / "arguments.json").unlink()
    problems = problems_of_conversion(out)
    assert any("mp_rank_01/model_optim_rng.pt: its content changed" in line for line in problems)
    assert "arguments.json: missing" in problems


def test_native_folders_are_whole_and_list_their_certificate(tmp_path, folders):
    out = convert(folders["llama"], tmp_path / "out", Plan("native")).folder
    assert verify(out) == []
    loaded = load_model(out, device="cpu")
    assert loaded.model.config.kv_heads == 2
    (out / "conversion.json").write_text("{}")
    assert any(line.startswith("conversion.json") for line in verify(out))


def test_halves_become_fp32_for_us_and_stay_halves_for_others(tmp_path, folders):
    half = convert(folders["llama"], tmp_path / "half", Plan("huggingface", dtype="bf16")).folder
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    native = convert(half, tmp_path / "native", Plan("native")).folder
    assert {lazy.dtype for lazy in read_tensors(native)} == {torch.float32}
    kept = convert(half, tmp_path / "kept", Plan("native", dtype="keep")).folder
    assert {lazy.dtype for lazy in read_tensors(kept)} == {torch.bfloat16}
    megatron = convert(half, tmp_path / "megatron", Plan("megatron", Sizes(2))).folder
    assert {t.dtype for t in weights(megatron).values()} == {torch.bfloat16}


def test_a_wrong_output_is_removed(tmp_path, folders, monkeypatch):
    """Rows in the order of version 1 in a file that says 3."""
    monkeypatch.setattr(to_megatron, "legacy", lambda version, family: legacy(1, family))
    with pytest.raises(Failed, match=r"logits differ by .* other numbers were read back of blocks\.0"):
        convert(folders["gpt2"], tmp_path / "out", Plan("megatron"))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_numbers_are_no_model(tmp_path):
    model = random_model(ModelConfig(**GPT2_LIKE))
    model.final_norm.weight.data[3] = math.nan
    with pytest.raises(Failed, match="logits differ by nan"):
        convert(hugging_face(tmp_path / "in", model), tmp_path / "out", Plan("native"))
    assert not (tmp_path / "out").exists()


def test_numbers_too_large_for_fp16_are_refused(tmp_path):
    model = random_model(ModelConfig(**GPT2_LIKE))
    model.blocks["1"].mlp.up.weight.data[0, 0] = 1e6
    with pytest.raises(Failed, match="logits differ by nan"):
        convert(hugging_face(tmp_path / "in", model), tmp_path / "out", Plan("megatron", dtype="fp16"))


def test_an_untrained_model_must_be_said_to_be_one(tmp_path, tokenizer):
    fields = GPT2_LIKE | {"vocab_size": 300, "max_position_embeddings": 64}
    folder = hugging_face(tmp_path / "in", random_model(ModelConfig(**fields), torch.float32))
    with pytest.raises(Failed, match=r"its loss on English text is .* guessing among all tokens gives 5\.70"):
        convert(folder, tmp_path / "out", Plan("native"), tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()
    done = convert(folder, tmp_path / "out", Plan("native", untrained=True), tokenizer=tokenizer)
    assert done.certificate["passage"]["scored"]
    assert load_model(done.folder, device="cpu").needs_tokenizer().hash() == load_tokenizer(tokenizer).hash()
    back = convert(done.folder, tmp_path / "back", Plan("huggingface"))
    assert back.certificate["passage"] == {"scored": False, "why": "the source is of Megalith's own"}
    assert back.certificate["reader_tokenizer"] == "the same tokens"
    megatron = convert(done.folder, tmp_path / "megatron", Plan("megatron")).folder
    assert load_model(megatron, device="cpu").needs_tokenizer().hash() == load_tokenizer(tokenizer).hash()


def test_a_tokenizer_of_another_model(tmp_path, folders, tokenizer):
    with pytest.raises(DataError, match="tokens, the model knows 29"):
        convert(folders["gpt2"], tmp_path / "out", Plan("native"), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("family", "plan", "message"),
    [
        ("gpt2", Plan("megatron", Sizes(3)), "4 attention heads do not divide among 3"),
        ("gpt2", Plan("megatron", Sizes(1, 3)), "4 layers do not divide into 3 pipeline stages"),
        ("llama", Plan("megatron", Sizes(4)), "2 key-value heads do not divide among 4"),
        ("llama", Plan("megatron", megatron_version=1), "no grouped queries"),
        ("gpt2", Plan("megatron", Sizes(1, 1, 2)), "virtual stages need at least two"),
        ("gpt2", Plan("megatron", megatron_version=4), "is none of 0, 1, 2, 3"),
        ("gpt2", Plan("native", dtype="int8"), "'int8' is none of keep"),
    ],
)
def test_refusals_come_before_anything_is_written(tmp_path, folders, family, plan, message):
    with pytest.raises(CheckpointError, match=message):
        convert(folders[family], tmp_path / "out", plan)
    assert list(tmp_path.iterdir()) == []


def test_models_that_a_format_has_nothing_like(tmp_path):
    config = ModelConfig(**LLAMA_LIKE | {"activation": "geglu", "vocab_size": 29})
    native = convert(
        hugging_face(tmp_path / "in", random_model(config)), tmp_path / "native", Plan("native")
    ).folder
    with pytest.raises(CheckpointError, match="Megatron has nothing like this model"):
        convert(native, tmp_path / "out", Plan("megatron"))


def test_what_is_there_stays(tmp_path, folders):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="it exists already"):
        convert(folders["gpt2"], tmp_path / "out", Plan("native"))
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(CheckpointError, match="it is in the way"):
        convert(folders["gpt2"], tmp_path / "new", Plan("native"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.partial", "out"]


def test_a_disk_that_is_too_small_is_noticed_first(tmp_path, folders, monkeypatch):
    monkeypatch.setattr("megalith.checkpoint.convert.target.free_bytes", lambda folder: 8 << 20)
    with pytest.raises(CheckpointError, match=r"the conversion needs 8\.\d MB, and 8\.4 MB are free"):
        convert(folders["gpt2"], tmp_path / "out", Plan("native"))


def test_a_damaged_step_folder_is_not_converted(tmp_path, folders):
    native = convert(folders["gpt2"], tmp_path / "native", Plan("native")).folder
    content = bytearray((native / "model.safetensors").read_bytes())
    content[-9] ^= 1
    (native / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        convert(native, tmp_path / "out", Plan("megatron"))
    assert not (tmp_path / "out").exists()


def test_progress_goes_to_the_end(tmp_path, folders):
    seen = {}
    convert(
        folders["gpt2"],
        tmp_path / "out",
        Plan("megatron", Sizes(2)),
        report=lambda what, *n: seen.update({what: n}),
    )
    assert seen.keys() == {"writing", "comparing"}
    assert all(done == total for what, (done, total) in seen.items() if what == "writing")
