"""What the experiment scripts share: command line, sets of comparisons, controls, runs, reports."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import experiments
import reports
import running
import utils
from experiments import Fitting, Pairs, Prepared
from running import table
from utils import Basis, InputError, load_basis

QUICK = {"iterations": 60, "few_shot_iterations": 60, "progress": False}

# -------------------------------------------------------------------- Command line


def call(main, monkeypatch, capsys, line: str) -> tuple[int, str]:
    """Run a function as a script with a command line; its status and what stands on stderr."""
    monkeypatch.setattr(sys, "argv", ["script.py", *line.split()])
    try:
        experiments.cli(main)
        status = 0
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {}),
        ("--few-shot 3 --learning_rate=.5", {"few_shot": 3, "learning_rate": 0.5}),
        ("--few_shot=3 --learning-rate 1e-3", {"few_shot": 3, "learning_rate": 1e-3}),
        ("--ranks 0 1 5", {"ranks": [0, 1, 5]}),
        ("--ranks 7", {"ranks": [7]}),
        ("--ranks=[0,2]", {"ranks": [0, 2]}),
        ("--alpha 0 1e4 --name=x", {"alpha": [0.0, 1e4], "name": "x"}),
        ("--users 123 456", {"users": ["123", "456"]}),
        ("--users 1", {"users": ["1"]}),
        ("--users 0x1F 1e3 null true user-7 1_000",
         {"users": ["0x1F", "1e3", "null", "true", "user-7", "1_000"]}),
        ("--embed --quiet=true", {"embed": True, "quiet": True}),
        ("--embed false --few-shot -2", {"embed": False, "few_shot": -2}),
        ("--name 12", {"name": "12"}),
    ],
)  # fmt: skip
def test_flags_become_arguments(monkeypatch, capsys, line, expected):
    given = {}

    def main(
        ranks: list[int] = [1],  # noqa: B006
        alpha: list[float] = [0.0],  # noqa: B006
        users: list[str] = [],  # noqa: B006
        few_shot: int = 9,
        learning_rate: float = 0.1,
        embed: bool = True,
        quiet: bool = False,
        name: str | None = None,
    ) -> None:
        """Nothing."""
        given.update(locals())

    defaults = {"ranks": [1], "alpha": [0.0], "users": [], "few_shot": 9, "learning_rate": 0.1,
                "embed": True, "quiet": False, "name": None}  # fmt: skip
    status, err = call(main, monkeypatch, capsys, line)
    assert status == 0, err
    assert {name: given[name] for name in defaults} == {**defaults, **expected}
    assert [type(x) for x in given["alpha"]] == [float] * len(given["alpha"])


@pytest.mark.parametrize(
    ("line", "word"),
    [("--bogus 3", "--bogus"), ("--few-shot three", "few_shot"), ("--few-shot 1 2", "2"),
     ("--ranks 0 one", "ranks"), ("--ranks", "--ranks"), ("stray", "stray")],
)  # fmt: skip
def test_what_no_flag_takes_is_refused(monkeypatch, capsys, line, word):
    def main(few_shot: int = 9, ranks: list[int] = [1]) -> None:  # noqa: B006
        """Nothing."""
        raise AssertionError("not to be reached")

    status, err = call(main, monkeypatch, capsys, line)
    assert status == 2 and word in err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("file.jsonl row 3: no text"), "error: file.jsonl row 3: no text"),
        (OSError(errno.ENOSPC, "No space left on device", "x.json"),
         "error: [Errno 28] No space left on device: 'x.json'"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line(monkeypatch, capsys, error, line):
    def main() -> None:
        """Nothing."""
        raise error

    assert call(main, monkeypatch, capsys, "") == (2, line + "\n")


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch, capsys):
    def main() -> None:
        """Nothing."""
        raise KeyError("ours")

    with pytest.raises(KeyError):
        call(main, monkeypatch, capsys, "")


# ----------------------------------------------------------------------- Comparisons


def pairs(counts: list[int], start: int = 0) -> Pairs:
    """Users named a, b, ... whose comparisons are numbered from ``start``."""
    names = [f"u{i:03d}" for i in range(len(counts))]
    rows = torch.arange(start, start + sum(counts))
    return Pairs(names, counts, rows, rows + 1000, rows + 0.5, rows // 2)


def listed(some: Pairs) -> list[tuple]:
    """Every comparison as (user, chosen, rejected, weight, dialogue)."""
    names = np.repeat(some.users, some.counts).tolist()
    columns = (some.chosen, some.rejected, some.weight, some.dialogs)
    return list(zip(names, *(column.tolist() for column in columns), strict=True))


def test_pairs_from_a_table_follow_its_users():
    table = pd.DataFrame({
        "user_id": ["b", "a", "b", "a", "a"], "dialog_id": ["y", "x", "w", "x", "z"],
        "turn": [0, 1, 0, 0, 0], "chosen": [1, 2, 3, 4, 5], "rejected": [6, 7, 8, 9, 10],
        "weight": [1.0, 0.5, 2.0, 0.25, 1.0],
    })  # fmt: skip
    found = Pairs.from_table(table)
    assert (found.users, found.counts) == (["a", "b"], [3, 2])
    assert found.chosen.tolist() == [4, 2, 5, 3, 1]
    assert found.rejected.tolist() == [9, 7, 10, 8, 6]
    assert found.weight.tolist() == [0.25, 0.5, 1.0, 2.0, 1.0]
    same = [[a == b for b in found.dialogs.tolist()] for a in found.dialogs.tolist()]
    assert same == [[a == b for b in "xxzwy"] for a in "xxzwy"]
    shuffled = Pairs.from_table(table.sample(frac=1, random_state=1))
    assert [row[:4] for row in listed(shuffled)] == [row[:4] for row in listed(found)]


def test_selecting_leaves_out_users_without_comparisons():
    everything = pairs([2, 3, 1])
    keep = torch.tensor([False, False, True, False, True, True])
    some = everything.select(keep)
    assert (some.users, some.counts) == (["u001", "u002"], [2, 1])
    assert listed(some) == [r for r, k in zip(listed(everything), keep, strict=True) if k]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.integers(1, 8))
def test_processes_share_the_users(counts, processes):
    everything = pairs(counts)
    if processes > len(counts):
        with pytest.raises(InputError, match=f"{processes} processes for {len(counts)} users"):
            everything.share(0, processes)
        return
    shares = [everything.share(i, processes) for i in range(processes)]
    assert all(share.users for share in shares)
    assert [row for share in shares for row in listed(share)] == listed(everything)
    if processes < len(counts) // 2:  # no share is larger than a fair one and two users more
        assert max(sum(s.counts) for s in shares) <= sum(counts) / processes + 2 * max(counts)


def split_table(sides: dict[str, tuple[bool, str]]) -> pd.DataFrame:
    """One dialogue for every letter of user -> (seen, "train"/"test" initials)."""
    rows = [
        {"user_id": user, "seen": seen, "split": {"r": "train", "e": "test"}[letter],
         "dialog_id": f"{user}{i}", "turn": 0, "weight": 1.0}
        for user, (seen, letters) in sides.items() for i, letter in enumerate(letters)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    return table.assign(chosen=range(len(rows)), rejected=range(100, 100 + len(rows)))


def test_four_sets_are_what_the_table_says(caplog):
    sides = {"a": (True, "rre"), "b": (False, "re"), "c": (True, "er"), "d": (False, "rr")}
    with caplog.at_level("INFO"):
        sets = experiments.four_sets(split_table(sides))
    assert [(s.users, s.chosen.tolist()) for s in sets] == [
        (["a", "c"], [0, 1, 6]), (["a", "c"], [2, 5]), (["b"], [3]), (["b"], [4])
    ]  # fmt: skip
    assert "left out 1 user" in caplog.text


@pytest.mark.parametrize("kind", ["seen", "unseen"])
def test_four_sets_need_users_of_both_kinds(kind):
    with pytest.raises(InputError, match=f"no {kind} users"):
        experiments.four_sets(split_table({"a": (kind == "unseen", "re"), "b": (True, "r")}))


# ------------------------------------------------------------------ A planted world


class Rows:
    """Embeddings in memory, with what a Store has."""

    def __init__(self, x: torch.Tensor, head: torch.Tensor | None) -> None:
        self.x, self.head, self.last_linear, self.num_features = x, head, None, x.shape[1]
        self.manifest = {"model": "planted", "conversations_sha256": "0" * 64}

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return self.x[index]


def planted(folder: Path, users: int = 12, dialogues: int = 16, F: int = 8) -> Prepared:
    """People of two opposite tastes, half of them seen, three comparisons a dialogue."""
    rng = np.random.default_rng(3)
    taste, rows = rng.standard_normal(F), []
    x = 20 * rng.standard_normal((users * dialogues * 6, F))
    for user in range(users):
        for dialog in range(dialogues):
            for turn in range(3):
                first = 2 * len(rows)
                liked = (x[first] - x[first + 1]) @ taste * (-1) ** user
                chosen, rejected = (first, first + 1) if liked > 0 else (first + 1, first)
                rows.append({
                    "user_id": f"p{user:02d}", "split": "train" if dialog % 2 else "test",
                    "seen": user % 4 < 2, "dialog_id": f"d{user}.{dialog}", "turn": turn,
                    "chosen": chosen, "rejected": rejected, "weight": rng.choice([0.5, 1, 2]),
                })  # fmt: skip
    folder.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_parquet(folder / "comparisons.parquet", index=False)
    head = torch.from_numpy(taste + rng.standard_normal(F)).float()
    info = {"dataset": "planted", "data_sha256": "1" * 64, "users_split": "given"}
    return Prepared(folder, info, Rows(torch.from_numpy(x).float(), head))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Prepared:
    return planted(tmp_path_factory.mktemp("planted"))


def fit(prepared: Prepared, results: Path, **changes: Any) -> tuple[str, Path]:
    """A run of train_basis on the split that is given; what it prints, and its folder."""
    fitting = Fitting(**{**QUICK, "ranks": [2], "results": results, "run": "here", **changes})
    text = experiments.train_basis(prepared, experiments.given_split(prepared), fitting)
    return text, results / prepared.dataset / fitting.run


def saved(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def by_set(folder: Path, seed: int = 0) -> dict[tuple[str, str, int | None], np.ndarray]:
    """(method, set, rank) -> the users' accuracies of a repeat."""
    part = next(part for part in saved(folder)["seeds"] if part["seed"] == seed)
    return {(r["method"], r["set"], r["rank"]): np.array(r["users"]) for r in part["records"]}


