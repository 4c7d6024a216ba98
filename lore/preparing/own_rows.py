"""Anybody's own rows, in any of three layouts: what was preferred to what, by whom, after what.

Flags say which layout rows have, else the names of their columns do.
"""

import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain, permutations, product, takewhile
from typing import Any, Literal, NamedTuple

from lore.common.files import InputError, digest, require
from lore.common.settings import NonNegativeFloat, PositiveInt
from lore.preparing import messages, raw
from lore.preparing.messages import Conversation, structure
from lore.preparing.tables import HEAVIEST, LIGHTEST, draw

log = logging.getLogger(__name__)

Cells = Mapping[str, Any]  # of a row, by column
Row = tuple[str, Cells]  # its place for messages, such as "mine.jsonl row 12"

NO_PROMPT, TIES = "rows with an empty prompt or message", "ties"  # why a row is left out
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
        first: one of two responses; response_a and response_b, text_1 and text_2, ... are found.
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
NAMES = tuple(vars(USUAL))[:14]  # the fields that are names of columns
NEEDED = {"pairs": ("chosen", "rejected"), "votes": ("first", "second", "winner"),
          "ratings": ("response", "rating")}  # fmt: skip


class Choice(NamedTuple):
    """Some responses that were preferred to others; what a row does not say is "" or 0."""

    place: str  # for messages, such as "mine.jsonl row 12"
    chosen: list[Conversation]  # whole ones, which end in a response, whose content may be ""
    rejected: list[Conversation]
    user: str
    dialog: str
    split: str
    weight: float
    time: float  # seconds since 1970
    sources: tuple[tuple[str, Cells, str], ...]  # place, row and column of both sides
    left_out: str = ""  # why it does not count, such as a tie


def read_choices(
    rows: Iterable[Row], columns: Columns = USUAL, judged: bool = True
) -> list[Choice]:
    """The choices that rows tell of; no winner is needed unless what was preferred is ``judged``.

    InputError where a row lacks a column, a cell holds something else, or the rows are likely to be
    of another layout than the flags say.
    """
    rows = [(place, _with_winner(row)) for place, row in rows]
    if not rows:
        return []
    layout, columns = _find_layout(*rows[0], columns, judged)
    _check_columns(rows, columns, layout, judged)
    typed = {str(row.get(columns.user)) for _, row in rows if row.get(columns.user)}
    if joined := len(typed) - len(set(map(_same_name, typed))):
        log.info("%d spellings of users' names were joined with others (Unicode, blanks)", joined)
    if layout == "pairs":
        sides = (columns.chosen, columns.rejected)
        return [_choice(place, row, columns, sides) for place, row in rows]
    return _votes(rows, columns) if layout == "votes" else _ratings(rows, columns)


# ------------------------------------------------------------------------- What is where

# Names that tables have, in small letters and digits alone.
USERS = ("user", "username", "userid", "workerid", "worker", "turkerid", "annotator", "annotatorid",
         "rater", "raterid", "participant", "participantid", "labeler", "labelerid", "judge",
         "judgeid")  # fmt: skip
PROMPTS = ("prompt", "userprompt", "question", "questiontext", "query", "instruction", "post")
DIALOGUES = ("messages", "conversations", "conversation")
VERDICTS = ("winner", "preferred", "preference", "label")
WINNERS = (*VERDICTS, "choice", "chosenresponse", "preferredresponse", "betteranswer",
           "betterresponse", "better", "vote", "chosen")  # fmt: skip
RATINGS = ("rating", "score", "stars")
STEMS = ("response", "output", "text", "answer", "completion", "candidate", "reply", "summary",
         "option", "generation", "modelresponse", "a")  # fmt: skip
ENDS = (("a", "b"), ("1", "2"), ("0", "1"), ("left", "right"), ("first", "second"))


