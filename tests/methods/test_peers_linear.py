"""The linear peers PReF, MRM, RBD and PEBS: what they must equal, and what they must recover."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import planted as worlds
import reference
from lore.common.files import InputError
from lore.learning.comparisons import Comparisons, Users
from lore.learning.method import Fitted, Task
from lore.methods import mrm, pebs, pref, rbd
from lore.methods.fitting import linear
from lore.methods.fitting.geometry import measure
from lore.methods.fitting.linear import LinearPeer
from lore.methods.ridge_bt import RidgeBT, fit_shared
from planted import accuracy, adapted

pytestmark = pytest.mark.slow
FEATURES = 12

PReF, MRM, RBD, PEBS = pref.PReF, mrm.MRM, rbd.RBD, pebs.PEBS
CONVERGED = [  # one strength each, so that nothing is chosen
    PReF(rank=3, strengths=(2.0,)), MRM(strengths=(1.0,)), RBD(rank=3, strengths=((1.0, 5.0),)),
    PEBS(strengths=(1.0,)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def choices(directions: Tensor, count: int, seed: int) -> Comparisons:
    """Comparisons whose choices follow each user's direction [U, F] with logistic noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(directions), count, FEATURES, dtype=torch.float64, generator=generator)
    p = torch.sigmoid((x * directions[:, None]).sum(2))
    coin = torch.rand(p.shape, dtype=torch.float64, generator=generator)
    return Comparisons.from_list(list(x * torch.where(coin < p, 1.0, -1.0)[..., None]))


