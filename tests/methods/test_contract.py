"""What every method must do, whatever it is: one test for each line of METHODS."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import people
import planted
from lore import methods
from lore.common.files import InputError
from lore.experiments import runner as experiments
from lore.learning.comparisons import Comparisons, Seed, Users
from lore.learning.method import Fitted, Task, check
from lore.methods.fitting import networks

# Fewer steps where the defaults take long; the same model otherwise.
QUICK: dict[str, dict[str, Any]] = {
    "lore": {"ranks": (3,), "iterations": 400},
    "pal": {"prototypes": (5,), "epochs": 10},
    "vpl": {"betas": (1e-4,), "hidden": 32, "epochs": 28},
    "mlp": {"ranks": (5,), "epochs": 10},
}
NETWORKS = {"pal", "vpl", "mlp"}  # seconds each
NAMED = [
    pytest.param(name, marks=pytest.mark.slow) if name in NETWORKS else name
    for name in methods.METHODS
]


@pytest.fixture(scope="module")
def task() -> Task:
    return planted.task()


@pytest.fixture(scope="module", params=NAMED)
def fit(request: pytest.FixtureRequest, task: Task) -> Fitted:
    """Each method's last fit on users whose tastes differ."""
    return _method(request.param).fit(task)[-1]


def _method(name: str) -> Any:
    return methods.METHODS[name](**QUICK.get(name, {}))


def _accuracy(fit: Fitted, data: Comparisons, state: torch.Tensor) -> float:
    return float(data.accuracies(fit.logits(fit.view(data), state, data.user)).mean())


def _adapted(fit: Fitted, data: Comparisons, seed: Seed = 0) -> torch.Tensor:
    return fit.adapt(fit.view(data), data, seed)


@pytest.mark.slow
def test_a_fit_says_what_it_is(fit: Fitted, task: Task):
    assert fit.label
    assert fit.users.shape == (task.train.num_users, len(fit.population_state))
    about = fit.describe()
    assert about["note"] and about["parameters"] > 0


def test_own_state_beats_nobodys_and_anothers(fit: Fitted, task: Task):
    if not fit.personal or fit.label == "PEBS":
        pytest.skip("nothing personal that accuracy could show")
    for data, own in ((task.seen, fit.users), (task.unseen, _adapted(fit, task.few))):
        accuracy = _accuracy(fit, data, own)
        assert accuracy > _accuracy(fit, data, fit.population_state.expand_as(own)) + 0.02
        assert accuracy > _accuracy(fit, data, own.roll(1, 0)) + 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_nobody_need_be_new_where_there_are_validation_comparisons(name: str):
    given = planted.task(users=16, shots=24, held_out=20)
    turn = torch.arange(20).repeat(16)
    sides = [given.seen.select(turn % 2 == half) for half in (0, 1)]
    task = dataclasses.replace(given, few=None, unseen=None, validation=sides[0], seen=sides[1])
    fit = _method(name).fit(task)[-1]
    assert len(fit.users) == 16
    assert _accuracy(fit, task.seen, fit.users) > 0.6
    for tried in fit.describe().get("tried") or []:
        assert "new" not in tried


def test_no_shots_give_nobodys_state(fit: Fitted, task: Task):
    counts = task.few.counts.clone()
    counts[[0, 3]] = 0
    keep = (task.few.user != 0) & (task.few.user != 3)
    some = Users(counts, task.few.weight[keep])
    state = fit.adapt(fit.view(task.few)[keep.nonzero()[:, 0]], some, 0)
    torch.testing.assert_close(state[[0, 3]], fit.population_state.expand(2, -1).to(state))
    assert state.isfinite().all()
    if fit.personal:
        assert not torch.allclose(state[1], fit.population_state.to(state), atol=1e-3)


def test_the_order_of_users_and_comparisons_and_the_seed_do_not_matter(fit: Fitted, task: Task):
    few, g = task.few, torch.Generator().manual_seed(1)
    users = torch.randperm(few.num_users, generator=g)
    rows = [(few.user == u).nonzero()[:, 0] for u in users.tolist()]
    rows = torch.cat([row[torch.randperm(len(row), generator=g)] for row in rows])
    view = fit.view(few)
    again = fit.adapt(view[rows], few.pick(rows, few.counts[users]), 7)
    held = task.unseen
    one = fit.logits(fit.view(held), _adapted(fit, few), held.user)
    other = fit.logits(fit.view(held), again[users.argsort()], held.user)
    assert float(((one > 0) == (other > 0)).double().mean()) > 0.97