def _plain(names: Iterable[Any]) -> dict[str, Any]:
    """Names by their small letters and digits, without what crowd sites put before them."""
    return {re.sub(r"^(input|answer)\.|[^a-z0-9]", "", str(name).lower()): name for name in names}


def _known(names: Iterable[str], among: Iterable[Any]) -> list[Any]:
    """Which of these names there are, as they are written there."""
    plain = _plain(among)
    return [plain[name] for name in names if name in plain]


def _with_winner(row: Cells) -> Cells:
    """The row with a winner, where three columns say with a 1 whether each side won or none."""
    sides = {"winner_model_a": "model_a", "winner_model_b": "model_b"}
    if "winner" in row or not sides.keys() <= row.keys():
        return row
    said = [name for column, name in sides.items() if str(row[column]) in ("1", "1.0", "True")]
    return {**row, "winner": said[0] if len(said) == 1 else "tie"}


def resolve(row: Cells, columns: Columns) -> Columns:
    """The columns with user, prompt and messages under the names that this row has for them."""
    found: dict[str, list[str]] = {}
    if columns.user == USUAL.user and columns.user not in row and not columns.user_name:
        found["user"] = _known(USERS, row)
    named = (columns.prompt, columns.messages) != (USUAL.prompt, USUAL.messages)
    if not named and not {columns.prompt, columns.messages} & row.keys():
        half = "instruction" if row.get("input") else ""  # the rest of the prompt is the input then
        found["messages"] = _known(DIALOGUES, row)
        if not found["messages"]:
            found["prompt"] = _known([name for name in PROMPTS if name != half], row)
    return replace(columns, **{what: names[0] for what, names in found.items() if names})


def _find_layout(place: str, row: Cells, columns: Columns, judged: bool) -> tuple[str, Columns]:
    """The layout of rows by flags and the first row, and their columns, if they are clear."""
    known = resolve(row, columns)
    flags = {name for name in NAMES if getattr(columns, name) != getattr(USUAL, name)}
    has_pairs = flags & {"chosen", "rejected"} or {known.chosen, known.rejected} <= row.keys()
    ratings = [name for name in RATINGS if name in row and columns.response in row]
    others = not has_pairs and "rating" not in flags and _pairs_of_names(row)
    if flags & {"first", "second"} or columns.winner not in ("", NONE) or others:
        layout, known = "votes", _two_and_winner(place, row, known, judged)
    elif "rating" in flags or ratings and not has_pairs:
        layout, known = "ratings", replace(known, rating=columns.rating or ratings[0])
    else:  # which of their columns are missing is said later
        layout = "pairs"
    names = {name: getattr(known, name) for name in NAMES}
    if layout == "pairs" and has_pairs and judged and not columns.winner:
        unused = [name for name in _known(VERDICTS, row) if name not in names.values()]
        error = "{0}: no flag uses the column {1}; if it says which of two responses is better, "
        error += "give --first, --second and --winner {1}, else --winner {2}"
        require(not unused, error.format(place, *unused[:1] or [""], NONE))
    new = [f"{name} {found}" for name, found in names.items() if found != getattr(columns, name)]
    if new:
        log.info("columns found: %s", ", ".join(new))
    return layout, known


def _pairs_of_names(row: Cells) -> list[tuple[str, str]]:
    """The columns whose names are those of two responses, such as response_a and response_b."""
    plain = _plain(row)
    orders = [(x + y, x + z) for x in STEMS for y, z in ENDS]
    orders += [(y + x, z + x) for x in STEMS[:-1] for y, z in ENDS]
    return [(plain[one], plain[two]) for one, two in orders if one in plain and two in plain]