def plain(prepared: Prepared, some: Pairs, V: torch.Tensor, W: torch.Tensor) -> np.ndarray:
    """Accuracies of users with weights W for the basis V, comparison by comparison."""
    start, accuracies = 0, []
    for u, count in enumerate(some.counts):
        right = total = 0.0
        for i in range(start, start + count):
            a, b = (prepared.store.x[rows[i]].double() for rows in (some.chosen, some.rejected))
            c = 1.0 if some.weight is None else float(some.weight[i])
            right += c * float((a - b) @ V.double() @ W[u].double() > 0)
            total += c
        accuracies.append(right / total)
        start += count
    return np.array(accuracies)


# ---------------------------------------------------------------------------- Splits


def test_a_given_split_is_the_same_for_every_seed(world):
    draw = experiments.given_split(world)
    assert [listed(s) for s in draw(0)] == [listed(s) for s in draw(1)]
    assert draw(0).train.users == draw(0).seen.users == [f"p{u:02d}" for u in (0, 1, 4, 5, 8, 9)]


def test_drawn_splits_follow_the_seed_alone(world, tmp_path):
    draw = experiments.drawn_split(world, 0.25, 10, 4)
    sets, again, other = draw(0), draw(0), draw(1)
    assert [listed(s) for s in sets] == [listed(s) for s in again]
    assert sets.train.users != other.train.users
    whole = pd.read_parquet(world.folder / "comparisons.parquet")
    shuffled = Prepared(tmp_path, world.info, world.store)
    whole.sample(frac=1, random_state=0).to_parquet(tmp_path / "comparisons.parquet")
    moved = experiments.drawn_split(shuffled, 0.25, 10, 4)(0)
    for a, b in zip(sets, moved, strict=True):
        assert sorted(row[:4] for row in listed(a)) == sorted(row[:4] for row in listed(b))


