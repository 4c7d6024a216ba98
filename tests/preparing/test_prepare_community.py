"""CommunityAlignment/prepare.py: language, turns and their weights, unseen prompts, who is kept."""

import json
from pathlib import Path

import pandas as pd
import pytest

import worlds
from lore.common.files import InputError


def prepare(source: Path, out: Path, **settings) -> tuple[dict, pd.DataFrame]:
    """What prepare.json says, and the comparisons with the conversations."""
    settings = {"embed": False, "min_comparisons": 20, **settings}
    info = worlds.prepare("CommunityAlignment", source, out, **settings)
    return info["counts"], worlds.comparisons(out)


@pytest.fixture
def source(tmp_path) -> Path:
    return worlds.community(tmp_path / "raw")


def expected(source: Path, language: str = "en") -> list[tuple]:
    """(annotator, conversation, turn, chosen, rejected) by a plain loop; as JSON, sorted."""
    found = []
    for row in worlds.read(source / "train.parquet"):
        history: list[dict[str, str]] = []
        for number, turn in enumerate(worlds.TURNS):
            prompt = row[f"{turn}_turn_prompt"]
            if prompt == "EMPTY STRING" or row["assigned_lang"] != language:
                break
            history.append({"role": "user", "content": prompt})
            answers = {f"response_{x}": row[f"{turn}_turn_response_{x}"] for x in "abcd"}
            ends = {k: [*history, {"role": "assistant", "content": v}] for k, v in answers.items()}
            history = ends.pop(row[f"{turn}_turn_preferred_response"])
            key = (row["annotator_id"], row["conversation_id"], number, json.dumps(history))
            found += [(*key, json.dumps(end)) for end in ends.values()]
    return sorted(found)


@pytest.mark.parametrize("language", ["en", "fr"])
def test_three_comparisons_a_turn_of_one_language(tmp_path, language):
    source = worlds.community(tmp_path / "raw", languages=("en", "fr", "hi"))
    counts, table = prepare(source, tmp_path / "data", language=language)
    found = worlds.as_tuples(table, ["user_id", "dialog_id", "turn"])
    assert found == expected(source, language)
    assert counts[f"conversations in {language}"] == 78 and counts["conversations"] == 3 * 78
    assert max(len(messages) for messages in table.chosen) == 8  # four turns


def test_a_turn_weighs_one(source, tmp_path):
    def lose(rows):
        won = rows[0]["first_turn_preferred_response"]
        lost = next(x for x in "abcd" if won != f"response_{x}")
        rows[0][f"first_turn_response_{lost}"] = "EMPTY STRING"

    worlds.edit(source / "train.parquet", lose)
    counts, table = prepare(source, tmp_path / "data")
    turns = table.groupby(["dialog_id", "turn"]).weight
    assert turns.sum().round(9).eq(1).all()
    assert turns.size()["conv0", 0] == 2
    assert counts["left out: rejected responses empty"] == 1


def test_shared_prompts_are_counted_and_may_be_kept_apart(source, tmp_path):
    for name, unseen_prompts in {"a": False, "b": True}.items():
        counts, table = prepare(source, tmp_path / name, unseen_prompts=unseen_prompts)
        prompts = table.chosen.map(lambda messages: messages[0]["content"])
        train, test = (set(prompts[table.split == side]) for side in ("train", "test"))
        assert counts["first prompts on both sides"] == len(train & test)
        assert bool(train & test) != unseen_prompts
        assert (table.groupby("dialog_id").split.nunique() == 1).all()
        assert (table.groupby("user_id").split.nunique() == 2).all()
    assert abs(len(train) - len(test)) <= 1


def test_annotators_with_few_comparisons_or_one_conversation_are_left_out(source, tmp_path):
    sizes = pd.Series([row[0] for row in expected(source)]).value_counts()
    enough = int(sizes.iloc[2])
    counts, table = prepare(source, tmp_path / "a", min_comparisons=enough)
    kept = set(sizes[sizes >= enough].index)
    assert counts[f"annotators with at least {enough} comparisons"] == len(kept) < len(sizes)
    assert set(table.user_id) == kept

    def one_conversation(rows):
        rows[1:] = [row for row in rows[1:] if row["annotator_id"] != "en0"]

    worlds.edit(source / "train.parquet", one_conversation)
    counts, _ = prepare(source, tmp_path / "b", min_comparisons=1)
    assert counts["annotators with at least 1 comparisons"] == 6
    assert counts["users with dialogues for training and for test"] == 5


def cells(row, turn, value):
    return {name: value for name in row if name.startswith(f"{turn}_turn")}


def gap(row):
    third = {name.replace("first", "third"): row[name] for name in cells(row, "first", "")}
    return {**third, **cells(row, "second", "EMPTY STRING")}


def no_first_turn(row):
    return {**cells(row, "first", "EMPTY STRING"), "second_turn_prompt": "is there a first?"}


def nothing_said(row):
    return {f"first_turn_{row['first_turn_preferred_response']}": "EMPTY STRING"}


@pytest.mark.parametrize(
    ("change", "reason", "turns"),
    [
        (gap, "at a missing turn", {0}),
        (no_first_turn, "at a missing turn", set()),
        (nothing_said, "at an empty chosen response", set()),
        *((lambda row, value=value: {"first_turn_preferred_response": value},
           "at a preferred_response that names no response", set())
          for value in (None, "response_e")),
    ],
)  # fmt: skip
def test_a_conversation_ends_where_it_cannot_be_used(source, tmp_path, change, reason, turns):
    worlds.edit(source / "train.parquet", lambda rows: rows[0].update(change(rows[0])))
    counts, table = prepare(source, tmp_path / "data")
    assert counts[f"left out: dialogues cut {reason}"] == 1
    assert set(table[table.dialog_id == "conv0"].turn) == turns


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"language": "xx"}, "--language xx is none of those there: en, fr"),
        ({"min_comparisons": 1000}, "no comparisons are left: .* 0 annotators with at least"),
        ({"seen_fraction": 0.0}, "--seen-fraction 0.0 of 6 users makes 0 of them seen"),
    ],
)
def test_settings_that_leave_nothing_are_refused(source, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        prepare(source, tmp_path / "data", **settings)
    assert not (tmp_path / "data").exists()
