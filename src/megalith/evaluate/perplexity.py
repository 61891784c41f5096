"""`megalith evaluate perplexity`: how well a checkpoint predicts held-out text, beside models that anyone can beat.

Knows checkpoints, held-out tokens and how to score them. Prints nothing: the command does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from megalith.errors import DataError
from megalith.evaluate import held_out as texts
from megalith.evaluate import ngram
from megalith.evaluate.windows import Progress, Score, score
from megalith.generate.loading import Loaded, own_part
from megalith.models.family import understand
from megalith.parallel.materialise import materialise


@dataclass(frozen=True)
class Request:
    """What to score. At most one of `data` (token files) and `text_file`; else `split` of the run's own data."""

    split: str = "validation"
    data: str | None = None
    text_file: str | None = None
    seq_length: int | None = None
    overlapping_eval: int | None = None
    batch_size: int = 8
    max_tokens: int | None = None
    baselines: bool = False


@dataclass(frozen=True)
class Report:
    """Mean losses in nats a token, perplexities, and bits a byte where the tokenizer tells the bytes."""

    source: str
    step: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    seq_length: int
    overlapping_eval: int
    untrained_perplexity: float | None = None
    unigram_perplexity: float | None = None
    bigram_perplexity: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def beats_baselines(self) -> bool:
        """Whether the model is below every baseline that was measured."""
        others = (self.untrained_perplexity, self.unigram_perplexity, self.bigram_perplexity)
        return all(self.perplexity < other for other in others if other is not None)


def evaluate(loaded: Loaded, request: Request, progress: Progress | None = None) -> Report:
    """Scores a loaded checkpoint. `progress(done, all)` counts windows of the model's own pass."""
    held = choose(loaded, request)
    tokens = held.tokens[: request.max_tokens] if request.max_tokens else held.tokens
    if len(tokens) < 2:
        fix = "a text needs two tokens: the first is only read"
        raise DataError("holds nothing to score", where=held.name, fix=fix)
    check_vocabulary(tokens, loaded, held.name)
    length = request.seq_length or loaded.trained_length
    stride = request.overlapping_eval or length
    options: dict[str, Any] = {
        "length": length,
        "stride": stride,
        "batch_size": request.batch_size,
        "crew": loaded.crew,
    }
    own = score(loaded.model, tokens, progress=progress, **options)
    others = baselines(loaded, request, tokens, options) if request.baselines else {}
    return Report(
        source=held.name,
        step=loaded.step,
        tokens=own.targets,
        loss=own.loss,
        perplexity=own.perplexity,
        bits_per_byte=bits(own, tokens, loaded),
        seq_length=length,
        overlapping_eval=stride,
        **others,
    )


def choose(loaded: Loaded, request: Request) -> texts.HeldOut:
    """The tokens that a request names."""
    if request.text_file:
        return texts.from_text(request.text_file, loaded.needs_tokenizer())
    if request.data:
        return texts.from_files(request.data)
    return texts.from_plan(loaded.state, request.split, where=str(loaded.folder))


def check_vocabulary(tokens: np.ndarray, loaded: Loaded, where: str) -> None:
    """Errors: `DataError` when an id lies outside the model's vocabulary: another tokenizer made the files."""
    size = loaded.model.config.vocab_size
    if len(tokens) and int(tokens.max()) >= size:
        raise DataError(
            f"holds the token id {int(tokens.max())}, the model knows {size} tokens",
            where=where,
            fix="preprocess the text with the model's own tokenizer",
        )


def bits(own: Score, tokens: np.ndarray, loaded: Loaded) -> float | None:
    if loaded.tokenizer is None:
        return None
    num_bytes = texts.text_bytes(tokens, loaded.tokenizer)
    return own.bits_per_byte(num_bytes) if num_bytes else None


def baselines(
    loaded: Loaded, request: Request, tokens: np.ndarray, options: dict[str, Any]
) -> dict[str, float]:
    """Perplexities of the model before training, and of n-gram models counted on the run's training split."""
    train = texts.from_plan(loaded.state, "train", where=str(loaded.folder)).tokens
    counted = ngram.score(train, tokens, loaded.model.config.vocab_size)
    return {
        "untrained_perplexity": score(untrained(loaded), tokens, **options).perplexity,
        "unigram_perplexity": counted.unigram_perplexity,
        "bigram_perplexity": counted.bigram_perplexity,
    }


def untrained(loaded: Loaded) -> Any:
    """The same model with the initial weights of its run's seed."""
    model_class, config = understand(loaded.state, where=str(loaded.folder))
    topology, seed = loaded.crew.topology, int(loaded.state.get("seed", 1234))
    model = own_part(model_class, config, topology, torch.float32)
    materialise(model, model.init_rules(), seed, device=next(loaded.model.parameters()).device)
    model.set_compute_dtype(getattr(loaded.model, "compute_dtype", None))
    return model.to(torch.float64) if next(loaded.model.parameters()).dtype == torch.float64 else model
