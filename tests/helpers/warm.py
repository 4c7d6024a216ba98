"""Scripts in processes of their own that share one process's imports, which take seconds.

    python tests/helpers/warm.py SOCKET                    imports, forks for those who ask
    python tests/helpers/warm.py SOCKET NUMBER SCRIPT ...  asks, and is to its caller the script

The script has the asking process's folder, environment and files 0, 1 and 2, is sent its signals,
and ends with it. Of several processes each has its rank, and when one fails the others are stopped,
as by torchrun. Plots and pages are not drawn: they are made from a run's results alone.
"""

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def ask(server: str, number: str, *words: str) -> None:
    """Have a script run and end as it does."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(server)
        for stop in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stop, lambda number, _: line.send(bytes([number])))
        asked = {"number": int(number), "words": words, "cwd": os.getcwd(), "env": dict(os.environ)}
        socket.send_fds(line, [json.dumps(asked).encode()], [0, 1, 2])
        status = int(line.recv(16) or b"1")
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL is as it was
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def serve(path: str) -> None:
    """Import, then answer until whoever started this process has ended."""
    warm_up()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while sys.stdin not in (ready := select.select([server, sys.stdin], [], [], 1)[0]):
            if ready:
                line = server.accept()[0]
                fork(lambda line=line: keep(line))
                line.close()
            with contextlib.suppress(ChildProcessError):  # there are none
                os.waitpid(-1, os.WNOHANG)


def warm_up() -> None:
    """Import what scripts import at first or later."""
    import torch
    from tqdm import tqdm
    from transformers import AutoTokenizer, LlamaForSequenceClassification  # noqa: F401

    sys.path.insert(0, str(ROOT))
    from lore.experiments import runner as experiments  # noqa: F401
    from lore.experiments.report import tables as reports

    torch.set_num_threads(1)  # a forked child cannot use its parent's threads
    tqdm.set_lock(threading.RLock())  # its own is shared by all children: who is killed keeps it
    torch.optim.Adam([torch.zeros(1, requires_grad=True)]).zero_grad()  # imports torch._dynamo
    reports.write_plots = reports.write_report = lambda *given: []
    gc.freeze()  # in a child, the collector's rounds would copy the pages of all that is imported


def fork(work: Callable[[], int | None]) -> int:
    """A child that does some work and ends with the status it returns; its number."""
    child, status = os.fork(), 1
    if child:
        return child
    try:
        status = work() or 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def keep(line: socket.socket) -> None:
    """Start a script's processes, send them signals, and say how they ended."""
    os.setsid()
    text, files, _, _ = socket.recv_fds(line, 1 << 20, 3)
    asked = json.loads(text)
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ |= asked["env"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": asked["number"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [together | {"RANK": i, "LOCAL_RANK": i} for i in range(asked["number"])]
    children = {fork(lambda rank=rank: be(asked["words"], rank)) for rank in ranks}
    status = 0  # of the first that fails
    while children:
        if select.select([line], [], [], 0.01)[0]:
            said = line.recv(1)
            if not said:  # who asked has ended
                os.killpg(0, signal.SIGKILL)
            for child in children:
                os.kill(child, said[0])
        ended, how = os.waitpid(-1, os.WNOHANG)  # 0 where none has ended
        children -= {ended}
        for child in children if how else ():  # as torchrun does
            os.kill(child, signal.SIGTERM)
        status = status or os.waitstatus_to_exitcode(how)
    line.send(str(status).encode())


def be(words: Sequence[str], rank: Mapping[str, Any]) -> None:
    """Be a script."""
    os.environ |= {name: str(value) for name, value in rank.items()}
    script = Path(words[0]).resolve()
    sys.argv, sys.path[0] = list(words), str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    (ask if len(sys.argv) > 2 else serve)(*sys.argv[1:])
