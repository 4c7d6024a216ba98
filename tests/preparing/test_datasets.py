"""Every dataset's prepare.py: comparisons, what is left out, who is kept, splits and overlap."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import WORLDS
from safetensors.numpy import load_file

import models
import worlds
from lore.common.files import InputError
from lore.embeddings import reward_model
from lore.preparing import raw
from lore.preparing.tables import read_info

DATA = worlds.ROOT.parent / "shared" / "data"
Row = dict[str, Any]


def prepare(name: str, source: Path | str, out: Path, **settings: Any) -> tuple[Row, pd.DataFrame]:
    """What prepare.json says, and the comparisons with their conversations; none is embedded."""
    settings = {**WORLDS[name][2], **({} if name == "PRISM" else {"embed": False}), **settings}
    info = worlds.prepare(name, source, out, **settings)
    is_scored = name == "PersonalLLM"
    return info, pd.DataFrame() if is_scored else worlds.comparisons(out)


def asked(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# --------------------------------------------------------------- Comparisons by plain loops


def loop_tldr(file: str, row: Row) -> Iterator[tuple]:
    won, lost = (row["summaries"][i]["text"] for i in (row["choice"], 1 - row["choice"]))
    key = (row["worker"], {"validation": "test"}.get(file, file), row["info"]["id"], 0)
    yield *key, [asked(row["info"]["post"]), said(won)], [asked(row["info"]["post"]), said(lost)]


def loop_prism(file: str, row: Row) -> Iterator[tuple]:
    history = []
    for turn in range(row.get("conversation_turns", 0)):
        ask, *answers = (m for m in row["conversation_history"] if m["turn"] == turn)
        (won,) = {m["content"] for m in answers if m["if_chosen"]}
        history += [asked(ask["content"])]
        for lost in {m["content"] for m in answers} - {won}:
            key = (row["user_id"], row["conversation_id"], turn)
            yield *key, [*history, said(won)], [*history, said(lost)]
        history += [said(won)]


def loop_community(file: str, row: Row, language: str = "en") -> Iterator[tuple]:
    history = []
    for number, turn in enumerate(worlds.TURNS):
        prompt = row[f"{turn}_turn_prompt"]
        if prompt == "EMPTY STRING" or row["assigned_lang"] != language:
            break
        history += [asked(prompt)]
        answers = {f"response_{x}": row[f"{turn}_turn_response_{x}"] for x in "abcd"}
        won = answers.pop(row[f"{turn}_turn_preferred_response"])
        for lost in answers.values():
            key = (row["annotator_id"], row["conversation_id"], number)
            yield *key, [*history, said(won)], [*history, said(lost)]
        history += [said(won)]


def loop_rewardbench(file: str, row: Row) -> Iterator[tuple]:
    history = [(said if m["role"] == "model" else asked)(m["content"]) for m in row["context"]]
    key = (row["user_id"], row["split"], row["conversation_id"], len(history) // 2)
    yield *key, *([*history, said(row[side]["content"])] for side in ("chosen", "rejected"))


USER_AND_TURN = ("user_id", "dialog_id", "turn")
LOOPS = {  # the loop, and the columns that name a comparison
    "RedditTLDR": (loop_tldr, ("user_id", "split", "dialog_id", "turn")),
    "PRISM": (loop_prism, USER_AND_TURN),
    "CommunityAlignment": (loop_community, USER_AND_TURN),
    "PersonalRewardBench": (loop_rewardbench, ("user_id", "split", "dialog_id", "turn")),
}


def tables_of(source: Path) -> dict[str, list[Row]]:
    """The rows of a source's tables."""
    return {path.name.split(".")[0]: worlds.read(path) for path in source.iterdir()}


def expected(name: str, tables: dict[str, list[Row]], **more: Any) -> Counter[tuple]:
    """The comparisons that rows make, the conversations as JSON, by a plain loop."""
    loop = LOOPS[name][0]
    found = (each for file, rows in tables.items() for row in rows
             for each in loop(file, row, **more))  # fmt: skip
    return Counter((*key, json.dumps(won), json.dumps(lost)) for *key, won, lost in found)


def listed(name: str, table: pd.DataFrame) -> Counter[tuple]:
    """The comparisons of a prepared folder in the same form."""
    return Counter(worlds.as_tuples(table, LOOPS[name][1]))


