"""Questions in the terminal."""

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import TextIO

from lore.elicitation.session import SPEAKERS, Question, Session

WIDEST = 100  # longer lines are hard to read
WORDS = {"a": "a", "b": "b", "s": "skip", "u": "undo", "q": "quit", "m": "more", "": ""}
WORDS |= {word: word for word in WORDS.values()}
ASKING, FINAL = ("a", "b", "skip", "undo", "quit"), ("", "quit", "undo", "more")  # words understood


class Terminal:
    """Puts a session's questions and reads the answers; the end of the input is "quit". ``height``
    is the lines of a page, 0 for no pages: the terminal's, if it is one."""

    def __init__(self, session: Session, source: TextIO, out: TextIO) -> None:
        self.session, self.source, self.out = session, source, out
        columns, lines = shutil.get_terminal_size()
        self.width = min(columns, WIDEST)
        self.height = lines if source.isatty() and out.isatty() else 0

    def run(self) -> None:
        """Ask until the person quits, or asking is over; then one may still go back or on."""
        word = "?"
        while word != "quit":
            question, progress = self.session.question(), self.session.progress
            if question:
                progress = [textwrap.shorten(line, self.width) for line in progress]
                prompt = "Which is better? a, b, (s)kip, (u)ndo, (q)uit: "
                word = self._ask([*progress, *self._lines(question)], prompt, ASKING)
            else:
                more = ", (m)ore questions" if len(self.session.left) else ""
                prompt = f"Enter to finish, (u)ndo{more}: "
                lines = [*progress, f"Done: {self.session.reason}."]
                word = self._ask(lines, prompt, FINAL) or "quit"
            if word != "quit" and not self.session.do(word):
                self._say("There is nothing to undo.")

    def _ask(self, lines: list[str], prompt: str, words: Sequence[str]) -> str:
        """Show lines, a page at a time, until one of the words is typed, if between two pages."""
        step = max(1, self.height - 1) if self.height else len(lines)
        pages, word = [lines[i : i + step] for i in range(0, len(lines), step)], ""
        while pages and not word:
            self._say(*pages.pop(0))
            word = self._read("-- Enter for more --  " if pages else prompt)
        while word not in words:
            word = self._read(prompt)
        return word

    def _lines(self, question: Question) -> Iterator[str]:
        yield f"── Question {question.number} ".ljust(self.width, "─")
        for message in question.pair.history:
            yield SPEAKERS.get(message["role"], message["role"]) + ":"
            yield from self._wrapped(message["content"])
        for side, text in zip("ab", question.shown, strict=True):
            yield f"[{side}] ".ljust(self.width, "-")
            yield from self._wrapped(text)

    def _wrapped(self, text: str) -> Iterator[str]:
        # Without characters that would move the cursor or colour the terminal.
        shown = (c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
        for line in "".join(shown).expandtabs(4).splitlines():
            parts = textwrap.wrap(line, self.width - 2, drop_whitespace=False) or [""]
            yield from (f"  {part.rstrip()}" for part in parts)
        yield ""

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