def test_drawn_splits_take_samples_of_the_training_side_only(world):
    sets = experiments.drawn_split(world, 0.25, 10, 4)(0)
    whole = pd.read_parquet(world.folder / "comparisons.parquet")
    assert len(sets.train.users) == 3 and len(sets.few.users) == 9
    assert not set(sets.train.users) & set(sets.few.users)
    assert sets.train.counts == [10] * 3 and sets.few.counts == [4] * 9
    for part, split in zip(sets, ("train", "test", "train", "test"), strict=True):
        side = whole[(whole.split == split) & whole.user_id.isin(part.users)]
        owned = set(zip(side.user_id, side.chosen, side.rejected, strict=True))
        taken = {row[:3] for row in listed(part)}
        assert taken <= owned and (split == "train" or taken == owned)
    everything = experiments.drawn_split(world, 0.25, 1000, 1000)(0)
    assert everything.train.counts == [24] * 3


def simulated(folder: Path) -> tuple[Prepared, torch.Tensor, torch.Tensor]:
    """A prepared dataset of random scores, these [20 + 7 prompts, 8, 10], and the rows."""
    scores = torch.randn(27, 8, 10, generator=torch.Generator().manual_seed(0))
    rows = torch.randperm(27 * 8, generator=torch.Generator().manual_seed(1)).view(27, 8)
    parts = {"train.scores": scores[:20], "train.rows": rows[:20],
             "test.scores": scores[20:], "test.rows": rows[20:]}  # fmt: skip
    tables = {name: part.numpy() for name, part in parts.items()}
    info = {"dataset": "simulated"}
    experiments.write_prepared(folder, [[{"role": "user", "content": "a"}]], tables, info)
    return Prepared(folder, info, Rows(torch.zeros(27 * 8, 2), None)), scores, rows


def test_simulated_users_choose_as_a_plain_loop_does(tmp_path):
    prepared, scores, rows = simulated(tmp_path)
    sets = experiments.simulated_users(prepared, 0.1, 6, 4, 9, 5)(3)
    W = utils.generate_population(0.1, 10, torch.Generator().manual_seed(3)).double()
    assert [s.counts for s in sets] == [[9] * 6, [7] * 6, [5] * 4, [7] * 4]
    prompt_of = {int(row): p for p, some in enumerate(rows) for row in some}
    drawn = set()
    for part, weights, side in zip(sets, (W[:6], W[:6], W[6:], W[6:]), "rere", strict=True):
        choices = torch.stack([part.chosen, part.rejected], 1).split(part.counts)
        for w, pairs_of_user in zip(weights, choices, strict=True):
            prompts = [prompt_of[int(chosen)] for chosen, _ in pairs_of_user]
            assert set(prompts) <= set(range(20)) if side == "r" else prompts == [*range(20, 27)]
            assert len(set(prompts)) == len(prompts)
            drawn.add(tuple(prompts))
            for p, (chosen, rejected) in zip(prompts, pairs_of_user.tolist(), strict=True):
                liking = [float(scores[p, r].double() @ w) for r in range(8)]
                assert chosen == rows[p, liking.index(max(liking))]
                assert rejected == rows[p, liking.index(min(liking))]
    assert len(drawn) == 11  # the test prompts, and other training prompts for every user


