"""Which names of a pickle are allowed, which stand for nothing but themselves, and which are refused.

    allowed        has a meaning here, written out in this package (never the function of that name)
    inert          a class of training code: kept as a `Stub` that holds what was saved of it and can do nothing
    would run code everything else

Knows names as text. Imports none of what they name.
"""

from __future__ import annotations

from enum import Enum

import torch


class Verdict(Enum):
    """What loading a name with Python's own unpickler could do."""

    ALLOWED = "allowed"
    INERT = "inert"
    RUNS = "would run code"


STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8, "_UntypedStorage": torch.uint8,
}  # fmt: skip
"""Storage class → dtype of its elements."""
DTYPES = {
    name: getattr(torch, name)
    for name in [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint64",
        "uint32",
        "uint16",
        "uint8",
        "bool",
        "complex32",
        "complex64",
        "complex128",
    ]
}
"""Name of a dtype in `torch` → the dtype."""
UNREADABLE = {
    ("torch._utils", "_rebuild_qtensor"): "a quantised tensor",
    ("torch._utils", "_rebuild_sparse_tensor"): "a sparse tensor",
    ("torch._utils", "_rebuild_sparse_csr_tensor"): "a sparse tensor",
    ("torch._utils", "_rebuild_nested_tensor"): "a nested tensor",
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): "a tensor of the meta device, without values",
    ("torch._utils", "_rebuild_wrapper_subclass"): "a tensor subclass (a DTensor, say)",
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): "a tensor of an XLA device",
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): "a tensor of an XLA device",
    **{
        (module, name): "a quantised tensor"
        for module in ("torch", "torch.cuda")
        for name in ("QUInt8Storage", "QInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage")
    },
}
"""Names of torch that run nothing but whose tensors are not read here: name → what it stands for."""
_ALLOWED = {
    ("collections", "OrderedDict"), ("collections", "defaultdict"), ("collections", "Counter"),
    ("builtins", "set"), ("builtins", "frozenset"), ("builtins", "slice"), ("builtins", "complex"),
    ("builtins", "bytearray"), ("builtins", "bytes"), ("builtins", "dict"), ("builtins", "list"),
    ("builtins", "tuple"), ("builtins", "int"), ("builtins", "float"), ("builtins", "bool"), ("builtins", "str"),
    ("builtins", "long"), ("builtins", "unicode"),
    ("builtins", "object"), ("_codecs", "encode"),
    ("torch", "Size"), ("torch", "device"), ("torch", "Tensor"), ("torch.nn.parameter", "Parameter"),
    ("torch.serialization", "_get_layout"), ("torch.storage", "TypedStorage"), ("torch.storage", "_TypedStorage"),
    ("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"), ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"), ("torch._tensor", "_rebuild_from_type_v2"),
    ("numpy", "dtype"), ("numpy", "ndarray"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *((module, name) for module in ("torch", "torch.cuda", "torch.storage") for name in STORAGES),
    *(("torch", name) for name in DTYPES),
}  # fmt: skip
_INERT = {
    ("argparse", "Namespace"), ("types", "SimpleNamespace"), ("signal", "Signals"), ("datetime", "timedelta"),
    ("_io", "BytesIO"), ("io", "BytesIO"), ("typing", "Any"), ("typing", "Union"), ("typing", "Dict"), ("typing", "List"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"), ("enum", "Enum"), ("enum", "IntEnum"),
    ("builtins", "getattr"), ("copy_reg", "_reconstructor"), ("copyreg", "_reconstructor"),
    *((module, name) for module in ("pathlib", "pathlib._local")
      for name in ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
}  # fmt: skip
_CODE = frozenset(
    [
        "megatron",
        "apex",
        "deepspeed",
        "nemo",
        "nemo_toolkit",
        "lightning",
        "pytorch_lightning",
        "transformer_engine",
        "omegaconf",
        "fp16",
        "fp16_deprecated",
        "loss_scaler",
        "bigscience",
        "nvidia_resiliency_ext",
    ]
)
"""First words of modules of training code."""
_TORCH = ("torch.distributed.checkpoint.", "torch.distributed._shard.", "torch.distributed._checkpoint.")


def verdict(module: str, name: str) -> Verdict:
    """Of a name as it stands in the file (those of Python 2 included)."""
    key = (modern(module), name)
    if key in _ALLOWED or key in UNREADABLE:
        return Verdict.ALLOWED
    if key in _INERT or _training_code(module, name):
        return Verdict.INERT
    return Verdict.RUNS


def modern(module: str) -> str:
    """What Python 3 calls a module of Python 2."""
    return {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)


def _training_code(module: str, name: str) -> bool:
    """A class, by its capital letter: a function there may do anything, and `name` may reach into another module (`os.system`)."""
    ours = module.partition(".")[0] in _CODE or module.startswith(_TORCH)
    return ours and all(part.lstrip("_")[:1].isupper() for part in name.split("."))
