"""PersonalRewardBench/prepare.py: its own three-way split, messages as cells, what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import worlds
from lore.common.files import InputError

FILES = ("train.parquet", "validation.parquet", "test.parquet")


def prepare(source: Path, out: Path) -> dict[str, Any]:
    """Run the script's main without embedding; what prepare.json says."""
    return worlds.prepare("PersonalRewardBench", source, out, embed=False)


def talk(context: list[dict[str, str]], response: str) -> str:
    """The whole conversation as JSON, the model being the assistant."""
    said = [*context, {"content": response, "role": "model"}]
    roles = {"model": "assistant", "user": "user"}
    return json.dumps([{"role": roles[m["role"]], "content": m["content"]} for m in said])


@pytest.fixture
def source(tmp_path) -> Path:
    return worlds.rewardbench(tmp_path / "raw")


def rows_of(source: Path) -> list[dict[str, Any]]:
    return [row for file in FILES for row in worlds.read(source / file)]


def edited(source: Path, change: dict[str, Any], number: int = 0) -> Path:
    """The same rows in one .jsonl file, one of them changed."""
    rows = rows_of(source)
    rows[number].update(change)
    worlds.write(source.parent / "edited" / "all.jsonl", rows)
    return source.parent / "edited"


def test_every_row_is_a_comparison_of_a_seen_user(source, tmp_path):
    info = prepare(source, tmp_path / "data")
    table = worlds.comparisons(tmp_path / "data")
    expected = sorted(
        (r["user_id"], r["split"], r["conversation_id"], len(r["context"]) // 2,
         talk(r["context"], r["chosen"]["content"]), talk(r["context"], r["rejected"]["content"]))
        for r in rows_of(source)
    )  # fmt: skip
    assert worlds.as_tuples(table, ["user_id", "split", "dialog_id", "turn"]) == expected
    assert table.seen.all() and (table.weight == 1).all()
    kept = {key: info["counts"][key] for key in info["counts"] if "comparisons" in key}
    assert kept["comparisons"] == 60 and kept["validation comparisons"] == 20
    assert kept["training comparisons"] == 22 and kept["test comparisons"] == 18


def test_neither_the_order_of_rows_nor_judges_columns_matter(source, tmp_path):
    first = prepare(source, tmp_path / "a")
    for file in FILES:
        worlds.shuffle(source / file)
        worlds.edit(source / file, lambda rows: [row.pop("agreement") for row in rows])
    assert prepare(source, tmp_path / "b")["data_sha256"] == first["data_sha256"]


def test_a_validation_comparison_is_none_that_training_has(source, tmp_path):
    """Overlap is told of training alone, and settings are chosen by the other."""
    test = next(i for i, row in enumerate(rows_of(source)) if row["split"] == "test")
    like = rows_of(source)[test]
    same = {key: like[key] for key in ("context", "chosen", "rejected")}
    for number, pairs in ((0, 1), (1, 0)):
        folder = edited(source, same, number)
        assert rows_of(source)[number]["split"] == ("train", "val")[number]
        assert prepare(folder, tmp_path / f"data{number}")["overlap"]["pair"] == pairs


def test_without_a_name_a_dialogue_is_its_first_prompt(source, tmp_path):
    rows = rows_of(source)
    for row in rows:
        del row["conversation_id"]
    rows[3]["context"] = [*rows[0]["context"], {"role": "model", "content": "so"},
                          {"role": "user", "content": "and then?"}]  # fmt: skip
    worlds.write(tmp_path / "plain" / "all.jsonl", rows)
    prepare(tmp_path / "plain", tmp_path / "data")
    table = pd.read_parquet(tmp_path / "data" / "comparisons.parquet")
    mine = table[(table.user_id == "user0") & (table.split == "train")]
    (twice,) = mine.dialog_id[mine.dialog_id.duplicated()]
    assert sorted(mine.turn[mine.dialog_id == twice]) == [0, 1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"split": "extra"}, "rows whose split is extra"),
        ({"chosen": {"role": "model", "content": ""}}, "chosen responses empty"),
        ({"rejected": ""}, "rejected responses empty"),
        ({"context": []}, "rows whose context does not end with a message of the user"),
        (
            {"context": [{"role": "model", "content": "hello"}]},
            "rows whose context does not end with a message of the user",
        ),
        (
            {"chosen": "yes", "rejected": {"role": "model", "content": "yes"}},
            "rejected responses equal to the chosen one",
        ),
    ],
)
def test_rows_that_compare_nothing_are_left_out_and_counted(source, tmp_path, change, reason):
    counts = prepare(edited(source, change), tmp_path / "data")["counts"]
    assert counts[f"left out: {reason}"] == 1 and counts["comparisons"] == 59


def test_a_response_may_be_plain_text(source, tmp_path):
    prepare(edited(source, {"chosen": "plainly"}), tmp_path / "data")
    talks = worlds.comparisons(tmp_path / "data").chosen.map(lambda messages: messages[-1])
    assert {"role": "assistant", "content": "plainly"} in talks.tolist()


def test_users_without_training_or_test_comparisons_are_left_out(source, tmp_path):
    for user, split in (("user0", "train"), ("user1", "test"), ("user2", "val")):
        for file in FILES:
            rows = worlds.read(source / file)
            kept = [r for r in rows if (r["user_id"], r["split"]) != (user, split)]
            worlds.write(source / file, kept)
    counts = prepare(source, tmp_path / "data")["counts"]
    assert counts["users with comparisons"] == 6
    assert counts["users with comparisons for training and for test"] == 4
    table = pd.read_parquet(tmp_path / "data" / "comparisons.parquet")
    assert set(table.user_id) == {"user2", "user3", "user4", "user5"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": None}, "row 1 has an empty user_id"),
        ({"split": 0.5}, "row 1: split must be text, not a float"),
        ({"context": "hello"}, "row 1: context must be a list of role and content"),
        ({"context": [{"role": "user"}]}, "row 1: a message must have role and content"),
        ({"chosen": {"role": "model"}}, "row 1: chosen is a message without content"),
        ({"rejected": ["a", "b"]}, "row 1: rejected must be text, not a list"),
        ({"conversation_id": ["c"]}, "row 1: conversation_id must be text, not a list"),
    ],
)
def test_bad_input_is_one_clear_error(source, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        prepare(edited(source, change), tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("column", ["user_id", "split", "context", "chosen", "rejected"])
def test_a_missing_column_is_refused_by_name(source, tmp_path, column):
    worlds.edit(source / "test.parquet", lambda rows: [row.pop(column) for row in rows])
    with pytest.raises(InputError, match=f"test.parquet row 1 has no column {column}"):
        prepare(source, tmp_path / "data")
