"""PRISM/prepare.py and generate-prism-embeddings.py: dialogues, filters, splits, the list form."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import models
import worlds
from lore.common.files import InputError
from lore.embeddings import reward_model
from lore.preparing import tables as preparing

SLICE = worlds.ROOT.parent / "shared" / "data" / "prism_slice"


def prepare(source: Path, out: Path, **settings) -> dict:
    """Run the script's main; what prepare.json says."""
    return worlds.prepare("PRISM", source, out, **settings)


def expected(source: Path) -> set[tuple]:
    """(user, dialogue, turn, chosen, rejected) by a plain loop; conversations as JSON."""
    found = set()
    for row in worlds.read(source / "conversations.jsonl"):
        history: list[dict[str, str]] = []
        for turn in range(row["conversation_turns"]):
            said = [m for m in row["conversation_history"] if m["turn"] == turn]
            history.append({"role": "user", "content": said[0]["content"]})
            answers = {m["content"]: m["if_chosen"] for m in said[1:]}
            ends = {a: [*history, {"role": "assistant", "content": a}] for a in answers}
            (won,) = [answer for answer, chosen in answers.items() if chosen]
            for answer in answers.keys() - {won}:
                key = (row["user_id"], row["conversation_id"], turn)
                found.add((*key, json.dumps(ends[won]), json.dumps(ends[answer])))
            history = ends[won]
    return found


def as_set(table: pd.DataFrame) -> set[tuple]:
    return set(worlds.as_tuples(table, ["user_id", "dialog_id", "turn"]))


def test_one_comparison_per_rejected_response_after_the_chosen_history(tmp_path):
    source = worlds.prism(tmp_path / "raw")
    info = prepare(source, tmp_path / "data")
    table = worlds.comparisons(tmp_path / "data")
    assert as_set(table) == expected(source)
    assert len(table) == len(expected(source)) == info["counts"]["comparisons"]
    assert (table.weight == 1).all()
    assert max(len(messages) for messages in table.chosen) == 6  # three turns
    assert "warning" not in info


def test_conversations_are_distinct_and_all_used(tmp_path):
    prepare(worlds.prism(tmp_path / "raw"), tmp_path / "data")
    table = pd.read_parquet(tmp_path / "data" / "comparisons.parquet")
    messages = pd.read_parquet(tmp_path / "data" / "conversations.parquet").messages
    texts = [json.dumps([dict(m) for m in conversation]) for conversation in messages]
    assert len(set(texts)) == len(texts)
    assert set(table.chosen) | set(table.rejected) == set(range(len(texts)))


def test_splits_are_by_dialogue_and_by_user(tmp_path):
    info = prepare(worlds.prism(tmp_path / "raw"), tmp_path / "data", seen_fraction=0.75)
    table = pd.read_parquet(tmp_path / "data" / "comparisons.parquet")
    assert (table.groupby("dialog_id").split.nunique() == 1).all()
    assert (table.groupby("user_id").seen.nunique() == 1).all()
    dialogues = table.groupby(["user_id", "split"]).dialog_id.nunique().unstack()
    assert (dialogues.train - dialogues.test).isin([0, 1]).all()
    assert table[table.seen].user_id.nunique() == info["counts"]["seen users"] == 6


def test_users_with_few_dialogues_are_left_out(tmp_path):
    source = worlds.prism(tmp_path / "raw", users=8, dialogues=4)  # 4, 5, 6, 4, 5, 6, 4, 5
    info = prepare(source, tmp_path / "data", min_dialogues=5)
    table = pd.read_parquet(tmp_path / "data" / "comparisons.parquet")
    assert set(table.user_id) == {"user1", "user2", "user4", "user5", "user7"}
    assert info["counts"]["participants with at least 5 dialogues"] == 5


