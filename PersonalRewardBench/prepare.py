"""PersonalRewardBench: each user's own choices for training, for choosing settings and for test."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.files import digest, require
from lore.embeddings import store as embeddings
from lore.preparing import hold_out, messages, raw, tables

HERE = Path(__file__).resolve().parent
COLUMNS = ("user_id", "split", "context", "chosen", "rejected")  # many judges' columns are left out
SPLITS = ("train", tables.VALIDATION, "test")


def main(
    source: str = "MichaelR207/prism_personalized_0125", out: Path = HERE / "data",
    embed: bool = True, **embedding: Any,
) -> None:  # fmt: skip
    """Make the comparisons of one half of the benchmark, and embed the texts.

    Every user has comparisons for training, for choosing settings and for test, by a column of the
    data; so all users are seen ones, and nothing is drawn.

    Args:
        source: hub dataset, the PRISM half; or MichaelR207/chatbot_arena_personalized_0125; or a
            file or folder of .jsonl, .jsonl.gz or .parquet.
        out: folder of the prepared data.
        embed: false writes the tables only.
    """
    if embed:
        embeddings.check_model(embedding)
    funnel = tables.Funnel()
    table = tables.tabulate(read(source, funnel), funnel)
    table, _ = hold_out.hold_out(table, "given", 0, funnel)
    conversations, table = tables.number_conversations(table.assign(seen=True), funnel)
    info = {"dataset": "PersonalRewardBench", "settings": {"source": source}}
    print(tables.write_prepared(out, conversations, table, info, funnel, embedding.get("shard")))
    if embed:
        embeddings.embed(conversations, out / "embeddings", **embedding)


def read(source: str, funnel: tables.Funnel) -> list[dict[str, Any]]:
    """The comparisons of all rows. The files' own split is one of users, and says nothing here."""
    comparisons: list[dict[str, Any]] = []
    for place, row in raw.check_columns(raw.read_all(source), COLUMNS):
        funnel.count("rows")
        user, split = (raw.name(row[column], place, column) for column in ("user_id", "split"))
        history = messages.conversation(row["context"], place, "context")
        if split not in SPLITS:
            funnel.left_out(f"rows whose split is {split}")
        elif not (all(m["content"] for m in history) and history and history[-1]["role"] == "user"):
            funnel.left_out("rows whose context does not end with a message of the user")
        else:
            prompts = [message["content"] for message in history if message["role"] == "user"]
            name = row.get("conversation_id")
            known = name is not None
            dialog = raw.name(name, place, "conversation_id") if known else digest(prompts[0])
            same = {"user_id": user, "split": split, "dialog_id": dialog, "weight": 1.0}
            same["turn"] = len(prompts) - 1
            sides = []
            for side in ("chosen", "rejected"):  # a message with content, or the text itself
                cell = row[side]
                lacks = isinstance(cell, dict) and "content" not in cell
                require(not lacks, f"{place}: {side} is a message without content")
                said = raw.text(cell["content"] if isinstance(cell, dict) else cell, place, side)
                sides.append([[*history, {"role": "assistant", "content": said}]])
            comparisons += tables.against(*sides, same, funnel)
    return comparisons


if __name__ == "__main__":
    cli(main)
