"""PRISM/prepare.py and generate-prism-embeddings.py: dialogues, filters, splits, the list form."""

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


def prepare(source: Path | str, out: Path, **settings) -> tuple[dict, pd.DataFrame]:
    """What prepare.json says, and the comparisons with the conversations."""
    info = worlds.prepare("PRISM", source, out, **settings)
    return info, worlds.comparisons(out)


@pytest.fixture
def source(tmp_path) -> Path:
    return worlds.prism(tmp_path / "raw")


def expected(source: Path) -> list[tuple]:
    """(user, dialogue, turn, chosen, rejected) by a plain loop; conversations as JSON, sorted."""
    found = []
    for row in worlds.read(source / "conversations.jsonl"):
        history: list[dict[str, str]] = []
        for turn in range(row["conversation_turns"]):
            said = [m for m in row["conversation_history"] if m["turn"] == turn]
            history.append({"role": "user", "content": said[0]["content"]})
            answers = {m["content"]: m["if_chosen"] for m in said[1:]}
            ends = {a: [*history, {"role": "assistant", "content": a}] for a in answers}
            (won,) = [answer for answer, chosen in answers.items() if chosen]
            key = (row["user_id"], row["conversation_id"], turn, json.dumps(ends[won]))
            found += [(*key, json.dumps(ends[answer])) for answer in answers.keys() - {won}]
            history = ends[won]
    return sorted(found)


def as_list(table: pd.DataFrame) -> list[tuple]:
    return worlds.as_tuples(table, ["user_id", "dialog_id", "turn"])


def test_one_comparison_per_rejected_response_after_the_chosen_history(source, tmp_path):
    info, table = prepare(source, tmp_path / "data")
    assert as_list(table) == expected(source)
    assert len(table) == info["counts"]["comparisons"]
    assert (table.weight == 1).all() and "warning" not in info
    assert max(len(messages) for messages in table.chosen) == 6  # three turns
    rows = pd.read_parquet(tmp_path / "data" / "comparisons.parquet")
    messages = pd.read_parquet(tmp_path / "data" / "conversations.parquet").messages
    texts = [json.dumps([dict(m) for m in conversation]) for conversation in messages]
    assert len(set(texts)) == len(texts)
    assert set(rows.chosen) | set(rows.rejected) == set(range(len(texts)))


def test_users_with_few_dialogues_are_left_out(tmp_path):
    source = worlds.prism(tmp_path / "raw", users=8, dialogues=4)  # 4, 5, 6, 4, 5, 6, 4, 5
    info, table = prepare(source, tmp_path / "data", min_dialogues=5)
    assert set(table.user_id) == {"user1", "user2", "user4", "user5", "user7"}
    assert info["counts"]["participants with at least 5 dialogues"] == 5


def test_another_seed_splits_otherwise_and_leaves_the_conversations(source, tmp_path):
    made = [prepare(source, tmp_path / str(seed), seed=seed) for seed in range(4)]
    infos, tables = zip(*made, strict=True)
    assert len({info["conversations_sha256"] for info in infos}) == 1
    assert len({tuple(table[table.seen].user_id.unique()) for table in tables}) > 1
    assert len({tuple(table.split) for table in tables}) == 4


def test_first_prompts_on_both_sides_are_counted_and_printed(source, tmp_path, capsys):
    info, table = prepare(source, tmp_path / "a")
    assert info["counts"]["first prompts on both sides"] == 0
    one, other = (table[table.split == side].dialog_id.iloc[0] for side in ("train", "test"))

    def share_prompt(rows):
        named = {row["conversation_id"]: row["conversation_history"] for row in rows}
        named[one][0]["content"] = named[other][0]["content"]

    worlds.edit(source / "conversations.jsonl", share_prompt)
    counts = prepare(source, tmp_path / "b")[0]["counts"]
    assert counts["first prompts on both sides"] == 1
    assert counts["test comparisons after such a prompt"] == (table.dialog_id == other).sum()
    assert "1  first prompts on both sides" in capsys.readouterr().out


# ------------------------------------------------------------------- What is left out


def choose(which):
    """Every response of the first dialogue is chosen, or none."""
    return lambda row, said: [m.update(if_chosen=which and m["role"] == "model") for m in said]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (choose(True), "dialogues cut at a turn with several chosen responses"),
        (choose(False), "dialogues cut at a turn with no chosen responses"),
        (lambda row, said: [message.update(turn=message["turn"] + 1) for message in said],
         "dialogues cut at a missing turn"),
        (lambda row, said: said.append(dict(said[0])),
         "dialogues cut at a turn with several user messages"),
        (lambda row, said: said[0].update(content=" "), "dialogues cut at an empty prompt"),
        (lambda row, said: row.update(user_id="nobody"),
         "conversations of participants who are not in the survey"),
    ],
)  # fmt: skip
def test_a_dialogue_that_cannot_be_used_is_counted(source, tmp_path, change, reason):
    whole = expected(source)
    worlds.edit(
        source / "conversations.jsonl",
        lambda rows: change(rows[0], rows[0]["conversation_history"]),
    )
    info, table = prepare(source, tmp_path / "data", min_dialogues=5)
    assert info["counts"][f"left out: {reason}"] == 1
    assert as_list(table) == [row for row in whole if row[1] != "c0"]


