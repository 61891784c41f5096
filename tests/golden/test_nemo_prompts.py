"""NeMo's archives with soft prompts: read and written to the letter, and computing what NeMo's formula says, to 1e-10 in float64.

The archives that are read are made by straight-line code here; those that are written are opened with `tarfile` and `torch.load`.
"""

from __future__ import annotations

import io
import tarfile

import pytest
import torch
import yaml

from megalith.adapt.adapter import Adapter
from megalith.adapt.artefact import open_adapter
from megalith.adapt.method import Tag
from megalith.adapt.nemo import write_nemo
from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.convert.to_megatron import Sizes
from megalith.errors import CheckpointError
from megalith.generate.adapting import load_adapted
from megalith.generate.loading import load_model
from tests.golden import tiny
from tests.golden.nemo_files import Layout, gpt_keys, pack, place, saved, state_dict
from tests.golden.whole import from_gpt2

P = 3
TABLE = "model.language_model.prompt_table.prompt_table"
DRAW = torch.Generator().manual_seed(9)
PROMPTS = {
    tag: tuple(torch.randn(P, tiny.WIDTH, generator=DRAW, dtype=torch.float64) for _ in range(2))
    for tag in ("RTE", "Winogrande")
}
KEYS = {
    "use_soft_prompts": True,
    "num_prompt_tokens": P,
    "existing_prompt_tags": [["Winogrande", 1], ["RTE", 2]],
}


@pytest.fixture(scope="module")
def gpt2():
    return tiny.gpt2("gelu_new")


def archive(path, model, layout, keys=KEYS):
    """As NeMo 1.7's tuning leaves it: every rank has all prompts."""
    whole = from_gpt2(model)
    sizes = {"tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": 1}
    members = {"model_config.yaml": yaml.safe_dump(sizes | gpt_keys(**keys)).encode()}
    for rank in range(layout.tp):
        state = state_dict(whole.to(layout.dtype), layout, rank, 0)
        for tag, (tokens, positions) in PROMPTS.items():
            state[f"{TABLE}.{tag}.prompt_embeddings.weight"] = tokens
            state[f"{TABLE}.{tag}.position_embeddings.weight"] = positions
        members[place(layout, rank, 0) + "model_weights.ckpt"] = saved(state)
    return pack(path, members, layout)


@torch.no_grad()
def as_nemo_says(model, tag, tokens):
    """Logits behind the text: [prompt + its own positions ; words + positions from P on] through the blocks."""
    body = model.transformer
    prompt = (PROMPTS[tag][0] + PROMPTS[tag][1]).expand(len(tokens), -1, -1)
    length = P + tokens.shape[1]
    words = body.wte(tokens) + body.wpe(torch.arange(P, length))
    x = torch.cat([prompt, words], 1) - body.wpe(torch.arange(length))  # which the model adds again
    return model(inputs_embeds=x).logits[:, P:]


@torch.no_grad()
def as_here(loaded, tag, tokens):
    adapter = loaded.prompting.adapter
    first = loaded.model.config.vocab_size + P * adapter.names.index(tag)
    virtual = torch.arange(first, first + P).expand(len(tokens), -1)
    return loaded.model.logits(loaded.model(torch.cat([virtual, tokens], 1)))[:, P:, : tiny.VOCABULARY]


@pytest.mark.parametrize(("tp", "container"), [(1, "tar"), (2, "gzip"), (2, "folder"), (1, "folder")])
def test_in(tmp_path, gpt2, tp, container):
    path = archive(tmp_path / "megatron_gpt.nemo", gpt2, Layout(tp, 1, container))
    adapter = open_adapter(path)
    assert adapter.tags == (Tag("Winogrande", P, True), Tag("RTE", P, True))  # in the order of their ids
    alone = load_model(path, precision="64")
    assert "it holds soft prompts (RTE, Winogrande), which are read apart" in " ".join(alone.notices)
    loaded = load_adapted(path, [path], precision="64")  # the archive is base and prompts
    tokens = tiny.tokens()[:, :12]
    for tag in PROMPTS:
        assert (as_here(loaded, tag, tokens) - as_nemo_says(gpt2, tag, tokens)).abs().max() < 1e-10
    with torch.no_grad():
        plain = alone.model.logits(alone.model(tokens))[..., : tiny.VOCABULARY]
        assert (plain - gpt2(tokens).logits).abs().max() < 1e-10


def members(path):
    with tarfile.open(path) as found:
        return {
            entry.name.removeprefix("./"): found.extractfile(entry).read()
            for entry in found
            if entry.isfile()
        }


