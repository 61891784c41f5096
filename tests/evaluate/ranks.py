"""What the processes of a pool measure together."""

from __future__ import annotations

import numpy as np

from megalith.evaluate import lambada, perplexity, wikitext, windows
from megalith.generate.loading import load_model
from megalith.topology.sizes import Sizes
from tests.generate.ranks import ONE, crew_of


def reports(run: str, folder: str, sizes: Sizes = ONE, batch_size: int = 2) -> dict:
    """Every kind of report, in plain values."""
    loaded = load_model(run, precision="64", crew=crew_of(sizes))
    text = f"{folder}/text.txt"
    wiki = wikitext.Request(text, "wiki", seq_length=16, overlapping_eval=5, batch_size=batch_size)
    strict = lambada.Request(f"{folder}/lambada.jsonl", strict=True, batch_size=batch_size)
    whole = perplexity.Request(text_file=text, seq_length=12, batch_size=batch_size)
    return {
        "perplexity": perplexity.evaluate(loaded, whole).to_json(),
        "wikitext": wikitext.evaluate(loaded, wiki).to_json(),
        "lambada": lambada.evaluate(loaded, strict).to_json(),
        "untrained": windows.score(
            perplexity.untrained(loaded), np.arange(40), length=7, batch_size=batch_size, crew=loaded.crew
        ).perplexity,
    }


def progress(run: str, data: int) -> list[tuple[int, int]]:
    """What a process says of its progress over 11 windows in batches of 2."""
    loaded = load_model(run, precision="64", crew=crew_of(Sizes(replicate=data)))
    said: list[tuple[int, int]] = []
    windows.score(
        loaded.model,
        np.arange(1 + 11 * 4),
        length=4,
        batch_size=2,
        progress=lambda done, total: said.append((done, total)),
        crew=loaded.crew,
    )
    return said
