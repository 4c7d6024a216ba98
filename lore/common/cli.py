"""A typed ``main`` as a command: flags from its arguments, help from its docstring."""

import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from lore.common.files import InputError
from lore.common.flags import Flags

OURS = ("lore", "utils", "__main__")  # whose messages are printed
KEPT = "what was written whole is kept"
NO_MEMORY = "not enough memory"
PATIENCE = 10  # seconds in which the first process says what all have to say, and torchrun ends all


def cli(main: Callable[..., Any], short: str | None = None, kept: str = KEPT) -> None:
    """Run a script's typed ``main`` with settings from flags or ``--config file.yaml`` (``Flags``).

    A user's mistake (``InputError``, a missing file, a full disk) ends in one line, status 2;
    Ctrl-C and SIGTERM in one that says what is ``kept`` for the same command to go on from, status
    130 and 143; a closed pipe in none, 141. Of several processes the first says it.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)  # of libraries only warnings
    first = int(os.environ.get("RANK", 0)) == 0  # of the processes that torchrun started
    # SIGTERM ends it as Ctrl-C does; the others as ever, at once.
    listens = first and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    try:
        if listens:
            signal.signal(signal.SIGTERM, _interrupt)
        flags = Flags(main, short)
        arguments = flags.read(sys.argv[1:])
        for name in OURS:
            logging.getLogger(name).setLevel(logging.WARNING if flags.quiet else logging.INFO)
        main(**arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has what was wanted, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, OSError, MemoryError) as error:
        _end(first, 2, f"error: {str(error) or NO_MEMORY}")
    except RuntimeError as error:
        if not re.search("allocate memory|out of memory|Storage size", str(error)):
            raise
        _end(first, 2, f"error: {NO_MEMORY}")  # PyTorch's own error has pages of text
    except KeyboardInterrupt as stop:
        _end(first, *(stop.args or (130,)), f"stopped: {kept}; the same command goes on from there")
    finally:
        if listens:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt(143)


def _end(first: bool, status: int, line: str) -> None:
    """End with one line; of another process than the first only if that one stays silent."""
    if not first and status == 2:
        time.sleep(PATIENCE)
    if first or status == 2:
        sys.stderr.write(line + "\n")
    sys.exit(status)
