"""Megatron's checkpoints in every layout that it ever wrote: `load_model` computes what `transformers` does, to 1e-10 in float64.

The files are written by straight-line code of these tests (`megatron_files.py`, `megatron_core_files.py`) that shares nothing with
the product's tables. CI reads a table in which every possible pair of two values meets; `make test-all` all layouts.
"""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from megalith.generate.loading import load_model
from tests.reference.common import missing_pairs, rows

pytest.importorskip("transformers")

from tests.golden import tiny
from tests.golden.megatron_core_files import CoreLayout, write_core
from tests.golden.megatron_facts import GELU, gpt2_facts, llama_facts
from tests.golden.megatron_files import Layout, write
from tests.golden.whole import Whole, from_gpt2, from_llama

TOLERANCE = 1e-10
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TREES = ["V1", "MDO", "V2.5", "norms", "flat-model", "flat-language-model", "core-local", "core-TE"]
STAGES = {"1": (1, 1), "2": (2, 1), "2x2": (2, 2)}
VERSIONS = {"absent": None, "0": 0, "1.0": 1.0, "2.0": 2.0, "3.0": 3.0}

GPT2 = {
    "version": list(VERSIONS),
    "tree": TREES,
    "tp": ["1", "2", "4"],
    "stages": list(STAGES),
    "place": ["number", "release", "iteration", "rank", "bare"],
    "name": ["short", "long"],
    "file": ["zip", "legacy"],
    "dtype": list(DTYPES),
    "args": ["absent", "v1", "v2", "v3"],
    "gelu": list(GELU),
    "training": ["yes", "no"],
}
NEVER = [
    ("place", "rank bare", "tp", "2 4"),
    ("place", "rank bare", "stages", "2 2x2"),
    ("place", "bare", "name", "long"),
    ("name", "long", "stages", "2 2x2"),
    ("tree", "core-local core-TE norms", "version", "absent 0 1.0 2.0"),
    ("tree", "core-local core-TE norms", "args", "v1 v2"),
    ("tree", "core-local core-TE", "gelu", "openai onnx"),
    ("tree", "flat-model flat-language-model", "stages", "2 2x2"),
    ("args", "v1 v2", "stages", "2 2x2"),
    ("args", "v1", "version", "2.0 3.0"),
    ("args", "v1", "gelu", "fused unfused onnx"),
    ("args", "v2 v3 absent", "gelu", "early"),
    ("args", "absent", "gelu", "unfused openai onnx"),
]
"""Values that no file has together: no stages before there was a name for them, one rank in one file, eras of arguments."""