def test_simulated_users_follow_the_seed(tmp_path):
    prepared = simulated(tmp_path)[0]
    draw = experiments.simulated_users(prepared, 0.1, 6, 4, 9, 5)
    first, again, other = ([s.chosen.tolist() for s in draw(seed)] for seed in (0, 0, 1))
    assert first == again and first != other
    assert not set(draw(0).train.users) & set(draw(0).few.users + draw(1).train.users)


# -------------------------------------------------------------------------- Controls


@given(st.integers(2, 40), st.integers(0, 1000))
def test_swapped_weights_are_always_anothers(users, seed):
    other = experiments.swap(users, torch.Generator().manual_seed(seed))
    assert sorted(other.tolist()) == list(range(users))
    assert not (other == torch.arange(users)).any()


def test_own_accuracies_are_those_of_a_plain_loop(world):
    unseen = experiments.given_split(world)(0).unseen
    V = torch.randn(8, len(unseen.users), generator=torch.Generator().manual_seed(0))
    data = unseen.comparisons(world.store, torch.device("cpu"))
    expected = plain(world, unseen, torch.eye(8), V.T)
    assert np.allclose(experiments.own_accuracies(data, V).numpy(), expected, atol=1e-6)


def test_accuracies_are_those_of_the_saved_bases(tmp_path):
    prepared = planted(tmp_path / "four", users=4)  # two of each kind: the other one is known
    _, folder = fit(prepared, tmp_path)
    sets, found = experiments.given_split(prepared)(0), by_set(folder)
    assert sum(len(part) == 2 for part in found.values()) == len(found) == 19
    for rank, method in ((0, "reference"), (1, "BT"), (2, "LoRe")):
        basis = load_basis(folder / f"basis-K{rank:02d}.safetensors")
        both = {"seen": basis.W, "unseen": basis.W_unseen}
        expected = {
            (method, name): plain(prepared, getattr(sets, part), basis.V, both[kind])
            for name, part, kind in (("train", "train", "seen"), ("seen", "seen", "seen"),
                                     ("few_shot", "few", "unseen"), ("unseen", "unseen", "unseen"))
        }  # fmt: skip
        if rank == 2:
            mean = basis.W.mean(0).expand(2, 2)
            for kind, W in both.items():
                part = getattr(sets, kind)
                expected["mean weights", kind] = plain(prepared, part, basis.V, mean)
                expected["others' weights", kind] = plain(prepared, part, basis.V, W[[1, 0]])
        for (name, part), accuracies in expected.items():
            assert np.allclose(found[name, part, rank], accuracies, atol=1e-4), (name, part)
    assert torch.equal(load_basis(folder / "basis-K00.safetensors").V[:, 0], prepared.store.head)


def test_controls_lose_what_is_personal(world, tmp_path):
    text, folder = fit(world, tmp_path)
    mean = {key: users.mean() for key, users in by_set(folder).items()}
    for part in ("seen", "unseen"):
        assert mean["LoRe", part, 2] > 0.85 and mean["own model", part, None] > 0.7
        for method, rank in (("BT", 1), ("mean weights", 2), ("others' weights", 2)):
            assert mean["LoRe", part, 2] - mean[method, part, rank] > 0.2
    assert mean["LoRe", "unseen", 2] - mean["shuffled shots", "unseen", 2] > 0.2
    assert re.search(r"seen users: personal weights earn \+.*unseen users: .* earn \+", text)


def test_descriptions_of_a_basis():
    reference = torch.tensor([1.0, 0.0, 0.0])
    flat = Basis(torch.eye(3)[:, :2], torch.full((4, 2), 0.5), reference, settings={"rank": 2})
    told = experiments.describe(flat)
    assert told["effective_rank"] == pytest.approx(2) and told["weight_entropy"] == pytest.approx(1)
    assert told["cosines"] == [1, 0] and told["columns"] == 2
    alike = Basis(-torch.eye(3)[:, [0, 0]], torch.eye(2), reference, settings={"rank": 2})
    told = experiments.describe(alike)
    assert told["effective_rank"] == pytest.approx(1) and told["weight_entropy"] == 0
    assert told["cosines"] == [-1, -1]


# --------------------------------------------------------------------- Choosing a rank


def test_the_choice_never_reads_a_test_comparison(world, tmp_path):
    swapped = Prepared(tmp_path / "swapped", world.info, world.store)
    swapped.folder.mkdir()
    whole = pd.read_parquet(world.folder / "comparisons.parquet")
    test = whole.split == "test"
    whole.loc[test, ["chosen", "rejected"]] = whole.loc[test, ["rejected", "chosen"]].to_numpy()
    whole.to_parquet(swapped.folder / "comparisons.parquet")
    settings = {"ranks": [2, 3], "shrinkage": [0.0, 5.0], "select_rank": True}
    runs = [fit(p, tmp_path / str(i), **settings)[1] for i, p in enumerate((world, swapped))]
    chosen = [saved(folder)["seeds"][0]["chosen"] for folder in runs]
    assert chosen[0] == chosen[1] and chosen[0]["rank"] > 1  # one reward for all gets half right
    for name in ("basis-K02-shrinkage0.safetensors", "basis-K03-shrinkage5.safetensors"):
        assert torch.equal(*(load_basis(folder / name).V for folder in runs))
    right, wrong = (by_set(folder)["LoRe", "unseen", 2] for folder in runs)
    assert np.allclose(right, 1 - wrong, atol=1e-4)


