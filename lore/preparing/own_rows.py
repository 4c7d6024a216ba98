"""Anybody's own rows, in any of three layouts: what was preferred to what, by whom, after what.

A layout is a function that turns all rows into choices; which one rows have is told by flags, else
by the names of their columns.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import combinations
from typing import Any, Literal, NamedTuple

from lore.common.files import InputError, digest, require
from lore.common.settings import NonNegativeFloat, PositiveInt
from lore.preparing import raw
from lore.preparing.messages import (
    Conversation,
    answers,
    conversation,
    is_texts,
    shared_beginning,
    structure,
    turns,
)
from lore.preparing.tables import HEAVIEST, LIGHTEST, draw

log = logging.getLogger(__name__)

Row = tuple[str, Mapping[str, Any]]  # its place for messages, such as "mine.jsonl row 12"

NO_PROMPT = "rows with an empty prompt or message"
TIES = "ties"
NONE = "none"  # --winner none: no column says who won


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are called, and how what they hold is read.

    Args:
        user: whose choice it is; worker_id, annotator and the like are found.
        prompt: what the user said, where that is all that precedes the response; or messages.
        messages: the dialogue up to the response, a list of role and content.
        chosen: the response that the user chose, or a list of some; a text or a list of messages.
        rejected: the response that was not chosen, or a list of some.
        first: one of two responses, of which winner names the better one; response_a and
            response_b, output_1 and output_2, and the like are found.
        second: the other one.
        winner: which of the two was preferred: a or b, 1 or 2, left or right, the columns' names;
            "none" says that no column tells.
        response: a response that was rated.
        rating: its rating, of which more is better.
        dialog: names the dialogue of its user that a row belongs to; may be missing.
        split: train or test; may be missing.
        weight: how much a row counts, shared by its comparisons; may be missing.
        timestamp: a number or an ISO date, which orders a dialogue; may be missing.
        first_wins: values of winner that mean the first response, where they are not understood.
        second_wins: values of winner that mean the second one.
        ties: out leaves ties out; half counts them both ways with half the weight.
        margin: least difference of two ratings that makes a comparison; 0 is any.
        pairs_per_user: most comparisons that are made of a user's ratings, drawn at random.
        user_name: one user for all rows, where no column names the user.
        prompt_text: one prompt for all rows, where no column has it.
    """

    user: str = "user"
    prompt: str = "prompt"
    messages: str = "messages"
    chosen: str = "chosen"
    rejected: str = "rejected"
    first: str = ""
    second: str = ""
    winner: str = ""
    response: str = "response"
    rating: str = ""
    dialog: str = "dialog"
    split: str = "split"
    weight: str = "weight"
    timestamp: str = "timestamp"
    first_wins: tuple[str, ...] = ()
    second_wins: tuple[str, ...] = ()
    ties: Literal["out", "half"] = "out"
    margin: NonNegativeFloat = 0.0
    pairs_per_user: PositiveInt = 100
    user_name: str = ""
    prompt_text: str = ""


USUAL = Columns()
NAMES = (
    *("user", "prompt", "messages", "chosen", "rejected", "first", "second", "winner"),
    *("response", "rating", "dialog", "split", "weight", "timestamp"),
)  # the fields that are names of columns


class Choice(NamedTuple):
    """Some responses that were preferred to others.

    Attributes:
        place: for messages, such as "mine.jsonl row 12".
        chosen, rejected: whole conversations that end in a response, each at least one; the content
            of the response is "" where it has no text.
        user, dialog, split: "" where the row does not say.
        weight: how much the row counts.
        time: seconds since 1970; 0 where the row does not say.
        left_out: why it does not count, such as a tie; else "".
    """

    place: str
    chosen: list[Conversation]
    rejected: list[Conversation]
    user: str
    dialog: str
    split: str
    weight: float
    time: float
    left_out: str = ""


