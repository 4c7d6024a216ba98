"""CommunityAlignment/prepare.py: language, turns and their weights, splits, unseen prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import worlds
from lore.common.files import InputError


def prepare(source: Path, out: Path, **settings) -> dict:
    """Run the script's main without embedding; what prepare.json says."""
    settings = {"embed": False, "min_comparisons": 20, **settings}
    return worlds.prepare("CommunityAlignment", source, out, **settings)


def expected(source: Path, language: str = "en") -> set[tuple]:
    """(annotator, conversation, turn, chosen, rejected) by a plain loop; as JSON."""
    found = set()
    for row in worlds.read(source / "train.parquet"):
        history: list[dict[str, str]] = []
        for number, turn in enumerate(worlds.TURNS):
            prompt = row[f"{turn}_turn_prompt"]
            if prompt == "EMPTY STRING" or row["assigned_lang"] != language:
                break
            history.append({"role": "user", "content": prompt})
            ends = {
                f"response_{x}": [
                    *history,
                    {"role": "assistant", "content": row[f"{turn}_turn_response_{x}"]},
                ]
                for x in "abcd"
            }
            history = ends.pop(row[f"{turn}_turn_preferred_response"])
            for end in ends.values():
                key = (row["annotator_id"], row["conversation_id"], number)
                found.add((*key, json.dumps(history), json.dumps(end)))
    return found


def as_set(table: pd.DataFrame) -> set[tuple]:
    return set(worlds.as_tuples(table, ["user_id", "dialog_id", "turn"]))


@pytest.mark.parametrize("language", ["en", "fr"])
def test_three_comparisons_a_turn_of_one_language(tmp_path, language):
    source = worlds.community(tmp_path / "raw", languages=("en", "fr", "hi"))
    info = prepare(source, tmp_path / "data", language=language)
    table = worlds.comparisons(tmp_path / "data")
    assert as_set(table) == expected(source, language)
    assert len(table) == len(expected(source, language))
    assert info["counts"][f"conversations in {language}"] == 78
    assert info["counts"]["conversations"] == 3 * 78
    assert max(len(messages) for messages in table.chosen) == 8  # four turns


def test_a_turn_weighs_one(tmp_path):
    source = worlds.community(tmp_path / "raw")
    rows = worlds.read(source / "train.parquet")
    lost = next(x for x in "abcd" if rows[0]["first_turn_preferred_response"] != f"response_{x}")
    rows[0][f"first_turn_response_{lost}"] = "EMPTY STRING"
    worlds.write(source / "train.parquet", rows)
    counts = prepare(source, tmp_path / "data")["counts"]
    table = worlds.comparisons(tmp_path / "data")
    turns = table.groupby(["dialog_id", "turn"]).weight
    assert turns.sum().round(9).eq(1).all()
    assert turns.size()["conv0", 0] == 2
    assert counts["left out: rejected responses empty"] == 1


def test_split_is_by_conversation_of_each_annotator(tmp_path):
    info = prepare(worlds.community(tmp_path / "raw"), tmp_path / "data", seen_fraction=0.34)
    table = pd.read_parquet(tmp_path / "data" / "comparisons.parquet")
    assert (table.groupby("dialog_id").split.nunique() == 1).all()
    halves = table.groupby(["user_id", "split"]).dialog_id.nunique().unstack()
    assert (halves.train - halves.test).isin([0, 1]).all()
    assert (table.groupby("user_id").seen.nunique() == 1).all()
    assert table[table.seen].user_id.nunique() == info["counts"]["seen users"] == 2


def first_prompts(data: Path) -> dict[str, set[str]]:
    table = worlds.comparisons(data)
    prompts = table.chosen.map(lambda messages: messages[0]["content"])
    return {split: set(prompts[table.split == split]) for split in ("train", "test")}


def test_shared_prompts_are_counted_and_may_be_kept_apart(tmp_path, capsys):
    source = worlds.community(tmp_path / "raw")
    counts = prepare(source, tmp_path / "a")["counts"]
    sides = first_prompts(tmp_path / "a")
    overlap = len(sides["train"] & sides["test"])
    assert counts["first prompts on both sides"] == overlap > 0
    assert f"{overlap}  first prompts on both sides" in capsys.readouterr().out
    counts = prepare(source, tmp_path / "b", unseen_prompts=True)["counts"]
    sides = first_prompts(tmp_path / "b")
    assert not sides["train"] & sides["test"]
    assert counts["first prompts on both sides"] == 0
    assert abs(len(sides["train"]) - len(sides["test"])) <= 1
    table = pd.read_parquet(tmp_path / "b" / "comparisons.parquet")
    assert (table.groupby("dialog_id").split.nunique() == 1).all()
    assert (table.groupby("user_id").split.nunique() == 2).all()