def test_another_seed_splits_otherwise_and_leaves_the_conversations(tmp_path):
    source = worlds.prism(tmp_path / "raw")
    infos = [prepare(source, tmp_path / str(seed), seed=seed) for seed in range(4)]
    assert len({info["conversations_sha256"] for info in infos}) == 1
    tables = [pd.read_parquet(tmp_path / str(seed) / "comparisons.parquet") for seed in range(4)]
    assert len({tuple(table[table.seen].user_id.unique()) for table in tables}) > 1
    assert len({tuple(table.split) for table in tables}) == 4


def test_first_prompts_on_both_sides_are_counted_and_printed(tmp_path, capsys):
    source = worlds.prism(tmp_path / "raw")
    assert prepare(source, tmp_path / "a")["counts"]["first prompts on both sides"] == 0
    table = pd.read_parquet(tmp_path / "a" / "comparisons.parquet")
    one, other = (table[table.split == side].dialog_id.iloc[0] for side in ("train", "test"))

    def share_prompt(rows):
        named = {row["conversation_id"]: row["conversation_history"] for row in rows}
        named[one][0]["content"] = named[other][0]["content"]

    worlds.edit(source / "conversations.jsonl", share_prompt)
    counts = prepare(source, tmp_path / "b")["counts"]
    assert counts["first prompts on both sides"] == 1
    assert counts["test comparisons after such a prompt"] == (table.dialog_id == other).sum()
    assert "1  first prompts on both sides" in capsys.readouterr().out


# ------------------------------------------------------------------- Bad input


def history(rows, dialogue="c0"):
    """The messages of a conversation, to be changed in place."""
    return next(r["conversation_history"] for r in rows if r["conversation_id"] == dialogue)


def choose_two(rows):
    for message in history(rows):
        message["if_chosen"] = message["role"] == "model"


def choose_none(rows):
    for message in history(rows):
        message["if_chosen"] = False


def lose_a_turn(rows):
    for message in history(rows):
        message["turn"] += 1


def ask_twice(rows):
    history(rows).append(dict(history(rows)[0]))


def blank_prompt(rows):
    history(rows)[0]["content"] = " "


def stranger(rows):
    rows[0]["user_id"] = "nobody"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (choose_two, "dialogues cut at a turn with several chosen responses"),
        (choose_none, "dialogues cut at a turn with no chosen responses"),
        (lose_a_turn, "dialogues cut at a missing turn"),
        (ask_twice, "dialogues cut at a turn with several user messages"),
        (blank_prompt, "dialogues cut at an empty prompt"),
        (stranger, "conversations of participants who are not in the survey"),
    ],
)
def test_a_dialogue_that_cannot_be_used_is_counted(tmp_path, change, reason):
    source = worlds.prism(tmp_path / "raw")
    worlds.edit(source / "conversations.jsonl", change)
    counts = prepare(source, tmp_path / "data", min_dialogues=5)["counts"]
    assert counts[f"left out: {reason}"] == 1
    table = worlds.comparisons(tmp_path / "data")
    whole = worlds.prism(tmp_path / "whole")
    assert as_set(table) == {row for row in expected(whole) if row[1] != "c0"}


def test_a_dialogue_keeps_the_turns_before_the_gap(tmp_path):
    source = worlds.prism(tmp_path / "raw", turns=4)
    long = next(
        r for r in worlds.read(source / "conversations.jsonl") if r["conversation_turns"] > 2
    )
    name = long["conversation_id"]

    def drop_second(rows):
        messages = history(rows, name)
        messages[:] = [message for message in messages if message["turn"] != 1]

    worlds.edit(source / "conversations.jsonl", drop_second)
    prepare(source, tmp_path / "data")
    table = worlds.comparisons(tmp_path / "data")
    assert set(table[table.dialog_id == name].turn) == {0}


