"""raw.py and preparing.py: rows, cells, comparisons, splits and the prepared folder."""

import gzip
import json
from functools import partial
from unittest import mock

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import worlds
from lore.common.files import InputError
from lore.preparing import raw
from lore.preparing import tables as preparing
from lore.preparing.tables import Funnel

FIRST = b'{"a": 1}\n'


@pytest.mark.parametrize(("name", "content", "message"), [
    *((f"t.jsonl{end}", pack(FIRST + line + b"\n"), f" {message}")
      for end, pack in (("", bytes), (".gz", partial(gzip.compress, mtime=0)))
      for line, message in (
          (b'{"a": ', "row 2 is not valid JSON"),
          (b'{"a": ' + b"9" * 6000 + b"}", "row 2 is not valid JSON: Exceeds the limit"),
          (b"[" * 100_000, "row 2 is not valid JSON: maximum recursion depth"),
          (b"[1]", "row 2 is not a JSON object"),
          (b"\xff\xfe", r"cannot be read( after row 1)?: 'utf-8' codec"))),
    ("cut.jsonl.gz", gzip.compress(FIRST * 1000, mtime=0)[:-10], " cannot be read"),
    ("plain.jsonl.gz", b"plain text", " cannot be read"),
    ("p.parquet", b"PAR1 and nothing else", " cannot be read"),
    ("t.csv", b"a,b\n1,2,3\n", " row 1 has 3 cells, the first line 2; .* by commas"),
    ("t.txt", b"", ": a file's name must end in .jsonl, .ndjson, .json, .csv"),
    ("t.csv", b"a,b,a\n1,2,3\n", " has two columns a; leave one of each"),
    ("t.jsonl", b'{"a": 1, "a": 2}', " row 1 has two keys a; leave one of each"),
    ("u.jsonl", b'{"a": [{"b": 1, "b": 1}]}', " row 1 has two keys b; leave one of each"),
    ("t.json", b'[{"a": 1, "a": 2}]', " has two keys a; leave one of each"),
    ("twice.parquet", None, " has two columns a; leave one of each"),
])  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    file = tmp_path / name
    if content is None:
        pq.write_table(pa.table([[1], [2], [3]], names=["a", "b", "a"]), file)
    else:
        file.write_bytes(content)
    with pytest.raises(InputError, match=f"^{file}{message}[^\n]*$"):
        list(raw.read_file(file))


ROWS = [{"user": "José", "prompt": 'say "a, b"; or\tc'}, {"user": "ann", "prompt": "two\nlines"}]
LINES = "\n\n".join(json.dumps(row) for row in ROWS) + "\n \n"  # with blank ones


def as_table(separator: str) -> str:
    return pd.DataFrame(ROWS).to_csv(sep=separator, index=False) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [("t.json", json.dumps(ROWS, indent=1)),
     *((f"t.{ending}", LINES) for ending in ("json", "ndjson", "jsonl")),
     *(("t.csv", as_table(separator)) for separator in ",;\t"), ("t.tsv", as_table("\t"))],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_same_rows_are_read_from_files_of_any_kind(
    tmp_path, caplog, name, content, packed, encoding
):
    caplog.set_level("INFO")
    data, file = content.encode(encoding), tmp_path / (name + ".gz" * packed)
    file.write_bytes(gzip.compress(data) if packed else data)
    assert [row for _, row in raw.read_file(file)] == ROWS
    told = f"{file}: cells are separated by semicolons" in caplog.messages
    assert told == (content == as_table(";"))


LONG = "x" * 200_000


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("t.csv", "a,b,c\n1,2\n\n3\n",  # cells that are missing at the end are empty
         [{"a": "1", "b": "2", "c": ""}, {"a": "3", "b": "", "c": ""}]),
        ("t.tsv", "# #id    label    a1\n5\tx\tsome  text\n",  # a first line set with blanks
         [{"# #id": "5", "label": "x", "a1": "some  text"}]),
        ("t.csv", f'\ufeffuser,prompt\na,"two\nlines, and a comma"\nb,{LONG}\n',
         [{"user": "a", "prompt": "two\nlines, and a comma"}, {"user": "b", "prompt": LONG}]),
    ],
    ids=("missing", "blanks", "spreadsheet"),
)  # fmt: skip
def test_what_a_table_holds(tmp_path, name, content, rows):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert [row for _, row in raw.read_file(tmp_path / name)] == rows


