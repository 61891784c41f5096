"""LoRA in PEFT's layout, both ways: adapter_config.json, and adapter_model.safetensors with an A and a B for each of its modules.

    ours (a product)          PEFT's (modules of transformers)
    qkv   A, B            ▶   q_proj A, Bq    k_proj A, Bk    v_proj A, Bv      rows of B cut out, A three times
    qkv   [Aq; Ak; Av],   ◀   q_proj Aq, Bq   k_proj Ak, Bk   v_proj Av, Bv     A's over each other, B's in blocks
          diag(Bq, Bk, Bv)    (A's that are the same, as above, stay one; what is no target is zero)

A module stored (in, out) (GPT-2's Conv1D: `fan_in_fan_out`) has A and B as any other has. Rows are reordered by the steps of the
tables that checkpoints are converted by. Scales of modules that differ from the common one go into their B.

Knows PEFT's files; never imports it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megalith.adapt.adapter import DAMAGED, LORA, Adapter, Base, checked
from megalith.adapt.lora import LoRA
from megalith.adapt.peft import CONFIG, TENSORS, read_config, read_tensors
from megalith.adapt.spelling import Spelling, projections, spellings, table_of
from megalith.checkpoint.files import write_file
from megalith.checkpoint.formats.huggingface_export import write_config
from megalith.checkpoint.mapped import canonical
from megalith.checkpoint.mapping import Heads
from megalith.checkpoint.tensor_files import write_tensors
from megalith.errors import CheckpointError, ConfigError
from megalith.models.bert_config import BertConfig
from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.models.family import class_of

PREFIX = "base_model.model."
_KEY = re.compile(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_([AB])(?:\.default)?\.weight")
_PLAIN = {"bias": "none"}
"""What a key says in an adapter that is A and B alone; of the others, nothing."""
_OTHER = (
    "bias", "modules_to_save", "use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
"""Keys by which PEFT's LoRA becomes another thing."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Beginnings of A and B that PEFT takes out of the base model's weights, anew each time that such an adapter is loaded."""


class Pair(NamedTuple):
    """A (r, in) and B (out, r), B with what its scale differs by from the common one."""

    a: torch.Tensor
    b: torch.Tensor


# -- in ----------------------------------------------------------------------------------------------------------------


def read_peft_lora(folder: Path, config: ModelConfig) -> Adapter:
    """An adapter for a model of this config, whose names say what its modules are.

    Errors: `CheckpointError` for damage, for what is LoRA with something besides, and for modules that are no products of blocks.
    """
    said = read_config(folder)
    _refuse_other(said, folder)
    rank, scale = _rank(said, folder), _scale(said, folder)
    known, heads, sizes = _spelled(config, folder)
    pairs = {canonical(table_of(config), name): pair for name, pair in _pairs(said, scale, folder).items()}
    tensors: dict[str, torch.Tensor] = {}
    for spelling in known.values():
        mine = [pairs.pop(module, None) for module in spelling.foreign]
        if any(mine):
            _check_sizes(spelling, mine, sizes[spelling.native], folder)
            a, b = _woven(spelling, mine, sizes[spelling.native].rows, heads)
            tensors |= {f"{spelling.native}.lora_a": a, f"{spelling.native}.lora_b": b}
    if pairs:
        raise CheckpointError(
            f"it tunes {', '.join(list(pairs)[:4])}, which {'is' if len(pairs) == 1 else 'are'} no product of this model's blocks",
            where=str(folder),
            fix="give the model that it was tuned on; tables and heads cannot be tuned by LoRA here",
        )
    names = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    ranks = {name: len(tensors[f"{name}.lora_a"]) for name in names}
    method = LoRA(
        rank=rank,
        alpha=scale * rank,
        dropout=float(said.get("lora_dropout") or 0.0),
        targets=_targets(names, list(known)),
        ranks={name: wide for name, wide in ranks.items() if wide != rank},
    )
    base = Base(name=str(said.get("base_model_name_or_path") or ""))
    return checked(Adapter(LORA, _family(config), tensors, (), method.describe(), base, str(folder)))


def _refuse_other(said: Mapping[str, Any], folder: Path) -> None:
    if said.get("peft_type") != "LORA":
        raise CheckpointError(
            f"its peft_type is {said.get('peft_type')}", where=str(folder), fix="LORA is read here"
        )
    found = [f"{key} {said[key]!r}" for key in _OTHER if said.get(key) and said[key] != _PLAIN.get(key)]
    if str(begun := said.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        found.append(f"init_lora_weights {begun!r}, which changes the base model's weights")
    if found:
        raise CheckpointError(
            f"it is LoRA with something besides: {', '.join(found)}",
            where=f"{folder}/{CONFIG}",
            fix="merge it with PEFT (merge_and_unload), and use the merged model",
        )


def _rank(said: Mapping[str, Any], folder: Path) -> int:
    rank = said.get("r")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"its r is {rank!r}", where=f"{folder}/{CONFIG}", fix=DAMAGED)
    return rank


def _scale(said: Mapping[str, Any], folder: Path) -> float:
    """The common one."""
    alpha, rank = said.get("lora_alpha"), _rank(said, folder)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise CheckpointError(f"its lora_alpha is {alpha!r}", where=f"{folder}/{CONFIG}", fix=DAMAGED)
    return alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)


def _pairs(said: Mapping[str, Any], scale: float, folder: Path) -> dict[str, Pair]:
    """A and B of each module of theirs, by its name."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in read_tensors(folder).items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim != 2:
            raise CheckpointError(f"{key} is no A or B of a product", where=f"{folder}/{TENSORS}")
        found.setdefault(match[1], {})[match[2]] = tensor
    pairs = {}
    for module, both in found.items():
        if len(both) < 2 or both["A"].shape[0] != both["B"].shape[1]:
            sizes = ", ".join(f"lora_{kind} {list(tensor.shape)}" for kind, tensor in sorted(both.items()))
            raise CheckpointError(f"{module} has {sizes}", where=f"{folder}/{TENSORS}", fix=DAMAGED)
        rank = len(both["A"])
        try:
            alpha = _by_pattern(said.get("alpha_pattern"), module, said["lora_alpha"])
        except (re.error, TypeError, ValueError, AttributeError):
            raise CheckpointError("its alpha_pattern is not understood", where=f"{folder}/{CONFIG}") from None
        own = alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)
        pairs[module] = Pair(both["A"], both["B"] if own == scale else both["B"] * (own / scale))
    return pairs


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: float) -> float:
    """PEFT's rule: the first pattern that the end of a name is like."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return float(value)
    return default


def _woven(
    spelling: Spelling, pairs: Sequence[Pair | None], sizes: Sequence[int], heads: Heads
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of the modules that one product is there → its own; None: a module that is not tuned."""
    different: list[torch.Tensor] = []
    for pair in pairs:
        if pair is not None and not any(_same(pair.a, other) for other in different):
            different.append(pair.a)
    blocks = []
    for a in different:
        parts = [
            pair.b if pair is not None and _same(pair.a, a) else a.new_zeros(size, len(a))
            for pair, size in zip(pairs, sizes, strict=True)
        ]
        blocks.append(spelling.rows.inward(parts, heads)[0])
    return torch.cat(different).contiguous(), torch.cat(blocks, dim=1).contiguous()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _targets(names: Sequence[str], every: Sequence[str]) -> tuple[str, ...]:
    """The fewest words that `LoRA.targets` understands as these products."""
    ends = dict.fromkeys(".".join(name.split(".")[-2:]) for name in names)
    meant = [name for name in every if ".".join(name.split(".")[-2:]) in ends]
    return tuple(ends) if sorted(meant) == sorted(names) else tuple(names)


