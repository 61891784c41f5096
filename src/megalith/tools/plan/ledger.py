"""Every tensor's memory from birth to death, and what was alive when the sum was largest.

    storages ─ born, resized, dead ─▶ a running sum ─▶ its largest value in each phase, by part

A storage's part is known at birth (weights), later (a gradient, when autograd puts it into `.grad`; an activation, when the
forward has ended and it is still there), or never: then it is working memory. Knows storages. Knows no model.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WORKING, EXCHANGE, P2P, BATCH = "working memory", "exchange buffers", "sends under way", "batch"


@dataclass(eq=False)
class Piece:
    """One storage: its size now, and what it is for. `context`: what was going on at its birth."""

    size: int
    context: str
    part: str | None = None

    @property
    def belongs_to(self) -> str:
        """The part that it is counted in."""
        return self.part or self.context


class Ledger(TorchDispatchMode):
    """Counts while it is entered. A scalar that is read is 1, which is also what peers vote that agree."""

    def __init__(self) -> None:
        super().__init__()
        self.context, self.phase = WORKING, ""
        self.now = 0
        self._highest: dict[str, int] = {}
        self._at_peak: dict[str, list[tuple[Piece, int]]] = {}
        self._pieces: dict[int, Piece] = {}
        self._watchers: dict[int, weakref.ref[Any]] = {}
        self._rising = False
        self.sent: list[torch.Tensor] | None = None
        """What waits for the end of its sending, where that is not at once. A list here keeps it alive, too."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # fmt: skip
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        found = func(*args, **(kwargs or {}))
        for tensor in plain_tensors(found):
            self.piece(tensor)
        if self.sent is not None and func is torch.ops.c10d.send.default:
            self._keep_sent(args[0])
        if func.namespace == "fsdp":
            self._exchange(args, kwargs or {})
        return found

    def __enter__(self) -> Ledger:
        self._patch = resizes_told_to(self._resized)
        self._patch.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.__exit__(*error)

    # -- births, resizes, deaths ---------------------------------------------------------------------------------

    def piece(self, tensor: torch.Tensor) -> Piece | None:
        """The piece that a tensor lies in; new ones are counted from here on. None for a tensor without memory."""
        if tensor.device.type == "meta":
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        found = self._pieces.get(key)
        if found is None:
            found = self._pieces[key] = Piece(storage.nbytes(), self.context)
            self._watchers[key] = weakref.ref(storage, lambda _: self._dead(key))
            self._grow(found.size)
        return found

    def assign(self, part: str, *tensors: torch.Tensor) -> None:
        """Say what tensors are for."""
        for tensor in plain_tensors(tensors):
            if (found := self.piece(tensor)) is not None:
                found.part = part

    def assign_rest(self, part: str) -> None:
        """What nobody has spoken for is for this."""
        for found in self._pieces.values():
            if found.part is None and found.context == WORKING:
                found.part = part

    def _keep_sent(self, tensors: Sequence[torch.Tensor]) -> None:
        assert self.sent is not None
        self.sent += tensors
        self.assign(P2P, *tensors)

    def _exchange(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """FSDP2 packs what it sends and unpacks what it gets by operations of its own."""
        for tensor in plain_tensors((args, kwargs)):
            found = self.piece(tensor)
            if found is not None and found.part is None:
                found.part = EXCHANGE

    def enter_phase(self, phase: str) -> None:
        """From here on another peak is looked for."""
        self._look()
        self.phase = phase
        self._grow(0)

    def _grow(self, size: int) -> None:
        self.now += size
        if self.now > self._highest.get(self.phase, -1):
            self._highest[self.phase], self._rising = self.now, True

    def _shrink(self, size: int) -> None:
        self._look()
        self.now -= size

    def _look(self) -> None:
        """At the last moment at which all of a peak is there."""
        if self._rising:
            self._at_peak[self.phase] = [(piece, piece.size) for piece in self._pieces.values()]
            self._rising = False

    def _dead(self, key: int) -> None:
        self._shrink(self._pieces[key].size)
        del self._pieces[key], self._watchers[key]

    def _resized(self, storage: torch.UntypedStorage, size: int) -> None:
        found = self._pieces.get(storage._cdata)
        if found is None or found.size == size:
            return
        more = size - found.size
        if more < 0:
            self._shrink(-more)
        found.size = size
        if more > 0:
            self._grow(more)

    def alive(self, part: str) -> int:
        """Bytes of a part now."""
        return sum(piece.size for piece in self._pieces.values() if piece.belongs_to == part)

    # -- what was found ------------------------------------------------------------------------------------------

    def peaks(self) -> dict[str, Counter[str]]:
        """Bytes by part at the moment of each phase's peak."""
        self._look()
        found: dict[str, Counter[str]] = {}
        for phase, pieces in self._at_peak.items():
            found[phase] = Counter()
            for piece, size in pieces:
                found[phase][piece.belongs_to] += size
        return found


def plain_tensors(found: Any) -> Iterator[torch.Tensor]:
    """The tensors in an operation's arguments or results; of a DTensor its local part."""
    if isinstance(found, torch.Tensor):
        yield local_tensor(found)
    elif isinstance(found, list | tuple):
        for item in found:
            yield from plain_tensors(item)
    elif isinstance(found, dict):
        yield from plain_tensors(list(found.values()))


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Of a DTensor what this rank holds. Its `to_local` would be one operation more, and a differentiable one."""
    return getattr(tensor, "_local_tensor", tensor)


@contextmanager
def resizes_told_to(listener: Any) -> Iterator[None]:
    """FSDP2 frees and takes memory by resizing storages, which is no operation that a mode would see."""
    original = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        listener(storage, size)
        return original(storage, size)

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]
