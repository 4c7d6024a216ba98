"""The four sets of a repeat against plain loops, and folders that are not as prepared."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import people
from lore.common.files import InputError
from lore.experiments import splits
from lore.learning import simulated_users as sampling
from lore.learning.comparisons import Comparisons, DenseFeatures, RowFeatures
from lore.learning.method import Task
from lore.preparing import tables as preparing
from people import Rows, listed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world() -> people.People:
    return people.planted()


@pytest.fixture
def loaded(world, tmp_path, monkeypatch) -> Path:
    """A folder that reads as the world."""
    world.table.to_parquet(tmp_path / "comparisons.parquet", index=False)
    monkeypatch.setattr(splits, "load", lambda *_: (world.info, world.store))
    return tmp_path


# ------------------------------------------------------------------------ The four sets


INITIALS = {"r": "train", "e": "test", "v": preparing.VALIDATION}


def split_table(sides: dict[str, tuple[bool, str]]) -> pd.DataFrame:
    """One dialogue for every letter of user -> (seen, letters of the splits)."""
    rows = [
        {"user_id": user, "seen": seen, "split": INITIALS[letter],
         "dialog_id": f"{user}{i}", "turn": 0, "weight": 1.0}
        for user, (seen, letters) in sides.items() for i, letter in enumerate(letters)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    return table.assign(chosen=range(len(rows)), rejected=range(100, 100 + len(rows)))


def parts(task: Task) -> list[Comparisons]:
    """The four sets of a task."""
    return [getattr(task, name) for name in ("train", "seen", "few", "unseen")]


def four(table: pd.DataFrame, unit: splits.Unit = "dialogues") -> Task:
    return splits.four_sets(table, Rows(torch.zeros(200, 2), None), CPU, unit)


def test_four_sets_are_what_the_table_says(caplog):
    sides = {"a": (True, "rre"), "b": (False, "re"), "c": (True, "er"), "d": (False, "rr")}
    with caplog.at_level("INFO"):
        sets = four(split_table(sides))
    assert [(s.names, s.counts.tolist(), *people.ends(s)) for s in parts(sets)] == [
        (["a", "c"], [2, 1], [0, 1, 6], [100, 101, 106]),
        (["a", "c"], [1, 1], [2, 5], [102, 105]),
        (["b"], [1], [3], [103]), (["b"], [1], [4], [104]),
    ]  # fmt: skip
    assert sets.validation is None and "left out 1 user" in caplog.text


@pytest.mark.parametrize("kind", ["seen", "unseen"])
def test_four_sets_need_users_of_both_kinds(kind):
    with pytest.raises(InputError, match=f"no {kind} users"):
        four(split_table({"a": (kind == "unseen", "re"), "b": (kind == "seen", "r")}))


def test_validation_comparisons_are_a_set_and_where_nobody_is_unseen_new_users_have_none():
    sides = {"a": (True, "rvve"), "b": (True, "re"), "c": (True, "rv"), "d": (True, "erv")}
    sets = four(split_table(sides))
    assert sets.few is None and sets.unseen is None
    assert [(s.names, people.ends(s)[0]) for s in (sets.train, sets.seen, sets.validation)] == [
        (["a", "b", "d"], [0, 4, 9]), (["a", "b", "d"], [3, 5, 8]), (["a", "d"], [1, 2, 10])
    ]  # fmt: skip


def test_comparisons_keep_users_weights_and_dialogues_whatever_the_order_of_rows():
    table = pd.DataFrame({
        "user_id": ["b", "a", "b", "a", "a"], "dialog_id": ["y", "x", "w", "x", "z"],
        "turn": [0, 1, 0, 0, 0], "chosen": [1, 2, 3, 4, 5], "rejected": [6, 7, 8, 9, 10],
        "weight": [1.0, 0.5, 2.0, 0.25, 1.0], "seen": True, "split": "train",
    })  # fmt: skip
    rest = split_table({"a": (True, "e"), "b": (True, "e"), "c": (False, "re")})
    table = pd.concat([table, rest])
    train = four(table).train
    assert listed(train) == [
        ("a", 4, 9, 0.25), ("a", 2, 7, 0.5), ("a", 5, 10, 1.0), ("b", 3, 8, 2.0), ("b", 1, 6, 1.0)
    ]  # fmt: skip
    same = [[a == b for b in train.dialogs.tolist()] for a in train.dialogs.tolist()]
    assert same == [[a == b for b in "xxzwy"] for a in "xxzwy"]
    shuffled = four(table.sample(frac=1, random_state=1)).train
    assert listed(shuffled) == listed(train)


# --------------------------------------------------------------------- Some comparisons


def numbered(counts: list[int]) -> Comparisons:
    """Users u0, u1, ... whose comparisons are numbered from 0, two of them a dialogue."""
    rows = torch.arange(sum(counts))
    features = RowFeatures(lambda i: i[:, None].float(), 1, rows, rows + 1000)
    names = [f"u{i}" for i in range(len(counts))]
    return Comparisons(features, counts, rows + 0.5, names, rows // 2)


def test_selecting_leaves_out_users_without_comparisons():
    everything = numbered([2, 3, 1])
    keep = torch.tensor([False, False, True, False, True, True])
    some = everything.select(keep)
    assert (some.names, some.counts.tolist()) == (["u1", "u2"], [2, 1])
    assert listed(some) == [r for r, k in zip(listed(everything), keep, strict=True) if k]
    assert some.dialogs.tolist() == [1, 2, 2]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.integers(1, 8))
def test_processes_share_the_users(counts, processes):
    everything = numbered(counts)
    if processes > len(counts):
        with pytest.raises(InputError, match=f"{processes} processes for {len(counts)} users"):
            everything.share(0, processes)
        return
    shares = [everything.share(i, processes) for i in range(processes)]
    assert all(share.num_users for share in shares)
    assert [row for share in shares for row in listed(share)] == listed(everything)
    if processes < len(counts) // 2:  # no share is larger than a fair one and two users more
        assert max(map(len, shares)) <= sum(counts) / processes + 2 * max(counts)


@pytest.mark.parametrize("in_memory", [False, True])
def test_flipping_swaps_both_ends_of_those_that_are_named(world, in_memory):
    data = world.tasks().draw(0, CPU).few
    x = data.in_memory().features.x
    coin = torch.rand(len(data), generator=torch.Generator().manual_seed(0)) < 0.4
    flipped = (data.in_memory() if in_memory else data).flipped(coin)
    assert isinstance(flipped.features, DenseFeatures) == in_memory
    expected = torch.stack([-a if c else a for a, c in zip(x, coin.tolist(), strict=True)])
    assert torch.equal(flipped.in_memory().features.x, expected)
    for name in ("weight", "counts", "dialogs"):
        assert torch.equal(getattr(flipped, name), getattr(data, name))


# -------------------------------------------------------------------- Kinds of split


def test_a_given_split_is_the_same_for_every_seed(world, loaded):
    tasks = splits.given_split(loaded)
    first, second = (tasks.draw(seed, CPU) for seed in (0, 1))
    assert [listed(s) for s in parts(first)] == [listed(s) for s in parts(second)]
    assert first.train.names == first.seen.names == [f"p{u:02d}" for u in (0, 1, 4, 5, 8, 9)]
    assert tasks.unit == "dialogues"
    own = world.tasks().draw(0, CPU)
    assert [listed(s) for s in parts(own)] == [listed(s) for s in parts(first)]


@pytest.mark.parametrize("draw", [
    splits.given_split, lambda folder: splits.drawn_split(folder, 0.25, 1000, 1000),
])  # fmt: skip
def test_comparisons_of_the_same_tokens_are_left_out(world, loaded, monkeypatch, caplog, draw):
    whole, chosen = draw(loaded), torch.tensor(world.table["chosen"].to_numpy())
    third = chosen[::3]
    monkeypatch.setattr(world.store, "same", lambda some, _: torch.isin(some, third))
    cut = draw(loaded)
    assert cut.about == {**whole.about, "same_tokens": len(third)}
    assert f"left out {len(third)} of {len(chosen)} comparisons" in caplog.text
    total = sum(len(some) for some in parts(cut.draw(0, CPU)))
    assert total == sum(len(some) for some in parts(whole.draw(0, CPU))) - len(third)
    monkeypatch.setattr(world.store, "same", lambda some, _: torch.ones_like(some, dtype=bool))
    with pytest.raises(InputError, match="no comparisons are left: .*--max_length.*chat template"):
        draw(loaded)


def test_drawn_splits_follow_the_seed_alone(world, loaded):
    draw = splits.drawn_split(loaded, 0.25, 10, 4).draw
    sets, other = (draw(seed, CPU) for seed in (0, 1))
    assert sets.train.names != other.train.names
    world.table.sample(frac=1, random_state=0).to_parquet(loaded / "comparisons.parquet")
    for again in (draw(0, CPU), splits.drawn_split(loaded, 0.25, 10, 4).draw(0, CPU)):
        assert [sorted(listed(s)) for s in parts(sets)] == [sorted(listed(s)) for s in parts(again)]


def test_drawn_splits_take_samples_of_the_training_side_only(world, loaded):
    sets = splits.drawn_split(loaded, 0.25, 10, 4).draw(0, CPU)
    assert not set(sets.train.names) & set(sets.few.names)
    assert sets.train.counts.tolist() == [10] * 3 and sets.few.counts.tolist() == [4] * 9
    assert sets.few.dialogs is None  # a shot is a comparison
    for part, split in zip(parts(sets), ("train", "test", "train", "test"), strict=True):
        side = world.table[(world.table.split == split) & world.table.user_id.isin(part.names)]
        owned = set(zip(side.user_id, side.chosen, side.rejected, strict=True))
        taken = {row[:3] for row in listed(part)}
        assert taken <= owned and (split == "train" or taken == owned)
    everything = splits.drawn_split(loaded, 0.25, 1000, 1000).draw(0, CPU)
    assert everything.train.counts.tolist() == [24] * 3


@pytest.fixture
def simulated(tmp_path, monkeypatch) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A folder of random scores, these [20 + 7 prompts, 8, 10], and the rows of the responses."""
    scores = torch.randn(27, 8, 10, generator=torch.Generator().manual_seed(0))
    rows = torch.randperm(27 * 8, generator=torch.Generator().manual_seed(1)).view(27, 8)
    parts = {"train.scores": scores[:20], "train.rows": rows[:20],
             "test.scores": scores[20:], "test.rows": rows[20:]}  # fmt: skip
    tables = {name: part.numpy() for name, part in parts.items()}
    talk = [[{"role": "user", "content": "a"}]]
    info = {"dataset": "simulated", "settings": {}}
    preparing.write_prepared(tmp_path, talk, tables, info, preparing.Funnel())
    store = Rows(torch.zeros(27 * 8, 2), None)
    monkeypatch.setattr(splits, "load", lambda *_: ({"dataset": "simulated"}, store))
    return tmp_path, scores, rows