def test_a_dialogue_keeps_the_turns_before_the_gap(tmp_path):
    source = worlds.prism(tmp_path / "raw", turns=4)
    rows = worlds.read(source / "conversations.jsonl")
    long = next(row for row in rows if row["conversation_turns"] > 2)
    long["conversation_history"] = [m for m in long["conversation_history"] if m["turn"] != 1]
    worlds.write(source / "conversations.jsonl", rows)
    _, table = prepare(source, tmp_path / "data")
    assert set(table[table.dialog_id == long["conversation_id"]].turn) == {0}


def test_empty_and_equal_rejected_responses_are_counted(source, tmp_path):
    def blank(rows):
        responses = rows[0]["conversation_history"][1:5]
        chosen, *rejected = sorted(responses, key=lambda m: not m["if_chosen"])
        rejected[0]["content"] = "EMPTY STRING"
        rejected[1]["content"] = chosen["content"]

    worlds.edit(source / "conversations.jsonl", blank)
    info, table = prepare(source, tmp_path / "data")
    assert info["counts"]["left out: rejected responses empty"] == 1
    assert info["counts"]["left out: rejected responses equal to the chosen one"] == 1
    assert len(table[(table.dialog_id == "c0") & (table.turn == 0)]) == 1


@pytest.mark.parametrize("count", [0, None])
def test_participants_without_a_completed_conversation_are_left_out(source, tmp_path, count):
    worlds.edit(
        source / "survey.jsonl", lambda rows: rows[0].update(num_completed_conversations=count)
    )
    counts = prepare(source, tmp_path / "data")[0]["counts"]
    assert counts["participants with a completed conversation"] == 7
    assert counts["left out: conversations of participants with no completed conversation"] == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_dialogues": 40}, "no comparisons are left: .* 0 participants with at least 40"),
        ({"seen_fraction": 1.0}, "--seen-fraction 1.0 of 8 users makes 8 of them seen"),
    ],
)
def test_settings_that_leave_nothing_are_refused(source, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        prepare(source, tmp_path / "data", **settings)


# ------------------------------------------------------------------- From the hub


def test_a_folder_without_the_tables_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--source .* has none of survey.jsonl"):
        prepare(tmp_path, tmp_path / "data")


def test_both_configurations_come_from_the_hub(source, tmp_path, monkeypatch):
    calls = []

    def load_dataset(path, **settings):
        calls.append((path, settings))
        return worlds.read(source / f"{settings['name']}.jsonl")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    hub, _ = prepare("HannahRoseKirk/prism-alignment", tmp_path / "hub")
    local, _ = prepare(source, tmp_path / "local")
    names = ("survey", "conversations")
    path = "HannahRoseKirk/prism-alignment"
    assert calls == [(path, {"name": name, "split": "train"}) for name in names]
    assert hub["files"] == local["files"]


def test_a_hub_out_of_reach_is_one_clear_line(tmp_path, monkeypatch):
    def load_dataset(path, **settings):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"not load from the hub \(no route\); give a folder"):
        prepare("nobody/nothing", tmp_path / "data")


# --------------------------------------------------- The list form, and the text


def test_the_list_form_prints_a_list_and_warns_everywhere(source, tmp_path, capsys, caplog):
    info, table = prepare(source, tmp_path / "data", rejected="list")
    assert "Python list" in info["warning"]
    assert f"WARNING: {info['warning']}" in capsys.readouterr().out
    answers: dict[tuple, set[str]] = {}
    for *turn, lost in expected(source):
        answers.setdefault(tuple(turn), set()).add(json.loads(lost)[-1]["content"])
    found = as_list(table)  # one comparison a turn
    assert [tuple(turn) for *turn, _ in found] == sorted(answers)
    for *turn, lost in found:
        printed = json.loads(lost)[-1]["content"]
        assert set(json.loads(printed.replace("'", '"'))) == answers[tuple(turn)]
    preparing.read_info(tmp_path / "data")
    assert info["warning"] in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("rejected", "brackets"), [("each", 0), ("list", 1)])
def test_the_text_that_is_embedded(model, source, tmp_path, rejected, brackets):
    """History and answer as plain text, one BOS; only the list form has its brackets."""
    tokenizer = models.transformers.AutoTokenizer.from_pretrained(model)
    _, table = prepare(source, tmp_path / "data", rejected=rejected)
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
    info, table = prepare(SLICE, tmp_path, min_dialogues=4)
    raw = expected(SLICE)
    dialogues = pd.DataFrame({row[:2] for row in raw}, columns=["user", "dialogue"])
    kept = dialogues.user.value_counts() >= 4
    pairs = [row for row in raw if kept[row[0]] and "EMPTY STRING" not in row[4]]
    assert set(as_list(table)) == set(pairs)
    assert info["counts"]["participants with at least 4 dialogues"] == kept.sum() == 173