NOT = [True, ["a"], {"a": 1}, float("nan")]  # neither texts nor names nor numbers


def test_what_a_cell_holds():
    texts = [raw.text(value, "row", "x") for value in (None, " \n", "EMPTY STRING", " a ", "é")]
    assert texts == ["", "", "", " a ", "é"] and raw.number(2, "row", "x") == 2.0
    assert [raw.name(value, "row", "x") for value in (7, 7.0, "0", "a")] == ["7", "7", "0", "a"]


@pytest.mark.parametrize(("read", "value", "message"), [
    *((raw.text, value, f"row 1: score must be text, not a {type(value).__name__}$")
      for value in (*NOT, 5, 5.0, b"a")),
    *((read, half, "row 1: score holds half a surrogate pair; clean the text$")
      for read in (raw.text, raw.name) for half in ("\ud800", "a\udc00")),
    *((raw.name, value, "row 1.* score") for value in (*NOT, None, "", " ", 7.5, float("inf"))),
    *((raw.number, value, "row 1: score must be a number, not .{1,40}$")
      for value in (*NOT, None, "1", float("inf"), 1e39, 10**400)),
])  # fmt: skip
def test_what_a_cell_cannot_hold(read, value, message):
    with pytest.raises(InputError, match=message):
        read(value, "row 1", "score")


@pytest.mark.parametrize(
    ("last", "why"),
    [(("q", "", ["b"]), "dialogues cut at an empty chosen response"), (("q", "b", ["b"]), "later")],
)
def test_the_first_reason_why_a_dialogue_ends_is_counted(last, why):
    funnel, turns = Funnel(), [("p", "a", ["b"]), last]
    (found,) = preparing.compare(turns, "later", {"user_id": "ann"}, funnel)
    assert (found["user_id"], found["turn"], found["weight"]) == ("ann", 0, 1)
    assert funnel.counts[f"left out: {why}"] == 1


def test_a_funnel_counts_in_the_order_of_the_work():
    funnel = Funnel()
    for why, number in (("b", 1), ("a", 1), ("b", 1), ("none", 0)):
        funnel.left_out(why, number)
    for what, number in (("rows", 1_999), ("users", 1), ("rows", 1)):
        funnel.count(what, number)
    expected = [("rows", 2_000), ("users", 1), ("left out: a", 1), ("left out: b", 2)]
    assert list(funnel.counts.items()) == expected
    lines = ["    2,000  rows", *(f"        {n}  {what}" for what, n in expected[1:])]
    assert funnel.lines().split("\n") == lines
    with pytest.raises(InputError, match="no comparisons are left: 2000 rows; 1 users; 1 left out"):
        funnel.require_some(pd.DataFrame())


def test_dialogues_of_the_same_name_are_not_drawn_together():
    names = [{"user_id": f"u{i // 5}", "dialog_id": f"d{i % 5}"} for i in range(40)]
    table = preparing.split_dialogues(pd.DataFrame(names), 0, Funnel())
    assert table.groupby("user_id").split.agg(tuple).nunique() > 1


def test_the_first_prompt_is_the_first_thing_the_user_says():
    talk = [{"role": role, "content": content} for role, content in (
        ("system", "s"), ("user", "p"), ("assistant", "a"), ("user", "q"))]  # fmt: skip
    talks = pd.Series([talk, talk[3:], []])
    assert preparing.first_prompts(talks).tolist() == ["p", "q", ""]


def test_a_folder_of_scripts_takes_no_data(tmp_path):
    (tmp_path / "prepare.py").touch()
    with pytest.raises(InputError, match="holds scripts; name a folder for the data alone"):
        preparing.write_prepared(tmp_path, [], {}, {}, Funnel())


def test_a_half_written_folder_is_not_prepared(tmp_path, monkeypatch):
    source = worlds.prism(tmp_path / "raw")
    worlds.prepare("PRISM", source, tmp_path / "data")
    whole = json.loads((tmp_path / "data" / "prepare.json").read_text())
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left"):
        patch.setattr(preparing, "_write_conversations", full)
        worlds.prepare("PRISM", source, tmp_path / "data")
    with pytest.raises(InputError, match="is not a prepared dataset"):
        preparing.read_info(tmp_path / "data")
    assert worlds.prepare("PRISM", source, tmp_path / "data") == whole
