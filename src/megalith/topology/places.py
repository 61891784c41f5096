"""Where a process is, in a person's words: the operation it waits in and the module that asked for it.

    stack of frames, outermost first ─▶ Place("all_reduce", "blocks.5.mlp.down")

Reads frames of torch's own libraries by the names of their functions, and changes none of them. Where a name is not found
the message is less exact, never wrong.
"""

from __future__ import annotations

import linecache
import re
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

COMMUNICATION = ("torch.distributed.", "megalith.topology.collectives")
GATHER = "the all_gather of weights (FSDP2)"
REDUCE = "the reduce_scatter of gradients (FSDP2)"
MEANINGS = {
    "foreach_all_gather": GATHER,
    "foreach_all_gather_copy_out": GATHER,
    "unshard": GATHER,
    "wait_for_unshard": GATHER,
    "foreach_reduce": REDUCE,
    "post_backward": REDUCE,
    "finalize_backward": REDUCE,
}
"""Functions of FSDP2 that communicate."""
PIPELINE = {
    "fwd_recv": "the receive of activations",
    "bwd_recv": "the receive of gradients",
    "fwd_send": "the send of activations",
    "bwd_send": "the send of gradients",
}
"""What pipelining's schedules call their messages; where one line waits for two, a receive is what takes long."""
WRAPPERS = ("wrapper", "inner", "_fn", "fsdp_hook_wrapper", "apply")


@dataclass(frozen=True)
class Place:
    """`operation`: what communicates, "" when nothing does; `module`: who asked, a module's name or a function's."""

    operation: str
    module: str

    def __str__(self) -> str:
        return f"{self.operation} in {self.module}" if self.operation else self.module


def module_names(stages: Sequence[nn.Module]) -> dict[int, str]:
    """`id` of each module → its name. A stage itself is called after its blocks."""
    names: dict[int, str] = {}
    for stage in stages:
        blocks = list(getattr(stage, "blocks", {}))
        whole = f"the stage of blocks {blocks[0]} to {blocks[-1]}" if blocks else "a stage without blocks"
        for name, module in stage.named_modules():
            names.setdefault(id(module), name or whole)
    return names


def of_error(error: BaseException, names: Mapping[int, str]) -> Place:
    """Where an exception was raised. Pipelining wraps what comes out of a stage: its cause lies further in."""
    stacks = [traceback.walk_tb(each.__traceback__) for each in causes(error)]
    return place([frame for stack in stacks for frame, _ in stack], names)