def test_whole_dialogues_are_held_out_for_the_choice(world):
    train = experiments.given_split(world)(0).train
    held = experiments._validation(train, 0)
    assert len(set(train.dialogs[held].tolist()) & set(train.dialogs[~held].tolist())) == 0
    assert train.select(held).counts == [6] * 6  # 2 of 8 dialogues of 3 comparisons
    assert train.select(~held).users == train.users
    assert torch.equal(held, experiments._validation(train, 0))
    assert not torch.equal(held, experiments._validation(train, 1))


def test_the_choice_is_made_on_comparisons_that_were_not_fitted(world, tmp_path, monkeypatch):
    fit_grid, fitted = experiments.fit_grid, []

    def remember(task, train, *rest):
        fitted.append(train.features.x)
        return fit_grid(task, train, *rest)

    monkeypatch.setattr(experiments, "fit_grid", remember)
    fit(world, tmp_path, select_rank=True)
    train = experiments.given_split(world)(0).train
    x = world.store.x[train.chosen] - world.store.x[train.rejected]
    assert torch.equal(fitted[0], x[~experiments._validation(train, 0)])
    assert torch.equal(fitted[1], x)


# ------------------------------------------------------------------------ Run folders


def test_a_run_with_other_settings_is_refused_by_their_names(world, tmp_path):
    _, folder = fit(world, tmp_path)
    before = (folder / "results.json").read_bytes()
    with pytest.raises(InputError, match=r"fitting\.learning_rate, fitting\.ranks\); choose"):
        fit(world, tmp_path, learning_rate=0.1, ranks=[3])
    other = Prepared(world.folder, {**world.info, "data_sha256": "2" * 64}, world.store)
    with pytest.raises(InputError, match=r"\(prepared\.data_sha256\)"):
        fit(other, tmp_path)
    assert (folder / "results.json").read_bytes() == before
    fit(world, tmp_path, checkpoint_every=7, stream=True)  # which change no result
    assert (folder / "results.json").read_bytes() == before


