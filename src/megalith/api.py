"""Megalith from Python: a model from any checkpoint in one call.

    loaded = megalith.load("models/Llama-3.2-1B")      a run, a step, a folder of transformers, what Megatron saved
    loaded.model, loaded.tokenizer, loaded.notices
    loaded = megalith.load("gpt.nemo", prompts=["sst"])    with soft prompts or LoRA
    loaded = megalith.use_prompts(loaded, ["rte"])         others, without the model being read again

`megalith.load` is this module's, imported when it is first asked for: `import megalith` stays free of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megalith.generate.adapting import load_adapted, use
from megalith.generate.loading import Loaded

__all__ = ["Loaded", "load", "use_prompts"]


def load(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    tokenizer: str | None = None,
    config_file: str | Path | None = None,
    prompts: Sequence[str | Path] = (),
    force: bool = False,
) -> Loaded:
    """A model ready to read, with its tokenizer, from a local checkpoint of any format, or a published one by its name
    (`megalith hub list`), which alone is fetched where it is not here yet.

    `device`: auto, cpu, cuda, cuda:N. `precision`: auto, 32, bf16-mixed, 64. `tokenizer`: a tokenizer.json or a folder with one,
    in place of the checkpoint's own. `config_file`: JSON or YAML with what a Megatron file does not say (num-attention-heads).
    `prompts`: what tuning made (artefacts, folders of PEFT, archives of NeMo with soft prompts); `force`: also for another model.
    Errors: `CheckpointError`, `DataError` (the tokenizer), `ConfigError` (device or precision that is not there).
    """
    return load_adapted(
        path,
        prompts,
        force=force,
        device=device,
        precision=precision,
        tokenizer=tokenizer,
        config_file=config_file,
    )


def use_prompts(loaded: Loaded, prompts: Sequence[str | Path], *, force: bool = False) -> Loaded:
    """The same model with these soft prompts in place of those that it had; none: the model alone. Its weights are not read again.

    Errors: `CheckpointError` for damage and for prompts of another model; `ConfigError` for LoRA, which is merged by `load`.
    """
    return use(loaded, prompts, force=force)