WORLD_SAYS = {  # messages in the longest conversation, whether all are seen, and some counts
    "RedditTLDR": (2, True, {"rows of train": 180, "rows of validation": 180}),
    "PRISM": (6, False, {"participants": 8, "seen users": 4, "first prompts on both sides": 0}),
    "CommunityAlignment": (8, False, {"conversations": 234, "seen users": 3}),
    "PersonalRewardBench": (4, True, {"comparisons": 60, "training comparisons": 22,
                                      "validation comparisons": 20, "test comparisons": 18}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "size", "settings"),
    [*((name, {}, {}) for name in ("RedditTLDR", "PRISM", "PersonalRewardBench")),
     *(("CommunityAlignment", {"languages": "en fr hi"}, {"language": language})
       for language in ("en", "fr"))],
)  # fmt: skip
def test_comparisons_are_those_of_a_plain_loop(tmp_path, name, size, settings):
    source = WORLDS[name][0](tmp_path / "raw", **size)
    longest, all_seen, counts = WORLD_SAYS[name]
    info, table = prepare(name, source, tmp_path / "data", **settings)
    assert listed(name, table) == expected(name, tables_of(source), **settings)
    assert {**info["counts"], **counts} == info["counts"] and "warning" not in info
    assert info["counts"]["comparisons"] == len(table) and table.seen.all() == all_seen
    assert table.chosen.map(len).max() == longest
    weights = table.groupby(["dialog_id", "turn"]).weight.sum().round(9)
    assert (weights if name == "CommunityAlignment" else table.weight).eq(1).all()
    rows = pd.read_parquet(tmp_path / "data" / "comparisons.parquet")
    messages = pq.read_table(tmp_path / "data" / "conversations.parquet")["messages"].to_pylist()
    assert len(set(map(str, messages))) == len(messages) == info["counts"]["distinct conversations"]
    assert {*rows.chosen, *rows.rejected} == set(range(len(messages)))


# ------------------------------------------------------------------------- What is left out


def given(**change: Any):
    return lambda row: row.update(change)


def history(change):
    """A change of the messages of a PRISM conversation."""
    return lambda row: row.update(conversation_history=change(row["conversation_history"]))


def choose(which: bool):
    """Every response is chosen, or none."""
    return history(lambda h: [{**m, "if_chosen": which and m["role"] == "model"} for m in h])


def says(content: str | None):
    """A rejected response of the first turn says this, or what the chosen one does."""

    def change(row: Row) -> None:
        won, lost, *_ = sorted(row["conversation_history"][1:5], key=lambda m: not m["if_chosen"])
        lost["content"] = won["content"] if content is None else content

    return change


def cells(row: Row, turn: str, value: str) -> Row:
    return {name: value for name in row if name.startswith(f"{turn}_turn")}


def gap(row: Row) -> None:
    third = {name.replace("first", "third"): row[name] for name in cells(row, "first", "")}
    row |= {**third, **cells(row, "second", "EMPTY STRING")}


def no_first_turn(row: Row) -> None:
    row |= {**cells(row, "first", "EMPTY STRING"), "second_turn_prompt": "is there a first?"}


def silent(which: int):
    """The preferred response of the first turn is empty, or another one."""

    def change(row: Row) -> None:
        won = row["first_turn_preferred_response"]
        names = sorted((f"response_{x}" for x in "abcd"), key=lambda name: name != won)
        row[f"first_turn_{names[which]}"] = "EMPTY STRING"

    return change


def summary(place: int, text: str | None):
    return lambda row: row["summaries"][place].update(text=text)


def same_twice(row: Row) -> None:
    row["summaries"][0]["text"] = row["summaries"][1]["text"]


