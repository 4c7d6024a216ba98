"""The mixed logit against slow references, and what must hold of it in planted worlds."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logsumexp
from torch import Tensor

from lore.common.files import InputError
from lore.learning.comparisons import Comparisons, DenseFeatures, RowFeatures, Users
from lore.learning.method import Task, check
from lore.methods.fitting.geometry import measure
from lore.methods.fitting.lbfgs import minimise
from lore.methods.fitting.linear import TRIES
from lore.methods.fitting.population import Objective, first_tastes, fit_population
from lore.methods.fitting.posterior import (
    CELLS,
    SPARE,
    Evidence,
    Prior,
    moments,
    posterior_states,
    predict,
    solve,
    unpack,
)
from lore.methods.fitting.validation import Validation, hold_out, pseudo_new, shared_prompts, subset
from lore.methods.mixed_fit import MixedFit, load
from lore.methods.mixed_logit import MixedLogit
from lore.methods.ridge_bt import STRENGTHS, RidgeBT, fit_shared, lowest

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
    yes = torch.rand(len(x), generator=g) < torch.sigmoid((x * rewards[user]).sum(1))
    x = x * (2 * yes.double() - 1)[:, None]
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


def on_a_grid(Z: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Log evidence, mean and covariance of one user's taste by integration on a grid."""
    K = Z.shape[1] - 1
    line = np.linspace(-7, 7, 4001 if K == 1 else 301)
    points = np.array(list(itertools.product(line, repeat=K)))
    logs = weight @ log_expit(Z[:, :1] + Z[:, 1:] @ points.T)
    logs = logs - (points**2).sum(1) / 2 - K / 2 * math.log(2 * math.pi)
    evidence = logsumexp(logs) + K * math.log(line[1] - line[0])
    share = np.exp(logs - logsumexp(logs))
    mean = share @ points
    return evidence, mean, (points - mean).T @ ((points - mean) * share[:, None])


# -------------------------------------------------------------------- posteriors


@pytest.mark.parametrize("K", [1, 2])
def test_posteriors_are_those_of_numerical_integration(K: int) -> None:
    Z, users = shots(K, [0, 1, 3, 8, 40])
    fit = solve(Evidence(Z, users), torch.zeros(K).double(), torch.eye(K).double())
    for u in range(5):
        mine = (users.user == u).numpy()
        evidence, mean, cov = on_a_grid(Z.numpy()[mine], users.weight.numpy()[mine])
        assert -1e-8 < evidence - float(fit.bound[u]) < 0.02
        np.testing.assert_allclose(fit.mean[u], mean, atol=0.03)
        np.testing.assert_allclose(fit.cov[u], cov, atol=0.05)


def test_the_bound_is_below_the_evidence_and_the_mean_is_right_in_five_dimensions() -> None:
    Z, users = shots(5, [30])
    fit = solve(Evidence(Z, users), torch.zeros(5).double(), torch.eye(5).double())
    rng = np.random.default_rng(0)
    factor = np.linalg.cholesky(1.5 * fit.cov[0].numpy())
    noise = rng.standard_normal((200_000, 5))
    points = fit.mean[0].numpy() + noise @ factor.T
    logs = users.weight.numpy() @ log_expit(Z[:, :1].numpy() + Z[:, 1:].numpy() @ points.T)
    logs += -(points**2).sum(1) / 2 + (noise**2).sum(1) / 2 + np.log(np.diag(factor)).sum()
    evidence = logsumexp(logs) - math.log(len(logs))
    share = np.exp(logs - logsumexp(logs))
    assert 0 < evidence - float(fit.bound[0]) < 0.05
    np.testing.assert_allclose(fit.mean[0], share @ points, atol=0.02)


