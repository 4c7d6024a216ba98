"""No output replaces a file that the project did not write, or that is to be read."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import running
from lore.common.files import InputError, check_output, has_keys

ROWS = [
    {"user": f"u{u}", "prompt": f"What of {i}?", "chosen": f"good {i}.{u}", "rejected": f"bad {i}"}
    for u in range(6)
    for i in range(8)
]


def test_a_source_is_not_replaced_by_what_is_made_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    source = folder / "comparisons.parquet"
    pd.DataFrame(ROWS).to_parquet(source)
    before = source.read_bytes()
    flags = {"source": source, "out": folder, "embed": "false"}
    outcome = running.invoke("OwnData/prepare.py", flags)
    assert outcome.status == 2 and "is what is to be read" in outcome.err, outcome.err
    assert source.read_bytes() == before and [p.name for p in folder.iterdir()] == [source.name]


def test_somebodys_file_of_the_same_name_is_left_alone(tmp_path: Path) -> None:
    source, folder = tmp_path / "mine.jsonl", tmp_path / "out"
    source.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    folder.mkdir()
    theirs = folder / "conversations.parquet"
    pd.DataFrame({"anything": [1]}).to_parquet(theirs)
    before = theirs.read_bytes()
    outcome = running.invoke(
        "OwnData/prepare.py", {"source": source, "out": folder, "embed": "false"}
    )
    assert outcome.status == 2 and "conversations.parquet" in outcome.err, outcome.err
    assert theirs.read_bytes() == before


def test_what_the_project_wrote_may_be_written_again(tmp_path: Path) -> None:
    source = tmp_path / "mine.jsonl"
    source.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    flags = {"source": source, "out": tmp_path / "out", "embed": "false"}
    for _ in range(2):
        outcome = running.invoke("OwnData/prepare.py", flags)
        assert outcome.status == 0, outcome.err


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
