"""Several processes, and processes that are killed, by the scripts as a user runs them."""

import json
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx

import running
from lore.learning.basis import load_basis
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
        records = [[record for method in part["methods"].values() for record in method["records"]]
                   for part in (one, other)]  # fmt: skip
        for r, s in zip(*records, strict=True):
            assert all(r[key] == s[key] for key in ("label", "control", "set", "shots"))
            for key in ("accuracy", "log_loss"):
                assert abs(np.mean(r[key]) - np.mean(s[key])) < 0.02, (r["label"], r["set"], key)
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


FITS = """
import dataclasses, json, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
import planted
from lore.common.devices import processes
from lore.methods.mixed_logit import MixedLogit
from lore.methods.ridge_bt import RidgeBT

process, together = processes()
task = planted.task(users=40, shots=30, features=16)
task.train.dialogs = torch.arange(len(task.train)) // 3
task.train.weight = 0.5 + 0.5 * (torch.arange(len(task.train)) % 3).double()
here = dict(process=process, processes=together, stream=sys.argv[4] == "true")
task, found = dataclasses.replace(task, **here), {{}}
for name, method in (("ridge_bt", RidgeBT()), ("mixed_logit", MixedLogit())):
    (fit,) = method.fit(task)
    own = fit.adapt(fit.view(task.few), task.few, 0)
    losses = [
        data.log_losses(fit.logits(fit.view(data), state, data.user)).tolist()
        for data, state in ((task.train, fit.users), (task.seen, fit.users), (task.unseen, own))
    ]
    found[name] = {{"facts": fit.describe(), "losses": losses}}
if process == 0:
    json.dump(found, open(sys.argv[2], "w"))
"""


def test_mixed_logit_and_ridge_bt_are_the_same_in_every_form(tmp_path):
    """In memory, streamed, and spread over processes: the same choice and the same losses."""
    (tmp_path / "fits.py").write_text(FITS.format(root=str(running.ROOT)))
    found = []
    for name, processes, stream in (("one", 1, "false"), ("disk", 1, "true"), ("two", 2, "true")):
        run = running.invoke if processes == 1 else partial(running.run, processes=processes)
        outcome = run(str(tmp_path / "fits.py"), {"results": tmp_path / name, "stream": stream})
        assert outcome.status == 0, outcome.err
        found.append((tmp_path / name).read_text())
    expected = json.loads(found[0], parse_float=lambda x: approx(float(x), rel=1e-6, abs=1e-6))
    facts = json.loads(found[0])["mixed_logit"]["facts"]
    assert facts["chosen"]["tau2"] > 0 and len(facts["tried"]) > 5
    for other in found[1:]:
        assert json.loads(other) == expected


DYING = """
import os, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from pathlib import Path
import people
from lore.experiments import runner as experiments
from lore.experiments import splits
from lore.methods.lore import Lore

fit = Lore.fit

def die_later(lore, task):
    if task.seed == 1 and task.process == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return fit(lore, task)

Lore.fit = die_later
lore = Lore(ranks=(2,), iterations=40, few_shot_iterations=40)
where = dict(progress=False, name="here", results=Path(sys.argv[4]))
settings = experiments.Settings(lore=lore, seeds=(0, 1), **where)
people.train_basis(splits.given_split(Path(sys.argv[2])), settings)
"""


def test_when_one_process_dies_what_is_finished_is_kept(dataset, tmp_path):
    (tmp_path / "dying.py").write_text(DYING.format(root=str(running.ROOT)))
    settings = {"data": dataset("PRISM").data, "results": tmp_path}
    outcome = running.run(str(tmp_path / "dying.py"), settings, processes=2)
    assert outcome.status == -signal.SIGKILL
    done = [list(part["methods"]) for part in saved(tmp_path / "PRISM/here")["seeds"]]
    four = ["reference", "bt", "own", "ridge_bt"]
    assert done == [[*four, "lore"], four]
    settings |= {"seeds": [0, 1], "ranks": 2, "alpha": 0, "estimator": "lore", **QUICK}
    finished = running.invoke("PRISM/train_basis.py", settings)
    assert finished.status == 0, finished.err
    done = [list(part["methods"]) for part in saved(tmp_path / "PRISM/here")["seeds"]]
    assert done == [["reference", "bt", "own", "ridge_bt", "lore"]] * 2