def test_an_interrupted_run_keeps_its_finished_repeats(world, tmp_path, monkeypatch):
    seeds = {"seeds": [0, 1, 2], "estimator": "lore_regularized", "alpha": [0.0, 10.0]}
    _, whole = fit(world, tmp_path / "whole", **seeds)
    fit_grid, fitted = experiments.fit_grid, []

    def stop_at_two(task, *rest):
        fitted.append(task.seed)
        if task.seed == 2 and fitted.count(2) == 1:
            raise KeyboardInterrupt
        return fit_grid(task, *rest)

    monkeypatch.setattr(experiments, "fit_grid", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        fit(world, tmp_path / "part", **seeds)
    _, part = fit(world, tmp_path / "part", **seeds)
    assert fitted == [0, 1, 2, 2]
    assert saved(part)["seeds"] == saved(whole)["seeds"]
    fit(world, tmp_path / "part", **seeds)
    assert fitted == [0, 1, 2, 2]
    assert sorted(p.name for p in part.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_a_damaged_results_file_is_named(world, tmp_path):
    _, folder = fit(world, tmp_path)
    (folder / "results.json").write_text("{")
    with pytest.raises(InputError, match=re.escape(str(folder / "results.json"))):
        fit(world, tmp_path)


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file can grow past so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [100, 2_500, 4_000, 40_000])
def test_a_full_disk_loses_nothing(world, tmp_path, size):
    _, whole = fit(world, tmp_path / "whole")
    files = {path.name: path.stat().st_size for path in whole.iterdir()}
    with small_disk(size), pytest.raises(InputError, match="cannot be written") as error:
        fit(world, tmp_path / "full", checkpoint_every=10)
    name = Path(str(error.value).split(": cannot")[0]).name
    assert files.get(name, size + 1) > size or name.startswith("state-seed0")
    assert not list(tmp_path.rglob("*.part"))
    _, full = fit(world, tmp_path / "full", checkpoint_every=10)
    assert saved(full)["seeds"] == saved(whole)["seeds"]


# ---------------------------------------------------------------------------- Reports


def hand_made(**changes: Any) -> dict[str, Any]:
    """Results of 40 users: chance for BT, others' weights and the reference, 70% for LoRe.

    Args:
        changes: what a method gains on the users, [40], such as BT=np.zeros(40).
    """
    rng = np.random.default_rng(0)
    names = {"seen": [f"s{i}" for i in range(40)], "unseen": [f"n{i}" for i in range(40)]}
    level = {"reference": 0.5, "BT": 0.5, "LoRe": 0.7, "others' weights": 0.5}
    noise, records = rng.permutation(np.linspace(-0.1, 0.1, 40)), []
    for method, base in level.items():
        users = changes.get(method.split("'")[0], base + noise)
        rank = {"reference": 0, "BT": 1}.get(method, 2)
        for name in ("train", "seen", "few_shot", "unseen"):
            about = {"rank": rank, "alpha": 0.0, "shrinkage": 0.0, "set": name, "shots": None}
            records.append({"method": method, **about, "users": list(users)})
    base = {"alpha": 0.0, "shrinkage": 0.0, "effective_rank": 1.5, "cosines": [0.1], "columns": 2,
            "singular_values": [2.0, 1.0], "weight_entropy": 0.5, "losses": [1.0, 0.5],
            "loss_step": 1}  # fmt: skip
    fitting = {"estimator": "lore", "alpha": [0.0], "shrinkage": [0.0], "seeds": [0],
               "reference": "head"}  # fmt: skip
    about = {"script": "train_basis", "dataset": "made", "warning": None, "fitting": fitting}
    part = {"seed": 0, "users": names, "chosen": None, "records": records,
            "bases": [{**base, "rank": rank} for rank in (0, 1, 2)]}  # fmt: skip
    return {"settings": about, "seeds": [part]}


def told(results: dict[str, Any], folder: Path) -> str:
    """The report of hand-made results."""
    (folder / "results.json").write_text(json.dumps(results))
    return reports.report(folder)


def sentence(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("Verdict"))


def test_verdict_where_personal_weights_earn_something(tmp_path):
    line = sentence(told(hand_made(), tmp_path))
    figure = r"\+20\.0 points \[20\.0, 20\.0\] against (BT|others' weights)"
    assert len(re.findall(figure, line)) == 4
    assert line.count("personal weights earn +20.0") == 2 and "nothing" not in line


def test_verdict_needs_both_controls_beaten(tmp_path):
    noise = np.linspace(-0.3, 0.3, 40)
    for control in ("BT", "others"):
        line = sentence(told(hand_made(**{control: 0.7 + noise}), tmp_path))
        assert line.count("personal weights earn nothing: ") == 2
        assert line.count("+20.0 points") == 2
        assert len(re.findall(r"[+-]0\.0 points \[-", line)) == 2
    line = sentence(told(hand_made(LoRe=np.full(40, 0.1)), tmp_path))
    assert line.count("personal weights earn nothing: -40") == 2
    beaten = hand_made(BT=0.6 + noise / 10)  # by ten points, with little noise
    assert "nothing" not in sentence(told(beaten, tmp_path))


def test_verdict_without_a_rank_above_one(tmp_path):
    results = hand_made()
    part = results["seeds"][0]
    part["records"] = [r for r in part["records"] if r["method"] in ("BT", "reference")]
    assert sentence(told(results, tmp_path)).startswith("Verdict: no rank above 1 was fitted")


def test_controls_are_those_of_the_same_alpha(tmp_path):
    results = hand_made()
    part, fitting = results["seeds"][0], results["settings"]["fitting"]
    fitting["alpha"] = [0.0, 9.0]
    for r in copy.deepcopy(part["records"]):
        if r["method"] != "reference":
            gain = {"BT": 0.15, "LoRe": 0.1}.get(r["method"], 0.0)
            part["records"].append({**r, "alpha": 9.0, "users": [a + gain for a in r["users"]]})
    part["bases"] += [{**base, "alpha": 9.0} for base in part["bases"][1:]]
    blocks = told(results, tmp_path).split("\n\n")
    differences = table("\n" + [block for block in blocks if block.startswith("|")][1])
    assert differences["LoRe K=2 alpha=0"]["seen: - BT"].startswith("+20.0 ")
    assert differences["LoRe K=2 alpha=9"]["seen: - BT"].startswith("+15.0 ")
    assert differences["LoRe K=2 alpha=9"]["unseen: - others' weights"].startswith("+30.0 ")
    assert differences["LoRe K=2 alpha=9"]["unseen: - reference"].startswith("+30.0 ")


def test_users_count_once_over_repeats(tmp_path):
    results = hand_made()
    first = results["seeds"][0]
    second = copy.deepcopy(first)
    second["seed"] = results["settings"]["fitting"]["seeds"][0] + 1
    results["settings"]["fitting"]["seeds"] = [0, 1]
    for r in second["records"]:
        r["users"] = [a - 0.1 for a in r["users"]]
    results["seeds"].append(second)
    cell = table(told(results, tmp_path))["LoRe K=2"]["seen"]
    accuracies = np.array(first["records"][9]["users"])
    means = 100 * accuracies.mean(), 100 * (accuracies - 0.1).mean()
    assert cell.startswith(f"{np.mean(means):.1f} ± {np.std(means, ddof=1):.1f} [")
    low, high = reports.bootstrap(accuracies - 0.05)  # 40 users, not 80
    assert cell.endswith(f"[{100 * low:.1f}, {100 * high:.1f}]")


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_bootstrap_holds_the_mean(values):
    low, high = reports.bootstrap(np.array(values))
    assert min(values) - 1e-9 <= low <= np.mean(values) + 1e-9
    assert np.mean(values) - 1e-9 <= high <= max(values) + 1e-9


def test_bootstrap_is_the_standard_error_and_shrinks():
    rng = np.random.default_rng(0)
    for users in (100, 400, 1600):
        values = rng.normal(0.6, 0.2, users)
        low, high = reports.bootstrap(values)
        assert high - low == pytest.approx(2 * 1.96 * values.std() / users**0.5, rel=0.1)


def test_reports_are_made_anew_without_training(world, tmp_path, monkeypatch):
    text, folder = fit(world, tmp_path, seeds=[0, 1])
    results = {p.name: p.read_bytes() for p in folder.iterdir()}
    for name in ("table.md", "results.csv", "accuracy.png", "weights.pdf"):
        (folder / name).unlink()
    monkeypatch.setattr(experiments, "fit_grid", lambda *_: pytest.fail("nothing to train"))
    assert reports.report(folder) == text
    assert {p.name for p in folder.iterdir()} == set(results)
    for name in ("table.md", "results.csv", "results.json", "settings.json"):
        assert (folder / name).read_bytes() == results[name]


def test_table_and_csv_say_the_same(world, tmp_path):
    text, folder = fit(world, tmp_path, seeds=[0, 1], shrinkage=[0.0, 4.0])
    csv = pd.read_csv(folder / "results.csv")
    printed = table(text)
    assert set(printed) == set(csv.label) and len(csv.label.unique()) == 3 + 2 * 4
    means = csv.groupby(["label", "set", "seed"]).accuracy.mean().unstack()
    for label, cells in printed.items():
        for part in ("seen", "unseen"):
            if cells[part]:
                repeats = 100 * means.loc[label, part]
                assert cells[part].startswith(f"{repeats.mean():.1f} ± {repeats.std():.1f} [")
    assert Counter(csv.num_users) == {6: len(csv)}


# --------------------------------------------------------------------- Shots of new users


def sweep(prepared: Prepared, results: Path, **changes: Any) -> tuple[str, Path]:
    """A run of vary_fewshot: 1, 3 and 8 dialogues, twice each."""
    fitting = Fitting(**{**QUICK, "ranks": [2], "results": results, "run": "shots", **changes})
    draw = experiments.given_split(prepared)
    text = experiments.vary_fewshot(prepared, draw, fitting, [1, 3, 8], 2, "dialogues")
    return text, results / prepared.dataset / "shots"


def test_more_shots_tell_tastes_apart(world, tmp_path):
    text, folder = sweep(world, tmp_path)
    records = saved(folder)["seeds"][0]["records"]
    unseen = {(r["method"], r["shots"]): r for r in records if r["set"] == "unseen"}
    mean = {key: np.mean(r["users"]) for key, r in unseen.items()}
    assert {shots for _, shots in unseen} == {1, 3, 8}
    assert all(len(r["trials"]) == 2 for (m, _), r in unseen.items() if m != "own model")
    assert mean["LoRe", 8] > 0.85
    assert mean["LoRe", 8] >= mean["LoRe", 1]
    assert mean["own model", 8] > mean["own model", 1]
    for control in ("shuffled shots", "others' weights", "mean weights", "BT", "reference"):
        assert mean["LoRe", 8] - mean[control, 8] > 0.15
    for control in ("mean weights", "BT", "reference"):
        assert mean[control, 1] == mean[control, 3] == mean[control, 8]
    for (method, shots), r in unseen.items():
        expected = 100 * np.array(r["trials"])
        assert np.mean(r["trials"]) == pytest.approx(np.mean(r["users"]), abs=1e-4), method
        label = method if method in ("BT", "reference", "own model") else f"{method} K=2"
        assert table(text)[label][f"{shots} shots"].startswith(f"{expected.mean():.1f}")


def test_reference_of_a_sweep_is_the_heads(world, tmp_path):
    _, folder = sweep(world, tmp_path)
    unseen = experiments.given_split(world)(0).unseen
    ones = torch.ones(len(unseen.users), 1)
    expected = plain(world, unseen, world.store.head[:, None], ones)
    records = saved(folder)["seeds"][0]["records"]
    found = [r["users"] for r in records if (r["method"], r["set"]) == ("reference", "unseen")]
    assert len(found) == 3 and np.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("unit", "comparisons"), [("dialogues", 3), ("comparisons", 1)])
