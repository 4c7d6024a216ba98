"""The score test of users' tastes: its size, its power, and what it says."""

import pytest
import torch
from test_mixed_logit import world

from lore.learning.comparisons import Comparisons, DenseFeatures, RowFeatures
from lore.methods.fitting.score_test import score_test
from planted import prefer


@pytest.mark.slow
def test_the_size_is_at_most_5_percent() -> None:
    worlds = [world(users=20, pairs=15, taste=0.0, seed=seed)[0] for seed in range(300)]
    found = sum(score_test(data).p <= 0.05 for data in worlds)
    assert found <= 0.065 * 300  # below 5 % with 20 users: their own spread is a cautious error


def test_a_repeated_response_is_no_taste() -> None:
    """Ten copies of a comparison in one dialogue agree with each other, not with the user."""
    rows, ps = torch.arange(200).repeat_interleave(10), []
    for seed in range(20):
        x = world(users=20, pairs=10, taste=0.0, seed=seed)[0].features.x[rows]
        ps.append(score_test(Comparisons(DenseFeatures(x), [100] * 20, dialogs=rows.clone())).p)
    assert sum(p <= 0.05 for p in ps) <= 4


def test_the_variance_is_that_of_the_tastes() -> None:
    data, _ = world(users=300, pairs=30, taste=0.1, rank=6)
    found = score_test(data)
    scale = float(data.features.x.square().sum(1).mean()) ** 0.5
    shared = torch.Generator().manual_seed(99)
    torch.randn(6, generator=shared, dtype=torch.float64)
    B = 0.1 * torch.randn(6, 6, generator=shared, dtype=torch.float64)
    true = float(B.square().sum()) / 6 * scale**2
    assert found.variance == pytest.approx(true, rel=0.3)
    assert "weigh as much" in found.sentence
    assert "No sign" in score_test(world(taste=0.0)[0]).sentence


def choices(kind: str, shared: bool, seed: int, taste: float = 0.0) -> Comparisons:
    """Choices of 60 people among 80 texts that they share, or among texts of their own.

    Tastes for a text have ``taste`` standard deviations of all else that decides, and people do
    not differ where that is 0. Choices are made by a linear reward of the features, plus a hidden
    quality of each text (``quality``) or the noise of one rating of it by each person (``rating``).
    """
    g = torch.Generator().manual_seed(seed)
    users, pairs, texts = 60, 30, 80
    table = torch.randn(texts if shared else 2 * users * pairs, 8, generator=g)
    taste *= 1.0 if kind == "linear" else (1 + 1.5**2) ** 0.5
    reward = table[:, 0] + taste / 8**0.5 * torch.randn(users, 8, generator=g) @ table.T
    if kind == "quality":
        reward += 1.5 * torch.randn(len(table), generator=g)
    elif kind == "rating":
        reward += 1.5 * torch.randn(reward.shape, generator=g)
    if shared:  # a quarter of the texts each, so that a user's comparisons share responses
        few = torch.rand(users, texts, generator=g).argsort(1)[:, :20]
        two = torch.rand(users, pairs, 20, generator=g).argsort(2)[..., :2]
        ends = few.gather(1, two.flatten(1)).view(-1, 2)
    else:
        ends = torch.arange(2 * users * pairs).view(-1, 2)
    user, (first, second) = torch.arange(users).repeat_interleave(pairs), ends.T
    sure = 1.5 * (reward[user, first] - reward[user, second]) * (1e9 if kind == "rating" else 1)
    features = RowFeatures(lambda i: table[i], 8, *prefer(sure, first, second, g))
    return Comparisons(features, [pairs] * users)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["linear", "quality", "rating"])
@pytest.mark.parametrize(("taste", "seeds", "least", "most"), [
    pytest.param(0.0, 40, 0, 4, marks=pytest.mark.slow), (0.5, 10, 8, 10),
])  # fmt: skip
def test_people_are_found_to_differ_where_they_do(kind, shared, taste, seeds, least, most) -> None:
    found = [score_test(choices(kind, shared, seed, taste)).p <= 0.05 for seed in range(seeds)]
    assert least <= sum(found) <= most
