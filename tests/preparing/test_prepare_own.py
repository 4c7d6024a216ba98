"""choices.py and OwnData/prepare.py: anybody's rows, in any format, and what is wrong with them."""

from __future__ import annotations

import csv
import json
import math
import random
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

import running
import worlds
from lore.common.files import InputError
from lore.preparing import own_rows as choices
from lore.preparing.own_rows import Columns


def prepare(source: Path | str, out: Path, **settings) -> dict:
    """Run the script's main without embedding; what prepare.json says."""
    return worlds.prepare("OwnData", source, out, **{"embed": False, **settings})


def own_rows(users: int = 6, count: int = 12, dialogues: bool = False) -> list[dict[str, Any]]:
    """Choices of users, half of whom like long responses; pairs recur among users."""
    rng, rows = random.Random(0), []
    for i in range(users * count):
        number, user = divmod(i, users)
        pair = sorted([f"answer {number}", f"a longer answer {number}"], key=len)
        chosen, rejected = pair if rng.random() < (0.2 if user % 2 else 0.8) else pair[::-1]
        row = {"user": f"u{user}", "prompt": f"prompt {number % 5}"}
        row |= {"chosen": chosen, "rejected": rejected}
        rows.append(row | ({"dialog": f"d{number // 2}"} if dialogues else {}))
    return rows


def own(folder: Path, rows: list[dict[str, Any]] | None = None, name: str = "mine.jsonl") -> Path:
    """A file of rows."""
    worlds.write(folder / name, own_rows() if rows is None else rows)
    return folder / name


