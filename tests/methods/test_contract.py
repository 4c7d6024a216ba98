"""What every method must do, whatever it is: one test for each line of METHODS."""

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
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
from lore.methods import mrm, rbd
from lore.methods.fitting import linear, networks, validation
from planted import accuracy, adapted

# Fewer steps where the defaults take long, and one strength where choosing is not the point.
QUICK: dict[str, dict[str, Any]] = {
    "ridge_bt": {}, "mixed_logit": {},
    "lore": {"ranks": (3,), "iterations": 400, "few_shot_iterations": 200},
    "pal": {"prototypes": (5,), "width": 32, "epochs": 10},
    "pal faithful": {"prototypes": (2,), "width": 16, "epochs": 2},
    "vpl": {"betas": (1e-4,), "hidden": 32, "epochs": 28},
    "vpl faithful": {"hidden": 16, "latent": 8},
    "pref": {"strengths": (2.0,)}, "pref faithful": {"rank": 3},
    "mrm": {"strengths": (1.0,)}, "mrm faithful": {},
    "rbd": {"rank": 3, "strengths": ((1.0, 5.0),)}, "rbd faithful": {"rank": 3},
    "pebs": {"strengths": (1.0,)}, "pebs faithful": {"strengths": (1.0,)},
    "mlp": {"ranks": (5,), "epochs": 10}, "mlp faithful": {"hidden": 16, "epochs": 20},
}  # fmt: skip
# A choice among few, roughly fitted.
BRIEF: dict[str, dict[str, Any]] = {
    "lore": {"ranks": (2, 3), "select_rank": True, "iterations": 20, "few_shot_iterations": 20},
    "pal": {"prototypes": (2,), "width": 8, "epochs": 1},
    "vpl": {"betas": (1e-4, 1e-2), "hidden": 8, "latent": 4, "epochs": 1},
    "mlp": {"ranks": (2,), "hidden": 8, "epochs": 1},
    "pref": {"rank": 2, "strengths": (1.0, 0.1)}, "mrm": {"strengths": (1.0, 0.1)},
    "rbd": {"rank": 2, "strengths": ((1.0, 10.0), (0.1, 1.0))}, "pebs": {"strengths": (1.0, 0.1)},
}  # fmt: skip
NETWORKS = {"pal", "vpl", "mlp"}  # seconds each
VARIANTS = [
    pytest.param(name, marks=pytest.mark.slow) if name.split()[0] in NETWORKS else name
    for name in QUICK
]


@pytest.fixture(autouse=True, scope="module")
def few_splits() -> Iterator[None]:
    """Choices on two splits at most: on four they take twice as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "MOST_SPLITS", 2)
        yield


@pytest.fixture(scope="module")
def task() -> Task:
    return planted.task()


@pytest.fixture(scope="module", params=VARIANTS)
def fit(request: pytest.FixtureRequest, task: Task) -> Fitted:
    """Each method's last fit on users whose tastes differ, in few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mrm, "EPOCHS", 10)
        patch.setattr(rbd, "STEPS", 300)
        return _method(request.param).fit(task)[-1]


def _method(name: str) -> Any:
    method, *faithful = name.split()
    setting = {"setting": "faithful"} if faithful else {}
    return methods.METHODS[method](**QUICK[name], **setting)


def _small(**more: Any) -> Task:
    return dataclasses.replace(planted.task(users=12, shots=12, held_out=10), **more)


def _flipped(data: Comparisons) -> Comparisons:
    return data.flipped(torch.ones(len(data), dtype=torch.bool))


def test_every_method_is_held_to_this_and_has_as_many_configurations_to_try():
    assert {name.split()[0] for name in QUICK} == set(methods.METHODS)
    for method in (kind() for kind in methods.METHODS.values()):
        if hasattr(method, "grid"):
            assert len(method.grid[0][1]) * len(method.grid[1][1]) == linear.TRIES
        assert len(getattr(method, "strengths", linear.HALVINGS)) == linear.TRIES


def test_a_fit_says_what_it_is(fit: Fitted, task: Task):
    assert fit.label.endswith("faithful") == (fit.settings.get("setting") == "faithful")
    assert fit.users.shape == (task.train.num_users, len(fit.population_state))
    about = fit.describe()
    assert about["note"] and about["parameters"] > 0
    if isinstance(fit, networks.Network | linear.LinearFitted):
        assert fit.label in about["note"]
        assert 1 < len(about["losses"]) <= 400 and about["loss_step"] >= 1
        assert "faithful" in fit.label or about["losses"][-1] < about["losses"][0]


