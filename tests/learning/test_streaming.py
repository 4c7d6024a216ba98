"""Features read from disk at every pass give the rows that features in memory give."""

from pathlib import Path

import numpy as np
import pytest
import torch

import people
import planted
from lore import methods
from lore.experiments import runner as experiments
from lore.learning import comparisons
from lore.learning.comparisons import draw_shots
from lore.methods.baselines import OwnFit
from lore.methods.lore import Lore

FIGURES = ("accuracy", "log_loss", "brier", "label_sensitivity")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> people.People:
    """Six seen and six new users."""
    monkeypatch.setattr(experiments, "report", lambda folder: "")
    return people.planted(users=12, dialogues=4, F=5)


def same_rows(results: Path) -> list[tuple]:
    """The labels, controls, sets and shots of two runs, whose figures differ by rounding alone."""
    expected, found = (people.records(results / "planted" / name) for name in ("False", "True"))
    assert list(found) == list(expected)
    for row, record in expected.items():
        assert record.keys() == found[row].keys()
        for name in FIGURES:
            if record.get(name) is not None:
                np.testing.assert_allclose(found[row][name], record[name], atol=1e-3, err_msg=row)
    return list(found)


@pytest.mark.slow
def test_every_method_and_shots_have_the_same_rows_streamed_and_in_memory(world, tmp_path):
    given = {name: methods.METHODS[name](**quick) for name, quick in planted.QUICK.items()}
    given["methods"] = tuple(methods.METHODS)
    for stream in (False, True):
        people.fit(world, tmp_path, name=str(stream), stream=stream, **given)
        few = people.settings(tmp_path / "few", name=str(stream), stream=stream)
        people.vary_fewshot(world.tasks(), few, [0, 1, 2], 2)
    labels = {label for label, *_ in same_rows(tmp_path)}
    assert "own model" in labels and len(labels) == 3 + len(methods.METHODS)
    assert {1, 2} <= {row[3] for row in same_rows(tmp_path / "few") if row[0] == "own model"}


def test_own_models_read_a_few_users_at_a_time(world, monkeypatch):
    read: list[int] = []

    def rows(index: torch.Tensor) -> torch.Tensor:
        read.append(len(index))
        return world.store.x[index]

    monkeypatch.setattr(comparisons, "PART_BYTES", 4 * 5 * 12)  # twelve comparisons: two users
    monkeypatch.setattr(world.store, "rows", rows)
    found = []
    for stream in (False, True):
        read.clear()
        task = world.tasks().task(0, torch.device("cpu"), None, stream, (0, 1))
        fit = OwnFit(Lore(few_shot_iterations=20), task)
        picked = torch.cat(draw_shots(task.few, [2], 1, 0).rows)
        users = task.few.pick(picked, torch.bincount(task.few.user[picked]))
        state = fit.adapt(fit.view(task.few)[picked], users, 0)
        logits = fit.logits(fit.view(task.unseen), state, task.unseen.user)
        found.append((fit.users, state, logits))
    assert max(read) <= 2 * 12 < len(task.train)
    torch.testing.assert_close(*found)
