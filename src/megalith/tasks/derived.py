"""Numbers that follow from a configuration: what `--print-config --derived` prints. Each with the arithmetic behind it.

Knows formulas. Builds no model; opens no file but the tokenizer's.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalith.engine.metrics import FORMULA, flops_per_token
from megalith.errors import MegalithError
from megalith.models.config import GATED_ACTIVATIONS, ModelConfig, num_parameters
from megalith.optim.schedule import Counters
from megalith.tasks.pretrain_config import PretrainGPTConfig
from megalith.tokenizers.load import load_tokenizer


@dataclass(frozen=True)
class Derived:
    """One number: what it is called, its value, and how it follows."""

    name: str
    value: int | float | str
    because: str = ""


def vocabulary(config: PretrainGPTConfig) -> tuple[int | None, str]:
    """(true vocabulary, where it comes from); (None, the reason) when the tokenizer cannot be loaded."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size, "model.vocab_size"
    try:
        return load_tokenizer(config.model.tokenizer).vocab_size, "the tokenizer"
    except MegalithError as problem:
        return None, f"{problem.problem.where}: {problem.problem.what}".removeprefix(": ")


def derived(config: PretrainGPTConfig) -> list[Derived]:
    """Everything that can be said before a run. Without a tokenizer, what depends on the vocabulary is left out."""
    vocab, source = vocabulary(config)
    rows = [*_batches(config), *_learning(config)]
    if vocab is None:
        return [*rows, Derived("vocabulary", "unknown", source)]
    architecture = config.model.architecture(vocab)
    return [*rows, Derived("vocabulary", vocab, source), *_size(config, architecture)]


def _batches(config: PretrainGPTConfig) -> list[Derived]:
    model, steps = config.model, config.trainer.max_steps
    data, length = model.sizes.data, model.encoder_seq_length
    samples = model.batch_schedule.consumed_at(steps)
    micro = model.global_batch_size // (model.micro_batch_size * data)
    ramp = ", ramped up" if model.rampup_batch_size else ""
    rows = [
        Derived("data-parallel size", data, "processes ÷ (tensor × pipeline × context)"),
        Derived(
            "micro-batches a step", micro, f"{model.global_batch_size} ÷ ({model.micro_batch_size} × {data})"
        ),
        Derived(
            "tokens a micro-batch", model.micro_batch_size * length, f"{model.micro_batch_size} × {length}"
        ),
        Derived("tokens a step", model.global_batch_size * length, f"{model.global_batch_size} × {length}"),
        Derived("samples of the run", samples, f"{steps} steps{ramp}"),
        Derived("tokens of the run", samples * length, f"{samples} × {length}"),
    ]
    every, batches = config.trainer.val_check_interval, config.trainer.limit_val_batches
    if every and batches:
        rows.append(Derived("validations", steps // every, f"every {every} steps"))
        tokens = batches * model.global_batch_size * length
        rows.append(
            Derived(
                "tokens a validation", tokens, f"{batches} × {model.global_batch_size} × {length}, at most"
            )
        )
    return rows


def _learning(config: PretrainGPTConfig) -> list[Derived]:
    schedule, steps = config.schedule, config.trainer.max_steps
    batch, length = config.model.global_batch_size, config.model.encoder_seq_length
    name = config.model.optim.sched.name

    def rate(step: int) -> str:
        return f"{schedule.lr(Counters(step, step * batch, step * batch * length)):.4g}"

    places = {"first": 0, "middle": steps // 2, "last": steps - 1}
    return [
        Derived(f"learning rate, {word} step", rate(step), f"{name}, step {step + 1}")
        for word, step in places.items()
    ]


def _size(config: PretrainGPTConfig, model: ModelConfig) -> list[Derived]:
    total, true = num_parameters(model), num_parameters(model, padded=False)
    samples = config.model.batch_schedule.consumed_at(config.trainer.max_steps)
    tokens = samples * config.model.encoder_seq_length
    per_token = flops_per_token(
        matrix_parameters=matrix_parameters(model),
        layers=model.num_layers,
        attention_width=model.num_attention_heads * model.head_dim,
        length=config.model.encoder_seq_length,
    )
    padding = f"next multiple of {model.make_vocab_size_divisible_by}"
    return [
        Derived("padded vocabulary", model.padded_vocab_size, padding),
        Derived("channels of a head", model.head_dim, "kv_channels or hidden_size ÷ num_attention_heads"),
        Derived("feed-forward width", model.ffn_size, "ffn_hidden_size or 4 × hidden_size"),
        Derived("parameters", true, "padding rows not counted"),
        Derived(
            "weights, gradients, moments",
            f"{16 * total / 2**30:.3g} GiB",
            "16 bytes a parameter, padding counted",
        ),
        Derived(
            "tokens a parameter", f"{tokens / true:.3g}", "about 20 is compute-optimal (Hoffmann et al. 2022)"
        ),
        Derived("FLOPs a token", f"{per_token:.3g}", FORMULA),
        Derived("FLOPs of the run", f"{per_token * tokens:.3g}", "FLOPs a token × tokens of the run"),
    ]


def matrix_parameters(model: ModelConfig) -> int:
    """Parameters that take part in a matrix product: the blocks' matrices and the head's true rows."""
    width, inner = model.hidden_size, model.num_attention_heads * model.head_dim
    attention = width * (2 * inner + 2 * model.kv_heads * model.head_dim)
    matrices = 3 if model.activation in GATED_ACTIVATIONS else 2
    return model.num_layers * (attention + matrices * width * model.ffn_size) + model.vocab_size * width
