"""Questions are chosen as plain loops over grids would choose them, and quickly."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch

from lore.common.files import InputError
from lore.elicitation import criteria as asking
from lore.elicitation.criteria import Belief, Pool, next_question, score
from lore.learning.comparisons import Users
from lore.methods.fitting.posterior import Prior, covariances, posteriors


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


def given(mean: list[float], sd: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [1, K] and covariance [1, K, K] of one user's tastes."""
    return torch.tensor([mean]).double(), torch.tensor(sd).double().square().diag()[None]


def start(K: int, spread: float = 1.0, mean: torch.Tensor | None = None) -> Belief:
    """Before any answer."""
    mean = torch.zeros(K).double() if mean is None else mean
    prior = Prior(mean, spread**2 * torch.eye(K).double())
    return Belief.after(prior, torch.zeros(0, 1 + K))


def questions(n: int, K: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, 1 + K, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("mean", "sd"), [([0.3], [1.2]), ([-1.0, 0.5], [0.7, 2.0])])
def test_information_is_that_of_numerical_integration(mean, sd):
    rows = questions(6, len(mean))
    found = score("information", *given(mean, sd), rows.T[None])[0]
    grid = normal(mean, sd)
    wanted = [plain_information(row, grid) for row in rows.numpy()]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert max(wanted) > 0.05


def test_d_optimal_shrinks_the_laplace_posteriors_volume_most():
    pool = questions(30, 3, seed=4)
    belief = start(3).update(pool[0]).update(pool[5], won=False)
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
    rows, belief = questions(12, K, seed=5), start(K)
    won = [i % 3 > 0 for i in range(12)]
    for row, yes in zip(rows, won, strict=True):
        belief = belief.update(row, yes)
    signs = torch.tensor([1.0 if yes else -1.0 for yes in won])
    Z, users = rows * signs[:, None], Users([12])
    wanted = posteriors(Z, users, belief.prior)
    torch.testing.assert_close(belief.mean, wanted.mode[0])
    cov = covariances(Z, users, belief.prior, wanted)[0]
    torch.testing.assert_close(belief.covariance, cov)
    assert torch.linalg.eigvalsh(belief.covariance).max() < 1


def test_an_answer_moves_the_belief_towards_it():
    belief = start(1)
    question = torch.tensor([0.0, 1.0])
    assert belief.update(question, True).mean > 0 > belief.update(question, False).mean


CRITERIA = asking.CRITERIA


@pytest.mark.parametrize("criterion", CRITERIA)
def test_which_response_comes_first_changes_no_choice(criterion):
    pool = questions(50, 3, seed=6)
    belief = start(3).update(pool[0])
    coin = torch.where(torch.arange(50) % 2 > 0, -1.0, 1.0)[:, None]
    chosen = [next_question(belief, rows, criterion, [0], 3) for rows in (pool, pool * coin)]
    assert chosen[0] == chosen[1] != 0


@pytest.mark.parametrize("criterion", CRITERIA)
def test_no_question_comes_twice_and_a_pair_that_was_asked_comes_last(criterion):
    distinct = questions(5, 2, seed=7)
    pool = torch.cat([distinct, distinct.flip(0), -distinct])  # each pair three times
    belief, asked = start(2), []
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
    belief = start(1)
    found = {next_question(belief, pool, "information", generator=s) for s in range(40)}
    assert found == {0, 1, 3}


def test_an_empty_pool_and_an_unknown_criterion_are_refused():
    belief = start(1)
    with pytest.raises(InputError, match="nothing to ask"):
        next_question(belief, torch.zeros(0, 2))
    with pytest.raises(InputError, match="criterion surprise: there are random"):
        next_question(belief, torch.zeros(3, 2), "surprise")


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_the_short_list_keeps_the_most_informative_question(spread):
    mean = 2 * torch.randn(4, generator=torch.Generator().manual_seed(8)).double()
    belief, pool = start(4, spread, mean), questions(20_000, 4, seed=9)
    exact = score("information", belief.mean[None], belief.covariance[None], pool.T[None])[0]
    chosen = next_question(belief, pool, "information")
    assert exact[chosen] >= exact.max() * (1 - 1e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ten_thousand_questions_take_well_under_a_second(criterion):
    pool = Pool(questions(10_000, 8, dtype=torch.float32))
    belief = start(8).update(pool.rows[0, :, 0])
    begin = time.perf_counter()
    next_question(belief, pool, criterion, [0], 0)
    assert time.perf_counter() - begin < 1