def test_simulated_users_choose_as_a_plain_loop_does(simulated):
    data, scores, rows = simulated
    sets = splits.simulated_users(data, 0.1, 6, 4, 9, 5).draw(3, CPU)
    W = sampling.generate_population(0.1, 10, torch.Generator().manual_seed(3)).double()
    assert [s.counts.tolist() for s in parts(sets)] == [[9] * 6, [7] * 6, [5] * 4, [7] * 4]
    prompt_of = {int(row): p for p, some in enumerate(rows) for row in some}
    drawn = set()
    for part, weights, side in zip(parts(sets), (W[:6], W[:6], W[6:], W[6:]), "rere", strict=True):
        choices = torch.tensor(people.ends(part)).T.split(part.counts.tolist())
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


def test_simulated_users_follow_the_seed_and_have_no_more_pairs_than_prompts(simulated):
    draw = splits.simulated_users(simulated[0], 0.1, 6, 4, 9, 5).draw
    first, again, other = (draw(seed, CPU) for seed in (0, 0, 1))
    ends = [[people.ends(s) for s in parts(sets)] for sets in (first, again, other)]
    assert ends[0] == ends[1] != ends[2]
    assert not set(first.train.names) & {*first.few.names, *other.train.names}
    with pytest.raises(InputError, match="21 .* 20 are there; lower --pairs-per-user"):
        splits.simulated_users(simulated[0], 0.1, 6, 4, 21, 5)


