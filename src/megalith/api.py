"""Megalith from Python: a model from any checkpoint in one call.

    loaded = megalith.load("models/Llama-3.2-1B")      a run, a step, a folder of transformers, what Megatron saved
    loaded.model, loaded.tokenizer, loaded.notices

`megalith.load` is this module's, imported when it is first asked for: `import megalith` stays free of torch.
"""

from __future__ import annotations

from pathlib import Path

from megalith.generate.loading import Loaded, load_model

__all__ = ["Loaded", "load"]


def load(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    tokenizer: str | None = None,
    config_file: str | Path | None = None,
) -> Loaded:
    """A model ready to read, with its tokenizer, from a local checkpoint of any format, or a published one by its name
    (`megalith hub list`), which alone is fetched where it is not here yet.

    `device`: auto, cpu, cuda, cuda:N. `precision`: auto, 32, bf16-mixed, 64. `tokenizer`: a tokenizer.json or a folder with one,
    in place of the checkpoint's own. `config_file`: JSON or YAML with what a Megatron file does not say (num-attention-heads).
    Errors: `CheckpointError`, `DataError` (the tokenizer), `ConfigError` (device or precision that is not there).
    """
    return load_model(path, device=device, precision=precision, tokenizer=tokenizer, config_file=config_file)
