"""A training configuration → the same training in small: every choice kept, every size shrunk, and a list of what changed.

    PretrainConfig ─ asked_sizes ─▶ Sizes as asked ─ small_sizes ─▶ at most 8 processes
                   └ small_model, small_optim ────▶ Case          └ kept: the axes, the schedule, the policy

What is kept: norms, positions, activation, wiring, tying, biases, dropout, attention, masks, optimizer, recomputation, loss
average, how heads relate to key-value heads, layers to stages, and an encoder to its decoder. Knows the configuration. Runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, count
from types import SimpleNamespace
from typing import Any, cast

from megalith.errors import ConfigError, Problem, UnsupportedError
from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.optim.config import OptimConfig, SchedConfig
from megalith.parallel.memory import Recompute, check_recompute
from megalith.tasks.derived import vocabulary
from megalith.tasks.pretrain_config import PretrainConfig
from megalith.tasks.pretrain_model import PretrainModelConfig
from megalith.tasks.processes import located
from megalith.testing.parity import Case
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology

MOST_PROCESSES = 8
LENGTH, LAYERS_OF_A_STAGE, CLIP = 8, 2, 0.1
"""Tokens of a sample; layers that a stage has at most; a norm that the first steps' gradients exceed."""
_DEPTHS = {1: ("num_layers",), 2: ("encoder_num_layers", "decoder_num_layers")}
"""What a user calls the layers of one tower, and of two."""
LEARNING_RATE, EPSILON = 1e-2, 1e-4
"""With Adam's usual 1e-8 the first steps would be signs of gradients, which magnify rounding and hide factors."""


@dataclass(frozen=True)
class Change:
    """One key: what was asked for, and what is run."""

    key: str
    yours: str
    here: str


@dataclass(frozen=True)
class Miniature:
    """What `parity` runs in place of a configuration, and how they differ."""

    case: Case
    sizes: Sizes
    asked: Sizes
    changes: tuple[Change, ...]


