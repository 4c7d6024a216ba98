"""Questions are chosen as plain loops over grids would choose them, and quickly."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from lore.common.files import InputError
from lore.elicitation import criteria as asking
from lore.elicitation.criteria import Belief, Known, Pool, next_question, score
from lore.learning.comparisons import Users
from lore.methods.fitting.posterior import Evidence, Prior, pack, posterior_states


class Grid(NamedTuple):
    """Probabilities [n] and points [n, K] of tastes."""

    weight: np.ndarray
    point: np.ndarray

    def says_yes(self, question: np.ndarray) -> np.ndarray:
        """How likely who has each taste prefers the first response [n]."""
        return 1 / (1 + np.exp(-(question[0] + self.point @ question[1:])))


def normal(mean: list[float], sd: list[float], points: int = 81) -> Grid:
    """A grid over independent normal variables."""
    nodes = np.linspace(-6, 6, points)
    weight = np.exp(-(nodes**2) / 2)
    places = np.meshgrid(*[np.arange(points)] * len(mean), indexing="ij")
    point = np.stack([m + s * nodes[i].ravel() for m, s, i in zip(mean, sd, places, strict=True)])
    return Grid(np.prod([weight[i].ravel() / weight.sum() for i in places], 0), point.T)


def entropy(p: np.ndarray) -> np.ndarray:
    return -sum(q * np.log(q) for q in (p, 1 - p))


def plain_information(question: np.ndarray, grid: Grid) -> float:
    """H(E p) - E H(p) on a grid of tastes."""
    p = grid.says_yes(question)
    return float(entropy(grid.weight @ p) - grid.weight @ entropy(p))


def plain_order_information(question: np.ndarray, target: np.ndarray, grid: Grid) -> float:
    """Mutual information of the answer and the order of a target pair, on the same grid."""
    p, above = grid.says_yes(question), target[0] + grid.point @ target[1:] > 0
    cells = np.array([
        [grid.weight @ (answer * order) for order in (~above, above)] for answer in (1 - p, p)
    ])  # fmt: skip
    found = cells * np.log(cells / cells.sum(1, keepdims=True) / cells.sum(0))
    return float(found[cells > 0].sum())


def known_of(mean: list[list[float]], sd: list[list[float]], weight: list[float]) -> Known:
    cov = torch.stack([torch.tensor(s).square().diag() for s in sd])
    tensors = torch.tensor(weight), torch.tensor(mean), cov
    state = pack(*(t.double()[None] for t in tensors))
    return Known(state, len(weight), torch.zeros(1, 0, 1 + len(mean[0])).double())


def questions(n: int, K: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, 1 + K, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("mean", "sd"), [([0.3], [1.2]), ([-1.0, 0.5], [0.7, 2.0])])
def test_information_is_that_of_numerical_integration(mean, sd):
    rows = questions(6, len(mean))
    found = score("information", known_of([mean], [sd], [1.0]), rows.T[None])[0]
    grid = normal(mean, sd)
    wanted = [plain_information(row, grid) for row in rows.numpy()]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert max(wanted) > 0.05


def test_information_of_a_mixture_is_that_of_numerical_integration():
    rows = questions(6, 1, seed=1)
    known = known_of([[-2.0], [1.5]], [[0.4], [0.8]], [0.3, 0.7])
    found = score("information", known, rows.T[None])
    parts = normal([-2.0], [0.4]), normal([1.5], [0.8])
    weight = np.concatenate([0.3 * parts[0].weight, 0.7 * parts[1].weight])
    grid = Grid(weight, np.concatenate([part.point for part in parts]))
    np.testing.assert_allclose(
        found[0], [plain_information(row, grid) for row in rows.numpy()], atol=1e-4
    )


@pytest.mark.parametrize(("mean", "sd"), [([0.3], [1.2]), ([-1.0, 0.5], [0.7, 2.0])])
def test_information_about_an_order_is_that_of_numerical_integration(mean, sd):
    rows, targets = questions(6, len(mean)), questions(3, len(mean), seed=2)
    known = known_of([mean], [sd], [1.0])
    found = score("ranking", known, rows.T[None], targets[None])[0]
    grid = normal(mean, sd, 401)
    pairs = [[plain_order_information(q, t, grid) for t in targets.numpy()] for q in rows.numpy()]
    np.testing.assert_allclose(found, np.mean(pairs, 1), atol=2e-3)
    assert np.corrcoef(found, np.mean(pairs, 1))[0, 1] > 0.99
    assert (found <= score("information", known, rows.T[None])[0] + 1e-3).all()


@pytest.mark.parametrize("r", [-0.999, -0.6, 0.0, 0.3, 0.95])
def test_bivariate_normal_probabilities_are_those_of_scipy(r):
    for h, k in ((0.0, 0.0), (-1.3, 0.4), (0.7, 2.0)):
        found = asking.both_above(*(torch.tensor(x).double() for x in (h, k, r)))
        wanted = multivariate_normal([0, 0], [[1, r], [r, 1]]).cdf([h, k])
        assert float(found) == pytest.approx(float(wanted), abs=2e-3 if abs(r) > 0.99 else 1e-5)


def test_pref_is_the_published_rule_in_plain_loops():
    K, pool = 3, questions(20, 3, seed=3)
    asked, u = [4, 11, 7], np.array([0.5, -1.0, 0.2])

    def slope(row: np.ndarray) -> float:
        p = 1 / (1 + math.exp(-(row[0] + row[1:] @ u)))
        return p * (1 - p)

    M = 1e-3 * np.eye(K)
    for i in asked:
        row = pool[i].numpy()
        M += slope(row) * np.outer(row[1:], row[1:])
    values = {
        i: slope(row) ** 2 * row[1:] @ np.linalg.inv(M) @ row[1:]
        for i, row in enumerate(pool.numpy())
        if i not in asked
    }
    belief = Belief.start(Prior.standard(K, pool))
    for i in asked:
        belief = belief.update(pool[i])
    chosen = next_question(belief, pool, "pref", asked, point=torch.tensor(u))
    assert chosen == max(values, key=values.get)


def test_prefs_first_question_is_drawn_at_random():
    belief = Belief.start(Prior.standard(2, torch.zeros(1).double()))
    firsts = {next_question(belief, questions(8, 2), "pref", generator=s) for s in range(60)}
    assert firsts == set(range(8))


def test_d_optimal_shrinks_the_laplace_posteriors_volume_most():
    prior, pool = Prior.standard(3, torch.zeros(1).double()), questions(30, 3, seed=4)
    belief = Belief.start(prior).update(pool[0]).update(pool[5], won=False)
    precision, mean = torch.linalg.inv(belief.covariance), belief.mean
    volumes = []
    for row in pool:
        p = torch.sigmoid(row[0] + row[1:] @ mean)
        volumes.append(torch.logdet(precision + p * (1 - p) * torch.outer(row[1:], row[1:])))
    volumes = torch.stack(volumes)
    volumes[[0, 5]] = -math.inf
    assert next_question(belief, pool, "d_optimal", [0, 5]) == int(volumes.argmax())


@pytest.mark.slow
@pytest.mark.parametrize("K", [1, 2, 8])
def test_a_belief_is_the_mixed_logits_posterior(K):
    prior, rows = Prior.standard(K, torch.zeros(1).double()), questions(12, K, seed=5)
    belief = Belief.start(prior)
    won = [i % 3 > 0 for i in range(12)]
    for row, yes in zip(rows, won, strict=True):
        belief = belief.update(row, yes)
    signs = torch.tensor([1.0 if yes else -1.0 for yes in won])
    wanted = posterior_states(Evidence(rows * signs[:, None], Users([12])), prior)[0]
    torch.testing.assert_close(belief.state, wanted)
    assert torch.linalg.eigvalsh(belief.covariance).max() < 1


def test_an_answer_moves_the_belief_towards_it():
    belief = Belief.start(Prior.standard(1, torch.zeros(1).double()))
    question = torch.tensor([0.0, 1.0])
    assert belief.update(question, True).mean > 0 > belief.update(question, False).mean


CRITERIA = asking.CRITERIA


@pytest.mark.parametrize("criterion", CRITERIA)
def test_which_response_comes_first_changes_no_choice(criterion):
    pool = questions(50, 3, seed=6)
    belief = Belief.start(Prior.standard(3, pool)).update(pool[0])
    coin = torch.where(torch.arange(50) % 2 > 0, -1.0, 1.0)[:, None]
    chosen = [next_question(belief, rows, criterion, [0], 3) for rows in (pool, pool * coin)]
    assert chosen[0] == chosen[1] != 0


@pytest.mark.parametrize("criterion", CRITERIA)
def test_no_question_comes_twice_and_a_pair_that_was_asked_comes_last(criterion):
    distinct = questions(5, 2, seed=7)
    pool = torch.cat([distinct, distinct.flip(0), -distinct])  # each pair three times
    belief, asked = Belief.start(Prior.standard(2, pool)), []
    for _ in range(15):
        asked.append(next_question(belief, pool, criterion, asked, len(asked)))
        belief = belief.update(pool[asked[-1]])
    assert sorted(asked) == list(range(15))
    same = asking.distinct(pool)
    assert len(same[asked[:5]].unique()) == 5
    with pytest.raises(InputError, match="nothing left to ask"):
        next_question(belief, pool, criterion, asked)


def test_among_equals_any_may_be_asked():
    pool = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 0.1], [0.0, -1.0]])
    belief = Belief.start(Prior.standard(1, torch.zeros(1).double()))
    found = {next_question(belief, pool, "information", generator=s) for s in range(40)}
    assert found == {0, 1, 3}


def test_an_empty_pool_and_an_unknown_criterion_are_refused():
    belief = Belief.start(Prior.standard(1, torch.zeros(1).double()))
    with pytest.raises(InputError, match="nothing to ask"):
        next_question(belief, torch.zeros(0, 2))
    with pytest.raises(InputError, match="criterion surprise: there are random"):
        next_question(belief, torch.zeros(3, 2), "surprise")


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("components", [1, 3])
def test_the_short_list_keeps_the_most_informative_question(spread, components):
    g = torch.Generator().manual_seed(8)
    mean = 2 * torch.randn(components, 4, generator=g).double()
    prior = Prior(torch.ones(components).double() / components, mean,
                  spread**2 * torch.eye(4).double().expand(components, 4, 4))  # fmt: skip
    belief, pool = Belief.start(prior), questions(20_000, 4, seed=9)
    exact = score("information", Known(belief.state[None], components, belief.answers[None]),
                  pool.T[None])[0]  # fmt: skip
    chosen = next_question(belief, pool, "information")
    assert exact[chosen] >= exact.max() * (1 - 1e-5)


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("K", [1, 5, 10])
def test_the_short_list_keeps_a_question_as_good_for_the_order_of_targets(K, spread):
    pool, targets = questions(2000, K, seed=10), questions(50, K, seed=11)
    prior = Prior(torch.ones(1).double(), torch.ones(1, K).double() / K,
                  spread**2 * torch.eye(K).double()[None])  # fmt: skip
    belief = Belief.start(prior).update(pool[0]).update(pool[1], won=False)
    known = Known(belief.state[None], 1, belief.answers[None])
    plain = score("ranking", known, pool.T[None], targets[None])[0]
    plain[:2] = 0  # asked
    chosen = next_question(belief, pool, "ranking", [0, 1], targets=targets)
    assert plain[chosen] >= 0.98 * plain.max()
    assert plain.median() < 0.7 * plain.max()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ten_thousand_questions_take_well_under_a_second(criterion):
    pool = Pool(questions(10_000, 8, dtype=torch.float32))
    belief = Belief.start(Prior.standard(8, torch.zeros(1).double())).update(pool.rows[0, :, 0])
    start = time.perf_counter()
    next_question(belief, pool, criterion, [0], 0)
    assert time.perf_counter() - start < 1
