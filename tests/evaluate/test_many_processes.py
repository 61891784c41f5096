"""Evaluation shared out among processes: counts are those of one process exactly, sums to rounding, remainders included."""

import json

import pytest

from megalith.topology.sizes import Sizes
from tests.evaluate import ranks
from tests.generate.ranks import save_shared
from tests.generate.tiny import tiny_tokenizer

PASSAGES = [
    "the cat sat on the mat",
    "a dog sat on the cat",
    "the cat " * 30 + "sat",
    "naïve cat",
    "on the mat the cat sat on the dog",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, rank_pool):
    """A run folder of two stages, files to measure on, and one process's numbers."""
    run = tmp_path_factory.mktemp("run")
    tokenizer = tiny_tokenizer(run / "tokenizer")
    rank_pool.run(save_shared, 4, str(run), "llama", tokenizer.vocab_size, Sizes(pipeline=2, tensor=2))
    (run / "text.txt").write_text(
        " = The cat = \n \n The cat 's mat , a dog ( sat ) on the cat . \n" * 7, "utf-8"
    )
    (run / "lambada.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in PASSAGES), "utf-8")
    return str(run), ranks.reports(str(run), str(run))


LAYOUTS = [
    (Sizes(replicate=2), 2),
    (Sizes(replicate=3), 2),
    (Sizes(replicate=4), 100),
    (Sizes(tensor=2), 2),
    (Sizes(tensor=2, replicate=2), 3),
    (Sizes(pipeline=2), 2),
    (Sizes(tensor=2, pipeline=2), 3),
]


@pytest.mark.parametrize(("sizes", "batch_size"), LAYOUTS, ids=str)
def test_reports_do_not_depend_on_the_processes(saved, rank_pool, sizes, batch_size):
    run, expected = saved
    for found in rank_pool.run(ranks.reports, sizes.world, run, run, sizes, batch_size):
        for name in ("perplexity", "wikitext", "lambada"):
            for key, value in expected[name].items():
                wanted = pytest.approx(value, rel=1e-11) if isinstance(value, float) else value
                assert found[name][key] == wanted, (name, key)
        assert found["untrained"] == pytest.approx(expected["untrained"], rel=1e-6)


def test_one_copy_each_gives_the_same_bits(saved, rank_pool):
    """Batches are the same on every process, and their sums are added up exactly."""
    run, _ = saved
    alone, *_ = rank_pool.run(ranks.reports, 1, run, run)
    assert rank_pool.run(ranks.reports, 3, run, run, Sizes(replicate=3)) == [alone] * 3


def test_progress_ends_at_the_end(saved, rank_pool):
    run, _ = saved
    (alone,) = rank_pool.run(ranks.progress, 1, run, 1)
    assert alone == [(done, 11) for done in (2, 4, 6, 8, 10, 11)]
    main, *_ = rank_pool.run(ranks.progress, 4, run, 4)
    assert main == [(8, 11), (11, 11)]