def read_choices(
    rows: Iterable[Row], columns: Columns = USUAL, judged: bool = True
) -> list[Choice]:
    """The choices that rows tell of.

    Args:
        rows: with prompt or messages, and one of: chosen and rejected; two responses and a winner;
            two responses alone; a response and its rating. And perhaps user, dialog, split, weight
            and timestamp.
        columns: where each of these stands in the rows, and how it is read.
        judged: false where it does not matter what was preferred: no winner is needed.

    Raises:
        InputError: a row lacks a column, a cell holds something else, or the rows are likely to be
            of another layout than the flags say.
    """
    rows = [(place, _with_winner(row)) for place, row in rows]
    if not rows:
        return []
    layout, columns = find_layout(*rows[0], columns, judged)
    for place, row in rows:
        _check_columns(place, row, columns, LAYOUTS[layout].needed)
    if layout == "pairs" and judged:
        _refuse_names(rows, columns)
    found = LAYOUTS[layout].read(rows, columns)
    typed = {str(row.get(columns.user)) for _, row in rows if row.get(columns.user)}
    joined = len(typed) - len({_same_name(name) for name in typed})
    if joined:
        log.info("%d spellings of users' names were joined with others (Unicode, blanks)", joined)
    return found


# ------------------------------------------------------------------------- What is where

# Names that tables have, in small letters and digits alone.
USERS = (
    "user",
    *("username", "userid", "workerid", "worker", "turkerid", "annotator", "annotatorid", "rater"),
    *("raterid", "participant", "participantid", "labeler", "labelerid", "judge", "judgeid"),
)
PROMPTS = ("prompt", "userprompt", "question", "questiontext", "query", "instruction", "post")
DIALOGUES = ("messages", "conversations", "conversation")
VERDICTS = ("winner", "preferred", "preference", "label")
WINNERS = (
    *(*VERDICTS, "choice", "chosenresponse", "preferredresponse", "betteranswer"),
    *("betterresponse", "better", "vote", "chosen"),
)
RATINGS = ("rating", "score", "stars")
STEMS = (
    *("response", "output", "text", "answer", "completion", "candidate", "reply", "summary"),
    *("option", "generation", "modelresponse", "a"),
)
ENDS = (("a", "b"), ("1", "2"), ("0", "1"), ("left", "right"), ("first", "second"))


def _plain(name: Any) -> str:
    """A name in small letters and digits alone, without what crowd sites put before it."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^(input|answer)\.", "", str(name).lower()))


def _with_winner(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with a winner, where three columns say with a 1 whether each side won or none."""
    sides = {"winner_model_a": "model_a", "winner_model_b": "model_b"}
    if "winner" in row or not sides.keys() <= row.keys():
        return row
    said = [name for column, name in sides.items() if str(row[column]) in ("1", "1.0", "True")]
    return {**row, "winner": said[0] if len(said) == 1 else "tie"}


def resolve(row: Mapping[str, Any], columns: Columns) -> Columns:
    """The columns with user, prompt and messages under the names that this row has for them."""
    plain = {_plain(name): name for name in row}
    found = {}
    if columns.user == USUAL.user and columns.user not in row and not columns.user_name:
        found["user"] = next((plain[name] for name in USERS if name in plain), columns.user)
    named = (columns.prompt, columns.messages) != (USUAL.prompt, USUAL.messages)
    if not named and not {columns.prompt, columns.messages} & row.keys():
        has_input = bool(row.get("input"))  # an instruction is only half of the prompt then
        asked = [name for name in PROMPTS if name in plain and not (has_input and "instr" in name)]
        spoken = [name for name in DIALOGUES if name in plain]
        found |= {"messages": plain[spoken[0]]} if spoken else {}
        found |= {"prompt": plain[asked[0]]} if asked and not spoken else {}
    return replace(columns, **found)


