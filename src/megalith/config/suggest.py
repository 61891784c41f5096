"""The nearest key to a misspelt one: by its full dotted path, or by its last name anywhere in the tree.

Knows the schema's names. Pure text; no configuration is read.
"""

from __future__ import annotations

from difflib import SequenceMatcher, get_close_matches

from megalith.config.schema import Section
from megalith.config.tree import Path, dotted, fields_of, sections_of


def known_keys(root: type[Section]) -> list[Path]:
    """Every key of the tree, sections included, ours first and then those of other toolkits that are accepted."""
    own = [path for path, _ in fields_of(root)]
    foreign = [
        (*p, name)
        for p, s in sections_of(root)
        for name, k in s.foreign_keys.items()
        if k.action != "refused"
    ]
    return [*own, *foreign]


def suggest(root: type[Section], path: Path, *, limit: int = 3) -> list[str]:
    """Dotted keys that may have been meant, the likeliest first; empty when nothing is near."""
    own = [key for key, _ in fields_of(root)]
    same_leaf = [dotted(key) for key in own if _simple(key[-1]) == _simple(path[-1])]
    if same_leaf:
        return same_leaf[:limit]
    siblings = {key[-1]: key for key in known_keys(root) if key[:-1] == path[:-1]}
    near = get_close_matches(path[-1], siblings, n=1, cutoff=0.7)
    if near:
        return [dotted(siblings[near[0]])]
    by_path = {dotted(key): key for key in own}
    whole = get_close_matches(dotted(path), by_path, n=1, cutoff=0.84)
    if whole:
        return whole
    by_leaf: dict[str, str] = {}
    for key in own:
        by_leaf.setdefault(key[-1], dotted(key))
    close = get_close_matches(path[-1], by_leaf, n=limit, cutoff=0.78)
    return [by_leaf[name] for name in close]


def search(root: type[Section], text: str, *, limit: int = 20) -> list[str]:
    """Keys whose path or meaning contains a text, those with it in the name first."""
    text = text.lower()
    in_name, in_meaning = [], []
    for path, info in fields_of(root):
        if text in dotted(path).lower():
            in_name.append(dotted(path))
        elif text in (info.description or "").lower():
            in_meaning.append(dotted(path))
    in_name.sort(key=lambda key: -SequenceMatcher(None, text, key.rsplit(".", 1)[-1]).ratio())
    return [*in_name, *in_meaning][:limit]


def _simple(name: str) -> str:
    return name.lower().replace("-", "_")
