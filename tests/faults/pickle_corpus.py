"""Files to break: small ones of every kind that is read, and programs that would run something.

kinds(folder) ─▶ torch zip, legacy, plain pickle, distributed folder, tar
HOSTILE ─▶ (name, pickle, what the refusal must name); what each would do is to create the file CANARY
"""

from __future__ import annotations

import argparse
import builtins
import io
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

CANARY = "canary-of-a-hostile-pickle"


def content() -> dict[str, Any]:
    """A checkpoint with everything that one holds, small."""
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    return {
        "model": OrderedDict(weight=base, bias=base[1], turned=base.t(), half=torch.ones(3).bfloat16()),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "args": argparse.Namespace(num_layers=2, dtype=torch.float16, names=("a", "b")),
        "random": (random.Random(1).getstate()[1][:9], np.arange(5, dtype=np.uint32), b"\x00\xff"),
        "iteration": 12000, "checkpoint_version": 3.0, "nothing": None, "flags": [True, False],
    }  # fmt: skip


def kinds(folder: Path) -> dict[str, Path]:
    """One file (or folder) of each kind."""
    found = {name: folder / name for name in ("new.pt", "old.pt", "plain.pkl", "tarred.nemo", "sharded")}
    torch.save(content(), found["new.pt"])
    torch.save(content(), found["old.pt"], _use_new_zipfile_serialization=False)
    found["plain.pkl"].write_bytes(pickle.dumps({**content(), "model": 1, "optimizer": 2}, protocol=4))
    with tarfile.open(found["tarred.nemo"], "w") as archive:
        archive.add(found["new.pt"], "./model_weights.ckpt")
    tensors = {"a": torch.arange(6.0).view(2, 3), "n": {"b": torch.ones(3, dtype=torch.int64), "step": 3}}
    dcp.save(tensors, checkpoint_id=found["sharded"], no_dist=True)
    return found


def zipped(program: bytes, *, compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    """A torch file around a pickle, its checksums right; `members` are further files under archive/."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, inner in {"data.pkl": program, "byteorder": b"little", **members}.items():
            archive.writestr(f"archive/{name.replace('__', '/')}", inner)
    return buffer.getvalue()


def program_of(path: Path) -> tuple[bytes, dict[str, bytes]]:
    """The pickle of a torch zip file, and its storages."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
        root = archive.namelist()[0].split("/")[0]
        storages = {f"data__{name.rsplit('/', 1)[1]}": archive.read(name) for name in names}
        return archive.read(f"{root}/data.pkl"), storages


class _Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any, state: Any = None) -> None:
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.call


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _global(module: str, name: str, *, stack: bool = False) -> bytes:
    return _text(module) + _text(name) + b"\x93" if stack else f"c{module}\n{name}\n".encode()


def _calls(module: str, name: str, *args: str, stack: bool = False) -> bytes:
    return b"\x80\x04" + _global(module, name, stack=stack) + b"(" + b"".join(map(_text, args)) + b"tR."


TOUCH = f"touch {CANARY}"
PYTHON = f"open({CANARY!r}, 'w').close()"
_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"