MODEL_SAYS = {"role": "model", "content": "hello"}
NOT_THE_USER = "rows whose context does not end with a message of the user"
ALL, CUT, REJECTED = None, "dialogues cut at ", "rejected responses "
# What becomes of a row, why it is left out, and how many of its comparisons are lost (-3: but 3).
CASES = {
    ("PRISM", "conversations"): [
        (choose(True), f"{CUT}a turn with several chosen responses", ALL),
        (choose(False), f"{CUT}a turn with no chosen responses", ALL),
        (history(lambda h: [{**m, "turn": m["turn"] + 1} for m in h]), f"{CUT}a missing turn", ALL),
        (history(lambda h: [m for m in h if m["turn"] != 1]), f"{CUT}a missing turn", 2),
        (history(lambda h: [*h, h[0]]), f"{CUT}a turn with several user messages", ALL),
        (history(lambda h: [{**h[0], "content": " "}, *h[1:]]), f"{CUT}an empty prompt", ALL),
        (given(user_id="nobody"), "conversations of participants who are not in the survey", ALL),
        (says("EMPTY STRING"), f"{REJECTED}empty", 1),
        (says(None), f"{REJECTED}equal to the chosen one", 1),
    ],
    ("CommunityAlignment", "train"): [
        (gap, f"{CUT}a missing turn", -3),
        (no_first_turn, f"{CUT}a missing turn", ALL),
        (silent(0), f"{CUT}an empty chosen response", ALL),
        (silent(1), f"{REJECTED}empty", 1),
        *((given(first_turn_preferred_response=value),
           f"{CUT}a preferred_response that names no response", ALL)
          for value in (None, "response_e")),
    ],
    ("RedditTLDR", "train"): [
        (summary(0, ""), "rows with an empty summary", ALL),
        (summary(1, None), "rows with an empty summary", ALL),
        (same_twice, f"{REJECTED}equal to the chosen one", ALL),
        (given(choice=None, extra={"tie": True}), "ties", ALL),
        *((given(info={"id": "t3_0", "post": post}), "rows without a post", ALL)
          for post in (None, "", "EMPTY STRING")),
    ],
    ("PersonalRewardBench", "train"): [
        (given(split="extra"), "rows whose split is extra", ALL),
        (given(chosen={"role": "model", "content": ""}), "chosen responses empty", ALL),
        (given(rejected=""), f"{REJECTED}empty", ALL),
        (given(chosen="hello", rejected=MODEL_SAYS), f"{REJECTED}equal to the chosen one", ALL),
        *((given(context=context), NOT_THE_USER, ALL)
          for context in ([], [MODEL_SAYS], [{"role": "user", "content": ""}])),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file", "change", "why", "lost"),
    [(*key, *case) for key in CASES for case in CASES[key]],
)
def test_what_cannot_be_used_is_counted(tmp_path, capsys, name, file, change, why, lost):
    tables = tables_of(WORLDS[name][0](tmp_path / "whole"))
    row = max(tables[file], key=lambda row: row.get("conversation_turns", 0))
    whole = expected(name, tables)
    of_row = expected(name, {file: [row]})
    change(row)
    for other, rows in tables.items():
        worlds.write(tmp_path / "raw" / f"{other}.jsonl", rows)
    settings = {"min_dialogues": 5} if name == "PRISM" else {}
    info, table = prepare(name, tmp_path / "raw", tmp_path / "data", **settings)
    assert {k: n for k, n in info["counts"].items() if "left out" in k} == {f"left out: {why}": 1}
    assert f"1  left out: {why}" in capsys.readouterr().out
    left = listed(name, table)
    assert left <= whole and whole - left <= of_row
    total = of_row.total()
    assert (whole - left).total() == (total if lost is ALL else lost % total) > 0


# ------------------------------------------------------------------------------ Who is kept


def w01_and_w02(file: str, row: Row, number: int) -> bool:
    """w01 has no test rows, w02 fifteen rows of either split."""
    worker = row["worker"]
    return not (worker == "w01" and file == "validation" or worker == "w02" and number >= 15 * 6)


def one_of_en0(file: str, row: Row, number: int) -> bool:
    return not number or row["annotator_id"] != "en0"


def some_of_0_to_2(file: str, row: Row, number: int) -> bool:
    without = {("user0", "train"), ("user1", "test"), ("user2", "val")}
    return (row["user_id"], row["split"]) not in without


def anything(file: str, row: Row, number: int) -> bool:
    return True


BOTH = "users with dialogues for training and for test"


@pytest.mark.parametrize(
    ("name", "keep", "settings", "counts", "lost"),
    [
        ("PRISM", anything, {"min_dialogues": 7}, {"participants with at least 7 dialogues": 5},
         {"user0", "user3", "user6"}),
        ("RedditTLDR", w01_and_w02, {"min_annotations": 30},
         {"workers with at least 30 annotations": 6,
          "workers with at least 30 annotations, some in both splits": 5}, {"w01"}),
        ("RedditTLDR", w01_and_w02, {"min_annotations": 31},
         {"workers with at least 31 annotations": 4}, {"w01", "w02"}),
        ("CommunityAlignment", anything, {"min_comparisons": 85}, {}, "fewer than 85"),
        ("CommunityAlignment", one_of_en0, {"min_comparisons": 1},
         {"annotators with at least 1 comparisons": 6, BOTH: 5}, {"en0"}),
        ("PersonalRewardBench", some_of_0_to_2, {},
         {"users with comparisons": 6, "users with comparisons for training and for test": 4},
         {"user0", "user1"}),
    ],
)  # fmt: skip
def test_users_with_too_little_are_left_out(tmp_path, name, keep, settings, counts, lost):
    source = WORLDS[name][0](tmp_path / "raw")
    kept = {file: [row for number, row in enumerate(rows) if keep(file, row, number)]
            for file, rows in tables_of(source).items()}  # fmt: skip
    for path in source.iterdir():
        worlds.write(path, kept[path.name.split(".")[0]])
    info, table = prepare(name, source, tmp_path / "data", **settings)
    whole, sizes = expected(name, kept), Counter()
    for (user, *_), number in whole.items():
        sizes[user] += number
    if lost == "fewer than 85":
        lost = {user for user, number in sizes.items() if number < 85}
        counts = {"annotators with at least 85 comparisons": len(sizes) - len(lost)}
    assert {**info["counts"], **counts} == info["counts"] and set() < lost < sizes.keys()
    assert listed(name, table) == Counter({k: n for k, n in whole.items() if k[0] not in lost})


@pytest.mark.parametrize("count", [0, None])
def test_participants_without_a_completed_conversation_are_left_out(tmp_path, count):
    source = worlds.prism(tmp_path / "raw")
    change = given(num_completed_conversations=count)
    worlds.edit(source / "survey.jsonl", lambda rows: change(rows[0]))
    counts = prepare("PRISM", source, tmp_path / "data")[0]["counts"]
    assert counts["participants with a completed conversation"] == 7
    assert counts["left out: conversations of participants with no completed conversation"] == 6


@pytest.mark.parametrize(
    ("name", "users"), [("RedditTLDR", "workers"), ("PersonalRewardBench", "users")]
)
def test_a_single_user_is_prepared(tmp_path, name, users):
    source = WORLDS[name][0](tmp_path / "raw", **{users: 1})
    assert prepare(name, source, tmp_path / "data")[0]["counts"]["users with comparisons"] == 1


# ------------------------------------------------------------------ Order, splits and overlap


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [*((name, {}) for name in WORLDS), ("CommunityAlignment", {"unseen_prompts": True})],
)
def test_order_of_the_rows_and_their_format_do_not_matter(tmp_path, name, more):
    source = WORLDS[name][0](tmp_path / "raw", **WORLDS[name][1])
    first, _ = prepare(name, source, tmp_path / "a", **more)
    for path in list(source.iterdir()):
        rows = worlds.read(path)
        random.Random(0).shuffle(rows)
        stem, ending = path.name.split(".", 1)
        other = "jsonl.gz" if ending == "parquet" else "parquet"
        worlds.write(tmp_path / "b-raw" / f"{stem}.{other}", rows)
    second, _ = prepare(name, tmp_path / "b-raw", tmp_path / "b", **more)
    assert first.pop("settings") != second.pop("settings")  # another source
    assert first == second
    for file in first["files"]:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(("name", "fraction"), [("PRISM", 0.75), ("CommunityAlignment", 0.34)])
