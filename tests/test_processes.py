"""Several processes, and processes that are killed, by the scripts as a user runs them."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import running
from basis import load_basis
from people import repeats, saved
from running import table

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_plots")]
# Not --run, which torchrun takes for an option of its own.
QUICK = {"iterations": 40, "few_shot_iterations": 40, "progress": "false", "name": "here"}


def assert_same(a: Path, b: Path, ranks: tuple[int, ...]) -> None:
    """Two runs with the same results but for rounding."""
    for one, other in zip(repeats(a), repeats(b), strict=True):
        assert one["users"] == other["users"] and one["comparisons"] == other["comparisons"]
        assert list(one["methods"]) == list(other["methods"])
        for name, method in one["methods"].items():
            for r, s in zip(method["records"], other["methods"][name]["records"], strict=True):
                assert all(r[key] == s[key] for key in ("label", "control", "set", "shots"))
                for key in ("accuracy", "log_loss"):
                    assert abs(np.mean(r[key]) - np.mean(s[key])) < 0.02, (name, r["set"], key)
    for rank in ranks:
        bases = [load_basis(f / f"basis-K{rank:02d}.safetensors") for f in (a, b)]
        for name in ("V", "W", "W_unseen"):
            x, y = (getattr(basis, name) for basis in bases)
            assert torch.linalg.norm(x - y) <= 1e-3 * torch.linalg.norm(x), (rank, name)


@pytest.mark.parametrize(
    ("name", "processes", "more"),
    [("PRISM", 3, {"select_rank": "true"}),
     ("PersonalLLM", 2, {"users": 7, "unseen_users": 5, "pairs_per_user": 12,
                         "few_shot_pairs": 5})],
)  # fmt: skip
def test_processes_together_do_what_one_does(dataset, tmp_path, name, processes, more):
    settings = {"data": dataset(name).data, "ranks": [2, 3], **QUICK, **more}
    one = running.invoke(f"{name}/train_basis.py", {**settings, "results": tmp_path / "one"})
    assert one.status == 0, one.err
    settings["results"] = tmp_path / "more"
    several = running.run(f"{name}/train_basis.py", settings, processes)
    assert several.status == 0, several.err
    folders = [tmp_path / part / name / "here" for part in ("one", "more")]
    assert_same(*folders, (0, 1, 2, 3))
    assert list(table(one.out)) == list(table(several.out))
    assert several.out.count("Verdict:") == 1


def test_a_killed_training_goes_on_where_it_was(dataset, tmp_path):
    long = {**QUICK, "ranks": [2, 3], "iterations": 800, "checkpoint_every": 20}
    settings = {"data": dataset("PRISM").data, **long}
    whole, killed = ({**settings, "results": tmp_path / name} for name in ("whole", "killed"))
    process = running.start("PRISM/train_basis.py", killed)
    folder = tmp_path / "killed/PRISM/here"
    until = time.monotonic() + 120
    while len(list(folder.glob("state-seed0-lore*.pt"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(saved(folder)["seeds"][0]["methods"]) == ["reference", "bt", "own"]
    resumed = running.run("PRISM/train_basis.py", killed)
    assert resumed.status == 0, resumed.err
    (step,) = re.findall(r"going on from step (\d+)", resumed.err)
    assert 40 <= int(step) < 800
    outcome = running.invoke("PRISM/train_basis.py", whole)
    assert outcome.status == 0, outcome.err
    assert repeats(folder) == repeats(tmp_path / "whole/PRISM/here")
    for rank in (1, 2, 3):
        name = f"basis-K{rank:02d}.safetensors"
        bases = [load_basis(f / name) for f in (folder, tmp_path / "whole/PRISM/here")]
        assert torch.equal(bases[0].V, bases[1].V) and torch.equal(bases[0].W, bases[1].W)
    assert not list(folder.glob("state-*"))


def test_when_one_process_dies_the_others_stop(dataset, tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(running.ROOT)!r})\n"
        "import experiments, splits\n"
        "from pathlib import Path\n"
        "from methods.lore import Lore\n"
        "fit = Lore.fit\n"
        "def die_later(lore, task):\n"
        "    if task.seed == 1 and task.process == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return fit(lore, task)\n"
        "Lore.fit = die_later\n"
        "lore = Lore(ranks=(2,), iterations=40, few_shot_iterations=40)\n"
        "settings = experiments.Settings(lore=lore, seeds=(0, 1), progress=False, name='here',\n"
        "    results=Path(sys.argv[4]))\n"
        "experiments.train_basis(splits.given_split(Path(sys.argv[2])), settings)\n"
    )
    data = dataset("PRISM").data
    outcome = running.run(str(script), {"data": data, "results": tmp_path}, processes=2)
    assert outcome.status not in (0, None)
    assert "Signal 9 (SIGKILL)" in outcome.err
    done = [list(part["methods"]) for part in saved(tmp_path / "PRISM/here")["seeds"]]
    assert done == [["reference", "bt", "own", "lore"], ["reference", "bt", "own"]]
    settings = {"data": data, "results": tmp_path, "seeds": [0, 1], "ranks": 2, **QUICK}
    as_before = {"alpha": 0, "estimator": "lore"}
    finished = running.invoke("PRISM/train_basis.py", {**settings, **as_before})
    assert finished.status == 0, finished.err
    done = [list(part["methods"]) for part in saved(tmp_path / "PRISM/here")["seeds"]]
    assert done == [["reference", "bt", "own", "lore"]] * 2
