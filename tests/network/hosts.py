"""Two machines on one: network namespaces with a cable between them, each with a name, a table of hosts and mounts of its own.

    Hosts ─┬─ "a"  10.77.0.1   begin(command) ─▶ a process there
           └─ "b"  10.77.0.2   kill(…)  cut()

Names carry our process id and a random part, so that several suites can run at the same time. `close` ends all processes
that are left and removes the namespaces; what a suite that was killed has left, the next one removes. Needs root and `ip`:
`why_not` says what is missing.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GLOO_SOCKET_IFNAME",
    "PYTEST_",
)
INSIDE = """
hostname "$1" && mount --bind "$2" /etc/hosts && shift 2
while [ "$1" != -- ]; do mount -t tmpfs none "$1" || exit 1; shift; done
shift && exec "$@"
"""
"""In the new namespaces: name, table of hosts, empty folders over those that this machine does not share, and the command."""


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
    return done.stdout


def why_not() -> str:
    """Why two machines cannot be made here; empty when they can."""
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if sys.platform != "linux" or missing:
        return f"two machines: needs Linux with {' and '.join(missing) or 'ip'}"
    if os.geteuid() != 0:
        return "two machines: needs root, for network namespaces"
    try:
        with Hosts() as hosts, hosts.begin("a", ["true"]) as process:
            return "" if process.wait(timeout=30) == 0 else "two machines: namespaces cannot be entered here"
    except subprocess.CalledProcessError as error:
        return f"two machines: {' '.join(error.cmd)}: {error.stderr.strip()}"


def sweep() -> None:
    """Remove the machines of test processes that are gone."""
    for space in (line.split()[0] for line in ip("netns", "list").splitlines() if line):
        found = re.fullmatch(r"megalith-(\d+)-\w+-[ab]", space)
        if found and not Path(f"/proc/{found[1]}").exists():
            with suppress(subprocess.CalledProcessError):  # another suite may be sweeping, too
                remove(space)


def remove(space: str) -> None:
    """End what runs in a namespace, and remove it."""
    for pid in ip("netns", "pids", space).split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    ip("netns", "del", space)


class Hosts:
    """The two machines. `own_names`: as some systems have it, a machine's own name is its loopback address."""

    def __init__(self, *, own_names: bool = False) -> None:
        self.name = f"megalith-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._tables = {host: Path(f"/tmp/{self.name}-{host}.hosts") for host in ADDRESSES}
        self._own_names = own_names
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> Hosts:
        sweep()
        try:
            for host in ADDRESSES:
                ip("netns", "add", self.space(host))
            a, b = self.space("a"), self.space("b")
            ip("link", "add", "veth0", "netns", a, "type", "veth", "peer", "name", "veth0", "netns", b)
            for host, address in ADDRESSES.items():
                ip("-n", self.space(host), "addr", "add", f"{address}/24", "dev", "veth0")
                for link in ("lo", "veth0"):
                    ip("-n", self.space(host), "link", "set", link, "up")
                self._tables[host].write_text(self._table(host))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def space(self, host: str) -> str:
        return f"{self.name}-{host}"

    def _table(self, host: str) -> str:
        own = "127.0.1.1" if self._own_names else ADDRESSES[host]
        rows = [f"{own if name == host else address} host-{name}" for name, address in ADDRESSES.items()]
        return "\n".join(["127.0.0.1 localhost", *rows, ""])

    def begin(
        self,
        host: str,
        command: list[str],
        *,
        log: Path | None = None,
        private: tuple[Path, ...] = (),
        **variables: str,
    ) -> subprocess.Popen:
        """A process there, with everything it says in `log`. `private`: folders that are this host's own, and empty."""
        inside = ["sh", "-c", INSIDE, "sh", f"host-{host}", str(self._tables[host]), *map(str, private), "--"]
        output = open(log, "ab") if log else subprocess.DEVNULL  # noqa: SIM115
        clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.space(host), "unshare", "--uts", "--mount", *inside, *command],
            env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}", **variables},
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        if log:
            output.close()
        self._processes.append(process)
        return process

    def torchrun(
        self, host: str, *words: str, processes: int = 2, options: tuple[str, ...] = (), **more
    ) -> subprocess.Popen:
        """torchrun's agent, as a user of two machines would start it on each."""
        meeting = ("--rdzv-backend=c10d", "--rdzv-endpoint=host-a:29400", f"--rdzv-id={self.name}")
        how = (f"--nproc-per-node={processes}", "--monitor-interval=0.3", *meeting)
        return self.begin(
            host,
            [sys.executable, "-m", "torch.distributed.run", *how, *options, "-m", "megalith", *words],
            **more,
        )

    def processes(self, host: str) -> dict[int, str]:
        """Process ids of a host, and their command lines."""
        found = {}
        for pid in ip("netns", "pids", self.space(host)).split():
            with suppress(OSError):
                found[int(pid)] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        return found

    def kill(self, host: str, *, agent: bool = False) -> int:
        """kill -9 to all training processes of a host, and to its agent. → how many there were"""
        found = self.processes(host)
        for pid in sorted(found, reverse=True):
            if agent or "torch.distributed.run" not in found[pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return sum("-m megalith" in line and "torch.distributed.run" not in line for line in found.values())

    def cut(self) -> None:
        """Pull the cable."""
        ip("-n", self.space("a"), "link", "set", "veth0", "down")

    def mend(self) -> None:
        """Plug it in again."""
        ip("-n", self.space("a"), "link", "set", "veth0", "up")

    def close(self) -> None:
        """End what still runs, and remove the machines."""
        for host in ADDRESSES:
            with suppress(subprocess.CalledProcessError):
                remove(self.space(host))
            self._tables[host].unlink(missing_ok=True)
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
