"""A checkpoint of any layout, read by any number of processes: the same tokens, greedy and drawn."""

import pytest
import torch

from megalith.checkpoint.native import Checkpointer
from megalith.generate.loading import load_model
from megalith.generate.sampling import Sampling
from megalith.generate.text import complete
from megalith.models.family import describe
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology
from tests.generate import ranks
from tests.generate.tiny import VARIANTS, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module", params=VARIANTS)
def saved(request, tmp_path_factory, rank_pool):
    """A run folder that two pipeline stages of two tensor ranks wrote, and what one process makes of it."""
    run = tmp_path_factory.mktemp("run")
    tokenizer = tiny_tokenizer(run / "tokenizer")
    sizes = Sizes(tensor=2, pipeline=2)
    rank_pool.run(ranks.save_shared, 4, str(run), request.param, tokenizer.vocab_size, sizes)
    return str(run), ranks.texts(str(run))


def close(found, expected, tolerance):
    for name, rows in expected.items():
        assert [row[:2] for row in found[name]] == [row[:2] for row in rows], name
        for (_, _, logprobs), (_, _, wanted) in zip(found[name], rows, strict=True):
            assert logprobs == (pytest.approx(wanted, abs=tolerance) if wanted else wanted)


LAYOUTS = [
    Sizes(tensor=2),
    Sizes(replicate=3),
    Sizes(tensor=2, replicate=2),
    Sizes(pipeline=2),
    Sizes(tensor=2, pipeline=2),
]


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_tokens_do_not_depend_on_the_processes(saved, rank_pool, sizes):
    run, expected = saved
    for found in rank_pool.run(ranks.texts, sizes.world, run, sizes):
        close(found, expected, 1e-9)


def test_texts_differ_so_that_equal_ones_mean_something(saved):
    _, expected = saved
    for name in ("greedy", "drawn", "samples"):
        assert len({row[0] for row in expected[name]}) > 3
    assert expected["greedy"] != expected["drawn"]


def test_four_processes_and_single_precision(tmp_path, rank_pool):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    rank_pool.run(ranks.save_shared, 4, str(tmp_path), "gpt2", tokenizer.vocab_size, Sizes(tensor=4))
    expected = ranks.texts(str(tmp_path), precision="32")
    for found in rank_pool.run(ranks.texts, 4, str(tmp_path), Sizes(tensor=4), "32"):
        close(found, expected, 1e-3)


def test_each_process_holds_its_part(saved, rank_pool):
    run, _ = saved
    config = load_model(run, precision="64").model.config
    for found in rank_pool.run(ranks.local_shapes, 2, run, Sizes(tensor=2)):
        assert found["class"] == "ReadingLinear"
        assert found["table"] == (config.padded_vocab_size // 2, 32)
        assert found["cache"] == (2, 1, config.kv_heads // 2, 8, 8)


@pytest.mark.parametrize("sizes", [Sizes(tensor=2), Sizes(pipeline=2)], ids=str)
def test_a_conversation_stops_at_the_same_piece_everywhere(saved, rank_pool, sizes):
    run, _ = saved
    loaded = load_model(run, precision="64")
    (whole,) = complete(loaded, ["a dog"], Sampling(tokens_to_generate=30), numbers=[1])
    first, second = rank_pool.run(ranks.talk, 2, run, sizes, 2)
    assert first == second
    number, written = first
    assert number == 2
    assert written.startswith("the cat")
    assert written.endswith("\na dog" + whole.text + "\n")


def test_a_model_that_cannot_be_shared_is_told_with_legal_sizes(saved, rank_pool):
    run, _ = saved
    (said, *others) = rank_pool.run(ranks.refusal, 3, run, Sizes(tensor=3))
    assert others == [said] * 2
    assert "model.tensor_model_parallel_size: 3 does not divide heads" in said
    assert "tensor ∈ {1, 2" in said
    for sizes, words in (
        (Sizes(pipeline=3), "3 stages for 2 layers"),
        (
            Sizes(pipeline=3, layers=(1, 1, 1)),
            "model.pipeline_layers: 1, 1, 1 make 3 layers, the model has 2",
        ),
    ):
        (said, *others) = rank_pool.run(ranks.refusal, 3, run, sizes)
        assert others == [said] * 2
        assert words in said


@pytest.mark.parametrize(("saved_in", "read_in"), [("32", "64"), ("64", "32")])
def test_a_checkpoint_is_read_in_another_precision(tmp_path, saved_in, read_in):
    keeper = Checkpointer(tmp_path / "checkpoints", Topology.single())
    model = tiny_model(precision=saved_in)
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    keeper.save(1, tensors, describe("gpt", model.config), config_yaml="", tokenizer=None)
    read = load_model(tmp_path, precision=read_in).model
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        logits, expected = read.logits(read(tokens)), model.logits(model(tokens))
    assert logits.dtype == {"32": torch.float32, "64": torch.float64}[read_in]
    assert torch.allclose(logits.double(), expected.double(), rtol=1e-4, atol=1e-3)
