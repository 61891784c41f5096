"""The same command line in several processes."""

from __future__ import annotations

import sys

from megalith.topology.spawn import spawn


def again(count: int) -> int:
    """Run this command line in `count` processes of this host. → the exit code of the first that failed, or 0."""
    return spawn(count, [sys.executable, "-m", "megalith", *sys.argv[1:]])
