"""Questions on a web page that only this machine can open."""

import logging
import secrets
import threading
from pathlib import Path
from typing import Any

import bottle
import jinja2

from lore.common.files import InputError
from lore.elicitation.session import ACTIONS, SPEAKERS, Session
from lore.elicitation.web import listen

log = logging.getLogger(__name__)

HEADERS = {"Cache-Control": "no-store", "X-Frame-Options": "DENY"}


class Page:
    """A session as a page, a WSGI ``app``: every answer is a form that leads back to the page. The
    profile is written once asking is over. Every address begins with the secret, so that others on
    this machine cannot look in."""

    def __init__(self, session: Session, profile: Path, secret: str) -> None:
        self.session, self.profile, self.path = session, profile, f"/{secret}/"
        self.lock, self.closed = threading.Lock(), False
        options = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
        text = Path(__file__).with_name("ask.html").read_text(encoding="utf-8")
        self.template = jinja2.Environment(autoescape=True, **options).from_string(text)
        self.app = bottle.Bottle()
        self.app.route(self.path, ["GET", "POST"], self.respond)

    def respond(self) -> Any:
        """The question, or what was learned once asking is over; a button leads back to these. A
        full disk is a page that says so."""
        word, key = (bottle.request.forms.getunicode(name, "") for name in ("do", "question"))
        try:
            with self.lock:
                question = self.session.question()
                if bottle.request.method == "POST":
                    if key == (question.pair.key if question else ""):  # it is asked still
                        self.closed |= word == "quit"
                        if word in ACTIONS:
                            self.session.do(word)
                    if not self.closed:
                        bottle.redirect(self.path, 303)
                question = None if self.closed else question
                found = None if question else self.session.save(self.profile)
                bottle.response.headers.update(HEADERS)
                return self.template.render(
                    session=self.session, question=question, closed=self.closed, found=found,
                    speakers=SPEAKERS, profile=self.profile,
                )  # fmt: skip
        except InputError as error:
            log.error("%s", error)
            return bottle.HTTPError(500, str(error))


def ask_on_page(session: Session, profile: Path, port: int = 0) -> None:
    """Serve a session's page until the person is done, or Ctrl-C; port 0 is a free one."""
    page = Page(session, profile, secrets.token_urlsafe(16))
    with listen(page.app, "127.0.0.1", port) as server:
        log.info("open http://127.0.0.1:%d%s in a browser of this machine; Ctrl-C ends it",
                 server.server_port, page.path)  # fmt: skip
        try:
            while not page.closed:
                server.handle_request()
        except KeyboardInterrupt:
            log.info("interrupted")
