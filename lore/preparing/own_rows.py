"""Anybody's own rows: a dialogue so far, a response that was chosen and some that were not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from lore.common.files import InputError, require
from lore.preparing import raw

Conversation = list[dict[str, str]]

NEEDED = ("chosen", "rejected")


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are called.

    Args:
        user: whose choice it is.
        prompt: what the user said, where that is all that precedes the response.
        messages: the dialogue up to the response, a list of role and content.
        chosen: the response that the user chose, or a list of some.
        rejected: the response that was not chosen, or a list of some.
        dialog: names the dialogue of its user that a row belongs to; may be missing.
        split: train or test; may be missing.
        weight: how much a row counts, shared by its comparisons; may be missing.
        timestamp: a number or an ISO date, which orders a dialogue; may be missing.
    """

    user: str = "user"
    prompt: str = "prompt"
    messages: str = "messages"
    chosen: str = "chosen"
    rejected: str = "rejected"
    dialog: str = "dialog"
    split: str = "split"
    weight: str = "weight"
    timestamp: str = "timestamp"


USUAL = Columns()


class Choice(NamedTuple):
    """One row.

    Attributes:
        place: for messages, such as "mine.jsonl row 12".
        history: the dialogue up to the response; empty where it has no text.
        chosen, rejected: responses, each at least one; "" for one without text.
        user, dialog, split: "" where the row does not say.
        weight: how much the row counts.
        time: seconds since 1970; 0 where the row does not say.
    """

    place: str
    history: Conversation
    chosen: list[str]
    rejected: list[str]
    user: str
    dialog: str
    split: str
    weight: float
    time: float


def read_choices(rows: raw.Rows, columns: Columns = USUAL) -> Iterator[Choice]:
    """The choices that rows tell of.

    Args:
        rows: with chosen and rejected, each a text or a list of texts; prompt, a text, or
            messages, a list of role and content; and perhaps user, dialog, split, weight, and
            timestamp, a number or an ISO date. A list may be a JSON text, as in a .csv.
        columns: where each of these stands in the rows.

    Raises:
        InputError: a row lacks a column, or a cell holds something else.
    """
    for place, row in rows:
        _check_columns(place, row, columns)
        yield Choice(
            place,
            read_history(place, row, columns),
            read_responses(place, row, columns.chosen),
            read_responses(place, row, columns.rejected),
            user=_name(place, row, columns.user),
            dialog=_name(place, row, columns.dialog),
            split=raw.text(row.get(columns.split), place, columns.split),
            weight=_weight(place, row, columns.weight),
            time=_time(place, row, columns.timestamp),
        )


def _check_columns(place: str, row: Mapping[str, Any], columns: Columns) -> None:
    """What must be there: the responses, and whatever has another name than the usual one."""
    for name, column in asdict(columns).items():
        if column not in row and (name in NEEDED or column != name):
            there = ", ".join(map(str, row))
            raise InputError(
                f"{place} has no column {column}, only {there}; --{name} says which one holds it"
            )


def read_history(place: str, row: Mapping[str, Any], columns: Columns = USUAL) -> Conversation:
    """The dialogue up to the response, from prompt or messages; empty where it lacks text.

    Raises:
        InputError: the row has neither or both, or they are of another form.
    """
    prompt, messages = row.get(columns.prompt), row.get(columns.messages)
    if messages in (None, "", []):
        there = columns.prompt in row or columns.messages in row
        require(there, f"{place} has neither {columns.prompt} nor {columns.messages}")
        content = raw.text(prompt, place, columns.prompt)
        return [{"role": "user", "content": content}] if content else []
    if prompt not in (None, ""):
        raise InputError(f"{place} has both {columns.prompt} and {columns.messages}; leave one out")
    if isinstance(messages, str):
        messages = raw.read_json_text(messages, f"{place}: {columns.messages}")
    if not isinstance(messages, list):
        raise InputError(f"{place}: {columns.messages} must be a list of role and content")
    history = [_message(message, place) for message in messages]
    return history if all(message["content"] for message in history) else []


def _message(message: Any, place: str) -> dict[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise InputError(f"{place}: a message must have role and content, unlike {message!r:.60}")
    role = raw.name(message["role"], place, "role")
    return {"role": role, "content": raw.text(message["content"], place, "content")}


def read_responses(place: str, row: Mapping[str, Any], column: str) -> list[str]:
    """The responses in a cell, a text or a list of texts; "" for one without text."""
    cell = row[column]
    if isinstance(cell, str) and cell.startswith('["'):
        try:  # a list in a .csv; but a response may begin so too
            cell = raw.read_json_text(cell, place)
        except InputError:
            return [raw.text(cell, place, column)]
    if not isinstance(cell, list):
        return [raw.text(cell, place, column)]
    require(bool(cell), f"{place}: {column} is an empty list; give a response or remove the row")
    return [raw.text(response, place, f"each {column}") for response in cell]


def _name(place: str, row: Mapping[str, Any], column: str) -> str:
    cell = row.get(column)
    return "" if cell in (None, "") else raw.name(cell, place, column)


def _weight(place: str, row: Mapping[str, Any], column: str) -> float:
    """One where the row does not say."""
    cell = row.get(column)
    if cell in (None, ""):
        return 1.0
    weight = raw.number(_as_number(cell), place, column)
    require(weight > 0, f"{place}: {column} must be above 0; remove the row if it is not to count")
    return weight


def _time(place: str, row: Mapping[str, Any], column: str) -> float:
    """Seconds since 1970; dates without a zone are UTC."""
    cell = _as_number(row.get(column))
    if cell in (None, ""):
        return 0.0
    if isinstance(cell, str):
        try:
            cell = datetime.fromisoformat(cell)
        except ValueError as error:
            message = f"{place}: {column} must be a number or an ISO date, not {cell!r:.40}"
            raise InputError(message) from error
    if isinstance(cell, datetime):
        return (cell if cell.tzinfo else cell.replace(tzinfo=UTC)).timestamp()
    return raw.number(cell, place, column)


def _as_number(cell: Any) -> Any:
    """The number where one stands as text, as every number does in a .csv."""
    try:
        return float(cell) if isinstance(cell, str) else cell
    except ValueError:
        return cell