@pytest.mark.parametrize(("which", "head", "words"), [
    ("head", [1.0, 2.0], None), ("none", [1.0, 2.0], None), ("head", None, None),
    ("last_linear", [1.0, 2.0], "the published code's mistaken one (last_linear)"),
    ("head", [0.0, 0.0], "(head) is zero and says nothing"),
    ("head", [0.5, 0.5], "(head) is 0.5 in every feature and says nothing"),
])  # fmt: skip
def test_the_reference_is_the_one_asked_for_and_one_that_says_nothing_is_warned_of(
    world, caplog, which, head, words
):
    store = Rows(torch.zeros(2, 2), None if head is None else torch.tensor(head))
    store.last_linear = torch.tensor([3.0, 4.0])
    found = world._replace(store=store).tasks().reference(which)
    expected = {"head": head, "none": None, "last_linear": [3.0, 4.0]}[which]
    assert found is expected if expected is None else found.tolist() == expected
    assert words in caplog.text if words else not caplog.text


def test_a_warning_of_the_data_is_recorded_with_the_run(world):
    facts = world._replace(info={**world.info, "warning": "odd"}).tasks().facts()
    assert facts["warning"] == "odd" and facts["prepared"] == world.info


def test_data_that_are_not_embedded_are_named(dataset, tmp_path):
    """Damaged files have a table of their own in test_attack_files.py."""
    without = shutil.ignore_patterns("embeddings")
    data = shutil.copytree(dataset("PRISM").data, tmp_path / "data", ignore=without)
    with pytest.raises(InputError, match=f"^{re.escape(str(data))}/embeddings: not there; embed"):
        splits.given_split(data)


