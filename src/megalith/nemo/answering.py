"""`model.generate`: the live weights as a model that reads, and NeMo's parameters as our settings.

Knows the engine's tensors and `generate`'s jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from megalith.errors import ConfigError, Problem, UnsupportedError
from megalith.generate.crew import Crew
from megalith.generate.jobs import Options, answer_all
from megalith.generate.loading import Loaded, allocate, own_part, understand_one_of
from megalith.generate.reading import prepare_for_reading
from megalith.generate.sampling import Sampling
from megalith.nemo.restored import Restored
from megalith.tokenizers.bpe import DefinedTokenizer
from megalith.topology.precision import precision as precision_of

LENGTHS = {"max_length": "tokens_to_generate", "min_length": "min_tokens_to_generate"}
CHOICES = {
    "use_greedy": "greedy",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "compute_logprob": "logprobs",
}
"""NeMo's parameters → our settings."""
WITHOUT_EFFECT = {"add_BOS", "all_probs", "end_strings"}
"""Parameters of NeMo's that its defaults hold and ours has no use for."""


def answers(
    restored: Restored,
    inputs: Sequence[str],
    lengths: Mapping[str, Any],
    choices: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, list[Any]]:
    """In the order of the inputs. Errors: `ConfigError` for parameters that are none."""
    sampling, options = _settings(lengths, choices, settings)
    loaded = reading_copy(restored)
    found = list(answer_all(loaded, list(inputs), sampling, options))
    if loaded.family == "bert":
        return {"sentences": [each.text for each in found], "answers": found}
    joined = [
        text + each.text if loaded.family == "gpt" else each.text
        for text, each in zip(inputs, found, strict=True)
    ]
    return {
        "sentences": joined,
        "token_ids": [getattr(each, "tokens", []) for each in found],
        "answers": found,
    }


def _settings(
    lengths: Mapping[str, Any], choices: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[Sampling, Options]:
    given = {ours: lengths[theirs] for theirs, ours in LENGTHS.items() if theirs in lengths}
    given |= {ours: choices[theirs] for theirs, ours in CHOICES.items() if theirs in choices}
    if given.get("greedy"):  # NeMo's defaults set the others beside it
        given = {
            name: value for name, value in given.items() if name not in ("temperature", "top_k", "top_p")
        }
    given |= settings
    known = {each.name for section in (Sampling, Options) for each in fields(section)}
    wrong = [
        *(given.keys() - known),
        *(lengths.keys() - LENGTHS),
        *(choices.keys() - CHOICES - WITHOUT_EFFECT),
    ]
    if wrong:
        raise ConfigError(
            [Problem(name, "is no setting of generate", ", ".join(sorted(known))) for name in wrong]
        )
    of_options = {each.name for each in fields(Options)}
    options = Options(**{name: value for name, value in given.items() if name in of_options})
    return Sampling(**{name: value for name, value in given.items() if name not in of_options}), options


def reading_copy(restored: Restored) -> Loaded:
    """A model of its own with the weights as they are now, cast for reading.

    Errors: `UnsupportedError` where one process does not hold its tensor rank's share of one pipeline stage.
    """
    sizes = restored.topology.sizes
    if sizes.virtual_pipeline > 1 or sizes.zero_stage or sizes.context > 1:
        raise UnsupportedError(
            f"this model is in pieces ({sizes.describe()})",
            where="generate",
            fix="save_to a .nemo, and restore it, or give it to megalith generate, without virtual stages and ZeRO",
        )
    # A token at a time has no sequence to share.
    topology = replace(restored.topology, sizes=replace(sizes, sequence_parallel=False))
    numbers = precision_of(restored.machine.precision.value)
    state = {**restored.saver.extra, "step": restored.engine.step}
    kind, _ = understand_one_of((restored.archive.family,), state, where=str(restored.archive.folder))
    model = own_part(kind, restored.architecture, topology, numbers.parameters)
    allocate(model, topology.device)
    live = restored.engine.tensors()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(live[f"model.{name}"])
    crew = Crew(topology, restored.saver.checkpointer.team)
    tokenizer = restored.tokenizer if isinstance(restored.tokenizer, DefinedTokenizer) else None
    return Loaded(
        prepare_for_reading(model, numbers.compute), tokenizer, restored.archive.folder, state, crew
    )
