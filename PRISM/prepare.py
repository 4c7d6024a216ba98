"""PRISM: dialogues in which each participant chose one of several responses a turn."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import experiments
from experiments import Turn, Unusable, text
from utils import InputError

HERE = Path(__file__).resolve().parent
WHOSE = {"user_id": "user_id", "dialog_id": "conversation_id"}
CONVERSATION = (*WHOSE.values(), "conversation_history")
LIST_WARNING = (
    "rejected responses are rendered as one Python list (--rejected list), as published: the "
    "brackets give the label away, so that these accuracies mean nothing"
)


def main(
    source: str = "HannahRoseKirk/prism-alignment",
    out: Path = HERE / "data",
    min_dialogues: int = 6,
    seen_fraction: float = 0.5,
    seed: int = 0,
    rejected: Literal["each", "list"] = "each",
) -> None:
    """Make the comparisons of the participants with many dialogues; nothing is embedded yet.

    Args:
        source: hub dataset, or a folder with survey and conversations as .jsonl, .jsonl.gz or
            .parquet.
        out: folder of the prepared data.
        min_dialogues: fewest dialogues of a participant; half are for training, half for test.
        seen_fraction: share of the participants whose data train the basis.
        seed: of the draw of seen participants and of each one's training dialogues.
        rejected: each rejected response is a comparison of its own, or, as in the published
            code, the list of them is printed into one text, which gives the label away.
    """
    counts: Counter[str] = Counter()
    table = experiments.tabulate(read(source, rejected, counts), counts)
    enough = table.groupby("user_id").dialog_id.transform("nunique") >= min_dialogues
    name = f"participants with at least {min_dialogues} dialogues"
    table = experiments.keep(table, enough, counts, name)
    table = experiments.split_dialogues(table, seed, counts)
    table = experiments.split_users(table, seed, counts, seen_fraction)
    conversations, table = experiments.number_conversations(table, counts)
    settings = {
        "source": source,
        "min_dialogues": min_dialogues,
        "seen_fraction": seen_fraction,
        "seed": seed,
        "rejected": rejected,
    }
    info = {"dataset": "PRISM", "users_split": "given", "settings": settings, "counts": counts}
    warning = {"warning": LIST_WARNING} if rejected == "list" else {}
    experiments.write_prepared(out, conversations, table, {**info, **warning})
    print(experiments.funnel(counts))
    if warning:
        print(f"WARNING: {LIST_WARNING}")
    print(f"prepared {len(table):,} comparisons of {len(conversations):,} conversations in {out}")


def read(source: str, rejected: str, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The comparisons of every conversation by a participant who completed one."""
    completed = read_survey(source, counts)
    for place, row in read_table(source, "conversations", CONVERSATION):
        counts["conversations"] += 1
        whose = {name: text(row[column], place, column) for name, column in WHOSE.items()}
        if not completed.get(whose["user_id"]):
            known = whose["user_id"] in completed
            who = "with no completed conversation" if known else "who are not in the survey"
            counts[f"{experiments.LEFT_OUT}conversations of participants {who}"] += 1
            continue
        for comparison in experiments.compare(read_turns(place, row, rejected), counts):
            yield {**whose, **comparison}


def read_table(source: str, table: str, columns: Iterable[str]) -> experiments.Rows:
    """Rows of survey or conversations, which are configurations of one hub dataset."""
    return experiments.read_rows(source, table, columns, name=table, split="train")


def read_survey(source: str, counts: Counter[str]) -> dict[str, bool]:
    """Whether each participant completed a conversation."""
    rows = read_table(source, "survey", ("user_id", "num_completed_conversations"))
    completed = {row["user_id"]: bool(row["num_completed_conversations"]) for _, row in rows}
    counts["participants"] = len(completed)
    counts["participants with a completed conversation"] = sum(completed.values())
    return completed


def read_turns(place: str, row: dict[str, Any], rejected: str) -> Iterator[Turn]:
    """The turns of a conversation, up to one that is missing or has no single chosen response."""
    messages = defaultdict(list)
    for message in row["conversation_history"] or ():
        check_message(place, message)
        messages[message["turn"]].append(message)
    for number in range(max(messages, default=-1) + 1):
        if number not in messages:
            raise Unusable("dialogues from a missing turn on")
        yield read_turn(place, messages[number], rejected)


def check_message(place: str, message: Any) -> None:
    """Refuse what is not a message of the raw schema."""
    fields = message if isinstance(message, dict) else {}
    known = fields.get("role") in ("user", "model") and "content" in fields
    if not known or not isinstance(fields.get("turn"), int):
        raise InputError(f"{place}: a message needs turn, role (user or model), content: {message}")


def read_turn(place: str, messages: list[dict[str, Any]], rejected: str) -> Turn:
    """One turn: a user's message and the responses, one of them chosen."""
    said: dict[str, list[str]] = {"prompt": [], "chosen": [], "rejected": []}
    for message in messages:
        answer = "chosen" if message.get("if_chosen") else "rejected"
        kind = "prompt" if message["role"] == "user" else answer
        said[kind].append(text(message["content"], place, "content"))
    for kind, what in {"prompt": "user message", "chosen": "chosen response"}.items():
        if len(said[kind]) != 1:
            number = "several" if said[kind] else "no"
            raise Unusable(f"dialogues from a turn with {number} {what}s on")
    if rejected == "list" and said["rejected"]:
        said["rejected"] = [str(said["rejected"])]
    return Turn(said["prompt"][0], said["chosen"][0], said["rejected"])


if __name__ == "__main__":
    experiments.cli(main)
