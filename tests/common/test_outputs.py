"""No output replaces a file that the project did not write, or that is to be read."""

from pathlib import Path

import pytest

import running
import worlds
from lore.common.files import InputError, begins, check_output, has_keys


def prepare(source: Path, out: Path, refused: str = "") -> None:
    """OwnData's prepare.py ends well, or is refused with nothing written."""
    before = [(path, path.read_bytes()) for path in out.glob("*")]
    given = {"source": source, "out": out, "embed": "false"}
    outcome = running.invoke("OwnData/prepare.py", given)
    assert outcome.status == (2 if refused else 0) and refused in outcome.err, outcome.err
    assert not refused or [(path, path.read_bytes()) for path in out.glob("*")] == before


def test_only_what_the_project_wrote_is_written_again(tmp_path: Path) -> None:
    theirs = tmp_path / "mine" / "comparisons.parquet"
    worlds.write(theirs, worlds.own_rows())
    prepare(theirs, theirs.parent, refused="is what is to be read")
    source, out = worlds.own(tmp_path) / "mine.jsonl", tmp_path / "out"
    worlds.write(out / "conversations.parquet", [{"anything": 1}])
    prepare(source, out, refused="conversations.parquet")
    (out / "conversations.parquet").unlink()
    for killed in (False, True, False):
        if killed:
            (out / "prepare.json").unlink()
        prepare(source, out)


def test_a_file_without_our_keys_is_not_ours(tmp_path: Path) -> None:
    path, is_ours = tmp_path / "profile.json", has_keys("user", "weights")
    for text in ('{"other": 1}', "[1, 2]", "no JSON", "null", ""):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"--profile .*profile.json: is there and not what"):
            check_output(path, "--profile", is_ours)
    path.write_text('{"user": "ann", "weights": []}', encoding="utf-8")
    check_output(path, "--profile", is_ours)
    with pytest.raises(InputError, match="is what is to be read"):
        check_output(path, "--profile", is_ours, [None, path])
    check_output(tmp_path / "new.json", "--profile", is_ours)


def test_a_place_that_takes_no_file_is_refused_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("reward,score\n", encoding="utf-8")
    check_output(path, "--out", begins("reward,"))
    places = {"table.csv": "not what this writes", ".": "is a folder; name a file"}
    places["table.csv/x"] = "nothing can be written in .*table.csv"
    for place, said in places.items():
        with pytest.raises(InputError, match=said):
            check_output(tmp_path / place, "--out", begins("user,"))