def test_splits_are_by_dialogue_and_by_user(tmp_path, name, fraction):
    source = WORLDS[name][0](tmp_path / "raw", **WORLDS[name][1])
    made = [prepare(name, source, tmp_path / str(seed), seed=seed, seen_fraction=fraction)
            for seed in range(3)]  # fmt: skip
    for info, table in made:
        assert (table.groupby("dialog_id").split.nunique() == 1).all()
        assert (table.groupby("user_id").seen.nunique() == 1).all()
        dialogues = table.groupby(["user_id", "split"]).dialog_id.nunique().unstack()
        assert (dialogues.train - dialogues.test).isin([0, 1]).all()
        seen = round(fraction * table.user_id.nunique())
        assert table[table.seen].user_id.nunique() == info["counts"]["seen users"] == seen
    assert len({info["conversations_sha256"] for info, _ in made}) == 1
    assert len({tuple(table[table.seen].user_id.unique()) for _, table in made}) > 1
    assert len({tuple(table.split) for _, table in made}) == 3


@pytest.mark.parametrize("name", ["RedditTLDR", "PRISM", "CommunityAlignment"])
def test_overlap_is_what_a_plain_loop_counts(tmp_path, name):
    info, table = prepare(name, WORLDS[name][0](tmp_path / "raw"), tmp_path / "data")
    train = [row for row in table.itertuples() if row.split == "train"]
    found = dict.fromkeys(("held_out", "prompt", "response", "both_responses", "pair"), 0)
    for row in table[table.split == "test"].itertuples():
        known = [row.chosen in (t.chosen, t.rejected) for t in train]
        known_too = [row.rejected in (t.chosen, t.rejected) for t in train]
        found["held_out"] += 1
        found["prompt"] += any(row.chosen[:-1] == t.chosen[:-1] for t in train)
        found["response"] += any(known) or any(known_too)
        found["both_responses"] += any(known) and any(known_too)
        found["pair"] += any(a and b for a, b in zip(known, known_too, strict=True))
    sentence = info["overlap"].pop("sentence")
    assert info["overlap"] == found
    assert f"Of {found['held_out']:,} held-out" in sentence and f"{found['pair']:,} the" in sentence


