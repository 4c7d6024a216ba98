"""The command line and YAML files as arguments of a typed ``main``.

What a file says is taken as if it stood on the command line before the flags. So every setting is
the value of one flag with one type, and nothing that is given is imported or called.
"""

import argparse
import difflib
import json
import os
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import jsonargparse
import yaml

from lore.common.files import InputError, require
from lore.common.settings import OptimizerChoice

ALIASES = {"run": "name", "h": "help"}  # torchrun takes --run for an option of its own
COLUMN = 32  # where help's explanations begin
Given = dict[str, list[str]]  # flag -> the words after it


class Flags:
    """The flags of a ``main`` (and of the functions that its ``**kwargs`` go to).

    Hyphens and underscores are the same, a list is given as ``--ranks 0 1 5``, names are whole.
    Flags of groups that are ``short``, such as "lore lm", may go without the group's name:
    ``--ranks`` for ``--lore.ranks``, unless there is a flag of that name.
    """

    def __init__(self, main: Callable[..., Any], short: str | None = None) -> None:
        self.short = (short or "").split()
        self.parser = jsonargparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
        self.parser.add_argument("--config", action="config")  # and --print_config
        text = "no progress bars, and no log lines but warnings; results are printed."
        self.parser.add_argument("--quiet", type=bool, default=False, help=text)
        self.parser.add_function_arguments(main, as_positional=False)
        self.defaults = self.parser.get_defaults()
        names = set(self.defaults.keys()) - {"config"}
        self.actions = {a.dest: a for a in self.parser._actions if a.dest in names}
        self.types = {name: getattr(a, "_typehint", None) for name, a in self.actions.items()}
        self.groups = dict.fromkeys(name.rpartition(".")[0] for name in self.types if "." in name)

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """The arguments asked for, ``quiet`` apart; SystemExit after help, which is written out."""
        given = self._gather(words)
        if "help" in given:
            sys.stdout.write(f"{self.help(*given['help'][:1])}\n")
            sys.stdout.flush()  # here, so that a closed pipe is noticed here
            sys.exit()
        try:
            settings = self.parser.parse_args(self._spell(given))
        except argparse.ArgumentError as error:
            raise InputError(self._say(str(error), given)) from None
        settings.pop("config", None)
        self.quiet = settings.pop("quiet")
        if self.quiet and "progress" in self.types:
            settings["progress"] = False
        for name in given:  # a list has nothing twice, and is not empty where that means nothing
            values, flag = settings.get(name), self.flag(name)
            if isinstance(values, list | tuple):
                empty = not values and self.defaults.get(name)
                require(not empty, f"{flag}: at least one value is needed")
                twice = [value for i, value in enumerate(values) if value in values[:i]]
                if twice and typing.get_args(self.types[name])[1:] in ((), (...,)):  # any length
                    raise InputError(f"{flag}: {twice[0]} stands there twice")
        return self.parser.instantiate(settings).as_dict()

    def help(self, group: str = "") -> str:
        """The flags of a group, or else the script's own and its short groups', explained."""
        group = group.replace("-", "_")
        apart = [name for name in self.groups if self.short and name not in self.short]
        said = f"--help {group}: there are only --help and --help {'|'.join(apart)}"
        require(not group or group in self.groups, said)
        shown = {group} if group else {"", *self.groups} - {*apart}
        lines = [f"usage: {Path(sys.argv[0]).name} [--flag value ...]"]
        for section in self.parser._action_groups:
            names = [action.dest for action in section._group_actions if action.dest in self.types]
            some = [name for name in names if name.rpartition(".")[0] in shown]
            lines += [f"\n{section.title}:"] * bool(some) + [*map(self._explain, some)]
        lines += ["\n--config FILE takes any of these from YAML; --print_config writes them."]
        return "\n".join(lines + [f"More settings: --help {'|'.join(apart)}"] * bool(apart))

    def _explain(self, name: str) -> str:
        """A flag with its default, what it is for and what it takes."""
        default, hint = self.defaults[name], self.types[name]
        values = default if typing.get_origin(hint) is tuple else [default]
        words = [os.path.relpath(x) if isinstance(x, Path) else _word(x) for x in values]
        left = f"  {' '.join([self.flag(name), *words]).removesuffix(' null')}  ".ljust(COLUMN)
        obvious = {bool, str, Path} & _parts(hint)
        text = self.actions[name].help + ("" if obvious else f" ({_expected(hint)})")
        columns = min(shutil.get_terminal_size((100, 0)).columns, 110)
        lines = textwrap.wrap(text, max(columns - COLUMN, 40))
        first = [left + lines.pop(0)] if len(left) == COLUMN else [left.rstrip()]
        return f"\n{' ' * COLUMN}".join(first + lines)

    def _gather(self, words: Sequence[str]) -> Given:
        """The last words of every flag; those of files first, so that the command line wins, and
        an optimiser's arguments last, which become a part of it."""
        lines: list[tuple[str, list[str]]] = []
        for word in words:
            if word.startswith("--") or word == "-h":
                flag, *values = word.lstrip("-").split("=", 1)
                lines.append((flag, values))
            else:
                require(bool(lines), f"{word}: no flag stands before it")
                lines[-1][1].append(word)
        given: Given = {}
        names = {*self.types, "help", "print_config"}
        lines.sort(key=lambda line: (line[0] != "config", self._full_name(line[0]) not in names))
        for flag, values in lines:
            name = self._full_name(flag)
            holder, _, argument = name.rpartition(".")
            if flag == "config":
                require(len(values) == 1, "--config takes one file; give it again for another")
                given |= self._read_file(values[0])
            elif name in names:
                given[name] = values
            elif OptimizerChoice in _parts(self.types.get(holder)):
                require(len(values) == 1, f"--{flag}: one number is expected")
                missing = f"{self.flag(holder)} is missing, whose argument {argument} is given"
                require(holder in given, missing)
                try:
                    choice = OptimizerChoice.parts(" ".join(given[holder]))
                except ValueError as error:
                    raise InputError(f"{self.flag(holder)}: {error}") from None
                choice["init_args"][argument] = values[0]
                with suppress(ValueError):  # what is no number is refused with all else
                    choice["init_args"][argument] = json.loads(values[0])
                given[holder] = [json.dumps(choice)]
            else:
                raise InputError(self._unknown(flag))
        return given

    def _full_name(self, flag: str) -> str:
        """The flag's name, with its group where that was left out."""
        name = ALIASES.get(flag, flag).replace("-", "_")
        first, *more = name.split(".")
        known = {first, ".".join([first, *more[:1]])} & {*self.types, *self.groups}
        groups = [group for group in self.short if f"{group}.{first}" in self.types]
        return f"{groups[0]}.{name}" if groups and not known else name

    def _unknown(self, flag: str) -> str:
        known, typed = [self.flag(name)[2:] for name in self.types], flag.replace("_", "-")
        longer = [name for name in known if name.startswith(typed)]
        near = longer or difflib.get_close_matches(typed, known, n=1)
        return f"there is no flag --{flag}; " + (f"is it --{near[0]}?" if near else "see --help")

    def flag(self, name: str) -> str:
        """How a setting's flag is typed."""
        group, _, short = name.partition(".")
        is_short = group in self.short and short not in self.types
        return "--" + (short if is_short else name).replace("_", "-")

    def _read_file(self, file: str) -> Given:
        try:
            tree = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"--config {file}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            said = " ".join(str(error).split())
            raise InputError(f"--config {file}: not readable as YAML ({said:.200})") from None
        require(isinstance(tree, dict | None), f"--config {file}: settings with names are expected")
        return dict(self._leaves(f"--config {file}", tree or {}))

    def _leaves(self, place: str, tree: Mapping[Any, Any], group: str = "") -> Iterator[tuple]:
        """The settings of a file, each with the words that a flag would have."""
        for key, value in tree.items():
            name = self._full_name(f"{group}{key}")
            if name in self.types:
                yield name, [_word(value)]
            elif name in self.groups:
                require(isinstance(value, dict), f"{place}: {name} has settings, not a value")
                yield from self._leaves(place, value, f"{name}.")
            else:
                raise InputError(f"{place}: {self._unknown(name)}")

    def _spell(self, given: Given) -> list[str]:
        """Flags as the parser takes them: one word, a list as JSON, a bare switch as true."""
        arguments = []
        for name, values in given.items():
            if bool in _parts(self.types.get(name)) and not values:
                values = ["true"]
            several = isinstance(self.defaults.get(name), list | tuple)
            if values and several and not values[0].startswith("["):
                values = [json.dumps(values)]  # as texts: they are read as what the type says
            missing = name in self.types and not (values and all(values))
            require(not missing, f"{self.flag(name)}: a value is missing")
            require(len(values) < 2, f"{self.flag(name)} {' '.join(values)}: it takes one value")
            arguments.append("=".join([f"--{name}", *values]))
        return arguments

    def _say(self, message: str, given: Given) -> str:
        """An error of the parser in one line: the flag, what it was given and what it takes."""
        if missing := re.search(r"arguments are required: ([\w.]+)", message):
            return f"{self.flag(missing[1])} is missing; see --help"
        found = re.search(r'Parser key "([\w.]+)"', message)
        if not found or found[1] not in self.types:
            return " ".join(message.split())
        name, reasons = found[1], re.findall(r"Not of type [^:]*: (.*)", message)
        reason = reasons[0] if reasons else f"{_expected(self.types[name])} is expected"
        return f"{self.flag(name)} {' '.join(' '.join(given.get(name, [])).split()):.60}: {reason}"


def _word(value: Any) -> str:
    """A value of a YAML file as a word of a command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _parts(hint: Any) -> set[Any]:
    """A type and what it is made of, such as the types of a union."""
    return {hint, *typing.get_args(hint)}


def _expected(hint: Any) -> str:
    """What a flag takes, in words."""
    names = {bool: "true or false", OptimizerChoice: "a class of torch.optim", str: "a text"}
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is None:
        return names.get(hint, getattr(hint, "__name__", str(hint)))
    if kind is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if NoneType in inner:
        return _expected(next(part for part in inner if part is not NoneType))
    each = _expected(inner[0])
    if typing.get_origin(inner[0]) is Literal:
        return "some" + each.removeprefix("one")
    return "a list of lists" if typing.get_origin(inner[0]) else f"a list, each {each}"
