"""Every dataset's prepare.py: comparisons, what is left out, who is kept, splits and overlap."""

import functools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import WORLDS
from safetensors.numpy import load_file

import worlds
from lore.common.files import InputError
from lore.preparing import raw
from lore.preparing.tables import read_info

DATA = worlds.ROOT.parent / "shared" / "data"
Row = dict[str, Any]


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Callable[..., Path]:
    """A dataset's raw world, small and written once; no test changes it."""

    @functools.cache
    def get(name: str, **size: Any) -> Path:
        small = {"CommunityAlignment": {"annotators": 4, "conversations": 8},
                 "RedditTLDR": {"workers": 4}}.get(name, {})  # fmt: skip
        return WORLDS[name][0](tmp_path_factory.mktemp("raw"), **{**small, **size})

    return get


def prepare(name: str, source: Path, out: Path, **settings: Any) -> tuple[Row, pd.DataFrame]:
    """What prepare.json says, and the comparisons with their conversations; none is embedded."""
    settings = {**WORLDS[name][2], **({} if name == "PRISM" else {"embed": False}), **settings}
    info = worlds.prepare(name, source, out, **settings)
    return info, pd.DataFrame() if name == "PersonalLLM" else worlds.comparisons(out)


def asked(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


Turns = list[tuple[str, str, list[str]]]  # what was asked, chosen and rejected


def compared(key: tuple, turns: Turns) -> Iterator[tuple]:
    """The comparisons of a dialogue, which goes on from what was chosen."""
    history = []
    for number, (prompt, won, others) in enumerate(turns):
        history += [asked(prompt)]
        for lost in others:
            yield *key, number, [*history, said(won)], [*history, said(lost)]
        history += [said(won)]


def loop_tldr(file: str, row: Row) -> Iterator[tuple]:
    won, lost = (row["summaries"][i]["text"] for i in (row["choice"], 1 - row["choice"]))
    key = (row["worker"], {"validation": "test"}.get(file, file), row["info"]["id"])
    return compared(key, [(row["info"]["post"], won, [lost])])


def loop_prism(file: str, row: Row) -> Iterator[tuple]:
    turns: Turns = []
    for turn in range(row.get("conversation_turns", 0)):
        ask, *answers = (m for m in row["conversation_history"] if m["turn"] == turn)
        (won,) = {m["content"] for m in answers if m["if_chosen"]}
        turns.append((ask["content"], won, sorted({m["content"] for m in answers} - {won})))
    return compared((row["user_id"], row.get("conversation_id")), turns)


def loop_community(file: str, row: Row, language: str = "en") -> Iterator[tuple]:
    turns: Turns = []
    for turn in worlds.TURNS if row["assigned_lang"] == language else ():
        if (prompt := row[f"{turn}_turn_prompt"]) != "EMPTY STRING":
            answers = {f"response_{x}": row[f"{turn}_turn_response_{x}"] for x in "abcd"}
            won = answers.pop(row[f"{turn}_turn_preferred_response"])
            turns.append((prompt, won, list(answers.values())))
    return compared((row["annotator_id"], row["conversation_id"]), turns)


def loop_rewardbench(file: str, row: Row) -> Iterator[tuple]:
    history = [(said if m["role"] == "model" else asked)(m["content"]) for m in row["context"]]
    key = (row["user_id"], row["split"], row["conversation_id"], len(history) // 2)
    yield *key, *([*history, said(row[side]["content"])] for side in ("chosen", "rejected"))


LOOPS = {"RedditTLDR": loop_tldr, "PRISM": loop_prism, "CommunityAlignment": loop_community,
         "PersonalRewardBench": loop_rewardbench}  # fmt: skip
KEY = ["user_id", "split", "dialog_id", "turn"]  # of a comparison; the split where it is given


def tables_of(source: Path) -> dict[str, list[Row]]:
    """The rows of a source's tables."""
    return {path.name.split(".")[0]: worlds.read(path) for path in source.iterdir()}


def written(folder: Path, tables: dict[str, list[Row]], ending: str = "jsonl") -> Path:
    """A source of such tables."""
    for name, rows in tables.items():
        worlds.write(folder / f"{name}.{ending}", rows)
    return folder


def expected(name: str, tables: dict[str, list[Row]], **more: Any) -> Counter[tuple]:
    """The comparisons that rows make, the conversations as JSON, by a plain loop."""
    found = (each for file, rows in tables.items() for row in rows
             for each in LOOPS[name](file, row, **more))  # fmt: skip
    return Counter((*key, json.dumps(won), json.dumps(lost)) for *key, won, lost in found)


def listed(name: str, table: pd.DataFrame) -> Counter[tuple]:
    """The comparisons of a prepared folder in the same form."""
    is_given = name in ("RedditTLDR", "PersonalRewardBench")
    return Counter(worlds.as_tuples(table, [key for key in KEY if is_given or key != "split"]))


WORLD_SAYS = {  # messages in the longest conversation, whether all are seen, and some counts
    "RedditTLDR": (2, True, {"rows of train": 120, "rows of validation": 120}),
    "PRISM": (6, False, {"participants": 8, "seen users": 4, "first prompts on both sides": 0}),
    "CommunityAlignment": (8, False, {"conversations": 70, "seen users": 2}),
    "PersonalRewardBench": (4, True, {"comparisons": 60, "training comparisons": 22,
                                      "validation comparisons": 20, "test comparisons": 18}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, {}) for name in WORLD_SAYS), ("CommunityAlignment", {"language": "fr"})],
)
def test_comparisons_are_those_of_a_plain_loop(world, tmp_path, name, settings):
    source = world(name)
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
    assert_overlap_is_counted(info["overlap"], table)