GPT2_TABLE = """
    absent  V1                  1  1      rank      short legacy fp64  v2     onnx    no
    absent  V1                  4  2      release   short zip    fp64  v3     unfused yes
    absent  MDO                 1  1      number    long  legacy fp16  v1     early   no
    absent  V2.5                1  1      rank      short zip    fp32  v3     openai  yes
    absent  V2.5                1  2x2    iteration short legacy bf16  absent fused   no
    absent  flat-model          1  1      iteration long  legacy fp16  v3     unfused yes
    absent  flat-model          2  1      release   long  zip    bf16  v1     early   no
    absent  flat-language-model 1  1      bare      short zip    fp64  v1     openai  no
    0       V1                  1  1      rank      short legacy bf16  v1     early   yes
    0       MDO                 2  2      release   short legacy fp16  absent fused   yes
    0       MDO                 4  2      iteration short zip    fp64  v3     openai  no
    0       V2.5                1  1      bare      short legacy fp32  v2     unfused no
    0       V2.5                2  2x2    release   short zip    fp16  v3     onnx    yes
    0       flat-model          1  1      bare      short legacy fp32  v2     onnx    no
    0       flat-language-model 2  1      iteration short zip    fp32  v1     early   no
    0       flat-language-model 4  1      number    long  legacy fp64  v3     fused   yes
    1.0     V1                  1  1      bare      short zip    fp32  v1     early   yes
    1.0     V1                  1  2      number    short zip    bf16  absent fused   no
    1.0     MDO                 1  1      iteration long  zip    fp32  v2     fused   yes
    1.0     MDO                 1  1      rank      short zip    fp32  v1     early   no
    1.0     MDO                 2  2x2    release   short zip    fp16  v3     unfused no
    1.0     V2.5                4  1      iteration short legacy fp64  v1     early   yes
    1.0     flat-model          1  1      rank      long  zip    fp64  v3     onnx    yes
    1.0     flat-model          2  1      number    short legacy bf16  v1     openai  yes
    1.0     flat-language-model 2  1      release   short zip    fp16  v1     openai  no
    2.0     V1                  2  1      number    long  zip    fp32  absent fused   yes
    2.0     V1                  4  2      release   short legacy fp16  absent fused   no
    2.0     V1                  4  2x2    iteration short legacy fp32  v3     openai  yes
    2.0     MDO                 1  1      bare      short legacy bf16  v3     onnx    no
    2.0     V2.5                2  1      number    short legacy bf16  v2     onnx    yes
    2.0     V2.5                4  1      number    long  legacy bf16  v3     unfused no
    2.0     flat-model          4  1      number    long  legacy fp64  absent fused   no
    2.0     flat-language-model 1  1      rank      long  zip    bf16  v2     onnx    yes
    3.0     V1                  4  1      release   long  zip    fp16  v2     openai  no
    3.0     MDO                 4  2      iteration short legacy fp32  v3     onnx    yes
    3.0     V2.5                2  2      release   short zip    fp64  v3     onnx    yes
    3.0     norms               1  1      rank      long  zip    fp32  absent fused   yes
    3.0     norms               1  1      bare      short zip    fp64  absent fused   no
    3.0     norms               1  2x2    release   short zip    bf16  v3     unfused no
    3.0     norms               2  1      release   long  legacy fp32  absent fused   yes
    3.0     norms               4  1      release   long  legacy fp16  v3     openai  yes
    3.0     norms               4  2      number    short zip    fp16  v3     openai  no
    3.0     norms               4  2      iteration short legacy fp64  v3     onnx    no
    3.0     flat-model          1  1      rank      long  zip    fp16  v3     openai  yes
    3.0     flat-language-model 1  1      iteration short zip    fp32  absent fused   no
    3.0     flat-language-model 4  1      iteration short legacy fp16  v3     unfused yes
    3.0     core-local          1  1      rank      short zip    fp32  v3     unfused no
    3.0     core-local          1  1      bare      short zip    fp16  absent fused   yes
    3.0     core-local          1  2x2    release   short legacy fp16  v3     unfused yes
    3.0     core-local          2  1      number    long  legacy bf16  v3     unfused yes
    3.0     core-local          4  2      iteration short legacy fp64  v3     unfused no
    3.0     core-TE             1  1      rank      long  legacy fp16  absent fused   yes
    3.0     core-TE             1  1      bare      short legacy bf16  absent fused   no
    3.0     core-TE             1  2      iteration short zip    fp16  v3     fused   no
    3.0     core-TE             1  2x2    release   short legacy fp64  v3     unfused no
    3.0     core-TE             2  2x2    number    short legacy fp32  v3     unfused yes
    3.0     core-TE             4  1      release   short legacy fp16  v3     unfused yes
"""

LLAMA = {
    "tree": ["V2.5", "norms", "core-local", "core-TE"],
    "tp": ["1", "2"],
    "stages": list(STAGES),
    "groups": ["2", "8"],
    "head": ["tied", "untied"],
    "dtype": ["fp64", "bf16"],
    "extra": ["none", "stream", "tensor"],
}
LLAMA_TABLE = """
    V2.5       1  1    2  untied  fp64  none
    V2.5       2  2    8  tied    bf16  stream
    V2.5       2  2x2  2  tied    fp64  tensor
    norms      2  1    8  tied    fp64  stream
    norms      1  2    2  untied  bf16  tensor
    norms      1  2x2  2  untied  bf16  none
    core-local 2  1    2  untied  bf16  tensor
    core-local 1  2    8  tied    fp64  none
    core-local 1  2x2  8  untied  bf16  stream
    core-TE    1  1    8  untied  fp64  tensor
    core-TE    2  2    2  untied  fp64  stream
    core-TE    2  2x2  8  tied    bf16  none
"""

CORE = {
    "model": ["gpt2", "llama", "tied"],
    "tp": ["1", "2"],
    "layers": ["stacked", "each"],
    "common": ["file", "shard"],
    "place": ["root", "iteration"],
    "dtype": ["fp64", "bf16"],
    "optimizer": ["yes", "no"],
}
CORE_TABLE = """
    gpt2   1  stacked  file   root       fp64  no
    gpt2   2  each     shard  iteration  bf16  yes
    gpt2   2  stacked  shard  root       bf16  no
    llama  1  each     file   iteration  fp64  yes
    llama  2  stacked  shard  iteration  fp64  no
    llama  2  each     file   root       bf16  no
    tied   1  each     shard  root       bf16  yes
    tied   2  stacked  file   iteration  bf16  yes
    tied   1  stacked  shard  iteration  fp64  no
    llama  1  stacked  shard  root       fp64  yes
    gpt2   2  stacked  file   iteration  fp64  yes
    tied   2  each     file   root       fp64  no
"""


