"""Questions on a web page that only this machine can open."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import bottle
import jinja2

from lore.common.files import InputError
from lore.elicitation.session import ACTIONS, SPEAKERS, Session

log = logging.getLogger(__name__)

TEMPLATES = Path(__file__).resolve().parent
HERE = "127.0.0.1"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Page:
    """A session as a page: every answer is a form that leads back to the page.

    Args:
        session: to be asked.
        profile: where the profile is written once asking is over.
        secret: first part of every address, so that others on this machine cannot look in.

    Attributes:
        app: what a server runs.
        closed: whether the person has quit.
    """

    def __init__(self, session: Session, profile: Path, secret: str) -> None:
        self.session, self.profile, self.path = session, profile, f"/{secret}/"
        self.lock, self.closed = threading.Lock(), False
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
            lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        )  # fmt: skip
        self.template = environment.get_template("ask.html")
        self.app = bottle.Bottle()
        self.app.route(self.path, "GET", _guarded(self.show))
        self.app.route(self.path, "POST", _guarded(self.act))

    def show(self) -> str:
        """The question, or what was learned once asking is over."""
        with self.lock:
            return self._render()

    def act(self) -> Any:
        """Do what a button says, unless it belongs to a question that is not asked any more."""
        word, key = (bottle.request.forms.getunicode(name, "") for name in ("do", "question"))
        with self.lock:
            question = self.session.question()
            if key == (question.pair.key if question else ""):
                self.closed |= word == "quit"
                if word in ACTIONS:
                    self.session.do(word)
            if self.closed:
                return self._render()
        return bottle.redirect(self.path, 303)

    def _render(self) -> str:
        for name, value in HEADERS.items():
            bottle.response.set_header(name, value)
        question = None if self.closed else self.session.question()
        found = None if question else self.session.save(self.profile)
        return self.template.render(
            session=self.session, question=question, closed=self.closed, found=found,
            speakers=SPEAKERS, profile=self.profile,
        )  # fmt: skip


def _guarded(answer: Callable[[], Any]) -> Callable[[], Any]:
    """The same, but a full disk is a page that says so."""

    def guarded() -> Any:
        try:
            return answer()
        except InputError as error:
            log.error("%s", error)
            return bottle.HTTPError(500, str(error))

    return guarded


class _Server(ThreadingMixIn, WSGIServer):
    """In threads, as a browser may open a connection and say nothing; closing waits for answers."""

    timeout = 0.2  # seconds until it looks whether the person has quit

    def handle_error(self, *_: Any) -> None:
        """Nothing: a connection that stays silent is no error."""


class _Handler(WSGIRequestHandler):
    timeout = 2  # seconds of silence

    def log_message(self, *_: Any) -> None:
        """Nothing: the terminal is the person's."""


def ask_on_page(session: Session, profile: Path, port: int = 0) -> None:
    """Serve the page on this machine until the person is done, or the program is interrupted.

    Args:
        session: to be asked.
        profile: where the profile is written.
        port: of the server; 0 for a free one.

    Raises:
        InputError: the port is taken.
    """
    page = Page(session, profile, secrets.token_urlsafe(16))
    try:
        server = make_server(HERE, port, page.app, _Server, _Handler)
    except OSError as error:
        raise InputError(f"--port {port} cannot be had ({error}); take another, or none") from error
    with server:
        log.info("open http://%s:%d%s in a browser of this machine; Ctrl-C ends it",
                 HERE, server.server_port, page.path)  # fmt: skip
        try:
            while not page.closed:
                server.handle_request()
        except KeyboardInterrupt:
            log.info("interrupted")
