"""Prompt tuning's files as `peft` writes and reads them: logits on both sides equal to 1e-10 in float64, on tiny random models.

What PEFT does with a prompt (its rows before the embedded text, positions counted over both) is also spelled out with
`transformers` alone, so that the files are held to it where `peft` is not installed.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megalith.adapt.adapter import Adapter
from megalith.adapt.artefact import open_adapter
from megalith.adapt.export import export
from megalith.adapt.method import Tag
from megalith.errors import CheckpointError
from megalith.generate.adapting import load_adapted
from megalith.generate.loading import load_model
from tests.reference.test_encoder_decoder import rms
from tests.reference.test_transformers import widen

VOCABULARY, WIDTH, LENGTH, TOLERANCE = 29, 16, 3, 1e-10
SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES, n_embd=WIDTH, n_head=4, n_layer=2, n_positions=16)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=16,
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**SIZES, d_model=WIDTH, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            **SIZES, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=16,
        )
    ),
}  # fmt: skip
TEXT = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
ANSWER = torch.randint(3, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(1))
READERS = ["transformers", *["peft"] * (importlib.util.find_spec("peft") is not None)]


@pytest.fixture(scope="module", params=MODELS)
def base(request, tmp_path_factory):
    """(family, model of transformers in float64, its folder)."""
    torch.manual_seed(0)
    model = MODELS[request.param]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    config = load_model(folder).model.config
    widen(model, config)
    for module in model.modules():
        if type(module).__name__ == "T5LayerNorm":
            module.forward = rms(module)
    return request.param, model, folder


def adapter_for(family, *, positions):
    draw = torch.Generator().manual_seed(5)
    tags, tensors = [], {}
    for number, name in enumerate(("first", "second")):
        tags.append(Tag(name, LENGTH + number, positions))
        for part in ("tokens", *["positions"] * positions):
            shape = (LENGTH + number, WIDTH)
            tensors[f"prompts.{number}.{part}"] = torch.randn(shape, generator=draw, dtype=torch.float64)
    return Adapter("soft-prompt", "gpt" if family in ("gpt2", "llama") else family, tensors, tuple(tags))


@torch.no_grad()
def ours(folder, adapter, tag):
    """Logits behind the text, or of the answer."""
    loaded = load_adapted(folder, [adapter], precision="64")
    model, before = loaded.model, loaded.model.config.vocab_size
    for each in loaded.prompting.adapter.tags[: loaded.prompting.adapter.names.index(tag)]:
        before += each.length
    length = loaded.prompting.adapter.tags[loaded.prompting.adapter.names.index(tag)].length
    tokens = torch.cat([torch.arange(before, before + length).expand(2, -1), TEXT], 1)
    if loaded.family == "gpt":
        return model.logits(model(tokens))[:, length:]
    return model.logits(model(tokens, tokens=ANSWER))


@torch.no_grad()
def theirs(reader, model, folder):
    sided = model.config.is_encoder_decoder
    more = {"decoder_input_ids": ANSWER} if sided else {}
    if reader == "peft":
        import peft

        torch.set_default_dtype(torch.float64)
        try:
            tuned = peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
        finally:
            torch.set_default_dtype(torch.float32)
        logits = tuned.eval()(input_ids=TEXT, attention_mask=torch.ones_like(TEXT), **more).logits
        return logits if sided else logits[:, -TEXT.shape[1] :]
    said = json.loads((folder / "adapter_config.json").read_text())
    assert (said["peft_type"], said["token_dim"]) == ("PROMPT_TUNING", WIDTH)
    matrix = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"][
        : said["num_virtual_tokens"]
    ]
    embedded = torch.cat([matrix.expand(2, -1, -1), model.get_input_embeddings()(TEXT)], 1)
    logits = model(inputs_embeds=embedded, **more).logits
    return logits if sided else logits[:, -TEXT.shape[1] :]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("positions", [True, False])
def test_out(base, tmp_path, reader, positions):
    family, model, folder = base
    adapter = adapter_for(family, positions=positions)
    written = export(adapter, tmp_path / "out", "peft", folder)
    assert sorted(place.name for place in written) == ["first", "second"]
    for place in written:
        difference = ours(folder, adapter, place.name) - theirs(reader, model, place)
        assert difference.abs().max() < TOLERANCE


@pytest.mark.parametrize("reader", READERS)
def test_in(base, tmp_path, reader):
    _, model, folder = base
    place = tmp_path / "task"
    torch.manual_seed(3)
    if reader == "peft":
        import peft

        kind = peft.TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else peft.TaskType.CAUSAL_LM
        torch.set_default_dtype(torch.float64)
        try:
            made = peft.get_peft_model(
                model, peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=LENGTH)
            )
        finally:
            torch.set_default_dtype(torch.float32)
        made.save_pretrained(place)
    else:
        from safetensors.torch import save_file

        place.mkdir()
        rows = LENGTH * (2 if model.config.is_encoder_decoder else 1)
        save_file(
            {"prompt_embeddings": torch.randn(rows, WIDTH, dtype=torch.float64)},
            place / "adapter_model.safetensors",
        )
        task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
        said = {
            "peft_type": "PROMPT_TUNING",
            "task_type": task,
            "num_virtual_tokens": LENGTH,
            "token_dim": WIDTH,
        }
        (place / "adapter_config.json").write_text(json.dumps(said))
    adapter = open_adapter(place)
    assert adapter.tags == (Tag("task", LENGTH),)
    assert (ours(folder, adapter, "task") - theirs(reader, model, place)).abs().max() < TOLERANCE
    again = export(adapter, tmp_path / "again", "peft", folder)[0]
    assert (theirs("transformers", model, again) - theirs(reader, model, place)).abs().max() < TOLERANCE


def test_what_is_not_read(tmp_path):
    def folder(**said):
        content = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3, **said}
        (tmp_path / "adapter_config.json").write_text(json.dumps(content))
        return tmp_path

    for said, words in (
        ({"peft_type": "PREFIX_TUNING"}, "its peft_type is PREFIX_TUNING"),
        ({"task_type": "SEQ_CLS"}, "its task_type is 'SEQ_CLS'"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens None"),
        ({}, "adapter_model.safetensors cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=words):
            open_adapter(folder(**said))
    torch.save({"prompt_embeddings": torch.ones(2, 4)}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"prompt_embeddings is \[2, 4\], 3 virtual tokens are said"):
        open_adapter(folder())
    torch.save({"prompt_embeddings": torch.ones(3, 4)}, tmp_path / "adapter_model.bin")
    assert open_adapter(folder()).tags[0].length == 3
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        open_adapter(tmp_path)
