"""Objects of classes that exist while a file is written and nowhere afterwards, as in a pickle from another machine."""

from __future__ import annotations

import enum
import random
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def megatron_installed() -> Iterator[types.SimpleNamespace]:
    """Modules named as Megatron's, with the classes that its pickles name, importable until the block ends."""
    mask = enum.Enum("AttnMaskType", {"padding": 1, "causal": 2}, module="megatron.model.enums")
    model = enum.Enum("ModelType", {"encoder_or_decoder": 1}, module="megatron.core.enums")
    scaler = type("DynamicLossScaler", (), {"__module__": "megatron.fp16.loss_scaler"})
    modules = {
        "megatron": {},
        "megatron.model": {},
        "megatron.model.enums": {"AttnMaskType": mask},
        "megatron.core": {},
        "megatron.core.enums": {"ModelType": model},
        "megatron.fp16": {},
        "megatron.fp16.loss_scaler": {"DynamicLossScaler": scaler},
    }
    for name, content in modules.items():
        assert name not in sys.modules
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        yield types.SimpleNamespace(mask=mask, model=model, scaler=scaler)
    finally:
        for name in modules:
            del sys.modules[name]


def arguments(classes: types.SimpleNamespace, dtype: torch.dtype, facts: dict[str, object]) -> Namespace:
    """The facts among objects that only the writer's own program knows."""
    return Namespace(
        **facts,
        params_dtype=dtype,
        attn_mask_type=classes.mask.causal,
        model_type=classes.model.encoder_or_decoder,
        data_path=["my-gpt2_text_document"],
        save="checkpoints",
        rank=0,
        consumed_train_samples=320,
        consumed_valid_samples=0,
        lr=1.5e-4,
        lr_decay_style="cosine",
        vocab_file="gpt2-vocab.json",
    )


def training_state(classes: types.SimpleNamespace, weight: torch.Tensor, era: str) -> dict[str, object]:
    """Optimizer, schedule and random numbers under the names of "v1", "v2" or "v3", for one weight."""
    moments = {"exp_avg": weight.float() * 2, "exp_avg_sq": weight.float().abs(), "step": 10}
    inner = {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    rng = {
        "random_rng_state": random.Random(1).getstate(),
        "np_rng_state": np.random.RandomState(1).get_state(),
        "torch_rng_state": torch.Generator().get_state(),
        "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
        "rng_tracker_states": {"model-parallel-rng": torch.ones(16, dtype=torch.uint8)},
    }
    schedule = {"max_lr": 1e-4, "warmup_steps": 2, "num_steps": 320, "decay_style": "cosine"}
    if era == "v1":
        scaler = classes.scaler()
        scaler.cur_scale = 65536.0
        old = {
            "optimizer_state_dict": inner,
            "fp32_from_fp16": [[weight.float()]],
            "loss_scaler": scaler,
        }
        return {
            "optimizer": old,
            "lr_scheduler": {"start_lr": 1e-4, "warmup_iter": 2, "num_iters": 10},
            **rng,
        }
    scale = {"scale": torch.tensor([65536.0]), "growth_tracker": 3, "hysteresis_tracker": 2}
    optimizer = {"optimizer": inner, "grad_scaler": scale, "fp32_from_fp16_params": [[weight.float()]]}
    if era == "v2":
        return {"optimizer": optimizer, "lr_scheduler": schedule, **rng}
    return {"optimizer": optimizer, "opt_param_scheduler": schedule, "rng_state": [rng]}
