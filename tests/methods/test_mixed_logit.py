"""The mixed logit against slow references, and what must hold of it in planted worlds."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logsumexp
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lore.common.files import InputError
from lore.learning.comparisons import Comparisons, DenseFeatures, RowFeatures, Users
from lore.learning.method import Task, check
from lore.methods.fitting import validation
from lore.methods.fitting.geometry import measure
from lore.methods.fitting.lbfgs import minimise
from lore.methods.fitting.posterior import (
    Prior,
    blocks,
    covariances,
    posteriors,
)
from lore.methods.fitting.validation import Validation, hold_out, pseudo_new, subset
from lore.methods.mixed_logit import (
    Candidate,
    MixedFit,
    MixedLogit,
    Search,
    _leading,
    estimate,
    load,
)
from lore.methods.ridge_bt import STRENGTHS, RidgeBT, fit_shared, lowest
from planted import prefer

DOUBLE = torch.float64


def world(
    users: int = 40,
    pairs: int = 30,
    F: int = 6,
    taste: float = 1.0,
    rank: int = 2,
    seed: int = 0,
    weighted: bool = False,
) -> tuple[Comparisons, Tensor]:
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
    """Mode, covariance and log evidence of one user's taste, from the definitions."""
    P = np.linalg.inv(S)

    def loss(b: np.ndarray) -> float:
        return -weight @ log_expit(Z[:, 0] + Z[:, 1:] @ b) + b @ P @ b / 2

    b = minimize(loss, np.zeros(len(S)), tol=1e-12).x
    p = expit(Z[:, 0] + Z[:, 1:] @ b)
    H = P + (Z[:, 1:] * (weight * p * (1 - p))[:, None]).T @ Z[:, 1:]
    evidence = -loss(b) - np.linalg.slogdet(S)[1] / 2 - np.linalg.slogdet(H)[1] / 2
    return b, np.linalg.inv(H), evidence