def test_a_shot_is_what_the_unit_says(world, tmp_path, monkeypatch, unit, comparisons):
    draw_shots, drawn = experiments.draw_shots, []

    def remember(*given):
        drawn.append(draw_shots(*given))
        return drawn[0]

    monkeypatch.setattr(experiments, "draw_shots", remember)
    fitting = Fitting(ranks=[1], results=tmp_path, **QUICK)
    sets = experiments.given_split(world)
    experiments.vary_fewshot(world, sets, fitting, [1, 4], 2, unit)
    few = sets(0).few
    sizes = [1] * 6 + [4] * 6
    assert [len(rows) for rows in drawn[0].rows] == [size * comparisons for size in sizes * 2]
    if unit == "dialogues":
        assert [len(few.dialogs[rows].unique()) for rows in drawn[0].rows] == sizes * 2


def test_a_sweep_of_several_processes_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "processes", lambda: (0, 2))
    with pytest.raises(InputError, match="without torchrun"):
        sweep(world, tmp_path)


def test_one_user_alone_can_be_simulated(tmp_path):
    prepared = planted(tmp_path / "two", users=4)
    whole = pd.read_parquet(prepared.folder / "comparisons.parquet")
    whole = whole[whole.user_id.isin(["p00", "p02"])]
    whole.to_parquet(prepared.folder / "comparisons.parquet")
    text, _ = fit(prepared, tmp_path, ranks=[0, 1])
    assert "no rank above 1" in text
    with pytest.raises(InputError, match="rank 2"):
        fit(prepared, tmp_path, ranks=[2], run="other")


