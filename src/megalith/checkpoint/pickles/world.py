"""What the names of a checkpoint's pickle mean: tensors that stay in the file, plain values, and stubs of everything else.

Knows the tables of names and what is made for each. Knows storages only as what `Storages` gives for a reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megalith.checkpoint.pickles import plain, tensors
from megalith.checkpoint.pickles.names import DTYPES, STORAGES, UNREADABLE, Verdict, modern, verdict
from megalith.checkpoint.pickles.source import PickleError, Refused, Unreadable, shown
from megalith.checkpoint.pickles.stub import Name, Stub
from megalith.checkpoint.pickles.tensors import Storage, StridedTensor
from megalith.checkpoint.tensor_files import LazyTensor

MAX_DEPTH = 200
"""Containers in containers."""
MAX_VALUES = 50_000_000
"""Values of the content as one meets them, what is shared counted each time: a few bytes can stand for billions."""

_MAKERS = {**plain.MAKERS, **tensors.MAKERS}


@dataclass(frozen=True)
class Reference:
    """What a pickle says of a storage: its `key`, dtype, number of elements, and which of them (`view`: first, how many)."""

    key: str
    dtype: torch.dtype
    numel: int
    view: tuple[int, int] | None
    typed: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the whole storage."""
        return self.numel * self.dtype.itemsize


class Reading:
    """The world of a checkpoint: `storage` says where in the file a storage lies."""

    def __init__(self, storage: Callable[[Reference], Storage]) -> None:
        self._storage = storage
        self._seen: dict[str, Reference] = {}
        self.names: set[str] = set()

    def find(self, module: str, name: str) -> Any:
        """A dtype, or the name itself. Raises `Refused` for one that would run code."""
        self.names.add(f"{module}.{name}")
        if verdict(module, name) is Verdict.RUNS:
            raise Refused(f"{module}.{name}")
        module = modern(module)
        if (module, name) in UNREADABLE:
            raise Unreadable(f"it holds {UNREADABLE[module, name]}; dense tensors of plain numbers are read")
        return DTYPES[name] if module == "torch" and name in DTYPES else Name(module, name)

    def call(self, made_by: Any, args: tuple[Any, ...]) -> Any:
        """A tensor, a plain value or a stub."""
        if not isinstance(made_by, Name):
            raise PickleError(f"it calls {shown(made_by)}, which is no class")
        key = made_by.module, made_by.name
        if key in _MAKERS:
            return _MAKERS[key](args)
        if verdict(*key) is Verdict.INERT:
            return inert(made_by, args)
        raise Unreadable(f"it makes a {made_by}, which is not read here")

    def build(self, made: Any, state: Any) -> Any:
        """Keeps the state of a stub, fills a numpy array, and leaves attributes of dicts and parameters away."""
        if isinstance(made, Stub):
            made.state = _downward(state) if made.module.startswith("omegaconf.") else state
            return plain.array(state) if (made.module, made.name) == ("numpy", "ndarray") else made
        if isinstance(made, (dict, LazyTensor, StridedTensor)):
            return made
        raise PickleError(f"it gives a state to {shown(made)}")

    def extend(self, made: Any, items: list[Any], *, pairs: bool) -> None:
        """Adds to what a stub holds."""
        if not isinstance(made, Stub):
            raise PickleError(f"it adds items to {shown(made)}")
        (made.pairs if pairs else made.entries).extend(items)

    def outside(self, reference: Any) -> Any:
        """The storage (or, in the oldest files, the class of a module) that a reference names."""
        if isinstance(reference, tuple) and len(reference) == 4 and reference[0] == "module":
            return reference[1]
        found = refer(reference)
        known = self._seen.setdefault(found.key, found)
        if (known.dtype, known.numel, known.typed) != (found.dtype, found.numel, found.typed):
            raise PickleError(
                f"storage {shown(found.key)} is {known.numel} {known.dtype}, and {found.numel} {found.dtype}"
            )
        return self._storage(found)