def test_shared_prompts_are_counted_and_may_be_kept_apart(tmp_path):
    source = worlds.community(tmp_path / "raw")
    for unseen_prompts in (False, True):
        out = tmp_path / str(unseen_prompts)
        info, table = prepare("CommunityAlignment", source, out, unseen_prompts=unseen_prompts)
        prompts = table.chosen.map(lambda messages: messages[0]["content"])
        train, test = (set(prompts[table.split == side]) for side in ("train", "test"))
        assert bool(train & test) != unseen_prompts
        after = prompts[table.split == "test"].isin(train).sum()
        assert info["counts"]["first prompts on both sides"] == len(train & test)
        assert info["counts"]["test comparisons after such a prompt"] == after
        assert (table.groupby("dialog_id").split.nunique() == 1).all()
        assert (table.groupby("user_id").split.nunique() == 2).all()
    assert abs(len(train) - len(test)) <= 1


def test_a_validation_comparison_is_none_that_training_has(tmp_path):
    """Overlap is told of training alone, and settings are chosen by the other."""
    source = worlds.rewardbench(tmp_path / "raw", users=1)
    rows = worlds.read(source / "train.parquet")
    same = {key: rows[2][key] for key in ("context", "chosen", "rejected")}
    assert [row["split"] for row in rows[:3]] == ["train", "val", "test"]
    for number, pairs in ((0, 1), (1, 0)):
        some = [{**row, **same} if i == number else row for i, row in enumerate(rows)]
        worlds.write(tmp_path / str(number) / "all.jsonl", some)
        source, out = tmp_path / str(number), tmp_path / f"{number}-data"
        assert prepare("PersonalRewardBench", source, out)[0]["overlap"]["pair"] == pairs


def test_without_a_name_a_dialogue_is_its_first_prompt(tmp_path):
    rows = worlds.read(worlds.rewardbench(tmp_path / "raw", users=1) / "train.parquet")
    for row in rows:
        del row["conversation_id"]
    more = [MODEL_SAYS, asked("and then?")]
    rows[3] |= {"context": [*rows[0]["context"], *more], "chosen": "plainly"}
    worlds.write(tmp_path / "bare" / "all.jsonl", rows)
    _, table = prepare("PersonalRewardBench", tmp_path / "bare", tmp_path / "data")
    mine = table[table.split == "train"]
    (twice,) = mine.dialog_id[mine.dialog_id.duplicated()]
    assert sorted(mine.turn[mine.dialog_id == twice]) == [0, 1]
    assert said("plainly") in mine.chosen.map(lambda messages: messages[-1]).tolist()


