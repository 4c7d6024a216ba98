"""OwnData/prepare.py: anybody's rows in any format, what is held out, what is beside a response."""

import json
import math
import random
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import running
import worlds
from lore.common.files import InputError
from lore.preparing.own_rows import Columns, read_choices
from lore.preparing.tables import read_info
from worlds import own_rows

Rows = list[dict[str, Any]]
SIDES = ["chosen", "rejected"]
ONE = {"user": "new", "prompt": "p", "chosen": "a", "rejected": "b"}


def own(folder: Path, rows: Rows | None = None, name: str = "mine.jsonl") -> Path:
    worlds.write(folder / name, own_rows() if rows is None else rows)
    return folder / name


def prepare(source: Path | str, out: Path, **settings: Any) -> dict[str, Any]:
    """Run the script's main without embedding; what prepare.json says."""
    return worlds.prepare("OwnData", source, out, embed=False, **settings)


def prepared(folder: Path, rows: Rows | None = None, **settings: Any) -> tuple[dict, pd.DataFrame]:
    """What prepare.json says of these rows, and their comparisons with the conversations."""
    info = prepare(own(folder, rows), folder / "data", **settings)
    return info, worlds.comparisons(folder / "data")


def with_dialogues() -> Rows:
    return [{**row, "dialog": f"d{i // 12}"} for i, row in enumerate(own_rows())]