# ------------------------------------------------------------------------ Further features


def extended(**columns: list[float]) -> splits.Extended:
    """Three training comparisons of rows 0, 1 and 2 with lengths, and a held-out one of row 3."""
    table = {
        "seen": True, "split": ["train"] * 3 + ["test"],
        "chosen": [0, 1, 2, 3], "rejected": [1, 2, 0, 0],
        "extra chosen length": [5.0, 2.0, np.nan, np.nan],
        "extra rejected length": [3.0, np.nan, 7.0, 5.0],
    }  # fmt: skip
    store = Rows(torch.arange(8.0).reshape(4, 2), torch.tensor([1.0, 2.0]))
    return splits.Extended(store, pd.DataFrame(table | columns))


def test_further_features_are_the_mean_of_what_is_said_standardised_on_training() -> None:
    store = extended()
    # 0 has 5, 7 and 5; 1 has 3 and 2; nothing is said of 2 and 3, which are the mean of the others
    means = torch.tensor([17 / 3, 2.5, (17 / 3 + 2.5) / 2, (17 / 3 + 2.5) / 2])
    unit = torch.stack([means[0] - means[1], means[1] - means[2], means[2] - means[0]])
    expected = (means - means.mean()) / unit.square().mean().sqrt()
    rows = store.rows(torch.tensor([2, 0, 1, 3]))
    torch.testing.assert_close(rows[:, 2], expected[[2, 0, 1, 3]])
    assert rows[:, :2].tolist() == [[4, 5], [0, 1], [2, 3], [6, 7]]
    assert store.num_features == 3 and len(store) == 4 and store.last_linear is None
    assert store.head.tolist() == [1, 2, 0] and store.manifest["model"] == "planted"


@pytest.mark.parametrize(("name", "tasks"), [
    ("PRISM", splits.given_split),
    ("RedditTLDR", lambda data, **more: splits.drawn_split(data, 0.5, 9, 9, **more)),
    ("PersonalLLM", lambda data, **more: splits.simulated_users(data, 1, 2, 2, 2, 2, **more)),
])  # fmt: skip
def test_the_length_of_a_response_is_a_feature_of_every_kind_of_split(dataset, name, tasks):
    data = dataset(name).data
    plain, more = tasks(data), tasks(data, features=("length",))
    rows, every = more.store.rows, torch.arange(len(more.store))
    assert torch.equal(rows(every)[:, :-1], plain.store.rows(every))
    length = [len(talk[-1]["content"]) for talk in preparing.read_conversations(data)]
    log_length = torch.tensor(length, dtype=torch.float64).log1p()
    column = rows(every)[:, -1].double()
    used = column != column.median()  # what no comparison has is the mean of the others
    both = torch.stack([log_length[used], column[used]])
    assert used.sum() > len(used) / 2 and torch.corrcoef(both)[0, 1] > 0.99999
    train = more.draw(0, CPU).train.features
    assert train.num_features == plain.draw(0, CPU).train.features.num_features + 1
    assert more.about["extra"] == ["log length"] and "extra" not in plain.about


def test_a_feature_that_never_differs_in_training_is_refused() -> None:
    same = {"extra chosen length": [1.0, 1.0, 1.0, 9.0], "extra rejected length": [1.0] * 4}
    with pytest.raises(InputError, match="the feature length differs in no training comparison"):
        extended(**same)
