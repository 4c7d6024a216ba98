"""The mixed logit against slow references, and what must hold of it in planted worlds."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.optimize import minimize
from scipy.special import expit, log_expit, softmax
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lore.common.files import InputError
from lore.learning import comparisons
from lore.learning.comparisons import Comparisons, DenseFeatures, RowFeatures, Users
from lore.learning.method import Task, check
from lore.methods import mixed_logit
from lore.methods.fitting import validation
from lore.methods.fitting.geometry import measure
from lore.methods.fitting.lbfgs import minimise
from lore.methods.fitting.posterior import Prior, covariances, posteriors
from lore.methods.fitting.validation import Validation, hold_out, pseudo_new, subset
from lore.methods.mixed_logit import Candidate, MixedFit, MixedLogit, Search, _leading, estimate
from lore.methods.ridge_bt import STRENGTHS, RidgeBT, fit_shared, lowest
from planted import prefer

DOUBLE = torch.float64


def world(
    users: int = 40, pairs: int = 30, F: int = 6, taste: float = 1.0, rank: int = 2, seed: int = 0,
    weighted: bool = False,
) -> tuple[Comparisons, Tensor]:  # fmt: skip
    """Users with Gaussian tastes of a rank, their choices by the logit, and rewards [U, F]."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(99)
    mu = torch.randn(F, generator=shared, dtype=DOUBLE)
    B = taste * torch.randn(F, rank, generator=shared, dtype=DOUBLE)
    rewards = mu + torch.randn(users, rank, generator=g, dtype=DOUBLE) @ B.T
    user = torch.arange(users).repeat_interleave(pairs)
    x = torch.randn(len(user), F, generator=g, dtype=DOUBLE)
    x, _ = prefer((x * rewards[user]).sum(1), x, -x, g)
    weight = 0.5 + torch.rand(len(x), generator=g, dtype=DOUBLE) if weighted else None
    names = [f"user {seed}.{u}" for u in range(users)]
    return Comparisons(DenseFeatures(x), [pairs] * users, weight, names), rewards


def task(train: Comparisons, new: Comparisons | None = None, **more: object) -> Task:
    """A repeat whose held-out sets no method may look at: there are none to look at."""
    return Task(train, new or train, None, None, **more)  # type: ignore[arg-type]


def shots(K: int, counts: list[int], seed: int = 0) -> tuple[Tensor, Users]:
    """What some comparisons ask of tastes [N, 1 + K], and whose they are."""
    g = torch.Generator().manual_seed(seed)
    weight = 0.3 + torch.rand(sum(counts), generator=g, dtype=DOUBLE)
    return torch.randn(sum(counts), 1 + K, generator=g, dtype=DOUBLE), Users(counts, weight)


def laplace_by_scipy(Z: np.ndarray, weight: np.ndarray, S: np.ndarray) -> tuple:
    """Mode and covariance of one user's taste, from the definitions."""
    P = np.linalg.inv(S)

    def loss(b: np.ndarray) -> float:
        return -weight @ log_expit(Z[:, 0] + Z[:, 1:] @ b) + b @ P @ b / 2

    b = minimize(loss, np.zeros(len(S)), tol=1e-12).x
    p = expit(Z[:, 0] + Z[:, 1:] @ b)
    return b, np.linalg.inv(P + (Z[:, 1:] * (weight * p * (1 - p))[:, None]).T @ Z[:, 1:])