def talk(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


# ------------------------------------------------------------------------- The good way


def test_every_row_is_a_comparison(tmp_path):
    rows = own_rows()
    info = prepare(own(tmp_path), tmp_path / "data")
    table = worlds.comparisons(tmp_path / "data")
    expected = sorted(
        (r["user"], *(json.dumps(talk(r["prompt"], r[x])) for x in ("chosen", "rejected")))
        for r in rows
    )
    assert worlds.as_tuples(table, ["user_id"]) == expected
    assert (table.weight == 1).all() and (table.turn == 0).all()
    assert info["dataset"] == "OwnData" and info["counts"]["comparisons"] == len(rows) == 72
    assert info["counts"]["seen users"] == info["counts"]["unseen users"] == 3


def test_without_dialogues_a_pair_is_on_one_side_whoever_chose(tmp_path):
    prepare(own(tmp_path), tmp_path / "data")
    table = pd.read_parquet(tmp_path / "data" / "comparisons.parquet")
    pair = table[["chosen", "rejected"]].apply(lambda row: tuple(sorted(row)), axis=1)
    assert pair.nunique() == 12 and (table.groupby(pair).split.nunique() == 1).all()
    assert (table.groupby(pair).size() == 6).all()  # so the sides could have differed
    assert table.groupby("split").size().to_dict() == {"test": 36, "train": 36}
    assert json.loads((tmp_path / "data" / "prepare.json").read_text())["overlap"]["pair"] == 0


def test_with_dialogues_each_is_on_one_side(tmp_path):
    prepare(own(tmp_path, own_rows(dialogues=True)), tmp_path / "data")
    table = pd.read_parquet(tmp_path / "data" / "comparisons.parquet")
    dialogues = table.groupby(["user_id", "dialog_id"])
    assert (dialogues.split.nunique() == 1).all() and (dialogues.size() == 2).all()
    halves = table.groupby(["user_id", "split"]).dialog_id.nunique().unstack()
    assert (halves == 3).all().all()


def test_a_given_split_is_kept(tmp_path):
    rows = own_rows()
    for i, row in enumerate(rows):
        row["split"] = ("train", "test", "val")[i // 6 % 3]
    info = prepare(own(tmp_path, rows), tmp_path / "data")
    table = worlds.comparisons(tmp_path / "data")
    found = {(row.chosen[-1]["content"].split()[-1], row.split) for row in table.itertuples()}
    kept = [(str(i), ("train", "test")[i % 3]) for i in range(12) if i % 3 < 2]
    assert found == set(kept)
    assert info["counts"]["left out: rows whose split is val"] == 24


def test_the_order_of_the_rows_does_not_matter(tmp_path):
    rows = own_rows(dialogues=True)
    first = prepare(own(tmp_path / "a", rows), tmp_path / "a" / "data")
    random.Random(1).shuffle(rows)
    second = prepare(own(tmp_path / "b", rows), tmp_path / "b" / "data")
    assert {**first, "settings": None} == {**second, "settings": None}


def test_formats_are_alike(tmp_path):
    rows = own_rows(dialogues=True)
    for row in rows:
        row["weight"] = 2.0
        row["messages"] = [
            {"role": "system", "content": "be, brief"},
            *talk(row.pop("prompt"), "x"),
        ]
        row["messages"].append({"role": "user", "content": 'go "on"\nplease'})
    hashes = set()
    for ending in ("jsonl", "jsonl.gz", "parquet"):
        source = own(tmp_path / ending, rows, f"mine.{ending}")
        hashes.add(prepare(source, tmp_path / ending / "data")["data_sha256"])
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows({**row, "messages": json.dumps(row["messages"])} for row in rows)
    hashes.add(prepare(tmp_path / "mine.csv", tmp_path / "data")["data_sha256"])
    for i in range(2):
        own(tmp_path / "folder", rows[i::2], f"part{i}.{('jsonl', 'parquet')[i]}")
    hashes.add(prepare(tmp_path / "folder", tmp_path / "folder-data")["data_sha256"])
    assert len(hashes) == 1
    roles = [m["role"] for m in worlds.comparisons(tmp_path / "data").chosen.iloc[0]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


def test_a_hub_dataset_with_several_splits_has_them(tmp_path, monkeypatch):
    rows = own_rows()
    sides = {"train": rows[:36], "test": rows[36:]}
    made = {name: datasets.Dataset.from_list(side) for name, side in sides.items()}
    monkeypatch.setattr("datasets.load_dataset", lambda path: datasets.DatasetDict(made))
    info = prepare("somebody/something", tmp_path)
    assert info["counts"]["training comparisons"] == info["counts"]["test comparisons"] == 36
    assert info["overlap"]["pair"] == 0
    del made["test"]
    assert prepare("somebody/something", tmp_path)["counts"]["comparisons"] == 36


def test_columns_have_the_names_that_flags_give(tmp_path):
    names = {"user": "worker_id", "prompt": "post", "chosen": "better", "rejected": "worse"}
    rows = [{names[name]: cell for name, cell in row.items()} for row in own_rows()]
    rows = [{**row, "worker_id": int(row["worker_id"][1:])} for row in rows]
    source = own(tmp_path, rows)
    outcome = running.invoke(
        "OwnData/prepare.py", {"source": source, "out": tmp_path / "a", "embed": "false", **names}
    )
    assert outcome.status == 0, outcome.err
    assert "       72  comparisons" in outcome.out.splitlines()
    table = worlds.comparisons(tmp_path / "a")
    assert set(table.user_id) == set("012345")
    info = prepare(own(tmp_path / "usual"), tmp_path / "b")
    assert info["counts"]["distinct conversations"] == len(
        {*map(str, table.chosen), *map(str, table.rejected)}
    )


def test_lists_of_responses_share_the_weight_of_their_row(tmp_path):
    rows = own_rows()
    rows[0] |= {"chosen": ["a", "b"], "rejected": ["c", "d", "a"], "weight": 10}
    info = prepare(own(tmp_path, rows), tmp_path / "data")
    table = worlds.comparisons(tmp_path / "data")
    some = table[table.chosen.map(lambda messages: messages[-1]["content"] in "ab")]
    said = [
        tuple(talks[-1]["content"] for talks in row)
        for row in some[["chosen", "rejected"]].to_numpy()
    ]
    assert sorted(said) == [("a", "c"), ("a", "d"), ("b", "a"), ("b", "c"), ("b", "d")]
    assert (some.weight == 2).all() and some.split.nunique() == 1  # they share responses
    assert info["counts"]["left out: rejected responses equal to the chosen one"] == 1


def test_rows_with_a_pair_in_common_are_on_one_side(tmp_path):
    """A and B share a pair, B and C another: all that the three compare is on one side."""
    rows = own_rows()
    chain = [("a", ["b", "c"]), ("b", ["a", "d"]), ("d", ["b", "e"])]
    rows += [
        {"user": "u0", "prompt": "p", "chosen": chosen, "rejected": rejected}
        for chosen, rejected in chain
    ]
    for seed in range(4):
        prepare(own(tmp_path, rows), tmp_path / "data", seed=seed)
        table = worlds.comparisons(tmp_path / "data")
        some = table[table.chosen.map(lambda messages: messages[0]["content"] == "p")]
        assert len(some) == 6 and some.split.nunique() == 1


def test_turns_follow_the_time_and_then_the_length(tmp_path):
    rows = own_rows(dialogues=True)
    times = {"u0": (20, 3), "u1": ("2024-05-01T10:00:00+02:00", "2024-05-01 09:00")}
    for i, row in enumerate(rows):
        if row["user"] in times:
            row["timestamp"] = times[row["user"]][i // 6 % 2]
        elif i // 6 % 2:
            row["messages"] = [*talk(row.pop("prompt"), "x"), {"role": "user", "content": "y"}]
    prepare(own(tmp_path, rows), tmp_path / "data")
    table = worlds.comparisons(tmp_path / "data")
    number = table.chosen.map(lambda messages: int(messages[-1]["content"].split()[-1]))
    later_first = (table.user_id == "u0").astype(int)  # u1's times are 8:00 and 9:00 UTC
    assert (table.turn == (number + later_first) % 2).all()


def test_times_are_numbers_or_dates():
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    values = [1714557600, "1714557600", "2024-05-01T10:00:00", "2024-05-01T12:00:00+02:00"]
    values.append(datetime(2024, 5, 1, 10))
    rows = [("row", {**row, "timestamp": value}) for value in values]
    assert {choice.time for choice in choices.read_choices(rows)} == {1714557600.0}


def test_users_of_one_side_or_with_few_comparisons_are_left_out(tmp_path):
    rows = own_rows()
    rows += [{"user": "new", "prompt": "p", "chosen": "a", "rejected": "b"}]
    rows += [{"user": "twice", "prompt": "p", "chosen": "a", "rejected": "b"}] * 2
    counts = prepare(own(tmp_path, rows), tmp_path / "data")["counts"]
    assert counts["users with comparisons"] == 8
    assert counts["users with at least 2 comparisons"] == 7
    assert counts["users with comparisons for training and for test"] == 6  # one pair, one side


def test_what_has_no_text_is_counted(tmp_path):
    rows = own_rows()
    rows[0]["prompt"] = " "
    rows[1] |= {"chosen": ["", "good"], "rejected": ["", "bad"]}
    rows[2]["messages"] = [{"role": "user", "content": None}]
    del rows[2]["prompt"]
    rows[3]["chosen"] = rows[3]["rejected"]
    counts = prepare(own(tmp_path, rows), tmp_path / "data")["counts"]
    assert counts["left out: rows with an empty prompt or message"] == 2
    assert counts["left out: chosen responses empty"] == 1
    assert counts["left out: rejected responses empty"] == 1
    assert counts["left out: rejected responses equal to the chosen one"] == 1
    assert counts["comparisons"] == 72 - 3 and counts["rows"] == 72


# ------------------------------------------------------------------------ Further features


def extras(folder: Path, name: str) -> list[tuple[str, float, float]]:
    """The chosen response, and the numbers beside it and beside the rejected one."""
    table = worlds.comparisons(folder)
    said = table.chosen.map(lambda messages: messages[-1]["content"])
    sides = (table[f"extra {side} {name}"] for side in ("chosen", "rejected"))
    return sorted(zip(said, *sides, strict=True))


def test_numbers_beside_the_responses_are_kept_and_missing_ones_counted(tmp_path):
    rows = own_rows()
    for row in rows:
        row |= {f"{side}_length": len(row[side]) for side in ("chosen", "rejected")}
    rows[0] |= {"chosen_length": None, "rejected_length": ""}
    info = prepare(own(tmp_path, rows), tmp_path / "data", extra=("length",))
    found = extras(tmp_path / "data", "length")
    assert len(found) == 72 and sum(math.isnan(row[1]) for row in found) == 1
    assert all(length == len(said) for said, length, _ in found if not math.isnan(length))
    assert info["counts"]["responses without length"] == 2
    assert info["settings"]["extra"] == ["length"]
    plain = prepare(own(tmp_path, rows), tmp_path / "plain")
    assert plain["data_sha256"] != info["data_sha256"]  # by which runs are told apart


def test_numbers_go_with_their_responses_in_every_layout(tmp_path):
    two = {"user": "ann", "prompt": "p", "safe": 1}
    votes = [
        {**two, "response_a": f"a{i}", "response_b": f"b{i}", "winner": "ab"[i % 2],
         "response_a_safe": i, "response_b_safe": "0.5"}
        for i in range(4)
    ]  # fmt: skip
    prepare(own(tmp_path, votes), tmp_path / "a", extra=("safe",), split="pairs")
    expected = [("a0", 0, 0.5), ("a2", 2, 0.5), ("b1", 0.5, 1), ("b3", 0.5, 3)]
    assert extras(tmp_path / "a", "safe") == expected
    ratings = [
        {"user": "ann", "prompt": f"p{i // 2}", "response": f"r{i}", "score": i, "response_safe": i}
        for i in range(8)
    ]
    prepare(own(tmp_path, ratings), tmp_path / "b", extra=("safe",), split="pairs")
    assert extras(tmp_path / "b", "safe") == [(f"r{i}", i, i - 1) for i in (1, 3, 5, 7)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "row 3 has no column chosen_length, which --extra length reads"),
        ({"chosen_length": "long", "rejected_length": 1}, "row 3: chosen_length must be a number"),
        ({"chosen_length": [1], "rejected_length": 1}, "row 3: chosen_length must be a number"),
        ({"chosen": ["a", "b"]}, "row 3: --extra needs one response on either side"),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_row(tmp_path, change, message):
    rows = [{**row, "chosen_length": 1, "rejected_length": 2} for row in own_rows()]
    rows[2] = {**own_rows()[2], **change}
    with pytest.raises(InputError, match=message):
        prepare(own(tmp_path, rows), tmp_path / "data", extra=("length",))


# ----------------------------------------------------------------------------- Bad input

MESSAGE = {"role": "user", "content": "p"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": None}, "row 3 has no user; name the user, or the column by --user"),
        ({"user": ["a"]}, "row 3: user must be text, not a list"),
        ({"user": "\ud800"}, "row 3: user holds half a surrogate pair"),
        ({"prompt": 5}, "row 3: prompt must be text, not a int"),
        ({"messages": [MESSAGE]}, "row 3 has both prompt and messages; leave one out"),
        ({"prompt": None, "messages": {"a": 1}}, "row 3: messages must be a list of role and"),
        ({"prompt": None, "messages": "[]"}, "row 3: messages must be a list of role and"),
        ({"prompt": None, "messages": ["hello"]}, "row 3: a message must have role and content"),
        ({"prompt": None, "messages": [{"role": "user"}]}, "row 3: a message must have role and"),
        (
            {"prompt": None, "messages": [{"role": "user", "content": ["p"]}]},
            "row 3: content must be text, not a list",
        ),
        ({"prompt": None, "messages": [{**MESSAGE, "role": ""}]}, "row 3 has an empty role"),
        ({"chosen": []}, "row 3: chosen is an empty list; give a response or remove the row"),
        ({"rejected": {"a": 1}}, "row 3: rejected must be text, not a dict"),
        ({"rejected": ["a", 5]}, "row 3: each rejected must be text, not a int"),
        ({"chosen": 5}, "row 3: chosen must be text, not a int"),
        ({"chosen": True}, "row 3: chosen must be text, not a bool"),
        ({"chosen": [[]]}, "row 3: each chosen must be text, not a list"),
        ({"chosen": [None, {"a": 1}]}, "row 3: each chosen must be text, not a dict"),
        ({"rejected": [[MESSAGE]]}, "row 3: each rejected must end with a message of the assis"),
        ({"prompt": MESSAGE}, "row 3: prompt must be text, not a dict"),
        ({"prompt": [1, 2]}, "row 3: a message must have role and content, unlike 1"),
        ({"user": {"name": "ann"}}, "row 3: user must be text, not a dict"),
        ({"user": 1.5}, "row 3: user must be text, not a float"),
        ({"split": ["train"]}, "row 3: split must be text, not a list"),
        ({"weight": {"a": 1}}, "row 3: weight must be a number, not {'a': 1}"),
        ({"chosen": "\udc00"}, "row 3: chosen holds half a surrogate pair"),
        ({"weight": -1}, "row 3: weight must be above 0"),
        ({"weight": 1e30}, "row 3: weight must be .*from 1e-06 to 1e\\+06"),
        ({"weight": 1e-12}, "row 3: weight must be .*from 1e-06 to 1e\\+06"),
        ({"weight": float("nan")}, "row 3: weight must be a number, not nan"),
        ({"weight": "much"}, "row 3: weight must be a number, not 'much'"),
        ({"timestamp": "yesterday"}, "row 3: timestamp must be a number or an ISO date, not 'yest"),
        ({"timestamp": [1]}, r"row 3: timestamp must be a number, not \[1\]"),
        ({"dialog": "d"}, "row 1 has no dialog, but .*row 3 has; fill it in everywhere or leave"),
        ({"split": "train"}, "row 1 has no split, but .*row 3 has; fill it in everywhere or leave"),
    ],
)
def test_a_bad_row_is_refused_by_place(tmp_path, change, message):
    rows = own_rows()
    rows[2] |= change
    with pytest.raises(InputError, match=message) as error:
        prepare(own(tmp_path, rows), tmp_path / "data")
    assert str(tmp_path / "mine.jsonl") in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_a_missing_column_is_named_with_its_flag(tmp_path, column):
    rows = [{k: v for k, v in row.items() if k != column} for row in own_rows()]
    message = f"row 1 has no column {column}, only user, .*; --{column} says which one holds it"
    with pytest.raises(InputError, match=message):
        prepare(own(tmp_path, rows), tmp_path / "data")


def test_a_column_that_a_flag_names_must_be_there(tmp_path):
    with pytest.raises(InputError, match="row 1 has no column worker, .*; --user says which"):
        prepare(own(tmp_path), tmp_path / "data", columns=Columns(user="worker"))


def test_a_prompt_or_messages_must_be_there(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "prompt"} for row in own_rows()]
    with pytest.raises(InputError, match="row 1 has neither prompt nor messages"):
        prepare(own(tmp_path, rows), tmp_path / "data")


def test_a_source_that_is_not_there_is_named(tmp_path):
    for source, message in {
        tmp_path / "none.jsonl": "none.jsonl: there is no such file",
        tmp_path: "has no file that ends in .jsonl, .ndjson, .json, .csv, .tsv, .parquet",
        "": "--source is empty; name a file, a folder or a hub dataset",
    }.items():
        with pytest.raises(InputError, match=message):
            prepare(source, tmp_path / "data")


def test_one_user_or_one_comparison_is_prepared_or_refused_in_one_line(tmp_path):
    row = {"user": "ann", "prompt": "p", "chosen": "a", "rejected": "b"}
    for least, what in {2: "0 users with at least 2 comp", 1: "0 users with comparisons"}.items():
        with pytest.raises(InputError, match=f"^no comparisons are left: 1 rows; .*{what}[^\n]*$"):
            prepare(own(tmp_path, [row]), tmp_path / "data", min_comparisons=least)
    counts = prepare(own(tmp_path, [row, {**row, "chosen": "c"}]), tmp_path / "data")["counts"]
    assert counts["training comparisons"] == counts["test comparisons"] == 1
    assert counts["users with comparisons"] == 1


def test_a_folder_where_nothing_can_be_written_is_one_line(tmp_path):
    if not Path("/proc/self").exists():
        pytest.skip("there is no folder here that takes no files from anybody")
    with pytest.raises(InputError, match="^/proc/none[^\n]*cannot be written[^\n]*$"):
        prepare(own(tmp_path), Path("/proc/none/data"))


def test_one_side_alone_leaves_nothing(tmp_path):
    rows = [{**row, "split": "train"} for row in own_rows()]
    with pytest.raises(InputError, match="no comparisons are left: 72 rows; .*0 users with compar"):
        prepare(own(tmp_path, rows), tmp_path / "data")
