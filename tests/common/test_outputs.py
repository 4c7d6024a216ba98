"""No output replaces a file that the project did not write, or that is to be read."""

from pathlib import Path

import pytest

import running
import worlds
from lore.common.files import InputError, begins, check_output, has_keys


def prepare(source: Path, out: Path) -> running.Outcome:
    return running.invoke("OwnData/prepare.py", {"source": source, "out": out, "embed": "false"})


def test_a_source_is_not_replaced_by_what_is_made_of_it(tmp_path: Path) -> None:
    source = tmp_path / "mine" / "comparisons.parquet"
    worlds.write(source, worlds.own_rows())
    before = source.read_bytes()
    outcome = prepare(source, source.parent)
    assert outcome.status == 2 and "is what is to be read" in outcome.err, outcome.err
    assert source.read_bytes() == before and list(source.parent.iterdir()) == [source]


def test_only_what_the_project_wrote_is_written_again(tmp_path: Path) -> None:
    source, out = worlds.own(tmp_path) / "mine.jsonl", tmp_path / "out"
    theirs = out / "conversations.parquet"
    worlds.write(theirs, [{"anything": 1}])
    before = theirs.read_bytes()
    outcome = prepare(source, out)
    assert outcome.status == 2 and "conversations.parquet" in outcome.err, outcome.err
    assert theirs.read_bytes() == before
    theirs.unlink()
    for killed in (False, False, True, False):
        if killed:
            (out / "prepare.json").unlink()
        assert prepare(source, out).status == 0


@pytest.mark.parametrize("text", ['{"other": 1}', "[1, 2]", "no JSON", ""])
def test_a_file_without_our_keys_is_not_ours(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"--profile .*profile.json: is there and not what"):
        check_output(path, "--profile", has_keys("user", "weights"))
    path.write_text('{"user": "ann", "weights": []}', encoding="utf-8")
    check_output(path, "--profile", has_keys("user", "weights"))
    with pytest.raises(InputError, match="is what is to be read"):
        check_output(path, "--profile", has_keys("user", "weights"), [None, path])
    check_output(tmp_path / "new.json", "--profile", has_keys("user"))


def test_a_place_that_takes_no_file_is_refused_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("reward,score\n", encoding="utf-8")
    check_output(path, "--out", begins("reward,"))
    places = {"table.csv": "not what this writes", ".": "is a folder; name a file"}
    places["table.csv/x"] = "nothing can be written in .*table.csv"
    for place, said in places.items():
        with pytest.raises(InputError, match=said):
            check_output(tmp_path / place, "--out", begins("user,"))
