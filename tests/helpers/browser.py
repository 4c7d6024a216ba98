"""A real browser without a window: where it is, and a page of it that is driven by real keys."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


class Tab:
    """One page, spoken to by the browser's debugging protocol: the browser reads commands from what
    is ``said`` and writes answers to what is ``heard``."""

    def __init__(self, said: BinaryIO, heard: BinaryIO) -> None:
        self.said, self.heard, self.session, self.sent = said, heard, {}, 0
        target = self.tell("Target.createTarget", url="about:blank")
        self.session = self.tell("Target.attachToTarget", flatten=True, **target)

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command, and what came of it."""
        self.sent += 1
        command = {"id": self.sent, "method": method, "params": parameters, **self.session}
        self.said.write(json.dumps(command).encode() + b"\0")
        message = {}
        while message.get("id") != self.sent:  # what it says else is of no interest
            found = takewhile(lambda byte: byte != b"\0", iter(partial(self.heard.read, 1), b""))
            message = json.loads(b"".join(found))
        assert "result" in message, message
        return message["result"]

    def value(self, script: str) -> Any:
        """What a script on the page says."""
        found = self.tell("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str) -> None:
        """Until a script says what is true; the page may change meanwhile."""
        while not self.value(f"document.readyState === 'complete' && ({script})"):
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press a letter and let it go."""
        for what in ({"type": "keyDown", "text": key}, {"type": "keyUp"}):
            self.tell("Input.dispatchKeyEvent", key=key, **what)


@contextmanager
def a_tab(profile: Path) -> Iterator[Tab]:
    """A tab of a browser that lives as long as this context."""
    to_browser, said, heard, from_browser = *os.pipe(), *os.pipe()
    # The protocol's pipes are the file descriptors 3 and 4, which bash puts in place.
    shell = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        ["bash", "-c", shell, *command, "about:blank"], pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_browser)
    os.close(from_browser)
    with open(said, "wb", 0) as commands, open(heard, "rb") as answers:
        try:
            yield Tab(commands, answers)
        finally:
            process.kill()
            process.wait()