def _two_and_winner(place: str, row: Cells, columns: Columns, judged: bool) -> Columns:
    """The columns with first, second and winner, found where flags do not name them."""
    first, second, winner = columns.first, columns.second, columns.winner
    require(bool(first) == bool(second), "--first and --second go together; name both")
    if not first:
        pairs = _pairs_of_names(row)
        some = "; ".join(" and ".join(pair) for pair in pairs) or f"only {_there(row)}"
        require(len(pairs) == 1, f"{place}: --first and --second must say which two responses are "
                f"compared: {some}")  # fmt: skip
        first, second = pairs[0]
    if not winner and judged:
        found = _known(WINNERS, [name for name in row if name not in (first, second)])
        some = ", ".join(found) or _there(row)
        require(len(found) == 1, f"{place} has two responses, {first} and {second}, but --winner "
                f"must say which column names the better one: {some}")  # fmt: skip
        winner = found[0]
    return replace(columns, first=first, second=second, winner=winner or NONE)


def _check_columns(rows: Sequence[Row], columns: Columns, layout: str, judged: bool) -> None:
    """Responses, which are no names such as A and B, and what has no usual name must be there."""
    for (place, row), name in product(rows, NAMES):
        column, needed = getattr(columns, name), name in NEEDED[layout]
        if (needed or column != getattr(USUAL, name)) and column not in ("", NONE, *row):
            other = " (or give --first, --second and --winner, or --rating)" * needed
            raise InputError(f"{place} has no column {column}, only {_there(row)}; --{name} says "
                             f"which one holds it{other}")  # fmt: skip
    for side in (columns.chosen, columns.rejected) if layout == "pairs" and judged else ():
        values = {str(row[side]).strip() for _, row in rows}
        said, some = rows[0][0].rpartition(" row ")[0], ", ".join(sorted(values))
        require(len(rows) < 6 or len(values) >= 4 or max(map(len, values)) >= 20, f"{said}: {side} "
                f"holds nothing but {some:.80}, which are no responses; if it says which of two is "
                f"better, give --first, --second and --winner {side}")  # fmt: skip


def _there(row: Cells) -> str:
    """The names of a row's columns, the first twelve of them."""
    return ", ".join([*map(str, list(row)[:12]), *(["..."] if len(row) > 12 else [])])


# --------------------------------------------------------------------------- One row


def read_endings(
    place: str, row: Cells, columns: Columns, names: Sequence[str]
) -> list[list[Conversation]] | None:
    """For each of these columns, the whole conversations that end in its responses; None where the
    dialogue before them lacks text, InputError where there is none or a cell is of another form.

    Texts and messages of the assistant follow the row's prompt or messages. Conversations that
    begin with the user have their prompt in them: what they all begin with. Lists of texts, the
    prompt's and the responses', are the turns of the two sides.
    """
    prompt = structure(row.get(columns.prompt), place, columns.prompt)
    cells = [(structure(row[name], place, name), place, name) for name in names]
    if all(map(messages.is_texts, (prompt, *(cell for cell, *_ in cells)))):
        found = [[messages.turns(prompt, *cell)] for cell in cells]
    else:
        found = [messages.answers(*cell) for cell in cells]
        every = [talk for some in found for talk in some]
        begun = {talk[0]["role"] != "assistant" for talk in every}
        alike, both = len(begun) == 1, " and ".join(names)
        require(alike, f"{place}: some of {both} begin with the assistant, others not")
        if True in begun:
            _check_prompt(place, row, columns, both, every)
        else:
            history = _read_history(place, row, columns)
            found = [[[*history, *talk] for talk in some] for some in found] if history else []
    before = [talk[:-1] for some in found for talk in some]
    return found if all(b and all(m["content"] for m in b) for b in before) and found else None


