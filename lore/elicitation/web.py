"""A small web server: a thread for each request, and nothing of requests in the terminal."""

from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from lore.common.files import InputError


class Server(ThreadingMixIn, WSGIServer):
    """Closing it waits for answers; a browser may open a connection and say nothing."""

    request_queue_size = 256
    timeout = 0.2  # seconds that handle_request waits
    silence = 2  # seconds after which a silent connection is closed

    def handle_error(self, *_: Any) -> None:
        """Nothing: a connection that breaks is no error."""


class _Handler(WSGIRequestHandler):
    def setup(self) -> None:
        self.timeout = self.server.silence
        super().setup()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def listen(app: Any, host: str, port: int) -> Server:
    """A server that is bound but does not serve yet; InputError where the address is taken."""
    try:
        return make_server(host, port, app, Server, _Handler)
    except OSError as error:
        raise InputError(f"--port {port} of {host} cannot be had ({error})") from error