@dataclass
class Models:
    """Weights and logits of tiny models, each made once. The weights are those that a file in `dtype` can hold."""

    made: dict[tuple[object, ...], tuple[Whole, torch.Tensor]] = field(default_factory=dict)

    def gpt2(self, activation: str, dtype: torch.dtype) -> tuple[Whole, torch.Tensor]:
        if (activation, dtype) not in self.made:
            model = tiny.rounded(tiny.gpt2(activation), dtype)
            self.made[activation, dtype] = from_gpt2(model), tiny.logits(model)
        return self.made[activation, dtype]

    def llama(self, groups: int, tied: bool, dtype: torch.dtype) -> tuple[Whole, torch.Tensor]:
        if (groups, tied, dtype) not in self.made:
            model = tiny.rounded(tiny.llama(groups, tied), dtype)
            self.made[groups, tied, dtype] = from_llama(model), tiny.logits(model)
        return self.made[groups, tied, dtype]


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


def assert_same(path: Path, theirs: torch.Tensor, tp: int, **named: object) -> None:
    """The model of `path` has a logit for every row that is stored, and of the true vocabulary those of `transformers`."""
    loaded = load_model(path, device="cpu", precision="64", **named)
    with torch.no_grad():
        ours = loaded.model.logits(loaded.model(tiny.tokens()))
    assert ours.shape == (*theirs.shape[:2], 128 * tp)
    assert ours.dtype == torch.float64
    assert (ours[..., : tiny.VOCABULARY] - theirs).abs().max() <= TOLERANCE


def sizes_file(folder: Path, written: str) -> Path:
    """What a user says of a file without arguments: JSON with hyphens as in NVIDIA's tools, or YAML."""
    sizes = {
        "num_layers": tiny.LAYERS,
        "hidden_size": tiny.WIDTH,
        "num_attention_heads": tiny.HEADS,
        "max_position_embeddings": tiny.POSITIONS,
    }
    path = folder / f"sizes.{written}"
    if written == "json":
        path.write_text(json.dumps({name.replace("_", "-"): size for name, size in sizes.items()}))
    else:
        path.write_text("".join(f"{name}: {size}\n" for name, size in sizes.items()))
    return path


def check_gpt2(models: Models, folder: Path, row: dict[str, str]) -> None:
    dtype, (pp, chunks), tp = DTYPES[row["dtype"]], STAGES[row["stages"]], int(row["tp"])
    layout = Layout(
        version=VERSIONS[row["version"]],
        tree=row["tree"].replace("-", " "),
        tp=tp,
        pp=pp,
        chunks=chunks,
        place=row["place"],
        suffix=row["name"] == "long",
        zipped=row["file"] == "zip",
        dtype=dtype,
        args=row["args"],
        training=row["training"] == "yes",
    )
    whole, theirs = models.gpt2(GELU[row["gelu"]][1], dtype)
    path = write(folder / "run", whole, layout, gpt2_facts(row["gelu"], row["args"]))
    named = {}
    if row["args"] == "absent":
        named["config_file"] = str(sizes_file(folder, "json" if row["file"] == "zip" else "yaml"))
    assert_same(path, theirs, tp, **named)


def check_llama(models: Models, folder: Path, row: dict[str, str]) -> None:
    dtype, (pp, chunks), tp = DTYPES[row["dtype"]], STAGES[row["stages"]], int(row["tp"])
    groups, tied = int(row["groups"]), row["head"] == "tied"
    layout = Layout(
        tree=row["tree"].replace("-", " "), tp=tp, pp=pp, chunks=chunks, dtype=dtype, extra_state=row["extra"]
    )
    whole, theirs = models.llama(groups, tied, dtype)
    assert_same(write(folder, whole, layout, llama_facts(groups, tied)), theirs, tp)


def check_core(models: Models, folder: Path, row: dict[str, str]) -> None:
    dtype, tp = DTYPES[row["dtype"]], int(row["tp"])
    layout = CoreLayout(
        tp=tp,
        layers=row["layers"],
        common=row["common"],
        dtype=dtype,
        place=row["place"],
        optimizer=row["optimizer"] == "yes",
    )
    if row["model"] == "gpt2":
        (whole, theirs), facts = models.gpt2("gelu_new", dtype), gpt2_facts()
    else:
        tied = row["model"] == "tied"
        (whole, theirs), facts = models.llama(2, tied, dtype), llama_facts(2, tied)
    assert_same(write_core(folder, whole, layout, facts), theirs, tp)