def planted(directions: Tensor, train: int = 60, few: int = 30) -> Task:
    """A task in which the first two thirds of the users are seen."""
    seen, new = directions.split([2 * len(directions) // 3, -(-len(directions) // 3)])
    sets = (seen, train), (new, few), (seen, 200), (new, 200)
    return Task(*(choices(d, n, i) for i, (d, n) in enumerate(sets)))


def tastes(users: int = 60, rank: int = 2, apart: float = 2.0) -> Tensor:
    """Directions [U, F]: a common one, and Gaussian deviations in a few dimensions."""
    how = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(0)}
    basis = torch.linalg.qr(torch.randn(FEATURES, rank + 1, **how)).Q
    return basis[:, 0] + apart * torch.randn(users, rank, **how) @ basis[:, 1:].T


def decisive(users: int = 90) -> Tensor:
    """One direction for all, which users follow with more or less noise."""
    size = torch.linspace(math.log(0.2), math.log(3), users, dtype=torch.float64).exp()
    size = size[torch.randperm(users, generator=torch.Generator().manual_seed(0))]
    one = torch.ones(FEATURES, dtype=torch.float64) / FEATURES**0.5
    return size[:, None] * 1.5 * one


def bt(task: Task) -> Tensor:
    """The ridge Bradley-Terry direction [F, 1]."""
    geometry = measure(task.train)
    return geometry.raw(fit_shared(task.train, geometry, 1.0).x)


def log_loss(fit: Fitted, data: Comparisons, state: Tensor) -> float:
    """Mean over users, given their states."""
    return float(data.log_losses(fit.logits(fit.view(data), state, data.user)).mean())


def name(method: LinearPeer) -> str:
    return f"{type(method).__name__}-{method.setting}"


@pytest.fixture(scope="module")
def world() -> Task:
    return planted(tastes())


@pytest.fixture(scope="module")
def fits(world: Task) -> dict[str, Fitted]:
    return {name(method): method.fit(world)[0] for method in CONVERGED}


# ------------------------------------------------------------- What all linear methods share


@pytest.mark.parametrize("separable", [False, True])
def test_users_are_solved_to_where_the_gradient_vanishes(separable: bool):
    Z, root, centre = (torch.randn(*size).double() for size in ((14, 3), (3, 3), (3,)))
    users = Users([9, 0, 5], torch.rand(14).double() + 0.5)
    precision = root @ root.T + 0.1 * torch.eye(3)
    if separable:  # the prior, which hardly holds, is all that keeps the minimum finite
        Z, precision, centre = 30 * torch.ones(14, 3).double(), 1e-8 * torch.eye(3), 0 * centre
    w = linear.solve_users(Z, users, precision.double(), centre)
    slope = users.weight * torch.sigmoid(-(Z * w[users.user]).sum(1))
    gradient = (w - centre) @ precision.double() - users.sum(slope[:, None] * Z)
    assert float(gradient.abs().max()) < (1e-4 if separable else 1e-6)
    assert torch.equal(w[1], centre)


@pytest.mark.parametrize("which", ["pair_loss", "pref", "rbd", "mrm", "mrm inner"])
def test_gradients_are_those_of_finite_differences(which: str):
    data = choices(tastes(4), 20, 0)
    V, mean, W = (torch.randn(*size).double() for size in ((FEATURES, 2), (2,), (4, 2)))
    geometry = replace(measure(data), floor=0.1)
    episode = mrm._episode(data.units, torch.Generator().manual_seed(0))

    def pair_loss(*at: Tensor) -> tuple[Tensor, list[Tensor]]:
        loss, *gradients, _ = linear.pair_loss(data, *at)
        return loss, gradients

    def inner(s: Tensor) -> tuple[Tensor, list[Tensor]]:
        Z = 50 * linear.project(data, V)
        return mrm.mean_losses(Z, data, s).sum(), [mrm.inner_gradient(Z, data, s)]

    value, given = {
        "pair_loss": (pair_loss, [V, W]),
        "pref": (lambda *at: pref.objective(data, *at, ridge=0.7), [V, W]),
        "rbd": (lambda *at: rbd.objective(data, at, 0.3, 0.8, geometry), [V, mean, W]),
        "mrm": (lambda *at: mrm._outer_gradients(data, *at, 1e-3, episode), [50 * V, mean]),
        "mrm inner": (inner, [W]),
    }[which]
    for i, (tensor, gradient) in enumerate(zip(given, value(*given)[1], strict=True)):
        direction = torch.randn(tensor.shape).double()
        ends = (tensor + step * direction for step in (1e-5, -1e-5))
        ahead, behind = (value(*given[:i], end, *given[i + 1 :])[0] for end in ends)
        slope = float((gradient * direction).sum())
        assert float(ahead - behind) / 2e-5 == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("method", CONVERGED, ids=name)
def test_order_and_seed_change_nothing_that_is_converged(method, fits, world: Task):
    order = torch.randperm(world.train.num_users)
    lists = [world.train.features.x[world.train.user == u] for u in order]
    if not isinstance(method, MRM | PEBS):  # whose episodes and folds are in dialogues' order
        lists = [x[torch.randperm(len(x))] for x in lists]
    train = Comparisons.from_list(lists)
    other = method.fit(Task(train, world.few, world.seen, world.unseen, seed=9))[0]
    fit = fits[name(method)]
    before = fit.logits(fit.view(world.seen), fit.users, world.seen.user)
    after = other.logits(other.view(world.seen), other.users[order.argsort()], world.seen.user)
    assert torch.allclose(before, after, atol=0.02 * float(before.std()))
    assert torch.equal(*(adapted(fit, world.few, seed) for seed in (1, 2)))


@pytest.mark.parametrize("method", CONVERGED, ids=name)
def test_what_is_chosen_was_the_best_that_was_tried(method):
    few = replace(method, strengths=type(method)().strengths[3:7])
    (fit,) = few.fit(planted(tastes(30), 20, 10))
    tried = fit.describe()["tried"]
    plain = [row for row in tried if row.get("floor") is None]
    assert len(plain) == 4
    floors = {row.get("floor") for row in tried}
    assert floors == ({None, 0.1, 0.01, 0.001} if method.whitens else {None})
    assert any(row.items() >= fit.settings.items() for row in tried)
    if fit.settings.get("floor") is None:  # the best of those that were tried on every split
        whole = [row for row in plain if row["splits"] == max(row["splits"] for row in tried)]
        assert min(whole, key=lambda row: row["loss"]).items() >= fit.settings.items()


# ----------------------------------------------------------------------------------- PReF


def test_a_ridge_that_shrinks_pref_to_nothing_leaves_the_weaker_ones_their_chance():
    task = planted(tastes(30), 20, 10)
    tried = [
        PReF(rank=2, strengths=strengths).fit(task)[0].describe()["tried"]
        for strengths in ((1.0, 0.5), (1e4, 1.0, 0.5))
    ]
    losses = [
        {(row["ridge"], row["floor"], row["splits"]): row["loss"] for row in rows} for rows in tried
    ]
    assert losses[1][1e4, None, 1] == pytest.approx(math.log(2), abs=1e-3)
    weaker = {row: loss for row, loss in losses[1].items() if row[0] < 1e4}
    assert weaker == pytest.approx(losses[0], rel=1e-6)
    assert min(losses[0].values()) < 0.6


def test_pref_on_the_simplex_without_its_penalties_is_lore():
    data, generator = choices(tastes(5), 4, 2), torch.Generator().manual_seed(2)
    V = torch.randn(FEATURES, 3, dtype=torch.float64, generator=generator)
    logits = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    data.weight = torch.rand(len(data), dtype=torch.float64, generator=generator) + 0.5
    X, c = (list(t.split(4)) for t in (data.features.x, data.weight))
    loss, _ = pref.objective(data, V / reference.T, logits.softmax(1), 0.0, penalty=0.0)
    expected = reference.pair_mean(X, c, V, logits)
    assert float(loss / data.weight.sum()) == pytest.approx(float(expected), rel=1e-12)


def test_pref_recovers_signed_tastes_that_one_shared_reward_cannot():
    signs = torch.where(torch.arange(60) % 3 == 0, -1.0, 1.0).double()[:, None]
    task = planted(signs * tastes(1, apart=0) * 3)  # a third of the users want the opposite
    fit = PReF(rank=1, strengths=(1.0,)).fit(task)[0]
    shared = float(task.unseen.accuracies(linear.project(task.unseen, bt(task))[:, 0]).mean())
    assert accuracy(fit, task.unseen, adapted(fit, task.few)) > shared + 0.15
    assert fit.users.min() < 0 < fit.users.max()


def test_prefs_start_spans_the_planted_tastes():
    directions = tastes(60, rank=2)
    A, W = pref.svd_start(choices(directions, 300, 0), 3)
    Q = torch.linalg.qr(A).Q
    left = directions - directions @ Q @ Q.T
    assert float(left.norm() / directions.norm()) < 0.15
    assert A.shape == (FEATURES, 3) and W.shape == (60, 3)


# ------------------------------------------------------------------------------------ RBD


def test_rbd_whose_users_may_not_deviate_is_ridge_bt(world: Task):
    fit = RBD(rank=3, strengths=((1.0, 1e9),)).fit(world)[0]
    direction, expected = fit.basis @ fit.population_state, bt(world)[:, 0]
    assert torch.allclose(direction, expected, atol=2e-3 * float(expected.norm()))
    own = fit.users @ fit.basis.T
    assert float((own - direction).norm()) < 1e-4 * float(expected.norm())


def test_rbd_nearly_reaches_the_planted_directions():
    directions = tastes(90, rank=2)
    task = planted(directions, 120, 60)
    fit = RBD(rank=3, strengths=((0.1, 0.05),)).fit(task)[0]
    data, found = task.unseen, adapted(fit, task.few) @ fit.basis.T
    best, own, shared = (
        float(data.log_losses((data.features.x * d[data.user]).sum(1)).mean())
        for d in (directions[60:], found, bt(task).T.expand(30, -1))
    )
    assert shared - own > 0.8 * (shared - best)


def test_rbds_seen_users_are_adapted_as_they_were_fitted(fits: dict[str, Fitted], world: Task):
    fit = fits["RBD-converged"]
    away = (adapted(fit, world.train) - fit.users) @ fit.basis.T
    assert float(away.norm() / (fit.users @ fit.basis.T).norm()) < 0.01


def test_rbd_as_published_stops_where_held_out_loss_was_least():
    task = planted(tastes(30, apart=0.5), 30, 10)
    (fit,) = RBD(rank=3, setting="faithful").fit(task)
    assert fit.facts["losses"][0] > min(fit.facts["losses"]) + 0.01
    assert accuracy(fit, task.unseen, fit.population_state.expand(10, -1)) > 0.55


# ------------------------------------------------------------------------------------ MRM


def test_published_mrm_knows_no_user_from_another(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mrm, "EPOCHS", 3)
    task = planted(tastes(30, apart=3))
    fit = MRM(setting="faithful", inner_rate=2e-3).fit(task)[0]
    moved = float((fit.users - fit.population_state).abs().max())  # by Adam's first step
    assert moved == pytest.approx(2 * 2e-3 * float(fit.population_state.prod()), rel=0.01)
    view, user = fit.view(task.seen), task.seen.user
    own, other = (fit.logits(view, state, user) for state in (fit.users, fit.users.roll(1, 0)))
    assert float(((own > 0) == (other > 0)).double().mean()) > 0.995


def test_an_episode_puts_nine_tenths_of_dialogues_in_the_query_and_a_single_one_on_both_sides():
    (query, counts), (support, few) = mrm._episode(
        [list(torch.arange(20).split(1)), [torch.arange(20, 23)]], torch.Generator().manual_seed(0)
    )
    assert counts == [18, 3] and few == [2, 3]
    assert set(query[:18].tolist()) | set(support[:2].tolist()) == set(range(20))
    assert query[18:].tolist() == support[2:].tolist() == [20, 21, 22]


def test_mrms_tail_loss_favours_the_worse_off_and_is_meant_over_pairs():
    losses = torch.tensor([0.2, 1.0], dtype=torch.float64, requires_grad=True)
    (by_loss,) = torch.autograd.grad(mrm.tail_loss(losses), losses)
    assert by_loss[1] > 3 * by_loss[0]
    assert mrm.tail_loss(losses[:1]).item() == pytest.approx(0.1)  # one alone counts half
    losses = torch.rand(7, dtype=torch.float64)
    pairs = [mrm.tail_loss(losses[[u, v]]) for u in range(7) for v in range(u)]
    mean = float(torch.stack(pairs).mean())
    assert float(mrm.tail_loss_of_pairs(losses)) == pytest.approx(mean, rel=1e-12)


# ----------------------------------------------------------------------------------- PEBS


def test_pebs_keeps_accuracy_and_lowers_log_loss_where_users_differ_in_decisiveness():
    task = planted(decisive())
    for setting in ("faithful", "converged"):
        fit = PEBS(setting=setting, strengths=(0.3,)).fit(task)[0]
        for data, state in ((task.seen, fit.users), (task.unseen, adapted(fit, task.few))):
            shared = linear.project(data, fit.basis)[:, 0]
            own = fit.logits(fit.view(data), state, data.user)
            assert torch.equal(data.accuracies(own), data.accuracies(shared))
            assert (state > 0).all()
            loss = log_loss(fit, data, state)
            assert loss < log_loss(fit, data, fit.population_state.expand_as(state)) - 0.005
            assert loss < log_loss(fit, data, state.roll(1, 0)) - 0.01


def test_a_slope_stays_positive_for_a_user_who_wants_the_opposite():
    prior = pebs.Prior(common=1.0, mean=1.0, variance=10.0)
    slope = pebs.shrunk_slopes(-torch.ones(50).double(), Users([50]), prior)
    assert 0 < float(slope) < 0.1


def test_shrunk_slopes_are_the_closed_form_written_user_by_user():
    t, weight = torch.randn(60).double() + 0.5, torch.rand(60).double() + 0.5
    users, prior = Users([30, 10, 0, 20], weight), pebs.Prior(0.8, 0.9, 0.3)
    found = pebs.shrunk_slopes(t, users, prior)[:, 0].tolist()
    for u in range(4):
        x, c = t[users.user == u], weight[users.user == u]
        p = torch.sigmoid(0.8 * x)
        information, score = (c * p * (1 - p) * x * x).sum(), (c * (1 - p) * x).sum()
        away = 0.3 / (0.3 + 1 / information) * (0.8 + score / information - 0.9)
        assert found[u] == pytest.approx(0.9 + float(away if u != 2 else 0), rel=1e-9)


def test_slopes_are_measured_on_comparisons_that_the_reward_has_not_seen():
    """As the reward was fitted to them itself, it would seem just sure enough, a slope of 1."""
    (fit,) = PEBS(strengths=(1e-3,)).fit(planted(tastes(9, apart=0.0), 10, 10))
    assert float(fit.population_state) < 0.6


@pytest.mark.parametrize(("spread", "least", "most"), [(0.0, 0, 0.03), (0.4, 0.08, 0.24)])
def test_the_prior_finds_the_planted_variance_of_slopes(spread, least, most):
    slope, x = 1 + spread * torch.randn(800, 1).double(), torch.randn(800, 60).double()
    t = torch.where(torch.rand(x.shape) < torch.sigmoid(slope * x), x, -x).reshape(-1)
    found = pebs.empirical_prior(t, Users([60] * 800))
    assert least <= found.variance < most
    assert found.mean == pytest.approx(1, abs=max(0.05, spread / 4))


@pytest.mark.parametrize("method", [
    PEBS(strengths=(1.0, 0.1)), PEBS("faithful", strengths=(1.0,)), MRM(strengths=(1.0, 0.1)),
], ids=["PEBS", "PEBS faithful", "MRM"])  # fmt: skip
@pytest.mark.parametrize(("users", "shots", "weight"), [
    (1, 10, 1.0), (2, 10, 1.0), (2, 2, 1.0), (6, 10, 1e-9),
])  # fmt: skip
def test_few_users_and_light_comparisons_are_fitted(method, users, shots, weight):
    task = worlds.task(users=users, shots=shots, held_out=5)
    task.train.weight.fill_(weight)
    (fitted,) = method.fit(task)
    state = adapted(fitted, task.few)
    logits = fitted.logits(fitted.view(task.unseen), state, task.unseen.user)
    assert fitted.users.isfinite().all() and logits.isfinite().all()


@pytest.mark.parametrize("method", [RidgeBT(), PEBS(), MRM()])
def test_equal_embeddings_are_one_line(method):
    task = worlds.task(users=6, shots=10, held_out=5)
    task.train.features.rows = lambda rows: torch.ones(len(rows), worlds.F)
    with pytest.raises(InputError, match="two embeddings of every training comparison are equal"):
        method.fit(task)