def test_no_other_gaussian_has_a_greater_bound() -> None:
    K = 2
    Z, users = shots(K, [6])
    fit = solve(Evidence(Z, users), torch.zeros(K).double(), torch.eye(K).double())
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    weights = weights / weights.sum()
    z, w = Z.numpy(), users.weight.numpy()

    def negative_bound(parts: np.ndarray) -> float:
        m, L = parts[:K], np.zeros((K, K))
        L[np.tril_indices(K)] = parts[K:]
        a, sd = z[:, 0] + z[:, 1:] @ m, np.linalg.norm(z[:, 1:] @ L, axis=1)
        likely = w @ (log_expit(a[:, None] + sd[:, None] * nodes) @ weights)
        logs = np.log(np.abs(np.diag(L))).sum()
        return -(likely - ((L**2).sum() + m @ m - K) / 2 + logs)

    start = np.concatenate([np.zeros(K), np.eye(K)[np.tril_indices(K)]])
    found = minimize(negative_bound, start, method="BFGS", options={"gtol": 1e-8})
    assert float(fit.bound[0]) == pytest.approx(-found.fun, abs=1e-7)
    np.testing.assert_allclose(fit.mean[0], found.x[:K], atol=1e-4)


def test_no_users_bound_ever_falls() -> None:
    Z, users = shots(3, [1, 4, 9, 60])
    data = Evidence(6 * Z, users)
    zero, one = torch.zeros(3).double(), torch.eye(3).double()
    bounds = torch.stack([solve(data, zero, one, sweeps=n).bound for n in range(1, 16)])
    assert (bounds.diff(dim=0) >= -1e-10 * bounds[:-1].abs()).all()


def test_users_who_are_slow_to_converge_do_not_hold_up_the_others() -> None:
    Z, users = shots(2, [3] * 30)
    Z[:3] *= 40
    zero, one = torch.zeros(2).double(), torch.eye(2).double()
    together = solve(Evidence(Z, users), zero, one)
    assert (together.decrement <= 1e-10).all()
    for u in (0, 7):
        rows = (users.user == u).nonzero()[:, 0]
        alone = solve(Evidence(Z[rows], users.pick(rows, [3])), zero, one)
        torch.testing.assert_close(together.mean[u], alone.mean[0], atol=1e-5, rtol=0)


def test_a_block_has_whole_users_and_little_to_fill_up() -> None:
    counts = torch.randint(0, 400, (900,), generator=torch.Generator().manual_seed(0))
    data = Evidence(torch.zeros(int(counts.sum()), 3), Users(counts))
    users = torch.cat([block.users for block in data.blocks])
    assert users.sort().values.tolist() == list(range(900))
    for block in data.blocks:
        own = counts[block.users]
        assert (block.weight > 0).sum(1).tolist() == own.tolist()
        assert block.weight.numel() - int(own.sum()) <= SPARE
        assert block.weight.numel() <= CELLS["cpu"] or len(own) == 1
    assert len(data.blocks) < 2 * int(counts.sum()) / CELLS["cpu"]


def test_without_comparisons_a_user_is_nobody() -> None:
    prior = Prior(
        torch.tensor([0.3, 0.7]).double(), torch.randn(2, 3).double(), torch.eye(3).repeat(2, 1, 1)
        .double() * 0.4,
    )  # fmt: skip
    states = posterior_states(Evidence(torch.zeros(0, 4).double(), Users([0, 0])), prior)
    torch.testing.assert_close(states, prior.state.expand(2, -1))


def test_probabilities_are_those_of_numerical_integration() -> None:
    Z, users = shots(2, [5, 9])
    states = posterior_states(Evidence(Z, users), Prior.standard(2, Z))
    logits = predict(3 * Z, states, users.user, 1)
    rng = np.random.default_rng(1)
    _, mean, cov = unpack(states, 1)
    for i in (0, 7, 13):
        u = int(users.user[i])
        tastes = rng.multivariate_normal(mean[u, 0].numpy(), cov[u, 0].numpy(), 400_000)
        z = 3 * Z[i].numpy()
        assert float(torch.sigmoid(logits[i])) == pytest.approx(
            expit(z[0] + tastes @ z[1:]).mean(), abs=2e-3
        )
    a = 3 * Z[:, 0] + (3 * Z[:, 1:] * mean[users.user, 0]).sum(1)
    assert ((logits > 0) == (a > 0)).all()