def spread(K: int, seed: int = 0) -> Tensor:
    """Some covariance [K, K]."""
    root = torch.randn(K, K, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return root @ root.T + 0.3 * torch.eye(K).double()


# -------------------------------------------------------------------- posteriors


@pytest.mark.parametrize("K", [1, 3, 12])
def test_posteriors_are_those_of_the_definitions(K: int) -> None:
    """Users with fewer comparisons than tastes are solved in the dual, others in the tastes."""
    Z, users = shots(K, [3, 40, 0, 1, 7])
    prior = Prior(torch.zeros(K).double(), spread(K))
    found = posteriors(Z, users, prior, moment=True)
    cov = covariances(Z, users, prior, found)
    total = torch.zeros(K, K).double()
    for u in range(5):
        rows = users.user == u
        mode, wanted, _ = laplace_by_scipy(
            Z[rows].numpy(), users.weight[rows].numpy(), prior.cov.numpy()
        )
        np.testing.assert_allclose(found.mode[u].numpy(), mode, atol=2e-5)
        np.testing.assert_allclose(cov[u].numpy(), wanted, atol=2e-5)
        total += torch.from_numpy(np.outer(mode, mode) + wanted)
    torch.testing.assert_close(found.moment, total, atol=5e-4, rtol=1e-4)


def test_a_taste_with_many_choices_is_that_of_numerical_integration() -> None:
    """Laplace's method is exact in the limit; with 60 choices it is within a twentieth."""
    Z, users = shots(1, [60])
    found = posteriors(Z, users, Prior(torch.zeros(1).double(), torch.eye(1).double()))
    line = np.linspace(-6, 6, 6001)
    logs = users.weight.numpy() @ log_expit(Z[:, :1].numpy() + Z[:, 1:].numpy() * line)
    logs = logs - line**2 / 2
    share = np.exp(logs - logsumexp(logs))
    mean = share @ line
    sd = math.sqrt(share @ line**2 - mean**2)
    assert abs(float(found.mode[0, 0]) - mean) < 0.1 * sd


def test_a_start_from_another_prior_changes_nothing() -> None:
    Z, users = shots(4, [3, 9, 2])
    prior = Prior(torch.zeros(4).double(), spread(4))
    other = posteriors(Z, users, Prior(torch.zeros(4).double(), 9 * spread(4, 1)))
    again = posteriors(Z, users, prior, start=other.push)
    torch.testing.assert_close(again.mode, posteriors(Z, users, prior).mode, atol=1e-6, rtol=0)


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


def test_every_comparison_stands_in_one_block() -> None:
    users = Users([5, 0, 1, 30, 7, 8, 200, 2])
    rows = [block[1][block[2]] for block in blocks(users)]
    assert sorted(torch.cat(rows).tolist()) == list(range(len(users)))
    for who, numbers, there in blocks(users):
        for u, row, mask in zip(who, numbers, there, strict=True):
            assert (users.user[row[mask]] == u).all() and int(mask.sum()) == int(users.counts[u])


def test_what_em_maximises_never_falls_while_the_prior_is_estimated() -> None:
    """The evidence of all choices times the inverse Wishart prior."""
    data, _ = world(users=30)
    x = data.features.x
    view = torch.cat([torch.zeros(len(x), 1).double(), x], 1)
    evidence = []
    for rounds in (0, 1, 2, 3, 4, 5, 8):
        prior, _ = estimate(view, data, Candidate(None, 1.0, 1.0, 1.0), rounds=rounds)
        parts = zip(view.split(30), data.weight.split(30), strict=True)
        S = prior.cov.numpy()
        prior_of_S = -(np.linalg.slogdet(S)[1] + np.trace(np.linalg.inv(S))) / 2
        by_user = [laplace_by_scipy(Z.numpy(), w.numpy(), S)[2] for Z, w in parts]
        evidence.append(sum(by_user) + prior_of_S)
    assert evidence[-1] > evidence[0] + 1
    assert all(b > a - 0.05 for a, b in itertools.pairwise(evidence))


def test_a_covariance_of_a_given_rank_maximises_what_em_maximises() -> None:
    """EM's bound for N(0, S), -tr(S^-1 M) - log det S, is highest at the S of ``_leading`` among
    those of its rank above a given rest; and there are as many variances above the rest."""
    M, rank, rest = spread(5), 2, 0.3
    S = _leading(M, rank, rest)

    def bound(S: Tensor) -> float:
        return -float((torch.linalg.solve(S, M)).trace() + torch.logdet(S))

    values = torch.linalg.eigvalsh(S)
    torch.testing.assert_close(values[:-rank], torch.full((3,), rest).double())
    assert (values[-rank:] > rest).all()
    g = torch.Generator().manual_seed(1)
    root = torch.linalg.eigh(S - rest * torch.eye(5))
    B = root.eigenvectors[:, -rank:] * root.eigenvalues[-rank:].sqrt()
    for size in (0.01, 0.1, 1.0):
        for _ in range(30):
            other = B + size * torch.randn(5, rank, generator=g, dtype=DOUBLE)
            assert bound(other @ other.T + rest * torch.eye(5)) < bound(S)


@pytest.mark.parametrize("rank", [2, None])
def test_long_steps_end_where_short_ones_do(rank: int | None) -> None:
    """S is what plain EM finds, round by round, and nearer after five rounds. The last step is a
    plain one."""
    data, _ = world(users=60)
    view, strengths = given(data).view(data), Candidate(0.01, 0.5, 0.3, 1.0, rank, start=3.0)
    slow = Prior(torch.zeros(6).double(), 3 * torch.eye(6).double())
    plain = []
    for _ in range(150):
        moment = posteriors(view, data, slow, moment=True).moment
        S = (moment + 0.3 * torch.eye(6)) / 61
        slow = Prior(slow.mean, _leading(S, rank, 0.3) if rank else S)
        plain.append(slow.cov)
    once, prior = (estimate(view, data, strengths, rounds=n)[0] for n in (1, 80))
    torch.testing.assert_close(once.cov, plain[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(prior.cov, slow.cov, rtol=0.01, atol=0.01)
    near = estimate(view, data, strengths, rounds=5)[0].cov
    assert (near - slow.cov).norm() < 0.7 * (plain[4] - slow.cov).norm()


def test_planted_tastes_are_found_in_their_own_directions() -> None:
    data, rewards = world(users=300, pairs=60, rank=1)
    values = torch.tensor(given(data, tau2=3.0, pi=1.0).facts["spectrum"])
    assert values[0] > 4 * values[1]


# -------------------------------------------------------------------- the shared reward


@pytest.mark.parametrize("F", [1, 6, 20, 576])
@pytest.mark.parametrize("strength", [1e-12, 1e-6, 1e-2, 1.0, 100.0])
def test_the_ridge_is_that_of_scikit_learn(F: int, strength: float) -> None:
    g = torch.Generator().manual_seed(F)
    x = torch.randn(40 * F if F < 100 else 700, F, generator=g, dtype=DOUBLE)
    p = torch.sigmoid(x @ torch.randn(F, generator=g, dtype=DOUBLE) / F**0.5)
    x = x * (2 * (torch.rand(len(x), generator=g) < p).double() - 1)[:, None]
    data = Comparisons(DenseFeatures(x), [len(x)])
    geometry = measure(data)
    found = fit_shared(data, geometry, strength)
    y = (x / geometry.scale).numpy()
    both, labels = np.concatenate([y, -y]), np.repeat([1, 0], len(y))
    model = LogisticRegression(C=1 / (2 * strength), fit_intercept=False, tol=1e-12, max_iter=20000)
    mu = model.fit(both, labels).coef_[0]
    wanted = -log_expit(y @ mu).sum() + strength / 2 * mu @ mu
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


def test_scale_and_leading_directions_are_those_of_the_features() -> None:
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


# ------------------------------------------------------------------- properties


def given(
    data: Comparisons, l_mu: float = 0.5, tau2: float = 1.0, pi: float = 10.0, floor: float = 0.01,
    rank: int | None = None,
) -> MixedFit:  # fmt: skip
    """A fit with given strengths."""
    fit = MixedLogit(floor=floor, l_mu=l_mu, tau2=tau2, pi=pi, rank=rank).fit(task(data))[0]
    assert isinstance(fit, MixedFit)
    return fit


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


def test_much_prior_leaves_an_isotropic_covariance() -> None:
    data, _ = world()
    view = given(data).view(data)
    prior, _ = estimate(view, data, Candidate(0.01, 0.5, 2.0, 1e9))
    torch.testing.assert_close(prior.cov, 2.0 * torch.eye(6).double(), atol=1e-4, rtol=0)


def test_the_order_of_users_and_comparisons_does_not_matter() -> None:
    data, _ = world(users=15)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(3))
    rows = torch.cat([torch.randperm(30) + 30 * u for u in order.tolist()])
    names = [data.names[u] for u in order]
    other = Comparisons(data.features.select(rows), [30] * 15, data.weight[rows], names)
    torch.testing.assert_close(
        own(given(data), data)[rows], own(given(other), other), atol=2e-3, rtol=0
    )


def test_a_weight_of_two_is_the_same_comparison_twice() -> None:
    data, _ = world(users=10, pairs=10)
    rows = torch.arange(100).repeat_interleave(2)
    twice = Comparisons(data.features.select(rows), [20] * 10)
    heavy = Comparisons(data.features, [10] * 10, torch.full((100,), 2.0).double())
    a, b = own(given(twice), twice)[::2], own(given(heavy), heavy)
    torch.testing.assert_close(a, b, atol=5e-3, rtol=5e-3)


def test_swapped_labels_mirror_the_probabilities() -> None:
    data, _ = world(users=12)
    mirror = data.flipped(torch.ones(len(data), dtype=torch.bool))
    fit, other = given(data), given(mirror)
    torch.testing.assert_close(
        own(fit, data), -other.logits(other.view(data), other.users, data.user), atol=2e-3, rtol=0
    )


def test_features_from_disk_give_the_same() -> None:
    data, _ = world(users=10)
    table = torch.cat([data.features.x, torch.zeros(1, 6).double()])
    rows = torch.arange(len(data))
    streamed = RowFeatures(lambda i: table[i].float(), 6, rows, torch.full_like(rows, len(data)))
    disk = Comparisons(streamed, [30] * 10, names=data.names)
    method = MixedLogit(floor=0.1, l_mu=0.5, tau2=1.0, pi=3.0)
    logits = [own(method.fit(task(disk, stream=stream))[0], disk) for stream in (True, False)]
    torch.testing.assert_close(logits[0].sigmoid(), logits[1].sigmoid(), atol=1e-6, rtol=0)


def test_a_file_gives_back_rewards_by_name(tmp_path: Path) -> None:
    data, _ = world(users=10)
    fit = given(data)
    new = fit.adapt(fit.view(data)[:30], Users([30]), 0)
    fit.save(tmp_path / "m.safetensors", new, {"users": data.names, "users_unseen": ["new"]})
    saved = load(tmp_path / "m.safetensors")
    x, Z = data.features.x[:30], fit.view(data)[:30]
    average = fit.population_state
    for name, state in ((data.names[3], fit.users[3]), ("new", new[0]), (None, average)):
        odds = fit.logits(Z, state[None], torch.zeros(30, dtype=torch.long))
        torch.testing.assert_close(x.float() @ saved.direction(name), odds.float())
    with pytest.raises(InputError, match="Zaphod"):
        saved.direction("Zaphod")
    (tmp_path / "other.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="other.safetensors"):
        load(tmp_path / "other.safetensors")


def test_a_file_knows_how_uncertain_each_users_reward_is(tmp_path: Path) -> None:
    data, _ = world(users=10)
    fit, few = given(data), data.share(0, 5)  # two of them
    facts = {"users": data.names, "users_unseen": ["new", "newer"], "center": torch.zeros(6)}
    facts["known_unseen"] = fit.spread(few)
    fit.save(tmp_path / "m.safetensors", fit.adapt(fit.view(few), few, 0), facts)
    saved, x = load(tmp_path / "m.safetensors"), torch.eye(6)
    inverse = fit.prior.cov.inverse()
    for name, user in ((data.names[0], 0), (data.names[7], 7), ("newer", 1)):
        Z = fit.view(data)[data.user == user].double()
        p = (Z[:, 0] + Z[:, 1:] @ fit.users[user].double()).sigmoid()
        cov = (inverse + (p * (1 - p) * Z[:, 1:].T) @ Z[:, 1:]).inverse()
        z = x.double() @ fit.directions.double()
        expected = torch.stack([(row @ cov @ row).sqrt() for row in z])
        torch.testing.assert_close(saved.deviations(x, name).double(), expected, rtol=1e-3, atol=0)
    apart = torch.stack([(row @ fit.prior.cov @ row).sqrt() for row in z])
    torch.testing.assert_close(saved.deviations(x).double(), apart, rtol=1e-3, atol=0)


def test_of_too_many_comparisons_no_file_keeps_the_evidence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lore.methods.mixed_logit.MOST", 10)
    data, _ = world(users=10)
    fit = given(data)
    assert fit.evidence is None and fit.spread(data) is None
    fit.save(tmp_path / "m.safetensors", fit.users[:0], {"users": data.names})
    assert load(tmp_path / "m.safetensors").deviations(torch.eye(6), data.names[0]) is None


@pytest.mark.parametrize("damage", ["lopsided", "indefinite"])
def test_a_covariance_that_is_none_is_refused(tmp_path: Path, damage: str) -> None:
    fit = given(world(users=10)[0])
    fit.prior.cov[0, 1] += 1 if damage == "lopsided" else 0
    fit.prior.cov[0, 0] -= 0 if damage == "lopsided" else 100
    fit.save(tmp_path / "m.safetensors", fit.users[:0], {})
    with pytest.raises(InputError, match="not symmetric and positive definite"):
        load(tmp_path / "m.safetensors")


@pytest.mark.parametrize(("change", "message"), [
    ({"facts": {"users": None}}, "its users are not as expected"),
    ({"facts": {"users": ["one"]}}, "its users are not as expected"),
    ({"evidence_counts": torch.tensor([-1] * 10)}, "evidence_counts are no counts"),
    ({"evidence_counts": torch.ones(10)}, "evidence_counts are no counts"),
    ({"evidence_counts": torch.tensor([1] * 10)}, "evidence"),
    ({"evidence_counts": None}, "lacks evidence_counts"),
])  # fmt: skip
def test_a_file_that_was_changed_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(changed_file(tmp_path, **change))


def test_covariances_of_an_earlier_file_are_left_out_in_plain_words(tmp_path: Path, caplog) -> None:
    gone = {"evidence": None, "evidence_counts": None, "known": torch.eye(6).repeat(10, 1, 1)}
    saved = load(changed_file(tmp_path, {"users": list("abcdefghij")}, **gone))
    assert saved.deviations(torch.eye(6), "a") is None and saved.direction("a").shape == (6,)
    assert "standard deviations are left out; fit again" in caplog.text


def changed_file(folder: Path, facts: dict | None = None, **tensors: Tensor | None) -> Path:
    """A fit's file with other facts and tensors, a center among them; None takes one out."""
    fit, path = given(world(users=10)[0]), folder / "m.safetensors"
    fit.save(path, fit.users[:0], {"center": torch.zeros(6), **(facts or {})})
    with safe_open(path, "pt") as file:
        note = file.metadata()
        found = {name: file.get_tensor(name) for name in file.keys()} | tensors  # noqa: SIM118
    save_file({name: x for name, x in found.items() if x is not None}, path, note)
    return path


@pytest.mark.parametrize("strengths", [{"l_mu": 1.0}, {"rank": 2}])
def test_strengths_are_given_together(strengths: dict) -> None:
    with pytest.raises(InputError, match="give all four"):
        check("mixed_logit", MixedLogit(**strengths), task(world(users=3)[0]))


# ------------------------------------------------------------------- the choice


@pytest.mark.slow
def test_tastes_are_kept_where_they_are_and_dropped_where_labels_were_permuted() -> None:
    data, _ = world(users=60, pairs=30, taste=0.8)
    fit = MixedLogit().fit(task(data))[0]
    assert fit.describe()["chosen"]["tau2"] > 0
    g = torch.Generator().manual_seed(5)
    rows = torch.randperm(len(data), generator=g)
    mixed_up = Comparisons(data.features.select(rows), data.counts, names=data.names)
    other = MixedLogit().fit(task(mixed_up))[0]
    assert other.describe()["chosen"]["tau2"] == 0
    assert not other.personal


def test_users_who_are_all_alike_give_ridge_bt() -> None:
    data, _ = world(users=40, taste=0.0)
    ridge, mixed = (method.fit(task(data))[0] for method in (RidgeBT(), MixedLogit()))
    a, b = ridge.view(data)[:, 0], own(mixed, data)  # type: ignore[arg-type]
    torch.testing.assert_close(a.sigmoid(), b.sigmoid(), atol=0.02, rtol=0)


def test_personal_rewards_beat_the_shared_one_for_seen_and_new_users() -> None:
    data, rewards = world(users=80, pairs=30)
    new, new_rewards = world(users=80, pairs=30, seed=1)
    ridge, mixed = (m.fit(task(data, new))[0] for m in (RidgeBT(), MixedLogit()))
    test = torch.randn(500, 6, generator=torch.Generator().manual_seed(4), dtype=DOUBLE)

    def accuracy(fit: MixedFit, states: Tensor, truth: Tensor) -> float:
        found = torch.stack([fit.reward(state) for state in states])
        return float((((test @ found.T.to(test)) > 0) == ((test @ truth.T) > 0)).double().mean())

    right = (test @ ridge.direction > 0)[:, None] == (test @ rewards.T > 0)
    shared = float(right.double().mean())
    assert accuracy(mixed, mixed.users, rewards) > shared + 0.1
    few = mixed.adapt(mixed.view(new), new, 0)
    assert accuracy(mixed, few, new_rewards) > shared + 0.1


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


# ------------------------------------------------------------------- validation


@pytest.mark.timeout(20)
def test_a_walk_ends_though_each_of_two_candidates_may_be_better_than_the_other() -> None:
    class Better:
        def __lt__(self, _other: "Better") -> bool:
            return True

    search = object.__new__(Search)
    search.tries = lambda _candidate: Better()
    first = Candidate(0.01, 1.0, 3.0)
    assert search._walk(first, ("tau2", "l_mu")) != first


def test_a_choice_looks_at_500_users_at_most() -> None:
    data, _ = world(users=600, pairs=4, F=2)
    splits = Validation(task(data)).splits
    assert splits[0].num_users == 500 and splits[0].fit.num_users == 400
    again = Validation(task(data)).splits
    assert torch.equal(splits[0].fit.features.x, again[0].fit.features.x)
    few, _ = world(users=500, pairs=4, F=2)
    assert Validation(task(few)).splits[0].num_users == 500


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
    data, _ = world(users=20, pairs=12)
    data.dialogs = torch.arange(240) // 3
    split = hold_out(data, 0)
    assert split.held is not None
    assert not set(split.fit.dialogs.tolist()) & set(split.held.dialogs.tolist())
    assert len(split.fit) + len(split.held) == 240
    assert split.whose.tolist() == list(range(20))
    new = pseudo_new(data, 0, 2)
    assert new is not None
    assert int(new.chosen.sum()) == 4
    assert new.few.names == new.held.names and len(new.few.names) == 4  # a fifth of 20
    assert (new.few.counts == 6).all() and (new.held.counts == 6).all()


def test_what_is_held_out_depends_on_names_not_on_order() -> None:
    data, _ = world(users=10, pairs=10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    rows = torch.cat([torch.arange(10) + 10 * u for u in order.tolist()])
    other = Comparisons(
        data.features.select(rows), [10] * 10, names=[data.names[u] for u in order]
    )
    held = [hold_out(d, 0).held for d in (data, other)]
    sets = [{tuple(x) for x in h.features.x.tolist()} for h in held if h is not None]
    assert sets[0] == sets[1]
    apart = [pseudo_new(d, 0, 3) for d in (data, other)]
    assert set(apart[0].few.names) == set(apart[1].few.names)


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


def responses_of(data: Comparisons) -> set[int]:
    x = data.features
    assert isinstance(x, RowFeatures)
    return set(x.index.tolist())


def test_prompts_that_users_share_are_held_out_of_everybodys_comparisons() -> None:
    data = prompts_of_all(users=40, prompts=120, pairs=30)
    split = Validation(task(data, stream=True)).splits[0]
    assert split.held is not None and split.new is not None
    fitted = responses_of(split.fit)
    assert not fitted & responses_of(split.held)
    assert not fitted & responses_of(split.new.held)
    assert not responses_of(split.new.few) & responses_of(split.new.held)
    assert len(split.held) > 50 and len(split.new.held) > 5


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
