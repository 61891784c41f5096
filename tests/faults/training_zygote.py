"""Imports everything once, then forks a process for each training run: a run starts in milliseconds and can be killed alone.

Reads JSON lines: {"run": [command line], "log": file} → {"pid": …}; {"wait": pid} → {"code": …}, negative for a signal.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    import megalith.cli.pretrain
    import megalith.tasks.pretrain  # noqa: F401
    from megalith.cli.main import main as megalith_main

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.argv = ["megalith", *request["run"]]
            code = 1
            try:
                megalith_main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(bool(end.code))
            finally:
                sys.stdout.flush()
                os._exit(code or 0)
        print(json.dumps({"pid": pid}), flush=True)


if __name__ == "__main__":
    main()