def test_a_mixture_weighs_its_components_by_their_evidence() -> None:
    Z, users = shots(1, [12])
    centres, spread = torch.tensor([[-1.5], [2.0]]).double(), torch.full((2, 1, 1), 0.2).double()
    prior = Prior(torch.tensor([0.4, 0.6]).double(), centres, spread)
    state = posterior_states(Evidence(Z, users), prior)
    line = np.linspace(-8, 8, 8001)
    density = sum(
        p * np.exp(-((line - c) ** 2) / 0.4) for p, c in zip((0.4, 0.6), (-1.5, 2.0), strict=True)
    )
    logs = users.weight.numpy() @ log_expit(Z[:, :1].numpy() + Z[:, 1:].numpy() * line)
    share = density * np.exp(logs)
    share /= share.sum()
    mean, cov = moments(state, 2)
    assert float(mean[0, 0]) == pytest.approx(share @ line, abs=0.02)
    variance = share @ line**2 - (share @ line) ** 2
    assert float(cov[0, 0, 0]) == pytest.approx(variance, rel=0.05)


# -------------------------------------------------------------------- population


@pytest.mark.parametrize("white", [False, True])
def test_gradients_are_those_of_finite_differences(white: bool) -> None:
    data, _ = world(users=8, pairs=6, weighted=True)
    geometry = measure(data)
    geometry.white = white
    objective = Objective(data, geometry, (0.7, 1.3), inner=1e-13)
    theta = 0.5 * torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    _, gradient = objective(theta)
    for place in ((0, 0), (3, 0), (1, 1), (5, 2)):
        step = torch.zeros_like(theta)
        step[place] = 1e-4
        slope = (objective(theta + step)[0] - objective(theta - step)[0]) / 2e-4
        assert float(gradient[place]) == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_curvatures_are_those_of_numerical_integration() -> None:
    Z, users = shots(2, [3, 1, 4])
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, 2, generator=generator, dtype=DOUBLE)
    root = 0.3 * torch.randn(3, 2, 2, generator=generator, dtype=DOUBLE)
    cov = root @ root.mT
    points, shares = np.polynomial.hermite_e.hermegauss(100)
    bends = np.zeros(3)
    for z, u, weight in zip(Z.double(), users.user, users.weight, strict=True):
        sd = float(z[1:] @ cov[u] @ z[1:]) ** 0.5
        p = expit(float(z[0] + z[1:] @ mean[u]) + sd * points)
        squares = mean[u] ** 2 + cov[u].diagonal()
        bend = (p * (1 - p)) @ shares / shares.sum()
        bends += float(weight) * bend * np.array([1, *squares])
    assert Evidence(Z, users).curvature(mean, cov).numpy() == pytest.approx(bends, rel=1e-5)


@pytest.mark.parametrize("factor", (1e-4, 1.0, 1e4))
def test_a_first_curvature_of_the_wrong_size_costs_the_minimiser_little(factor: float) -> None:
    size = torch.logspace(0, 1, 50, dtype=DOUBLE)

    def bowl(x: Tensor) -> tuple[float, Tensor]:
        return float((size * (x - 1) ** 2).sum() / 2), size * (x - 1)

    found = minimise(bowl, torch.zeros(50).double(), lambda g: factor * g, 1e-12, 300)
    assert found.evaluations < 40  # 49 to 197 without the correction


