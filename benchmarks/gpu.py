"""What a GPU computes, against a CPU and against one at a time, and how fast (make gpu).

    python benchmarks/gpu.py                              # under nine minutes; writes docs/gpu.md
    python benchmarks/gpu.py --tiny true --device cpu     # everything once, at tiny sizes
    python benchmarks/gpu.py --parts rows embedding       # some parts

Nothing is downloaded: weights, texts and comparisons are made up. Every part has a time limit,
prints each line as it is known and saves all lines so far, so that whatever stops it loses only
what was still to come.
"""

import gc
import json
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
sys.path.append(str(ROOT / "tests" / "helpers"))  # plain loops and planted users
import gpu_checks
import gpu_speed
from lore.common.cli import cli
from lore.common.devices import pick_device
from lore.common.files import first_line, require, write_whole
from lore.common.settings import PositiveInt
from lore.experiments.report.tables import markdown
from measure import OUT

Row = dict[str, Any]


class Part(NamedTuple):
    """Some lines of the report.

    Attributes:
        title: heading.
        rows: yields the lines, given the device and whether sizes are tiny; each has a case.
        seconds: after which the part is stopped; tiny sizes have all the time that is left.
    """

    title: str
    rows: Callable[[str, bool], Iterator[Row]]
    seconds: int


PARTS = {
    "core": Part("The core against a CPU, float32", gpu_checks.core, 40),
    "resume": Part("A CPU's checkpoint taken up on the device", gpu_checks.resume, 15),
    "processes": Part("One process that joins a group", gpu_checks.processes, 20),
    "rows": Part("Embeddings against one at a time", gpu_checks.rows, 110),
    "memory": Part("Memory that runs out", gpu_checks.memory, 20),
    "embedding": Part("Speed of embedding, an 8B Llama shape", gpu_speed.embedding, 120),
    "speed": Part("Speed of the core", gpu_speed.core, 70),
    "mixed": Part("Speed of the mixed logit with its choice", gpu_speed.mixed_logit, 35),
    "methods": Part("Mixed logit and peers against a CPU", gpu_checks.methods, 90),
}


class TooLate(BaseException):
    """A part's time is over; no Exception, which code that falls back would take for its own."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TooLate once so many seconds are over."""

    def stop(*_: Any) -> None:
        raise TooLate

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def carry_out(part: Part, device: str, tiny: bool, left: float, keep: Callable[[Row], None]) -> str:
    """Hand over a part's lines one by one; how it ended, "" for well."""
    seconds = left if tiny else min(part.seconds, left)
    if seconds <= 0:
        return "left out: no time was left"
    try:
        with limited(seconds):
            for row in part.rows(device, tiny):
                keep(row)
    except TooLate:
        return f"stopped after {seconds:.0f} seconds"
    except Exception as error:  # a part that fails must not cost the others
        return f"failed: {type(error).__name__}: {first_line(error)}"[:300]
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return ""


def versions(device: str) -> dict[str, str]:
    """What computes."""
    facts = {"device": platform.processor() or platform.machine()}
    if torch.device(device).type == "cuda":
        about = torch.cuda.get_device_properties(device)
        facts = {
            "device": about.name, "memory": f"{about.total_memory / 2**30:.0f} GiB",
            "capability": f"{about.major}.{about.minor}", "CUDA": str(torch.version.cuda),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }  # fmt: skip
    return {
        **facts, "torch": torch.__version__, "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }  # fmt: skip


def page(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    facts = ", ".join(f"{key} {value}" for key, value in report["versions"].items())
    tiny = "Tiny sizes: the times mean nothing. " if report["tiny"] else ""
    written = f"{tiny}Written by `make gpu` in {report['seconds']} s. {facts}."
    lines = ["# On a GPU", "", written, ""]
    for part in report["parts"]:
        lines += [f"## {part['title']}", ""]
        if part["rows"]:
            frame = pd.DataFrame(part["rows"]).set_index("case").fillna("")
            lines += [markdown(frame), ""]
        if part["ended"]:
            lines += [f"**{part['ended']}**", ""]
    return "\n".join(lines)


def main(
    device: str = "cuda",
    parts: tuple[str, ...] = tuple(PARTS),
    tiny: bool = False,
    seconds: PositiveInt = 525,
    out: Path = OUT,
    page_file: Path | None = None,
) -> None:
    """Print and save what the device computes and how fast; exit status 1 if a part failed.

    Args:
        device: cuda, or cpu with tiny sizes.
        parts: which parts.
        tiny: sizes that only show that everything runs.
        seconds: for all parts together.
        out: folder of gpu.json.
        page_file: where the page is written; by default docs/gpu.md for all parts at full size on
            a GPU, and nowhere otherwise.
    """
    for name in parts:
        require(name in PARTS, f"--parts {name}: there are {', '.join(PARTS)}")
    cuda = pick_device(device).type == "cuda"
    require(cuda or tiny, "--device cpu: full sizes are for a GPU; add --tiny true")
    whole = cuda and not tiny and set(parts) == set(PARTS)
    page_file = page_file or (ROOT / "docs" / "gpu.md" if whole else None)
    begin, done = time.perf_counter(), []
    report = {"versions": versions(device), "tiny": tiny, "seconds": 0, "parts": done}
    print(", ".join(f"{key} {value}" for key, value in report["versions"].items()), flush=True)

    def save() -> None:
        report["seconds"] = round(time.perf_counter() - begin)
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=1)
        write_whole(out / "gpu.json", lambda draft: draft.write_text(text, encoding="utf-8"))
        if page_file:
            write_whole(page_file, lambda draft: draft.write_text(page(report), encoding="utf-8"))

    for name in parts:
        here: dict[str, Any] = {"name": name, "title": PARTS[name].title, "rows": [], "ended": ""}
        done.append(here)
        print(f"\n{here['title']}", flush=True)

        def keep(row: Row, here: dict[str, Any] = here) -> None:
            here["rows"].append(row)
            print("  " + ", ".join(f"{k}: {v}" for k, v in row.items() if v != ""), flush=True)
            save()

        left = seconds - (time.perf_counter() - begin)
        here["ended"] = carry_out(PARTS[name], device, tiny, left, keep)
        if here["ended"]:
            print(f"  {here['ended']}", flush=True)
        save()
    missed = [r for part in done for r in part["rows"] if r.get("met") == "no"]
    print(f"\n{report['seconds']} s; {len(missed)} lines miss their aim", flush=True)
    if any(part["ended"].startswith("failed") for part in done):
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
