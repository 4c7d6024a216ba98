"""tools/ukpconvarg.py: XML of judgments in, rows for RedditTLDR/prepare.py out."""

import gzip
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

import worlds
from lore.common.files import InputError

ARGUMENTS = {"arg1": "Cats & dogs <agree>.", "arg2": "Two\nlines.", "arg3": "Third.", "arg4": "4!"}


def pair(one: str, other: str, answers: dict[str, str], stance: str = "Yes") -> str:
    """One annotated pair; answers: worker -> value."""
    sides = "".join(
        f"<arg{i}><stance>{stance}</stance><text> {escape(ARGUMENTS[name])}\n</text>"
        f"<id>{name}</id><originalHTML>&lt;p&gt;</originalHTML></arg{i}>"
        for i, name in enumerate((one, other), start=1)
    )
    turk = "<mTurkAssignment><turkID>{}</turkID><value>{}</value></mTurkAssignment>"
    turks = "".join(turk.format(worker, value) for worker, value in answers.items())
    title = "<debateMetaData><title>Is it so?</title><url>x</url></debateMetaData>"
    parts = f"<id>{one}_{other}</id>{sides}{title}<mTurkAssignments>{turks}</mTurkAssignments>"
    return f"<annotatedArgumentPair>{parts}</annotatedArgumentPair>"


def corpus(folder: Path) -> Path:
    """Two positions; AX and BY decide often, CZ once."""
    folder.mkdir()
    both, equal = {"AX": "a1", "BY": "a2"}, {"AX": "equal", "BY": "a1", "CZ": "equal"}
    yes = [pair("arg1", "arg2", {**both, "CZ": "a1"}), pair("arg1", "arg3", both)]
    yes.append(pair("arg3", "arg2", equal))
    no = [pair("arg3", "arg4", both, "No"), pair("arg4", "arg3", both, "No")]
    for name, pairs in {"is-it-so_yes": yes, "is-it-so_no": no}.items():
        text = f'<?xml version="1.0"?>\n<list>{"".join(pairs)}</list>'
        (folder / f"{name}.xml").write_text(text)
    return folder


def convert(source: Path, out: Path, **settings) -> list[list[dict]]:
    """The rows of both sides."""
    worlds.script("tools/ukpconvarg.py").main(source, out, **settings)
    return [worlds.read(out / f"{name}.jsonl.gz") for name in ("train", "validation")]


def test_decided_judgments_of_busy_workers_become_rows(tmp_path, capsys):
    rows = sum(convert(corpus(tmp_path / "xml"), tmp_path / "out", min_judgments=4), [])
    found = {(row["info"]["id"], row["worker"], row["choice"]) for row in rows}
    decided = ["arg1_arg2", "arg1_arg3", "arg3_arg4", "arg4_arg3"]
    expected = {(name, worker, i) for name in decided for i, worker in enumerate(("w000", "w001"))}
    assert found == expected | {("arg3_arg2", "w001", 0)} and len(rows) == 9
    row = next(row for row in rows if row["info"]["id"] == "arg1_arg2")
    assert row["info"]["post"] == "Is it so? Position: Yes."
    assert [s["text"] for s in row["summaries"]] == ["Cats & dogs <agree>.", "Two\nlines."]
    assert row["batch"] == "is-it-so_yes"
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "12  judgments" in printed and "10  decided judgments" in printed
    assert "2  workers with at least 4 decided judgments" in printed  # AX four times, CZ once
    assert "9  judgments of these workers" in printed


def test_a_pair_is_on_one_side_in_either_order_and_whoever_judged_it(tmp_path):
    source, seen = corpus(tmp_path / "xml"), set()
    for seed in range(6):
        train, validation = (
            {frozenset(summary["text"] for summary in row["summaries"]) for row in rows}
            for rows in convert(source, tmp_path / "out", min_judgments=1, seed=seed)
        )
        assert not train & validation and len(train) == len(validation) == 2
        seen.add(frozenset(train))
    assert len(seen) > 1


def test_the_prepare_script_reads_the_files_and_counts_ties_and_what_was_judged_again(tmp_path):
    """AX is undecided once and CZ, who decided once, too; AX and BY judged arg3 and arg4 again."""
    source, out = corpus(tmp_path / "xml"), tmp_path / "out"
    written = []
    for ties in (False, False, True):
        rows = sum(convert(source, out, min_judgments=2, ties=ties), [])
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
        info = worlds.prepare("RedditTLDR", out, tmp_path / "data", min_annotations=2, embed=False)
        assert info["counts"]["comparisons"] == 9 and info["overlap"]["pair"] == 0
    assert written[0] == written[1]
    undecided = [row for row in rows if row["extra"].get("tie")]
    assert [(row["info"]["id"], row["worker"]) for row in undecided] == [("arg3_arg2", "w000")]
    assert len(rows) == 10 and undecided[0]["choice"] is None
    assert info["counts"]["left out: ties"] == 1
    assert info["retest"]["judged_again"] == 2 and info["retest"]["both_sides"] == 0
    assert info["retest"]["same"] == 0 == info["retest"]["others"] - 0.5  # each the first shown


@pytest.mark.parametrize("row", ["", "[1]", '{"info": {"post": "p", "title": "p"}, "batch": "b"}'])
def test_somebodys_rows_are_not_replaced(tmp_path, row):
    source, theirs = corpus(tmp_path / "xml"), tmp_path / "out" / "validation.jsonl.gz"
    theirs.parent.mkdir()
    theirs.write_bytes(gzip.compress(row.encode()))
    with pytest.raises(InputError, match="--out .*validation.jsonl.gz: is there and not what this"):
        convert(source, theirs.parent, min_judgments=2)
    assert gzip.decompress(theirs.read_bytes()).decode() == row
    assert [path.name for path in theirs.parent.iterdir()] == [theirs.name]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</list>", "", "is-it-so_no.xml is not valid XML"),
        ("<value>a1</value>", "<value>a3</value>", "no.xml pair 1: value must be a1, a2 or equal"),
        ("<turkID>AX</turkID>", "<turkID/>", "no.xml pair 1 has no turkID"),
        ("<stance>No</stance>", "", "no.xml pair 1 has no arg1/stance"),
        ("is it", "", "no worker has 50 decided judgments"),
        ("annotatedArgumentPair", "other", "no worker has 50 decided judgments"),
        ("", "", "has no .xml files; name UKPConvArg1-full-XML"),
    ],
)
def test_what_is_not_the_corpus_is_refused_by_place(tmp_path, old, new, message):
    source = corpus(tmp_path / "xml")
    for file in source.iterdir():
        file.write_text(file.read_text().replace(old, new))
        if not old:
            file.unlink()
    with pytest.raises(InputError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
