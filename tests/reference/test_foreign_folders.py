"""Folders that transformers saves, read as they are: logits equal to theirs in float64, tokens equal to theirs."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

import tokenizers
from megalith.errors import CheckpointError
from megalith.generate.loading import load_model
from megalith.models.config import ModelConfig
from tests.checkpoint.foreign_files import LLAMA_LIKE, hugging_face, random_model
from tests.reference.test_transformers import widen
from tokenizers import decoders, models, normalizers, processors, trainers

TOKENS = torch.randint(0, 21, (2, 9), generator=torch.Generator().manual_seed(0))


def neox(*, parallel: bool = False, part: float = 0.5, tied: bool = False) -> GPTNeoXForCausalLM:
    """Every number is random: biases and norms, too."""
    config = GPTNeoXConfig(
        vocab_size=21,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        use_parallel_residual=parallel,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": part},
    )
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(("part", "tied"), [(0.25, False), (1.0, False), (0.5, True)])
def test_neox_with_one_residual_after_the_other(tmp_path, part, tied):
    theirs = neox(part=part, tied=tied)
    theirs.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device="cpu", precision="64")
    widen(theirs, loaded.model.config)
    with torch.no_grad():
        ours = loaded.model.logits(loaded.model(TOKENS))
        assert (ours - theirs(TOKENS).logits).abs().max() <= 1e-10


def test_neox_with_parallel_residuals_is_refused_by_its_key(tmp_path):
    neox(parallel=True).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="use_parallel_residual: True; ours is like False only"):
        load_model(tmp_path)


def llama_tokenizer(folder):
    """The form of Llama's: SentencePiece's pieces in a BPE with bytes for what it has no piece for."""
    special = ["<unk>", "<s>", "</s>"]
    engine = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))]
    )
    engine.train_from_iterator(["The cat sat on the mat. Don't you think so? 12345 é à"] * 50, trainer)
    definition = json.loads(engine.to_str())
    definition["added_tokens"] = [
        token for token in definition["added_tokens"] if token["content"] in special
    ]
    engine = tokenizers.Tokenizer.from_str(json.dumps(definition))
    engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=engine, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


def test_a_tokenizer_of_llamas_form(tmp_path):
    theirs = llama_tokenizer(tmp_path)
    hugging_face(tmp_path, random_model(ModelConfig(**LLAMA_LIKE | {"vocab_size": len(theirs)})))
    loaded = load_model(tmp_path)
    ours = loaded.needs_tokenizer()
    assert loaded.notices == ()
    for text in ("The cat sat", " the  mat", "héllo 世界 \n x", "", "Don't 😀"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
    assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)