def test_a_choice_may_be_a_float(tmp_path):
    """A column of whole numbers with a gap anywhere is read as floats."""
    source = worlds.tldr(tmp_path / "raw")
    before = prepare("RedditTLDR", source, tmp_path / "a")[0]["data_sha256"]
    worlds.edit(source / "train.jsonl.gz",
                lambda rows: [row.update(choice=float(row["choice"])) for row in rows])  # fmt: skip
    assert prepare("RedditTLDR", source, tmp_path / "b")[0]["data_sha256"] == before


# --------------------------------------------------------------------- PersonalLLM's scores


def test_scores_lie_with_their_conversations(tmp_path):
    source = worlds.personalllm(tmp_path / "raw", train=10, test=4)
    worlds.edit(
        source / "train.parquet", lambda rows: rows[0].update(response_8=rows[0]["response_1"])
    )
    info, _ = prepare("PersonalLLM", source, tmp_path / "data")
    tensors = load_file(tmp_path / "data" / "scores.safetensors")
    talks = pq.read_table(tmp_path / "data" / "conversations.parquet")["messages"].to_pylist()
    for split, prompts in {"train": 10, "test": 4}.items():
        scores, rows = tensors[f"{split}.scores"], tensors[f"{split}.rows"]
        assert (scores.shape, scores.dtype) == ((prompts, 8, 10), np.float32)
        assert (rows.shape, rows.dtype) == ((prompts, 8), np.int64)
        by_prompt = {row["prompt"]: row for row in worlds.read(source / f"{split}.parquet")}
        for prompt in range(prompts):
            row = by_prompt.pop(talks[rows[prompt, 0]][0]["content"])
            for i in range(8):
                name = f"response_{i + 1}"
                assert talks[rows[prompt, i]] == [asked(row["prompt"]), said(row[name])]
                of_name = [np.float32(row[f"{name}_{scorer}"]) for scorer in worlds.SCORERS]
                assert scores[prompt, i].tolist() == of_name
    assert len(talks) == info["counts"]["distinct conversations"] == 14 * 8 - 1


def test_prompts_on_both_sides_and_empty_responses_are_counted(tmp_path, capsys):
    source = worlds.personalllm(tmp_path / "raw")
    first, second = worlds.read(source / "train.parquet")[:2]

    def share(rows):
        rows[2].update(prompt=first["prompt"], response_2="")
        rows[3].update(prompt=second["prompt"], response_2=second["response_7"])

    worlds.edit(source / "test.parquet", share)
    info, _ = prepare("PersonalLLM", source, tmp_path / "data")
    assert info["counts"]["prompts on both sides"] == 2
    assert info["counts"]["test responses without text"] == 1
    assert "2  prompts on both sides" in capsys.readouterr().out
    sentence = info["overlap"].pop("sentence")
    assert info["overlap"] == {"held_out": 8, "prompt": 2, "response": 1}
    assert sentence.startswith("Of 8 held-out prompts, 2 are training prompts too, 1 of them with")


# ---------------------------------------------------------------- PRISM's list, and its text


def test_the_list_form_prints_a_list_and_warns_everywhere(tmp_path, capsys, caplog):
    source = worlds.prism(tmp_path / "raw")
    info, table = prepare("PRISM", source, tmp_path / "data", rejected="list")
    assert "Python list" in info["warning"]
    assert f"WARNING: {info['warning']}" in capsys.readouterr().out
    answers: dict[tuple, set[str]] = {}
    for *turn, lost in expected("PRISM", tables_of(source)):
        answers.setdefault(tuple(turn), set()).add(json.loads(lost)[-1]["content"])
    found = {}
    for *turn, lost in listed("PRISM", table):  # one comparison a turn
        printed = json.loads(lost)[-1]["content"]
        found[tuple(turn)] = set(json.loads(printed.replace("'", '"')))
    assert found == answers and len(table) == len(answers)
    read_info(tmp_path / "data")
    assert info["warning"] in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("rejected", "brackets"), [("each", 0), ("list", 1)])