def spread(K: int, seed: int = 0) -> Tensor:
    """Some covariance [K, K]."""
    root = torch.randn(K, K, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return root @ root.T + 0.3 * torch.eye(K).double()


@pytest.mark.parametrize("K", [1, 3, 12])
def test_posteriors_are_those_of_the_definitions(K: int) -> None:
    """Users with fewer comparisons than tastes are solved in the dual, others in the tastes; where
    it begins makes no difference."""
    Z, users = shots(K, [3, 40, 0, 1, 7])
    prior, other = (Prior(torch.zeros(K).double(), S) for S in (spread(K), 9 * spread(K, 1)))
    found = posteriors(Z, users, prior, moment=True)
    cov = covariances(Z, users, prior, found)
    total = torch.zeros(K, K).double()
    for u in range(5):
        rows = users.user == u
        given = (part.numpy() for part in (Z[rows], users.weight[rows], prior.cov))
        mode, wanted = laplace_by_scipy(*given)
        np.testing.assert_allclose(found.mode[u].numpy(), mode, atol=2e-5)
        np.testing.assert_allclose(cov[u].numpy(), wanted, atol=2e-5)
        total += torch.from_numpy(np.outer(mode, mode) + wanted)
    torch.testing.assert_close(found.moment, total, atol=5e-4, rtol=1e-4)
    again = posteriors(Z, users, prior, start=posteriors(Z, users, other).push)
    torch.testing.assert_close(again.mode, found.mode, atol=1e-6, rtol=0)


@pytest.mark.parametrize("K", [1, 2])
def test_tastes_with_many_choices_are_those_of_numerical_integration(K: int) -> None:
    """Laplace's method is exact in the limit; with 60 choices a taste it is within a tenth."""
    Z, users = shots(K, [60 * K])
    prior = Prior(torch.zeros(K).double(), torch.eye(K).double())
    found = posteriors(Z, users, prior)
    grid = np.stack(np.meshgrid(*[np.linspace(-6, 6, 301)] * K), -1).reshape(-1, K)
    odds = Z[:, :1].numpy() + Z[:, 1:].numpy() @ grid.T
    logs = users.weight.numpy() @ log_expit(odds) - (grid**2).sum(1) / 2
    share = softmax(logs)
    mean = share @ grid
    cov = (share * (grid - mean).T) @ (grid - mean)
    assert (np.abs(found.mode[0].numpy() - mean) < 0.1 * np.sqrt(np.diag(cov))).all()
    laplace = covariances(Z, users, prior, found)[0].numpy()
    assert np.abs(laplace - cov).max() < 0.1 * np.diag(cov).max()


@pytest.mark.parametrize(("tau2", "norm"), [(1.0, 1.0), (1e4, 1.0), (1e4, 10.0)])
def test_rough_posteriors_are_nearly_the_precise_ones(tau2: float, norm: float) -> None:
    """In single precision, but where a prior as wide and a comparison made often are too much."""
    z = torch.randn(3, 41, generator=torch.Generator().manual_seed(0)) * norm / 40**0.5
    view, users = z.repeat(14, 1)[:40].repeat(5, 1), Users([40] * 5)
    prior = Prior(torch.zeros(40).double(), tau2 * torch.eye(40).double())
    exact, rough = (posteriors(view, users, prior, moment=True, rough=how) for how in (False, True))
    assert rough.mode.dtype == (torch.float64 if norm > 1 else torch.float32)
    odds = [(view[:, 1:].double() * x.mode.double()[users.user]).sum(1) for x in (exact, rough)]
    torch.testing.assert_close(*odds, atol=2e-3, rtol=0)
    torch.testing.assert_close(rough.moment.double(), exact.moment, atol=1e-3 * tau2, rtol=0)


def test_a_covariance_of_a_given_rank_maximises_what_em_maximises() -> None:
    """EM's bound for N(0, S), -tr(S^-1 M) - log det S, is highest at the S of ``_leading`` among
    those of its rank above a given rest; and there are as many variances above the rest."""
    M, rank, rest = spread(5), 2, 0.3
    S = _leading(M, rank, rest)

    def bound(S: Tensor) -> float:
        return -float((torch.linalg.solve(S, M)).trace() + torch.logdet(S))

    values, vectors = torch.linalg.eigh(S - rest * torch.eye(5))
    torch.testing.assert_close(values[:-rank], torch.zeros(3).double())
    B, g = vectors[:, -rank:] * values[-rank:].sqrt(), torch.Generator().manual_seed(1)
    for size in torch.logspace(-2, 0, 90):
        other = B + size * torch.randn(5, rank, generator=g, dtype=DOUBLE)
        assert bound(other @ other.T + rest * torch.eye(5)) < bound(S)


@pytest.mark.parametrize("rank", [2, None])
def test_long_steps_end_where_short_ones_do(rank: int | None) -> None:
    """S is what plain EM finds, round by round, and nearer after five rounds. The last step is a
    plain one."""
    data, _ = world(users=60)
    view, strengths = given(data).view(data), Candidate(0.01, 0.5, 0.3, 2.0, rank, start=3.0)
    slow = Prior(torch.zeros(6).double(), 3 * torch.eye(6).double())
    plain = []
    for _ in range(150):
        moment = posteriors(view, data, slow, moment=True).moment
        S = (moment + 2 * 0.3 * torch.eye(6)) / (60 + 2)
        slow = Prior(slow.mean, _leading(S, rank, 0.3) if rank else S)
        plain.append(slow.cov)
    once, prior = (estimate(view, data, strengths, rounds=n)[0] for n in (1, 80))
    torch.testing.assert_close(once.cov, plain[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(prior.cov, slow.cov, rtol=0.01, atol=0.01)
    near = estimate(view, data, strengths, rounds=5)[0].cov
    assert (near - slow.cov).norm() < 0.7 * (plain[4] - slow.cov).norm()


def test_a_view_that_is_not_held_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = world(users=20, weighted=True)
    held = given(data)
    monkeypatch.setattr(mixed_logit, "HELD", 0)
    monkeypatch.setattr(MixedFit, "view", None)  # which holds it
    fit = given(data)
    torch.testing.assert_close(fit.prior.cov, held.prior.cov, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(fit.users, held.users)


@pytest.mark.parametrize("F", [1, 6, 20, 576])
@pytest.mark.parametrize("strength", [1e-12, 1e-6, 1e-2, 1.0, 100.0])
def test_the_ridge_is_that_of_scikit_learn(F: int, strength: float) -> None:
    g = torch.Generator().manual_seed(F)
    x = torch.randn(40 * F if F < 100 else 700, F, generator=g, dtype=DOUBLE)
    p = torch.sigmoid(x @ torch.randn(F, generator=g, dtype=DOUBLE) / F**0.5)
    x = x * (2 * (torch.rand(len(x), generator=g) < p).double() - 1)[:, None]
    data = Comparisons(DenseFeatures(x), [len(x)], 0.5 + torch.rand(len(x), generator=g).double())
    geometry, weight = measure(data), data.weight.numpy()
    found = fit_shared(data, geometry, strength)
    y = (x / geometry.scale).numpy()
    both, labels = np.concatenate([y, -y]), np.repeat([1, 0], len(y))
    model = LogisticRegression(C=1 / (2 * strength), fit_intercept=False, tol=1e-12, max_iter=20000)
    mu = model.fit(both, labels, np.tile(weight, 2)).coef_[0]
    wanted = -weight @ log_expit(y @ mu) + strength / 2 * mu @ mu
    assert found.values[-1] <= wanted + 1e-5 * max(1, abs(wanted) if F == 576 else 1)


@pytest.mark.parametrize(("factor", "most"), [(1e-4, 40), (1.0, 40), (1e4, 40), (-1.0, 100)])
def test_a_wrong_first_curvature_costs_the_minimiser_little(factor: float, most: int) -> None:
    """One of the wrong size is corrected (else 49 to 197 evaluations); one uphill is dropped."""
    size, tried = torch.logspace(0, 1, 50, dtype=DOUBLE), []

    def bowl(x: Tensor) -> tuple[float, Tensor]:
        tried.append(x)
        return float((size * (x - 1) ** 2).sum() / 2), size * (x - 1)

    found = minimise(bowl, torch.zeros(50).double(), lambda g: factor * g, 1e-12, 300)
    assert found.values[-1] < 1e-8 and len(tried) < most


@pytest.mark.parametrize("small", [1000, 0])
def test_scale_and_leading_directions_are_those_of_the_features(small: int, monkeypatch) -> None:
    monkeypatch.setattr("lore.methods.fitting.geometry.SMALL", small)
    monkeypatch.setitem(comparisons.CHUNK_BYTES, "cpu", 4 * 90 * 70)  # 70 comparisons at a time
    x = torch.randn(300, 90, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    x = x * (0.9 ** torch.arange(90))
    geometry = measure(Comparisons(DenseFeatures(x), [300]))
    square = float(x.square().sum(1).mean())
    assert geometry.scale == pytest.approx(square**0.5, rel=0.01)
    values = torch.linalg.eigvalsh(x.T @ x / 300).flip(0)[:10] / square
    torch.testing.assert_close(geometry.values[:10], values, rtol=0.02, atol=0)
    for floor in (0.1, 0.001):
        here = replace(geometry, floor=floor)
        stretched = x @ here.raw(torch.eye(90, dtype=DOUBLE))
        assert float(stretched.square().sum(1).mean()) == pytest.approx(1, rel=0.02)
        there = here.stretched(here.raw(here.directions))
        torch.testing.assert_close(there, here.directions, atol=1e-4, rtol=0)


def given(
    data: Comparisons, l_mu: float = 0.5, tau2: float = 1.0, pi: float = 10.0, floor: float = 0.01,
    rank: int | None = None,
) -> MixedFit:  # fmt: skip
    """A fit with given strengths."""
    return MixedLogit(floor=floor, l_mu=l_mu, tau2=tau2, pi=pi, rank=rank).fit(task(data))[0]


def own(fit: MixedFit, data: Comparisons) -> Tensor:
    """Log odds of a fit's own users' comparisons."""
    return fit.logits(fit.view(data), fit.users, data.user)


@pytest.mark.parametrize("tau2", [0.0, 1e-6])
def test_a_strong_prior_of_tastes_leaves_ridge_bt(tau2: float) -> None:
    data, _ = world()
    ridge = RidgeBT(strength=0.5).fit(task(data))[0]
    mixed = given(data, tau2=tau2, pi=1e9, floor=0)
    torch.testing.assert_close(own(mixed, data), ridge.view(data)[:, 0], atol=2e-3, rtol=0)


def test_weak_priors_leave_each_user_the_own_fit() -> None:
    data, _ = world(users=12, pairs=400, F=2)
    fit = given(data, l_mu=1e-6, tau2=1e6, pi=1e9)
    for u in range(3):
        local = data.select(data.user == u)
        alone = fit_shared(local, measure(local), 1e-6)
        direction = measure(local).raw(alone.x)[:, 0]
        torch.testing.assert_close(fit.reward(fit.users[u]), direction, atol=0, rtol=0.01)


def test_a_file_gives_back_rewards_by_name(tmp_path: Path) -> None:
    data, _ = world(users=10)
    fit = given(data)
    new = fit.adapt(fit.view(data)[:30], Users([30]), 0)
    fit.save(tmp_path / "m.safetensors", new, {"users": data.names, "users_unseen": ["new"]})
    saved = mixed_logit.load(tmp_path / "m.safetensors")
    x, Z, average = data.features.x[:30].float(), fit.view(data)[:30], fit.population_state
    for name, state in ((data.names[3], fit.users[3]), ("new", new[0]), (None, average)):
        odds = fit.logits(Z, state[None], torch.zeros(30, dtype=torch.long))
        torch.testing.assert_close(x @ saved.direction(name), odds.float())
    with pytest.raises(InputError, match="Zaphod"):
        saved.direction("Zaphod")
    (tmp_path / "other.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="other.safetensors"):
        mixed_logit.load(tmp_path / "other.safetensors")


def test_a_file_knows_how_uncertain_each_users_reward_is(tmp_path: Path) -> None:
    data, _ = world(users=10)
    fit, few = given(data), data.share(0, 5)  # two of them
    facts = {"users": data.names, "users_unseen": ["new", "newer"], "center": torch.zeros(6)}
    facts |= {"known": fit.spread(data), "known_unseen": fit.spread(few)}
    fit.save(tmp_path / "m.safetensors", fit.adapt(fit.view(few), few, 0), facts)
    saved, z = mixed_logit.load(tmp_path / "m.safetensors"), fit.directions.double()
    for name, user in ((data.names[7], 7), ("newer", 1), (None, None)):
        cov, Z = fit.prior.cov, fit.view(data)[data.user == user].double()
        if name:
            p = (Z[:, 0] + Z[:, 1:] @ fit.users[user].double()).sigmoid()
            cov = (cov.inverse() + (p * (1 - p) * Z[:, 1:].T) @ Z[:, 1:]).inverse()
        found, expected = saved.deviations(torch.eye(6), name).double(), (z @ cov @ z.T).diagonal()
        torch.testing.assert_close(found.square(), expected, rtol=2e-3, atol=0)


def test_of_too_many_comparisons_no_file_keeps_the_evidence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lore.methods.mixed_logit.MOST", 10)
    data, _ = world(users=10)
    fit = given(data)
    assert fit.spread(data) is None
    fit.save(tmp_path / "m.safetensors", fit.users[:0], {"users": data.names})
    saved = mixed_logit.load(tmp_path / "m.safetensors")
    assert saved.deviations(torch.eye(6), data.names[0]) is None


@pytest.mark.parametrize(("change", "message"), [
    ({"facts": {"users": None}}, "its users are not as expected"),
    ({"facts": {"users": ["one"]}}, "its users are not as expected"),
    ({"evidence_counts": torch.tensor([-1] * 10)}, "evidence_counts are no counts"),
    ({"evidence_counts": torch.ones(10)}, "evidence_counts are no counts"),
    ({"evidence_counts": torch.tensor([1] * 10)}, "evidence"),
    ({"evidence_counts": None}, "lacks evidence_counts"),
    ({"covariance": torch.ones(6, 6).triu()}, "not symmetric and positive definite"),
    ({"covariance": -torch.eye(6)}, "not symmetric and positive definite"),
])  # fmt: skip
def test_a_file_that_was_changed_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mixed_logit.load(changed_file(tmp_path, **change))


def changed_file(folder: Path, facts: dict | None = None, **tensors: Tensor | None) -> Path:
    """A fit's file with other facts and tensors, a center among them; None takes one out."""
    data, path = world(users=10)[0], folder / "m.safetensors"
    fit = given(data)
    about = {"known": fit.spread(data), "center": torch.zeros(6), **(facts or {})}
    fit.save(path, fit.users[:0], about)
    with safe_open(path, "pt") as file:
        note = file.metadata()
        found = {name: file.get_tensor(name) for name in file.keys()} | tensors  # noqa: SIM118
    save_file({name: x for name, x in found.items() if x is not None}, path, note)
    return path


@pytest.mark.parametrize("strengths", [{"l_mu": 1.0}, {"rank": 2}])
def test_strengths_are_given_together(strengths: dict) -> None:
    with pytest.raises(InputError, match="give all four"):
        check("mixed_logit", MixedLogit(**strengths), task(world(users=3)[0]))


@pytest.mark.parametrize("taste", [0.8, 0.0])
def test_a_personal_part_is_kept_only_where_tastes_differ(taste: float) -> None:
    fit = MixedLogit().fit(task(world(taste=taste)[0]))[0]
    assert (fit.describe()["chosen"]["tau2"] > 0) == fit.personal == (taste > 0)


@pytest.mark.slow
def test_a_low_rank_is_chosen_where_tastes_have_one() -> None:
    data, _ = world(users=200, pairs=30, F=20, rank=1)
    fit = MixedLogit().fit(task(data))[0]
    chosen = fit.facts["chosen"]
    assert chosen["pi"] < math.inf and chosen["rank"] in (1, 2)
    values = fit.facts["spectrum"]
    assert values[0] > 5 * values[2]
    again = given(data, **{k: chosen[k] for k in ("floor", "l_mu", "tau2", "pi", "rank")})
    torch.testing.assert_close(again.users, fit.users)


@pytest.mark.parametrize("pairs", [3, 10, 30])
def test_intervals_of_90_percent_cover_nine_of_ten_true_rewards(pairs: int) -> None:
    """Given the true distribution of tastes; an estimated one makes intervals narrower."""
    g = torch.Generator().manual_seed(0)
    S, counts = spread(2), [pairs] * 1000
    tastes = torch.randn(1000, 2, generator=g, dtype=DOUBLE) @ torch.linalg.cholesky(S).T
    Z, users = torch.randn(1000 * pairs, 3, generator=g, dtype=DOUBLE), Users(counts)
    odds = Z[:, 0] + (Z[:, 1:] * tastes[users.user]).sum(1)
    Z = Z * (2 * (torch.rand(len(Z), generator=g) < odds.sigmoid()).double() - 1)[:, None]
    prior = Prior(torch.zeros(2).double(), S)
    found = posteriors(Z, users, prior)
    cov = covariances(Z, users, prior, found)
    z = torch.randn(50, 2, generator=g, dtype=DOUBLE)
    off = ((tastes - found.mode) @ z.T).abs()
    sd = torch.einsum("nk,ukl,nl->un", z, cov, z).sqrt()
    assert 0.86 <= float((off < 1.645 * sd).double().mean()) <= 0.94


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairs", "F", "taste", "rank"),
    [(10, 6, 1.0, 2), (30, 6, 1.0, 2), (30, 20, 0.5, 3), (50, 20, 0.5, 6)],
)
def test_intervals_with_everything_estimated_cover_less(pairs, F, taste, rank, capsys) -> None:
    """Of 200 users' true reward differences, with strengths chosen and the prior estimated."""
    data, rewards = world(users=200, pairs=pairs, F=F, taste=taste, rank=rank)
    (fit,) = MixedLogit().fit(task(data))
    view = fit.view(data)
    cov = covariances(view, data, fit.prior, posteriors(view, data, fit.prior))
    x = torch.randn(50, F, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    z = fit.scale * x @ fit.directions.double()
    found = torch.stack([x @ fit.reward(state).double() for state in fit.users])
    sd = torch.einsum("nk,ukl,nl->un", z, cov, z).sqrt()
    covered = float(((rewards @ x.T - found).abs() < 1.645 * sd).double().mean())
    with capsys.disabled():
        print(f"\n90 % cover {100 * covered:.0f} %: {pairs} comparisons, F {F}, rank {rank}")
    assert 0.5 < covered < 0.97


@pytest.mark.timeout(20)
def test_a_walk_ends_though_each_of_two_candidates_may_be_better_than_the_other() -> None:
    class Better:
        def __lt__(self, _other: "Better") -> bool:
            return True

    search = object.__new__(Search)
    search.tries = lambda _candidate: Better()
    assert search._walk(first := Candidate(0.01, 1.0, 3.0), ("tau2", "l_mu")) != first


def test_a_choice_looks_at_500_users_at_most() -> None:
    data, _ = world(users=600, pairs=4, F=2)
    one, again = (Validation(task(data)).splits[0] for _ in range(2))
    assert one.num_users == 500 and one.fit.num_users == 400
    assert torch.equal(one.fit.features.x, again.fit.features.x)


@pytest.mark.parametrize(("share", "number"), [(0.4, 1), (1, 1), (2, 2), (3, 3), (9, 4)])
def test_small_data_are_split_several_times(share: float, number: int, monkeypatch) -> None:
    """By the comparisons of all users, though a choice looks at 500 of them."""
    data, _ = world(users=600, pairs=4, F=2)
    monkeypatch.setattr(validation, "ENOUGH", share * len(data))
    splits = Validation(task(data)).splits
    assert len(splits) == number
    fits = {tuple(split.fit.features.x.flatten().tolist()) for split in splits}
    assert len(fits) == number  # no two alike


def test_dialogues_are_held_out_whole_and_pseudo_new_users_too() -> None:
    """Which ones depends on users' names, not on their order."""
    data, _ = world(users=20, pairs=12)
    data.dialogs = torch.arange(240) // 3
    split, new = hold_out(data, 0), pseudo_new(data, 0, 2)
    assert not set(split.fit.dialogs.tolist()) & set(split.held.dialogs.tolist())
    assert len(split.fit) + len(split.held) == 240 and split.whose.tolist() == list(range(20))
    assert int(new.chosen.sum()) == len(new.few.names) == 4  # a fifth of 20
    assert new.few.names == new.held.names
    assert (new.few.counts == 6).all() and (new.held.counts == 6).all()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist()
    rows, names = torch.arange(240).view(20, 12)[order].flatten(), [data.names[u] for u in order]
    other = Comparisons(data.features.select(rows), [12] * 20, None, names, data.dialogs[rows])
    assert set(pseudo_new(other, 0, 2).few.names) == set(new.few.names)
    assert set(hold_out(other, 0).held.dialogs.tolist()) == set(split.held.dialogs.tolist())


def test_users_with_one_comparison_each_leave_nothing_to_choose_on() -> None:
    data, _ = world(users=6, pairs=1)
    assert not Validation(task(data)).possible
    assert RidgeBT().fit(task(data))[0].describe()["chosen"]["l_mu"] == 1.0
    assert MixedLogit().fit(task(data))[0].users.shape[0] == 6


def prompts_of_all(users: int, prompts: int, pairs: int) -> Comparisons:
    """Users who each answer some of the same prompts, two of whose four responses they compare."""
    g = torch.Generator().manual_seed(0)
    table = torch.randn(4 * prompts, 5, generator=g)
    picked = torch.cat([torch.randperm(prompts, generator=g)[:pairs] for _ in range(users)])
    ends = torch.stack([torch.randperm(4, generator=g)[:2] for _ in picked]) + 4 * picked[:, None]
    features = RowFeatures(lambda i: table[i], 5, ends[:, 0], ends[:, 1])
    return Comparisons(features, [pairs] * users, names=[str(u) for u in range(users)])


def test_prompts_that_users_share_are_held_out_of_everybodys_comparisons() -> None:
    data = prompts_of_all(users=40, prompts=120, pairs=30)
    split = Validation(task(data, stream=True)).splits[0]
    new = split.new
    for fitted, held, least in (
        (split.fit, split.held, 50), (split.fit, new.held, 5), (new.few, new.held, 5),
    ):  # fmt: skip
        assert not set(fitted.features.index.tolist()) & set(held.features.index.tolist())
        assert len(held) > least


def test_new_users_are_scored_with_each_number_of_shots_as_if_it_were_the_only_one() -> None:
    data, _ = world(users=40, weighted=True)
    split = Validation(task(data, shots=(0, 2, 7))).splits[0]
    fit, few = given(split.fit), split.new.few
    losses = []
    for count in (0, 2, 7):
        rows, users = subset(few, (count,), split.seed)
        state = fit.adapt(fit.view(few)[rows], users)
        logits = fit.logits(fit.view(split.new.held), state, split.new.held.user)
        losses.append(split.new.held.log_losses(logits))
    found = split.score(fit).new[split.new_rows]
    torch.testing.assert_close(found, torch.stack(losses).mean(0), atol=1e-9, rtol=0)


@pytest.mark.parametrize("place", range(len(STRENGTHS)))
def test_the_bottom_of_any_valley_of_ridges_is_found_in_five_tries(place: int) -> None:
    asked: set[int] = set()

    def loss(at: int) -> float:
        asked.add(at)
        return abs(at - place + 0.1)

    assert lowest(loss) == place and len(asked) == 5
