"""A script in several processes, as torchrun starts it, that share one process's imports.

    python tests/ranks.py NUMBER SCRIPT [FLAGS ...]
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
import traceback
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import experiments  # noqa: F401  what takes long to import
import reports


def rank(number: int, script: Path) -> None:
    """Be one of the processes."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    status = 1
    try:
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> int:
    """The worst status of all processes."""
    number, script = int(sys.argv[1]), Path(sys.argv[2]).resolve()
    sys.argv = [script.name, *sys.argv[3:]]
    sys.path.insert(0, str(script.parent))
    torch.set_num_threads(1)  # a forked child cannot use its parent's threads
    reports.write_plots = reports.write_report = lambda *given: []  # drawn from the results alone
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for one in range(number):
        children.append(os.fork())
        if not children[-1]:
            rank(one, script)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main())