def test_swapped_labels_mirror_the_accuracy(fit: Fitted, task: Task):
    flipped = task.seen.flipped(torch.ones(len(task.seen), dtype=torch.bool))
    logits = fit.logits(fit.view(task.seen), fit.users, task.seen.user)
    mirrored = fit.logits(fit.view(flipped), fit.users, task.seen.user)
    torch.testing.assert_close(mirrored, -logits, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_method_fits_the_same_twice(fit: Fitted, task: Task, request: pytest.FixtureRequest):
    method = _method(request.node.callspec.params["fit"])
    if isinstance(method, networks.Networked):
        method = dataclasses.replace(method, epochs=2)
        fit = method.fit(task)[-1]
    torch.testing.assert_close(method.fit(task)[-1].users, fit.users)


# A choice among few, roughly fitted.
BRIEF: dict[str, dict[str, Any]] = {
    "lore": {"ranks": (2, 3), "select_rank": True, "iterations": 20, "few_shot_iterations": 20},
    "pal": {"prototypes": (2,), "width": 8, "epochs": 1},
    "vpl": {"betas": (1e-4, 1e-2), "hidden": 8, "latent": 4, "epochs": 1},
    "mlp": {"ranks": (2,), "hidden": 8, "epochs": 1},
    "pref": {"rank": 2, "strengths": (1.0, 0.1)},
    "mrm": {"strengths": (1.0, 0.1)},
    "rbd": {"rank": 2, "strengths": ((1.0, 10.0), (0.1, 1.0))},
    "pebs": {"strengths": (1.0, 0.1)},
}


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_choice_never_reads_a_test_comparison(name: str):
    task = planted.task(users=12, shots=12, held_out=10)
    flipped = {
        which: data.flipped(torch.ones(len(data), dtype=torch.bool))
        for which, data in (("seen", task.seen), ("unseen", task.unseen))
    }
    method = methods.METHODS[name](**BRIEF.get(name, {}))
    one, other = (method.fit(t)[-1] for t in (task, dataclasses.replace(task, **flipped)))
    about = one.describe()
    assert len(about["tried"]) > 1 and about["tried"] == other.describe()["tried"]
    assert one.settings == other.settings and torch.equal(one.users, other.users)
    logits = [fit.logits(fit.view(task.train), fit.users, task.train.user) for fit in (one, other)]
    assert torch.equal(*logits)


# ------------------------------------------------------------- Refused before work starts

# Ranks that more of cannot be wrong: columns that are not needed vanish, or are of a hidden layer.
FREE = {("mixed_logit", "rank"), ("mlp", "ranks")}
RANKS = [
    (name, field.name)
    for name, method in methods.METHODS.items()
    for field in dataclasses.fields(method)
    if field.name in ("rank", "ranks")
]


@pytest.mark.parametrize(("name", "field"), [given for given in RANKS if given not in FREE])
def test_a_rank_that_the_data_cannot_support_is_refused_by_its_flag(name, field, tmp_path):
    for rank in (13, 10**9):  # of 12 users and 12 features
        method = methods.METHODS[name](**{field: (2, rank) if field == "ranks" else rank})
        asked = {"methods": (name,), name: method, "results": tmp_path, "progress": False}
        with pytest.raises(InputError, match=rf"^--{name}\.{field} {rank}: 12 seen users and 12 f"):
            people.train_basis(Made(), experiments.Settings(**asked))
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_greatest_rank_that_the_data_support_is_taken():
    task = planted.task(users=12, shots=12, held_out=10)
    for name, field in set(RANKS) - FREE:
        check(name, methods.METHODS[name](**{field: (12,) if field == "ranks" else 12}), task)
    assert {name for name, _ in RANKS} == {"lore", "pref", "rbd", "mlp"}


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_of_one_process_is_refused_to_several_before_work(name):
    task = dataclasses.replace(planted.task(users=12, shots=12, held_out=10), processes=2)
    if name not in ("pref", "mrm", "rbd", "pebs"):
        check(name, _method(name), task)
        return
    with pytest.raises(InputError, match=f"--methods {name}: one process"):
        check(name, _method(name), task)


# ----------------------------------------------------------------------- A new method


@dataclass(frozen=True)
class Toy:
    """Each user's mean comparison, added to that of all.

    Args:
        pull: comparisons that the users' mean counts for.
    """

    pull: float = 1.0

    def fit(self, task: Task) -> list[Fitted]:
        """One fit."""
        return [ToyFit(self, task)]


class ToyFit(Fitted):
    """The state of a user is a direction."""

    def __init__(self, method: Toy, task: Task) -> None:
        self.label, self.settings, self.pull = "toy", {"pull": method.pull}, method.pull
        self.population_state = torch.zeros(task.train.num_features)
        data = task.local_train
        self.population_state = data.features.x.mean(0)
        self.users = self.adapt(data.features.x, data, 0)

    def view(self, data: Comparisons) -> torch.Tensor:
        return data.in_memory().features.x

    def adapt(self, view: torch.Tensor, users: Users, seed: Seed) -> torch.Tensor:
        total = users.sum(view) + self.pull * self.population_state
        return total / (users.counts[:, None] + self.pull)

    def logits(self, view: torch.Tensor, state: torch.Tensor, user: torch.Tensor) -> torch.Tensor:
        return (view * state[user]).sum(1)

    def describe(self) -> dict[str, Any]:
        return {"note": "means of comparisons", "parameters": self.users.numel()}


class NoStore:
    """Embeddings of which nothing is known but their mean."""

    manifest = {"model": "none"}

    def __len__(self) -> int:
        return planted.ROWS

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(index), planted.task().train.num_features)


