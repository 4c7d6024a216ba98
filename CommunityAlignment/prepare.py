"""Community Alignment: dialogues in which each annotator chose one of four responses a turn."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import embeddings
import experiments
from experiments import Turn, Unusable, text
from utils import InputError

HERE = Path(__file__).resolve().parent
WHOSE = {"user_id": "annotator_id", "dialog_id": "conversation_id"}
TURNS = ("first", "second", "third", "fourth")
RESPONSES = ("response_a", "response_b", "response_c", "response_d")
CELLS = ("prompt", *RESPONSES, "preferred_response")
COLUMNS = (*WHOSE.values(), "assigned_lang", *(f"{turn}_turn_{c}" for turn in TURNS for c in CELLS))


def main(
    source: str = "facebook/community-alignment-dataset",
    out: Path = HERE / "data",
    language: str = "en",
    min_comparisons: int = 50,
    seen_fraction: float = 0.5,
    seed: int = 0,
    unseen_prompts: bool = False,
    embed: bool = True,
    **embedding: Any,
) -> None:
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
    counts: Counter[str] = Counter()
    table = experiments.tabulate(read(source, language, counts), counts)
    enough = table.user_id.map(table.user_id.value_counts()) >= min_comparisons
    name = f"annotators with at least {min_comparisons} comparisons"
    table = experiments.keep(table, enough, counts, name)
    table = experiments.split_dialogues(table, seed, counts, unseen_prompts)
    table = experiments.split_users(table, seed, counts, seen_fraction)
    turns = table.groupby([*WHOSE, "turn"])
    table = table.assign(weight=1 / turns.weight.transform("size"))  # a turn weighs one
    conversations, table = experiments.number_conversations(table, counts)
    settings = {
        "source": source,
        "language": language,
        "min_comparisons": min_comparisons,
        "seen_fraction": seen_fraction,
        "seed": seed,
        "unseen_prompts": unseen_prompts,
    }
    info = {"dataset": "CommunityAlignment", "users_split": "given", "settings": settings}
    experiments.write_prepared(out, conversations, table, {**info, "counts": counts})
    print(experiments.funnel(counts))
    if embed:
        embeddings.embed(conversations, out / "embeddings", **embedding)
    print(f"prepared {len(table):,} comparisons of {len(conversations):,} conversations in {out}")


def read(source: str, language: str, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The comparisons of every conversation in the language."""
    languages: Counter[str] = Counter()
    for place, row in experiments.read_rows(source, "train", COLUMNS, split="train"):
        counts["conversations"] += 1
        languages[str(row["assigned_lang"])] += 1
        if row["assigned_lang"] != language:
            continue
        counts[f"conversations in {language}"] += 1
        for column in WHOSE.values():
            if row[column] in (None, "", experiments.EMPTY):
                raise InputError(f"{place} has an empty {column}")
        whose = {name: str(row[column]) for name, column in WHOSE.items()}
        for comparison in experiments.compare(read_turns(place, row), counts):
            yield {**whose, **comparison}
    if language not in languages:
        raise InputError(f"--language {language} is none of those there: {', '.join(languages)}")


def read_turns(place: str, row: dict[str, Any]) -> Iterator[Turn]:
    """The turns of a conversation, up to one that is missing or where nothing is preferred."""
    ended = False
    for turn in TURNS:
        cells = {cell: text(row[f"{turn}_turn_{cell}"], place, cell) for cell in CELLS}
        if not any(cells.values()):
            ended = True
            continue
        if ended:
            raise Unusable("dialogues from a missing turn on")
        prompt, preferred = cells.pop("prompt"), cells.pop("preferred_response")
        if preferred not in cells:
            raise Unusable("dialogues from a turn whose preferred_response names no response on")
        yield Turn(prompt, cells.pop(preferred), list(cells.values()))


if __name__ == "__main__":
    experiments.cli(main)
