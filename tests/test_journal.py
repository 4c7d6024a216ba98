"""Minima that were found before a kill are not sought again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import people
from lore.common.files import InputError
from lore.learning.method import Task
from lore.methods import ridge_bt
from lore.methods.fitting import population
from lore.methods.fitting.lbfgs import Minimum
from lore.methods.mixed_logit import MixedLogit
from lore.methods.ridge_bt import RidgeBT

METHODS = {"ridge_bt": RidgeBT(), "mixed_logit": MixedLogit(rank=2)}


class Stop(Exception):
    """A kill, for this process."""


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Planted people whose fits are kept."""
    world = people.planted(users=8, dialogues=4, F=5)
    task = world.tasks().task(0, torch.device("cpu"), None, False, (0, 1))
    task.state, task.checkpoint_every = tmp_path / "state-seed0-here", 1
    return task


@pytest.fixture
def sought(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How many minima were sought, and at which one the process stops."""
    known, real = {"count": 0, "stop": None}, ridge_bt.minimise

    def count(*given: Any) -> Minimum:
        known["count"] += 1
        if known["count"] == known["stop"]:
            raise Stop
        return real(*given)

    for module in (ridge_bt, population):
        monkeypatch.setattr(module, "minimise", count)
    return known


@pytest.mark.parametrize(
    "name", ["ridge_bt", pytest.param("mixed_logit", marks=pytest.mark.slow)]
)
def test_a_fit_goes_on_after_the_last_minimum(task, sought, name):
    method = METHODS[name]
    (whole,) = method.fit(replace(task, state=None))
    total = sought["count"]
    assert not list(task.state.parent.iterdir())
    sought |= {"count": 0, "stop": total - 1}
    with pytest.raises(Stop):
        method.fit(task)
    kept = len(list(task.state.parent.iterdir()))
    assert kept >= total - 3  # all but the last two, and the score test's
    sought |= {"count": 0, "stop": None}
    (found,) = method.fit(task)
    assert sought["count"] == total - kept
    assert found.describe() == whole.describe()
    assert torch.equal(found.users, whole.users)
    assert torch.equal(found.view(task.seen), whole.view(task.seen))


def test_without_an_interval_nothing_is_kept(task):
    task.checkpoint_every = 0
    RidgeBT().fit(task)
    assert not list(task.state.parent.iterdir())


def damaged(file: Path) -> None:
    """Cut the file."""
    file.write_bytes(file.read_bytes()[:-8])


def moved(file: Path) -> None:
    """Another minimum."""
    change(file, lambda about: None, 1.001)


def unread(file: Path) -> None:
    """Without its values."""
    change(file, lambda about: about.pop("values"))


def change(file: Path, how: Any, factor: float = 1.0) -> None:
    """Write the file anew with something else."""
    x = factor * load_file(file)["x"]
    with safe_open(file, "pt") as opened:
        text = opened.metadata()
    about = json.loads(text["about"])
    how(about)
    save_file({"x": x}, file, {**text, "about": json.dumps(about)})


@pytest.mark.parametrize("spoil", [damaged, moved, unread])
def test_a_damaged_minimum_is_named(task, spoil):
    RidgeBT().fit(task)
    (file,) = task.state.parent.glob("*-minima.0.3.safetensors")
    spoil(file)
    with pytest.raises(InputError) as found:
        RidgeBT().fit(task)
    assert str(file) in str(found.value) and "remove it to start again" in str(found.value)


@pytest.mark.parametrize("other", [RidgeBT(strength=0.1), "task"])
def test_minima_of_another_fit_are_refused(task, other):
    RidgeBT().fit(task)
    if other == "task":
        task, other = replace(task, seed=1), RidgeBT()
    with pytest.raises(InputError, match="belongs to a fit with other settings or data"):
        other.fit(task)


def test_minima_are_taken_up_from_disk_and_streamed(task, sought):
    (whole,) = RidgeBT().fit(task)
    sought["count"] = 0
    (found,) = RidgeBT().fit(replace(task, stream=True))
    assert sought["count"] == 0
    torch.testing.assert_close(found.direction, whole.direction, rtol=1e-6, atol=0)
