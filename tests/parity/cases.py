"""The models of the parity suite: between them every option that a layout could get wrong, two a stage at least."""

from __future__ import annotations

from typing import Any

from megalith.models.bert_config import BertConfig
from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.parallel.memory import Recompute
from megalith.testing.parity import Case
from megalith.topology.sizes import Sizes

SHAPE = {
    "vocab_size": 130,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "max_position_embeddings": 8,
    "hidden_dropout": 0.1,
}
"""130 tokens padded to 256: with four tensor ranks the last one holds padding alone."""


def model(layers: int = 4, **changes: Any) -> ModelConfig:
    """A GPT."""
    return ModelConfig(**{**SHAPE, "num_layers": layers, **changes})


def bert(layers: int = 4, **changes: Any) -> BertConfig:
    """Megatron's BERT, with a binary head."""
    return BertConfig(**{**SHAPE, "num_layers": layers, **changes})


def encoder_decoder(layers: int = 2, **changes: Any) -> EncoderDecoderConfig:
    """Megatron's T5, so many layers on each side."""
    sides = {"num_layers": layers, "max_position_embeddings": 16, "output_bias": True}
    return EncoderDecoderConfig(**{**SHAPE, **sides, **changes})


LLAMA = {
    "position_embedding_type": "rope",
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "num_query_groups": 2,
    "share_embeddings_and_output_weights": False,
    "hidden_dropout": 0.0,
}

CASES = {
    "gpt2": Case(model(8)),
    "llama": Case(model(**LLAMA, num_attention_heads=4), micro_batch=1),
    "relative": Case(
        model(position_embedding_type="relative", activation="geglu", transformer_block_type="post_ln"),
        reset=True,
    ),
    "probabilities": Case(model(attention_dropout=0.1), reset=True),
    "recompute": Case(model(), recompute=Recompute("full", "block", 1)),
    "recompute in groups": Case(model(), recompute=Recompute("full", "uniform", 2)),
    "selective": Case(model(attention_core="eager"), recompute=Recompute("selective")),
    "compiled": Case(model(8), compile=True),
    "frozen": Case(model(), frozen=(r"^(?!.*(norm_mlp|blocks\.3)).*",)),
    "micro-batch means": Case(model(), loss_average="micro_batches"),
    "odd rows": Case(model(hidden_size=18, num_attention_heads=2, ffn_hidden_size=70)),
    "uneven stages": Case(model(5)),
    "few micro-batches": Case(model(), micro_batches=2),
    "fp32": Case(model(), precision="32"),
    "bf16": Case(model(hidden_dropout=0.0), precision="bf16-mixed"),
}

T5 = {
    "position_embedding_type": "relative",
    "normalization": "rmsnorm",
    "bias": False,
    "activation": "geglu",
    "output_bias": False,
    "share_embeddings_and_output_weights": False,
}
"""T5 1.1's."""

BART = {
    "transformer_block_type": "post_ln",
    "share_position_embeddings": False,
    "decoder_num_layers": 1,
    "decoder_ffn_hidden_size": 40,
}

FAMILIES = {
    "bert": Case(bert(8)),
    "bert original": Case(
        bert(
            transformer_block_type="post_ln", share_embeddings_and_output_weights=False, attention_dropout=0.1
        )
    ),
    "bert without order": Case(bert(bert_binary_head=False, num_tokentypes=3, num_query_groups=2)),
    "t5": Case(encoder_decoder(), micro_batches=4),
    "t5 1.1": Case(encoder_decoder(**T5), micro_batches=4),
    "bart": Case(encoder_decoder(**BART, attention_dropout=0.1), micro_batches=4),
}
CASES |= FAMILIES

UNEVEN = Sizes(pipeline=2, layers=(4, 1))