def assert_overlap_is_counted(overlap: Row, table: pd.DataFrame) -> None:
    """What prepare.json says of training and held-out comparisons is what sets of pairs count."""
    train, test = ([{won, lost} for won, lost in worlds.as_tuples(table[table.split == side], [])]
                   for side in ("train", "test"))  # fmt: skip
    known, prompts = set().union(*train), table.chosen.map(lambda talk: json.dumps(talk[:-1]))
    found = {
        "held_out": len(test),
        "prompt": prompts[table.split == "test"].isin(prompts[table.split == "train"]).sum(),
        "response": sum(not pair.isdisjoint(known) for pair in test),
        "both_responses": sum(pair <= known for pair in test),
        "pair": sum(pair in train for pair in test),
    }
    sentence = overlap.pop("sentence")
    assert overlap == found
    assert f"Of {found['held_out']:,} held-out" in sentence and f"{found['pair']:,} the" in sentence


def given(**change: Any):
    return lambda row: row.update(change)


def history(change):
    """A change of the messages of a PRISM conversation."""
    return lambda row: row.update(conversation_history=change(row["conversation_history"]))


MODEL_SAYS = {"role": "model", "content": "hello"}
NOT_THE_USER = "rows whose context does not end with a message of the user"
ALL, CUT, REJECTED = None, "dialogues cut at ", "rejected responses "
# What becomes of a row, why it is left out, and how many of its comparisons are lost (-3: but 3).
# Of a row's first answers, PRISM's message 4 and Community Alignment's response_a are the chosen.
CASES = {
    ("PRISM", "conversations"): [
        (history(lambda h: [{**m, "if_chosen": m["role"] == "model"} for m in h]),
         f"{CUT}a turn with several chosen responses", ALL),
        (history(lambda h: [{**m, "if_chosen": False} for m in h]),
         f"{CUT}a turn with no chosen responses", ALL),
        (history(lambda h: [m for m in h if m["turn"] != 1]), f"{CUT}a missing turn", 2),
        (history(lambda h: [*h, h[0]]), f"{CUT}a turn with several user messages", ALL),
        (history(lambda h: [h[0] | {"content": " "}, *h[1:]]), f"{CUT}an empty prompt", ALL),
        (given(user_id="nobody"), "conversations of participants who are not in the survey", ALL),
        (history(lambda h: [h[0], h[1] | {"content": "EMPTY STRING"}, *h[2:]]),
         f"{REJECTED}empty", 1),
        (history(lambda h: [h[0], h[4] | {"if_chosen": False}, *h[2:]]),
         f"{REJECTED}equal to the chosen one", 1),
    ],
    ("CommunityAlignment", "train"): [
        (lambda row: row.update({n: "EMPTY STRING" for n in row if n.startswith("second_turn")}),
         f"{CUT}a missing turn", -3),
        (given(first_turn_response_a="EMPTY STRING"), f"{CUT}an empty chosen response", ALL),
        (given(first_turn_response_b="EMPTY STRING"), f"{REJECTED}empty", 1),
        (given(first_turn_preferred_response="response_e"),
         f"{CUT}a preferred_response that names no response", ALL),
    ],
    ("RedditTLDR", "train"): [
        (given(summaries=[{"text": ""}, {"text": "b"}]), "rows with an empty summary", ALL),
        (given(summaries=[{"text": "a"}, {"text": None}]), "rows with an empty summary", ALL),
        (given(summaries=[{"text": "a"}] * 2), f"{REJECTED}equal to the chosen one", ALL),
        (given(choice=None, extra={"tie": True}), "ties", ALL),
        (given(info={"id": "t3_0", "post": "EMPTY STRING"}), "rows without a post", ALL),
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
def test_what_cannot_be_used_is_counted(world, tmp_path, capsys, name, file, change, why, lost):
    tables = tables_of(world(name))
    row = max(tables[file], key=lambda row: expected(name, {file: [row]}).total())  # with most
    whole, of_row = expected(name, tables), expected(name, {file: [row]})
    change(row)
    settings = {"min_dialogues": 5} if name == "PRISM" else {}
    info, table = prepare(name, written(tmp_path / "raw", tables), tmp_path / "data", **settings)
    assert {k: n for k, n in info["counts"].items() if "left out" in k} == {f"left out: {why}": 1}
    assert f"1  left out: {why}" in capsys.readouterr().out
    left = listed(name, table)
    assert left <= whole and whole - left <= of_row
    total = of_row.total()
    assert (whole - left).total() == (total if lost is ALL else lost % total) > 0


BOTH = "users with dialogues for training and for test"
# w01 has no test rows, w02 fifteen rows of either split, en0 one row, user0 to user2 lack a split.
WITHOUT = {
    "RedditTLDR": lambda file, row, i: (row["worker"] == "w01" and file == "validation"
                                        or row["worker"] == "w02" and i >= 15 * 4),
    "CommunityAlignment": lambda file, row, i: i and row["annotator_id"] == "en0",
    "PersonalRewardBench": lambda file, row, i: (row["user_id"], row["split"]) in (
        ("user0", "train"), ("user1", "test"), ("user2", "val")),
}  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "counts", "lost"), [
    ("PRISM", {"min_dialogues": 7}, {"participants with at least 7 dialogues": 5},
     {"user0", "user3", "user6"}),
    ("RedditTLDR", {"min_annotations": 30},
     {"workers with at least 30 annotations": 4,
      "workers with at least 30 annotations, some in both splits": 3}, {"w01"}),
    ("CommunityAlignment", {"min_comparisons": 1},
     {"annotators with at least 1 comparisons": 4, BOTH: 3}, {"en0"}),
    ("CommunityAlignment", {"min_comparisons": 60},  # en3 has so many
     {"annotators with at least 60 comparisons": 2}, {"en0", "en1"}),
    ("PersonalRewardBench", {},
     {"users with comparisons": 6, "users with comparisons for training and for test": 4},
     {"user0", "user1"}),
])  # fmt: skip
def test_users_with_too_little_are_left_out(world, tmp_path, name, settings, counts, lost):
    without = WITHOUT.get(name, lambda file, row, i: False)
    kept = {file: [row for i, row in enumerate(rows) if not without(file, row, i)]
            for file, rows in tables_of(world(name)).items()}  # fmt: skip
    info, table = prepare(name, written(tmp_path / "raw", kept), tmp_path / "data", **settings)
    whole = expected(name, kept)
    assert {**info["counts"], **counts} == info["counts"] and lost < {user for user, *_ in whole}
    assert listed(name, table) == Counter({k: n for k, n in whole.items() if k[0] not in lost})


