"""Megatron's BERT and T5 in every layout: `load_model` computes what `transformers` does, to 1e-10 in float64.

The files are written by straight-line code of these tests that shares nothing with the product's tables. Versions,
trees, ranks and stages are sampled here; `make test-all` reads every combination.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import warnings

import pytest
import torch

from megalith.checkpoint.foreign import open_foreign
from megalith.errors import CheckpointError
from megalith.generate.loading import load_model

pytest.importorskip("transformers")

from torch.distributed import checkpoint as dcp

from tests.golden import tiny, tiny_sides
from tests.golden.foreign_classes import arguments, megatron_installed
from tests.golden.megatron_core_files import Chunks, Planner
from tests.golden.megatron_facts import GELU, gpt2_facts
from tests.golden.megatron_files import Layout, sided_core_model, write
from tests.golden.sides import Sides, from_megatron_bert, from_pegasus

TOLERANCE = 1e-10
HEAD = {"fused": "gelu", "unfused": "gelu", "openai": "gelu_new", "onnx": "gelu", "early": "gelu"}
"""The activation before BERT's token table: torch's exact one, but for OpenAI's."""
TREES = ("V1", "MDO", "V2.5", "norms", "core local", "core TE")
VERSIONS = (None, 0, 1.0, 2.0, 3.0)


class Models:
    """Weights and answers, each made once."""

    def __init__(self) -> None:
        self.made: dict[tuple[str, str, torch.dtype], tuple[Sides, tuple[torch.Tensor, ...]]] = {}

    def get(self, family: str, gelu: str, dtype: torch.dtype) -> tuple[Sides, tuple[torch.Tensor, ...]]:
        key = (family, gelu, dtype)
        if key not in self.made:
            activation = GELU[gelu][1]
            if family == "bert":
                model = tiny.rounded(tiny_sides.megatron_bert(activation, HEAD[gelu]), dtype)
                self.made[key] = from_megatron_bert(model), tiny_sides.answers(model)
            else:
                model, table = tiny_sides.megatron_t5(activation)
                assert dtype == torch.float64
                self.made[key] = from_pegasus(model, table), tiny_sides.answers(model)
        return self.made[key]


@pytest.fixture(scope="module")
def models():
    return Models()


def facts(family: str, gelu: str, era: str) -> dict[str, object]:
    said = gpt2_facts(gelu, era)
    if family == "bert":
        return said | {"tokenizer_type": "BertWordPieceLowerCase", "bert_binary_head": True}
    sizes = {"num_layers": tiny_sides.ENCODER, "encoder_seq_length": tiny.POSITIONS, "ffn_hidden_size": 48}
    if era == "v3":
        sizes |= {"encoder_num_layers": tiny_sides.ENCODER, "decoder_num_layers": tiny_sides.DECODER}
    return (
        said
        | sizes
        | {"decoder_seq_length": 12, "vocab_extra_ids": 100, "tokenizer_type": "BertWordPieceCase"}
    )


def check(models: Models, folder, family: str, layout: Layout, gelu: str = "fused") -> None:
    whole, theirs = models.get(family, gelu, layout.dtype)
    path = write(folder / "run", whole, layout, facts(family, gelu, layout.args))
    named = {}
    if layout.args == "absent":
        (folder / "sizes.json").write_text(json.dumps({"num-attention-heads": tiny.HEADS}))
        named["config_file"] = str(folder / "sizes.json")
    loaded = load_model(path, device="cpu", precision="64", **named)
    assert loaded.state["architecture"]["family"] == family
    for mine, other in zip(tiny_sides.ours(loaded.model), theirs, strict=True):
        assert mine.dtype == torch.float64
        assert (mine[..., : other.shape[-1]] - other).abs().max() <= TOLERANCE