def test_own_state_beats_the_populations_and_that_beats_a_coin(fit: Fitted, task: Task):
    average = fit.population_state.expand(40, -1)
    if "faithful" not in fit.label or fit.label.startswith("PReF"):  # others learn too little
        assert accuracy(fit, task.unseen, average) > 0.6
    if not fit.personal or "faithful" in fit.label or fit.label == "PEBS":
        pytest.skip("nothing personal that so few steps, or accuracy, could show")
    for data, own in ((task.seen, fit.users), (task.unseen, adapted(fit, task.few))):
        mine = accuracy(fit, data, own)
        assert mine > accuracy(fit, data, average) + 0.02
        assert mine > accuracy(fit, data, own.roll(1, 0)) + 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in QUICK if "faithful" not in name])
def test_no_user_need_be_new_where_there_are_validation_comparisons(name: str):
    given = planted.task(users=16, shots=24, held_out=20)
    turn = torch.arange(20).repeat(16)
    sides = [given.seen.select(turn % 2 == half) for half in (0, 1)]
    task = dataclasses.replace(given, few=None, unseen=None, validation=sides[0], seen=sides[1])
    fit = _method(name).fit(task)[-1]
    assert len(fit.users) == 16
    assert accuracy(fit, task.seen, fit.users) > 0.6
    for tried in fit.describe().get("tried") or []:
        assert "new" not in tried


def test_without_shots_a_state_is_the_populations(fit: Fitted, task: Task):
    view, population = fit.view(task.few), fit.population_state
    none = fit.adapt(view[torch.arange(0)], Users([0, 0, 0]), 0)
    torch.testing.assert_close(none, population.expand(3, -1).to(none))
    counts = task.few.counts.clone()
    counts[[0, 3]] = 0
    keep = (task.few.user != 0) & (task.few.user != 3)
    rows, others = keep.nonzero()[:, 0], counts > 0
    state = fit.adapt(view[rows], task.few.pick(rows, counts), 0)
    torch.testing.assert_close(state[~others], population.expand(2, -1).to(state))
    assert state.isfinite().all()
    if fit.personal:
        assert not torch.equal(state[1], population.to(state))
    if fit.personal and "faithful" not in fit.label:  # nor does a state depend on who else is there
        own, atol = adapted(fit, task.few)[others], 0.02 * float(state.abs().max())
        torch.testing.assert_close(state[others], own, rtol=0, atol=atol)
        alone = fit.adapt(view[rows[:3]], Users([3]), 0)  # nothing is padded
        both = fit.adapt(view[rows[:23]], Users([3, 0, 20]), 0)
        torch.testing.assert_close(both[:1], alone, rtol=0, atol=atol)


def test_the_order_of_users_and_comparisons_and_the_seed_do_not_matter(fit: Fitted, task: Task):
    few, g = task.few, torch.Generator().manual_seed(1)
    users = torch.randperm(few.num_users, generator=g)
    rows = [(few.user == u).nonzero()[:, 0] for u in users.tolist()]
    rows = torch.cat([row[torch.randperm(len(row), generator=g)] for row in rows])
    view, own = fit.view(few), adapted(fit, few)
    again = fit.adapt(view[rows], few.pick(rows, few.counts[users]), 7)
    if fit.personal and fit.settings.get("setting") != "faithful":
        torch.testing.assert_close(again, own[users], rtol=0, atol=0.02 * float(own.abs().max()))
        assert not torch.allclose(own, own[users], atol=0.1 * float(own.std()))
    held = task.unseen
    one, other = (
        fit.logits(fit.view(held), states, held.user) for states in (own, again[users.argsort()])
    )
    drawn = fit.label.startswith(("PAL f", "PReF K=3 f", "MLP f"))  # from a seed, by few steps
    assert float(((one > 0) == (other > 0)).double().mean()) > (0.7 if drawn else 0.97)


def test_swapped_labels_mirror_the_accuracy(fit: Fitted, task: Task):
    logits = fit.logits(fit.view(task.seen), fit.users, task.seen.user)
    mirrored = fit.logits(fit.view(_flipped(task.seen)), fit.users, task.seen.user)
    torch.testing.assert_close(mirrored, -logits, rtol=1e-3, atol=1e-4)
    assert "faithful" in fit.label or float(task.seen.accuracies(logits).mean()) > 0.55


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.METHODS)
def test_a_choice_never_reads_a_test_comparison_and_is_the_same_twice(name: str):
    task, method = _small(), methods.METHODS[name](**BRIEF.get(name, {}))
    mirrored = _small(seen=_flipped(task.seen), unseen=_flipped(task.unseen))
    one, other = (method.fit(t)[-1] for t in (task, mirrored))
    about = one.describe()
    assert len(about["tried"]) > 1 and about["tried"] == other.describe()["tried"]
    assert one.settings == other.settings and torch.equal(one.users, other.users)
    logits = [fit.logits(fit.view(task.train), fit.users, task.train.user) for fit in (one, other)]
    assert torch.equal(*logits)
    if name in NETWORKS:
        (_, models), (_, variants) = method.grid
        assert len(about["tried"]) == len(models) * len(variants)
        drawn = method.fit(_small(seed=4))[-1].users
        assert not torch.allclose(drawn, one.users, atol=1e-3)