def find_layout(
    place: str, row: Mapping[str, Any], columns: Columns, judged: bool = True
) -> tuple[str, Columns]:
    """The layout of rows by flags and the first row, and their columns; said where it is found.

    Raises:
        InputError: it is none, or more than one.
    """
    known = resolve(row, columns)
    flags = {name for name in NAMES if getattr(columns, name) != getattr(USUAL, name)}
    if flags & {"first", "second"} or ("winner" in flags and columns.winner != NONE):
        layout, known = "votes", _two_and_winner(place, row, known, judged)
    elif "rating" in flags:
        layout = "ratings"
    elif flags & {"chosen", "rejected"} or {known.chosen, known.rejected} <= row.keys():
        layout = "pairs"
        if judged and not columns.winner:
            _refuse_verdict(place, row, known)
    elif _pairs_of_names(row):
        layout, known = "votes", _two_and_winner(place, row, known, judged)
    elif columns.response in row and any(name in row for name in RATINGS):
        layout, rating = "ratings", next(name for name in RATINGS if name in row)
        known = replace(known, rating=rating)
    else:
        layout = "pairs"  # whose columns are missing, which is told by their names
    if not judged and layout == "votes" and not known.winner:
        known = replace(known, winner=NONE)
    if known != columns:
        names = {name: getattr(known, name) for name in NAMES}
        new = [f"{name} {names[name]}" for name in NAMES if names[name] != getattr(columns, name)]
        log.info("columns found: %s", ", ".join(new))
    return layout, known