def _read_history(place: str, row: Cells, columns: Columns) -> Conversation:
    """The dialogue up to the response, from prompt or messages; empty where it lacks text."""
    prompt, cell, name = row.get(columns.prompt), row.get(columns.messages), columns.messages
    if cell in (None, "", []):
        if not {columns.prompt, columns.messages} & row.keys():
            prompt = columns.prompt_text
            require(bool(prompt), f"{place} has neither {columns.prompt} nor {columns.messages}; "
                    "name the column by --prompt, or one text by --prompt-text")  # fmt: skip
        cell, name = structure(prompt, place, columns.prompt), columns.prompt
        if messages.is_texts(cell) or not isinstance(cell, list):
            content = raw.text(prompt, place, columns.prompt)
            return [{"role": "user", "content": content}] if content else []
    else:
        both = f"{place} has both {columns.prompt} and {columns.messages}; leave one out"
        require(prompt in (None, ""), both)
    history = messages.conversation(cell, place, name)
    ends = bool(history) and history[-1]["role"] == "assistant"
    require(not ends, f"{place}: {name} ends with the assistant, so that nothing is to be answered")
    return history if all(message["content"] for message in history) else []


def _check_prompt(
    place: str, row: Cells, columns: Columns, both: str, talks: Sequence[Conversation]
) -> None:
    """Conversations begin alike, and with the prompt and messages of the row if it has them."""
    alike = takewhile(lambda same: all(m == same[0] for m in same), zip(*talks, strict=False))
    shared = [same[0] for same in alike]
    prompts = [message["content"].strip() for message in shared if message["role"] == "user"]
    require(bool(prompts), f"{place}: {both} do not begin with the same message of the user")
    for name in (columns.messages, columns.prompt):
        cell, right = structure(row.get(name), place, name), True
        if isinstance(cell, list) and cell:
            found = messages.conversation(cell, place, name)
            right = all(one == other for one, other in zip(found, shared, strict=False))
        elif isinstance(cell, str) and name == columns.prompt:
            right = cell.strip() in ("", *prompts)
        require(right, f"{place}: {both} do not begin with what {name} says")


def _choice(place: str, row: Cells, columns: Columns, names: Sequence[str]) -> Choice:
    """What a row says: the first column's conversations are chosen, the second's are rejected."""
    found = read_endings(place, row, columns, names)
    chosen, rejected, *_ = (*(found or []), [], [])
    user, dialog = ("" if row.get(c) in (None, "") else raw.name(row[c], place, c)
                    for c in (columns.user, columns.dialog))  # fmt: skip
    user = columns.user_name or _same_name(user)
    split = raw.text(row.get(columns.split), place, columns.split)
    cell = row.get(columns.weight)
    weight = 1.0 if cell in (None, "") else raw.number(as_number(cell), place, columns.weight)
    require(LIGHTEST <= weight <= HEAVIEST, f"{place}: {columns.weight} must be above 0, from "
            f"{LIGHTEST:g} to {HEAVIEST:g}; remove the row if it is not to count")  # fmt: skip
    time = _time(place, row, columns.timestamp)
    sources = tuple((place, row, name) for name in names)
    left_out = "" if found else NO_PROMPT
    return Choice(place, chosen, rejected, user, dialog, split, weight, time, sources, left_out)


def _same_name(name: str) -> str:
    """A user's name as all spellings of it are joined."""
    return unicodedata.normalize("NFC", name).strip()


def _time(place: str, row: Cells, column: str) -> float:
    """Seconds since 1970, 0 where the row does not say; dates without a zone are UTC."""
    cell = as_number(row.get(column))
    if isinstance(cell, str) and cell:
        try:
            cell = datetime.fromisoformat(cell)
        except ValueError as error:
            why = f"{column} must be a number or an ISO date, not {cell!r:.40}"
            raise InputError(f"{place}: {why}") from error
    if isinstance(cell, datetime):
        return (cell if cell.tzinfo else cell.replace(tzinfo=UTC)).timestamp()
    return 0.0 if cell in (None, "") else raw.number(cell, place, column)


def as_number(cell: Any) -> Any:
    """The number where one stands as text, as every number does in a .csv; else the cell."""
    try:
        return float(cell) if isinstance(cell, str) else cell
    except ValueError:
        return cell


# --------------------------------------------------------------------------- Layouts


