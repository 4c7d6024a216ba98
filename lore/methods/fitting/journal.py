"""Minima that a choice has found, kept on disk in order: a killed one need not seek them again.

A method that makes many small fits is repeated from the start after a kill, but for the
minimisations, whose results are read: what follows from a minimum takes one pass or none.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from lore.common.files import require, write_whole
from lore.common.tensors import checksum, read_tensors
from lore.learning.method import Task
from lore.methods.fitting.lbfgs import Minimum

log = logging.getLogger(__name__)

Seek = Callable[[], Minimum]
Kept = Callable[[str, Seek], Minimum]
REMEDY = "remove it to start again"


def anew(what: str, seek: Seek) -> Minimum:
    """Seek a minimum and keep nothing: for those who need no journal."""
    return seek()


class Journal:
    """The minima of one method's fit, in the order in which they are sought.

    Each process keeps all of them: where several train together, they read those that all have. A
    journal can be taken up on another device, or streamed. Without a folder in the task, or with
    ``checkpoint_every`` 0, nothing is kept.

    Args:
        task: of the fit.
        method: with its settings, a dataclass.
    """

    def __init__(self, task: Task, method: Any) -> None:
        self.path, self.process, self.count = None, task.process, 0
        if task.state is None or not task.checkpoint_every:
            return
        self.path = task.state.with_name(f"{task.state.name}-minima")
        self.owner = {
            "settings": asdict(method), "seed": task.seed, "processes": task.processes,
            "users": task.train.num_users, "features": task.train.num_features,
            "comparisons": [len(task.train), f"{float(task.train.weight.sum()):.9g}"],
        }  # fmt: skip
        known = 0
        while self._file(known).exists():
            known += 1
        if task.processes > 1:
            shared = torch.tensor(known)
            dist.all_reduce(shared, op=dist.ReduceOp.MIN)
            known = int(shared)
        self.known = known
        if known:
            last_file = self._file(known - 1)
            log.info("going on after %d minimisations, the last in %s", known, last_file)

    def __call__(self, what: str, seek: Seek) -> Minimum:
        """The next minimum: read if it is known, else sought and kept.

        Args:
            what: its name, which must be what it was when it was kept.
            seek: finds it.

        Raises:
            InputError: what was kept is damaged, or of another fit.
        """
        if self.path is None:
            return seek()
        file, self.count = self._file(self.count), self.count + 1
        if self.count <= self.known:
            return self._read(file, what)
        found = seek()
        about = {"owner": self.owner, "what": what, "values": found.values}
        about |= {"evaluations": found.evaluations}
        x = found.x.cpu().contiguous()
        text = {"about": json.dumps(about)}
        text["sha256"] = checksum({"x": x, **text})
        write_whole(file, lambda draft: save_file({"x": x}, draft, text))
        return found

    def _file(self, number: int) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{self.path.name}.{self.process}.{number}.safetensors")

    def _read(self, file: Path, what: str) -> Minimum:
        text, tensors = read_tensors(file, REMEDY)
        whole = text.pop("sha256", None) == checksum({**tensors, **text})
        require(whole, f"{file} is not as it was written: {REMEDY}")
        about = json.loads(text["about"])
        found = Minimum(tensors["x"].clone(), about["values"], about["evaluations"])
        owner = about["owner"], about["what"]
        same = owner == (json.loads(json.dumps(self.owner)), what)
        require(same, f"{file}: belongs to a fit with other settings or data; {REMEDY}")
        return found