def test_empty_and_equal_rejected_responses_are_counted(tmp_path):
    source = worlds.prism(tmp_path / "raw")

    def blank(rows):
        chosen, *rejected = sorted(history(rows)[1:5], key=lambda m: not m["if_chosen"])
        rejected[0]["content"] = "EMPTY STRING"
        rejected[1]["content"] = chosen["content"]

    worlds.edit(source / "conversations.jsonl", blank)
    counts = prepare(source, tmp_path / "data")["counts"]
    assert counts["left out: rejected responses empty"] == 1
    assert counts["left out: rejected responses equal to the chosen one"] == 1
    table = worlds.comparisons(tmp_path / "data")
    assert len(table[(table.dialog_id == "c0") & (table.turn == 0)]) == 1


def test_participants_without_a_completed_conversation_are_left_out(tmp_path):
    source = worlds.prism(tmp_path / "raw")
    worlds.edit(source / "survey.jsonl", lambda rows: rows[0].update(num_completed_conversations=0))
    counts = prepare(source, tmp_path / "data")["counts"]
    assert counts["participants with a completed conversation"] == 7
    assert counts["left out: conversations of participants with no completed conversation"] == 6


def listed(rows):
    history(rows)[2]["content"] = ["a", "b"]


def no_role(rows):
    del history(rows)[2]["role"]


def no_column(rows):
    del rows[4]["conversation_history"]


def set_history(value):
    return lambda rows: rows[0].update(conversation_history=value)


def chosen_as_text(rows):
    history(rows)[2]["if_chosen"] = "False"


def turn_before_the_first(rows):
    history(rows)[0]["turn"] = -1


def unnamed(rows):
    rows[1]["conversation_id"] = ""


def named_again(rows):
    rows[1]["conversation_id"] = rows[0]["conversation_id"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_history(5), r"conversations.jsonl row 1: conversation_history must be a list, not 5"),
        (set_history([5]), r"conversations.jsonl row 1: a message needs turn, role .*unlike 5"),
        (
            chosen_as_text,
            r"conversations.jsonl row 1: if_chosen must be true or false, not 'False'",
        ),
        (turn_before_the_first, r"conversations.jsonl row 1: a message needs turn"),
        (unnamed, r"conversations.jsonl row 2 has an empty conversation_id"),
        (named_again, r"conversations.jsonl row 2 has the conversation_id of an earlier row"),
        (listed, r"conversations.jsonl row 1: content must be text, not a list"),
        (no_role, r"conversations.jsonl row 1: a message needs turn, role"),
        (no_column, r"conversations.jsonl row 5 has no column conversation_history"),
    ],
)
def test_what_is_not_the_schema_is_refused_by_row(tmp_path, change, message):
    source = worlds.prism(tmp_path / "raw")
    worlds.edit(source / "conversations.jsonl", change)
    with pytest.raises(InputError, match=message):
        prepare(source, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_dialogues": 40}, "no comparisons are left: .* 0 participants with at least 40"),
        ({"seen_fraction": 1.0}, "--seen-fraction 1.0 of 8 users makes 8 of them seen"),
        ({"seen_fraction": 0.01}, "--seen-fraction 0.01 of 8 users makes 0 of them seen"),
    ],
)
def test_settings_that_leave_nothing_are_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        prepare(worlds.prism(tmp_path / "raw"), tmp_path / "data", **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": ["user0"]}, "survey.jsonl row 2: user_id must be text, not a list"),
        ({"user_id": "user0"}, "survey.jsonl row 2 has the user_id of an earlier row"),
        (
            {"num_completed_conversations": "0"},
            "survey.jsonl row 2: num_completed_conversations must be a number, not '0'",
        ),
        (
            {"num_completed_conversations": {}},
            "survey.jsonl row 2: num_completed_conversations must be a number, not {}",
        ),
    ],
)
def test_a_bad_participant_is_refused_by_row(tmp_path, change, message):
    source = worlds.prism(tmp_path / "raw")
    worlds.edit(source / "survey.jsonl", lambda rows: rows[1].update(change))
    with pytest.raises(InputError, match=message):
        prepare(source, tmp_path / "data")


