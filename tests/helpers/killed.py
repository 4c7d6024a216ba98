"""Trainings that are killed: forked children that end with SIGKILL at a counted call of a function.

As a program it answers jobs, a line of JSON each, so that the imports are paid once.
"""

import faulthandler
import gc
import json
import math
import os
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import people
import warm
from lore.experiments import judging
from lore.experiments import runner as experiments
from lore.methods.mixed_logit import MixedLogit
from lore.methods.ridge_bt import RidgeBT

MOMENTS = 14
CASES: dict[str, dict[str, Any]] = {
    "joint": {"methods": ("lore",), "iterations": 10},
    "alternating": {"methods": ("lore",), "iterations": 10, "estimator": "lore_regularized"},
    "mixed logit": {"methods": ("mixed_logit",), "iterations": 2,
                    "mixed_logit": MixedLogit(floor=0.1, l_mu=1.0, tau2=1.0, pi=3.0)},
}  # fmt: skip
PEOPLE = people.planted(users=8, dialogues=4, F=5)
QUICK = {"checkpoint_every": 2, "few_shot_iterations": 2, "ridge_bt": RidgeBT(strength=1.0)}
PATIENCE = 120  # seconds after which a child says where it hangs, and ends
WRITES = {"open", "write", "write_record", "write_end_of_file", "replace", "unlink", "mkdir"}


class Job(NamedTuple):
    """Runs of one case, in folders of their own: one undisturbed, the others killed and resumed."""

    case: str
    processes: int
    folder: str

    def work(self, folder: Path) -> None:
        """What is killed."""
        people.fit(PEOPLE, folder, **QUICK | CASES[self.case])

    def be(self, name: str, rank: int, meeting: str, limit: tuple[str, float] | None) -> None:
        """A process of a run, which ends with SIGKILL at so many "calls", or calls that write; with
        a limit it notes how many there were."""
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(self.processes)}
        if self.processes > 1:
            where = {"init_method": f"file://{meeting}", "rank": rank}
            dist.init_process_group("gloo", world_size=self.processes, **where)
        counts = {"calls": 0, "writes": 0}

        def count(_: FrameType, event: str, function: Any) -> None:
            if event in ("call", "c_call"):
                counts["calls"] += 1
                counts["writes"] += event == "c_call" and function.__name__ in WRITES
                if counts[limit[0]] >= limit[1]:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(limit and count)
        self.work(Path(self.folder, name))
        sys.setprofile(None)
        if limit:
            path = Path(self.folder, f"counts-{rank}")
            path.write_text(json.dumps(counts), encoding="utf-8")

    def run(self, name: str, limits: Mapping[int, tuple[str, float]]) -> None:
        """A run; when a process is killed at its limit the others are at once, as by torchrun."""
        meeting, ranks = tempfile.mktemp(dir=self.folder), range(self.processes)
        ranks = sorted(ranks, key=lambda rank: rank not in limits)
        works = [partial(self.be, name, rank, meeting, limits.get(rank)) for rank in ranks]
        children, ends = [warm.fork(work) for work in works], []
        is_killed = any(at < math.inf for _, at in limits.values())
        for number in children:
            if ends and is_killed:
                os.kill(number, signal.SIGKILL)
            ends.append(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]))
        assert ends[0] == -signal.SIGKILL if is_killed else not any(ends), (name, ends)

    def answer(self) -> list[str]:
        """Do all; the moments."""
        self.run("whole", dict.fromkeys(range(self.processes), ("calls", math.inf)))
        files = [Path(self.folder, f"counts-{rank}") for rank in range(self.processes)]
        counts = [json.loads(file.read_text()) for file in files]
        draw, moments = random.Random(17), []
        for number in range(MOMENTS):
            rank, what = draw.randrange(self.processes), ("calls", "writes")[number % 2]
            place = 0.99 * (number + draw.random()) / MOMENTS  # early, late and between
            moment = 1 + int(place * counts[rank][what])
            self.run(f"{number}", {rank: (what, moment)})
            self.run(f"{number}", {})
            moments.append(f"process {rank}, {what} {moment} of {counts[rank][what]}")
        return moments


def main() -> None:
    """Answer jobs until there are no more."""
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
