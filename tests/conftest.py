"""Shared fixtures: real data through MEGALITH_DATA, and a closing line that counts what was skipped for want of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def data_folder(name: str) -> Path:
    """`$MEGALITH_DATA/name`, or skip with the reason. Real data is used, never required."""
    root = os.environ.get("MEGALITH_DATA")
    if not root:
        pytest.skip("real data: MEGALITH_DATA is not set")
    folder = Path(root) / name
    if not folder.exists():
        pytest.skip(f"real data: no {name} in MEGALITH_DATA")
    return folder


@pytest.fixture
def real_data():
    """A function: name of a folder under MEGALITH_DATA → its path (skips when absent)."""
    return data_folder


@pytest.fixture(scope="session")
def rank_pool():
    """Four processes over gloo, started when first needed."""
    from megalith.testing.pool import RankPool

    pool = RankPool(4, timeout=240)  # a machine may have other work
    yield pool
    pool.close()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    ledger: dict[str, list[int]] = {}
    for outcome, index in (("passed", 0), ("failed", 1), ("skipped", 2)):
        for report in terminalreporter.stats.get(outcome, []):
            if outcome == "passed" and report.when != "call":
                continue
            parts = report.nodeid.split("/")
            tier = parts[1] if len(parts) > 2 else "unit"
            ledger.setdefault(tier, [0, 0, 0])[index] += 1
    for tier, (passed, failed, skipped) in sorted(ledger.items()):
        terminalreporter.write_line(
            f"{tier:<14} {passed:>5} passed  {failed:>3} failed  {skipped:>3} skipped"
        )
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    for mark, want in (
        ("real data:", "real data (MEGALITH_DATA)"),
        ("two machines:", "network namespaces (root)"),
    ):
        if without := sum(mark in reason for reason in reasons):
            terminalreporter.write_line(f"{without} tests were skipped for want of {want}")
