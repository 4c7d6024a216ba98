"""How long rows of choices take to be read, checked and tabulated, and how much memory.

    python benchmarks/reading.py     # 120,000 comparisons of 240,000 texts: 60 s and 2 GB at most
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from lore.common.cli import cli
from lore.common.files import require
from lore.common.settings import PositiveInt

WORDS = ("sun", "rain", "wind", "tea", "bread", "river", "stone", "light", "music", "paper")


def main(comparisons: PositiveInt = 120_000, users: PositiveInt = 1_000) -> None:
    """Prepare made rows whose texts are all different, and print seconds and memory.

    Args:
        comparisons: number of rows; each has two texts of about 300 letters.
        users: who judged them.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        write_rows(source, comparisons, users)
        words = ["--source", str(source), "--out", f"{folder}/data", "--embed", "false"]
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, ROOT / "OwnData" / "prepare.py", *words],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        seconds = time.monotonic() - start
        require(done.returncode == 0, done.stderr)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{comparisons:,} comparisons of {2 * comparisons:,} texts: {seconds:.0f} s, ", end="")
    print(f"{used.ru_utime:.0f} s of one core; at most {used.ru_maxrss / 2**20:.1f} GB")


def write_rows(path: Path, count: int, users: int) -> None:
    """Rows of random words: user, prompt, chosen and rejected."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            said = ((side, " ".join(rng.choice(WORDS, 60))) for side in ("chosen", "rejected"))
            texts = {name: f"{text} {number}" for name, text in said}
            row = {"user": f"u{number % users}", "prompt": f"What of {number // 10}?", **texts}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    cli(main)
