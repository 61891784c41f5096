"""Calls of allowed names that make plain values: containers, bytes, sizes, and numpy's arrays and numbers.

Every one is written out here; none calls the function that the file names. Arrays of Python objects are refused.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import numpy as np

from megalith.checkpoint.pickles.keys import as_key
from megalith.checkpoint.pickles.source import PickleError, Unreadable, shown
from megalith.checkpoint.pickles.stub import Maker, Stub

_KINDS = frozenset("biufc")
_ORDERS = {"<": "<", ">": ">", "|": "|", "=": "<"}


def _pairs(args: tuple[Any, ...]) -> OrderedDict[Any, Any]:
    if not args:
        return OrderedDict()
    if len(args) != 1 or not isinstance(args[0], (list, tuple, dict)):
        raise PickleError("an OrderedDict of something else than pairs")
    pairs = args[0].items() if isinstance(args[0], dict) else args[0]
    return OrderedDict((as_key(key), value) for key, value in pairs)


def _sequence(args: tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
    if not args:
        return ()
    if len(args) != 1 or not isinstance(args[0], (list, tuple)):
        raise PickleError("a set or tuple of something else than a list")
    return args[0]


def _encoded(args: tuple[Any, ...]) -> bytes:
    text, encoding = args
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise PickleError(f"bytes written as text of {shown(encoding)}")
    return text.encode("latin-1")


def _bytes(args: tuple[Any, ...]) -> bytes:
    if any(not isinstance(each, (bytes, bytearray)) for each in args) or len(args) > 1:
        raise PickleError("bytes of something else than bytes")
    return bytes(*args)


def _bytearray(args: tuple[Any, ...]) -> bytearray:
    return bytearray(_encoded(args) if len(args) == 2 else _bytes(args))


def _slice(args: tuple[Any, ...]) -> slice:
    if not 1 <= len(args) <= 3 or any(each is not None and type(each) is not int for each in args):
        raise PickleError("a slice of something else than whole numbers")
    return slice(*args)


def _complex(args: tuple[Any, ...]) -> complex:
    real, imaginary = args
    if not isinstance(real, float) or not isinstance(imaginary, float):
        raise PickleError("a complex number of something else than two numbers")
    return complex(real, imaginary)


def _size(args: tuple[Any, ...]) -> tuple[int, ...]:
    sizes = tuple(_sequence(args))
    if any(type(size) is not int for size in sizes):
        raise PickleError("a torch.Size of something else than whole numbers")
    return sizes


def _empty(made: type[Any]) -> Maker:
    def make(args: tuple[Any, ...]) -> Any:
        if args:
            raise PickleError(f"a {made.__name__} of something")
        return made()

    return make


def _number_type(stub: Any) -> np.dtype[Any]:
    """The numpy dtype that a stub of `numpy.dtype` describes: one of plain numbers."""
    if not isinstance(stub, Stub) or (stub.module, stub.name) != ("numpy", "dtype"):
        raise PickleError("an array without a dtype")
    code = _text(stub.args[0])
    order = _text(stub.state[1]) if isinstance(stub.state, tuple) else "="
    if code[:1] not in _KINDS or not code[1:].isdecimal() or order not in _ORDERS:
        raise Unreadable(f"it holds a numpy array of {shown(code)}; arrays of plain numbers are read")
    return np.dtype(f"{_ORDERS[order]}{code}")


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if not isinstance(value, str):
        raise PickleError(f"{shown(value)} where a text is expected")
    return value


def _raw(value: Any) -> bytes:
    """Bytes; text is what Python 2 wrote of them."""
    if isinstance(value, str):
        return value.encode("latin-1")
    if not isinstance(value, (bytes, bytearray)):
        raise PickleError("an array of something else than bytes")
    return bytes(value)


def array(state: Any) -> np.ndarray[Any, Any]:
    """What the state of a `numpy.ndarray` (version, shape, dtype, column order, bytes) describes."""
    shape, dtype, columns, raw = state[-4:]
    kind = _number_type(dtype)  # first: an array of objects has a list where the bytes of others are
    return _array(_raw(raw), kind, shape, "F" if columns else "C")


def _array(raw: bytes, dtype: np.dtype[Any], shape: Any, order: Any) -> np.ndarray[Any, Any]:
    shape = _size((shape,))
    if any(size < 0 for size in shape) or len(shape) > 32 or math.prod(shape) * dtype.itemsize != len(raw):
        raise PickleError(f"a numpy array {list(shape)} of {dtype} in {len(raw)} bytes")
    return np.frombuffer(raw, dtype).reshape(shape, order="F" if order == "F" else "C").copy()


def _scalar(args: tuple[Any, ...]) -> Any:
    dtype, raw = args
    return _array(_raw(raw), _number_type(dtype), (), "C").item()


def _from_buffer(args: tuple[Any, ...]) -> np.ndarray[Any, Any]:
    raw, dtype, shape, order = args
    return _array(_raw(raw), _number_type(dtype), shape, order)


def stub(module: str, name: str) -> Maker:
    """Keeps a call as what it was called with."""
    return lambda args: Stub(module, name, args)


MAKERS: dict[tuple[str, str], Maker] = {
    ("collections", "OrderedDict"): _pairs,
    ("collections", "Counter"): lambda args: dict(_pairs(args)),
    ("collections", "defaultdict"): lambda args: {},
    ("builtins", "dict"): _empty(dict),
    ("builtins", "list"): _empty(list),
    ("builtins", "set"): lambda args: set(map(as_key, _sequence(args))),
    ("builtins", "frozenset"): lambda args: frozenset(map(as_key, _sequence(args))),
    ("builtins", "tuple"): lambda args: tuple(_sequence(args)),
    ("builtins", "slice"): _slice,
    ("builtins", "complex"): _complex,
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytearray,
    ("_codecs", "encode"): _encoded,
    ("torch", "Size"): _size,
    ("torch", "device"): stub("torch", "device"),
    ("torch.serialization", "_get_layout"): stub("torch.serialization", "_get_layout"),
    ("numpy", "dtype"): stub("numpy", "dtype"),
    **{
        (f"numpy.{core}.{module}", name): maker
        for core in ("core", "_core")
        for module, name, maker in (
            ("multiarray", "_reconstruct", stub("numpy", "ndarray")),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}