def miniature(config: PretrainConfig) -> Miniature:
    """The small training on the small layout.

    Errors: one `ConfigError` with everything that keeps the layout as asked from running the model as asked, or that
    nothing is asked for.
    """
    asked = asked_sizes(config)
    sizes = small_sizes(asked, *config.model.depths)
    model = small_model(config.model, asked, sizes)
    source, length = _lengths(config.model, sizes)
    case = Case(
        model=model,
        micro_batch=min(config.model.micro_batch_size, 2),
        micro_batches=sizes.data * math.ceil(4 / sizes.pipeline) * sizes.pipeline,
        length=length,
        source=source,
        compile=_compiled(config.model),
        recompute=small_recompute(config.model, asked, sum(model.depths) // sizes.stages),
        reset=_reset(config.model),
        optim=small_optim(config.model.optim),
        clip=min(config.trainer.gradient_clip_val or 0.0, CLIP),
        loss_average=config.model.compat.loss_average,
        seed=config.model.seed,
    )
    return Miniature(case, sizes, asked, tuple(changes(config, asked, case, sizes)))


# -- layout ------------------------------------------------------------------------------------------------------------


def asked_sizes(config: PretrainConfig) -> Sizes:
    """The layout that the configuration asks for; without `trainer.devices`, the smallest that shares what it shares."""
    model, trainer = config.model, config.trainer
    known = trainer.num_devices is not None
    if known:
        sizes = model.layout((trainer.num_devices or 1) * trainer.num_nodes)
        world = (trainer.num_devices or 1) * trainer.num_nodes
    else:
        sizes, world = model.sizes, model.sizes.world
    vocab = vocabulary(config)[0]
    padded = model.architecture(vocab).padded_vocab_size if vocab else None
    found = sizes.problems(model.numbers(padded, batch=True), world=world, compiled=_compiled(model))
    if not known and model.zero_stage:
        among = model.zero_shard_size
        sizes = replace(sizes, shard=among or 2, replicate=2 if among else 1)
    found += _recompute_problems(model, sizes)
    if found:
        raise ConfigError([located(problem, type(model)) for problem in found])
    if sizes.world == 1:
        fix = "model.tensor_model_parallel_size=2, model.pipeline_model_parallel_size=2, or trainer.devices=2"
        raise ConfigError(
            [Problem("the layout", "is one process, so there is nothing to compare it with", fix)]
        )
    return sizes


def _recompute_problems(model: PretrainModelConfig, sizes: Sizes) -> list[Problem]:
    """The rule needs no more of a topology than its sizes."""
    topology = SimpleNamespace(sizes=sizes, size=lambda axis: getattr(sizes, axis))
    try:
        check_recompute(cast(Topology, topology), _recompute(model))
    except UnsupportedError as refusal:
        return [refusal.problem]
    except ConfigError as wrong:
        return list(wrong.problems)
    return []


def small_sizes(asked: Sizes, *depths: int) -> Sizes:
    """The same axes with at most 8 processes: large axes become 4 or 2, data-parallel ones first.

    `depths` are the model's: with two the decoder begins in the same part of the pipeline.

    Offloading is left out, for the comparison runs on the CPU.
    """
    sizes = replace(
        asked,
        tensor=min(asked.tensor, 4),
        context=min(asked.context, 4),
        pipeline=min(asked.pipeline, 4),
        virtual_pipeline=min(asked.virtual_pipeline, 2),
        offload=False,
    )
    while sizes.world > MOST_PROCESSES:
        large = [
            axis
            for axis in ("replicate", "shard", "context", "pipeline", "tensor")
            if getattr(sizes, axis) > 2
        ]
        axis = large[0] if large else "replicate" if sizes.replicate > 1 else "shard"
        smaller = 4 if getattr(sizes, axis) > 4 else 2
        sizes = replace(sizes, **{axis: smaller if large else 1})
    return replace(
        sizes, layers=_stage_layers(asked, sizes, depths), pipeline_split=_split(asked, sizes, depths)
    )


def _split(asked: Sizes, sizes: Sizes, depths: tuple[int, ...]) -> int | None:
    """At which stage a decoder begins; None where there is none, or no pipeline."""
    if len(depths) < 2 or sizes.stages == 1:
        return None
    first = asked.stages_of(*depths)[0]
    return min(max(round(first * sizes.stages / asked.stages), 1), sizes.stages - 1)


def _stage_layers(asked: Sizes, sizes: Sizes, depths: tuple[int, ...]) -> tuple[int, ...] | None:
    """Uneven stages stay uneven: the same proportion, at most three layers a stage."""
    if asked.layers is None or sizes.stages == 1:
        return None
    begin, here = (asked.stages_of(*depths)[0], _split(asked, sizes, depths)) if len(depths) > 1 else (0, 0)
    parts = ((asked.layers[:begin], here or 0), (asked.layers[begin:], sizes.stages - (here or 0)))
    chosen = [n for part, stages in parts for n in _spread(part, stages)]
    most = max(chosen)
    small = [max(1, round(n * 3 / most)) if most > 3 else n for n in chosen]
    if len(set(small)) == 1 < len(set(chosen)):
        small = [n - (least == min(chosen)) for n, least in zip(small, chosen, strict=True)]
    return tuple(small)


def _spread(numbers: tuple[int, ...], count: int) -> list[int]:
    """So many of them, the first and the last among them."""
    last, end = len(numbers) - 1, max(count - 1, 1)
    return [numbers[round(i * last / end)] for i in range(count)]


# -- model -------------------------------------------------------------------------------------------------------------


def small_model(model: PretrainModelConfig, asked: Sizes, sizes: Sizes) -> ModelConfig:
    """The architecture with a few channels: what `ModelConfig` calls choices is copied, what it calls sizes is chosen."""
    ratio = model.num_attention_heads // model.kv_heads
    ratio = ratio if ratio <= 8 else 4
    groups = _multiple(min(model.kv_heads, 2), sizes.tensor)
    heads = ratio * groups
    channels = _head_channels(model, max(4, 16 // heads))
    free = (
        model.kv_channels is not None and model.kv_channels * model.num_attention_heads != model.hidden_size
    )
    width = heads * channels
    longest = max(_lengths(model, sizes))
    depths = _depths(model.depths, asked, sizes)
    buckets = min(model.relative_attention_num_buckets, 8)
    chosen: dict[str, Any] = {
        "vocab_size": _vocabulary(model, sizes.tensor),
        "num_layers": depths[0],
        "hidden_size": width + 4 if free else width,
        "num_attention_heads": heads,
        "num_query_groups": None if model.num_query_groups is None else groups,
        "kv_channels": channels if free else None,
        "ffn_hidden_size": _inner(model.ffn_size, model, width, sizes.tensor),
        "max_position_embeddings": longest + (4 if model.positions > model.encoder_seq_length else 0),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": min(
            model.relative_attention_max_distance, max(12, buckets // 2 + 1)
        ),
        "attention_core": "auto" if model.attention_core == "flex" else model.attention_core,
    }
    if isinstance(model, EncoderDecoderConfig):
        ffn = model.decoder_ffn_hidden_size
        chosen |= {
            "encoder_num_layers": None,
            "decoder_num_layers": depths[1] if depths[1] != depths[0] else None,
            "decoder_ffn_hidden_size": ffn and _inner(ffn, model, width, sizes.tensor),
        }
    kind = model.architecture_class
    return kind(**{**{name: getattr(model, name) for name in kind.model_fields}, **chosen})


def _inner(size: int, model: PretrainModelConfig, width: int, tensor: int) -> int:
    """An inner width that is to `width` as in the model."""
    return _multiple(max(round(width * size / model.hidden_size), tensor), tensor)


def _lengths(model: PretrainModelConfig, sizes: Sizes) -> tuple[int, int]:
    """Tokens that an encoder reads, and those of the row with targets: which of the two is the longer one, is a choice.

    Tensor ranks can share both, and context ranks cut them into two chunks each.
    """
    length = _multiple(LENGTH, math.lcm(2, sizes.tensor) * sizes.context)
    asked = model.sample
    other = asked.decoder_length or asked.length
    return length * (1 + (asked.length > other)), length * (1 + (other > asked.length))


def _depths(depths: tuple[int, ...], asked: Sizes, sizes: Sizes) -> tuple[int, ...]:
    """Layers of each tower: as many a stage as there may be, and one more where they do not come out even."""
    if sizes.layers is not None:
        ends = list(accumulate(sizes.stages_of(*depths)))
        return tuple(sum(sizes.layers[begin:end]) for begin, end in zip((0, *ends[:-1]), ends, strict=True))
    if sizes.stages == 1:
        return tuple(min(layers, LAYERS_OF_A_STAGE) for layers in depths)
    each = zip(depths, asked.stages_of(*depths), sizes.stages_of(*depths), strict=True)
    return tuple(
        small * min(layers // stages, LAYERS_OF_A_STAGE) + (layers % stages > 0)
        for layers, stages, small in each
    )


def _head_channels(model: PretrainModelConfig, least: int) -> int:
    """Channels of a head, of which rotary angles turn a share that exists."""
    for channels in (c for c in (4, 6, 8, 12, 16, 20, 24, 32, 40) if c >= least):
        turned = int(channels * model.rotary_percentage)
        if model.position_embedding_type != "rope" or (turned and turned % 2 == 0):
            return channels
    return model.head_dim


def _vocabulary(model: PretrainModelConfig, tensor: int) -> int:
    """A small vocabulary whose table has rows of padding, as long as the divisor makes any and the user's table has."""
    divisor = model.make_vocab_size_divisible_by
    padded = divisor > 1 and (model.vocab_size is None or model.vocab_size % divisor > 0)
    rows = next(
        r for r in count(divisor, divisor) if r >= 64 and r % tensor == 0 and (r > divisor or not padded)
    )
    return rows - divisor + max(min(2, divisor - 1), 1) if padded else rows


# -- training ----------------------------------------------------------------------------------------------------------


def _recompute(model: PretrainModelConfig) -> Recompute | None:
    return Recompute.from_keys(
        model.activations_checkpoint_granularity,
        model.activations_checkpoint_method,
        model.activations_checkpoint_num_layers,
    )


def small_recompute(model: PretrainModelConfig, asked: Sizes, layers: int) -> Recompute | None:
    """The same share of a stage's layers, and several layers in a group where it was several."""
    how = _recompute(model)
    if how is None:
        return None
    of_a_stage = max(sum(model.depths) // asked.stages, 1)
    least = 2 if how.layers > 1 and layers > 1 else 1
    return replace(how, layers=min(max(round(how.layers * layers / of_a_stage), least), max(layers, 1)))


def small_optim(optim: OptimConfig) -> OptimConfig:
    """The same update rule and weight decay at a rate that moves weights within three steps."""
    return OptimConfig(
        **{
            **{name: getattr(optim, name) for name in OptimConfig.model_fields},
            "lr": LEARNING_RATE,
            "eps": max(optim.eps, EPSILON),
            "sched": SchedConfig(name="constant"),
        }
    )


def _reset(model: PretrainModelConfig) -> Any:
    positions, documents = model.data.reset_position_ids, model.data.reset_attention_mask
    if positions and documents:
        return True
    return "positions" if positions else "documents" if documents else False


def _compiled(model: PretrainModelConfig) -> bool:
    return str(model.compile).lower() == "true"


def _multiple(least: int, of: int) -> int:
    return math.ceil(least / of) * of


# -- what changed ------------------------------------------------------------------------------------------------------


def changes(config: PretrainConfig, asked: Sizes, case: Case, sizes: Sizes) -> Iterator[Change]:
    """Every key that has another value here, layout first."""
    pairs = [*_layout(config.model, asked, sizes), *_shapes(config.model, case), *_training(config, case)]
    for key, yours, here in pairs:
        if yours != here:
            yield Change(key, str(yours), str(here))


def _layout(model: PretrainModelConfig, asked: Sizes, sizes: Sizes) -> Iterator[tuple[str, Any, Any]]:
    yield "model.tensor_model_parallel_size", asked.tensor, sizes.tensor
    yield "model.pipeline_model_parallel_size", asked.pipeline, sizes.pipeline
    yield "model.virtual_pipeline_model_parallel_size", asked.virtual_pipeline, sizes.virtual_pipeline
    yield "model.context_parallel_size", asked.context, sizes.context
    if sizes.pipeline_split is not None:
        split = asked.stages_of(*model.depths)[0]
        yield "model.pipeline_model_parallel_split_rank", split, sizes.pipeline_split
    yield "model.pipeline_layers", _listed(asked.layers), _listed(sizes.layers)
    yield "data-parallel size", asked.data, sizes.data
    yield "model.zero_shard_size", asked.shard, sizes.shard
    yield "model.zero_cpu_offload", str(model.zero_cpu_offload).lower(), "false"


def _listed(numbers: tuple[int, ...] | None) -> str:
    return "" if numbers is None else "[" + ",".join(map(str, numbers)) + "]"


def _shapes(model: PretrainModelConfig, case: Case) -> Iterator[tuple[str, Any, Any]]:
    small = case.model
    for key, yours, here in zip(_DEPTHS[len(model.depths)], model.depths, small.depths, strict=True):
        yield f"model.{key}", yours, here
    yield "model.hidden_size", model.hidden_size, small.hidden_size
    yield "model.ffn_hidden_size", model.ffn_size, small.ffn_size
    if (ffn := getattr(model, "decoder_ffn_hidden_size", None)) is not None:
        yield "model.decoder_ffn_hidden_size", ffn, getattr(small, "decoder_ffn_hidden_size", None)
    yield "model.num_attention_heads", model.num_attention_heads, small.num_attention_heads
    if model.num_query_groups is not None:
        yield "model.num_query_groups", model.kv_heads, small.kv_heads
    if small.kv_channels is not None:
        yield "model.kv_channels", model.kv_channels, small.kv_channels
    yield "model.vocab_size", model.vocab_size or "the tokenizer's", small.vocab_size
    two = len(model.depths) > 1
    yield "model.encoder_seq_length", model.encoder_seq_length, case.source if two else case.length
    if two and model.sample.decoder_length != model.encoder_seq_length:
        yield "model.data.seq_length_dec", model.sample.decoder_length, case.length
    yield "model.max_position_embeddings", model.positions, small.max_position_embeddings
    if model.position_embedding_type == "relative":
        for key in ("relative_attention_num_buckets", "relative_attention_max_distance"):
            yield f"model.{key}", getattr(model, key), getattr(small, key)
    yield "model.attention_core", model.attention_core, small.attention_core


def _training(config: PretrainConfig, case: Case) -> Iterator[tuple[str, Any, Any]]:
    model, recompute = config.model, case.recompute
    yield "model.micro_batch_size", model.micro_batch_size, case.micro_batch
    yield "model.global_batch_size", model.global_batch_size, case.samples
    if model.rampup_batch_size:
        yield "model.rampup_batch_size", _listed(tuple(model.rampup_batch_size)), "null"
    if recompute is not None and model.activations_checkpoint_num_layers:
        key = "activations_checkpoint_num_layers"
        yield f"model.{key}", model.activations_checkpoint_num_layers, recompute.layers
    if str(model.compile).lower() == "auto":
        yield "model.compile", "auto", "false"
    yield "model.optim.lr", f"{model.optim.lr:g}", f"{case.optim.lr:g}"
    yield "model.optim.sched.name", model.optim.sched.name, case.optim.sched.name
    if case.optim.name != "sgd":
        yield "model.optim.eps", f"{model.optim.eps:g}", f"{case.optim.eps:g}"
    yield "trainer.gradient_clip_val", f"{config.trainer.gradient_clip_val or 0:g}", f"{case.clip:g}"
    yield "trainer.precision", config.trainer.precision, "64"
