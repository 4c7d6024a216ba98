"""raw.py and preparing.py: rows, cells, comparisons, splits and the prepared folder."""

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WORLDS

import worlds
from lore.common.files import InputError
from lore.preparing import raw
from lore.preparing import tables as preparing
from lore.preparing.tables import Funnel, Turn

SETTINGS = {name: settings for name, (_, _, settings) in WORLDS.items()}


def prepare(name: str, source: Path, out: Path, **settings) -> dict:
    """A dataset's tables alone, without embeddings."""
    embed = {} if name == "PRISM" else {"embed": False}
    return worlds.prepare(name, source, out, **{**SETTINGS[name], **embed, **settings})


def talk(*contents: str) -> list[dict[str, str]]:
    """A conversation of user and assistant in turn."""
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


# ------------------------------------------------------------------------- Every dataset


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [*((name, {}) for name in WORLDS), ("CommunityAlignment", {"unseen_prompts": True})],
)
def test_order_of_the_rows_and_their_format_do_not_matter(tmp_path, name, more):
    write, size, _ = WORLDS[name]
    source = write(tmp_path / "raw", **size)
    first = prepare(name, source, tmp_path / "a", **more)
    for path in list(source.iterdir()):
        rows = worlds.read(path)
        random.Random(0).shuffle(rows)
        stem, ending = path.name.split(".", 1)
        worlds.write(tmp_path / "b-raw" / f"{stem}.{other_format(ending)}", rows)
    second = prepare(name, tmp_path / "b-raw", tmp_path / "b", **more)
    assert first.pop("settings") != second.pop("settings")  # another source
    assert first == second
    for file in first["files"]:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def other_format(ending: str) -> str:
    return "jsonl.gz" if ending == "parquet" else "parquet"


@pytest.mark.parametrize(("name", "fraction"), [("PRISM", 0.75), ("CommunityAlignment", 0.34)])
def test_splits_are_by_dialogue_and_by_user(tmp_path, name, fraction):
    write, size, _ = WORLDS[name]
    source = write(tmp_path / "raw", **size)
    info = prepare(name, source, tmp_path / "data", seen_fraction=fraction)
    table = worlds.comparisons(tmp_path / "data")
    assert (table.groupby("dialog_id").split.nunique() == 1).all()
    assert (table.groupby("user_id").seen.nunique() == 1).all()
    dialogues = table.groupby(["user_id", "split"]).dialog_id.nunique().unstack()
    assert (dialogues.train - dialogues.test).isin([0, 1]).all()
    seen = round(fraction * table.user_id.nunique())
    assert table[table.seen].user_id.nunique() == info["counts"]["seen users"] == seen


@pytest.mark.parametrize("name", ["RedditTLDR", "PRISM", "CommunityAlignment"])
def test_overlap_is_what_a_plain_loop_counts(tmp_path, name):
    write, size, _ = WORLDS[name]
    info = prepare(name, write(tmp_path / "raw", **size), tmp_path / "data")
    table = worlds.comparisons(tmp_path / "data")
    train = [row for row in table.itertuples() if row.split == "train"]
    found = dict.fromkeys(("held_out", "prompt", "response", "both_responses", "pair"), 0)
    for row in table.itertuples():
        if row.split == "test":
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


@pytest.mark.parametrize("name", ["PersonalLLM", "RedditTLDR", "CommunityAlignment"])
def test_a_wrong_model_is_noticed_before_the_data_are_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(raw, "read_rows", lambda *args, **hub: pytest.fail("data were read"))
    with pytest.raises(ValueError, match="typo"):
        worlds.prepare(name, tmp_path, tmp_path / "data", model=str(tmp_path / "typo"))


@pytest.mark.parametrize(
    ("name", "users", "least"),
    [("RedditTLDR", "workers", "min_annotations"), ("PersonalRewardBench", "users", None),
     ("PRISM", "users", "min_dialogues"), ("CommunityAlignment", "annotators", "min_comparisons")],
)  # fmt: skip
def test_a_single_user_is_prepared_or_refused_in_one_line(tmp_path, name, users, least):
    write, size = worlds.SMALL[name]
    source, settings = write(tmp_path / "raw", **{**size, users: 1}), {least: 1} if least else {}
    if name in ("PRISM", "CommunityAlignment"):
        with pytest.raises(InputError, match=r"^--seen-fraction 0.5 of 1 users makes 0 [^\n]*$"):
            prepare(name, source, tmp_path / "data", **settings)
        assert not (tmp_path / "data").exists()
    else:
        counts = prepare(name, source, tmp_path / "data", **settings)["counts"]
        assert counts["users with comparisons"] == 1


