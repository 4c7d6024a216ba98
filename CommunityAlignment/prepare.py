"""Community Alignment: dialogues in which each annotator chose one of four responses a turn."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.files import require
from lore.common.settings import Fraction, PositiveInt, SeedNumber
from lore.embeddings import store as embeddings
from lore.preparing import raw, tables

HERE = Path(__file__).resolve().parent
WHOSE = {"user_id": "annotator_id", "dialog_id": "conversation_id"}
TURNS = ("first", "second", "third", "fourth")
RESPONSES = ("response_a", "response_b", "response_c", "response_d")
CELLS = ("prompt", *RESPONSES, "preferred_response")
COLUMNS = (*WHOSE.values(), "assigned_lang", *(f"{turn}_turn_{c}" for turn in TURNS for c in CELLS))


def main(
    source: str = "facebook/community-alignment-dataset", out: Path = HERE / "data",
    language: str = "en", min_comparisons: PositiveInt = 50, seen_fraction: Fraction = 0.5,
    seed: SeedNumber = 0, unseen_prompts: bool = False, embed: bool = True, **embedding: Any,
) -> None:  # fmt: skip
    """Make the comparisons of one language's annotators with many of them, and embed the texts.

    Args:
        source: hub dataset, or a folder with train as .jsonl, .jsonl.gz or .parquet.
        out: folder of the prepared data.
        language: assigned language, such as en, fr, it, hi or pt.
        min_comparisons: fewest comparisons of an annotator; a turn gives up to three.
        seen_fraction: share of the annotators whose data train the basis.
        seed: of the draw of seen annotators and of the conversations for training.
        unseen_prompts: split by first prompt, so that test conversations open with one that no
            training conversation has; otherwise half of each annotator's conversations are test.
        embed: false writes the tables only.
    """
    if embed:
        embeddings.check_model(embedding)
    funnel = tables.Funnel()
    table = tables.tabulate(read(source, language, funnel), funnel)
    table = tables.keep_users(table, "annotators", min_comparisons, "comparisons", funnel)
    prompts = tables.first_prompts(table.chosen) if unseen_prompts else None
    table = tables.split_dialogues(table, seed, funnel, prompts)
    table = tables.split_users(table, seed, seen_fraction)
    turns = table.groupby([*WHOSE, "turn"]).weight
    table = table.assign(weight=1 / turns.transform("size"))  # a turn weighs one
    conversations, table = tables.number_conversations(table, funnel)
    settings = {"source": source, "language": language, "min_comparisons": min_comparisons,
                "seen_fraction": seen_fraction, "seed": seed,
                "unseen_prompts": unseen_prompts}  # fmt: skip
    info = {"dataset": "CommunityAlignment", "settings": settings}
    print(tables.write_prepared(out, conversations, table, info, funnel, embedding.get("shard")))
    if embed:
        embeddings.embed(conversations, out / "embeddings", **embedding)


def read(source: str, language: str, funnel: tables.Funnel) -> list[dict[str, Any]]:
    """The comparisons of every conversation in the language."""
    comparisons, languages = [], set()
    for place, row in raw.read_rows(source, "train", COLUMNS, split="train"):
        funnel.count("conversations")
        spoken = raw.text(row["assigned_lang"], place, "assigned_lang")
        languages.add(spoken)
        if spoken == language:
            funnel.count(f"conversations in {language}")
            whose = {name: raw.name(row[column], place, column) for name, column in WHOSE.items()}
            comparisons += tables.compare(*read_turns(place, row), whose, funnel)
    there = ", ".join(sorted(languages))
    require(language in languages, f"--language {language} is none of those there: {there}")
    return comparisons


def read_turns(place: str, row: dict[str, Any]) -> tuple[list[tables.Turn], str]:
    """The turns of a conversation up to one that cannot be used; and why, if there is one."""
    turns: list[tables.Turn] = []
    for number, turn in enumerate(TURNS):
        columns = {cell: f"{turn}_turn_{cell}" for cell in CELLS}
        cells = {cell: raw.text(row[name], place, name) for cell, name in columns.items()}
        if not any(cells.values()):
            continue
        if number > len(turns):
            return turns, "dialogues cut at a missing turn"
        prompt, preferred = cells.pop("prompt"), cells.pop("preferred_response")
        if preferred not in cells:
            return turns, "dialogues cut at a preferred_response that names no response"
        turns.append((prompt, cells.pop(preferred), list(cells.values())))
    return turns, ""


if __name__ == "__main__":
    cli(main, kept="what is embedded already is kept")
