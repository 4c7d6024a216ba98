"""A real browser without a window: where it is, and a page of it that is driven by real keys."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
PATIENCE = 60  # seconds


class Tab:
    """One page, spoken to by the browser's debugging protocol: the browser reads commands from the
    file descriptor ``said`` and writes answers to ``heard``."""

    def __init__(self, said: int, heard: int) -> None:
        self.said, self.heard, self.session, self.sent, self.rest = said, heard, {}, 0, b""
        target = self.tell("Target.createTarget", url="about:blank")
        self.session = self.tell("Target.attachToTarget", flatten=True, **target)

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command, and what came of it."""
        self.sent += 1
        command = {"id": self.sent, "method": method, "params": parameters, **self.session}
        os.write(self.said, json.dumps(command).encode() + b"\0")
        message = {}
        while message.get("id") != self.sent:  # what it says else is of no interest
            while b"\0" not in self.rest:
                more = os.read(self.heard, 1 << 16)
                assert more, "the browser is gone"
                self.rest += more
            line, self.rest = self.rest.split(b"\0", 1)
            message = json.loads(line)
        assert "result" in message, message
        return message["result"]

    def resize(self, width: int) -> None:
        """Show the page on another screen."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.tell("Emulation.setDeviceMetricsOverride", **size)

    def value(self, script: str) -> Any:
        """What a script on the page says."""
        found = self.tell("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str) -> Any:
        """What a script says once that is true; the page may change meanwhile."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if value := self.value(f"document.readyState === 'complete' && ({script})"):
                return value
            time.sleep(0.05)
        raise AssertionError(f"{script} is still false on: {self.value('document.body.innerText')}")

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
    try:
        yield Tab(said, heard)
    finally:
        process.kill()
        process.wait()
        os.close(said)
        os.close(heard)
