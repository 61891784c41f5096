"""What one checkpoint of a run holds, and how it gets back into the engine.

    engine.tensors ─┐
    engine.state    ├─▶ Checkpointer ─▶ step_0001000/
    data plan, loop ┘

Knows the engine and the native format. Knows no Lightning: `engine.fit` and Lightning's Trainer save through this alike, so
their files differ in the section `loop` at most.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megalith.checkpoint.convert.continued import open_continued
from megalith.checkpoint.foreign import fill
from megalith.checkpoint.foreign import load as load_foreign
from megalith.checkpoint.formats.foreign import Foreign
from megalith.checkpoint.native import Checkpointer, load, read_tensors
from megalith.engine.engine import Engine
from megalith.models.config import ModelConfig
from megalith.training.starting import weights_of_others


class Saver:
    """Saves and loads one engine. `extra` are further sections of `state.json` that do not change (the data plan)."""

    def __init__(
        self,
        engine: Engine,
        checkpointer: Checkpointer,
        *,
        config_yaml: str,
        tokenizer: Path | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine, self.checkpointer = engine, checkpointer
        self.config_yaml, self.tokenizer, self.extra = config_yaml, tokenizer, dict(extra or {})
        self.verified: Path | None = None
        """A step folder whose hashes were just checked; `load` does not check them twice."""

    @property
    def root(self) -> Path:
        """The checkpoints folder."""
        return self.checkpointer.root

    def save(self, metrics: Mapping[str, float] | None = None, loop: Mapping[str, Any] | None = None) -> Path:
        """Save the engine as it is now. → the step folder. `metrics` rank and name it; `loop` is the loop's own JSON."""
        engine = self.engine
        values = {"consumed_samples": engine.consumed_samples, "consumed_tokens": engine.consumed_tokens}
        return self.checkpointer.save(
            engine.step,
            engine.tensors(),
            {**engine.state_dict(), **self.extra, "loop": dict(loop or {})},
            config_yaml=self.config_yaml,
            tokenizer=self.tokenizer,
            metrics={**values, **(metrics or {})},
        )

    def load(self, folder: Path) -> dict[str, Any]:
        """Put a step folder, or a checkpoint of a run of NeMo's, into the engine. → its whole state.

        Every process calls it alike; it may have been saved on any layout. Errors: `CheckpointError`, with nothing changed.
        """
        architecture = self.engine.stages[0].config
        theirs = weights_of_others(folder, architecture)
        if theirs is None:
            state = self._fill(folder, self.engine.tensors())
        else:
            state = self._continue(_padded_as(architecture, theirs))
        self.engine.load_state_dict(state)
        return state

    def _continue(self, theirs: Foreign) -> dict[str, Any]:
        """What another program's run goes on with, optimizer included."""
        self.wait()
        team, sources, state = self.checkpointer.team, dict[str, Any](), dict[str, Any]()

        def prepare() -> None:
            found = open_continued(theirs)
            sources.update(found.tensors())
            state.update(found.state)

        team.together(prepare)
        fill(sources, self.engine.tensors(), where=str(theirs.path), team=team)
        return state

    def load_weights(self, folder: Path, *, strict: bool = True, but: Sequence[str] = ()) -> list[str]:
        """Put the model's weights alone into the engine, whoever saved them; counters and optimizer stay fresh.

        `but`: patterns of names of parameters that the folder's model lacks (`adapt.Method.brings`), left alone. Not `strict`:
        tensors that only one side has are left alone. → those.
        """
        weights = {
            name: tensor
            for name, tensor in self.engine.weights().items()
            if not any(re.search(pattern, name.removeprefix("model.")) for pattern in but)
        }
        architecture = self.engine.stages[0].config
        theirs, team = weights_of_others(folder, architecture), self.checkpointer.team
        if theirs is not None:
            return load_foreign(_padded_as(architecture, theirs), weights, team=team, strict=strict)
        if strict:
            self._fill(folder, weights)
            return []
        self.wait()
        sources = {lazy.name: lazy for lazy in read_tensors(folder)}
        return fill(sources, weights, where=str(folder), team=team, strict=False)

    def _fill(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        self.wait()  # what saves meanwhile talks over the same group
        return load(folder, tensors, verified=folder == self.verified, team=self.checkpointer.team)

    def wait(self) -> None:
        """Return when nothing is being written; raise what went wrong there."""
        self.checkpointer.wait()


def _padded_as(architecture: ModelConfig, theirs: Foreign) -> Foreign:
    """The same model, its table of tokens padded as that of another, to which its tensors are then held one by one."""
    padding = ("vocab_size", "make_vocab_size_divisible_by")
    return theirs.as_model(
        theirs.config.model_copy(update={name: getattr(architecture, name) for name in padding})
    )
