"""Fits and their controls against plain loops, and what a run's folder keeps."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import people
import reference
import utils
import worlds
from lore.common.files import InputError
from lore.common.settings import OptimizerChoice
from lore.experiments import judging, metrics, runs
from lore.experiments import runner as experiments
from lore.experiments.report import tables as reports
from lore.learning import comparisons, training
from lore.learning.basis import load_basis
from lore.learning.comparisons import Comparisons, draw_shots
from lore.learning.method import Fitted, Task
from lore.methods import lore as lore_method
from lore.methods.fitting.validation import Validation, hold_out
from lore.methods.lore import Lore
from lore.methods.mixed_logit import MixedLogit
from lore.methods.saved import load_learned
from lore.preparing import tables as preparing
from people import People, fit, records, repeats, saved, settings

CPU = torch.device("cpu")
SETS = {"train": "train", "seen": "seen", "few_shot": "few", "unseen": "unseen"}
TINY = {"iterations": 10, "few_shot_iterations": 3}  # where it does not matter what is learned
tiny = functools.partial(fit, **TINY)


@pytest.fixture(scope="module")
def world() -> People:
    return people.planted()


@pytest.fixture(scope="module")
def four() -> People:
    """Two users of each kind, so that another one is the only other one."""
    return people.planted(users=4)


@pytest.fixture(autouse=True, scope="module")
def no_report() -> Iterator[None]:
    """No tables and plots, which take far longer than what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "report", lambda folder: f"report of {folder}")
        yield


@pytest.fixture(scope="module")
def of_four(four, tmp_path_factory) -> Path:
    """A finished run on four users; not to be changed."""
    return fit(four, tmp_path_factory.mktemp("four"))[1]


@pytest.fixture(scope="module")
def task(world) -> Task:
    return task_of(world)


def task_of(world: People, unit: str = "dialogues") -> Task:
    return world.tasks(unit).task(0, CPU, world.store.head, False, (0, 1))


def fits_of(folder: Path) -> list[dict[str, Any]]:
    """What is written of the fits of all repeats."""
    parts = [part for repeat in saved(folder)["seeds"] for part in repeat["methods"].values()]
    return [fit for part in parts for fit in part["fits"]]


def same(record: dict[str, Any], expected: tuple[np.ndarray, np.ndarray], rtol: float = 0) -> None:
    """A record's accuracies and log losses are these."""
    for name, values in zip(("accuracy", "log_loss"), expected, strict=True):
        assert np.allclose(record[name], values, rtol=rtol, atol=2e-5), (name, record)


# --------------------------------------------------------------------- Judging a fit


def test_results_are_those_of_the_saved_bases_and_of_every_users_own_model(four, of_four):
    sets, found = four.tasks().draw(0, CPU), records(of_four)
    for label, file in {"reference": "basis-K00", "BT": "basis-K01", "Ridge BT": "ridge_bt",
                        "LoRe K=2": "basis-K02"}.items():  # fmt: skip
        basis = load_basis(of_four / f"{file}.safetensors")
        for name, part in SETS.items():
            data, W = getattr(sets, part), basis.W if name in ("train", "seen") else basis.W_unseen
            states = {"": W}
            if label == "LoRe K=2" and name in ("seen", "unseen"):
                states |= {"population": basis.W.mean(0).expand(2, 2), "another": W[[1, 0]]}
            for control, state in states.items():
                expected = people.plain(four.store, data, basis.V, state)
                same(found.pop((label, control, name, None)), expected)
    assert torch.equal(load_basis(of_four / "basis-K00.safetensors").V[:, 0], four.store.head)
    for name, part in SETS.items():
        data = (sets.train if part in ("train", "seen") else sets.few).in_memory()
        x, weights = (some.split(data.counts.tolist()) for some in (data.features.x, data.weight))
        own = torch.cat(utils.learn_multiple(x, 20, weights=weights), 1).T
        expected = people.plain(four.store, getattr(sets, part), torch.eye(8), own)
        same(found.pop(("own model", "", name, None)), expected, rtol=1e-3)
    assert set(found) == {("LoRe K=2", "shuffled", "unseen", None)}
    personal = [fit["label"] for fit in fits_of(of_four) if fit["personal"]]
    assert personal == ["own model", "LoRe K=2"]


