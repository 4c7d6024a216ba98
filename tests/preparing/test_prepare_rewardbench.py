"""PersonalRewardBench/prepare.py: its own three-way split, messages as cells, what is left out."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import worlds

MODEL_SAYS = {"role": "model", "content": "hello"}
NOT_THE_USER = "rows whose context does not end with a message of the user"


def prepare(folder: Path, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], pd.DataFrame]:
    """What prepare.json says of rows in one file, and their comparisons."""
    worlds.write(folder / "raw" / "all.jsonl", rows)
    source, out = folder / "raw", folder / "data"
    info = worlds.prepare("PersonalRewardBench", source, out, embed=False)
    return info, worlds.comparisons(out)


@pytest.fixture
def rows(tmp_path) -> list[dict[str, Any]]:
    """All rows of the three files."""
    source = worlds.rewardbench(tmp_path / "three")
    files = ("train.parquet", "validation.parquet", "test.parquet")
    return [row for file in files for row in worlds.read(source / file)]


def talk(row: dict[str, Any], side: str) -> str:
    """The whole conversation as JSON, the model being the assistant."""
    said = [*row["context"], {"role": "model", **row[side]}]
    roles = {"model": "assistant", "user": "user"}
    return json.dumps([{"role": roles[m["role"]], "content": m["content"]} for m in said])


def test_every_row_is_a_comparison_of_a_seen_user(rows, tmp_path):
    info, table = prepare(tmp_path, rows)
    expected = sorted(
        (r["user_id"], r["split"], r["conversation_id"], len(r["context"]) // 2,
         talk(r, "chosen"), talk(r, "rejected"))
        for r in rows
    )  # fmt: skip
    assert worlds.as_tuples(table, ["user_id", "split", "dialog_id", "turn"]) == expected
    assert table.seen.all() and (table.weight == 1).all()
    sides = ("", "training ", "validation ", "test ")
    assert [info["counts"][f"{side}comparisons"] for side in sides] == [60, 22, 20, 18]
    three = worlds.prepare("PersonalRewardBench", tmp_path / "three", tmp_path / "b", embed=False)
    assert three["data_sha256"] == info["data_sha256"]
    plain = [{k: v for k, v in row.items() if k != "agreement"} for row in rows[::-1]]
    assert prepare(tmp_path / "c", plain)[0]["data_sha256"] == info["data_sha256"]


def test_a_validation_comparison_is_none_that_training_has(rows, tmp_path):
    """Overlap is told of training alone, and settings are chosen by the other."""
    like = next(row for row in rows if row["split"] == "test")
    same = {key: like[key] for key in ("context", "chosen", "rejected")}
    assert [row["split"] for row in rows[:2]] == ["train", "val"]
    for number, pairs in ((0, 1), (1, 0)):
        some = [{**row, **same} if i == number else row for i, row in enumerate(rows)]
        assert prepare(tmp_path / str(number), some)[0]["overlap"]["pair"] == pairs


def test_without_a_name_a_dialogue_is_its_first_prompt(rows, tmp_path):
    for row in rows:
        del row["conversation_id"]
    more = [{"role": "model", "content": "so"}, {"role": "user", "content": "and then?"}]
    rows[3]["context"] = [*rows[0]["context"], *more]
    _, table = prepare(tmp_path, rows)
    mine = table[(table.user_id == "user0") & (table.split == "train")]
    (twice,) = mine.dialog_id[mine.dialog_id.duplicated()]
    assert sorted(mine.turn[mine.dialog_id == twice]) == [0, 1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"split": "extra"}, "rows whose split is extra"),
        ({"chosen": {"role": "model", "content": ""}}, "chosen responses empty"),
        ({"rejected": ""}, "rejected responses empty"),
        ({"context": []}, NOT_THE_USER),
        ({"context": [MODEL_SAYS]}, NOT_THE_USER),
        ({"context": [{"role": "user", "content": ""}]}, NOT_THE_USER),
        ({"chosen": "hello", "rejected": MODEL_SAYS}, "rejected responses equal to the chosen one"),
    ],
)
def test_rows_that_compare_nothing_are_left_out_and_counted(rows, tmp_path, change, reason):
    rows[0] |= change
    counts = prepare(tmp_path, rows)[0]["counts"]
    assert counts[f"left out: {reason}"] == 1 and counts["comparisons"] == 59


def test_a_response_may_be_plain_text(rows, tmp_path):
    rows[0]["chosen"] = "plainly"
    talks = prepare(tmp_path, rows)[1].chosen.map(lambda messages: messages[-1])
    assert {"role": "assistant", "content": "plainly"} in talks.tolist()


def test_users_without_training_or_test_comparisons_are_left_out(rows, tmp_path):
    without = {("user0", "train"), ("user1", "test"), ("user2", "val")}
    some = [row for row in rows if (row["user_id"], row["split"]) not in without]
    info, table = prepare(tmp_path, some)
    assert info["counts"]["users with comparisons"] == 6
    assert info["counts"]["users with comparisons for training and for test"] == 4
    assert set(table.user_id) == {"user2", "user3", "user4", "user5"}