def test_participants_without_a_completed_conversation_are_left_out(world, tmp_path):
    tables = tables_of(world("PRISM"))
    for participant, count in enumerate((0, None)):
        tables["survey"][participant]["num_completed_conversations"] = count
    counts = prepare("PRISM", written(tmp_path / "raw", tables), tmp_path / "data")[0]["counts"]
    assert counts["participants with a completed conversation"] == 6
    assert counts["left out: conversations of participants with no completed conversation"] == 13


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [*((name, {}) for name in WORLDS), ("CommunityAlignment", {"unseen_prompts": True})],
)
def test_order_of_the_rows_and_their_format_do_not_matter(world, tmp_path, name, more):
    source = world(name, **WORLDS[name][1])
    tables, is_parquet = tables_of(source), any(source.glob("*.parquet"))
    for rows in tables.values():
        random.Random(0).shuffle(rows)
        if name == "RedditTLDR":  # a column of whole numbers with a gap anywhere is one of floats
            rows[:] = [row | {"choice": float(row["choice"])} for row in rows]
    other = written(tmp_path / "raw", tables, "jsonl.gz" if is_parquet else "parquet")
    first, second = (prepare(name, raw, tmp_path / out, **more)[0]
                     for raw, out in ((source, "a"), (other, "b")))  # fmt: skip
    assert first.pop("settings") != second.pop("settings")  # another source
    assert first == second
    for file in first["files"]:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(("name", "fraction"), [("PRISM", 0.75), ("CommunityAlignment", 0.34)])
