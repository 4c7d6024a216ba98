"""Trainings that are killed: forked children that end with SIGKILL at a counted call of a function.

As a program it answers jobs, a line of JSON each, so that the imports are paid once.
"""

import faulthandler
import gc
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

import people
from lore.experiments import judging
from lore.experiments import runner as experiments
from lore.methods.mixed_logit import MixedLogit
from lore.methods.ridge_bt import RidgeBT

MOMENTS = 20
CASES: dict[str, dict[str, Any]] = {
    "joint": {"methods": ("lore",), "iterations": 10},
    "alternating": {"methods": ("lore",), "iterations": 10, "estimator": "lore_regularized"},
    "mixed logit": {"methods": ("mixed_logit",), "iterations": 2,
                    "mixed_logit": MixedLogit(floor=0.1, l_mu=1.0, tau2=1.0, pi=3.0)},
}  # fmt: skip
PEOPLE = people.planted(users=8, dialogues=4, F=5)
QUICK = {"checkpoint_every": 2, "few_shot_iterations": 2, "ridge_bt": RidgeBT(strength=1.0)}
PATIENCE = 120  # seconds after which a child is taken to hang
WRITES = {"open", "write", "write_record", "write_end_of_file", "serialize_file",
          "replace", "unlink", "mkdir"}  # fmt: skip


class Calls:
    """Counts calls of functions, and of those that change files, while a function runs; ``kill`` is
    "calls" or "writes", and at which one the process ends with SIGKILL."""

    def __init__(self, kill: tuple[str, int] | None = None) -> None:
        self.counts, self.kill = {"calls": 0, "writes": 0}, kill

    def run(self, function: Callable[[], Any]) -> None:
        """Call a function, and count."""
        sys.setprofile(self._count)
        try:
            function()
        finally:
            sys.setprofile(None)

    def _count(self, _: FrameType, event: str, function: Any) -> None:
        if event not in ("call", "c_call"):
            return
        self.counts["calls"] += 1
        self.counts["writes"] += event == "c_call" and function.__name__ in WRITES
        if self.kill and self.counts[self.kill[0]] >= self.kill[1]:
            os.kill(os.getpid(), signal.SIGKILL)


def child(work: Callable[[], Any]) -> int:
    """Do work in a forked process; its number."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def status(number: int) -> int:
    """How a child ended: -9 by SIGKILL, -6 where it hung and had to say where it was."""
    until, ended = time.monotonic() + PATIENCE, (0, 0)
    while ended[0] == 0:
        if time.monotonic() > until:
            os.kill(number, signal.SIGABRT)
            until += PATIENCE
        time.sleep(0.002)
        ended = os.waitpid(number, os.WNOHANG)
    return os.waitstatus_to_exitcode(ended[1])


class Job:
    """Runs of one case, in folders of their own: one undisturbed, the others killed and resumed."""

    def __init__(self, case: str, processes: int, folder: str) -> None:
        self.settings, self.processes = QUICK | CASES[case], processes
        self.folder, self.meetings = Path(folder), 0

    def _work(self, rank: int, name: str, meeting: Path, calls: Calls | None) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(self.processes)}
        if self.processes > 1:
            where = {"init_method": f"file://{meeting}", "rank": rank}
            dist.init_process_group("gloo", world_size=self.processes, **where)
        fit = partial(people.fit, PEOPLE, self.folder / name, **self.settings)
        if calls is None:
            fit()
            return
        calls.run(fit)
        (self.folder / f"counts-{rank}").write_text(json.dumps(calls.counts))

    def start(self, name: str, calls: Sequence[Calls | None]) -> list[int]:
        """Start a run; what counts the calls of each process, if anything does."""
        self.meetings += 1
        meeting = self.folder / f"meeting-{self.meetings}"
        works = [partial(self._work, r, name, meeting, some) for r, some in enumerate(calls)]
        return [child(work) for work in works]

    def finish(self, name: str, counted: bool = False) -> None:
        """A run to its end."""
        calls = [Calls() if counted else None for _ in range(self.processes)]
        ends = [status(number) for number in self.start(name, calls)]
        assert ends == [0] * self.processes, (name, ends)

    def killed(self, name: str, rank: int, what: str, moment: int) -> None:
        """A run of which one process is killed, and at once the others, as torchrun does."""
        calls: list[Calls | None] = [None] * self.processes
        calls[rank] = Calls((what, moment))
        children = self.start(name, calls)
        end = status(children.pop(rank))
        for other in children:
            os.kill(other, signal.SIGKILL)
            status(other)
        assert end == -signal.SIGKILL, (name, end)

    def answer(self) -> list[str]:
        """Do all; the moments."""
        self.finish("whole", counted=True)
        files = [self.folder / f"counts-{rank}" for rank in range(self.processes)]
        counts = [json.loads(file.read_text()) for file in files]
        draw, moments = random.Random(17), []
        for number in range(MOMENTS):
            rank, what = draw.randrange(self.processes), ("calls", "writes")[number % 2]
            place = 0.99 * (number + draw.random()) / MOMENTS  # early, late and between
            moment = 1 + int(place * counts[rank][what])
            self.killed(f"{number}", rank, what, moment)
            self.finish(f"{number}")
            moments.append(f"process {rank}, {what} {moment} of {counts[rank][what]}")
        return moments


def main() -> None:
    """Answer jobs until there are no more."""
    faulthandler.enable()
    torch.set_num_threads(1)  # a forked child cannot use its parent's threads
    experiments.report = lambda folder: ""  # drawn from the results alone, and dear
    judging.PERMUTATIONS = judging.SHUFFLES = 1  # none of these is kept by itself
    for case in CASES.values():  # what is imported late, is imported here
        with tempfile.TemporaryDirectory() as folder:
            people.fit(PEOPLE, Path(folder), **QUICK, **case)
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = {"moments": Job(**json.loads(line)).answer()}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
