"""Checkpoints of a NeMo run as Lightning writes them, from the weights of a tiny model: straight-line, as `nemo_files`.

The optimizer's state of a weight is made of the weight, so that whoever reads it under a wrong name shows it: exp_avg is
2 · w, exp_avg_sq is w².
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from tests.golden import nemo_sided_files
from tests.golden.megatron_files import sided_model
from tests.golden.nemo_files import Layout, place, state_dict
from tests.golden.sides import Sides
from tests.golden.whole import Whole

STEP, SAMPLES = 10, 80
NAME = f"megatron_gpt--val_loss=2.50-step={STEP}-consumed_samples={SAMPLES}.0-last.ckpt"


@dataclass(frozen=True)
class Run:
    """`masters`: O2, half-precision weights and fp32 copies of them. `apex`: the step is counted in the groups."""

    layout: Layout
    masters: bool = False
    apex: bool = True
    name: str = NAME


def write_run(folder: Path, whole: Whole, run: Run, keys: dict[str, object]) -> Path:
    """Writes `checkpoints` of a GPT below `folder`, and returns it."""
    layout, wide = run.layout, whole.to(torch.float64)
    return write_states(folder, run, keys, lambda r, stage: state_dict(wide, layout, r, stage))


def write_bert_run(folder: Path, whole: Sides, run: Run, keys: dict[str, object]) -> Path:
    """The same of a BERT."""
    layout = nemo_sided_files.megatron(run.layout, 1)

    def state(r: int, stage: int) -> dict[str, torch.Tensor]:
        tree = sided_model(whole.to(torch.float64), layout, r, stage)
        return nemo_sided_files.bert(dict(nemo_sided_files.flattened(tree)))

    return write_states(folder, run, keys, state)


def write_t5_run(folder: Path, whole: Sides, run: Run, keys: dict[str, object]) -> Path:
    """The same of a T5 in one stage, whose decoder's embedding is the encoder's module."""
    layout = nemo_sided_files.megatron(run.layout, 1)

    def state(r: int, stage: int) -> dict[str, torch.Tensor]:
        tree = sided_model(whole.to(torch.float64), layout, r, stage)
        flat = dict(nemo_sided_files.flattened(tree))
        return nemo_sided_files.encoder_decoder(flat, run.layout, stage)

    return write_states(folder, run, keys, state)


def write_states(
    folder: Path, run: Run, keys: dict[str, object], state_of: Callable[[int, int], dict[str, torch.Tensor]]
) -> Path:
    layout = run.layout
    sizes = {"tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp}
    for stage in range(layout.pp):
        for r in range(layout.tp):
            state = state_of(r, stage)
            kept = {name: tensor.half() if run.masters else tensor.float() for name, tensor in state.items()}
            path = folder / "checkpoints" / place(layout, r, stage) / run.name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {
                "epoch": 0,
                "global_step": STEP,
                "pytorch-lightning_version": "1.6.5",
                "state_dict": kept,
                "loops": {"fit_loop": {"epoch_loop.batch_progress": {"total": {"ready": STEP}}}},
                "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(2.5)}},
                "lr_schedulers": [{"last_epoch": STEP, "_last_lr": [1e-4, 1e-4]}],
                "native_amp_scaling_state": {"scale": 4096.0, "growth_factor": 2.0},
                "optimizer_states": [optimizer_state(state, run)],
                "hparams_name": "cfg",
                "hyper_parameters": {"cfg": OmegaConf.create(sizes | keys)},
            }
            torch.save(content, path)
    return folder / "checkpoints"


def optimizer_state(state: dict[str, torch.Tensor], run: Run) -> dict[str, object]:
    """FusedAdam's, over two groups; each in the order of the modules, a module's weight before its bias."""
    decay, plain = [], []
    for module in modules(state):
        for kind in ("weight", "bias"):
            if f"{module}.{kind}" in state:
                matrix = kind == "weight" and "layernorm" not in module
                (decay if matrix else plain).append(state[f"{module}.{kind}"])
    groups = [decay, plain]
    moments: dict[int, dict[str, object]] = {}
    param_groups = []
    for group in groups:
        first = len(moments)
        for tensor in group:
            weight = tensor.half().float() if run.masters else tensor.float()
            moments[len(moments)] = {"exp_avg": 2 * weight, "exp_avg_sq": weight.square()}
            if not run.apex:
                moments[len(moments) - 1]["step"] = STEP
        step = {"step": STEP} if run.apex else {}
        param_groups.append({"lr": 1e-4, "params": list(range(first, len(moments))), **step})
    adam: dict[str, object] = {"state": moments, "param_groups": param_groups}
    if not run.masters:
        return adam
    return {
        "optimizer": adam,
        "fp32_from_fp16_params": [[tensor.half().float() for tensor in group] for group in groups],
    }


def modules(state: dict[str, torch.Tensor]) -> list[str]:
    """Modules in the order in which NeMo's model makes them."""
    if "enc_dec_model.encoder_embedding.word_embeddings.weight" in state:
        return sided_modules(state)
    model = "model.module" if any(name.startswith("model.module.") for name in state) else "model"
    text = f"{model}.language_model"
    tables = ("word_embeddings", "position_embeddings", "tokentype_embeddings")
    found = [f"{text}.embedding.{name}" for name in tables]
    number = 0
    while f"{text}.encoder.layers.{number}.input_layernorm.weight" in state:
        layer = f"{text}.encoder.layers.{number}"
        found += [f"{layer}.input_layernorm", f"{layer}.self_attention.query_key_value"]
        found += [f"{layer}.self_attention.dense", f"{layer}.post_attention_layernorm"]
        found += [f"{layer}.mlp.dense_h_to_4h", f"{layer}.mlp.dense_4h_to_h"]
        number += 1
    heads = ("word_embeddings", "lm_head", "lm_head.dense", "lm_head.layernorm", "binary_head")
    found += [f"{text}.encoder.final_layernorm", f"{text}.pooler.dense"]
    return [*found, *(f"{model}.{head}" for head in heads)]


def sided_modules(state: dict[str, torch.Tensor]) -> list[str]:
    """The same of an encoder-decoder (token_level_encoder_decoder.py): embedding, encoder, decoder, head."""
    top = "enc_dec_model"
    found = [f"{top}.encoder_embedding.{name}" for name in ("word_embeddings", "position_embeddings")]
    for side in ("encoder", "decoder"):
        tower, number = f"{top}.enc_dec_model.{side}.model", 0
        while f"{tower}.layers.{number}.input_layernorm.weight" in state:
            layer = f"{tower}.layers.{number}"
            names = ["input_layernorm", "self_attention.query_key_value", "self_attention.dense"]
            names += ["post_attention_layernorm"]
            if side == "decoder":
                names += ["inter_attention.query", "inter_attention.key_value", "inter_attention.dense"]
                names += ["post_inter_attention_layernorm"]
            found += [f"{layer}.{name}" for name in (*names, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")]
            number += 1
        found.append(f"{tower}.final_layernorm")
    return [*found, f"{top}.tokens_head"]