# ----------------------------------------------------------------- Processes and kills

LONG = {"ranks": [2, 3], "iterations": 4000, "few_shot_iterations": 60, "progress": "false",
        "checkpoint_every": 100, "run": "here"}  # fmt: skip


def assert_same(a: Path, b: Path, ranks: tuple[int, ...]) -> None:
    """Two runs with the same results but for rounding."""
    for one, other in zip(saved(a)["seeds"], saved(b)["seeds"], strict=True):
        assert one["users"] == other["users"] and one["chosen"] == other["chosen"]
        for r, s in zip(one["records"], other["records"], strict=True):
            assert {k: r[k] for k in ("method", "set", "rank")}.items() <= s.items()
            assert abs(np.mean(r["users"]) - np.mean(s["users"])) < 0.02, (r["method"], r["set"])
    for rank in ranks:
        bases = [load_basis(f / f"basis-K{rank:02d}.safetensors") for f in (a, b)]
        for name in ("V", "W", "W_unseen"):
            x, y = (getattr(basis, name) for basis in bases)
            assert torch.linalg.norm(x - y) <= 1e-3 * torch.linalg.norm(x), (rank, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processes", "more"),
    [("PRISM", 3, {"select_rank": "true", "ranks": [2, 3]}),
     ("PersonalLLM", 2, {"users": 7, "unseen_users": 5, "pairs_per_user": 12, "few_shot_pairs": 5,
                         "ranks": [2, 3]})],
)  # fmt: skip
def test_processes_together_do_what_one_does(dataset, tmp_path, name, processes, more):
    settings = {"data": dataset(name).data, "iterations": 40, "few_shot_iterations": 40,
                "progress": "false", **more}  # fmt: skip
    one = running.invoke(f"{name}/train_basis.py", {**settings, "results": tmp_path / "one"})
    assert one.status == 0, one.err
    settings["results"] = tmp_path / "more"
    several = running.run(f"{name}/train_basis.py", settings, processes)
    assert several.status == 0, several.err
    folders = [next((tmp_path / part / name).iterdir()) for part in ("one", "more")]
    assert_same(*folders, (0, 1, 2, 3))
    assert list(table(one.out)) == list(table(several.out))
    assert several.out.count("Verdict") == 1


@pytest.mark.slow
def test_a_killed_training_goes_on_where_it_was(dataset, tmp_path):
    settings = {"data": dataset("PRISM").data, **LONG}
    whole, killed = ({**settings, "results": tmp_path / name} for name in ("whole", "killed"))
    process = running.start("PRISM/train_basis.py", killed)
    folder = tmp_path / "killed/PRISM/here"
    until = time.monotonic() + 120
    while len(list(folder.glob("state-*.pt"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (folder / "results.json").exists()
    resumed = running.run("PRISM/train_basis.py", killed)
    assert resumed.status == 0, resumed.err
    step = int(re.search(r"going on from step (\d+)", resumed.err).group(1))
    assert 200 <= step < 4000
    assert running.run("PRISM/train_basis.py", whole).status == 0
    assert saved(folder)["seeds"] == saved(tmp_path / "whole/PRISM/here")["seeds"]
    for rank in (1, 2, 3):
        name = f"basis-K{rank:02d}.safetensors"
        bases = [load_basis(f / name) for f in (folder, tmp_path / "whole/PRISM/here")]
        assert torch.equal(bases[0].V, bases[1].V) and torch.equal(bases[0].W, bases[1].W)
    assert not list(folder.glob("state-*"))


@pytest.mark.slow
def test_when_one_process_dies_the_others_stop(dataset, tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(running.ROOT)!r})\n"
        "import experiments\n"
        "fit_grid = experiments.fit_grid\n"
        "def die_later(task, *rest):\n"
        "    if task.seed == 1 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return fit_grid(task, *rest)\n"
        "experiments.fit_grid = die_later\n"
        "prepared = experiments.load(experiments.Path(sys.argv[2]))\n"
        "fitting = experiments.Fitting([2], iterations=40, few_shot_iterations=40, seeds=[0, 1],\n"
        "    progress=False, run='here', results=experiments.Path(sys.argv[4]))\n"
        "experiments.train_basis(prepared, experiments.given_split(prepared), fitting)\n"
    )
    data = dataset("PRISM").data
    outcome = running.run(str(script), {"data": data, "results": tmp_path}, processes=2)
    assert outcome.status not in (0, None)
    assert "Signal 9 (SIGKILL)" in outcome.err
    assert [part["seed"] for part in saved(tmp_path / "PRISM/here")["seeds"]] == [0]
    settings = {"data": data, "results": tmp_path, "run": "here", "seeds": [0, 1], "ranks": 2,
                "iterations": 40, "few_shot_iterations": 40, "progress": "false"}  # fmt: skip
    as_before = {"alpha": 0, "estimator": "lore"}
    finished = running.invoke("PRISM/train_basis.py", {**settings, **as_before})
    assert finished.status == 0, finished.err
    assert [part["seed"] for part in saved(tmp_path / "PRISM/here")["seeds"]] == [0, 1]