def test_a_folder_without_the_tables_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--source .* has none of survey.jsonl"):
        prepare(tmp_path, tmp_path / "data")


def test_the_hub_is_asked_for_both_configurations(tmp_path, monkeypatch):
    source = worlds.prism(tmp_path / "raw")
    asked = []

    def load_dataset(path, **settings):
        asked.append((path, settings))
        return worlds.read(source / f"{settings['name']}.jsonl")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    prepare("HannahRoseKirk/prism-alignment", tmp_path / "hub")
    prepare(source, tmp_path / "local")
    assert {settings["name"] for _, settings in asked} == {"survey", "conversations"}
    tables = [(tmp_path / out / "comparisons.parquet").read_bytes() for out in ("hub", "local")]
    assert tables[0] == tables[1]


def test_a_hub_out_of_reach_is_one_clear_line(tmp_path, monkeypatch):
    def load_dataset(path, **settings):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"not load from the hub \(no route\); give a folder"):
        prepare("nobody/nothing", tmp_path / "data")


# --------------------------------------------------- The list form, and the text


@pytest.mark.slow
def test_the_list_form_prints_a_list_and_warns_everywhere(tmp_path, capsys, caplog):
    source = worlds.prism(tmp_path / "raw")
    info = prepare(source, tmp_path / "data", rejected="list")
    assert "Python list" in info["warning"]
    assert f"WARNING: {info['warning']}" in capsys.readouterr().out
    table = worlds.comparisons(tmp_path / "data")
    turns = {row[:4] for row in expected(source)}
    assert len(table) == len(turns)  # one comparison a turn
    for row in table.itertuples():
        answers = {
            json.loads(lost)[-1]["content"]
            for *key, won, lost in expected(source)
            if (*key, won) == (row.user_id, row.dialog_id, row.turn, json.dumps(row.chosen))
        }
        text = row.rejected[-1]["content"]
        assert set(json.loads(text.replace("'", '"'))) == answers
    preparing.read_info(tmp_path / "data")
    assert info["warning"] in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("rejected", "brackets"), [("each", 0), ("list", 1)])
def test_the_text_that_is_embedded(tmp_path, rejected, brackets):
    """History and answer as plain text, one BOS; only the list form has its brackets."""
    prepare(worlds.prism(tmp_path / "raw"), tmp_path / "data", rejected=rejected)
    tokenizer = models.transformers.AutoTokenizer.from_pretrained(
        models.tiny_llama(tmp_path / "model")
    )
    table = worlds.comparisons(tmp_path / "data")
    row = table[table.turn == 1].iloc[0]
    text = reward_model.render_text(tokenizer, row.rejected)
    assert text.count("[") == text.count("]") == brackets
    spoken = [message["content"] for message in row.rejected]
    assert len(spoken) == 4
    places = [text.index(content) for content in spoken]
    assert places == sorted(places)
    assert text.endswith(f"{spoken[-1]}<|eot_id|>")
    ids = reward_model.render(tokenizer, row.rejected)
    assert list(ids).count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_embedding_needs_a_prepared_folder(tmp_path):
    with pytest.raises(InputError, match="run prepare.py first"):
        worlds.script("PRISM/generate-prism-embeddings.py").main(data=tmp_path)


@pytest.mark.skipif(not SLICE.exists(), reason="the slice of PRISM is not beside the project")
def test_the_real_slice(tmp_path):
    """Counted once more from the raw files: users with four or more dialogues, all their turns."""
    info = prepare(SLICE, tmp_path, min_dialogues=4)
    raw = expected(SLICE)
    dialogues = pd.DataFrame({row[:2] for row in raw}, columns=["user", "dialogue"])
    kept = dialogues.user.value_counts() >= 4
    pairs = [row for row in raw if kept[row[0]] and "EMPTY STRING" not in row[4]]
    table = worlds.comparisons(tmp_path)
    assert as_set(table) == set(pairs)
    assert info["counts"]["participants with at least 4 dialogues"] == kept.sum() == 173