def test_the_text_that_is_embedded(model, tmp_path, rejected, brackets):
    """History and answer as plain text, one BOS; only the list form has its brackets."""
    tokenizer = models.transformers.AutoTokenizer.from_pretrained(model)
    source = worlds.prism(tmp_path / "raw")
    _, table = prepare("PRISM", source, tmp_path / "data", rejected=rejected)
    row = table[table.turn == 1].iloc[0]
    text = reward_model.render_text(tokenizer, row.rejected)
    assert text.count("[") == text.count("]") == brackets
    spoken = [message["content"] for message in row.rejected]
    places = [text.index(content) for content in spoken]
    assert len(spoken) == 4 and places == sorted(places)
    assert text.endswith(f"{spoken[-1]}<|eot_id|>")
    ids = reward_model.render(tokenizer, row.rejected)
    assert list(ids).count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_embedding_needs_a_prepared_folder_and_a_model(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="run prepare.py first"):
        worlds.script("PRISM/generate-prism-embeddings.py").main(data=tmp_path)
    for read in ("read_rows", "read_all"):
        monkeypatch.setattr(raw, read, lambda *args, **hub: pytest.fail("data were read"))
    for name in set(WORLDS) - {"PRISM"} | {"OwnData"}:
        with pytest.raises(ValueError, match="typo"):
            worlds.prepare(name, tmp_path, tmp_path / "data", model=str(tmp_path / "typo"))


# ---------------------------------------------------------------------- The hub, real data


def test_data_come_from_the_hub(tmp_path, monkeypatch):
    prism, tldr = worlds.prism(tmp_path / "prism"), worlds.tldr(tmp_path / "tldr")
    calls = []

    def load_dataset(path, **settings):
        calls.append((path, settings))
        return worlds.read(prism / f"{settings['name']}.jsonl")

    def snapshot_download(name, **what):
        calls.append((name, what["repo_type"], what["revision"]))
        split = Path(what["allow_patterns"]).parts[1]
        rows = worlds.read(tldr / f"{split}.jsonl.gz")
        worlds.write(tmp_path / split / "comparisons" / split / "0000.parquet", rows)
        return str(tmp_path / split)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for name, source, path in (("PRISM", prism, "HannahRoseKirk/prism-alignment"),
                               ("RedditTLDR", tldr, "openai/summarize_from_feedback")):  # fmt: skip
        hub, _ = prepare(name, path, tmp_path / f"{name} hub")
        assert hub["files"] == prepare(name, source, tmp_path / f"{name} local")[0]["files"]
    names, dump = ("survey", "conversations"), ("dataset", "refs/convert/parquet")
    assert calls[:2] == [("HannahRoseKirk/prism-alignment", {"name": name, "split": "train"})
                         for name in names]  # fmt: skip
    assert set(calls[2:]) == {("openai/summarize_from_feedback", *dump)}


def test_a_hub_out_of_reach_is_one_clear_line(tmp_path, monkeypatch):
    def load_dataset(path, **settings):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"not load from the hub \(no route\); give a folder"):
        prepare("PRISM", "nobody/nothing", tmp_path / "data")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folder", "settings", "users"),
    [
        ("PRISM", "prism_slice", {"min_dialogues": 4}, "participants with at least 4 dialogues"),
        ("RedditTLDR", "ukpconvarg_as_tldr", {"min_annotations": 50},
         "workers with at least 50 annotations, some in both splits"),
    ],
)  # fmt: skip
def test_the_real_data(tmp_path, name, folder, settings, users):
    """Counted once more from the raw files: 173 people in either, all pairs of unequal texts."""
    if not (DATA / folder).exists():
        pytest.skip(f"{folder} is not beside the project")
    info, table = prepare(name, DATA / folder, tmp_path, **settings)
    dialogues, whole = Counter(), expected(name, tables_of(DATA / folder))
    if name == "PRISM":
        dialogues.update(user for user, _ in {key[:2] for key in whole})
    kept = {key for key in whole if key[-1] != key[-2] and '"EMPTY STRING"' not in key[-1]
            and (name != "PRISM" or dialogues[key[0]] >= 4)}  # fmt: skip
    assert set(listed(name, table)) == kept
    assert info["counts"][users] == table.user_id.nunique() == 173
    if name == "RedditTLDR":
        assert listed(name, table) == Counter({k: n for k, n in whole.items() if k in kept})
        assert info["overlap"]["both_responses"] == info["overlap"]["held_out"] == 20_101
