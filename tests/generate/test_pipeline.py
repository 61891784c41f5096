"""A model in pipeline stages: each process holds its layers alone, however they are cut; tokens behind the vocabulary pass."""

from __future__ import annotations

import pytest

from megalith.topology.sizes import Sizes
from tests.generate import ranks
from tests.generate.families import save_family
from tests.generate.test_shared_model import close
from tests.generate.tiny import tiny_tokenizer

THREE = Sizes(pipeline=3)


@pytest.fixture(scope="module")
def deep(tmp_path_factory, rank_pool):
    """A run folder of a model with four layers, and what one process makes of it."""
    run = tmp_path_factory.mktemp("run")
    tokenizer = tiny_tokenizer(run / "tokenizer")
    rank_pool.run(ranks.save_shared, 2, str(run), "gpt2", tokenizer.vocab_size, Sizes(tensor=2), 4)
    return str(run), ranks.texts(str(run))


LAYOUTS = {
    "as even as can be": THREE,
    "by number": Sizes(pipeline=3, layers=(2, 1, 1)),
    "two copies": Sizes(pipeline=2, replicate=2),
}


@pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS)
def test_tokens_do_not_depend_on_the_stages(deep, rank_pool, sizes):
    run, expected = deep
    for found in rank_pool.run(ranks.texts, sizes.world, run, sizes):
        close(found, expected, 1e-9)


def test_each_process_holds_its_layers(deep, rank_pool):
    run, _ = deep
    first, second, third = rank_pool.run(ranks.local_names, 3, run, THREE)
    assert first == ({"token_embedding", "position_embedding", "blocks.0"}, 1)
    assert second == ({"blocks.1"}, 1)
    assert third == ({"token_embedding", "blocks.2", "blocks.3", "final_norm"}, 2)


@pytest.mark.parametrize("family", ["gpt", "t5"])
def test_tokens_behind_the_vocabulary(deep, rank_pool, tmp_path, family):
    run, _ = deep
    if family == "t5":
        run = str(tmp_path)
        save_family(run, family)
    expected = ranks.behind_virtual_tokens(run)
    assert len({tuple(row) for row in expected}) == 3
    assert rank_pool.run(ranks.behind_virtual_tokens, 3, run, THREE) == [expected] * 3