def causes(error: BaseException) -> list[BaseException]:
    """The error, what it was raised from, and so on inward."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found:
        found.append(cause)
    return found


def of_process(names: Mapping[int, str], own: Sequence[int]) -> Place:
    """Where the process is now: a thread that communicates (but `own`), else the main thread."""
    stacks = dict(sys._current_frames())
    main = stacks.pop(threading.main_thread().ident or 0)
    others = [frame for thread, frame in stacks.items() if thread not in own]
    found = [place([f for f, _ in traceback.walk_stack(frame)][::-1], names) for frame in (main, *others)]
    return next((each for each in found if each.operation), found[0])


def place(frames: Sequence[FrameType], names: Mapping[int, str]) -> Place:
    """The innermost operation of a stack, and the innermost module around it."""
    last = len(frames) - 1
    while last >= 0 and not (_module_of(frames[last]).startswith(COMMUNICATION) or _compiled(frames[last])):
        last -= 1
    if last < 0:
        who = _who(frames, names)
        return Place("", _code(frames[-1]) + (f" in {who}" if who else "") if frames else "nowhere")
    who = _who(frames[: last + 1], names) or _code(frames[last])
    if compiled := _compiled(frames[last]):
        return Place(compiled, who)
    first = last
    while first > 0 and _communicates(frames[first - 1]):
        first -= 1
    return Place(_operation(frames[first : last + 1]), who)


def _communicates(frame: FrameType) -> bool:
    return _module_of(frame).startswith((*COMMUNICATION, "torch._dynamo", "torch._ops", "contextlib"))


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _compiled(frame: FrameType) -> str:
    """The collective that a compiled graph waits for: the last that its generated code began; "" for other code."""
    if frame.f_code.co_name != "call" or "inductor" not in frame.f_code.co_filename:
        return ""
    lines = linecache.getlines(frame.f_code.co_filename)[: frame.f_lineno]
    if not lines or "_c10d_functional" not in lines[-1]:
        return ""
    begun = [name for line in lines for name in re.findall(r"_c10d_functional\.(\w+?)_?\.default", line)]
    return next((name for name in reversed(begun) if name != "wait_tensor"), "a collective")


def _operation(run: Sequence[FrameType]) -> str:
    """What a run of frames inside libraries that communicate does."""
    for frame in reversed(run):
        name = frame.f_code.co_name
        if name in MEANINGS:
            return MEANINGS[name]
        if name in ("_wait_batch_p2p", "_batch_p2p"):
            return _pipeline(frame)
    ours = [f.f_code.co_name for f in run if _module_of(f) == COMMUNICATION[1] and f.f_code.co_name[0] != "_"]
    plain = [f.f_code.co_name for f in reversed(run) if f.f_code.co_name not in WRAPPERS]
    named = [name for name in ours if name not in ("forward", "backward")] or plain
    return named[-1 if ours else 0]


def _pipeline(frame: FrameType) -> str:
    """Which message: the schedule's line that waits says it."""
    caller = frame.f_back
    line = linecache.getline(caller.f_code.co_filename, caller.f_lineno) if caller else ""
    found = re.findall(r"(?:fwd|bwd)_(?:recv|send)", line)
    if found:
        return PIPELINE[min(found, key=list(PIPELINE).index)]
    return "a send to another stage" if "send" in line else "a send or receive between stages"


def _who(frames: Sequence[FrameType], names: Mapping[int, str]) -> str:
    """The innermost module; else the autograd function; else our own function."""
    modules = (names.get(id(module)) for frame in reversed(frames) for module in _modules(frame.f_locals))
    module = next(filter(None, modules), "")
    function = next((_name(frame) for frame in reversed(frames) if _is_backward(frame)), "")
    if function:
        return f"the backward pass of {module}" if module else f"the backward pass ({function})"
    own = (_name(frame) for frame in reversed(frames) if _is_ours(frame))
    return module or next(own, "")


def _is_backward(frame: FrameType) -> bool:
    """Of an autograd function, or a hook of FSDP2 around a backward."""
    name = frame.f_code.co_name
    return (name == "backward" and "ctx" in frame.f_locals) or name in ("pre_backward", "post_backward")


def _is_ours(frame: FrameType) -> bool:
    module = _module_of(frame)
    return module.startswith("megalith.") and not module.startswith("megalith.topology.")


def _name(frame: FrameType) -> str:
    """ "Engine.optimizer_step"; of an autograd function its own name."""
    name = str(frame.f_code.co_qualname)
    return name.split(".")[-2] if name.endswith(".backward") else name


def _modules(found: Mapping[str, Any]) -> list[Any]:
    """The modules that a frame works for: itself, those of an FSDP2 group, a pipeline's stage."""
    owner = found.get("self")
    if isinstance(owner, nn.Module):
        return [owner]
    values = (owner, found.get("stage"))
    theirs = [each for each in values if type(each).__module__.startswith("torch.distributed.")]
    modules: list[Any] = []
    for each in theirs:  # of strangers nothing is asked: some answer to every name
        group = getattr(each, "modules", None)
        stage = getattr(each, "_stage", each)
        modules += group if isinstance(group, tuple) else [getattr(stage, "submod", None)]
    return modules


def _code(frame: FrameType) -> str:
    """ "wait (threading.py:327)" """
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