BERT = [
    (Layout(None, "V1", place="release", args="absent"), "fused"),
    (Layout(None, "V1", tp=2, args="v1"), "early"),
    (Layout(0, "MDO", tp=4, pp=2, zipped=False), "onnx"),
    (Layout(0, "V2.5", place="bare", dtype=torch.float16, args="absent"), "fused"),
    (Layout(1.0, "V1", tp=2, pp=2), "openai"),
    (Layout(1.0, "MDO", tp=4, place="iteration", args="v2"), "unfused"),
    (Layout(2.0, "V1", pp=4, training=True), "fused"),
    (Layout(2.0, "V2.5", tp=2, dtype=torch.bfloat16, args="v2"), "openai"),
    (Layout(3.0, "V2.5", tp=4, pp=2), "unfused"),
    (Layout(3.0, "norms", tp=2, pp=2), "fused"),
    (Layout(3.0, "core local", tp=2, pp=2, extra_state="stream"), "fused"),
    (Layout(3.0, "core TE", tp=4, extra_state="tensor", place="iteration"), "unfused"),
]
T5 = [
    (Layout(None, "V2.5", args="absent"), "fused"),
    (Layout(0, "MDO", tp=4, args="v2"), "unfused"),
    (Layout(1.0, "V1", tp=2, pp=2), "openai"),
    (Layout(2.0, "V2.5", tp=2, pp=3, split=1, zipped=False), "fused"),
    (Layout(3.0, "V2.5", tp=4, pp=4, split=2), "onnx"),
    (Layout(3.0, "norms", pp=3, split=1, place="release"), "fused"),
    (Layout(3.0, "V2.5", tp=2, pp=6, split=2, training=True), "unfused"),
    (Layout(3.0, "core local", tp=2, extra_state="stream"), "fused"),
    (Layout(3.0, "core TE", tp=4, place="iteration"), "unfused"),
]


def spelled(value: object) -> str:
    if isinstance(value, Layout):
        return f"v{value.version}-{value.tree}-tp{value.tp}-pp{value.pp}-{value.args}".replace(" ", "-")
    return str(value)


@pytest.mark.parametrize(("layout", "gelu"), BERT, ids=spelled)
def test_bert(tmp_path, models, layout, gelu):
    check(models, tmp_path, "bert", layout, gelu)


