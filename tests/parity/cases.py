"""The models of the parity suite: between them every option that a layout could get wrong, two a stage at least."""

from __future__ import annotations

from typing import Any

from megalith.models.config import ModelConfig
from megalith.parallel.memory import Recompute
from megalith.testing.parity import Case
from megalith.topology.sizes import Sizes


def model(layers: int = 4, **changes: Any) -> ModelConfig:
    """130 tokens padded to 256: with four tensor ranks the last one holds padding alone."""
    shape = {
        "vocab_size": 130,
        "num_layers": layers,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "max_position_embeddings": 8,
        "hidden_dropout": 0.1,
    }
    return ModelConfig(**{**shape, **changes})


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

UNEVEN = Sizes(pipeline=2, layers=(4, 1))
