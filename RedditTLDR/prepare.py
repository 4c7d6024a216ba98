"""Reddit TLDR: which of two summaries of a post each worker found better."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import embeddings
import experiments
from experiments import Turn, Unusable, text
from utils import InputError

HERE = Path(__file__).resolve().parent
SPLITS = {"train": "train", "validation": "test"}
COLUMNS = ("info", "summaries", "choice", "worker")
PARQUET = "refs/convert/parquet"  # the hub repository is a script, which `datasets` refuses


def main(
    source: str = "openai/summarize_from_feedback",
    out: Path = HERE / "data",
    min_annotations: int = 50,
    embed: bool = True,
    **embedding: Any,
) -> None:
    """Make the comparisons of the workers with many annotations, and embed their texts.

    Args:
        source: hub dataset, or a folder with train and validation as .jsonl, .jsonl.gz or .parquet.
        out: folder of the prepared data.
        min_annotations: fewest annotations of a worker, both splits together.
        embed: false writes the tables only.
    """
    counts: Counter[str] = Counter()
    table = experiments.tabulate(read(source, counts), counts)
    table = keep_workers(table, min_annotations, counts)
    conversations, table = experiments.number_conversations(table, counts)
    settings = {"source": source, "min_annotations": min_annotations}
    info = {"dataset": "RedditTLDR", "users_split": "drawn", "settings": settings, "counts": counts}
    experiments.write_prepared(out, conversations, table, info)
    print(experiments.funnel(counts))
    if embed:
        embeddings.embed(conversations, out / "embeddings", **embedding)
    print(f"prepared {len(table):,} comparisons of {len(conversations):,} conversations in {out}")


def read(source: str, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The comparisons of both splits; who is seen is drawn at training time."""
    for name, split in SPLITS.items():
        hub = {"data_files": {name: f"comparisons/{name}/*.parquet"}, "split": name}
        for place, row in experiments.read_rows(source, name, COLUMNS, revision=PARQUET, **hub):
            counts[f"rows of {name}"] += 1
            user = text(row["worker"], place, "worker")
            if not user:
                raise InputError(f"{place} names no worker")
            if not isinstance(row["info"], dict):
                raise InputError(f"{place}: info must hold the post")
            dialog = text(row["info"].get("id"), place, "info.id")
            whose = {"user_id": user, "dialog_id": dialog, "split": split, "seen": True}
            for comparison in experiments.compare(read_turns(place, row), counts):
                yield {**whose, **comparison}


def read_turns(place: str, row: dict[str, Any]) -> Iterator[Turn]:
    """The one turn of a row."""
    summaries, choice = row["summaries"], row["choice"]
    if len(summaries or ()) != 2:
        raise InputError(f"{place} must have two summaries, not {len(summaries or ())}")
    if choice not in (0, 1):
        raise InputError(f"{place}: choice must be 0 or 1, not {choice!r}")
    post = text(row["info"].get("post"), place, "info.post")
    if not post:
        raise Unusable("rows without a post")
    texts = [text(summary.get("text"), place, "a summary") for summary in summaries]
    if "" in texts:
        raise Unusable("rows with an empty summary")
    yield Turn(post, texts[choice], [texts[1 - choice]])


def keep_workers(table: pd.DataFrame, min_annotations: int, counts: Counter[str]) -> pd.DataFrame:
    """The comparisons of the workers with enough of them, and some in both splits."""
    enough = table.user_id.map(table.user_id.value_counts()) >= min_annotations
    name = f"workers with at least {min_annotations} annotations"
    table = experiments.keep(table, enough, counts, name)
    both = table.groupby("user_id").split.transform("nunique") == 2
    return experiments.keep(table, both, counts, f"{name}, some in both splits")


if __name__ == "__main__":
    experiments.cli(main)
