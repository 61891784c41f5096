"""What the operating system says of this machine: processor, cores, memory, disk. Containers' limits count.

Asks; changes nothing. Unknown answers are None, never guesses.
"""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Facts of the host. Sizes in bytes."""

    system: str
    processor: str
    cores: float
    memory: int | None
    memory_free: int | None
    disk: int
    disk_free: int
    folder: Path
    writable: bool


def look(folder: Path | None = None) -> Machine:
    """The machine as this process may use it; the disk is that of `folder` (default: the working directory)."""
    folder = (folder or Path.cwd()).resolve()
    disk = shutil.disk_usage(folder)
    total, free = memory()
    return Machine(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        processor=processor(),
        cores=cores(),
        memory=total,
        memory_free=free,
        disk=disk.total,
        disk_free=disk.free,
        folder=folder,
        writable=os.access(folder, os.W_OK),
    )


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> float:
    """Cores that this process may use: its affinity, or the container's share of time where that is less."""
    affinity = getattr(os, "sched_getaffinity", None)
    own = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    quota = _words("/sys/fs/cgroup/cpu.max")
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:
        return min(own, int(quota[0]) / int(quota[1]))
    return own


def memory() -> tuple[int | None, int | None]:
    """(all, free) memory in bytes; a container's limit where there is one."""
    info = {words[0].rstrip(":"): words[1] for words in _table("/proc/meminfo") if len(words) > 1}
    if "MemTotal" not in info:
        return _sysconf_memory(), None
    total, free = int(info["MemTotal"]) * 1024, int(info.get("MemAvailable", info["MemTotal"])) * 1024
    limit, used = _words("/sys/fs/cgroup/memory.max"), _words("/sys/fs/cgroup/memory.current")
    if limit and limit[0].isdigit() and int(limit[0]) < total:
        total = int(limit[0])
        free = min(free, total - int(used[0])) if used else min(free, total)
    return total, free


def _sysconf_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _table(path: str) -> list[list[str]]:
    try:
        return [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []


def _words(path: str) -> list[str]:
    return [word for line in _table(path) for word in line]
