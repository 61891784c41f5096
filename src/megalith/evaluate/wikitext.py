"""WikiText-103: perplexity over overlapping windows, then per word of the original text, as Megatron-LM publishes it.

    text ─ detokenizer ─ tokenizer ─▶ T tokens ─ windows ─▶ nats over T − 1 targets ─▶ loss ─▶ exp(loss)
      └─ pieces between single spaces ─▶ O             (T − 1) / (O − 1) = token ratio ─▶ exp(loss · ratio)

The token ratio makes tokenizers comparable: the adjusted perplexity is that of a word. Facts: `tasks/zeroshot_gpt`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megalith.errors import DataError
from megalith.evaluate.detokenize import AUTO, choose, detokenize
from megalith.evaluate.held_out import read_text, text_bytes
from megalith.evaluate.windows import Progress, capped_exp, score
from megalith.generate.loading import Loaded

OVERLAP = 32
"""New targets of each later window, where nothing else is asked for."""


@dataclass(frozen=True)
class Request:
    """The file and how it is scored. `overlapping_eval` None: 32, or the window where that is shorter."""

    data: str
    detokenizer: str = AUTO
    seq_length: int | None = None
    overlapping_eval: int | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class Report:
    """Losses in nats a token; `bits_per_byte` of the detokenized text."""

    source: str
    step: int
    detokenizer: str
    original_tokens: int
    tokens: int
    token_ratio: float
    loss: float
    perplexity: float
    adjusted_perplexity: float
    bits_per_byte: float
    seq_length: int
    overlapping_eval: int

    def to_json(self) -> dict[str, Any]:
        return {"task": "wikitext", **asdict(self)}

    @property
    def line(self) -> str:
        """The reference's line, which scripts read."""
        return (
            f" validation results on WIKITEXT103 | avg loss: {self.loss:.4E} | ppl: {self.perplexity:.4E} "
            f"| adjusted ppl: {self.adjusted_perplexity:.4E} | token ratio: {self.token_ratio} |"
        )


def evaluate(loaded: Loaded, request: Request, progress: Progress | None = None) -> Report:
    """Scores a loaded checkpoint on a text file. `progress(done, all)` counts windows.

    Errors: `ConfigError` for a detokenizer or window that cannot be, `DataError` for a file that holds no two words.
    """
    tokenizer, name = loaded.needs_tokenizer(), choose(request.detokenizer, request.data)
    text = read_text(request.data)
    original = len(text.strip().split(" "))
    if original < 2:
        raise DataError("has no two words between single spaces", where=request.data, fix="check the file")
    tokens = np.array(tokenizer.encode(detokenize(text, name)), dtype=np.int64)
    length = request.seq_length or loaded.trained_length
    stride = request.overlapping_eval or min(OVERLAP, length)
    scored = score(
        loaded.model,
        tokens,
        length=length,
        stride=stride,
        batch_size=request.batch_size,
        progress=progress,
        crew=loaded.crew,
    )
    ratio = (len(tokens) - 1) / (original - 1)
    return Report(
        source=request.data,
        step=loaded.step,
        detokenizer=name,
        original_tokens=original,
        tokens=len(tokens),
        token_ratio=ratio,
        loss=scored.loss,
        perplexity=scored.perplexity,
        adjusted_perplexity=capped_exp(scored.loss * ratio),
        bits_per_byte=scored.bits_per_byte(text_bytes(tokens, tokenizer)),
        seq_length=length,
        overlapping_eval=stride,
    )
