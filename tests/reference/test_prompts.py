"""Prompts against what they mean: the rows of their matrices fed in by hand. Logits, loss and every gradient in float64."""

from __future__ import annotations

import logging

import pytest
import torch

from megalith.adapt.method import Tag
from megalith.adapt.soft_prompt import SoftPrompts
from megalith.models.config import ModelConfig
from megalith.models.encdec import EncoderDecoder
from tests.reference import plain
from tests.reference.common import assert_close, mean_loss, random_model
from tests.reference.test_encoder_decoder import (
    VOCABULARY,
    bart_like,
    from_bart,
    from_t5,
    ours,
    randomised,
    rms,
)

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

TAGS = (Tag("a", 3, positions=True), Tag("b", 2, positions=True))


def with_prompts(model, tags=TAGS):
    """The same model with random matrices."""
    SoftPrompts(earlier=tags).install(model)
    model.prompts.double().eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.prompts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize("positions", ["learned_absolute", "rope", "relative"])
def test_gpt_equals_straight_line_code(positions):
    """There virtual tokens are further rows of the token table, less the model's positions where theirs are their own."""
    config = ModelConfig(
        vocab_size=13, make_vocab_size_divisible_by=8, num_layers=2, hidden_size=16, num_attention_heads=2,
        max_position_embeddings=9, position_embedding_type=positions,
    )  # fmt: skip
    learned = positions == "learned_absolute"
    model = with_prompts(random_model(config), [Tag(tag.name, tag.length, learned) for tag in TAGS])
    tokens = torch.tensor([[13, 14, 15, 1, 2, 3, 4], [16, 17, 5, 6, 7, 8, 9], [10, 11, 12, 1, 2, 3, 4]])
    targets = torch.tensor([[-1, -1, 1, 2, 3, 4, 5], [-1, 5, 6, 7, 8, 9, 10], [11, 12, 1, 2, 3, -1, -1]])

    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "prompts" not in name}
    matrices = [
        [p.detach().clone().requires_grad_() for p in table.parameters()] for table in model.prompts.tables
    ]
    rows = [sum(both) for both in matrices]
    if learned:
        rows = [row - weights["position_embedding.weight"][: len(row)] for row in rows]
    weights["token_embedding.weight"] = torch.cat((weights["token_embedding.weight"][:13], *rows))
    theirs = plain.logits_of(weights, config, tokens)
    assert_close("logits", model.logits(model(tokens)), theirs)

    ours_loss, their_loss = mean_loss(model, tokens, targets), plain.loss_of(theirs, targets)
    assert_close("loss", ours_loss, their_loss)
    ours_loss.backward()
    their_loss.backward()
    for number, table in enumerate(model.prompts.tables):
        for mine, matrix in zip(table.parameters(), matrices[number], strict=True):
            assert_close("gradient", mine.grad, matrix.grad)


def t5():
    config = ours(
        kv_channels=6, position_embedding_type="relative", normalization="rmsnorm", bias=False, attention_scale=1.0,
        relative_attention_num_buckets=8, relative_attention_max_distance=6, layernorm_epsilon=1e-3,
        activation="relu", scale_decoder_output=True,
    )  # fmt: skip
    shape = {
        "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3,
        "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6,
        "layer_norm_epsilon": 1e-3,
    }  # fmt: skip
    theirs = randomised(transformers.T5ForConditionalGeneration(transformers.T5Config(**shape)))
    for module in theirs.modules():
        if type(module).__name__ == "T5LayerNorm":
            module.forward = rms(module)
    return config, theirs, from_t5


def bart():
    config = ours(
        decoder_ffn_hidden_size=20, transformer_block_type="post_ln", share_position_embeddings=False,
        activation="gelu_erf", output_bias=True,
    )  # fmt: skip
    return config, bart_like("Bart", "gelu"), from_bart


@pytest.mark.parametrize("family", [t5, bart])
def test_encoder_decoders_equal_transformers_given_embeddings(family):
    config, theirs, convert = family()
    model = random_model(config, model_class=EncoderDecoder)
    weights = dict(theirs.named_parameters()) | {
        "final_logits_bias": getattr(theirs, "final_logits_bias", None)
    }
    model.load_state_dict(convert({name: t.detach() for name, t in weights.items() if t is not None}, config))
    learned = model.input_positions is not None
    with_prompts(model, [Tag(tag.name, tag.length, learned) for tag in TAGS])
    source = torch.tensor([[13, 14, 15, 1, 2, 3, 4, 0, 0], [16, 17, 5, 6, 7, 8, 9, 10, 11]])
    lengths, tokens = torch.tensor([7, 9]), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])

    table = theirs.get_input_embeddings()
    embedded = table(source.clamp(max=12)).detach()
    for row, prompt in enumerate(model.prompts.tables):
        matrix = prompt.tokens.detach()
        if learned:
            matrix = matrix + prompt.positions.detach() - model.input_positions.weight.detach()[: len(matrix)]
        embedded[row, : len(matrix)] = matrix
    embedded.requires_grad_()
    mask = torch.arange(9) < lengths[:, None]
    expected = theirs(inputs_embeds=embedded, attention_mask=mask, decoder_input_ids=tokens).logits
    found = model.logits(model(source, tokens=tokens, encoder_lengths=lengths))
    assert_close("logits", found, expected)

    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for row, prompt in enumerate(model.prompts.tables):
        for parameter in prompt.parameters():
            assert_close("gradient", parameter.grad, embedded.grad[row, : len(parameter)])