def _downward(state: Any) -> Any:
    """What a node of OmegaConf holds, without the node above that holds it."""
    if not isinstance(state, dict):
        return state
    return {name: value for name, value in state.items() if name in ("_content", "_val")}


def inert(made_by: Name, args: tuple[Any, ...]) -> Stub:
    """The stub of a call of a class that is not loaded. Raises `Refused` where the call would reach something else."""
    module, name = made_by.module, made_by.name
    if (module, name) == ("builtins", "getattr"):  # an enum's member, in Python 3.11's pickles
        owner, member = (*args, None, None)[:2]
        if len(args) != 2 or not isinstance(owner, Name) or not isinstance(member, str) or "_" in member[:1]:
            raise Refused("builtins.getattr")
        if verdict(owner.module, owner.name) is not Verdict.INERT or owner.name == "getattr":
            raise Refused("builtins.getattr", f" on {owner}")
        return Stub(owner.module, owner.name, (member,))
    if name == "_reconstructor":  # what protocols 0 and 1 make objects with
        owner = args[0] if args else None
        if not isinstance(owner, Name) or verdict(owner.module, owner.name) is not Verdict.INERT:
            raise Refused("copyreg._reconstructor", f" on {shown(str(owner))}")
        return Stub(owner.module, owner.name)
    return Stub(module, name, args)


def refer(reference: Any) -> Reference:
    """A storage reference, checked. Raises `PickleError`."""
    if not isinstance(reference, tuple) or len(reference) not in (5, 6) or reference[0] != "storage":
        raise PickleError(f"it refers to {shown(reference)}, which is no storage")
    _, kind, key, _, numel = reference[:5]
    view = reference[5] if len(reference) == 6 else None
    if not isinstance(kind, Name) or kind.name not in STORAGES or not kind.module.startswith("torch"):
        raise PickleError(f"a storage of {shown(kind)}")
    if type(numel) is not int or not 0 <= numel <= tensors.MAX_ELEMENTS or not isinstance(key, str):
        raise PickleError(f"a storage {shown(key)} of {shown(numel)} elements")
    return Reference(key, STORAGES[kind.name], numel, _view(view, numel), "Untyped" not in kind.name)


def _view(view: Any, numel: int) -> tuple[int, int] | None:
    if view is None:
        return None
    _, first, size = view
    if type(first) is not int or type(size) is not int or not 0 <= first <= first + size <= numel:
        raise PickleError(f"a view {shown(first)}, {shown(size)} of a storage of {numel} elements")
    return first, size


def measure(content: Any) -> None:
    """Refuses content that is nested too deeply, that holds itself, or that is far more than its bytes.

    Without recursion, each container once: `sizes` has (values, depth) of those that are finished.
    """
    sizes: dict[int, tuple[int, int]] = {}
    begun: set[int] = set()
    stack = [(content, False)]
    while stack:
        value, finished = stack.pop()
        if id(value) in sizes:
            continue
        values = _inside(value)
        inner = [each for each in values if isinstance(each, _CONTAINERS)]
        if finished:
            parts = [sizes[id(each)] for each in inner]
            total = 1 + len(values) + sum(part[0] for part in parts)
            depth = 1 + max((part[1] for part in parts), default=0)
            if depth > MAX_DEPTH or total > MAX_VALUES:
                raise PickleError(
                    f"it stands for {total} values, {depth} deep; {MAX_VALUES}, {MAX_DEPTH} deep, are read"
                )
            sizes[id(value)] = total, depth
        elif id(value) in begun:
            raise PickleError("it holds something that holds itself")
        else:
            begun.add(id(value))
            stack.append((value, True))
            stack.extend((each, False) for each in inner)


_CONTAINERS = (dict, list, tuple, set, frozenset, Stub)


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, Stub):
        return value.children()
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else []
