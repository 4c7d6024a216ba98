"""Reddit TLDR: which of two summaries of a post each worker found better."""

import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.files import require
from lore.common.settings import PositiveInt, SeedNumber
from lore.embeddings import store as embeddings
from lore.preparing import hold_out, raw, tables

HERE = Path(__file__).resolve().parent
SPLITS = {"train": "train", "validation": "test"}
COLUMNS = ("info", "summaries", "choice", "worker")
PARQUET = "refs/convert/parquet"  # the hub repository is a script, which `datasets` refuses


def main(
    source: str = "openai/summarize_from_feedback", out: Path = HERE / "data",
    min_annotations: PositiveInt = 50, split: Literal["given", "responses"] = "given",
    seed: SeedNumber = 0, embed: bool = True, **embedding: Any,
) -> None:  # fmt: skip
    """Make the comparisons of the workers with many annotations, and embed their texts.

    Args:
        source: hub dataset, or a folder with train and validation as .jsonl, .jsonl.gz or .parquet.
        out: folder of the prepared data.
        min_annotations: fewest annotations of a worker, both splits together.
        split: given holds out the published validation split; responses divides all summaries, so
            that held-out comparisons are between two that training lacks.
        seed: of the draw of responses.
        embed: false writes the tables only.
    """
    if embed:
        embeddings.check_model(embedding)
    funnel = tables.Funnel()
    table = tables.tabulate(read(source, funnel), funnel)
    table = tables.keep_users(table, "workers", min_annotations, "annotations", funnel)
    both = f"workers with at least {min_annotations} annotations, some in both splits"
    table, held_out = hold_out.hold_out(table, split, seed, funnel, both)
    conversations, table = tables.number_conversations(table, funnel)
    settings = {"source": source, "min_annotations": min_annotations, "split": split, "seed": seed}
    info = {"dataset": "RedditTLDR", "settings": settings, "split": held_out}
    print(tables.write_prepared(out, conversations, table, info, funnel, embedding.get("shard")))
    if embed:
        embeddings.embed(conversations, out / "embeddings", **embedding)


def read(source: str, funnel: tables.Funnel) -> list[dict[str, Any]]:
    """The comparisons of both splits; who is seen is drawn at training time."""
    comparisons = []
    for name, split in SPLITS.items():
        hub = {"files": f"comparisons/{name}/*.parquet", "revision": PARQUET}
        for place, row in raw.read_rows(source, name, COLUMNS, **hub):
            funnel.count(f"rows of {name}")
            require(isinstance(row["info"], dict), f"{place}: info must hold the post")
            dialog = raw.text(row["info"].get("id"), place, "info.id")
            user = raw.name(row["worker"], place, "worker")
            same = {"user_id": user, "dialog_id": dialog, "split": split, "seen": True}
            comparisons += tables.compare(*read_turns(place, row), same, funnel)
    return comparisons


def read_turns(place: str, row: dict[str, Any]) -> tuple[list[tables.Turn], str]:
    """The one turn of a row; or none, and why."""
    post = raw.text(row["info"].get("post"), place, "info.post")
    summaries, choice, extra = row["summaries"], row["choice"], row.get("extra")
    two = isinstance(summaries, list) and len(summaries) == 2
    require(two, f"{place}: summaries must be a list of two, not {summaries!r:.40}")
    for summary in summaries:
        has = isinstance(summary, dict)
        require(has, f"{place}: a summary must have a text, unlike {summary!r:.40}")
    texts = [raw.text(summary.get("text"), place, "a summary") for summary in summaries]
    if choice is None and isinstance(extra, dict) and extra.get("tie") is True:
        return [], "ties"
    known = not isinstance(choice, bool) and choice in (0, 1)  # 1.0 where some rows have no choice
    require(known, f"{place}: choice must be 0 or 1, not {choice!r:.40}")
    if not post:
        return [], "rows without a post"
    if "" in texts:
        return [], "rows with an empty summary"
    return [(post, texts[int(choice)], [texts[1 - int(choice)]])], ""


if __name__ == "__main__":
    cli(main, kept="what is embedded already is kept")