class Made:
    """What experiments need of a dataset, made from a planted task."""

    dataset, info, about = "Made", {}, {}

    @property
    def conversations(self) -> list[Any]:
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        return [talk] * planted.ROWS

    store = NoStore()

    def facts(self) -> dict[str, Any]:
        about = {"prepared": {}, "embeddings": {"model": "none"}, "unit": "comparisons"}
        return {"dataset": self.dataset, "warning": None, **about}

    def reference(self, which: str) -> torch.Tensor:
        return planted.task().reference

    def task(self, seed: int, *_: Any, **options: Any) -> Task:
        task = planted.task(users=12, shots=12, held_out=10, seed=seed)
        return dataclasses.replace(task, **options)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Settings with the toy method registered, in METHODS and as a field of Settings."""
    monkeypatch.setitem(methods.METHODS, "toy", Toy)
    fields = [("toy", Toy, dataclasses.field(default_factory=Toy))]
    made = dataclasses.make_dataclass("Settings", fields, bases=(experiments.Settings,))
    lore = methods.METHODS["lore"](ranks=(2,), iterations=20, few_shot_iterations=20)
    return made(methods=("lore", "toy"), lore=lore, results=tmp_path, name="run", progress=False)


@pytest.mark.slow
def test_a_new_method_appears_everywhere(settings: Any, tmp_path: Path):
    text = people.train_basis(Made(), settings)
    folder = tmp_path / "Made" / "run"
    frame = pd.read_csv(folder / "results.csv")
    assert {"", "population", "another", "shuffled"} <= set(
        frame.loc[frame.label == "toy", "control"].fillna("")
    )
    lines = text.splitlines()
    assert any(line.startswith("| toy ") for line in lines)
    assert any(line.startswith("| toy minus BT") for line in lines)
    assert any(line.startswith("| toy minus population average") for line in lines)
    assert any(line.startswith("- toy, seen users") for line in lines)
    assert (folder / "accuracy.png").stat().st_size > 10_000


@pytest.mark.usefixtures("no_plots")
def test_a_new_method_appears_in_sweeps(settings: Any, tmp_path: Path):
    text = people.vary_fewshot(Made(), settings, shots=[0, 2, 8], trials=2)
    frame = pd.read_csv(tmp_path / "Made" / "run" / "results.csv")
    own = frame[(frame.label == "toy") & frame.control.isna() & (frame.set == "unseen")]
    assert own.shots.tolist() == [0, 2, 8]
    assert any(line.startswith("- toy, unseen users") for line in text.splitlines())


@pytest.mark.usefixtures("no_plots")
def test_an_added_method_is_all_that_is_fitted(settings: Any, monkeypatch: pytest.MonkeyPatch):
    first = dataclasses.replace(settings, methods=("lore",))
    people.train_basis(Made(), first)

    def refuse(self: Any, task: Task) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr(methods.METHODS["lore"], "fit", refuse)
    monkeypatch.setattr(methods.METHODS["lore"], "fit_shared", refuse)
    assert "| toy " in people.train_basis(Made(), settings)
