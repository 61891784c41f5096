"""Numbers that follow from a configuration: what `--print-config --derived` prints. Each with the arithmetic behind it.

Knows formulas. Builds no model; opens no file but the tokenizer's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megalith.engine.flops import model_flops
from megalith.errors import MegalithError
from megalith.models.config import ModelConfig, num_parameters
from megalith.optim.schedule import Counters
from megalith.tasks.pretrain_config import PretrainConfig
from megalith.tasks.tuning_config import TuneConfig
from megalith.tokenizers.load import load_tokenizer

_ENOUGH = "about 20 is compute-optimal (Hoffmann et al. 2022)"
_OF_PRETRAINING = {
    "weights, gradients, moments", "tokens a parameter", "FLOPs a token", "FLOPs of the run",
}  # fmt: skip
"""What a tuning has otherwise: not all of the model learns, and samples are as long as their rows."""


@dataclass(frozen=True)
class Derived:
    """One number: what it is called, its value, and how it follows."""

    name: str
    value: int | float | str
    because: str = ""


def vocabulary(config: PretrainConfig) -> tuple[int | None, str]:
    """(true vocabulary, where it comes from); (None, the reason) when the tokenizer cannot be loaded."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size, "model.vocab_size"
    try:
        return load_tokenizer(config.model.tokenizer).vocab_size, "the tokenizer"
    except MegalithError as problem:
        return None, f"{problem.problem.where}: {problem.problem.what}".removeprefix(": ")


def derived(config: PretrainConfig) -> list[Derived]:
    """Everything that can be said before a run. Without a tokenizer, what depends on the vocabulary is left out."""
    vocab, source = vocabulary(config)
    rows = [*_batches(config), *_learning(config)]
    if vocab is None:
        return [*rows, Derived("vocabulary", "unknown", source)]
    architecture = config.model.architecture(vocab)
    rows += [Derived("vocabulary", vocab, source), *_size(config, architecture)]
    return _of_tuning(rows) if isinstance(config, TuneConfig) else rows


def _of_tuning(rows: list[Derived]) -> list[Derived]:
    return [
        replace(
            row, because=f"{row.because.removesuffix(', at most')}, at most: rows are as long as they are"
        )
        if row.name.startswith("tokens")
        else row
        for row in rows
        if row.name not in _OF_PRETRAINING
    ]


def _batches(config: PretrainConfig) -> list[Derived]:
    model, steps = config.model, config.trainer.max_steps
    data, length = model.sizes.data, model.sample.tokens
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


def _learning(config: PretrainConfig) -> list[Derived]:
    schedule, steps = config.schedule, config.trainer.max_steps
    batch, length = config.model.global_batch_size, config.model.sample.tokens
    name = config.model.optim.sched.name

    def rate(step: int) -> str:
        return f"{schedule.lr(Counters(step, step * batch, step * batch * length)):.4g}"

    places = {"first": 0, "middle": steps // 2, "last": steps - 1}
    return [
        Derived(f"learning rate, {word} step", rate(step), f"{name}, step {step + 1}")
        for word, step in places.items()
    ]


def _size(config: PretrainConfig, model: ModelConfig) -> list[Derived]:
    total, true = num_parameters(model), num_parameters(model, padded=False)
    samples = config.model.batch_schedule.consumed_at(config.trainer.max_steps)
    tokens = samples * config.model.sample.tokens
    flops = model_flops(model, config.model.sample)
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
            "tokens a parameter", f"{tokens / true:.3g}", _ENOUGH if config.model.family == "gpt" else ""
        ),
        Derived("FLOPs a token", f"{flops.per_token:.3g}", flops.formula),
        Derived("FLOPs of the run", f"{flops.per_token * tokens:.3g}", "FLOPs a token × tokens of the run"),
    ]
