"""own_rows.py and messages.py: the layouts that people's files have, and likely mistakes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_own_data import case

import worlds
from lore.common.files import InputError
from lore.elicitation.choices import Pair, read_pool, read_user_choices
from lore.preparing.messages import structure
from lore.preparing.own_rows import Choice, Columns, read_choices
from lore.preparing.raw import Cell
from lore.preparing.tables import Funnel

Rows = list[dict[str, Any]]


def read(rows: Rows, **columns: Any) -> list[Choice]:
    placed = ((f"t.jsonl row {i}", row) for i, row in enumerate(rows, start=1))
    return read_choices(placed, Columns(**columns))


def said(choice: Choice) -> tuple[str, str]:
    """The last words of both sides."""
    return choice.chosen[0][-1]["content"], choice.rejected[0][-1]["content"]


def cells(row: dict[str, Any], write: Callable[[Any], str] = json.dumps) -> dict[str, Any]:
    """A row as a .csv has it, structure being JSON or what Python prints."""
    return {k: Cell(v if isinstance(v, str) else write(v)) for k, v in row.items()}


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# ------------------------------------------------------------------- Two and a winner

TWO = {"user": "ann", "prompt": "Why?", "response_a": "one", "response_b": "two"}
PAIR = {"user": "u", "prompt": "p", "chosen": "a", "rejected": "b"}


def voted(*winners: Any) -> Rows:
    return [{**TWO, "preferred": winner} for winner in winners]


def winners(rows: Rows, **columns: Any) -> list[str]:
    """What won in each row; "ties" for those left out."""
    return [choice.left_out or said(choice)[0] for choice in read(rows, **columns)]


@pytest.mark.parametrize(
    "values",  # that say one, two and perhaps tie
    [
        ["a", "b", "tie"], ["A", "B ", "Both"], [1, 2], ["1.0", "2.0", ""], [0, 1, None],
        [-1, 1, 0], ["left", "right", "neither"], ["model_a", "model_b", "tie (bothbad)"],
        ["Answer A", "Answer B", "equal"], ["response_a", "response_b"],
        ["Response 1", "response-2", "no preference"], ["A is better", "B wins"],
    ],
)  # fmt: skip
def test_verdicts_are_read_as_people_write_them(values):
    assert winners(voted(*values)) == ["one", "two", "ties"][: len(values)]


def test_flags_say_what_verdicts_and_ties_mean():
    given = {"first_wins": ("1",), "second_wins": ("0",)}
    assert winners(voted(0, 1, "tie"), **given) == ["two", "one", "ties"]
    given = {"first_wins": ("YES",), "second_wins": ("no",)}
    assert winners(voted("yes", "no"), **given) == ["one", "two"]
    found = read([{**row, "weight": 3} for row in voted("tie")], ties="half")
    both = [(*said(choice), choice.weight) for choice in found]
    assert both == [("one", "two", 1.5), ("two", "one", 1.5)]


@pytest.mark.parametrize(
    "names",
    [
        ("user_id", "question", "output_1", "output_2", "winner"),
        ("WorkerId", "Input.prompt", "Input.text_a", "Input.text_b", "Answer.choice"),
        ("annotator_id", "prompt", "answer1", "answer2", "label"),
        ("worker", "prompt", "completion_a", "completion_b", "preference"),
        ("user", "prompt", "Response A", "Response B", "chosen_response"),
        ("user", "prompt", "response_1", "response_2", "chosen"),
        ("turkerid", "prompt", "left_response", "right_response", "preferred"),
    ],
)
def test_common_names_of_columns_are_found_and_told(caplog, names):
    row = dict(zip(names, TWO.values(), strict=False))
    with caplog.at_level("INFO"):
        found = read([{**row, names[4]: winner} for winner in names[2:4]])
    assert [said(choice) for choice in found] == [("one", "two"), ("two", "one")]
    assert {choice.user for choice in found} == {"ann"}
    assert found[0].chosen[0][0] == message("user", "Why?")
    assert f"first {names[2]}, second {names[3]}, winner {names[4]}" in caplog.text


def test_three_columns_may_say_who_won():
    sides = ("winner_model_a", "winner_model_b", "winner_tie")
    rows = [TWO | {name: int(i == j) for j, name in enumerate(sides)} for i in range(3)]
    assert winners(rows) == ["one", "two", "ties"]


NAMED = [{**TWO, "best": "AB"[i % 2]} for i in range(8)]  # names of responses are no responses


@pytest.mark.parametrize(("rows", "columns", "message"), [
    *((voted(*values), {}, message) for values, message in (
        (["A", "C", "C"], r"t.jsonl: preferred has values that are not understood: 'c' \(2\)"),
        ([0, 1, 2], r"not understood: '0' \(1\), '1' \(1\), '2' \(1\); --first-wins and --sec"),
        ([1, 1], r"not understood: '1' \(2\)"),
        ([True, False], r"not understood: 'true' \(1\), 'false' \(1\)"),
        ([0.5, 1], "not understood: '0.5'"))),
    *(([row] * 3, columns, message) for row, columns, message in (
        (TWO, {}, "two responses, response_a and response_b, but --winner must say which"),
        ({**TWO, "label": 1, "choice": 2}, {}, "the better one: label, choice"),
        ({**TWO, "winner": 1}, {"first": "response_a"}, "--first and --second go together"),
        ({"text": "x", "winner": 1}, {"winner": "winner"}, "--first and --second must say whi"),
        ({**TWO, "text_1": "a", "text_2": "b", "winner": 1}, {"winner": "winner"},
         "response_a and response_b; text_1 and text_2"),
        ({**TWO, "preferred": "A"}, {"chosen": "response_a", "rejected": "response_b"},
         "no flag uses the column preferred; .* --winner preferred, else --winner none"),
        ({**TWO, "preferred": "A"}, {"winner": "best"}, "row 1 has no column best, only user"),
        (PAIR, {"user": "best"}, "row 1 has no column best, only user, prompt, .*; --user says"),
        ({**PAIR, "label": "safe"}, {}, "no flag uses the column label"))),
    (NAMED, {"chosen": "best", "rejected": "response_b"},
     "t.jsonl: best holds nothing but A, B, which are no responses"),
])  # fmt: skip
def test_a_layout_or_verdicts_that_are_not_clear_are_refused(rows, columns, message):
    with pytest.raises(InputError, match=message):
        read(rows, **columns)


def test_few_rows_may_have_short_responses_and_none_says_that_no_column_tells_a_winner():
    assert len(read(NAMED[:5], chosen="best", rejected="response_b")) == 5
    assert said(read([{**PAIR, "label": "safe"}], winner="none")[0]) == ("a", "b")


# ------------------------------------------------------------------- Lists of messages

ASKED, GOOD, BAD = message("user", "Why?"), message("assistant", "so"), message("assistant", "no")
SHAREGPT = [{"from": "human", "value": "Why?"}], {"from": "gpt", "value": "so"}


@pytest.mark.parametrize("as_csv", [False, True])
@pytest.mark.parametrize("row", [
    {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    {"prompt": "Why?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    {"prompt": "Why?", "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [ASKED], "chosen": "so", "rejected": "no"},
    {"messages": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    {"messages": [ASKED], "chosen": GOOD, "rejected": BAD},
    {"messages": [ASKED, GOOD], "prompt": "Why?", "chosen": [ASKED, GOOD],
     "rejected": [ASKED, BAD]},
    {"conversations": SHAREGPT[0], "chosen": SHAREGPT[1], "rejected": "no"},
    {"prompt": ["Why?"], "chosen": ["so"], "rejected": ["no"]},
    {"messages": [ASKED], "chosen": [[GOOD]], "rejected": [[BAD]]},
])  # fmt: skip
def test_messages_are_read_wherever_text_is(row, as_csv):
    row = {"user": "ann", **row}
    [choice] = read([cells(row) if as_csv else row])
    assert (choice.chosen, choice.rejected) == ([[ASKED, GOOD]], [[ASKED, BAD]])


def test_what_both_begin_with_is_the_prompt_of_longer_dialogues():
    both = [message("system", "be brief"), ASKED, GOOD, message("user", "And?")]
    [choice] = read([{"chosen": [*both, GOOD], "rejected": [*both, BAD]}])
    assert choice.chosen == [[*both, GOOD]] and choice.rejected == [[*both, BAD]]


def test_lists_of_texts_are_the_turns_of_both_sides():
    row = {"prompt": ["p", "q"], "chosen": ["a", "b"], "rejected": ["c", "d"]}
    for read_as in (row, cells(row), cells(row, repr)):
        [choice] = read([read_as])
        [talk] = choice.rejected
        assert [each["content"] for each in talk] == ["p", "c", "q", "d"]
        assert [each["role"] for each in talk] == ["user", "assistant"] * 2
    with pytest.raises(InputError, match="row 1: rejected has 1 turns, the prompt 2"):
        read([{**row, "rejected": ["c"]}])


def test_a_text_of_another_file_than_a_table_stays_a_text():
    row = {"prompt": '["p"]', "chosen": '["a", "b"]', "rejected": json.dumps([GOOD])}
    [choice] = read([row])
    assert (choice.chosen[0][0]["content"], *said(choice)) == tuple(row.values())
    [choice] = read([{"prompt": Cell("p"), "chosen": Cell('["a", "b"]'), "rejected": Cell("[1]")}])
    assert [talk[-1]["content"] for talk in choice.chosen] == ["a", "b"]
    assert choice.rejected[0][-1]["content"] == "[1]"


def test_a_cell_that_begins_as_messages_must_be_some():
    for cell in ("[{'role': 'user' 'x': open('f')}]", "[{'role': 'assistant', 'content': f()}]"):
        with pytest.raises(InputError, match="row 1: chosen begins as messages .*JSON nor Python"):
            structure(Cell(cell), "row 1", "chosen")


@pytest.mark.parametrize(
    "cell",
    ["[" * 10**5 + "]" * 10**5, "{" * 10**4 + "}", "[__import__('os').system('touch ran')]",
     "[open('ran', 'w')]", "{'role': 1}", "[1, 2]", "[]", "{}", "['\\d']", "[\x00]", "[9**9**9]",
     "[lambda: 0]", '[{"a": "b"}]', "[None]", '[{"role": "assistant", "content": "so"'],
)  # fmt: skip
def test_a_cell_that_looks_like_code_stays_a_text(tmp_path, monkeypatch, cell):
    monkeypatch.chdir(tmp_path)
    assert structure(Cell(cell), "row 1", "chosen") in (cell, ["\\d"])
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------- Ratings and users


def rated(*ratings: float, **more: str) -> Rows:
    asked = {"user": "ann", "prompt": "Why?", **more}
    return [{**asked, "response": f"answer {i}", "score": r} for i, r in enumerate(ratings)]


def test_ratings_of_one_prompt_make_pairs_of_their_user(caplog):
    rows = [*rated(1, 3, 2), *rated(5, 1, user="bob"), *rated(1, 2, prompt="Else?")]
    with caplog.at_level("INFO"):
        found = read(rows, rating="score")
    pairs = sorted((c.user, c.chosen[0][0]["content"], *said(c)) for c in found)
    assert pairs == [
        (user, prompt, f"answer {better}", f"answer {worse}")
        for user, prompt, better, worse in (("ann", "Else?", 1, 0), ("ann", "Why?", 1, 0),
            ("ann", "Why?", 1, 2), ("ann", "Why?", 2, 0), ("bob", "Why?", 0, 1))
    ]  # fmt: skip
    assert {choice.weight for choice in found} == {1}
    assert "7 ratings make 5 comparisons, 1 of which follow from two others" in caplog.text
    assert len(read(rows)) == 5  # found by its name


def test_a_margin_and_a_number_bound_the_pairs():
    assert len(read(rated(1, 2, 3, 4), rating="score", margin=2)) == 3
    assert not read(rated(2, 2), rating="score")
    some = read(rated(*range(20)), rating="score", pairs_per_user=7)
    assert len(some) == 7
    others = read(rated(*range(20))[::-1], rating="score", pairs_per_user=7)
    assert sorted(map(said, some)) == sorted(map(said, others))


def test_spellings_of_a_user_are_joined_and_told(caplog):
    names = ["Jos\u00e9", "Jose\u0301", " Jos\u00e9 ", "ann"]
    rows = [{**PAIR, "user": name} for name in names]
    with caplog.at_level("INFO"):
        assert [choice.user for choice in read(rows)] == ["Jos\u00e9"] * 3 + ["ann"]
    assert "2 spellings of users' names were joined" in caplog.text


def test_one_name_and_one_prompt_serve_all_rows():
    row = {"chosen": "a", "rejected": "b"}
    [choice] = read([row], user_name="me", prompt_text="Which?")
    assert choice.user == "me" and choice.chosen[0][0] == message("user", "Which?")


# ------------------------------------------------------------------- The tools read alike


def write(folder: Path, rows: Rows) -> Path:
    worlds.write(folder / "rows.jsonl", rows)
    return folder / "rows.jsonl"


def test_of_choices_ties_are_left_out_and_a_pool_needs_no_winner(tmp_path):
    chosen, _, row, _ = read_user_choices(write(tmp_path, voted("A", "tie", "B")))
    assert [talk[-1]["content"] for talk in chosen] == ["one", "two"]
    assert row.tolist() == [0, 1]
    for rows in ([TWO], voted("A", "B", "tie")):
        [pair] = read_pool(write(tmp_path, rows))
        assert pair.texts == ("one", "two")


def prepared(file: Path, columns: Columns) -> Rows:
    """What prepare.py makes of a file."""
    return worlds.script("OwnData/prepare.py").read(str(file), columns, Funnel())


def agree(file: Path, columns: Columns) -> None:
    """rank_responses.py and ask.py --pool read what prepare.py reads, each row as heavy."""
    rows, (chosen, rejected, _, weight) = prepared(file, columns), read_user_choices(file, columns)
    found = zip(chosen, rejected, weight.tolist(), strict=True)
    assert list(found) == [(row["chosen"], row["rejected"], row["weight"]) for row in rows]
    if any(row["chosen"][:-1] != row["rejected"][:-1] for row in rows):
        with pytest.raises(InputError, match="must be one message each, after the same dialogue"):
            read_pool(file, columns)
        return
    pairs = {pair.key for pair in read_pool(file, columns)}
    assert pairs >= {Pair.of(row["chosen"], row["rejected"]).key for row in rows}


@pytest.mark.parametrize(("rows", "columns"), [
    ([{**PAIR, "rejected": ["no", "or"]}, {**PAIR, "weight": 3}], {}),
    (voted("a", "tie", "b"), {"ties": "half"}),
    ([{**TWO, "best": best} for best in ("two", "one")],
     {"first": "response_a", "second": "response_b", "winner": "best",
      "first_wins": ("one",), "second_wins": ("two",)}),
    (rated(*range(4)), {"rating": "score", "margin": 2}),
])  # fmt: skip
def test_the_tools_read_every_layout_as_prepare_does(tmp_path, rows, columns):
    agree(write(tmp_path, rows), Columns(**columns))


# ------------------------------------------------------------------- Files that people have

OTHERS = {
    "C01-response-a-b-preferred.csv": ({}, 13),
    "C03-lmsys-lists-in-cells.csv": ({"user_name": "me"}, 9),
    "C03b-lmsys-winner-loser-cells.csv": ({}, 21),
    "C06-json-list-better-answer.json": ({}, 10),
    "C10-sharegpt-conversations.json": ({"user_name": "me"}, 6),
    "C11-crowd-pairs.tsv": ({"prompt_text": "Which argument is better?"}, 18),
}
SAME = ("C07-trl-implicit-prompt.jsonl", "C09-message-lists-as-text.csv", "C13-bom.jsonl",
        "C14-blank-last-line.jsonl", "C15-semicolons.csv", "C16-list.json",
        "C18-roles-human-gpt.jsonl")  # fmt: skip
COUNTS = {**OTHERS, **dict.fromkeys(SAME, ({}, 36))}
REFUSED = [
    ("C03-lmsys-lists-in-cells.csv", {}, "row 1 has no user; .* --user-name me names one"),
    ("C04-json-list-annotator-columns.json", {}, "response1 and response2, but --winner must say"),
    ("C10-sharegpt-conversations.json", {}, "row 1 has no user; .* --user-name me names one"),
    ("C12-mturk-batch.csv", {}, "row 1 has no column chosen, only HITId, .*; --chosen says"),
    ("C12-mturk-batch.csv",
     {"first": "Input.poem1", "second": "Input.poem2", "winner": "Answer.taskAnswers"},
     "Answer.taskAnswers has values that are not understood"),
]  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_a_file_that_people_have_goes_in(name):
    columns, count = COUNTS[name]
    found = prepared(case(name), Columns(**columns))
    roles = {tuple(message["role"] for message in row["chosen"][-2:]) for row in found}
    assert len(found) == count and roles == {("user", "assistant")}
    assert not any(row["chosen"][-1]["content"].startswith(("[{", '["')) for row in found)
    agree(case(name), Columns(**{**columns, "user_name": "me"}))


@pytest.mark.parametrize(("name", "columns", "message"), REFUSED)
def test_a_file_that_does_not_say_enough_is_one_line(name, columns, message):
    with pytest.raises(InputError, match=message) as error:
        prepared(case(name), Columns(**columns))
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