class Sum(Fitted):
    """A user's state is the sum of the user's comparisons; what it was shown is kept."""

    label, settings, controlled = "sum", {}, True

    def __init__(self, task: Task) -> None:
        self.population_state, self.shown = torch.arange(8.0), []
        self.users = self.adapt(self.view(task.train), task.train, 0)
        self.own = self.adapt(self.view(task.few), task.few, 0)
        self.shown.clear()

    def view(self, data: Comparisons) -> Tensor:
        return data.in_memory().features.x

    def adapt(self, view: Tensor, users: comparisons.Users, seed: comparisons.Seed) -> Tensor:
        self.shown.append((view, users))
        state = torch.stack([view[users.user == u].sum(0) for u in range(users.num_users)])
        return torch.where(users.counts[:, None] > 0, state, self.population_state)

    def logits(self, view: Tensor, state: Tensor, user: Tensor) -> Tensor:
        return (view * state[user]).sum(1) / 1e4

    def judged(self, task: Task) -> dict[tuple[str, str], dict[str, Any]]:
        """Control and set -> record."""
        return {(r["control"], r["set"]): r for r in judging.evaluate(self, task, self.own)}

    def swept(self, task: Task, sizes: tuple[int, ...], trials: int) -> dict[tuple, dict[str, Any]]:
        """Control, set and number of shots -> record."""
        draws = draw_shots(task.few, sizes, trials, 0)
        every = judging.sweep(self, task, draws)
        return {(r["control"], r["set"], r["shots"]): r for r in every}


def by_user(data: Comparisons, values: Tensor) -> list[float]:
    """Every user's weighted mean."""
    owns = [data.user == u for u in range(data.num_users)]
    return [float((data.weight * values)[own].sum() / data.weight[own].sum()) for own in owns]


