"""RedditTLDR/prepare.py: pairs of summaries, workers kept, what is left out."""

import json
from pathlib import Path

import pandas as pd
import pytest

import worlds

UKP = worlds.ROOT.parent / "shared" / "data" / "ukpconvarg_as_tldr"
FILES = {"train": "train.jsonl.gz", "test": "validation.jsonl.gz"}


def prepare(source: Path | str, out: Path, **settings) -> dict:
    """Run the script's main without embedding; what prepare.json says."""
    settings = {"embed": False, "min_annotations": 20, **settings}
    return worlds.prepare("RedditTLDR", source, out, **settings)


@pytest.fixture
def source(tmp_path) -> Path:
    return worlds.tldr(tmp_path / "raw")


def expected(source: Path) -> list[tuple]:
    """(worker, split, post's id, chosen, rejected) of every row by a plain loop, sorted."""
    found = []
    for split, name in FILES.items():
        for row in worlds.read(source / name):
            ask = {"role": "user", "content": row["info"]["post"]}
            texts = [summary["text"] for summary in row["summaries"]]
            won, lost = texts[row["choice"]], texts[1 - row["choice"]]
            talks = [json.dumps([ask, {"role": "assistant", "content": t}]) for t in (won, lost)]
            found.append((row["worker"], split, row["info"]["id"], *talks))
    return sorted(found)


def as_list(data: Path) -> list[tuple]:
    return worlds.as_tuples(worlds.comparisons(data), ["user_id", "split", "dialog_id"])


def test_every_row_is_a_comparison(source, tmp_path):
    info = prepare(source, tmp_path / "data")
    table = worlds.comparisons(tmp_path / "data")
    assert as_list(tmp_path / "data") == expected(source)
    assert (table.turn == 0).all() and (table.weight == 1).all()
    assert table.seen.all()  # who is unseen is drawn at training time
    messages = pd.read_parquet(tmp_path / "data" / "conversations.parquet").messages
    assert len({json.dumps([dict(m) for m in row]) for row in messages}) == len(messages)
    assert info["counts"]["distinct conversations"] == len(messages) <= 12 * 6


def test_workers_with_few_annotations_or_in_one_split_are_left_out(source, tmp_path):
    def only_train(rows):
        rows[:] = [row for row in rows if row["worker"] != "w01"]

    def few(rows):
        for row in [row for row in rows if row["worker"] == "w02"][15:]:
            rows.remove(row)

    worlds.edit(source / FILES["test"], only_train)
    for name in FILES.values():
        worlds.edit(source / name, few)
    counts = prepare(source, tmp_path / "a", min_annotations=30)["counts"]  # 15 + 15 are enough
    assert counts["workers with at least 30 annotations"] == 6
    assert counts["workers with at least 30 annotations, some in both splits"] == 5
    counts = prepare(source, tmp_path / "b", min_annotations=31)["counts"]
    assert counts["workers with at least 31 annotations"] == 4
    assert as_list(tmp_path / "b") == [r for r in expected(source) if r[0] not in ("w01", "w02")]


def test_rows_without_texts_or_with_twice_the_same_are_counted(source, tmp_path, capsys):
    def spoil(rows):
        rows[0]["summaries"][0]["text"] = ""
        rows[1]["summaries"][1]["text"] = None
        rows[2]["summaries"][1]["text"] = rows[2]["summaries"][0]["text"]
        rows[3].update(choice=None, extra={"tie": True})
        for row, post in zip(rows[4:], (None, "", "EMPTY STRING"), strict=False):
            row["info"]["post"] = post

    worlds.edit(source / FILES["train"], spoil)
    counts = prepare(source, tmp_path / "data")["counts"]
    assert {why: n for why, n in counts.items() if why.startswith("left out")} == {
        "left out: rejected responses equal to the chosen one": 1,
        "left out: rows with an empty summary": 2,
        "left out: rows without a post": 3,
        "left out: ties": 1,
    }
    assert counts["comparisons"] == 2 * 6 * 30 - 7
    assert "3  left out: rows without a post" in capsys.readouterr().out


def test_a_choice_may_be_a_float(source, tmp_path):
    """A column of whole numbers with a gap anywhere is read as floats."""
    before = prepare(source, tmp_path / "a")["data_sha256"]
    worlds.edit(
        source / FILES["train"], lambda rows: [r.update(choice=r["choice"] + 0.0) for r in rows]
    )
    assert prepare(source, tmp_path / "b")["data_sha256"] == before


def test_the_hub_gives_the_parquet_conversion(source, tmp_path, monkeypatch):
    calls = []

    def snapshot_download(name, **what):
        calls.append((name, what["repo_type"], what["revision"]))
        split = Path(what["allow_patterns"]).parts[1]
        rows = worlds.read(source / f"{split}.jsonl.gz")
        worlds.write(tmp_path / split / "comparisons" / split / "0000.parquet", rows)
        return str(tmp_path / split)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    hub = prepare("openai/summarize_from_feedback", tmp_path / "hub")
    assert set(calls) == {("openai/summarize_from_feedback", "dataset", "refs/convert/parquet")}
    assert hub["data_sha256"] == prepare(source, tmp_path / "local")["data_sha256"]


@pytest.mark.slow
@pytest.mark.skipif(not UKP.exists(), reason="the UKPConvArg data is not beside the project")
def test_the_real_data(tmp_path):
    """All 173 workers have fifty annotations; all pairs of unequal texts are there."""
    info = prepare(UKP, tmp_path, min_annotations=50)
    assert info["counts"]["workers with at least 50 annotations, some in both splits"] == 173
    unequal = [row for row in expected(UKP) if row[3] != row[4]]
    assert as_list(tmp_path) == unequal
    assert info["overlap"]["both_responses"] == info["overlap"]["held_out"] == 20_101
