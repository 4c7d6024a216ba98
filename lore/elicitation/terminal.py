"""Questions in the terminal."""

import shutil
import textwrap
from collections.abc import Iterator
from typing import TextIO

from lore.elicitation.session import SPEAKERS, Question, Session

WIDEST = 100  # longer lines are hard to read
WORDS = {"a": "a", "b": "b", "s": "skip", "u": "undo", "q": "quit", "m": "more", "": ""}
WORDS |= {word: word for word in WORDS.values()}
FINAL = ("", "quit", "undo", "more")  # words that are understood once asking is over


class Terminal:
    """Puts a session's questions and reads the answers; the end of the input is "quit".

    ``height`` is the lines of a page, 0 for no pages: the terminal's, if it is one.
    """

    def __init__(self, session: Session, source: TextIO, out: TextIO) -> None:
        self.session, self.source, self.out = session, source, out
        columns, lines = shutil.get_terminal_size()
        self.width = min(columns, WIDEST)
        self.height = lines if source.isatty() and out.isatty() else 0

    def run(self) -> None:
        """Ask until the person quits, or asking is over."""
        word = ""
        while word != "quit":
            question = self.session.question()
            word = self._over() if question is None else self._put(question)
            if word != "quit" and not self.session.do(word):
                self._say("There is nothing to undo.")

    def _put(self, question: Question) -> str:
        """Show a question, and read what to do."""
        progress = [textwrap.shorten(line, self.width) for line in self.session.progress]
        word = self._page([*progress, *self._lines(question)])
        while word not in ("a", "b", "skip", "undo", "quit"):
            word = self._read("Which is better? a, b, (s)kip, (u)ndo, (q)uit: ")
        return word

    def _over(self) -> str:
        """Say why asking is over; the person may still go back or on."""
        self._say(*self.session.progress, f"Done: {self.session.reason}.")
        more = ", (m)ore questions" if len(self.session.left) else ""
        while (word := self._read(f"Enter to finish, (u)ndo{more}: ")) not in FINAL:
            pass
        return word or "quit"

    def _lines(self, question: Question) -> Iterator[str]:
        yield f"── Question {question.number} ".ljust(self.width, "─")
        for message in question.pair.history:
            yield SPEAKERS.get(message["role"], message["role"]) + ":"
            yield from self._wrapped(message["content"])
        for side, text in zip("ab", question.shown, strict=True):
            yield f"[{side}] ".ljust(self.width, "-")
            yield from self._wrapped(text)

    def _wrapped(self, text: str) -> Iterator[str]:
        for line in printable(text).expandtabs(4).splitlines():
            parts = textwrap.wrap(line, self.width - 2, drop_whitespace=False) or [""]
            yield from (f"  {part.rstrip()}" for part in parts)
        yield ""

    def _page(self, lines: list[str]) -> str:
        """Show lines a page at a time; the word typed between two pages, if it is one."""
        step = max(1, self.height - 1) if self.height else len(lines)
        for first in range(0, len(lines), step):
            self._say(*lines[first : first + step])
            if first + step < len(lines) and (word := self._read("-- Enter for more --  ")):
                return word
        return ""

    def _say(self, *lines: str) -> None:
        self.out.write("\n".join([*lines, ""]))

    def _read(self, prompt: str) -> str:
        """A word that was typed, "?" for one that means nothing; "quit" at the end of the input."""
        self.out.write(prompt)
        self.out.flush()
        try:
            line = self.source.readline()
        except KeyboardInterrupt:
            line = ""
        if not line:
            self._say("")
            return "quit"
        return WORDS.get(line.strip().lower(), "?")


def printable(text: str) -> str:
    """The text without characters that would move the cursor or colour the terminal."""
    shown = (c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "".join(shown)