# ---------------------------------------------------------------------------------- Rows


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": ', "row 2 is not valid JSON"),
        (b'{"a": ' + b"9" * 6000 + b"}", "row 2 is not valid JSON: Exceeds the limit"),
        (b"[" * 100_000, "row 2 is not valid JSON: maximum recursion depth"),
        (b"[1]", "row 2 is not a JSON object"),
        (b"\xff\xfe", r"cannot be read( after row 1)?: 'utf-8' codec"),
    ],
)
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_a_damaged_line_is_named(tmp_path, line, message, ending):
    content = b'{"a": 1}\n' + line + b"\n"
    content = gzip.compress(content) if ending == ".jsonl.gz" else content
    file = write_bytes(tmp_path / f"t{ending}", content)
    with pytest.raises(InputError, match=f"^[^\n]*{ending} {message}[^\n]*$"):
        list(raw.read_file(file))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-10], " cannot be read"),
        ("plain.jsonl.gz", b"plain text", " cannot be read"),
        ("p.parquet", b"PAR1 and nothing else", " cannot be read"),
        ("t.csv", b"a,b\n1,2,3\n", " row 1 has 3 cells, the first line 2; .* by commas"),
        ("t.txt", b"", ": a file's name must end in .jsonl, .ndjson, .json, .csv"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    file = write_bytes(tmp_path / name, content)
    with pytest.raises(InputError, match=f"^{file}{message}"):
        list(raw.read_file(file))


ROWS = [{"user": "José", "prompt": 'say "a, b"; or\tc'}, {"user": "ann", "prompt": "two\nlines"}]
LINES = "\n\n".join(json.dumps(row) for row in ROWS) + "\n \n"  # with blank ones


def as_table(separator: str) -> str:
    """The rows as a table, the prompts quoted."""
    cells = [[row["user"], '"' + row["prompt"].replace('"', '""') + '"'] for row in ROWS]
    return "\n".join(separator.join(row) for row in [["user", "prompt"], *cells]) + "\n\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.json", json.dumps(ROWS, indent=1)),
        ("t.json", LINES),
        ("t.ndjson", LINES),
        ("t.jsonl", LINES),
        ("t.csv", as_table(",")),
        ("t.csv", as_table(";")),
        ("t.csv", as_table("\t")),
        ("t.tsv", as_table("\t")),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_same_rows_are_read_from_files_of_any_kind(tmp_path, name, content, packed, encoding):
    data = content.encode(encoding)
    file = write_bytes(tmp_path / (name + ".gz" * packed), gzip.compress(data) if packed else data)
    assert [row for _, row in raw.read_file(file)] == ROWS


def test_a_separator_that_is_found_is_told(tmp_path, caplog):
    file = write_bytes(tmp_path / "t.csv", as_table(";").encode())
    with caplog.at_level("INFO"):
        list(raw.read_file(file))
    assert f"{file}: cells are separated by semicolons" in caplog.messages


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
    file = write_bytes(tmp_path / name, content.encode())
    assert [row for _, row in raw.read_file(file)] == rows


def test_a_name_that_stands_twice_is_refused(tmp_path):
    table = pa.table([[1], [2], [3]], names=["a", "b", "a"])
    pq.write_table(table, tmp_path / "t.parquet")
    for file, what in {
        tmp_path / "t.parquet": "columns a",
        write_bytes(tmp_path / "t.csv", b"a,b,a\n1,2,3\n"): "columns a",
        write_bytes(tmp_path / "t.jsonl", b'{"a": 1, "a": 2}'): "keys a",
        write_bytes(tmp_path / "u.jsonl", b'{"a": [{"b": 1, "b": 1}]}'): "keys b",
        write_bytes(tmp_path / "t.json", b'[{"a": 1, "a": 2}]'): "keys a",
    }.items():
        with pytest.raises(InputError, match=f"{file}.* has two {what}; leave one of each"):
            list(raw.read_file(file))