@pytest.mark.parametrize("ranks", [1, 2])
def test_out(tmp_path, gpt2, ranks):
    base = tmp_path / "hf"
    gpt2.save_pretrained(base)
    source = archive(tmp_path / "source.nemo", gpt2, Layout())
    adapter = open_adapter(source)
    path = write_nemo(adapter, base, tmp_path / "out.nemo", ranks=ranks)
    found = members(path)
    keys = yaml.safe_load(found["model_config.yaml"])
    assert keys["use_soft_prompts"] is True
    assert keys["num_prompt_tokens"] == P
    assert keys["existing_prompt_tags"] == [["Winogrande", 1], ["RTE", 2]]
    assert keys["new_prompt_tags"] == []  # a restored model must not begin them anew
    assert keys["nemo_version"] == "1.8.2"
    for rank in range(ranks):
        name = place(Layout(ranks), rank, 0) + "model_weights.ckpt"
        state = torch.load(io.BytesIO(found[name]), weights_only=True)
        for tag, (tokens, positions) in PROMPTS.items():
            assert torch.equal(state[f"{TABLE}.{tag}.prompt_embeddings.weight"], tokens)
            assert torch.equal(state[f"{TABLE}.{tag}.position_embeddings.weight"], positions)
        assert f"{TABLE.partition('.prompt_table')[0]}.embedding.word_embeddings.weight" in state
    loaded = load_adapted(base, [path], precision="64")  # the archive's base is the same model as the folder
    tokens = tiny.tokens()[:, :12]
    for tag in PROMPTS:
        assert (as_here(loaded, tag, tokens) - as_nemo_says(gpt2, tag, tokens)).abs().max() < 1e-10


def test_another_cut_of_an_archive_keeps_its_prompts(tmp_path, gpt2):
    source = archive(tmp_path / "source.nemo", gpt2, Layout(2, 1, "gzip"))
    done = convert(source, tmp_path / "out.nemo", Plan("nemo", Sizes(ranks=1), untrained=True))
    before, after = open_adapter(source), open_adapter(done.folder)
    assert after.tags == before.tags
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())
    assert after.base.fingerprint == before.base.fingerprint


def test_prompts_at_the_models_positions_get_these(tmp_path, gpt2):
    base = tmp_path / "hf"
    gpt2.save_pretrained(base)
    tokens, _ = PROMPTS["RTE"]
    adapter = Adapter("p-tuning", "gpt", {"prompts.0.tokens": tokens}, (Tag("RTE", P),))
    path = write_nemo(adapter, base, tmp_path / "out.nemo")
    found = open_adapter(path)
    assert torch.equal(found.tensors["prompts.0.positions"], gpt2.transformer.wpe.weight[:P].detach())
    text = tiny.tokens()[:, :12]
    here = as_here(load_adapted(base, [adapter], precision="64"), "RTE", text)
    assert (here - as_here(load_adapted(base, [path], precision="64"), "RTE", text)).abs().max() < 1e-10


def adapter_of(*tags, lengths=(P, P)):
    found = [Tag(name, length) for name, length in zip(tags, lengths, strict=False)]
    tensors = {f"prompts.{n}.tokens": torch.ones(tag.length, tiny.WIDTH) for n, tag in enumerate(found)}
    return Adapter("soft-prompt", "gpt", tensors, tuple(found), path="x")


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (adapter_of("a", "b", lengths=(2, 3)), "all tags have as many virtual tokens there, these have 2, 3"),
        (adapter_of("a.b"), "with a dot, is no name there: 'a.b'"),
        (Adapter("lora", "gpt", {}), "LoRA has no place in NeMo's archives"),
    ],
)
def test_what_has_no_place_in_an_archive(tmp_path, gpt2, adapter, words):
    base = tmp_path / "hf"
    gpt2.save_pretrained(base)
    with pytest.raises(CheckpointError) as caught:
        write_nemo(adapter, base, tmp_path / "out.nemo")
    assert words in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_models_that_nemo_never_tuned(tmp_path):
    base = tmp_path / "hf"
    tiny.llama(tiny.HEADS).save_pretrained(base)
    with pytest.raises(CheckpointError, match="only a GPT with learned positions"):
        write_nemo(adapter_of("a"), base, tmp_path / "out.nemo")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"existing_prompt_tags": ["RTE", "Winogrande"]}, ("RTE", "Winogrande")),
        ({"existing_prompt_tags": []}, ("RTE", "Winogrande")),
        ({"existing_prompt_tags": [["RTE", 1], ["SST", 2]]}, "existing_prompt_tags name SST"),
    ],
)
def test_tags_as_strings_or_pairs(tmp_path, gpt2, keys, words):
    path = archive(tmp_path / "a.nemo", gpt2, Layout(), KEYS | keys)
    if isinstance(words, tuple):
        assert open_adapter(path).names == words
        return
    with pytest.raises(CheckpointError, match=words):
        open_adapter(path)


def test_an_archive_without_prompts(tmp_path, gpt2):
    whole = from_gpt2(gpt2)
    members = {"model_config.yaml": yaml.safe_dump(gpt_keys()).encode()}
    members["model_weights.ckpt"] = saved(state_dict(whole, Layout(), 0, 0))
    with pytest.raises(CheckpointError, match="there are no soft prompts in this archive"):
        open_adapter(pack(tmp_path / "a.nemo", members, Layout()))