def made() -> people.Tasks:
    """A dataset whose repeats are planted."""

    def draw(seed: int, device: torch.device) -> Task:
        return planted.task(users=12, shots=12, held_out=10, seed=seed)

    store = people.Rows(torch.zeros(planted.ROWS, planted.F), planted.task().reference)
    return people.Tasks({"dataset": "Made"}, store, draw, "comparisons", {}, Path())


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
        given = {"methods": (name,), name: method, "results": tmp_path, "progress": False}
        with pytest.raises(InputError, match=rf"^--{name}\.{field} {rank}: 12 seen users and 12 f"):
            people.train_basis(made(), experiments.Settings(**given))
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_the_greatest_rank_that_the_data_support_is_fitted():
    for name, field in set(RANKS) - FREE:
        method = methods.METHODS[name](**BRIEF[name] | {field: (12,) if field == "ranks" else 12})
        check(name, method, _small())
        assert (12, 12) in {tuple(fit.users.shape) for fit in method.fit(_small())}
    assert {name for name, _ in RANKS} == {"lore", "pref", "rbd", "mlp", "mixed_logit"}


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_of_one_process_is_refused_to_several_before_work(name):
    alone = pytest.raises(InputError, match=f"--methods {name}: one process")
    with alone if name in ("pref", "mrm", "rbd", "pebs") else nullcontext():
        check(name, _method(name), _small(processes=2))
    if name in NETWORKS:  # the first judges alone
        assert _method(name).fit(_small(process=1, processes=2)) == []


# ----------------------------------------------------------------------- A new method


@dataclass(frozen=True)
class Toy:
    """Each user's mean comparison, added to that of all, which counts for ``pull`` comparisons."""

    pull: float = 1.0

    def fit(self, task: Task) -> list[Fitted]:
        return [ToyFit(self, task)]


class ToyFit(Fitted):
    """The state of a user is a direction."""

    def __init__(self, method: Toy, task: Task) -> None:
        self.label, self.settings, self.pull = "toy", {"pull": method.pull}, method.pull
        data = task.local_train
        self.population_state = data.features.x.mean(0)
        self.users = self.adapt(data.features.x, data, 0)
        self.facts = {"note": "means of comparisons", "parameters": self.users.numel()}

    def view(self, data: Comparisons) -> torch.Tensor:
        return data.in_memory().features.x

    def adapt(self, view: torch.Tensor, users: Users, seed: Seed) -> torch.Tensor:
        total = users.sum(view) + self.pull * self.population_state
        return total / (users.counts[:, None] + self.pull)

    def logits(self, view: torch.Tensor, state: torch.Tensor, user: torch.Tensor) -> torch.Tensor:
        return (view * state[user]).sum(1)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Settings with the toy method registered, in METHODS and as a field of Settings."""
    monkeypatch.setitem(methods.METHODS, "toy", Toy)
    fields = [("toy", Toy, dataclasses.field(default_factory=Toy))]
    kind = dataclasses.make_dataclass("Settings", fields, bases=(experiments.Settings,))
    lore = methods.METHODS["lore"](ranks=(2,), iterations=20, few_shot_iterations=20)
    return kind(methods=("lore", "toy"), lore=lore, results=tmp_path, name="run", progress=False)


@pytest.mark.slow
def test_a_new_method_appears_everywhere(settings: Any, tmp_path: Path):
    text, folder = people.train_basis(made(), settings), tmp_path / "Made" / "run"
    frame = pd.read_csv(folder / "results.csv")
    controls = set(frame.control[frame.label == "toy"].fillna(""))
    assert {"", "population", "another", "shuffled"} <= controls
    for begin in ("| toy ", "| toy minus BT", "| toy minus population", "- toy, seen users"):
        assert any(line.startswith(begin) for line in text.splitlines())
    assert (folder / "accuracy.png").stat().st_size > 10_000


@pytest.mark.usefixtures("no_plots")
def test_a_new_method_appears_in_sweeps(settings: Any, tmp_path: Path):
    text = people.vary_fewshot(made(), settings, shots=[0, 2, 8], trials=2)
    frame = pd.read_csv(tmp_path / "Made" / "run" / "results.csv")
    own = frame[(frame.label == "toy") & frame.control.isna() & (frame.set == "unseen")]
    assert own.shots.tolist() == [0, 2, 8]
    assert any(line.startswith("- toy, unseen users") for line in text.splitlines())