def test_the_bound_never_falls_while_the_population_is_fitted() -> None:
    data, _ = world()
    geometry = measure(data)
    mu = fit_shared(data, geometry, 0.1).x
    B, rises = first_tastes(data, geometry, mu, 3)
    fit = fit_population(data, geometry, (0.1, 0.1 * float(rises[0])), torch.cat([mu, B], 1))
    assert len(fit.values) > 5
    assert all(b <= a for a, b in itertools.pairwise(fit.values))


def test_tastes_arise_where_the_score_says() -> None:
    """Just below the greatest eigenvalue tastes stay, just above they vanish."""
    data, _ = world()
    geometry = measure(data)
    for share, grows in ((0.9, True), (1.3, False)):
        mu = fit_shared(data, geometry, 0.1).x
        B, rises = first_tastes(data, geometry, mu, 1)
        strengths = 0.1, share * float(rises[0])
        fit = fit_population(data, geometry, strengths, torch.cat([mu, 0.05 * B], 1))
        assert (float(fit.theta[:, 1:].norm()) > 0.05) == grows


def test_scale_and_leading_directions_are_those_of_the_features() -> None:
    x = torch.randn(300, 90, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    x = x * (0.9 ** torch.arange(90))
    geometry = measure(Comparisons(DenseFeatures(x), [300]))
    square = float(x.square().sum(1).mean())
    assert geometry.scale == pytest.approx(square**0.5, rel=0.01)
    values = torch.linalg.eigvalsh(x.T @ x / 300).flip(0)[:10] / square
    torch.testing.assert_close(geometry.values[:10], values, rtol=0.02, atol=0)
    geometry.white = True
    stretched = x @ geometry.raw(torch.eye(90, dtype=DOUBLE))
    assert float(stretched.square().sum(1).mean()) == pytest.approx(1, rel=0.02)


def test_the_minimiser_finds_a_known_minimum() -> None:
    scales = torch.tensor([1.0, 10.0, 100.0]).double()

    def bowl(x: Tensor) -> tuple[float, Tensor]:
        off = x - 1
        return float((scales * off**2).sum() + (off**4).sum()), 2 * scales * off + 4 * off**3

    found = minimise(bowl, torch.zeros(3).double(), lambda g: g, 1e-14, 100)
    torch.testing.assert_close(found.x, torch.ones(3).double(), atol=1e-5, rtol=0)


# ------------------------------------------------------------------- properties


def given(data: Comparisons, l_mu: float = 0.5, l_B: float = 1.0, rank: int = 2) -> MixedFit:
    """A fit with given strengths."""
    fit = MixedLogit(rank=rank, l_mu=l_mu, l_B=l_B, mixtures=(1,)).fit(task(data))[0]
    assert isinstance(fit, MixedFit)
    return fit


def own(fit: MixedFit, data: Comparisons) -> Tensor:
    """Log odds of a fit's own users' comparisons."""
    return fit.logits(fit.view(data), fit.users, data.user)


def test_how_far_posteriors_are_solved_is_said_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fit = given(world()[0])
    assert 0 <= fit.facts["decrement"] < 1e-5
    assert f"bounds are within {fit.facts['decrement']:.0e} nats of their maxima" in caplog.text


def test_a_strong_prior_of_tastes_leaves_ridge_bt() -> None:
    data, _ = world()
    ridge = RidgeBT(strength=0.5).fit(task(data))[0]
    mixed = given(data, l_B=1e6)
    torch.testing.assert_close(own(mixed, data), ridge.view(data)[:, 0], atol=2e-3, rtol=0)


def test_weak_priors_and_many_pairs_leave_each_user_the_own_fit() -> None:
    data, _ = world(users=12, pairs=400, F=2)
    fit = given(data, l_mu=1e-6, l_B=1e-6)
    for u in range(3):
        mine = data.select(data.user == u)
        alone = fit_shared(mine, measure(mine), 1e-6)
        direction = measure(mine).raw(alone.x)[:, 0]
        mean, _ = fit.reward(fit.users[u])
        cosine = torch.nn.functional.cosine_similarity(mean, direction, dim=0)
        assert float(cosine) > 0.99
        assert float(mean.norm() / direction.norm()) == pytest.approx(1, abs=0.12)


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
    logits = [
        own(MixedLogit(2, 0.5, 1.0, mixtures=(1,)).fit(task(disk, stream=stream))[0], disk)
        for stream in (True, False)
    ]
    torch.testing.assert_close(logits[0].sigmoid(), logits[1].sigmoid(), atol=1e-6, rtol=0)


def test_a_file_gives_back_rewards_by_name(tmp_path: Path) -> None:
    data, _ = world(users=10)
    fit = given(data)
    new = fit.adapt(fit.view(data)[:30], Users([30]), 0)
    fit.save(tmp_path / "m.safetensors", new, {"users": data.names, "users_unseen": ["new"]})
    saved = load(tmp_path / "m.safetensors")
    x = data.features.x[:30]
    people = (data.names[3], fit.users[3]), ("new", new[0]), (None, fit.population_state)
    for name, state in people:
        mean, factor = saved.user_reward(name)
        Z = fit.view(data)[:30]
        m, S = moments(state[None], 1)
        torch.testing.assert_close(x @ mean, Z[:, 0] + Z[:, 1:] @ m[0])
        variance = torch.einsum("nk,kl,nl->n", Z[:, 1:], S[0], Z[:, 1:])
        torch.testing.assert_close((x @ factor).square().sum(1), variance)
    with pytest.raises(InputError, match="Zaphod"):
        saved.user_reward("Zaphod")
    (tmp_path / "other.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="other.safetensors"):
        load(tmp_path / "other.safetensors")


def test_strengths_are_given_together() -> None:
    with pytest.raises(InputError, match="--mixed_logit.l_B: give both"):
        check("mixed_logit", MixedLogit(l_mu=1.0), task(world(users=3)[0]))


# ------------------------------------------------------------------- the choice


@pytest.mark.slow
def test_tastes_are_kept_where_they_are_and_dropped_where_labels_were_permuted() -> None:
    data, _ = world(users=60, pairs=30, taste=0.8)
    fit = MixedLogit(rank=3).fit(task(data))[0]
    assert fit.describe()["chosen"]["components"] >= 1
    g = torch.Generator().manual_seed(5)
    rows = torch.randperm(len(data), generator=g)
    mixed_up = Comparisons(data.features.select(rows), data.counts, names=data.names)
    other = MixedLogit(rank=3).fit(task(mixed_up))[0]
    assert other.describe()["chosen"]["components"] == 0
    assert not other.personal


def test_users_who_are_all_alike_give_ridge_bt() -> None:
    data, _ = world(users=40, taste=0.0)
    ridge, mixed = (method.fit(task(data))[0] for method in (RidgeBT(), MixedLogit(rank=3)))
    a, b = ridge.view(data)[:, 0], own(mixed, data)  # type: ignore[arg-type]
    torch.testing.assert_close(a.sigmoid(), b.sigmoid(), atol=0.02, rtol=0)
    tried = mixed.describe()["tried"]  # five ridges, and no more of tastes than the coarse path
    assert {one["rank"] for one in tried} == {0, 3} and len(tried) < TRIES - 2
    assert not any(one["whitened"] for one in tried)


def test_personal_rewards_beat_the_shared_one_for_seen_and_new_users() -> None:
    data, rewards = world(users=80, pairs=30)
    new, new_rewards = world(users=80, pairs=30, seed=1)
    ridge, mixed = (m.fit(task(data, new))[0] for m in (RidgeBT(), MixedLogit(rank=3)))
    test = torch.randn(500, 6, generator=torch.Generator().manual_seed(4), dtype=DOUBLE)

    def accuracy(fit: MixedFit, states: Tensor, truth: Tensor) -> float:
        means = torch.stack([fit.reward(state)[0] for state in states])
        return float((((test @ means.T) > 0) == ((test @ truth.T) > 0)).double().mean())

    right = (test @ ridge.direction > 0)[:, None] == (test @ rewards.T > 0)
    shared = float(right.double().mean())
    assert accuracy(mixed, mixed.users, rewards) > shared + 0.1
    few = mixed.adapt(mixed.view(new), new, 0)
    assert accuracy(mixed, few, new_rewards) > shared + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [3, 10, 30])
def test_intervals_of_90_percent_cover_nine_of_ten_true_rewards(pairs: int) -> None:
    data, rewards = world(users=400, pairs=30, taste=0.7)
    new, truth = world(users=400, pairs=pairs, taste=0.7, seed=1)
    # Weak priors: it is the posteriors that are tested, and strong ones would shrink B as well
    fit = MixedLogit(rank=2, l_mu=0.1, l_B=0.1).fit(task(data, new, shots=(pairs,)))[0]
    states = fit.adapt(fit.view(new), new, 0)
    test = torch.randn(50, 6, generator=torch.Generator().manual_seed(4), dtype=DOUBLE)
    covered = []
    for state, reward in zip(states, truth, strict=True):
        mean, factor = fit.reward(state)
        sd = (test @ factor).norm(dim=1)
        covered.append(((test @ (reward - mean)).abs() < 1.645 * sd).double().mean())
    assert 0.85 <= float(torch.stack(covered).mean()) <= 0.95


# ------------------------------------------------------------------- validation


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
    assert not set(new.rest.names) & set(new.few.names)
    assert new.few.names == new.held.names and len(new.few.names) == 3
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
    assert MixedLogit(rank=2).fit(task(data))[0].users.shape[0] == 6


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
        rows, users = subset(few, count, split.seed)
        state = fit.adapt(fit.view(few)[rows], users)
        logits = fit.logits(fit.view(split.new.held), state, split.new.held.user)
        losses.append(split.new.held.log_losses(logits))
    found = split.score(fit).new[split.new_rows]
    torch.testing.assert_close(found, torch.stack(losses).mean(0), atol=1e-9, rtol=0)


def test_prompts_of_ones_own_or_too_few_are_held_out_by_dialogue() -> None:
    assert shared_prompts(prompts_of_all(users=1, prompts=30, pairs=30), 0) is None
    assert shared_prompts(prompts_of_all(users=20, prompts=30, pairs=30), 0) is None
    assert shared_prompts(world(users=3)[0], 0) is None


@pytest.mark.parametrize("place", range(len(STRENGTHS)))
def test_the_bottom_of_any_valley_of_ridges_is_found_in_five_tries(place: int) -> None:
    asked: set[int] = set()

    def loss(at: int) -> float:
        asked.add(at)
        return abs(at - place + 0.1)

    assert lowest(loss) == place and len(asked) == 5


@pytest.mark.slow
def test_no_more_directions_are_kept_than_stand_out() -> None:
    data, _ = world(users=60, F=12, rank=1)
    (fit,) = MixedLogit(rank=8, mixtures=(1,)).fit(task(data))
    ranks = [one["rank"] for one in fit.facts["tried"]]
    assert 8 in ranks and fit.facts["chosen"]["rank"] == 1
    assert fit.directions.shape == (12, 2) and fit.prior.mean.shape == (1, 1)


def test_a_choice_tries_twelve_settings_at_most_and_directions_can_be_taken_back() -> None:
    data, _ = world(users=60)
    fit = MixedLogit(rank=2).fit(task(data, shots=(5,)))[0]
    assert 8 <= len(fit.facts["tried"]) <= TRIES
    assert {one.get("whitened") for one in fit.facts["tried"]} == {False, True}
    here = replace(measure(data), white=True)
    there = here.stretched(here.raw(here.directions))
    torch.testing.assert_close(there, here.directions, atol=1e-4, rtol=0)