def test_a_source_is_a_folder_or_a_hub_dataset(tmp_path):
    with pytest.raises(InputError, match="--source is empty"):
        list(raw.read_rows("", "train", ()))
    file = write_bytes(tmp_path / "train.jsonl", b'{"a": 1}\n')
    with pytest.raises(InputError, match="train.jsonl is a file; name its folder"):
        list(raw.read_rows(str(file), "train", ()))
    assert list(raw.read_rows(str(tmp_path), "train", ("a",))) == [(f"{file} row 1", {"a": 1})]
    with pytest.raises(InputError, match="row 1 has no column b, c"):
        list(raw.read_rows(str(tmp_path), "train", ("a", "b", "c")))


# --------------------------------------------------------------------------------- Cells

NOT = [True, ["a"], {"a": 1}, float("nan")]  # neither texts nor names nor numbers


@pytest.mark.parametrize(
    ("read", "value", "found"),
    [
        *((raw.text, value, "") for value in (None, " \n", "EMPTY STRING")),
        *((raw.text, value, value) for value in (" a ", "é")),
        *((raw.name, value, str(int(value))) for value in (7, 7.0, "0")),
        (raw.name, "a", "a"),
        (raw.number, 2, 2.0),
    ],
)
def test_what_a_cell_holds(read, value, found):
    assert read(value, "row 1", "score") == found


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        *((raw.text, value, f"row 1: score must be text, not a {type(value).__name__}$")
          for value in (*NOT, 5, 5.0, b"a")),
        *((raw.name, value, "row 1.* score") for value in (*NOT, None, "", " ", 7.5, float("inf"))),
        *((raw.number, value, "row 1: score must be a number, not .{1,40}$")
          for value in (*NOT, None, "1", float("inf"), 1e39, 10**400)),
    ],
)  # fmt: skip
def test_what_a_cell_cannot_hold(read, value, message):
    with pytest.raises(InputError, match=message):
        read(value, "row 1", "score")


# --------------------------------------------------------------------------- Comparisons


def test_a_dialogue_is_compared_turn_by_turn():
    turns, funnel = [Turn("p", "a", ["b", "c"]), Turn("q", "d", ["e"])], Funnel()
    same, later = {"user_id": "ann", "weight": 1.0}, ("p", "a", "q")
    found = preparing.compare(turns, "", {"user_id": "ann"}, funnel)
    assert found == [
        {**same, "turn": 0, "chosen": talk("p", "a"), "rejected": talk("p", "b")},
        {**same, "turn": 0, "chosen": talk("p", "a"), "rejected": talk("p", "c")},
        {**same, "turn": 1, "chosen": talk(*later, "d"), "rejected": talk(*later, "e")},
    ]
    assert not funnel.counts


@pytest.mark.parametrize(
    ("turns", "end", "count", "left_out"),
    [
        ([("p", "a", ["b"]), ("", "a", ["b"])], "", 1, "dialogues cut at an empty prompt"),
        ([("p", "", "b"), ("p", "a", "b")], "", 0, "dialogues cut at an empty chosen response"),
        ([("p", "a", ["b"])], "dialogues cut here", 1, "dialogues cut here"),
        ([("p", "", ["b"])], "later", 0, "dialogues cut at an empty chosen response"),
        ([("p", "a", ["", "c"])], "", 1, "rejected responses empty"),
        ([("p", "a", ["a", "c"])], "", 1, "rejected responses equal to the chosen one"),
        ([], "", 0, ""),
    ],
)
def test_what_is_left_out_of_a_dialogue(turns, end, count, left_out):
    funnel = Funnel()
    found = preparing.compare([Turn(*turn) for turn in turns], end, {}, funnel)
    assert len(found) == count
    assert funnel.counts == ({f"left out: {left_out}": 1} if left_out else {})


def test_a_funnel_counts_in_the_order_of_the_work():
    funnel = Funnel()
    funnel.left_out(["b", "a", "b"])
    funnel.count("rows", 1_999)
    funnel.count("users")
    funnel.count("rows")
    expected = [("rows", 2_000), ("users", 1), ("left out: a", 1), ("left out: b", 2)]
    assert list(funnel.counts.items()) == expected
    lines = [f"{n:>9,}  {what}" for what, n in expected]
    assert lines[0] == "    2,000  rows" and funnel.lines().split("\n") == lines
    with pytest.raises(InputError, match="no comparisons are left: 2000 rows; 1 users; 1 left out"):
        funnel.require_some(pd.DataFrame())


