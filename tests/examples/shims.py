"""Stand-ins for what is on a cluster's PATH, so that the scripts of examples/ run as they are.

record   megalith, torchrun, srun, scontrol write down how they were called
run      srun starts its tasks on this machine, with the variables that SLURM sets
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = """#!{python}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + chr(10))
"""
MEGALITH = """#!/bin/sh
exec {python} -m megalith "$@"
"""
TORCHRUN = """#!/bin/sh
exec {python} -m torch.distributed.run "$@"
"""
SRUN = '''#!{python}
"""TASKS tasks on two hosts that are one; their process ids go to the file PIDS. Ends with the highest exit code."""
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
count = int(os.environ["TASKS"])
step = dict(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS=str(count), SLURM_NTASKS=str(count),
            SLURM_STEP_NODELIST="localhost", SLURM_JOB_NODELIST="localhost")
tasks = [subprocess.Popen(command, env=dict(os.environ, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **step))
         for i in range(count)]
with open(os.environ["PIDS"], "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
'''


class Scripts:
    """Runs scripts in a folder, with stand-ins before everything else on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.pids = folder, folder / "calls.jsonl", folder / "pids"
        self.bin = folder / "bin"
        self.bin.mkdir()

    def stand_in(self, **programs: str) -> None:
        for name, text in programs.items():
            (self.bin / name).write_text(text.replace("{python}", sys.executable))
            (self.bin / name).chmod(0o755)

    def begin(self, script: Path, *words: str, **variables: str) -> subprocess.Popen:
        clean = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_"))
        }
        place = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "src"),
            "OMP_NUM_THREADS": "1",
        }
        job = (
            {"SLURM_JOB_ID": "4711", "SLURM_SUBMIT_DIR": str(script.parent)}
            if script.suffix == ".sbatch"
            else {}
        )
        files = {"CALLS": str(self.calls), "PIDS": str(self.pids)}
        return subprocess.Popen(
            ["bash", str(script), *words], cwd=self.folder, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={**clean, **place, **job, **files, **variables},
        )  # fmt: skip

    def called(self) -> list[list[str]]:
        """Every recorded call so far: program and words."""
        return (
            [json.loads(line) for line in self.calls.read_text().splitlines()] if self.calls.exists() else []
        )
