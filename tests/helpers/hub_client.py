"""Run scripts one after the other in this process: importing their libraries takes longest.

The file named on the command line has a JSON list of [script, settings] and gets their outcomes.
"""

import json
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import running


def outcome(script: str, settings: running.Flags) -> running.Outcome:
    """How a script ends; a traceback is status 1, as it is for one in a process of its own."""
    try:
        return running.invoke(script, settings)
    except Exception:
        return running.Outcome(1, "", traceback.format_exc())


if __name__ == "__main__":
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # a second before each further try
    file = Path(sys.argv[1])
    jobs = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps([outcome(*job) for job in jobs]), encoding="utf-8")