Pair = tuple[tuple[str, str], tuple[str, str]]


def never(pair: Pair) -> bool:
    """Whether a row with both values cannot be: they exclude each other, or every value of another factor."""
    if excluded(*pair):
        return True
    return any(
        all(excluded(pair[0], (factor, value)) or excluded(pair[1], (factor, value)) for value in values)
        for factor, values in GPT2.items()
    )


def excluded(one: tuple[str, str], other: tuple[str, str]) -> bool:
    for a, b in ((one, other), (other, one)):
        for first, firsts, second, seconds in NEVER:
            if (a[0], b[0]) == (first, second) and a[1] in firsts.split() and b[1] in seconds.split():
                return True
    return a[0] == b[0] and a[1] != b[1]


def test_every_pair_of_values_meets():
    assert [pair for pair in missing_pairs(rows(GPT2_TABLE, GPT2), GPT2) if not never(pair)] == []
    assert missing_pairs(rows(LLAMA_TABLE, LLAMA), LLAMA) == []
    assert missing_pairs(rows(CORE_TABLE, CORE), CORE) == []


def spelled(row: dict[str, str]) -> str:
    return "-".join(row.values())


@pytest.mark.parametrize("row", rows(GPT2_TABLE, GPT2), ids=spelled)
def test_gpt2(tmp_path, models, row):
    check_gpt2(models, tmp_path, row)


@pytest.mark.parametrize("row", rows(LLAMA_TABLE, LLAMA), ids=spelled)
def test_llama(tmp_path, models, row):
    check_llama(models, tmp_path, row)


@pytest.mark.parametrize("row", rows(CORE_TABLE, CORE), ids=spelled)
def test_torch_dist(tmp_path, models, row):
    check_core(models, tmp_path, row)


def test_llama_of_four_ranks(tmp_path, models):
    whole, theirs = models.llama(4, False, torch.float64)
    path = write(tmp_path, whole, Layout(tree="core TE", tp=4, pp=2), llama_facts(4, tied=False))
    assert_same(path, theirs, 4)


def test_a_rank_stands_for_its_iteration(tmp_path, models):
    whole, theirs = models.gpt2("gelu_new", torch.float64)
    path = write(tmp_path, whole, Layout(place="rank", tp=2, pp=2), gpt2_facts())
    assert path.name == "mp_rank_01_001"
    assert_same(path, theirs, 2)


def test_gates_and_ups_under_names_of_their_own(tmp_path, models):
    whole, theirs = models.llama(2, False, torch.float64)
    layout = CoreLayout(tp=2, layers="each", common="shard", split_gate=True)
    assert_same(write_core(tmp_path, whole, layout, llama_facts(2, tied=False)), theirs, 2)


@pytest.mark.parametrize("gelu", list(GELU))
def test_activations_differ(models, gelu):
    """The goldens can tell one activation from the other."""
    _, mine = models.gpt2(GELU[gelu][1], torch.float64)
    _, other = models.gpt2({"gelu": "gelu_new", "gelu_new": "gelu"}[GELU[gelu][1]], torch.float64)
    assert (mine - other).abs().max() > 1e-5


def every(factors: dict[str, list[str]], *structure: str) -> list[dict[str, str]]:
    """All possible combinations of the factors of structure; the others take turns."""
    found = []
    for values in itertools.product(*(factors[name] for name in structure)):
        row = dict(zip(structure, values, strict=True))
        for name, options in factors.items():
            if name not in row:
                turn = options[len(found) % len(options) :] + options[: len(found) % len(options)]
                fitting = [v for v in turn if not any(excluded((name, v), other) for other in row.items())]
                row |= {name: fitting[0]} if fitting else {}
        possible = len(row) == len(factors)
        if possible and not any(excluded(*pair) for pair in itertools.combinations(row.items(), 2)):
            found.append({name: row[name] for name in factors})
    return found


@pytest.fixture(scope="module")
def layouts():
    """Every combination of what structures a file, with the check that reads it."""
    return [
        *((check_gpt2, row) for row in every(GPT2, "version", "tree", "tp", "stages", "args")),
        *((check_llama, row) for row in every(LLAMA, "tree", "tp", "stages", "groups", "head")),
        *((check_core, row) for row in every(CORE, "model", "tp", "layers", "common", "place")),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("tenth", range(10))
def test_all_layouts(tmp_path, models, layouts, tenth):
    assert len(layouts) > 400
    for check, row in layouts[tenth::10]:
        check(models, tmp_path / "one", row)
        shutil.rmtree(tmp_path / "one")