def _votes(rows: Sequence[Row], columns: Columns) -> list[Choice]:
    """Two responses and a verdict that names the better one or says that it is a tie."""
    names, found = (columns.first, columns.second), []
    said = [_value(row.get(columns.winner)) for _, row in rows]
    counts = Counter(said)
    own = {_value(columns.first): 0, _value(columns.second): 1}
    own |= dict.fromkeys(map(_value, columns.first_wins), 0)
    own |= dict.fromkeys(map(_value, columns.second_wins), 1)
    numbers = {value for value in counts if re.fullmatch(r"-?\d+", value) and value not in own}
    scale = next((scale for need, scale in SCALES if need <= numbers <= scale.keys()), {})
    means = {value: own.get(value, scale.get(value, _in_words(value))) for value in counts}
    unknown = [f"{value!r:.40} ({counts[value]})" for value in counts if means[value] is None]
    table, some = rows[0][0].rpartition(" row ")[0], ", ".join(unknown[:8])
    require(not unknown, f"{table}: {columns.winner} has values that are not understood: {some}; "
            "--first-wins and --second-wins say what they mean")  # fmt: skip
    if columns.winner != NONE:
        read = [f"{value[:40] or 'empty'} = {(*names, TIES)[meant]} ({counts[value]})"
                for value, meant in sorted(means.items())]  # fmt: skip
        log.info("%s: %s", columns.winner, ", ".join(read))
    for value, (place, row) in zip(said, rows, strict=True):
        choice = _choice(place, row, columns, names)
        turned = choice._replace(chosen=choice.rejected, rejected=choice.chosen,
                                 sources=choice.sources[::-1])  # fmt: skip
        if means[value] != 2 or choice.left_out:
            found.append(turned if means[value] == 1 else choice)
        elif columns.ties == "half":
            found += [each._replace(weight=each.weight / 2) for each in (choice, turned)]
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


def _in_words(value: str) -> int | None:
    """0 for the first, 1 for the second, 2 for a tie; None for what is not understood."""
    plain = re.sub(r"(is)?(better|wins)$", "", re.sub(r"[^a-z0-9]", "", value))
    bare = re.sub(f"^(the)?(model|{'|'.join(STEMS[:-1])})(?=.)", "", plain)
    return 2 if plain in TIED else None if plain.isdigit() else SIDES.get(bare)


def _ratings(rows: Sequence[Row], columns: Columns) -> list[Choice]:
    """Ratings of responses: a pair for each two of a user after one prompt that differ enough."""
    left_out, rated, of_user = [], defaultdict(list), defaultdict(dict)
    for place, row in rows:
        choice = _choice(place, row, columns, [columns.response])
        rating = raw.number(as_number(row[columns.rating]), place, columns.rating)
        if choice.left_out:
            left_out.append(choice)
        else:
            prompt = digest(choice.chosen[0][:-1])
            rated[choice.user, choice.dialog, choice.split, prompt].append((rating, choice))
    for (high, better), (low, worse) in chain(*(permutations(some, 2) for some in rated.values())):
        if high > low and high - low >= columns.margin:
            weight, sources = (better.weight + worse.weight) / 2, better.sources + worse.sources
            pair = better._replace(rejected=worse.chosen, weight=weight, sources=sources)
            name = digest([pair.user, pair.dialog, pair.chosen, pair.rejected])
            of_user[pair.user][name] = pair
    number = columns.pairs_per_user
    found = [pairs[key] for pairs in of_user.values() for key in sorted(draw(pairs, number, 0))]
    named = [(c.user, digest(c.chosen[0]), digest(c.rejected[0])) for c in found]
    worse = defaultdict(set)
    for user, one, other in named:
        worse[user, one].add(other)
    # a over b and b over c say a over c
    follow = sum(any(c in worse.get((u, b), ()) for b in worse[u, a]) for u, a, c in named)
    log.info("%d ratings make %d comparisons, %d of which follow from two others of the same user",
             len(rows), len(found), follow)  # fmt: skip
    return left_out + found
