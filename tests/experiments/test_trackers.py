"""Losses and figures in other programs: only where these are installed, in the run's folder."""

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import pytest

import people
from lore.common.files import InputError
from lore.experiments import runner
from lore.experiments.trackers import check_tracker, track

FIT = {"label": "LoRe K=2", "settings": {"rank": 2}, "losses": [0.7, 0.5, 0.4], "loss_step": 10,
       "tried": [{"l": 1, "loss": 0.6}, {"l": 2, "note": "?"}, {"l": 3, "loss": 0.5}]}  # fmt: skip
RECORDS = [
    {"label": label, "control": control, "set": name, "shots": shots, "accuracy": [0.5, 1.0],
     "log_loss": [0.25, 0.75]}
    for label, control, name, shots in [
        ("LoRe K=2", "", "seen", None), ("LoRe K=2", "", "unseen", 4), ("BT", "", "unseen", 8),
        ("LoRe K=2", "shuffled", "train", None)]
]  # fmt: skip
METHOD = {"fits": [FIT], "records": RECORDS}
EXPECTED = {
    "loss": {0: 0.7, 10: 0.5, 20: 0.4}, "validation/log_loss": {0: 0.6, 2: 0.5},
    "seen/accuracy": {0: 0.75}, "seen/log_loss": {0: 0.5},
    "unseen/accuracy": {4: 0.75}, "unseen/log_loss": {4: 0.5},
}  # fmt: skip


@pytest.fixture
def wandb(monkeypatch) -> dict[str, list]:
    """What Weights & Biases is told of each run, by its name."""
    told: dict[str, list] = {}

    class Run:
        def __init__(self, **about: Any) -> None:
            self.told = told[about["name"]] = [about]

        def log(self, values: dict[str, float], step: int) -> None:
            assert step > self.told[-1].get("step", -1)  # as wandb demands it
            self.told.append({"step": step, **values})

        def __enter__(self) -> "Run":
            return self

        def __exit__(self, *_: Any) -> None:
            self.told.append("finished")

    module = types.ModuleType("wandb")
    module.init, module.__spec__ = Run, importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_wandb_gets_every_step_once_and_in_order(tmp_path, wandb):
    track("wandb", tmp_path, 3, METHOD)
    about, *steps, last = wandb["LoRe K=2, seed 3"]
    assert about == {"project": "LoRe", "group": tmp_path.name, "config": {"rank": 2},
                     "dir": tmp_path, "name": "LoRe K=2, seed 3"}  # fmt: skip
    keys = {key for line in steps for key in line} - {"step"}
    found = {key: {line["step"]: line[key] for line in steps if key in line} for key in keys}
    assert found == EXPECTED and last == "finished"


def test_tensorboard_reads_what_is_written(tmp_path):
    module = "tensorboard.backend.event_processing.event_accumulator"
    events = pytest.importorskip(module, reason="tensorboard is not installed")
    track("tensorboard", tmp_path, 3, METHOD)
    found = events.EventAccumulator(str(tmp_path / "tensorboard" / "LoRe K=2, seed 3")).Reload()
    read = {key: {e.step: e.value for e in found.Scalars(key)} for key in found.Tags()["scalars"]}
    assert read == {key: pytest.approx(values) for key, values in EXPECTED.items()}


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_what_is_not_installed_is_refused(monkeypatch, tracker):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"--log {tracker}: it is not installed; pip install"):
        check_tracker(tracker)
    check_tracker("none")


def test_a_run_logs_every_fit_of_every_seed(tmp_path, monkeypatch, wandb):
    monkeypatch.setattr(runner, "report", lambda folder: "")
    _, folder = people.fit(people.planted(users=4), tmp_path, seeds=(0, 1), log="wandb")
    fits = [
        (repeat["seed"], fit)
        for repeat in people.saved(folder)["seeds"]
        for method in repeat["methods"].values() for fit in method["fits"]
    ]  # fmt: skip
    assert len(fits) == len(wandb) > 6
    for seed, fit in fits:
        _, *steps, last = wandb[f"{fit['label']}, seed {seed}"]
        assert [line["loss"] for line in steps if "loss" in line] == fit.get("losses", [])
        assert last == "finished" and "seen/accuracy" in steps[0]
