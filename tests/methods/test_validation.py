"""lore/methods/fitting/validation.py: what is held out for choices is related as the test is."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from lore.common.kinds import KINDS
from lore.learning import kinds
from lore.learning.comparisons import Comparisons, RowFeatures
from lore.learning.method import Method, Task
from lore.methods.fitting import validation
from lore.methods.fitting.validation import Scores, Tries, Validation
from lore.methods.mixed_logit import MixedLogit
from lore.methods.ridge_bt import RidgeBT

ALL_NEW = {"seen": {"known": 0.0, "met": 0.0, "new": 1.0}}
ALL_KNOWN = {"seen": {"known": 1.0, "met": 0.0, "new": 0.0}}


def comparisons(table: Tensor, ends: Tensor, users: int) -> Comparisons:
    features = RowFeatures(lambda i: table[i], table.shape[1], ends[:, 0], ends[:, 1])
    counts = [len(ends) // users] * users
    return Comparisons(features, counts, names=[f"u{u}" for u in range(users)])


def ratings(
    kind: str = "new", users: int = 60, texts: int = 100, pairs: int = 40, width: int = 300,
    shared: float = 1.5, own: float = 0.0,
) -> Task:  # fmt: skip
    """Ratings of texts, each of a quality that its features hardly show, compared in pairs by seen
    and as many new users; ``shared`` and ``own`` are standard deviations of a text's hidden quality
    and of what a user alone thinks of it. The test's comparisons are of other texts (new), of other
    pairs of a user's texts (known), or of texts that only others compared (met), half of all for
    each user."""
    g = torch.Generator().manual_seed(0)
    table = torch.randn(2 * texts, width, generator=g)
    quality = 0.3 * table[:, 0] + shared * torch.randn(2 * texts, generator=g)
    quality = quality + own * torch.randn(2 * users, 2 * texts, generator=g)
    orders = [torch.randperm(texts, generator=g) for _ in range(2 * users)]

    def side(who: range, test: bool) -> Comparisons:
        ends = []
        for order in orders[who.start : who.stop]:
            rows = order.chunk(2)[test] if kind == "met" else order + texts * (kind == "new") * test
            picked = [torch.randperm(len(rows), generator=g)[:2] for _ in range(pairs)]
            ends.append(rows[torch.stack(picked)])
        ends, user = torch.cat(ends), torch.tensor(who).repeat_interleave(pairs)
        first, second = (quality[user, ends[:, k]] for k in (0, 1))
        swap = first - second < torch.randn(len(ends), generator=g)
        return comparisons(table, torch.where(swap[:, None], ends.flip(1), ends), users)

    seen, new = range(users), range(users, 2 * users)
    train, few, test, unseen = (side(who, test) for test in (False, True) for who in (seen, new))
    few.names = unseen.names = [f"new {u}" for u in range(users)]
    return Task(train, few, test, unseen, kinds=kinds.shares_of_test(train, few, test, unseen))


def loss_of(method: Method, task: Task, kind: dict | None) -> float:
    fit = method.fit(replace(task, kinds=kind))[0]
    logits = fit.logits(fit.view(task.seen), fit.users, task.seen.user)
    return float(task.seen.log_losses(logits).mean())


WORLDS = {
    "new": (ratings, RidgeBT(), ALL_KNOWN),
    "known": (lambda: ratings("known", users=16, texts=60, pairs=120), RidgeBT(), ALL_NEW),
    "met": (
        lambda: ratings("met", users=24, texts=24, pairs=80, width=30, shared=0.5, own=6.0),
        MixedLogit(), ALL_KNOWN,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORLDS)
def test_a_choice_holds_on_the_test_only_if_what_it_held_out_is_of_the_same_kind(kind: str):
    world, method, other = WORLDS[kind]
    task = world()
    for who in ("seen", "unseen"):
        assert task.kinds[who][kind] > 0.95
    right, wrong = (loss_of(method, task, asked) for asked in (task.kinds, other))
    assert right < math.log(2) + 0.02 and wrong > right + 0.02


ALL_MET = {"seen": {"known": 0.0, "met": 1.0, "new": 0.0}}


@pytest.mark.parametrize(("asked", "size"), [
    (ALL_NEW, (40, 200)), (ALL_KNOWN, (40, 200)), (ALL_MET, (12, 60)),
    ({"seen": {"known": 0.5, "new": 0.5}}, (40, 200)),
])  # fmt: skip
def test_what_is_held_out_has_the_kinds_of_the_test(asked, size):
    task = ratings(texts=size[0], pairs=size[1])
    task.kinds = asked
    for split in Validation(Task(**vars(task) | {"stream": True})).splits:
        fit = kinds.judged(split.fit, names := {n: i for i, n in enumerate(task.train.names)})
        found = kinds.shares(kinds.judged(split.held, names), fit, fit)
        for kind in KINDS:
            assert found[kind] == pytest.approx(asked["seen"].get(kind, 0.0), abs=0.2)
        new = split.new
        assert not set(new.few.names) & set(split.fit.names)
        if asked is ALL_NEW:
            for fitted in (split.fit, new.few):
                there = set(fitted.features.index.tolist())
                assert not there & set(new.held.features.index.tolist())


def test_a_user_counts_once_seen_or_set_apart():
    nan = math.nan
    one = Scores(torch.tensor([1.0, 2.0, nan, nan]), torch.tensor([nan, 4.0, 7.0, nan]))
    assert one.loss == pytest.approx((1 + 3 + 7) / 3)
    zero = Scores(torch.zeros(4), torch.zeros(4))
    assert zero.gain(one)[0] == pytest.approx(11 / 3)


def test_without_new_users_nobody_is_set_apart():
    task = ratings(users=10)
    task.few = task.unseen = None
    assert all(split.new is None for split in Validation(task).splits)


def test_too_few_comparisons_hold_out_dialogues(caplog):
    task = ratings(users=4, texts=3, pairs=6)
    held = validation.hold_out(task.train, 0, ALL_NEW).held
    assert len(held) == 4 and "too few comparisons" in caplog.text


def test_differences_alone_are_held_out_by_comparison():
    data = ratings(users=5).train.in_memory()
    side = validation.sides(data, 0, ALL_NEW)["seen"]
    assert np.bincount(side).tolist() == [160, 40]


@pytest.mark.parametrize(("gain", "chosen"), [(0.05, (4, 0.01)), (0.015, (2, None))])
def test_whitened_features_are_taken_where_they_are_better_by_two_standard_errors(gain, chosen):
    swing = 0.1 * (-1.0) ** torch.arange(100)  # a standard error of .01 between the two

    def fit(_split: SimpleNamespace, candidate: tuple[int, float | None], _warm: None):
        strength, floor = candidate
        loss = 1 + 0.1 * abs(strength - (4 if floor else 2))
        if floor is not None:
            loss = loss - gain * (floor == 0.01) + swing
        losses = loss + torch.zeros(100)
        return SimpleNamespace(settings={"strength": strength, "floor": floor}, losses=losses), None

    split = SimpleNamespace(score=lambda fit: Scores(fit.losses, torch.full((100,), math.nan)))
    data = SimpleNamespace(splits=[split], possible=True)
    found = validation.choose_whitened(data, range(6), fit)
    assert found.candidate == chosen
    plain = [row["strength"] for row in found.tried if row["floor"] is None]
    white = {(row["strength"], row["floor"]) for row in found.tried if row["floor"]}
    assert plain == list(range(6))
    assert {(2, 0.1), (2, 0.01), (2, 0.001), (3, 0.01), (4, 0.01), (5, 0.01)} <= white


@pytest.mark.parametrize(("gap", "count"), [(2.0, 1), (0.6, 2), (0.4, 3), (0.0, 4)])
def test_a_candidate_is_fitted_to_as_many_splits_as_make_sure_which_is_better(gap, count):
    """Losses differ by the gap on every split, and on the first by chance as well."""
    error = 0.01  # of the mean of what follows
    swing = 10 * error * (-1.0) ** torch.arange(100, dtype=torch.float64)

    def split(place: int) -> SimpleNamespace:
        def score(fit: SimpleNamespace) -> Scores:
            losses = 1 + (validation.SURE * gap * error + swing * (place == 0)) * fit.worse
            return Scores(losses + torch.zeros(100), torch.full((100,), math.nan))

        return SimpleNamespace(score=score)

    def fit(_split: SimpleNamespace, worse: int, begin: int | None) -> tuple[SimpleNamespace, int]:
        assert begin in (None, 0, 1)
        return SimpleNamespace(worse=worse, settings={"worse": worse}), worse

    tries = Tries(SimpleNamespace(splits=[split(place) for place in range(4)]), fit)
    assert (tries(0) < tries(1)) is (gap > 0) and not tries(1) < tries(0)
    assert [one["splits"] for one in tries.tried] == [count, count]
    assert tries.tried[1]["loss"] - tries.tried[0]["loss"] == pytest.approx(
        validation.SURE * gap * error)
    tries(0).gain(tries(1))
    assert [one["splits"] for one in tries.tried] == [4, 4]