@pytest.mark.parametrize(("layout", "gelu"), T5, ids=spelled)
def test_t5(tmp_path, models, layout, gelu):
    check(models, tmp_path, "t5", layout, gelu)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_torch_dist(tmp_path, models, family):
    """megatron-core's default: one tensor of the whole model under each name, layers along a leading axis."""
    whole, theirs = models.get(family, "fused", torch.float64)
    each = sided_core_model(whole, Layout(3.0, "core TE"), 0, 0)
    names = {name: re.sub(r"layers\.\d+\.", "layers.", name) for name in each if "_extra_state" not in name}
    stacked = {name for name, other in names.items() if name != other}
    state: dict[str, object] = {}
    for name, other in names.items():
        layers = [each[one] for one in names if names[one] == other]
        tensor = torch.stack(layers) if name in stacked else each[name]
        state[other] = Chunks(tensor, (len(layers) if name in stacked else 1, *([1] * (tensor.ndim - 1))))
    step = tmp_path / "iter_0000010"
    step.mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    with megatron_installed() as classes:
        said = facts(family, "fused", "v3") | {"use_dist_ckpt": True, "tensor_model_parallel_size": 1}
        args = arguments(classes, torch.float64, said)
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 10}, step / "common.pt")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            writer = dcp.FileSystemWriter(step, sync_files=False)
            dcp.save(state, storage_writer=writer, planner=Planner(flatten_state_dict=False), no_dist=True)
    (step / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    loaded = load_model(tmp_path, device="cpu", precision="64")
    for mine, other in zip(tiny_sides.ours(loaded.model), theirs, strict=True):
        assert (mine[..., : other.shape[-1]] - other).abs().max() <= TOLERANCE


def without_heads(whole: Sides, *names: str) -> Sides:
    ends = {name: tensor for name, tensor in whole.ends.items() if not name.startswith(names)}
    return Sides(**{**vars(whole), "ends": ends})


def test_bert_without_a_binary_head(tmp_path, models):
    whole, (theirs, _) = models.get("bert", "fused", torch.float64)
    path = write(
        tmp_path, without_heads(whole, "pooler", "binary"), Layout(tp=2), facts("bert", "fused", "v3")
    )
    loaded = load_model(path, device="cpu", precision="64")
    assert loaded.model.pooler is None
    assert loaded.model.config.token_types == 2
    (mine,) = tiny_sides.ours(loaded.model)
    assert (mine[..., : tiny.VOCABULARY] - theirs).abs().max() <= TOLERANCE


def test_an_encoder_alone(tmp_path, models):
    """What BioMegatron was published as: heads begin anew, which is said, and the encoder is whole."""
    whole, _ = models.get("bert", "fused", torch.float64)
    path = write(
        tmp_path, without_heads(whole, ""), Layout(None, "V1", tp=2, args="v2"), facts("bert", "fused", "v2")
    )
    loaded = load_model(path, device="cpu", precision="64")
    assert any("lm_head and output_bias begin anew" in notice for notice in loaded.notices)
    model = tiny_sides.megatron_bert("gelu_new")
    with torch.no_grad():
        theirs = model.bert(tiny.tokens(), token_type_ids=tiny_sides.types()).last_hidden_state
        ours = loaded.model(tiny.tokens(), types=tiny_sides.types())
        logits = loaded.model.logits(ours)
    assert (ours - theirs).abs().max() <= TOLERANCE
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_the_released_345m_shape_is_known():
    """Its files have no args: 24 layers of 1024 with 512 positions have 16 heads."""
    from megalith.checkpoint.formats.megatron_args import Facts, settle
    from megalith.checkpoint.formats.megatron_shapes import Seen
    from megalith.models.bert_config import BertConfig
    from megalith.models.config import effective
    from megalith.models.presets import get

    seen = Seen(
        layers=24, width=1024, rows=30592, positions=512, ffn=4096, query_key_value=3072, gated=False, bias=True,
        qkv_bias=True, norm_bias=True, output=False, family="bert", types=2, binary=True,
    )  # fmt: skip
    fields = settle(Facts({}, ""), seen, where="here").fields
    assert effective(BertConfig(**fields, vocab_size=30522)) == effective(get("bert-345m"))


def test_token_types_that_contradict_the_tensors_are_refused(tmp_path, models):
    whole, _ = models.get("bert", "fused", torch.float64)
    path = write(tmp_path, whole, Layout(), facts("bert", "fused", "v3") | {"num_tokentypes": 4})
    with pytest.raises(CheckpointError, match=r"num_tokentypes: 4 \(args\), the tensors have 2"):
        open_foreign(path)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_tables_are_taken_whole(tmp_path, models, family):
    whole, _ = models.get(family, "fused", torch.float64)
    foreign = open_foreign(write(tmp_path, whole, Layout(tp=2, pp=2, split=1), facts(family, "fused", "v3")))
    padded = foreign.tensors["output_bias.bias"].read()
    assert padded.shape == (256,)
    assert torch.equal(padded[: tiny.VOCABULARY], whole.ends["bias"])
    assert torch.equal(foreign.tensors["token_embedding.weight"].read()[: tiny.VOCABULARY], whole.word)


def every(family: str) -> list[Layout]:
    """All layouts: versions × trees × ranks × stages × arguments."""
    found = []
    for version, tree, tp, pp, args in itertools.product(
        VERSIONS, TREES, (1, 2, 4), (1, 2, 4), ("absent", "v2", "v3")
    ):
        late = tree.startswith("core") or tree == "norms"
        if (late and (version != 3.0 or args == "v2")) or (pp > 1 and args == "v2"):
            continue
        if family == "t5" and pp > 1 and tree.startswith("core"):
            continue
        found.append(Layout(version, tree, tp=tp, pp=pp, args=args, split=pp // 2))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("fifth", range(5))
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_all_layouts(tmp_path, models, family, fifth):
    layouts = every(family)
    assert len(layouts) > 150
    for layout in layouts[fifth::5]:
        gelu = "fused" if layout.args == "absent" else "unfused"
        (tmp_path / "one").mkdir()
        check(models, tmp_path / "one", family, layout, gelu)
        shutil.rmtree(tmp_path / "one")
