"""From the spaced-out text of old benchmarks back to text as people write it: what was tokenised there, a model never saw.

Rules in the order of Megatron-LM's `tasks/zeroshot_gpt/detokenizer.py`, quirks included: published perplexities were made
with them, and another rule is another text with another number. Kept in `wiki`:

  * ` 's` and `s '` are joined wherever they stand, ` N ` becomes ` 1 ` (Penn Treebank's number sign, in a text without it);
  * spaces are trimmed inside quotes that are paired in order over the whole file, across lines: one odd quote mark or
    apostrophe, and from there on the spaces *between* quotations are trimmed;
  * a pattern with slashes in it, meant for `' 90` → `'90`, that fits no real text.

Kept in `ptb`: ` N ` becomes `1 `, gluing the number to the word before it; `ptb-fixed` is the same but for that space.

Knows strings only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from megalith.errors import ConfigError, Problem

Rule = Callable[[str], str]


def literal(old: str, new: str) -> Rule:
    """Every `old` becomes `new`."""
    return lambda text: text.replace(old, new)


def pattern(old: str, new: str) -> Rule:
    """Every match becomes `new`, as it stands."""
    return partial(re.compile(old).sub, lambda match: new)


def trim_inside(pair: str) -> Rule:
    """No space behind an opening mark and before the next closing one."""
    opening, closing = map(re.escape, pair)
    found = re.compile(rf"{opening}\s*([^{closing}]*?)\s*{closing}")
    return partial(found.sub, lambda match: pair[0] + match[1] + pair[1])


LINE_ENDS = (literal(" \n", "\n"), literal("\n ", "\n"))
WIKI: Sequence[Rule] = (
    literal("s '", "s'"),
    pattern("/' [0-9]/", "/'[0-9]/"),
    literal(" @-@ ", "-"),
    literal(" @,@ ", ","),
    literal(" @.@ ", "."),
    *(literal(f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    *(trim_inside(pair) for pair in ("()", "[]", "{}", '""', "''")),
    literal("= = = =", "===="),
    literal("= = =", "==="),
    literal("= =", "=="),
    literal(" ° ", "°"),
    *LINE_ENDS,
    literal(" N ", " 1 "),
    literal(" 's", "'s"),
)


def ptb(number: str) -> Sequence[Rule]:
    """Penn Treebank's rules; `number` is what its number sign, between spaces, becomes."""
    return (
        literal(" '", "'"),
        *LINE_ENDS,
        literal(" n't", "n't"),
        literal(" N ", number),
        literal("$ 1", "$1"),
        literal("# 1", "#1"),
    )


DETOKENIZERS: Mapping[str, Sequence[Rule]] = {
    "wiki": WIKI,
    "ptb": ptb("1 "),
    "ptb-fixed": ptb(" 1 "),
    "lambada": (),
    "none": (),
}
AUTO = "auto"
PATH_WORDS = ("ptb", "wiki", "lambada")
"""What `auto` looks for in a path, in this order."""


def detokenize(text: str, name: str) -> str:
    """The text after the rules of a detokenizer, one after the other."""
    for rule in DETOKENIZERS[name]:
        text = rule(text)
    return text


def choose(name: str, path: str) -> str:
    """The detokenizer of that name; `auto`: the first of ptb, wiki, lambada that the path contains, as the reference does.

    Errors: `ConfigError` for an unknown name, or a path that contains none of the three.
    """
    if name in DETOKENIZERS:
        return name
    names = ", ".join((AUTO, *DETOKENIZERS))
    if name != AUTO:
        raise ConfigError([Problem("--detokenizer", f"{name!r} is not one", f"one of {names}")])
    found = next((word for word in PATH_WORDS if word in path), None)
    if found is None:
        problem = f"auto goes by the path, and {path} contains none of {', '.join(PATH_WORDS)}"
        fix = "say which: --detokenizer wiki (or ptb); none for a text that is written normally"
        raise ConfigError([Problem("--detokenizer", problem, fix)])
    return found