def means(data: Comparisons, x: Tensor, states: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Every user's accuracy and log loss with each of the states, averaged over these."""
    found = []
    for state in states:
        z = torch.stack([x[i] @ state[u] for i, u in enumerate(data.user.tolist())]).double() / 1e4
        found.append([by_user(data, z > 0), by_user(data, torch.nn.functional.softplus(-z))])
    return tuple(np.array(found).mean(0))


def of_all_kinds(world: People) -> People:
    """Every third held-out comparison is of two responses that the user judged in training, every
    third of two that other seen users judged; two users have new ones alone."""
    table, rng = world.table.copy(), np.random.default_rng(0)
    train = table[table.split == "train"]
    for place, (row, said) in enumerate(table[table.split == "test"].iterrows()):
        own = train.user_id == said.user_id
        pool = train[own] if place % 3 == 0 else train[train.seen & ~own]
        if place % 3 < 2 and said.user_id not in ("p00", "p02"):
            table.loc[row, ["chosen", "rejected"]] = rng.choice(pool.chosen, 2, replace=False)
    return world._replace(table=table)


def test_figures_by_kind_are_those_of_a_plain_loop(world):
    task = task_of(of_all_kinds(world))
    toy = Sum(task)
    judged, training = toy.judged(task), {row for side in people.ends(task.train) for row in side}
    for name, train, state in (("seen", task.train, toy.users), ("unseen", task.few, toy.own)):
        test, found = getattr(task, name), judged["", name]["kinds"]
        z = toy.logits(toy.view(test), state, test.user).double()
        right, loss = (z > 0).double(), torch.nn.functional.softplus(-z)
        own = {(user, end) for user, *pair, _ in people.listed(train) for end in pair}
        rows = collections.defaultdict(list)
        for row, (user, *pair, _) in enumerate(people.listed(test)):
            others = {end for end in pair if (user, end) not in own}
            rows[user, "new" if others - training else "met" if others else "known"].append(row)
        assert {kind for _, kind in rows} == set(found) == {"known", "met", "new"}
        for (u, user), kind in itertools.product(enumerate(test.names), found):
            some = rows[user, kind]
            for key, values in (("accuracy", right), ("log_loss", loss)):
                expected = float(test.weight[some] @ values[some] / test.weight[some].sum())
                expected = pytest.approx(expected, abs=2e-5) if some else None
                assert found[kind][key][u] == expected
    assert toy.swept(task, (99,), 1)["", "unseen", 99]["kinds"] == judged["", "unseen"]["kinds"]
    assert "kinds" not in judged["", "train"]
    assert None in judged["", "seen"]["kinds"]["known"]["accuracy"]


@pytest.mark.parametrize("again", [9, 0])
def test_where_people_repeat_themselves_the_report_says_how_often(four, tmp_path, again):
    info = {"retest": {"judged_again": again, "sentence": "Users chose as before in 8."},
            "split": {"by": "pairs", "sentence": "Pairs were held out."}}  # fmt: skip
    _, folder = tiny(four._replace(info={**four.info, **info}), tmp_path, methods=())
    facts = saved(folder)["seeds"][0]["facts"]
    ceiling = "The ceiling of any method: Users chose as before in 8." if again else None
    assert facts.get("retest") == ceiling and facts["split"] == "Pairs were held out."


def test_shuffled_labels_are_coins_for_every_comparison_and_fitted_again(task):
    toy = Sum(task)
    x, found = toy.view(task.few), toy.judged(task)
    (swapped, _), *shown = toy.shown  # all of them first, for the label sensitivity
    assert torch.equal(swapped, -x) and len(shown) == judging.SHUFFLES
    coins = [(view == -x).all(1) for view, _ in shown]
    for coin, (view, users) in zip(coins, shown, strict=True):
        assert ((view == x).all(1) | coin).all() and 0.3 < coin.float().mean() < 0.7
        assert torch.equal(users.user, task.few.user) and torch.equal(users.weight, task.few.weight)
    assert not torch.equal(coins[0], coins[1])
    states = [toy.adapt(view, users, 0) for view, users in shown]
    same(found["shuffled", "unseen"], means(task.unseen, toy.view(task.unseen), states))
    assert ("shuffled", "seen") not in found


def test_responses_that_a_direction_likes_are_those_of_a_plain_loop(of_four, four):
    (fit,) = saved(of_four)["seeds"][0]["methods"]["lore"]["fits"]
    V, seen = load_basis(of_four / fit["file"]).V, four.tasks().draw(0, CPU).seen
    rows = sorted({row for side in people.ends(seen) for row in side})
    for c, likes in enumerate(fit["likes"]):
        reward = {row: float(four.store.x[row] @ V[:, c]) for row in rows}
        apart = {r: reward[r] - (reward[r] + reward[r ^ 1]) / 2 for r in rows}
        order = sorted(rows, key=apart.get)
        for key, expected in (("most", order[::-1]), ("least", order)):
            said = [like["response"] for like in likes[key]]
            assert said == [f"answer {row}" for row in expected[: experiments.LIKED]]
            assert likes[key][0]["prompt"] == f"what of {expected[0] // 2}?"
    assert [likes["direction"] for likes in fit["likes"]] == ["1", "2"]


@given(st.integers(2, 40), st.integers(0, 1000))
def test_a_swap_gives_every_user_another_ones_place(users, seed):
    other = judging.swap(users, torch.Generator().manual_seed(seed))
    assert sorted(other.tolist()) == list(range(users))
    assert not (other == torch.arange(users)).any()


def test_another_users_figures_are_the_mean_over_several_others(task, monkeypatch):
    toy, swaps, draw = Sum(task), [], judging.swap
    monkeypatch.setattr(judging, "swap", lambda *given: swaps.append(draw(*given)) or swaps[-1])
    found = toy.judged(task)
    assert len(swaps) == 2 * judging.PERMUTATIONS
    assert len({tuple(order.tolist()) for order in swaps}) > judging.PERMUTATIONS
    for part, state, orders in (("seen", toy.users, swaps[::2]), ("unseen", toy.own, swaps[1::2])):
        data = getattr(task, part)
        expected = means(data, toy.view(data), [state[order] for order in orders])
        same(found["another", part], expected)
        population = toy.population_state.expand_as(state)
        same(found["population", part], means(data, toy.view(data), [population]))


@pytest.mark.parametrize(("V", "W", "rank", "entropy", "cosines"), [
    (torch.eye(3)[:, :2], torch.full((4, 2), 0.5), 2, 1, "0.00 to 1.00"),
    (-torch.eye(3)[:, [0, 0]], torch.eye(2), 1, 0, "-1.00 to -1.00"),
])  # fmt: skip
def test_a_basis_is_described(V, W, rank, entropy, cosines):
    direction = torch.tensor([1.0, 0.0, 0.0])
    basis = utils.Basis(V, W, direction, settings={"rank": 2}, losses=torch.arange(1000.0))
    said = lore_method.LoreFit(Lore(ranks=(2,)), basis).describe()
    assert said["effective_rank"] == pytest.approx(rank) and said["columns"] == 2
    assert said["weight_entropy"] == pytest.approx(entropy) and cosines in said["note"]
    assert said["losses"] == list(range(0, 1000, 2)) and said["loss_step"] == 2
    assert said["parameters"] == V.numel() + W.numel()


def test_one_seen_user_has_nobody_to_differ_from(four, tmp_path):
    alone = four._replace(table=four.table[four.table.user_id.isin(["p00", "p02"])])
    _, folder = tiny(alone, tmp_path, ranks=(0, 1))
    assert {key[0] for key in records(folder)} == {"reference", "BT", "own model", "Ridge BT"}


# --------------------------------------------------------------------- Choosing a rank


@pytest.fixture
def fitted(monkeypatch) -> list[Comparisons]:
    """What bases are fitted to, in turn."""
    fit_bases, seen = lore_method.fit_bases, []

    def remember(estimator, points, direction, data, *rest, **settings):
        seen.append(data)
        return fit_bases(estimator, points, direction, data, *rest, **settings)

    monkeypatch.setattr(lore_method, "fit_bases", remember)
    return seen


def test_the_choice_is_made_on_whole_dialogues_that_were_not_fitted(task, fitted):
    Lore(ranks=(2,), select_rank=True, **TINY).fit(task)
    for part, split in zip(fitted, [None, *Validation(task).splits], strict=True):
        expected = split.fit if split else task.local_train
        assert torch.equal(part.features.x, expected.features.x)
    assert split.held.counts.tolist() == [6] * 5  # 2 of 8 dialogues of 3 comparisons


# ------------------------------------------------------------- Where nobody is unseen


@pytest.fixture(scope="module")
def all_seen(world) -> People:
    """The same people, all seen, a quarter of each one's dialogues for validation."""
    number = world.table.dialog_id.str.split(".").str[1].astype(int)
    split = world.table.split.where(number % 4 != 0, preparing.VALIDATION)
    return world._replace(table=world.table.assign(seen=True, split=split))


def test_where_nobody_is_unseen_there_are_no_records_of_new_users(all_seen, tmp_path):
    _, folder = tiny(all_seen, tmp_path)
    found, (part,) = {key[1:3] for key in records(folder)}, saved(folder)["seeds"]
    assert found == {("", "train"), ("", "seen"), ("population", "seen"), ("another", "seen")}
    basis = load_basis(folder / "basis-K02.safetensors")
    assert len(basis.users) == 12 and basis.users_unseen == [] and len(basis.W_unseen) == 0
    counts = {"train": 288, "seen": 144, "few": 0, "unseen": 0, "validation": 144}
    assert part["users"]["unseen"] == [] and part["comparisons"] == counts
    with pytest.raises(InputError, match="no user of planted is unseen.*run train_basis.py"):
        people.vary_fewshot(all_seen.tasks(), settings(tmp_path / "sweep"), (1, 2), 2)


def test_settings_are_chosen_on_the_validation_comparisons(all_seen, fitted):
    task = task_of(all_seen)
    *fits, chosen = Lore(ranks=(2, 3), select_rank=True, **TINY).fit(task)
    for data in fitted:  # nothing is held out of the training comparisons
        assert torch.equal(data.features.x, task.local_train.features.x)
    assert [one["rank"] for one in chosen.tried] == [1, 2, 3]
    losses = {one["rank"]: one["loss"] for one in chosen.tried}
    for one in fits:
        expected = people.plain(all_seen.store, task.validation, one.basis.V, one.basis.W)
        assert losses[one.settings["rank"]] == pytest.approx(expected[1].mean(), abs=2e-5)
    best = min(losses, key=losses.get)
    assert chosen.label == "LoRe, chosen" and chosen.settings["rank"] == best
    assert chosen.describe()["note"].startswith(f"chosen on validation: LoRe K={best};")


def test_validation_comparisons_go_to_the_process_that_has_their_users(all_seen):
    task = task_of(all_seen)
    keep = task.validation.user != 1  # who has none
    validation = task.validation.select(keep)
    for process in (0, 1):
        local = task.train.share(process, 2)
        split = hold_out(local, 0, None, validation)
        names = [name for name in local.names if name != task.train.names[1]]
        assert split.held.names == names
        assert [local.names[u] for u in split.whose.tolist()] == names
        assert split.fit is local


# ------------------------------------------------------------------- Shots of new users


@pytest.mark.parametrize("batch", [1, 1 << 24], ids=["a trial a batch", "all in one batch"])
def test_a_sweep_is_one_fit_after_the_other(four, monkeypatch, batch):
    monkeypatch.setattr(judging, "BATCH", batch)
    task, sizes, trials = task_of(four, "comparisons"), (0, 1, 5), 2
    of_three = dataclasses.replace(task, train=people.planted(8).tasks().draw(0, CPU).train)
    fit = Lore(ranks=(3,), iterations=40, few_shot_iterations=20).fit(of_three)[0]
    draws = draw_shots(task.few, sizes, trials, generator=4)
    found = {(r["control"], r["set"], r["shots"]): r for r in judging.sweep(fit, task, draws)}
    V, x, mean = fit.basis.V, task.few.in_memory().features.x, fit.users.mean(0)
    some = [row for row in draws.rows if len(row)]
    g = torch.Generator().manual_seed(task.seed)
    start = [torch.randn(3, generator=g) for _ in some]
    weights = [task.few.weight[row].float() for row in some]
    W = iter(reference.few_shot([x[row] for row in some], V, start, 20, 0.1, weights))
    states = torch.stack([next(W) if len(row) else mean for row in draws.rows])
    states, right = states.view(trials, len(sizes), 2, 3), []
    for row, w in zip(draws.rows, states.view(-1, 3), strict=True):
        weight = task.few.weight[row]
        right.append(float(weight @ (x[row] @ V @ w > 0).double() / weight.sum()))
    right = np.array(right).reshape(trials, len(sizes), 2).mean(0)
    for s, size in enumerate(sizes):
        for control, every in {"": states[:, s], "another": states[:, s, [1, 0]],
                               "population": mean.expand(1, 2, 3)}.items():  # fmt: skip
            each = [people.plain(four.store, task.unseen, V, w) for w in every]
            record = found[control, "unseen", size]
            same(record, np.mean(each, 0))
            assert np.allclose(record["trials"], [right.mean() for right, _ in each], atol=2e-5)
            assert record["users_with_that_many"] == 2
        shown = found.get(("", "few_shot", size), {"accuracy": None})["accuracy"]
        assert np.allclose(shown, right[s], atol=2e-5) if size else shown is None


def test_label_sensitivity_is_of_predictions_that_follow_the_swapped_shots(task):
    toy = Sum(task)
    judged, swept = toy.judged(task), toy.swept(task, (0, 2), 2)
    whole = judged["", "unseen"]
    assert whole["label_sensitivity"] == [1.0] * 6  # nothing but labels is summed
    assert [name for (c, name), r in judged.items() if "label_sensitivity" in r] == ["unseen"]
    for shots, expected in ((0, 0.0), (2, 1.0)):
        assert swept["", "unseen", shots]["label_sensitivity"] == [expected] * 6
    z = toy.logits(toy.view(task.unseen), toy.own, task.unseen.user)
    brier = by_user(task.unseen, (1 - z.double().sigmoid()) ** 2)
    assert np.allclose(whole["brier"], brier, atol=2e-5)
    for key, value in metrics.pooled(task.unseen, z).items():
        assert whole[key] == pytest.approx(value, abs=1e-4)
    assert "ece" not in judged["population", "unseen"] and "ece" not in judged["", "train"]


def test_a_sweep_shuffles_labels_and_then_draws_the_same_shots(task):
    toy = Sum(task)
    found = toy.swept(task, (1, 3), 2)
    (view, users), (shuffled, again), (turned, first) = toy.shown
    assert torch.equal(turned, -view[: len(turned)]) and first.num_users == users.num_users // 2
    swapped = (shuffled == -view).all(1)
    assert ((shuffled == view).all(1) | swapped).all() and 0.3 < swapped.float().mean() < 0.7
    assert torch.equal(users.user, again.user)
    states = toy.adapt(shuffled, again, 0).view(2, 2, 6, 8).unbind(1)
    for size, some in zip((1, 3), states, strict=True):
        expected = means(task.unseen, toy.view(task.unseen), list(some))
        same(found["shuffled", "unseen", size], expected)


def test_more_shots_tell_tastes_apart(world, tmp_path):
    people.vary_fewshot(world.tasks(), settings(tmp_path), [0, 1, 3, 8], 2)
    folder = tmp_path / "planted" / "here"
    found = records(folder)
    lore, *alike = (
        [np.mean(found[label, control, "unseen", n]["accuracy"]) for n in (0, 1, 3, 8)]
        for label, control in (("LoRe K=2", ""), ("LoRe K=2", "population"), ("BT", ""))
    )
    assert lore[-1] > max(0.85, lore[0], *np.add(alike, 0.15).flat)
    assert all(len(set(means)) == 1 for means in alike)
    own = {n: r["trials"] for (label, _, _, n), r in found.items() if label == "own model"}
    assert list(own) == [1, 3, 8] and all(len(trials) == 1 for trials in own.values())
    about = saved(folder)["settings"]
    assert (about["shots"], about["trials"], about["unit"]) == ([0, 1, 3, 8], 2, "dialogues")


@pytest.mark.parametrize(("unit", "comparisons"), [("dialogues", 3), ("comparisons", 1)])
def test_a_shot_is_what_the_unit_says(world, unit, comparisons):
    few = task_of(world, unit).few
    draws = draw_shots(few, [1, 4], 2, 0)
    sizes = [1] * 6 + [4] * 6
    assert [len(rows) for rows in draws.rows] == [size * comparisons for size in sizes * 2]
    if unit == "dialogues":
        assert [len(few.dialogs[rows].unique()) for rows in draws.rows] == sizes * 2
    user = [few.user[rows].unique().tolist() for rows in draws.rows]
    assert user == [[u] for u in [*range(6)] * 4]
    assert draw_shots(few, [1, 8 * 3 // comparisons + 1], 1, 0).users_with_that_many == [6, 0]


def test_a_sweep_of_several_processes_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "processes", lambda: (0, 2))
    with pytest.raises(InputError, match="without torchrun"):
        people.vary_fewshot(world.tasks(), settings(tmp_path), [1], 1)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------ Run folders


def test_a_run_with_other_settings_is_refused_by_their_names(four, tmp_path):
    _, folder = tiny(four, tmp_path)
    before = (folder / "results.json").read_bytes()
    other = four._replace(info={**four.info, "data_sha256": "2" * 64})
    for people_, changes, words in (
        (four, {"learning_rate": 0.1, "ranks": (3,)}, r"bt .*\(lore\.learning_rate, lore\.ranks\)"),
        (other, {}, r"\(prepared\.data_sha256\)"), (four, {"reference": "none"}, r"\(reference\)"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"{words}; choose another --name"):
            tiny(people_, tmp_path, **changes)
    with pytest.raises(InputError, match=r"\(script, shots, trials\)"):
        people.vary_fewshot(four.tasks(), settings(tmp_path), [1], 1)
    assert (folder / "results.json").read_bytes() == before
    tiny(four, tmp_path, checkpoint_every=7, stream=True)  # which change no result
    assert (folder / "results.json").read_bytes() == before


@pytest.mark.parametrize(("name", "words"), [
    ("table.md", "holds files that no run wrote: choose another --name"),
    ("results.json", "results.json: its checksum does not match"),
])  # fmt: skip
def test_a_folder_with_files_of_others_is_no_run(four, tmp_path, name, words):
    file = tmp_path / "planted" / "here" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"format": 2}', encoding="utf-8")
    with pytest.raises(InputError, match=words):
        tiny(four, tmp_path)
    assert [path.name for path in file.parent.iterdir()] == [name]
    assert file.read_text(encoding="utf-8") == '{"format": 2}'


def test_a_run_that_was_killed_as_it_began_begins_again(four, tmp_path):
    draft = tmp_path / "planted" / "here" / "settings.json.123.part"
    draft.parent.mkdir(parents=True)
    draft.touch()
    tiny(four, tmp_path)
    assert not draft.exists() and (draft.parent / "results.json").exists()


def test_results_beside_missing_or_other_settings_are_not_believed(four, tmp_path):
    quick = functools.partial(tiny, four, tmp_path, methods=())
    _, folder = quick()
    before = (folder / "results.json").read_bytes()
    (folder / "settings.json").unlink()
    for changes, word in (({"reference": "none"}, r"\(reference\)"),
                          ({"learning_rate": 3.0}, r"lore\.learning_rate")):  # fmt: skip
        with pytest.raises(InputError, match=word):
            quick(**changes)
    assert not (folder / "settings.json").exists()
    quick()  # its own settings are written again
    kept = json.loads((folder / "settings.json").read_text())["settings"]
    assert kept == saved(folder)["settings"]
    _, other = quick(reference="none", name="other")
    assert "reference" not in {label for label, *_ in records(other)}
    shutil.copy(folder / "results.json", other)
    for which in ("none", "head"):  # as its settings.json says, and as its results.json does
        with pytest.raises(InputError, match=r"other: holds a run with .*\(reference\)"):
            quick(reference=which, name="other")
    assert (folder / "results.json").read_bytes() == before


@pytest.mark.parametrize(("refused", "words"), [
    ({"alpha": (1.0,), "reference": "none"}, "--alpha pulls to a reference, and there is none"),
    ({"ranks": (99,)}, "--lore.ranks 99: "),
    ({"device": "abacus"}, "--device abacus: "), ({"device": "cuda:99"}, "--device cuda:99: "),
    ({"methods": ("lore", "lore2")}, "--methods lore2: there are .*lore"),
])  # fmt: skip
def test_a_refused_run_leaves_no_folder(four, tmp_path, refused, words):
    with pytest.raises(InputError, match=f"^{words}"):
        fit(four, tmp_path, **refused)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    tiny(four, tmp_path, methods=())  # under the same name


def test_a_training_that_diverges_is_one_line_and_leaves_no_state(world, tmp_path):
    with pytest.raises(InputError, match=r"by step 10 of training, .*--learning-rate"):
        fit(world, tmp_path, learning_rate=1e30, alpha=(1.0,), checkpoint_every=10)
    assert not list(tmp_path.rglob("state-*"))
    sgd = OptimizerChoice("torch.optim.SGD", {"lr": 1e30})  # to large numbers
    with pytest.raises(InputError, match="BT, seed 0: its training diverged .*learning rate"):
        fit(world, tmp_path, optimizer=sgd, name="sgd")


def test_an_optimizer_is_recorded_by_its_name_and_arguments(four, tmp_path):
    adam = OptimizerChoice("torch.optim.AdamW", {"lr": 0.05})
    _, folder = tiny(four, tmp_path, optimizer=adam)
    kept = saved(folder)["seeds"][0]["methods"]["lore"]["settings"]["optimizer"]
    assert "AdamW" in kept and "lr=0.05" in kept
    assert "0x" not in kept  # an address, which another process would not have


def test_figures_that_are_no_numbers_are_never_written(four, tmp_path):
    _, folder = tiny(four, tmp_path, methods=())
    run = runs.Run.start(folder, saved(folder)["settings"])
    before = (folder / "results.json").read_bytes()
    bad = {"settings": {}, "fits": [{"losses": [float("nan")]}], "records": []}
    with pytest.raises(InputError, match="lore, seed 0: its figures hold NaN or infinity"):
        run.add(0, {}, "lore", bad, [])
    assert (folder / "results.json").read_bytes() == before
    chosen = {"chosen": {"l_B": float("inf")}, "losses": [1.0]}  # as a mixed logit says it
    run.add(0, {}, "lore", {"settings": {}, "fits": [chosen], "records": []}, [])


def test_without_a_name_other_settings_have_another_folder(four, tmp_path):
    for changes in ({}, {"seeds": (1,)}, {"alpha": (1.0,)}, {"reference": "none"}):
        chosen = settings(tmp_path, methods=(), **TINY, **changes)
        chosen.name = None
        people.train_basis(four.tasks(), chosen)
    found = sorted(len(saved(folder)["seeds"]) for folder in (tmp_path / "planted").iterdir())
    assert found == [1, 1, 2]


@pytest.fixture
def made(monkeypatch) -> list[tuple[int, str]]:
    """Seed and method of every fit, in turn; that of LoRe at seed 1 is interrupted once."""
    fits, stop, fit = [], {(1, "Lore")}, experiments.Timed.fit

    def watched(timed: experiments.Timed, task: Task) -> list[Fitted]:
        fits.append((task.seed, type(timed.method).__name__))
        if fits[-1] in stop:
            stop.clear()
            raise KeyboardInterrupt
        return fit(timed, task)

    monkeypatch.setattr(experiments.Timed, "fit", watched)
    return fits


def test_finished_methods_and_repeats_are_kept_and_the_missing_ones_fitted(four, tmp_path, made):
    given = {"estimator": "lore_regularized", "alpha": (0.0, 10.0)}
    *always, lore = names = ["Reference", "BradleyTerry", "Own", "RidgeBT", "Lore"]

    def run(folder: str, **changes: Any) -> tuple[Path, list[tuple[int, str]]]:
        made.clear()
        return tiny(four, tmp_path / folder, **given, **changes)[1], made.copy()

    with pytest.raises(KeyboardInterrupt):
        run("part", seeds=(0, 1))
    assert made == [(seed, name) for seed in (0, 1) for name in names]
    whole, _ = run("whole", seeds=(0, 1))
    part, fitted = run("part", seeds=(0, 1))
    assert fitted == [(1, lore)] and repeats(part) == repeats(whole)
    assert run("part", seeds=(0, 1)) == (part, [])
    assert sorted(p.name for p in part.iterdir()) == sorted(p.name for p in whole.iterdir())
    later, fitted = run("later", methods=())
    assert fitted == [(0, name) for name in always]
    assert run("later") == (later, [(0, lore)])
    assert run("later", seeds=(0, 1)) == (later, [(1, name) for name in names])
    for one, other in zip(repeats(later), repeats(whole), strict=True):
        for name, method in other["methods"].items():
            assert one["methods"][name]["records"] == method["records"]
        assert list(one["methods"]) == list(other["methods"])


def test_methods_of_earlier_commands_keep_their_order(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    run = runs.Run(tmp_path, {}, {})
    names = [f"method {letter}" for letter in "abcdefgh"]
    for name in names:
        run.add(0, {}, name, {"settings": {}, "fits": [], "records": []}, [name])
    assert list(run.repeats[0]["methods"]) == names[::-1]  # those of this command come first


def test_basis_files_are_named_as_written_and_hold_their_repeat(four, tmp_path):
    for changes, names in (
        ({"alpha": (0.0, 1.0)}, {"K00"} | {f"K0{k}-alpha{a}" for k in (1, 2) for a in (0, 1)}),
        ({"shrinkage": (0.0, 5.0)}, {"K00", "K01", "K02-shrinkage0", "K02-shrinkage5"}),
        ({"seeds": (0, 1)}, {f"K0{rank}-seed{seed}" for rank in (0, 1, 2) for seed in (0, 1)}),
    ):
        _, folder = tiny(four, tmp_path / min(changes), **changes)
        assert {path.stem.removeprefix("basis-") for path in folder.glob("basis-*")} == names
        for fit_ in (f for f in fits_of(folder) if f["file"]):
            basis = load_basis(folder / fit_["file"])
            about = basis.settings
            assert about["seed"] == ("seed1" in fit_["file"]) and about["model"] == "planted"
            assert about["rank"] == fit_["settings"].get("rank", 1)
            users = saved(folder)["seeds"][about["seed"]]["users"]
            assert {"seen": basis.users, "unseen": basis.users_unseen} == users


def test_a_mixed_logits_file_knows_how_uncertain_seen_and_new_users_are(four, tmp_path):
    strengths = MixedLogit(floor=0.1, l_mu=1.0, tau2=1.0, pi=1e9)
    _, folder = tiny(four, tmp_path, methods=("mixed_logit",), mixed_logit=strengths)
    found = load_learned(folder / "mixed_logit.safetensors")
    users, x = saved(folder)["seeds"][0]["users"], torch.eye(len(found.fit.mu))
    assert {*found.known} == {*found.names} == {*users["seen"], *users["unseen"]}
    assert all((found.deviations(x, name) < found.deviations(x)).any() for name in found.names)


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file can grow past so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.slow
@pytest.mark.parametrize("size", [100, 2_500, 5_000, 20_000])
def test_a_full_disk_loses_nothing(four, of_four, tmp_path, monkeypatch, size):
    monkeypatch.setattr(reports, "write_plots", lambda *_: [])
    monkeypatch.setattr(experiments, "report", reports.report)
    with small_disk(size), pytest.raises(InputError, match="cannot be written") as error:
        fit(four, tmp_path, checkpoint_every=4)
    assert not list(tmp_path.rglob("*.part"))
    _, full = fit(four, tmp_path, checkpoint_every=4)
    file = Path(str(error.value).split(": cannot")[0])
    assert file.name.startswith("state-seed0") or file.stat().st_size > size
    assert repeats(full) == repeats(of_four)


# ------------------------------------------------------------------ Killed while training


QUICK = {"iterations": 20, "few_shot_iterations": 3, "ranks": (2, 3)}
REGULARIZED = {**QUICK, "estimator": "lore_regularized", "alpha": (10.0,)}


def killed(world: People, results: Path, **changes: Any) -> None:
    """A run that is killed while LoRe is trained, after its state was kept twice."""

    def tick(checkpoint: training.Checkpoint, fitted: Any, step: int) -> None:
        keep(checkpoint, fitted, step)
        if step == 17 and checkpoint.path.name.endswith("ranks"):
            raise KeyboardInterrupt

    keep = training.Checkpoint.tick
    with mock.patch.object(training.Checkpoint, "tick", tick), pytest.raises(KeyboardInterrupt):
        fit(world, results, checkpoint_every=5, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("given", [REGULARIZED, {**QUICK, "alpha": (0.1,)}])
def test_a_killed_training_goes_on_from_disk_in_parts(world, tmp_path, monkeypatch, caplog, given):
    """To the bit where nothing else changes, see test_killed.py."""
    _, whole = fit(world, tmp_path / "whole", **given)
    killed(world, tmp_path / "killed", **given)
    monkeypatch.setattr(comparisons, "PART_BYTES", 8 * 4 * 50)
    with caplog.at_level("INFO"):
        _, folder = fit(world, tmp_path / "killed", stream=True, **given)
    assert "going on from step 15" in caplog.text and not list(folder.glob("state-*"))
    for name in ("basis-K02.safetensors", "basis-K03.safetensors"):
        one, other = (load_basis(f / name) for f in (folder, whole))
        torch.testing.assert_close((one.V, one.W), (other.V, other.W), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("changed", ["settings", "data"])
def test_a_kept_state_of_other_settings_or_data_is_not_taken_up(world, tmp_path, changed):
    killed(world, tmp_path, **REGULARIZED)
    folder = tmp_path / "planted" / "here"
    kept = sorted(path.name for path in folder.glob("state-*"))
    assert kept == [f"state-seed0-lore-ranks.0.{step}.pt" for step in (10, 15)]
    (folder / "results.json").unlink()  # by which other settings are refused before
    given = REGULARIZED | ({"learning_rate": 0.4} if changed == "settings" else {})
    others = world._replace(table=world.table.drop(index=3)) if changed == "data" else world
    with pytest.raises(InputError, match="state-seed0-lore-ranks.* other settings or data"):
        fit(others, tmp_path, **given)


def test_both_scripts_of_a_dataset_fit_alike():
    both = [worlds.script(f"PRISM/{name}.py").LORE for name in ("train_basis", "vary_fewshot")]
    assert dataclasses.replace(both[0], ranks=()) == dataclasses.replace(both[1], ranks=())
    assert both[0].estimator == "lore_regularized" and both[0].alpha == (1e4,)
