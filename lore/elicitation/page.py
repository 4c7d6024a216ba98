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
        quitter: the thread that answers the last request, once there is one.
        closed: set once its answer was sent.
    """

    def __init__(self, session: Session, profile: Path, secret: str) -> None:
        self.session, self.profile, self.path = session, profile, f"/{secret}/"
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.quitter: int | None = None
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
                if word == "quit":
                    self.quitter = threading.get_ident()
                elif word in ACTIONS:
                    self.session.do(word)
            if self.quitter is not None:
                return self._render()
        return bottle.redirect(self.path, 303)

    def _render(self) -> str:
        for name, value in HEADERS.items():
            bottle.response.set_header(name, value)
        session, closed = self.session, self.quitter is not None
        question = None if closed else session.question()
        found = None if question else session.save(self.profile)
        return self.template.render(
            session=session, question=question, closed=closed, found=found, speakers=SPEAKERS,
            profile=self.profile,
        )  # fmt: skip

    def sent(self) -> None:
        """This thread's answer is on its way."""
        if self.quitter == threading.get_ident():
            self.closed.set()


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
    """In threads, as a browser may open a connection and say nothing."""

    daemon_threads = True
    sent: Callable[[], None]

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a request, and only then say that it is answered."""
        super().process_request_thread(request, client_address)
        self.sent()


class _Quiet(WSGIRequestHandler):
    """Logs no requests."""

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
        server = make_server(HERE, port, page.app, _Server, _Quiet)
    except OSError as error:
        raise InputError(f"--port {port} cannot be had ({error}); take another, or none") from error
    server.sent = page.sent
    with server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        log.info("open http://%s:%d%s in a browser of this machine; Ctrl-C ends it",
                 HERE, server.server_port, page.path)  # fmt: skip
        try:
            page.closed.wait()
        except KeyboardInterrupt:
            log.info("interrupted")
        server.shutdown()