def _pairs_of_names(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The columns whose names are those of two responses, such as response_a and response_b."""
    plain = {_plain(name): name for name in row}
    orders = [(x + y, x + z) for x in STEMS for y, z in ENDS]
    orders += [(y + x, z + x) for x in STEMS[:-1] for y, z in ENDS]
    return [(plain[one], plain[two]) for one, two in orders if one in plain and two in plain]


def _two_and_winner(place: str, row: Mapping[str, Any], columns: Columns, judged: bool) -> Columns:
    """The columns with first, second and winner, found where flags do not name them."""
    first, second, winner = columns.first, columns.second, columns.winner
    if not (first and second):
        require(not first and not second, "--first and --second go together; name both")
        pairs = _pairs_of_names(row)
        some = "; ".join(" and ".join(pair) for pair in pairs) or f"only {_there(row)}"
        said = f"{place}: --first and --second must say which two responses are compared: {some}"
        require(len(pairs) == 1, said)
        first, second = pairs[0]
    if not winner and judged:
        plain = {_plain(name): name for name in row if name not in (first, second)}
        found = [plain[name] for name in WINNERS if name in plain]
        said = f"{place} has two responses, {first} and {second}, but --winner must say which "
        said += f"column names the better one: {', '.join(found) or _there(row)}"
        require(len(found) == 1, said)
        winner = found[0]
    return replace(columns, first=first, second=second, winner=winner)


def _refuse_verdict(place: str, row: Mapping[str, Any], columns: Columns) -> None:
    used = {getattr(columns, name) for name in NAMES}
    verdicts = [name for name in row if _plain(name) in VERDICTS and name not in used]
    if verdicts:
        raise InputError(
            f"{place}: no flag uses the column {verdicts[0]}; if it says which of two responses is "
            f"better, give --first, --second and --winner {verdicts[0]}, else --winner {NONE}"
        )


def _refuse_names(rows: Sequence[Row], columns: Columns) -> None:
    """Refuse chosen or rejected responses that are names of responses, such as A and B."""
    for side in (columns.chosen, columns.rejected):
        values = {str(row[side]).strip() for _, row in rows}
        if len(rows) >= 6 and len(values) < 4 and max(map(len, values)) < 20:
            some = ", ".join(sorted(values))
            raise InputError(
                f"{_table(rows[0][0])}: {side} holds nothing but {some}, which "
                "are no responses; if it says which of two is better, give --first, --second and "
                f"--winner {side}"
            )


def _check_columns(
    place: str, row: Mapping[str, Any], columns: Columns, needed: Sequence[str]
) -> None:
    """What must be there: the responses, and whatever has another name than the usual one."""
    for name in NAMES:
        column = getattr(columns, name)
        if column in ("", NONE) or column in row:
            continue
        if name in needed or column != getattr(USUAL, name):
            said = f"{place} has no column {column}, only {_there(row)}; --{name} says which one"
            other = " (or give --first, --second and --winner, or --rating)"
            raise InputError(f"{said} holds it{other if name in needed else ''}")


def _there(row: Mapping[str, Any]) -> str:
    """The names of a row's columns, the first of them where there are many."""
    return ", ".join([*map(str, list(row)[:12]), *(["..."] if len(row) > 12 else [])])


# --------------------------------------------------------------------------- One row


def read_endings(
    place: str, row: Mapping[str, Any], columns: Columns, names: Sequence[str]
) -> list[list[Conversation]] | None:
    """For each of these columns, the whole conversations that end in its responses.

    Texts and messages of the assistant follow the row's prompt or messages. Conversations that
    begin with the user have their prompt in them: what they all begin with. Lists of texts, the
    prompt's and the responses', are the turns of the two sides.

    Returns:
        None where the dialogue before the responses lacks text.

    Raises:
        InputError: the row has no prompt, or a cell is of another form.
    """
    prompt = structure(row.get(columns.prompt), place, columns.prompt)
    cells = [structure(row[name], place, name) for name in names]
    if is_texts(prompt) and all(map(is_texts, cells)):
        found = [
            [turns(prompt, cell, place, name)] for name, cell in zip(names, cells, strict=True)
        ]
    else:
        found = [answers(cell, place, name) for name, cell in zip(names, cells, strict=True)]
        every = [messages for some in found for messages in some]
        begun = [messages[0]["role"] != "assistant" for messages in every]
        if any(begun):
            said = f"{place}: some of {' and '.join(names)} begin with the assistant, others not"
            require(all(begun), said)
            _check_prompt(place, row, columns, names, shared_beginning(every))
        else:
            history = read_history(place, row, columns)
            found = (
                [[[*history, *messages] for messages in some] for some in found] if history else []
            )
    before = [messages[:-1] for some in found for messages in some]
    return found if all(b and all(message["content"] for message in b) for b in before) else None


def read_history(place: str, row: Mapping[str, Any], columns: Columns = USUAL) -> Conversation:
    """The dialogue up to the response, from prompt or messages; empty where it lacks text.

    Raises:
        InputError: the row has neither or both, they are of another form, or the dialogue ends with
            the assistant.
    """
    prompt, messages = row.get(columns.prompt), row.get(columns.messages)
    if messages in (None, "", []):
        there = columns.prompt in row or columns.messages in row
        if not there:
            said = f"{place} has neither {columns.prompt} nor {columns.messages}; name the column "
            require(bool(columns.prompt_text), said + "by --prompt, or one text by --prompt-text")
            prompt = columns.prompt_text
        messages, name = structure(prompt, place, columns.prompt), columns.prompt
        if is_texts(messages) or not isinstance(messages, list):
            content = raw.text(prompt, place, columns.prompt)
            return [{"role": "user", "content": content}] if content else []
    else:
        both = f"{place} has both {columns.prompt} and {columns.messages}; leave one out"
        require(prompt in (None, ""), both)
        name = columns.messages
    history = conversation(messages, place, name)
    ends = bool(history) and history[-1]["role"] == "assistant"
    require(not ends, f"{place}: {name} ends with the assistant, so that nothing is to be answered")
    return history if all(message["content"] for message in history) else []


def _check_prompt(
    place: str, row: Mapping[str, Any], columns: Columns, names: Sequence[str], shared: Conversation
) -> None:
    """Conversations begin alike, and with the prompt and messages of the row if it has them."""
    asked = [message["content"].strip() for message in shared if message["role"] == "user"]
    both = " and ".join(names)
    require(bool(asked), f"{place}: {both} do not begin with the same message of the user")
    other = f"{place}: {both} do not begin with what %s says"
    prompt = structure(row.get(columns.prompt), place, columns.prompt)
    if isinstance(prompt, str) and prompt.strip():
        require(prompt.strip() in asked, other % columns.prompt)
    for name, cell in ((columns.messages, row.get(columns.messages)), (columns.prompt, prompt)):
        if isinstance(cell, list) and cell:
            found = conversation(cell, place, name)
            number = min(len(found), len(shared))
            require(found[:number] == shared[:number], other % name)


def _choice(place: str, row: Mapping[str, Any], columns: Columns, names: Sequence[str]) -> Choice:
    """What a row says, with the conversations of one column as chosen, of the other as rejected."""
    found = read_endings(place, row, columns, names)
    chosen, rejected = found or ([], [])
    return Choice(
        place,
        chosen,
        rejected,
        user=columns.user_name or _same_name(_name(place, row, columns.user)),
        dialog=_name(place, row, columns.dialog),
        split=raw.text(row.get(columns.split), place, columns.split),
        weight=_weight(place, row, columns.weight),
        time=_time(place, row, columns.timestamp),
        left_out="" if found else NO_PROMPT,
    )


def _same_name(name: str) -> str:
    """A user's name as all spellings of it are joined."""
    return unicodedata.normalize("NFC", name).strip()


def _name(place: str, row: Mapping[str, Any], column: str) -> str:
    cell = row.get(column)
    return "" if cell in (None, "") else raw.name(cell, place, column)


def _weight(place: str, row: Mapping[str, Any], column: str) -> float:
    """One where the row does not say."""
    cell = row.get(column)
    if cell in (None, ""):
        return 1.0
    weight = raw.number(_as_number(cell), place, column)
    if not LIGHTEST <= weight <= HEAVIEST:
        raise InputError(
            f"{place}: {column} must be above 0, from {LIGHTEST:g} to {HEAVIEST:g}; remove the row "
            "if it is not to count"
        )
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


# --------------------------------------------------------------------------- Layouts


def _pairs(rows: Sequence[Row], columns: Columns) -> list[Choice]:
    """Chosen and rejected responses."""
    sides = (columns.chosen, columns.rejected)
    return [_choice(place, row, columns, sides) for place, row in rows]


def _votes(rows: Sequence[Row], columns: Columns) -> list[Choice]:
    """Two responses and the name of the better one."""
    sides = (columns.first, columns.second)
    said = Counter(_value(row.get(columns.winner)) for _, row in rows)
    means = _meanings(said, columns, rows[0][0])
    found = []
    for place, row in rows:
        choice = _choice(place, row, columns, sides)
        verdict = means[_value(row.get(columns.winner))]
        turned = choice._replace(chosen=choice.rejected, rejected=choice.chosen)
        if verdict != TIES or choice.left_out:
            found.append(turned if verdict == columns.second else choice)
        elif columns.ties == "half":
            found += [each._replace(weight=choice.weight / 2) for each in (choice, turned)]
        else:
            found.append(choice._replace(left_out=TIES))
    return found


def _value(cell: Any) -> str:
    """What a verdict says, in small letters: numbers as whole ones where they are."""
    text = "" if cell is None else str(cell).strip().lower()
    number = re.fullmatch(r"(-?\d+)\.0+", text)
    return number[1] if number else "" if text == "nan" else text


TIED = {"", "tie", "tied", "both", "neither", "equal", "equally", "same", "none", "draw", "na",
        "bothbad", "bothgood", "tiebothbad", "nopreference"}  # fmt: skip
SIDES = {"a": 0, "left": 0, "first": 0, "1": 0, "b": 1, "right": 1, "second": 1, "2": 1}
SCALES = (  # numbers that must be there, and what the numbers of such a scale mean; 2 is a tie
    ({"-1"}, {"-1": 0, "0": 2, "1": 1}),
    ({"2"}, {"1": 0, "2": 1}),
    ({"0", "1"}, {"0": 0, "1": 1}),
)


def _meanings(said: Counter[str], columns: Columns, place: str) -> dict[str, str]:
    """The column that each verdict names, or TIES.

    Raises:
        InputError: some verdicts are not understood.
    """
    sides = (columns.first, columns.second, TIES)
    own = {_value(columns.first): 0, _value(columns.second): 1}
    own |= dict.fromkeys(map(_value, columns.first_wins), 0)
    own |= dict.fromkeys(map(_value, columns.second_wins), 1)
    numbers = {value for value in said if re.fullmatch(r"-?\d+", value) and value not in own}
    scale = next((scale for need, scale in SCALES if need <= numbers <= scale.keys()), {})
    index = {value: own.get(value, scale.get(value, _in_words(value))) for value in said}
    unknown = [f"{value!r:.40} ({said[value]})" for value in said if index[value] is None]
    if unknown:
        raise InputError(
            f"{_table(place)}: {columns.winner} has values that are not understood: "
            f"{', '.join(unknown[:8])}; --first-wins and --second-wins say what they mean"
        )
    if columns.winner != NONE:
        told = [f"{v[:40] or 'empty'} = {sides[i]} ({said[v]})" for v, i in sorted(index.items())]
        log.info("%s: %s", columns.winner, ", ".join(told))
    return {value: sides[i] for value, i in index.items()}


def _in_words(value: str) -> int | None:
    """0 for the first, 1 for the second, 2 for a tie; None for what is not understood."""
    plain = re.sub(r"(is)?(better|wins)$", "", re.sub(r"[^a-z0-9]", "", value))
    if plain in TIED:
        return 2
    bare = re.sub(f"^(the)?(model|{'|'.join(STEMS[:-1])})(?=.)", "", plain)
    return None if plain.isdigit() else SIDES.get(bare)


def _table(place: str) -> str:
    """The file of a row's place."""
    return place.rpartition(" row ")[0] or place


def _ratings(rows: Sequence[Row], columns: Columns) -> list[Choice]:
    """Ratings of responses: pairs of one user's ratings after the same prompt."""
    left_out, rated, of_user = [], defaultdict(list), defaultdict(dict)
    for place, row in rows:
        choice = _choice(place, row, columns, (columns.response, columns.response))
        rating = raw.number(_as_number(row[columns.rating]), place, columns.rating)
        if choice.left_out:
            left_out.append(choice)
        else:
            prompt = digest(choice.chosen[0][:-1])
            rated[choice.user, choice.dialog, choice.split, prompt].append((rating, choice))
    for (user, *_), some in rated.items():
        of_user[user] |= _rated_pairs(some, columns.margin)
    drawn = [(pairs, draw(pairs, columns.pairs_per_user, 0)) for pairs in of_user.values()]
    found = [pairs[key] for pairs, keys in drawn for key in sorted(keys)]
    log.info(
        "%d ratings make %d comparisons, %d of which follow from two others of the same user",
        len(rows), len(found), _following(found),
    )  # fmt: skip
    return left_out + found


def _following(choices: Sequence[Choice]) -> int:
    """How many of these follow from two others: a over b and b over c say a over c."""
    named = [(c.user, digest(c.chosen[0]), digest(c.rejected[0])) for c in choices]
    worse = defaultdict(set)
    for user, chosen, rejected in named:
        worse[user, chosen].add(rejected)
    return sum(any(c in worse.get((u, b), ()) for b in worse[u, a]) for u, a, c in named)


def _rated_pairs(rated: list[tuple[float, Choice]], margin: float) -> dict[str, Choice]:
    """A choice for each two ratings that differ enough, the higher one chosen."""
    found = {}
    for one, other in combinations(rated, 2):
        (high, better), (low, worse) = sorted((one, other), key=lambda each: -each[0])
        if high > low and high - low >= margin:
            weight = (better.weight + worse.weight) / 2
            pair = better._replace(rejected=worse.rejected, weight=weight)
            key = digest([pair.user, pair.dialog, pair.chosen, pair.rejected])
            found[key] = pair
    return found


class Layout(NamedTuple):
    """How rows are laid out: the columns that they need, and what makes choices of them."""

    needed: tuple[str, ...]
    read: Callable[[Sequence[Row], Columns], list[Choice]]


LAYOUTS = {
    "pairs": Layout(("chosen", "rejected"), _pairs),
    "votes": Layout(("first", "second", "winner"), _votes),
    "ratings": Layout(("response", "rating"), _ratings),
}
