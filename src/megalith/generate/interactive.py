"""A conversation at the terminal: a prompt, its continuation as it is made, the next prompt.

Knows prompts, pieces of text and how a person stops one or leaves. Where they come from and go to is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable

from megalith.errors import MegalithError
from megalith.generate.jobs import Options
from megalith.generate.loading import Loaded
from megalith.generate.sampling import Sampling
from megalith.generate.text import Completion, stream

Ask = Callable[[], str]
"""The next prompt. Raises EOFError (Ctrl-D) or KeyboardInterrupt (Ctrl-C) to leave."""


def converse(
    loaded: Loaded,
    sampling: Sampling,
    options: Options,
    *,
    ask: Ask,
    write: Callable[[str], None],
    complain: Callable[[MegalithError], None],
    done: Callable[[Completion], None] = lambda row: None,
) -> int:
    """Continues prompts until there is none; returns how many. Each is written again before its continuation, so that the
    text stands whole; an empty one is asked again.

    Ctrl-C ends a continuation, not the conversation. Prompt i draws as row i, so a prompt given twice has two answers where
    tokens are drawn. A prompt that cannot be continued is complained about; `done` gets every whole continuation.
    """
    number = 0
    while True:
        try:
            prompt = ask()
        except (EOFError, KeyboardInterrupt):
            return number
        if not prompt:
            continue
        head = prompt
        try:
            for piece in stream(loaded, prompt, sampling, number=number, recompute=options.recompute):
                if isinstance(piece, Completion):
                    write(head + "\n")
                    done(piece)
                else:
                    write(head + piece)
                head = ""
        except KeyboardInterrupt:
            write("\n")
        except MegalithError as error:
            complain(error)
        number += 1
