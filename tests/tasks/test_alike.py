"""Two processes that find different things say so, both of them, and go on where they find the same."""

from __future__ import annotations

import torch.distributed as dist

from megalith.errors import MegalithError
from megalith.tasks import alike


def attempt(check, *answers, **more):
    """What `check` raises on this rank, for what this rank finds."""
    before, alike.SETTLING = alike.SETTLING, 0.0
    try:
        check(*answers[dist.get_rank()], **more)
    except MegalithError as error:
        return str(error)
    finally:
        alike.SETTLING = before
    return ""


def test_configurations(rank_pool):
    same, other = "model:\n  lr: 1\n", "model:\n  lr: 2\n"
    assert rank_pool.run(attempt, 2, alike.same_configuration, (same,), (same,)) == ["", ""]
    first, second = rank_pool.run(attempt, 2, alike.same_configuration, (same,), (other,))
    assert first == second
    assert "(rank 1) was started with another configuration" in first
    assert "-  lr: 1" in first
    assert "+  lr: 2" in first


def test_data(rank_pool):
    plan = {"files": ["a"], "seed": 1}
    assert rank_pool.run(attempt, 2, alike.same_data, (plan, "hash"), (plan, "hash")) == ["", ""]
    changed = {"files": ["b"], "seed": 1}
    first, second = rank_pool.run(attempt, 2, alike.same_data, (plan, "hash"), (changed, "hash"))
    assert first == second
    assert "reads something else than rank 0 under the same names: files" in first
    (first, _) = rank_pool.run(attempt, 2, alike.same_data, (plan, "hash"), (plan, "another"))
    assert ": tokenizer" in first


def test_folders(rank_pool, tmp_path):
    there, private = tmp_path / "shared", tmp_path / "private"
    there.write_text("4711 on host-a")
    private.write_text("12 on host-b")

    def found(second, content=None):
        return rank_pool.run(attempt_folder, 2, there, second, content)

    assert found(there) == found(there, "4711 on host-a") == ["", ""]
    for second, content in ((tmp_path / "missing", None), (private, "4711 on host-a")):
        assert all("does not see" in said for said in found(second, content))


def attempt_folder(first, second, content):
    return attempt(alike.seen_by_all, (first, "a key"), (second, "a key"), content=content)
