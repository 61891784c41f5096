"""A config.json of Hugging Face as a `ModelConfig`.

A key whose value would make another model than ours can be is refused by its name; a key that nobody here knows is told in a
notice. What a family calls its fields is said by `huggingface_families`; older spellings of rope are read, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from megalith.checkpoint.formats.huggingface_families import FAMILIES, NO_EFFECT, REFUSED, REQUIRED, Family
from megalith.errors import CheckpointError
from megalith.models.config import ModelConfig
from megalith.models.family import FAMILIES as OURS


@dataclass
class _Reading:
    """A config.json on its way to ours; `wrong` gathers everything that is refused."""

    values: Mapping[str, Any]
    family: Family
    made: dict[str, Any]
    stored: Collection[str] | None
    wrong: list[str] = field(default_factory=list)

    def get(self, key: str) -> Any:
        return self.values.get(key, self.family.absent.get(key))

    def refuse(self, key: str, why: str) -> None:
        self.wrong.append(f"{key}: {why}")


def read_config(
    values: Mapping[str, Any], *, where: str, stored: Collection[str] | None = None
) -> tuple[str, ModelConfig, tuple[str, ...]]:
    """→ (model_type, ours, notices). `stored`: names of the tensors beside it, which show what a config.json does not say.

    Errors: `CheckpointError` with every key that ours cannot be like.
    """
    kind = str(values.get("model_type"))
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"its model_type is {kind!r}", where=where, fix=f"this version reads {known}")
    reading = _Reading(values, FAMILIES[kind], dict(FAMILIES[kind].fixed), stored)
    for what, step in STEPS.items():
        try:
            step(reading)
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            reading.refuse(what, f"of another kind than they should be ({error})")
    if kind == "gpt2" and values.get("scale_attn_weights") is False:
        reading.made["attention_scale"] = 1.0
    if reading.wrong:
        raise CheckpointError(
            "\n    ".join([f"ours cannot be this {kind} model", *reading.wrong]), where=where
        )
    try:
        config = OURS[FAMILIES[kind].ours][1](**reading.made)
    except ValidationError as error:
        raise CheckpointError(f"its sizes make no model: {error}", where=where) from None
    return kind, config, tuple(_notices(reading))


def _read_fields(reading: _Reading) -> None:
    for key, name in reading.family.fields.items():
        value = reading.get(key)
        if value is not None:
            reading.made[name] = value
        if name in REQUIRED and key != "n_inner" and not isinstance(value, int):
            reading.refuse(key, "is missing" if value is None else f"{value!r} is no number")


def _read_activation(reading: _Reading) -> None:
    key = reading.family.activation
    known, name = reading.family.activations, reading.get(key)
    if name in known:
        reading.made["activation"] = known[name]
    else:
        reading.refuse(key, f"{name!r} is none of {', '.join(known)}")


def _read_only(reading: _Reading) -> None:
    for key, value in {**reading.family.only, **reading.family.older}.items():
        if reading.get(key) not in (None, value):
            reading.refuse(key, f"{reading.get(key)!r}; ours is like {value!r} only")
    for key in REFUSED:
        if reading.values.get(key) and key not in reading.family.only:
            reading.refuse(key, "ours has nothing like it")


def _read_rope(reading: _Reading) -> None:
    if reading.made.get("position_embedding_type") != "rope":
        return
    get = reading.values.get
    told = {**(get("rope_scaling") or {}), **(get("rope_parameters") or {})}
    reading.made["rotary_base"] = float(
        told.get("rope_theta") or get("rope_theta") or get("rotary_emb_base") or 1e4
    )
    absent = 0.25 if reading.family.architecture.startswith("GPTNeoX") else 1.0
    share = told.get("partial_rotary_factor") or get("partial_rotary_factor") or get("rotary_pct") or absent
    reading.made["rotary_percentage"] = float(share)
    kind = told.get("rope_type") or told.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        reading.refuse("rope_scaling", f"rope_type {kind!r} is none of default, linear, llama3")
    elif kind != "default":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        found = {name: told.get(name, get(name)) for name in names}
        reading.made["rotary_scaling"] = {"type": kind, **{n: v for n, v in found.items() if v is not None}}


def _read_biases(reading: _Reading) -> None:
    attention, mlp = reading.values.get("attention_bias"), bool(reading.values.get("mlp_bias"))
    if reading.family.architecture == "LlamaForCausalLM":
        if bool(attention) != mlp:
            reading.refuse(
                "attention_bias", f"{bool(attention)} with mlp_bias {mlp}; ours has both or neither"
            )
        reading.made["bias"] = mlp
    elif attention is False and reading.family.architecture.startswith("GPTNeoX"):
        reading.refuse(
            "attention_bias", "False; ours is like True only, for its feed-forward layers have biases"
        )


def _read_windows(reading: _Reading) -> None:
    length, window = reading.get("max_position_embeddings") or 0, reading.get("sliding_window")
    if reading.get("use_sliding_window") is not False and window is not None and window < length:
        reading.refuse("sliding_window", f"{window}, fewer than the {length} positions; ours sees all")
    odd = {str(each) for each in reading.get("layer_types") or ()} - {"full_attention", "sliding_attention"}
    if odd:
        reading.refuse("layer_types", f"{', '.join(sorted(odd))}; ours sees all in every layer")


def _read_bert(reading: _Reading) -> None:
    """The layer before the head bends as all layers do; whether there is a binary head is a matter of the class."""
    if reading.family.ours != "bert":
        return
    if "activation" in reading.made:
        reading.made["lm_head_activation"] = reading.made["activation"]
    if not reading.made.get("num_tokentypes"):
        reading.refuse(
            "type_vocab_size", f"{reading.get('type_vocab_size')!r}; transformers' BERT has one at least"
        )
    named = any(str(name).endswith("ForPreTraining") for name in reading.get("architectures") or ())
    reading.made["bert_binary_head"] = (
        named if reading.stored is None else _holds(reading, "cls.seq_relationship.")
    )


def _read_t5(reading: _Reading) -> None:
    """T5 1.0's head is the token table, before which hidden states are made smaller; 1.1 has a table of its own.

    transformers 5 says the latter with `scale_decoder_outputs`, and that all are tied, whatever its files hold.
    """
    if reading.family.ours != "t5":
        return
    untied, scaled = reading.get("tie_word_embeddings") is False, reading.get("scale_decoder_outputs")
    scaled = (not untied and reading.values.get("model_type") == "t5") if scaled is None else bool(scaled)
    untied = untied or (not scaled and _holds(reading, "lm_head."))
    reading.made["share_embeddings_and_output_weights"] = not untied
    reading.made["scale_decoder_output"] = scaled and not untied
    if "hidden_dropout" in reading.made:
        reading.made["attention_dropout"] = reading.made["hidden_dropout"]


def _read_bart(reading: _Reading) -> None:
    if reading.family.ours != "bart":
        return
    reading.made["output_bias"] = _holds(reading, "final_logits_bias")
    one, other = reading.get("encoder_attention_heads"), reading.get("decoder_attention_heads")
    if other not in (None, one):
        reading.refuse("decoder_attention_heads", f"{other}, the encoder has {one}; ours has as many in both")


def _read_sides(reading: _Reading) -> None:
    """An encoder-decoder of which only one half was saved is none."""
    if reading.stored is None or "is_encoder_decoder" not in reading.family.only:
        return
    for side in ("encoder", "decoder"):
        if not any(re.search(rf"(^|\.){side}\.", name) for name in reading.stored):
            reading.refuse(
                "architectures", f"{reading.get('architectures')}: there is no {side}; ours has both sides"
            )


def _holds(reading: _Reading, start: str) -> bool:
    return any(name.startswith(start) for name in reading.stored or ())


STEPS: Mapping[str, Callable[[_Reading], None]] = {
    "sizes": _read_fields,
    "activation": _read_activation,
    "switches": _read_only,
    "rope settings": _read_rope,
    "biases": _read_biases,
    "attention windows": _read_windows,
    "heads": _read_bert,
    "head": _read_t5,
    "attention heads": _read_bart,
    "sides": _read_sides,
}


def _notices(reading: _Reading) -> Iterator[str]:
    family = reading.family
    known = {
        *family.fields,
        family.activation,
        *family.only,
        *family.older,
        "tie_word_embeddings",
        "decoder_attention_heads",
        *NO_EFFECT,
        *REFUSED,
        "scale_attn_weights",
        "embd_pdrop",
    }
    odd = sorted(reading.values.keys() - known - {"use_sliding_window"})
    if odd:
        yield f"config.json has keys that are taken to change nothing: {', '.join(odd)}"
    drops = {reading.values[key] for key in ("resid_pdrop", "embd_pdrop") if key in reading.values}
    if len(drops) > 1:
        yield "embd_pdrop differs from resid_pdrop; hidden_dropout is resid_pdrop"
