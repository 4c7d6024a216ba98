"""Rows, settings and sources that cannot be: one line says which, and nothing is written."""

import math
from typing import Any

import pytest

import worlds
from lore.common.files import InputError

PLAIN = {name: {} if name == "PRISM" else {"embed": False} for name in worlds.SMALL}
GONE = object()  # the row lacks the column
USER, ANSWER = {"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}


def said(**change: Any) -> dict[str, Any]:
    """A PRISM conversation of two messages, the second one changed."""
    answer = {"turn": 0, "role": "model", "content": "b", "if_chosen": True, **change}
    answer = {k: v for k, v in answer.items() if v is not GONE}
    return {"conversation_history": [{"turn": 0, "role": "user", "content": "a"}, answer]}


def heard(*messages: Any) -> dict[str, Any]:
    """A row of OwnData with messages in the place of the prompt."""
    return {"prompt": None, "messages": list(messages)}


# Dataset and table -> what of row 3 is changed, what is said, perhaps after its place or its file
# (" ... " stands for any words), and settings, if any.
CASES: dict[tuple[str, str], list[tuple]] = {
    ("RedditTLDR", "train"): [
        *(({"choice": v}, f"choice must be 0 or 1, not {v!r}") for v in (2, None, "1", True, [1])),
        ({"worker": None}, "has an empty worker"), ({"worker": GONE}, "has no column worker"),
        *(({"summaries": value}, "summaries must be a list of two, not ") for value in (
            [{"text": "one"}], None, 5, "ab", {"text": "a", "note": "b"})),
        ({"summaries": ["a", "b"]}, "a summary must have a text, unlike 'a'"),
        ({"summaries": [{"text": ["a"]}, {"text": "b"}]}, "a summary must be text, not a list"),
        ({"info": None}, "info must hold the post"), ({"info": "p"}, "info must hold the post"),
        ({"info": {"id": "a", "post": 5}}, "info.post must be text, not a int"),
        ({}, "no comparisons are left: ... 0 workers with at least 99", {"min_annotations": 99}),
    ],
    ("PRISM", "conversations"): [
        ({"conversation_history": "hello"}, "conversation_history must be a list, not 'hello'"),
        ({"conversation_history": [5]}, "a message needs turn, role (user or model), content, unl"),
        ({"conversation_history": GONE}, "has no column conversation_history"),
        *((said(**change), "a message needs turn, role (user or model)") for change in (
            {"turn": -1}, {"turn": "0"}, {"turn": True}, {"turn": GONE}, {"role": GONE},
            {"role": "assistant"}, {"content": GONE})),
        (said(if_chosen="False"), "if_chosen must be true or false, not 'False'"),
        (said(content=["a", "b"]), "content must be text, not a list"),
        ({"conversation_id": "\udfff"}, "conversation_id holds half a surrogate pair"),
        ({"conversation_id": "c0"}, "has the conversation_id of an earlier row"),
        ({"user_id": ["user0"]}, "user_id must be text, not a list"),
    ],
    ("PRISM", "survey"): [
        ({"user_id": ["user0"]}, "user_id must be text, not a list"),
        ({"user_id": "user0"}, "has the user_id of an earlier row"),
        *(({"num_completed_conversations": value},
           f"num_completed_conversations must be a number, not {value!r}") for value in ("0", {})),
        ({}, "no comparisons are left: ... 0 participants with at least 40", {"min_dialogues": 40}),
        ({}, "--seen-fraction 1.0 of 3 users makes 3 of them seen; there must be seen and unseen",
         {"min_dialogues": 1, "seen_fraction": 1.0}),
        ({}, "--seen-fraction 0.5 of 1 users makes 0 of them seen", {"min_dialogues": 4}),
    ],
    ("PersonalLLM", "train"): [
        ({"prompt": ""}, "has an empty prompt"), ({"prompt": 5}, "prompt must be text, not a int"),
        ({"response_5": None}, "has no response_5: eight responses are expected"),
        ({"response_5": 5}, "response_5 must be text, not a int"),
        ({"response_9": "one more"}, "has response_9: eight responses are expected"),
        *(({"response_2_beaver_7b": v}, f"response_2_beaver_7b must be a number, not {v!r:.40}")
          for v in (None, "0.5", math.nan, math.inf, True, 1e39, -(10**400))),
        *(({column: GONE}, f"has no column {column}") for column in (
            "prompt", "response_8", "response_3_mistral_ray")),
    ],
    ("CommunityAlignment", "train"): [
        ({"annotator_id": math.nan}, "annotator_id must be text, not a float"),
        ({"conversation_id": ""}, "has an empty conversation_id"),
        ({"assigned_lang": ["en"]}, "assigned_lang must be text, not a list"),
        ({"first_turn_prompt": 5}, "first_turn_prompt must be text, not a int"),
        ({"second_turn_response_c": GONE}, "has no column second_turn_response_c"),
        ({}, "--language xx is none of those there: en", {"language": "xx"}),
        ({}, "no comparisons are left: ... 0 annotators with at least 50 comparisons", {}),
        ({}, "--seen-fraction 0.0 of 2 users makes 0 of them seen",
         {"min_comparisons": 1, "seen_fraction": 0.0}),
    ],
    ("PersonalRewardBench", "test"): [
        ({"user_id": None}, "has an empty user_id"),
        ({"split": 0.5}, "split must be text, not a float"),
        ({"context": "hello"}, "context must be a list of role and content"),
        ({"context": [{"role": "user"}]}, "a message must have role and content"),
        ({"chosen": {"role": "model"}}, "chosen is a message without content"),
        ({"rejected": ["a", "b"]}, "rejected must be text, not a list"),
        ({"conversation_id": ["c"]}, "conversation_id must be text, not a list"),
        *(({column: GONE}, f"has no column {column}") for column in (
            "user_id", "split", "context", "chosen", "rejected")),
    ],
    ("OwnData", "mine"): [
        ({"user": None}, "has no user; name the user, or the column by --user; --user-name me"),
        ({"user": {"name": "ann"}}, "user must be text, not a dict"),
        ({"prompt": USER}, "prompt must be text, not a dict"),
        ({"prompt": [1, 2]}, "a message must have role and content, unlike 1"),
        ({"prompt": GONE}, "has neither prompt nor messages; name the column by --prompt, or one"),
        ({"messages": [USER]}, "has both prompt and messages; leave one out"),
        *(({"prompt": None, "messages": value}, "messages must be a list of role and")
          for value in ({"a": 1}, "[]")),
        (heard({"role": "user"}), "a message must have role and"),
        (heard({"role": "user", "content": ["p"]}), "content must be text, not a list"),
        (heard({**USER, "role": "wizard"}), "the role 'wizard' is not known; user, human, "),
        (heard(USER, ANSWER), "messages ends with the assistant, so that nothing is to be"),
        ({"chosen": []}, "chosen is an empty list; give a response or remove the row"),
        ({"chosen": 5}, "chosen must be text, not a int"),
        ({"chosen": [[]]}, "each chosen must be text, not a list"),
        ({"chosen": [USER]}, "chosen must end with a message of the assistant"),
        ({"chosen": [USER, ANSWER]}, "some of chosen and rejected begin with the assistant"),
        ({"chosen": [{**USER, "content": "Else?"}, ANSWER], "rejected": [USER, ANSWER]},
         "chosen and rejected do not begin with the same message of the user"),
        ({"prompt": "Else?", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
         "chosen and rejected do not begin with what prompt says"),
        ({"prompt": None, "messages": [{**USER, "content": "Else?"}], "chosen": [USER, ANSWER],
          "rejected": [USER, ANSWER]}, "chosen and rejected do not begin with what messages says"),
        *(({column: GONE}, f"has no column {column}, only user, prompt, {other}; --{column} says "
           "which one holds it (or give --first, --second and --winner, or --rating)")
          for column, other in (("chosen", "rejected"), ("rejected", "chosen"))),
        ({"rejected": ["a", 5]}, "each rejected must be text, not a int"),
        ({"split": ["train"]}, "split must be text, not a list"),
        *(({"weight": value}, f"weight must be a number, not {value!r}") for value in (
            {"a": 1}, math.nan, "much")),
        *(({"weight": value}, "weight must be above 0, from 1e-06 to 1e+06; remove the row if it")
          for value in (-1, 1e30, 1e-12)),
        ({"timestamp": "yesterday"}, "timestamp must be a number or an ISO date, not 'yest"),
        ({"timestamp": [1]}, "timestamp must be a number, not [1]"),
        ({"dialog": "d"}, "row 1 has no dialog, but ... row 3 has; fill it in everywhere or leave"),
        ({"split": "train"}, "row 1 has no split, but ... row 3 has; fill it in everywhere or lea"),
        ({}, "row 1 has no column chosen_wide, which --extra wide reads", {"extra": ("wide",)}),
        *(({"chosen_n": value}, f"chosen_n must be a number, not {value!r}", {"extra": ("n",)})
          for value in ("long", [1])),
        ({"chosen": ["a", "b"]}, "--extra needs one response on either side", {"extra": ("n",)}),
        ({}, "no comparisons are left: 4 rows; ... 0 users with at lea", {"min_comparisons": 3}),
        *(({}, f"--split {by}: the rows have none; choose another", {"split": by})
          for by in ("given", "dialogs")),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "table", "case"), [(*key, case) for key in CASES for case in CASES[key]]
)
def test_what_cannot_be_is_one_line(tmp_path, name, table, case):
    change, message, settings = (*case, {})[:3]
    for file, rows in worlds.small(name).items():
        if file == table:
            changed = {k: v for k, v in {**rows[2], **change}.items() if v is not GONE}
            rows = [*rows[:2], changed, *rows[3:]]
            if "extra" in settings:
                rows = [{"chosen_n": 1, "rejected_n": 2, **row} for row in rows]
        worlds.write(tmp_path / "raw" / f"{file}.jsonl", rows)
    with pytest.raises(InputError) as error:
        worlds.prepare(name, tmp_path / "raw", tmp_path / "data", **PLAIN[name], **settings)
    said, file = str(error.value), f"{tmp_path / 'raw' / table}.jsonl"
    begins, *more = message.split(" ... ")
    places = (f"{file} row 3 ", f"{file} row 3: ", f"{file} ", "")
    assert said.startswith(tuple(f"{place}{begins}" for place in places)), said
    assert all(words in said for words in more), said
    assert "\n" not in said and len(said) < 600
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("PersonalLLM", "", "--source is empty"),
        ("PersonalLLM", "empty/train.parquet", ".*train.parquet is a file; name its folder"),
        ("PersonalLLM", "empty", "--source .*empty has no test rows"),
        ("PRISM", ".", r"--source .* has none of survey.jsonl, survey.jsonl.gz, .*parquet$"),
        ("OwnData", "none.jsonl", "--source .*none.jsonl: there is no such file$"),
        ("OwnData", ".", "--source .* has no file that ends in .jsonl, .ndjson, .json, .csv, .tsv"),
        ("OwnData", "", "--source is empty; name a file, a folder or a hub dataset$"),
    ],
)
def test_a_source_without_rows_is_named(tmp_path, name, source, message):
    worlds.personalllm(tmp_path / "empty", train=1, test=1)
    (tmp_path / "empty" / "test.parquet").unlink()
    (tmp_path / "empty" / "test.jsonl").touch()
    with pytest.raises(InputError, match=f"^{message}"):
        worlds.prepare(name, source and str(tmp_path / source), tmp_path / "data", **PLAIN[name])
