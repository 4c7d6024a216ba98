"""lore/preparing/hold_out.py: what is divided, what never stands on both sides, the default."""

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import worlds
from lore.common.files import InputError

Rows = list[dict[str, Any]]


def prepare(folder: Path, rows: Rows, **settings: Any) -> tuple[dict[str, Any], pd.DataFrame]:
    """What prepare.json says of these rows, and the table of comparisons."""
    worlds.write(folder / "mine.jsonl", rows)
    settings = {"embed": False, **settings}
    info = worlds.prepare("OwnData", folder / "mine.jsonl", folder / "data", **settings)
    return info, pd.read_parquet(folder / "data" / "comparisons.parquet")


def ratings(users: int = 16, items: int = 25, count: int = 60, prompts: int = 1) -> Rows:
    """Choices between two of some items after a prompt, ``count`` by each user."""
    rng = random.Random(0)
    pairs = list(combinations(range(items), 2))
    rows = []
    for user in range(users):
        for i, pair in enumerate(rng.sample(pairs, count)):
            chosen, rejected = rng.sample(pair, 2)
            row = {"user": f"u{user}", "prompt": f"which of these, {i % prompts}?"}
            rows.append({**row, "chosen": f"item {chosen}", "rejected": f"item {rejected}"})
    return rows


def sides(table: pd.DataFrame) -> list[set[int]]:
    """The conversations of training and those held out."""
    parts = [table[table.split == side] for side in ("train", "test")]
    return [set(part.chosen) | set(part.rejected) for part in parts]


@pytest.mark.parametrize("seed", range(3))
def test_no_response_is_on_both_sides_where_responses_are_divided(tmp_path, seed):
    info, table = prepare(tmp_path, ratings(), split="responses", seed=seed)
    train, test = sides(table)
    assert not train & test and (len(train), len(test)) == (15, 10)
    assert info["split"]["crossing"] == 16 * 60 - len(table) > 0
    why = "left out: comparisons of a held-out response with one of training"
    assert info["counts"][why] == info["split"]["crossing"]
    assert f"{info['split']['crossing']:,} comparisons" in info["split"]["sentence"]
    for group in ("seen", "unseen"):  # all are new
        assert info["kinds"][group]["known"] == info["kinds"][group]["met"] == 0
    again, _ = prepare(tmp_path / "again", ratings()[::-1], split="responses", seed=seed)
    other, _ = prepare(tmp_path / "other", ratings(), split="responses", seed=seed + 1)
    assert again["data_sha256"] == info["data_sha256"] != other["data_sha256"]


@pytest.mark.parametrize(
    ("rows", "by"),
    [
        (ratings(), "responses"),  # one prompt, few items, each of which many users judge
        (ratings(count=10), "pairs"),  # fewer than 100 comparisons would be held out
        (ratings(items=15), "pairs"),  # too few items to divide
        (ratings(prompts=30), "prompts"),
        ([{**row, "dialog": row["chosen"]} for row in ratings(prompts=30)], "dialogs"),
        (
            [{**row, "dialog": "d", "split": "test" if i % 3 else "train"}
             for i, row in enumerate(ratings())], "given",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_default_is_the_hardest_that_leaves_enough(tmp_path, rows, by, capsys):
    info, _ = prepare(tmp_path, rows)
    assert info["split"]["by"] == by and f"--split {by}, the hardest" in info["split"]["sentence"]
    assert info["split"]["sentence"] in capsys.readouterr().out
    named, _ = prepare(tmp_path / "named", rows, split=by)
    assert named["data_sha256"] == info["data_sha256"]
    assert "hardest" not in named["split"]["sentence"]


def test_no_prompt_is_on_both_sides_where_prompts_are_divided(tmp_path):
    info, _ = prepare(tmp_path, ratings(prompts=30), split="prompts")
    assert info["overlap"]["prompt"] == info["overlap"]["response"] == 0
    assert info["kinds"]["seen"]["new"] > 0 == info["kinds"]["seen"]["met"]


@pytest.mark.parametrize("by", ["given", "dialogs"])
def test_a_split_by_what_is_not_there_is_refused(tmp_path, by):
    with pytest.raises(InputError, match=f"--split {by}: the rows have none; choose another"):
        prepare(tmp_path, ratings(), split=by)
    assert not (tmp_path / "data").exists()


def test_a_split_that_is_asked_for_overrules_the_column(tmp_path):
    rows = [{**row, "split": "elsewhere" if i % 2 else "train"} for i, row in enumerate(ratings())]
    info, table = prepare(tmp_path, rows, split="pairs")
    assert len(table) == len(rows) and info["split"]["by"] == "pairs"


@pytest.mark.parametrize("by", ["dialogs", "prompts", "responses", "pairs"])
def test_a_pair_that_a_user_judged_twice_is_on_one_side(tmp_path, by):
    rows = [{**row, "dialog": f"d{i}"} for i, row in enumerate(ratings(prompts=30))]
    again = [
        {**row, "dialog": f"again{i}", "chosen": row["rejected"], "rejected": row["chosen"]}
        for i, row in enumerate(rows[::3])
    ]
    _, table = prepare(tmp_path, rows + again, split=by)
    low, high = table[["chosen", "rejected"]].min(axis=1), table[["chosen", "rejected"]].max(axis=1)
    judged = table.groupby([table.user_id, low, high])
    assert (judged.size() == 2).sum() > 20 and (judged.split.nunique() == 1).all()


def test_a_tie_that_counts_both_ways_is_not_judged_again(tmp_path):
    columns = worlds.script("OwnData/prepare.py").Columns(ties="half")
    rows = [
        {"user": row["user"], "prompt": row["prompt"], "response_a": row["chosen"],
         "response_b": row["rejected"], "winner": "tie" if i % 4 == 0 else "a"}
        for i, row in enumerate(ratings())
    ]  # fmt: skip
    info, table = prepare(tmp_path, [*rows, rows[1], rows[2]], columns=columns, split="pairs")
    assert (table.weight == 0.5).sum() == 2 * len(rows) / 4
    assert info["retest"]["judged_again"] == 2 and info["retest"]["same"] == 1


def test_summaries_can_be_divided_and_are_not_by_default(tmp_path):
    source = worlds.tldr(tmp_path / "raw", workers=6, annotations=60)
    settings = {"min_annotations": 20, "embed": False}
    given = worlds.prepare("RedditTLDR", source, tmp_path / "given", **settings)
    assert given["split"]["by"] == "given" and given["overlap"]["response"] > 0
    info = worlds.prepare("RedditTLDR", source, tmp_path / "new", **settings, split="responses")
    train, test = sides(pd.read_parquet(tmp_path / "new" / "comparisons.parquet"))
    assert train and test and not train & test
    assert info["kinds"]["seen"]["new"] == info["overlap"]["held_out"] > 0