def test_annotators_with_few_comparisons_or_one_conversation_are_left_out(tmp_path):
    source = worlds.community(tmp_path / "raw")
    sizes = pd.Series([row[0] for row in expected(source)]).value_counts()
    enough = int(sizes.iloc[2])
    counts = prepare(source, tmp_path / "a", min_comparisons=enough)["counts"]
    kept = set(sizes[sizes >= enough].index)
    assert counts[f"annotators with at least {enough} comparisons"] == len(kept) < len(sizes)
    table = pd.read_parquet(tmp_path / "a" / "comparisons.parquet")
    assert set(table.user_id) == kept

    def one_conversation(rows):
        rows[1:] = [row for row in rows[1:] if row["annotator_id"] != "en0"]

    worlds.edit(source / "train.parquet", one_conversation)
    counts = prepare(source, tmp_path / "b", min_comparisons=1)["counts"]
    assert counts["annotators with at least 1 comparisons"] == 6
    assert counts["users with dialogues for training and for test"] == 5


def empty_turn(row, turn):
    row |= {name: "EMPTY STRING" for name in row if name.startswith(f"{turn}_turn")}


def gap(row):
    row |= {name.replace("first", "third"): row[name] for name in row if name.startswith("first")}
    empty_turn(row, "second")


def no_first_turn(row):
    empty_turn(row, "first")
    row["second_turn_prompt"] = "is there a first?"


def nothing_preferred(row):
    row["first_turn_preferred_response"] = None


def none_of_the_four(row):
    row["first_turn_preferred_response"] = "response_e"


def nothing_said(row):
    row[f"first_turn_{row['first_turn_preferred_response']}"] = "EMPTY STRING"


@pytest.mark.parametrize(
    ("change", "reason", "turns"),
    [
        (gap, "at a missing turn", {0}),
        (no_first_turn, "at a missing turn", set()),
        (nothing_preferred, "at a preferred_response that names no response", set()),
        (none_of_the_four, "at a preferred_response that names no response", set()),
        (nothing_said, "at an empty chosen response", set()),
    ],
)
def test_a_conversation_ends_where_it_cannot_be_used(tmp_path, change, reason, turns):
    source = worlds.community(tmp_path / "raw")
    worlds.edit(source / "train.parquet", lambda rows: change(rows[0]))
    counts = prepare(source, tmp_path / "data")["counts"]
    assert counts[f"left out: dialogues cut {reason}"] == 1
    table = pd.read_parquet(tmp_path / "data" / "comparisons.parquet")
    assert set(table[table.dialog_id == "conv0"].turn) == turns


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, {"language": "xx"}, "--language xx is none of those there: en, fr"),
        ({}, {"min_comparisons": 1000}, "no comparisons are left: .* 0 annotators with at least"),
        ({}, {"seen_fraction": 0.0}, "--seen-fraction 0.0 of 6 users makes 0 of them seen"),
        ({"annotator_id": float("nan")}, {}, "row 1: annotator_id must be text, not a float"),
        ({"annotator_id": {"a": 1}}, {}, "row 1: annotator_id must be text, not a dict"),
        ({"annotator_id": "\ud800"}, {}, "row 1: annotator_id holds half a surrogate pair"),
        ({"conversation_id": "\udc00"}, {}, "row 1: conversation_id holds half a surrogate"),
        ({"assigned_lang": ["en"]}, {}, "row 1: assigned_lang must be text, not a list"),
        ({"first_turn_prompt": 5}, {}, "row 1: first_turn_prompt must be text, not a int"),
        ({"annotator_id": None}, {}, "row 1 has an empty annotator_id"),
        ({"conversation_id": ""}, {}, "row 1 has an empty conversation_id"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, change, settings, message):
    source = worlds.community(tmp_path / "raw")
    rows = worlds.read(source / "train.parquet")
    rows[0].update(change)
    (source / "train.parquet").unlink()
    worlds.write(source / "train.jsonl", rows)
    with pytest.raises(InputError, match=message):
        prepare(source, tmp_path / "data", **settings)
    assert not (tmp_path / "data").exists()


def test_a_missing_column_is_refused_by_name(tmp_path):
    source = worlds.community(tmp_path / "raw")
    column = "second_turn_response_c"
    worlds.edit(source / "train.parquet", lambda rows: [row.pop(column) for row in rows])
    with pytest.raises(InputError, match=f"row 1 has no column {column}"):
        prepare(source, tmp_path / "data")