# -------------------------------------------------------------------------------- Splits


def comparisons(users: int, dialogues: int, prompts: Sequence[str] = ("p",)) -> pd.DataFrame:
    """Two comparisons of every dialogue."""
    rows = []
    for i in range(users * dialogues * 2):
        user, dialogue = divmod(i // 2, dialogues)
        talks = [talk(prompts[dialogue % len(prompts)], f"{answer}{i}") for answer in "ab"]
        name = {"user_id": f"u{user}", "dialog_id": f"d{dialogue}", "turn": i % 2, "weight": 1.0}
        rows.append({**name, "chosen": talks[0], "rejected": talks[1]})
    return pd.DataFrame(rows)


def test_half_of_each_users_dialogues_are_for_training():
    table = preparing.split_dialogues(comparisons(8, 5), 0, Funnel())
    assert (table.groupby(["user_id", "dialog_id"]).split.nunique() == 1).all()
    sizes = table.groupby(["user_id", "split"]).dialog_id.nunique().unstack()
    assert (sizes.train == 3).all() and (sizes.test == 2).all()
    by_user = table.groupby("user_id").apply(lambda rows: tuple(rows.split), include_groups=False)
    assert by_user.nunique() > 1  # equal names of dialogues are not drawn together


def test_units_are_on_one_side_and_users_of_one_side_are_left_out():
    table = comparisons(4, 6, "pqrs")
    extra = table[table.user_id == "u0"].iloc[:1].assign(user_id="lonely")
    table = pd.concat([table, extra], ignore_index=True)
    funnel = Funnel()
    split = preparing.split_dialogues(table, 1, funnel, preparing.first_prompts(table.chosen))
    sides = preparing.first_prompts(split.chosen).groupby(split.split).agg(set)
    assert not sides.train & sides.test and len(sides.train) == len(sides.test) == 2
    assert set(split.user_id) == {"u0", "u1", "u2", "u3"}
    assert funnel.counts["users with dialogues for training and for test"] == 4


def test_seen_users_are_drawn_by_name_and_seed():
    table = comparisons(8, 2)
    split = preparing.split_users(table, 0, 0.25)
    seen = set(split[split.seen].user_id)
    assert len(seen) == 2 and (split.groupby("user_id").seen.nunique() == 1).all()
    mixed = preparing.split_users(table.sample(frac=1, random_state=1), 0, 0.25)
    assert set(mixed[mixed.seen].user_id) == seen
    others = [preparing.split_users(table, seed, 0.25) for seed in range(1, 5)]
    assert any(set(other[other.seen].user_id) != seen for other in others)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 1.0, -1.0, 2.0, float("nan")])
def test_somebody_must_be_seen_and_somebody_unseen(fraction):
    with pytest.raises(InputError, match=f"--seen-fraction {fraction}"):
        preparing.split_users(comparisons(8, 2), 0, fraction)


def test_the_first_prompt_is_the_first_thing_the_user_says():
    talks = [[{"role": "system", "content": "s"}, *talk("p", "a", "q")], talk("q", "b"), []]
    assert preparing.first_prompts(pd.Series(talks)).tolist() == ["p", "q", ""]


# ------------------------------------------------------------------- The prepared folder


def test_a_folder_of_scripts_takes_no_data(tmp_path):
    (tmp_path / "prepare.py").touch()
    with pytest.raises(InputError, match="holds scripts; name a folder for the data alone"):
        preparing.write_prepared(tmp_path, [], {}, {}, Funnel())


def test_a_half_written_folder_is_not_prepared(tmp_path, monkeypatch):
    source = worlds.prism(tmp_path / "raw")
    prepare("PRISM", source, tmp_path / "data")
    whole = json.loads((tmp_path / "data" / "prepare.json").read_text())

    def full(path, conversations):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left"):
        patch.setattr(preparing, "_write_conversations", full)
        prepare("PRISM", source, tmp_path / "data")
    with pytest.raises(InputError, match="is not a prepared dataset"):
        preparing.read_info(tmp_path / "data")
    assert prepare("PRISM", source, tmp_path / "data") == whole
