"""`megalith generate`: text from a checkpoint."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def generate(
    checkpoint: Annotated[str, typer.Option(help="run or step folder")],
    prompt: Annotated[str, typer.Option(help="text to continue")],
    tokens_to_generate: Annotated[
        int, typer.Option("--tokens-to-generate", "--out-seq-length", help="at most")
    ] = 64,
    min_tokens_to_generate: Annotated[int, typer.Option(help="no end of document before")] = 0,
    temperature: Annotated[
        float | None, typer.Option(help="below 1 sharper, above 1 flatter; 0 is greedy")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", "--top_k", help="draw from the k most probable tokens")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", "--top_p", help="draw from the smallest set with this probability"),
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="above 1 discourages tokens already there")] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="always the most probable token")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text; may be given again")] = None,
    seed: Annotated[int, typer.Option(help="of the draws")] = 1234,
    recompute: Annotated[bool, typer.Option("--recompute", help="without the key-value cache")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, 32, bf16-mixed, 64")] = "auto",
) -> None:
    """Continue a prompt, streaming. Greedy unless temperature, top-k above 1 or top-p is given.

    Example: megalith generate --checkpoint quickstart/run --prompt "Return a list of" --temperature 0.7
    """
    from megalith.generate.loading import load_model
    from megalith.generate.sampling import Sampling
    from megalith.generate.text import UNFINISHED, stream

    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        tokens_to_generate=tokens_to_generate,
        min_tokens_to_generate=min_tokens_to_generate,
        stop=tuple(stop or ()),
        seed=seed,
        greedy=greedy,
    )
    loaded = load_model(checkpoint, device=device, precision=precision)
    written = 0
    sys.stdout.write(prompt)
    for (state,) in stream(loaded, [prompt], sampling, recompute=recompute):
        text = state.text if state.finished else held_back(state.text, sampling.stop, UNFINISHED)
        sys.stdout.write(text[written:])
        sys.stdout.flush()
        written = max(written, len(text))
    sys.stdout.write("\n")


def held_back(text: str, stop: tuple[str, ...], unfinished: str) -> str:
    """What may be shown now: without half a character at the end, or the beginning of a stop string."""
    text = text.rstrip(unfinished)
    longest = max(map(len, stop), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stop):
            return text[:-size]
    return text