HOSTILE: list[tuple[str, bytes, str]] = [
    ("reduce", pickle.dumps(_Call(os.system, TOUCH)), "posix.system"),
    ("protocol 0", pickle.dumps(_Call(os.system, TOUCH), protocol=0), "posix.system"),
    ("protocol 2", pickle.dumps([1, {"a": _Call(os.system, TOUCH)}], protocol=2), "posix.system"),
    ("eval", pickle.dumps(_Call(builtins.eval, PYTHON)), "builtins.eval"),
    ("exec", pickle.dumps(_Call(builtins.exec, PYTHON), protocol=2), "__builtin__.exec"),
    ("os.system by name", _calls("os", "system", TOUCH), "os.system"),
    ("stack global", _calls("os", "system", TOUCH, stack=True), "os.system"),
    ("nt", _calls("nt", "system", TOUCH), "nt.system"),
    ("subprocess", _calls("subprocess", "getoutput", TOUCH), "subprocess.getoutput"),
    ("popen", _calls("subprocess", "Popen", TOUCH), "subprocess.Popen"),
    ("pty", _calls("pty", "spawn", "sh"), "pty.spawn"),
    ("runpy", _calls("runpy", "run_path", "x.py"), "runpy.run_path"),
    ("pip", _calls("pip", "main", "install"), "pip.main"),
    ("import", _calls("builtins", "__import__", "antigravity"), "builtins.__import__"),
    ("importlib", _calls("importlib", "import_module", "antigravity"), "importlib.import_module"),
    ("open", _calls("builtins", "open", CANARY, "w"), "builtins.open"),
    ("io.open", _calls("_io", "open", CANARY, "w"), "_io.open"),
    ("dotted name", _calls("os", "path.os.system", TOUCH, stack=True), "os.path.os.system"),
    ("through a good module", _calls("torch", "serialization.os.system", TOUCH, stack=True), "torch.serialization.os.system"),
    ("through training code", _calls("megatron.training", "os.system", TOUCH, stack=True), "megatron.training.os.system"),
    ("a function of training code", _calls("deepspeed.launcher.runner", "main", "x"), "deepspeed.launcher.runner.main"),
    ("torch.load", _calls("torch", "load", "http://x"), "torch.load"),
    ("torch.hub", _calls("torch.hub", "load", "x/y", "z"), "torch.hub.load"),
    ("pickle in a pickle", _calls("pickle", "loads", "cos\nsystem\n"), "pickle.loads"),
    ("cPickle", _calls("_pickle", "loads", "cos\nsystem\n"), "_pickle.loads"),
    ("marshal", _calls("marshal", "loads", "x"), "marshal.loads"),
    ("ctypes", _calls("ctypes", "CDLL", "libc.so.6"), "ctypes.CDLL"),
    ("shutil", _calls("shutil", "rmtree", "x"), "shutil.rmtree"),
    ("webbrowser", _calls("webbrowser", "open", "http://x"), "webbrowser.open"),
    ("operator", _calls("operator", "attrgetter", "system"), "operator.attrgetter"),
    ("functools", _calls("functools", "partial", "x"), "functools.partial"),
    ("numpy", _calls("numpy.testing._private.utils", "runstring", PYTHON), "numpy.testing._private.utils.runstring"),
    ("bdb", _calls("bdb", "Bdb", "x"), "bdb.Bdb"),
    ("INST", b"(" + _text(TOUCH) + b"ios\nsystem\n.", "os.system"),
    ("OBJ", b"(" + _global("os", "system") + _text(TOUCH) + b"o.", "os.system"),
    ("NEWOBJ", b"\x80\x04" + _global("subprocess", "Popen") + _text(TOUCH) + b"\x85\x81.", "subprocess.Popen"),
    ("NEWOBJ_EX", b"\x80\x04" + _global("subprocess", "Popen") + _text(TOUCH) + b"\x85}\x92.", "subprocess.Popen"),
    ("EXT1", b"\x80\x02\x82\x01)R.", "number 1 of the extension registry"),
    ("EXT4", b"\x80\x02\x84\x01\x00\x00\x00)R.", "number 1 of the extension registry"),
    ("getattr", b"\x80\x04" + _global("builtins", "getattr") + _global("builtins", "dict") + _text("get") + b"\x86R.", "builtins.getattr"),
    ("getattr of training code", b"\x80\x04" + _global("builtins", "getattr") + _global("megatron.core.enums", "ModelType") + _text("__class__") + b"\x86R.", "builtins.getattr"),
    ("getattr of getattr", b"\x80\x04" + _global("builtins", "getattr") + b"q\x00h\x00" + _text("x") + b"\x86R.", "builtins.getattr"),
    ("reconstructor", b"ccopy_reg\n_reconstructor\n(" + _global("builtins", "dict") + _global("builtins", "object") + b"NtR.", "copyreg._reconstructor"),
    ("a state that is called", pickle.dumps(_Call(argparse.Namespace, state=_Call(os.system, TOUCH))), "posix.system"),
    ("a key that is called", pickle.dumps({_Call(os.system, TOUCH): 1}), "posix.system"),
    ("in a persistent id", b"\x80\x02(" + _text("storage") + _global("os", "system") + _text("0") + _text("cpu") + b"K\x01tQ.", "os.system"),
    ("rebuilding by another function", b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(" + _global("os", "system") + _global("torch", "Tensor") + b"(" + _text(TOUCH) + b"tNtR.", "os.system"),
    ("hooks of a tensor", b"\x80\x02" + _TENSOR + b"(NK\x00))\x89" + _calls("os", "system", TOUCH)[2:-1] + b"tR.", "os.system"),
    ("numpy objects", b"\x80\x02" + _global("numpy.core.multiarray", "_reconstruct") + _global("os", "system") + b"\x85R.", "os.system"),
    ("after something harmless", b"\x80\x02}0" + _calls("os", "system", TOUCH)[2:], "os.system"),
]  # fmt: skip