def test_splits_are_by_dialogue_and_by_user(world, tmp_path, name, fraction):
    made = [prepare(name, world(name), tmp_path / str(seed), seed=seed, seen_fraction=fraction)
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


def test_shared_prompts_are_counted_and_may_be_kept_apart(world, tmp_path):
    source = world("CommunityAlignment")
    for unseen_prompts in (False, True):
        more = {"unseen_prompts": unseen_prompts}
        info, table = prepare("CommunityAlignment", source, tmp_path / str(more), **more)
        prompts = table.chosen.map(lambda messages: messages[0]["content"])
        train, test = (set(prompts[table.split == side]) for side in ("train", "test"))
        assert bool(train & test) != unseen_prompts
        after = prompts[table.split == "test"].isin(train).sum()
        assert info["counts"]["first prompts on both sides"] == len(train & test)
        assert info["counts"]["test comparisons after such a prompt"] == after
        assert (table.groupby("user_id").split.nunique() == 2).all()
    assert abs(len(train) - len(test)) <= 1


def test_a_validation_comparison_is_none_that_training_has(world, tmp_path):
    """Overlap is told of training alone, and settings are chosen by the other."""
    rows = tables_of(world("PersonalRewardBench", users=1))["train"]
    same = {key: rows[2][key] for key in ("context", "chosen", "rejected")}
    assert [row["split"] for row in rows[:3]] == ["train", "val", "test"]
    for number, pairs in ((0, 1), (1, 0)):
        some = [{**row, **same} if i == number else row for i, row in enumerate(rows)]
        source = written(tmp_path / str(number), {"all": some})
        info, _ = prepare("PersonalRewardBench", source, source / "data")
        assert info["overlap"]["pair"] == pairs and info["counts"]["users with comparisons"] == 1


def test_without_a_name_a_dialogue_is_its_first_prompt(world, tmp_path):
    rows = tables_of(world("PersonalRewardBench", users=1))["train"]
    for row in rows:
        del row["conversation_id"]
    more = [MODEL_SAYS, asked("and then?")]
    rows[3] |= {"context": [*rows[0]["context"], *more], "chosen": "plainly"}
    source = written(tmp_path / "raw", {"all": rows})
    _, table = prepare("PersonalRewardBench", source, tmp_path / "data")
    mine = table[table.split == "train"]
    (twice,) = mine.dialog_id[mine.dialog_id.duplicated()]
    assert sorted(mine.turn[mine.dialog_id == twice]) == [0, 1]
    assert said("plainly") in mine.chosen.map(lambda messages: messages[-1]).tolist()


def test_scores_lie_with_their_conversations_and_what_both_sides_have_is_counted(
    world, tmp_path, capsys
):
    tables = tables_of(world("PersonalLLM", train=10, test=4))
    first, second = tables["train"][:2]
    first["response_8"] = first["response_1"]
    tables["test"][2].update(prompt=first["prompt"], response_2="")
    tables["test"][3].update(prompt=second["prompt"], response_2=second["response_7"])
    info, _ = prepare("PersonalLLM", written(tmp_path / "raw", tables), tmp_path / "data")
    tensors = load_file(tmp_path / "data" / "scores.safetensors")
    talks = pq.read_table(tmp_path / "data" / "conversations.parquet")["messages"].to_pylist()
    for split, prompts in {"train": 10, "test": 4}.items():
        scores, rows = tensors[f"{split}.scores"], tensors[f"{split}.rows"]
        assert (scores.shape, scores.dtype) == ((prompts, 8, 10), np.float32)
        assert (rows.shape, rows.dtype) == ((prompts, 8), np.int64)
        by_prompt = {row["prompt"]: row for row in tables[split]}
        for prompt in range(prompts):
            row = by_prompt.pop(talks[rows[prompt, 0]][0]["content"])
            for i in range(8):
                name = f"response_{i + 1}"
                assert talks[rows[prompt, i]] == [asked(row["prompt"]), said(row[name])]
                of_name = [np.float32(row[f"{name}_{scorer}"]) for scorer in worlds.SCORERS]
                assert scores[prompt, i].tolist() == of_name
    counts, overlap = info["counts"], info["overlap"]
    assert len(talks) == counts["distinct conversations"] == 14 * 8 - 2
    assert counts["prompts on both sides"] == 2 and counts["test responses without text"] == 1
    assert "2  prompts on both sides" in capsys.readouterr().out
    said_of_it = overlap.pop("sentence")
    assert overlap == {"held_out": 4, "prompt": 2, "response": 1}
    assert said_of_it.startswith("Of 4 held-out prompts, 2 are training prompts too, 1 of them")


def test_the_list_form_prints_a_list_and_warns_everywhere(world, tmp_path, capsys, caplog):
    info, table = prepare("PRISM", world("PRISM"), tmp_path, rejected="list")
    assert "Python list" in info["warning"]
    assert f"WARNING: {info['warning']}" in capsys.readouterr().out
    answers: dict[tuple, set[str]] = {}
    for *turn, lost in expected("PRISM", tables_of(world("PRISM"))):
        answers.setdefault(tuple(turn), set()).add(json.loads(lost)[-1]["content"])
    found = {}
    for *turn, lost in listed("PRISM", table):  # one comparison a turn
        printed = json.loads(lost)[-1]["content"]
        found[tuple(turn)] = set(json.loads(printed.replace("'", '"')))
    assert found == answers and len(table) == len(answers)
    read_info(tmp_path)
    assert info["warning"] in caplog.text


def test_embedding_needs_a_prepared_folder_and_a_model(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="run prepare.py first"):
        worlds.script("PRISM/generate-prism-embeddings.py").main(data=tmp_path)
    for read in ("read_rows", "read_all"):
        monkeypatch.setattr(raw, read, lambda *args, **hub: pytest.fail("data were read"))
    for name in set(WORLDS) - {"PRISM"} | {"OwnData"}:
        with pytest.raises(ValueError, match="typo"):
            worlds.prepare(name, tmp_path, tmp_path / "data", model=str(tmp_path / "typo"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "folder", "settings"), [
    ("PRISM", "prism_slice", {"min_dialogues": 4}),
    ("RedditTLDR", "ukpconvarg_as_tldr", {"min_annotations": 50}),
])  # fmt: skip
def test_the_real_data(tmp_path, name, folder, settings):
    """Counted once more from the raw files: 173 people in either, all pairs of unequal texts."""
    if not (DATA / folder).exists():
        pytest.skip(f"{folder} is not beside the project")
    info, table = prepare(name, DATA / folder, tmp_path, **settings)
    found, whole = listed(name, table), expected(name, tables_of(DATA / folder))
    dialogues = Counter(user for user, _ in {key[:2] for key in whole})
    kept = {key: n for key, n in whole.items() if key[-1] != key[-2]
            and '"EMPTY STRING"' not in key[-1] and (name != "PRISM" or dialogues[key[0]] >= 4)
            }  # fmt: skip
    assert set(found) == set(kept) and table.user_id.nunique() == 173
    if name == "RedditTLDR":
        assert found == kept
        assert info["overlap"]["both_responses"] == info["overlap"]["held_out"] == 20_101