def talk(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def last(talks: pd.Series) -> pd.Series:
    """The responses of conversations."""
    return talks.map(lambda messages: messages[-1]["content"])


def test_every_row_is_a_comparison_by_whichever_names_of_columns(tmp_path):
    """By the command, which flags tell what the columns are called; users' names are numbers."""
    names = {"user": "worker_id", "prompt": "post", "chosen": "better", "rejected": "worse"}
    rows = [{**row, "user": int(row["user"][1:])} for row in own_rows()]
    source = own(tmp_path, [{names[name]: row[name] for name in row} for row in rows])
    flags = {"source": source, "out": tmp_path / "data", "embed": "false", **names}
    outcome = running.invoke("OwnData/prepare.py", flags)
    assert outcome.status == 0, outcome.err
    assert "       72  comparisons" in outcome.out.splitlines()
    info, table = read_info(tmp_path / "data"), worlds.comparisons(tmp_path / "data")
    assert worlds.as_tuples(table, ["user_id"]) == sorted(
        (str(r["user"]), *(json.dumps(talk(r["prompt"], r[side])) for side in SIDES)) for r in rows
    )
    assert (table.weight == 1).all() and (table.turn == 0).all()
    assert info["dataset"] == "OwnData" and info["counts"]["comparisons"] == len(rows) == 72
    assert info["counts"]["seen users"] == info["counts"]["unseen users"] == 3
    # without dialogues a pair is on one side whoever chose
    pair = table[SIDES].apply(lambda row: str(sorted(map(str, row))), axis=1)
    assert pair.nunique() == 12 and (table.groupby(pair).split.nunique() == 1).all()
    assert (table.groupby(pair).size() == 6).all()  # so the sides could have differed
    assert table.groupby("split").size().to_dict() == {"test": 36, "train": 36}
    assert info["overlap"]["pair"] == 0


def test_a_given_split_is_kept(tmp_path):
    sides = ("train", "test", "val")
    rows = [{**row, "split": sides[i // 6 % 3]} for i, row in enumerate(own_rows())]
    info, table = prepared(tmp_path, rows)
    found = {*zip(last(table.chosen).map(lambda said: said.split()[-1]), table.split, strict=True)}
    assert found == {(str(i), sides[i % 3]) for i in range(12) if i % 3 < 2}
    assert info["counts"]["left out: rows whose split is val"] == 24


def test_neither_the_order_of_the_rows_nor_the_format_matters(tmp_path):
    rows = with_dialogues()
    for row in rows:
        system = {"role": "system", "content": "be, brief"}
        asked = {"role": "user", "content": 'go "on"\nplease'}
        row |= {"weight": 2.0, "messages": [system, *talk(row.pop("prompt"), "x"), asked]}
    first = own(tmp_path, rows)
    random.Random(1).shuffle(rows)
    for i, name in enumerate(("one.jsonl.gz", "two.parquet")):
        folder = own(tmp_path / "folder", rows[i::3], name).parent
    table = pd.DataFrame([{**row, "messages": json.dumps(row["messages"])} for row in rows[2::3]])
    table.to_csv(folder / "three.csv", index=False)
    found = [prepare(source, tmp_path / str(i)) for i, source in enumerate((first, folder))]
    assert {**found[0], "settings": None} == {**found[1], "settings": None}
    table = worlds.comparisons(tmp_path / "0")
    roles = [message["role"] for message in table.chosen.iloc[0]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    sizes = table.groupby(["user_id", "split", "dialog_id"]).size()  # each is on one side
    assert (sizes == 2).all() and (sizes.groupby(["user_id", "split"]).size() == 3).all()


def test_a_hub_dataset_with_several_splits_has_them(tmp_path, monkeypatch):
    splits = {"train": own_rows()[:24], "test": own_rows()[24:]}
    monkeypatch.setattr("datasets.load_dataset", lambda path: splits)
    counts = prepare("somebody/something", tmp_path)["counts"]
    assert (counts["training comparisons"], counts["test comparisons"]) == (24, 48)


def test_lists_of_responses_share_the_weight_of_their_row(tmp_path):
    rows = own_rows()
    rows[0] |= {"chosen": ["a", "b"], "rejected": ["c", "d", "a"], "weight": 10}
    info, table = prepared(tmp_path, rows)
    some = table[last(table.chosen).isin(["a", "b"])]
    said = sorted(last(some.chosen) + last(some.rejected))
    assert said == ["ac", "ad", "ba", "bc", "bd"]
    assert (some.weight == 2).all() and some.split.nunique() == 1  # they share responses
    assert info["counts"]["left out: rejected responses equal to the chosen one"] == 1


def test_rows_with_a_pair_in_common_are_on_one_side(tmp_path):
    """A and B share a pair, B and C another: all that the three compare is on one side."""
    links = [("a", ["b", "c"]), ("b", ["a", "d"]), ("d", ["b", "e"])]
    rows = own_rows() + [{**ONE, "user": "u0", "chosen": a, "rejected": b} for a, b in links]
    for seed in range(2):
        _, table = prepared(tmp_path, rows, seed=seed)
        some = table[table.chosen.map(lambda messages: messages[0]["content"] == "p")]
        assert len(some) == 6 and some.split.nunique() == 1


def test_turns_follow_the_time_and_then_the_length(tmp_path):
    rows = with_dialogues()
    times = {"u0": (20, 3), "u1": ("2024-05-01T10:00:00+02:00", "2024-05-01 09:00")}
    for i, row in enumerate(rows):
        if row["user"] in times:
            row["timestamp"] = times[row["user"]][i // 6 % 2]
        elif i // 6 % 2:
            row["messages"] = [*talk(row.pop("prompt"), "x"), {"role": "user", "content": "y"}]
    _, table = prepared(tmp_path, rows)
    number = last(table.chosen).map(lambda answer: int(answer.split()[-1]))
    later_first = (table.user_id == "u0").astype(int)  # u1's times are 8:00 and 9:00 UTC
    assert (table.turn == (number + later_first) % 2).all()


def test_times_are_numbers_or_dates():
    values = [1714557600, "1714557600", "2024-05-01T10:00:00", "2024-05-01T12:00:00+02:00"]
    values.append(datetime(2024, 5, 1, 10))
    rows = [("row", {**ONE, "timestamp": value}) for value in values]
    assert {choice.time for choice in read_choices(rows)} == {1714557600.0}


def test_users_of_one_side_or_with_few_comparisons_are_left_out(tmp_path):
    rows = [*own_rows(), ONE, *[{**ONE, "user": "twice"}] * 2]
    counts = prepared(tmp_path, rows)[0]["counts"]
    users = {"with comparisons": 8, "with at least 2 comparisons": 7,
             "with comparisons for training and for test": 6}  # one pair is on one side
    assert {what: counts[f"users {what}"] for what in users} == users


def test_what_has_no_text_is_counted(tmp_path):
    rows = own_rows()
    rows[0]["prompt"] = " "
    rows[1] |= {"chosen": ["", "good"], "rejected": ["", "bad"]}
    rows[2] |= {"prompt": None, "messages": [{"role": "user", "content": None}]}
    rows[3]["chosen"] = rows[3]["rejected"]
    counts = prepared(tmp_path, rows)[0]["counts"]
    assert {what: number for what, number in counts.items() if "left out" in what} == {
        "left out: chosen responses empty": 1, "left out: rejected responses empty": 1,
        "left out: rejected responses equal to the chosen one": 1,
        "left out: rows with an empty prompt or message": 2}  # fmt: skip
    assert counts["comparisons"] == 72 - 3 and counts["rows"] == 72


def beside(table: pd.DataFrame, name: str) -> list[tuple[str, float, float]]:
    """The chosen response, and the numbers beside it and beside the rejected one."""
    sides = (table[f"extra {side} {name}"] for side in SIDES)
    return sorted(zip(last(table.chosen), *sides, strict=True))


def test_numbers_beside_the_responses_are_kept_and_missing_ones_counted(tmp_path):
    rows = own_rows()
    for row in rows:
        row |= {f"{side}_length": len(row[side]) for side in SIDES}
    rows[0] |= {"chosen_length": None, "rejected_length": ""}
    info, table = prepared(tmp_path, rows, extra=("length",))
    found = beside(table, "length")
    assert len(found) == 72 and sum(math.isnan(row[1]) for row in found) == 1
    assert all(length == len(said) for said, length, _ in found if not math.isnan(length))
    assert info["counts"]["responses without length"] == 2
    assert info["settings"]["extra"] == ["length"]
    plain, _ = prepared(tmp_path / "plain", rows)
    assert plain["data_sha256"] != info["data_sha256"]  # by which runs are told apart


def test_numbers_go_with_their_responses_in_every_layout(tmp_path):
    votes = [{"user": "ann", "prompt": "p", "response_a": f"a{i}", "response_b": f"b{i}",
              "winner": "ab"[i % 2], "response_a_safe": i, "response_b_safe": "0.5"}
             for i in range(4)]  # fmt: skip
    _, table = prepared(tmp_path / "a", votes, extra=("safe",), split="pairs")
    assert beside(table, "safe") == [("a0", 0, 0.5), ("a2", 2, 0.5), ("b1", 0.5, 1), ("b3", 0.5, 3)]
    rated = [{"user": "ann", "prompt": f"p{i // 2}", "response": f"r{i}", "score": i,
              "response_safe": i} for i in range(8)]  # fmt: skip
    _, table = prepared(tmp_path / "b", rated, extra=("safe",), split="pairs")
    assert beside(table, "safe") == [(f"r{i}", i, i - 1) for i in (1, 3, 5, 7)]


def ratings(users: int = 12, items: int = 25, count: int = 60, prompts: int = 1) -> Rows:
    """Choices between two of some items after a prompt, ``count`` by each user."""
    rng, pairs = random.Random(0), list(combinations(range(items), 2))
    return [{"user": f"u{user}", "prompt": f"which of these, {i % prompts}?",
             **dict(zip(SIDES, (f"item {item}" for item in rng.sample(pair, 2)), strict=True))}
            for user in range(users)
            for i, pair in enumerate(rng.sample(pairs, count))]  # fmt: skip


def sides(table: pd.DataFrame) -> list[set[str]]:
    """The conversations of training and those held out."""
    parts = (table[table.split == side] for side in ("train", "test"))
    return [{*map(str, part.chosen), *map(str, part.rejected)} for part in parts]


def test_no_response_is_on_both_sides_where_responses_are_divided(tmp_path):
    info, table = prepared(tmp_path, ratings(6), split="responses", seed=1)
    train, test = sides(table)
    assert not train & test and (len(train), len(test)) == (15, 10)
    crossing = info["split"]["crossing"]
    why = "left out: comparisons of a held-out response with one of training"
    assert crossing == info["counts"][why] == 6 * 60 - len(table) > 0
    assert f"{crossing:,} comparisons" in info["split"]["sentence"]
    for group in ("seen", "unseen"):  # all are new
        assert info["kinds"][group]["known"] == info["kinds"][group]["met"] == 0
    again, _ = prepared(tmp_path / "again", ratings(6)[::-1], split="responses", seed=1)
    other, _ = prepared(tmp_path / "other", ratings(6), split="responses", seed=2)
    assert again["data_sha256"] == info["data_sha256"] != other["data_sha256"]


@pytest.mark.parametrize(("by", "rows"), [
    ("responses", ratings()),  # one prompt, few items, each of which many users judge
    ("pairs", ratings(count=10)),  # fewer than 100 comparisons would be held out
    ("pairs", ratings(6, items=15)),  # too few items to divide
    ("prompts", ratings(6, prompts=30)),
    ("dialogs", [{**row, "dialog": row["chosen"]} for row in ratings(6, prompts=30)]),
    ("given", [{**row, "dialog": "d", "split": "test" if i % 3 else "train"}
               for i, row in enumerate(ratings(6))]),
])  # fmt: skip
def test_the_default_is_the_hardest_that_leaves_enough(tmp_path, by, rows, capsys):
    info, _ = prepared(tmp_path, rows)
    assert info["split"]["by"] == by and f"--split {by}, the hardest" in info["split"]["sentence"]
    assert info["split"]["sentence"] in capsys.readouterr().out
    named, _ = prepared(tmp_path / "named", rows, split=by)
    assert named["data_sha256"] == info["data_sha256"]
    assert "hardest" not in named["split"]["sentence"]
    if by == "prompts":  # none is on both sides
        assert info["overlap"]["prompt"] == info["overlap"]["response"] == 0
        assert info["kinds"]["seen"]["new"] > 0 == info["kinds"]["seen"]["met"]


def test_a_split_that_is_asked_for_overrules_the_column(tmp_path):
    rows = [{**row, "split": "elsewhere" if i % 2 else "train"} for i, row in enumerate(ratings())]
    info, table = prepared(tmp_path, rows, split="pairs")
    assert len(table) == len(rows) and info["split"]["by"] == "pairs"


@pytest.mark.parametrize("by", ["dialogs", "prompts", "responses", "pairs"])
def test_a_pair_that_a_user_judged_twice_is_on_one_side(tmp_path, by):
    rows = [{**row, "dialog": f"d{i}"} for i, row in enumerate(ratings(6, prompts=30))]
    rows += [{**row, "dialog": f"again{i}", "chosen": row["rejected"], "rejected": row["chosen"]}
             for i, row in enumerate(rows[::3])]  # fmt: skip
    prepared(tmp_path, rows, split=by)
    table = pd.read_parquet(tmp_path / "data" / "comparisons.parquet")
    judged = table.groupby([table.user_id, table[SIDES].min(axis=1), table[SIDES].max(axis=1)])
    assert (judged.size() == 2).sum() > 20 and (judged.split.nunique() == 1).all()


def test_a_tie_that_counts_both_ways_is_not_judged_again(tmp_path):
    columns = Columns(first="chosen", second="rejected", winner="won", ties="half")
    rows = [{**row, "won": "tie" if i % 4 == 0 else "first"} for i, row in enumerate(ratings())]
    info, table = prepared(tmp_path, [*rows, rows[1], rows[2]], columns=columns, split="pairs")
    assert (table.weight == 0.5).sum() == 2 * len(rows) / 4
    assert info["retest"]["judged_again"] == 2 and info["retest"]["same"] == 1


def test_summaries_can_be_divided(tmp_path):
    source = worlds.tldr(tmp_path / "raw", workers=6, annotations=60)
    settings = {"min_annotations": 20, "embed": False, "split": "responses"}
    info = worlds.prepare("RedditTLDR", source, tmp_path / "new", **settings)
    train, test = sides(worlds.comparisons(tmp_path / "new"))
    assert train and test and not train & test
    assert info["kinds"]["seen"]["new"] == info["overlap"]["held_out"] > 0


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that takes no files")
def test_a_folder_where_nothing_can_be_written_is_one_line(tmp_path):
    with pytest.raises(InputError, match="^/proc/none[^\n]*cannot be written[^\n]*$"):
        prepare(own(tmp_path), Path("/proc/none/data"))
