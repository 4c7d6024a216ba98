"""Dialogues in a cell: a text, a message, a list of messages, or a list of any of these."""

import ast
import json
import re
import warnings
from itertools import chain, cycle
from typing import Any

from lore.common.files import InputError, require
from lore.preparing import raw

Conversation = list[dict[str, str]]

ROLES = dict.fromkeys(("user", "human", "prompter"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot"), "assistant")
ROLES |= {"system": "system"}
KEYS = (("role", "from"), ("content", "value"))  # of a message: who speaks, and what is said
BROKEN = re.compile(r"\s*[\[{]+\s*['\"](role|from|content|value)['\"]\s*:")


def structure(cell: Any, place: str, what: str) -> Any:
    """What a cell holds: in a .csv or .tsv, messages or a list of texts may stand there as text.

    Such a text is JSON, or what Python prints of it, and nothing in it is run; InputError where it
    only begins as messages do. In other files a text is a text, whatever it looks like.
    """
    if not isinstance(cell, raw.Cell) or not re.fullmatch(r"\s*([\[{]).*[\]}]\s*", cell, re.DOTALL):
        return cell
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # an escape that Python does not know
                found = parse(cell.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if _is_structure(found) else cell
    broken = BROKEN.match(cell)
    require(not broken, f"{place}: {what} begins as messages do, but is neither JSON nor Python")
    return cell


def _is_structure(found: Any) -> bool:
    """Whether this is a message, or a list of messages, of such lists or of texts."""
    if not isinstance(found, list):
        return is_message(found)
    return is_texts(found) or bool(found) and all(map(_is_structure, found))


def is_message(found: Any) -> bool:
    """Whether this has a role and a content, by whichever name."""
    return isinstance(found, dict) and all(any(k in found for k in keys) for keys in KEYS)


def is_texts(found: Any) -> bool:
    """Whether this is a list of texts, some of which may be missing."""
    texts = isinstance(found, list) and all(isinstance(text, str | None) for text in found)
    return texts and any(text is not None for text in found)


def conversation(cell: Any, place: str, what: str) -> Conversation:
    """A list of messages as role and content ("" without text); InputError for anything else."""
    cell = structure(cell, place, what)
    if not isinstance(cell, list):
        raise InputError(f"{place}: {what} must be a list of role and content")
    found = []
    for each in cell:
        right = is_message(each)
        require(right, f"{place}: a message must have role and content, unlike {each!r:.60}")
        role, content = (next(each[k] for k in keys if k in each) for keys in KEYS)
        known = ROLES.get(raw.name(role, place, "role").strip().lower(), "")
        require(bool(known), f"{place}: the role {role!r:.40} is not known; {', '.join(ROLES)} are")
        found.append({"role": known, "content": raw.text(content, place, "content")})
    return found


def answers(cell: Any, place: str, what: str) -> list[Conversation]:
    """Every response of what ``structure`` finds as messages; a text is one of the assistant."""
    require(cell != [], f"{place}: {what} is an empty list; give a response or remove the row")
    several, found = isinstance(cell, list) and not is_message(cell[0]), []
    what = f"each {what}" if several else what
    for each in cell if several else [cell]:
        some = [each] if is_message(each) else each
        if isinstance(some, list) and some and is_message(some[0]):
            found.append(conversation(some, place, what))
            ends = found[-1][-1]["role"] == "assistant"
            require(ends, f"{place}: {what} must end with a message of the assistant")
        else:
            found.append([{"role": "assistant", "content": raw.text(each, place, what)}])
    return found


def turns(prompts: list[str], replies: list[str], place: str, what: str) -> Conversation:
    """A dialogue whose two sides stand in lists, as in LMSYS's tables."""
    same = len(prompts) == len(replies)
    require(same, f"{place}: {what} has {len(replies)} turns, the prompt {len(prompts)}")
    cells = chain(*zip(prompts, replies, strict=True))
    said = zip(cycle(("user", "assistant")), cells, strict=False)
    return [{"role": role, "content": raw.text(cell, place, f"each {what}")} for role, cell in said]