# -- out ---------------------------------------------------------------------------------------------------------------


def write_peft_lora(adapter: Adapter, folder: Path, config: ModelConfig) -> None:
    """Writes an adapter of a model of this config into an empty folder.

    Errors: `CheckpointError` where no family of transformers is like the model.
    """
    method = LoRA.understand(adapter.settings, where=adapter.path)
    known, heads, _ = _spelled(config, folder)
    tensors: dict[str, torch.Tensor] = {}
    turned, ranks = False, {}
    for native, module, a, b in _cut(adapter.tensors, known, heads):
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
        turned |= known[native].turned
        if len(a) != method.rank:
            ranks[module] = len(a)
    modules = [name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name in tensors][::2]
    every = [module for spelling in known.values() for module in spelling.foreign]
    write_tensors(folder / TENSORS, tensors)
    said = {
        "peft_type": "LORA",
        "task_type": _task(config),
        "base_model_name_or_path": adapter.base.name,
        "inference_mode": True,
        "r": method.rank,
        "lora_alpha": int(method.alpha) if float(method.alpha).is_integer() else method.alpha,
        "lora_dropout": method.dropout,
        "target_modules": _ends(modules, every),
        "fan_in_fan_out": turned,
        "rank_pattern": ranks,
        "alpha_pattern": {module: method.scale * rank for module, rank in ranks.items()},
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    write_file(folder / CONFIG, [(json.dumps(said, indent=2) + "\n").encode()])


def _cut(
    tensors: Mapping[str, torch.Tensor], known: Mapping[str, Spelling], heads: Heads
) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
    """(product, module of theirs, A, B)."""
    for native, spelling in known.items():
        if f"{native}.lora_a" in tensors:
            a, b = tensors[f"{native}.lora_a"], tensors[f"{native}.lora_b"]
            parts = spelling.rows.outward([b], heads)
            for module, part in zip(spelling.foreign, parts, strict=True):
                yield native, module, a, part.contiguous()


def _ends(modules: Sequence[str], every: Sequence[str]) -> list[str]:
    """The ends of names that PEFT takes as these modules and no other; whole names where there are none."""
    ends = sorted({re.split(r"\.\d+\.", module)[-1] for module in modules})
    meant = [module for module in every if any(module.endswith(f".{end}") for end in ends)]
    return ends if sorted(meant) == sorted(modules) else list(modules)


# -- both --------------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Of a product: `width` that it reads, and the rows of each module that it is there."""

    width: int
    rows: list[int]


def _spelled(config: ModelConfig, folder: Path) -> tuple[dict[str, Spelling], Heads, dict[str, Sizes]]:
    try:
        write_config(config, dtype="float32", ids={})  # a family must be exactly like it
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(
            f"PEFT's layout is for models of transformers: {error}", where=str(folder)
        ) from None
    with torch.device("meta"):
        products = projections(class_of(config)(config))
    heads = Heads(config.head_dim, config.num_attention_heads // config.kv_heads)
    known = spellings(config, list(products))
    sizes = {}
    for name, spelling in known.items():
        row = torch.empty(len(products[name].weight), 1, device="meta")
        parts = spelling.rows.outward([row], heads)
        sizes[name] = Sizes(products[name].weight.shape[1], [len(part) for part in parts])
    return known, heads, sizes


def _check_sizes(spelling: Spelling, pairs: Sequence[Pair | None], sizes: Sizes, folder: Path) -> None:
    for module, pair, rows in zip(spelling.foreign, pairs, sizes.rows, strict=True):
        if pair is not None and (pair.a.shape[1], pair.b.shape[0]) != (sizes.width, rows):
            raise CheckpointError(
                f"{module} leads from {pair.a.shape[1]} to {pair.b.shape[0]}, this model's from {sizes.width} to {rows}",
                where=f"{folder}/{TENSORS}",
                fix="give the model that it was tuned on",
            )


def _task(config: ModelConfig) -> str | None:
    if isinstance(config, BertConfig):
        return None
    return "SEQ_2_SEQ_LM" if isinstance(config, EncoderDecoderConfig) else "CAUSAL_LM"


def _family(config: ModelConfig) -> str:
    """Of an encoder-decoder a config does not say which."""
    if isinstance(config, EncoderDecoderConfig):
        return ""
    return "bert" if isinstance(config, BertConfig) else "gpt"
