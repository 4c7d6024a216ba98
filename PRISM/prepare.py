"""PRISM: dialogues in which each participant chose one of several responses a turn."""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.files import require
from lore.common.settings import Fraction, PositiveInt, SeedNumber
from lore.preparing import raw, tables

HERE = Path(__file__).resolve().parent
WHOSE = {"user_id": "user_id", "dialog_id": "conversation_id"}
CONVERSATION = (*WHOSE.values(), "conversation_history")
LIST_WARNING = (
    "rejected responses are rendered as one Python list (--rejected list), as published: the "
    "brackets give the label away, so that these accuracies mean nothing"
)


def main(
    source: str = "HannahRoseKirk/prism-alignment", out: Path = HERE / "data",
    min_dialogues: PositiveInt = 6, seen_fraction: Fraction = 0.5, seed: SeedNumber = 0,
    rejected: Literal["each", "list"] = "each",
) -> None:  # fmt: skip
    """Make the comparisons of the participants with many dialogues; nothing is embedded yet.

    Args:
        source: hub dataset, or folder of survey and conversations: .jsonl, .jsonl.gz or .parquet.
        out: folder of the prepared data.
        min_dialogues: fewest dialogues of a participant; half are for training, half for test.
        seen_fraction: share of the participants whose data train the basis.
        seed: of the draw of seen participants and of each one's training dialogues.
        rejected: each rejected response is a comparison of its own, or, as in the published
            code, the list of them is printed into one text, which gives the label away.
    """
    funnel = tables.Funnel()
    table = tables.tabulate(read(source, rejected, funnel), funnel)
    table = tables.keep_users(table, "participants", min_dialogues, "dialogues", funnel)
    table = tables.split_dialogues(table, seed, funnel)
    table = tables.split_users(table, seed, seen_fraction)
    conversations, table = tables.number_conversations(table, funnel)
    settings = {"source": source, "min_dialogues": min_dialogues, "seen_fraction": seen_fraction,
                "seed": seed, "rejected": rejected}  # fmt: skip
    info = {"dataset": "PRISM", "settings": settings}
    info |= {"warning": LIST_WARNING} if rejected == "list" else {}
    print(tables.write_prepared(out, conversations, table, info, funnel))


def read(source: str, rejected: str, funnel: tables.Funnel) -> list[dict[str, Any]]:
    """The comparisons of every conversation by a participant who completed one."""
    completed, column, hub = {}, "num_completed_conversations", {"name": "survey", "split": "train"}
    for place, row in raw.read_rows(source, "survey", ("user_id", column), **hub):
        name = raw.name(row["user_id"], place, "user_id")
        require(name not in completed, f"{place} has the user_id of an earlier row")
        count = 0 if row[column] is None else row[column]
        completed[name] = raw.number(count, place, column) > 0
    funnel.count("participants", len(completed))
    funnel.count("participants with a completed conversation", sum(completed.values()))
    comparisons, names = [], set()
    hub = {"name": "conversations", "split": "train"}
    for place, row in raw.read_rows(source, "conversations", CONVERSATION, **hub):
        funnel.count("conversations")
        whose = {name: raw.name(row[column], place, column) for name, column in WHOSE.items()}
        user, dialog = whose.values()
        require(dialog not in names, f"{place} has the conversation_id of an earlier row")
        names.add(dialog)
        if completed.get(user):
            comparisons += tables.compare(*read_turns(place, row, rejected), whose, funnel)
        else:
            known = user in completed
            who = "with no completed conversation" if known else "who are not in the survey"
            funnel.left_out(f"conversations of participants {who}")
    return comparisons


def read_turns(place: str, row: dict[str, Any], rejected: str) -> tuple[list[tables.Turn], str]:
    """The turns of a conversation up to one that cannot be used; and why, if there is one."""
    history = row["conversation_history"] or []
    listed = isinstance(history, list)
    require(listed, f"{place}: conversation_history must be a list, not {history!r:.40}")
    said: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for message in history:
        fields = message if isinstance(message, dict) else {}
        turn, is_chosen = fields.get("turn"), fields.get("if_chosen")
        known = fields.get("role") in ("user", "model") and "content" in fields
        require(known and type(turn) is int and turn >= 0, f"{place}: a message needs turn, "
                f"role (user or model), content, unlike {message!r:.80}")  # fmt: skip
        right = is_chosen in (True, False, None)
        require(right, f"{place}: if_chosen must be true or false, not {is_chosen!r:.40}")
        kind = "prompt" if message["role"] == "user" else "chosen" if is_chosen else "rejected"
        said[turn][kind].append(raw.text(message["content"], place, "content"))
    turns: list[tables.Turn] = []
    for number, turn in sorted(said.items()):
        if number != len(turns):
            return turns, "dialogues cut at a missing turn"
        for kind, what in {"prompt": "user message", "chosen": "chosen response"}.items():
            if len(turn[kind]) != 1:
                how_many = "several" if turn[kind] else "no"
                return turns, f"dialogues cut at a turn with {how_many} {what}s"
        lost = turn["rejected"]
        lost = [str(lost)] if rejected == "list" and lost else lost
        turns.append((turn["prompt"][0], turn["chosen"][0], lost))
    return turns, ""


if __name__ == "__main__":
    cli(main)
