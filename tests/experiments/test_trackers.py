"""Losses and figures in other programs: only where these are installed, in the run's folder."""

import importlib.util
import json
from pathlib import Path

import pytest

import running
from lore.common.files import InputError
from lore.experiments.trackers import check_tracker, track
from people import saved

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
FAKE = """
import json, pathlib

class Run:
    def __init__(self, **about):
        self.last, self.file = -1, pathlib.Path(about["dir"]) / "wandb" / f"{about['name']}.jsonl"
        self.file.parent.mkdir(exist_ok=True)
        self.say(about | {"dir": str(about["dir"])})
    def say(self, line):
        with self.file.open("a") as file:
            file.write(json.dumps(line) + chr(10))
    def log(self, values, step):
        assert step > self.last  # as wandb demands it
        self.last = step
        self.say({"step": step, **values})
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.say("finished")

init = Run
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch) -> None:
    """What the project needs of Weights & Biases, kept in JSON lines."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "fake")


def lines(folder: Path, name: str) -> list:
    """What the stand-in has kept of a run."""
    text = (folder / "wandb" / f"{name}.jsonl").read_text(encoding="utf-8")
    return list(map(json.loads, text.splitlines()))


@pytest.mark.usefixtures("wandb")
def test_wandb_gets_every_step_once_and_in_order(tmp_path):
    track("wandb", tmp_path, 3, METHOD)
    about, *steps, last = lines(tmp_path, "LoRe K=2, seed 3")
    assert about == {"project": "LoRe", "group": tmp_path.name, "config": {"rank": 2},
                     "dir": str(tmp_path), "name": "LoRe K=2, seed 3"}  # fmt: skip
    found: dict = {}
    for line in steps:
        for key in line.keys() - {"step"}:
            found.setdefault(key, {})[line["step"]] = line[key]
    assert found == EXPECTED and last == "finished"


def test_tensorboard_reads_what_is_written(tmp_path):
    reason = "tensorboard is not installed"
    module = "tensorboard.backend.event_processing.event_accumulator"
    events = pytest.importorskip(module, reason=reason)
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


@pytest.mark.usefixtures("no_plots", "wandb")
def test_a_run_logs_every_fit_of_every_seed(dataset, tmp_path):
    settings = {"data": dataset("PRISM").data, "results": tmp_path, "name": "here", "ranks": 2,
                "iterations": 5, "few_shot_iterations": 5, "log": "wandb"}  # fmt: skip
    outcome = running.invoke("PRISM/train_basis.py", settings)
    assert outcome.status == 0, outcome.err
    folder = tmp_path / "PRISM" / "here"
    (part,) = saved(folder)["seeds"]
    fits = [fit for method in part["methods"].values() for fit in method["fits"]]
    assert len(fits) == len(list((folder / "wandb").iterdir())) > 3
    for fit in fits:
        _, *steps, last = lines(folder, f"{fit['label']}, seed 0")
        assert [line["loss"] for line in steps if "loss" in line] == fit.get("losses", [])
        assert last == "finished" and "seen/accuracy" in steps[0]
