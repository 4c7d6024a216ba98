"""How the cost of an iteration grows, and what a million users would take.

    python benchmarks/scaling.py                          # users, pairs, rank, features: a decade
    python benchmarks/scaling.py --million --gigabytes 16 # streamed from a file of that size
"""

import math
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from lore.common.cli import cli
from lore.common.settings import PositiveFloat, PositiveInt, SeedNumber
from lore.experiments.report.tables import markdown
from lore.learning.comparisons import Comparisons, DenseFeatures
from measure import OUT, iteration_seconds, made_up_users, own_memory
from utils import LoRe, train_together

FACTORS = (1, 2, 5, 10)
BYTES = {"bfloat16": 2, "float32": 4}


def main(
    users: PositiveInt = 200,
    pairs: PositiveInt = 20,
    rank: PositiveInt = 4,
    features: PositiveInt = 512,
    steps: PositiveInt = 11,
    device: str = "cpu",
    out: Path = OUT,
    million: bool = False,
    target: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (1_000_000, 50, 4096, 5),
    gigabytes: PositiveFloat = 2.0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    device_gigabytes: PositiveFloat = 80.0,
    seed: SeedNumber = 0,
) -> None:
    """Print seconds of an iteration of the joint estimator while one size at a time grows tenfold.

    Args:
        users: users at the start.
        pairs: comparisons of each user at the start.
        rank: K at the start.
        features: F at the start.
        steps: iterations in a row; the first one is not counted, the median counts.
        device: cpu or cuda.
        out: with million, the folder of the file while it is used.
        million: instead, stream as many users as a file of gigabytes holds, and extrapolate.
        target: users, comparisons of each, features and rank to extrapolate to; all but the users
            are also the measured run's.
        gigabytes: size of the file of feature differences.
        dtype: of the file.
        device_gigabytes: memory of a device of the extrapolation.
        seed: of everything random.
    """
    if million:
        out.mkdir(parents=True, exist_ok=True)
        print(markdown(_million(target, gigabytes, dtype, device_gigabytes, device, steps, out)))
        return
    base = {"users": users, "pairs": pairs, "rank": rank, "features": features}
    print(markdown(_growth_table(base, device, steps, seed)))


# -------------------------------------------------------------- One size at a time


def _seconds(
    users: int, pairs: int, rank: int, features: int, device: str, steps: int, seed: int
) -> float:
    X = made_up_users(users, pairs, features, device, seed)
    model = LoRe(None, 0.0, users, features, rank, steps, generator=seed)
    return float(np.median(iteration_seconds(partial(model.train, X), device, steps)))


def _exponent(values: list[int], seconds: list[float]) -> float:
    """p of seconds ~ value^p over the whole decade."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def _growth_table(base: dict[str, int], device: str, steps: int, seed: int) -> pd.DataFrame:
    """Median seconds of an iteration: a row for each quantity, a column for each value."""
    rows = {}
    for what, first in base.items():
        values = [first * factor for factor in FACTORS]
        given = [{**base, what: value} for value in values]
        seconds = [_seconds(**sizes, device=device, steps=steps, seed=seed) for sizes in given]
        cells = {
            f"x{factor}": f"{value}: {1000 * s:.3g} ms ({s / seconds[0]:.1f}x)"
            for factor, value, s in zip(FACTORS, values, seconds, strict=True)
        }
        rows[what] = {**cells, "exponent": f"{_exponent(values, seconds):.2f}"}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("grows")


# ------------------------------------------------------------------- A million users


def _million(
    target: tuple[int, ...],
    gigabytes: float,
    dtype: str,
    device_gigabytes: float,
    device: str,
    steps: int,
    out: Path,
) -> pd.DataFrame:
    """What the measured run took, and the same of the target by proportion."""
    users, pairs, features, rank = target
    here = max(rank, int(gigabytes * 1e9 / (pairs * features * BYTES[dtype])))
    with tempfile.TemporaryDirectory(dir=out) as folder:
        x = _differences(Path(folder) / "x", here * pairs, features, dtype)
        seconds, memory = _streamed(x, here, pairs, rank, device, steps)
    rate = x.nbytes / seconds
    # What is kept for each comparison does not depend on F: more users show it at few features.
    many = max(rank, users // 10)
    narrow = torch.randn(many * pairs, rank, dtype=getattr(torch, dtype))
    each = _streamed(narrow, many, pairs, rank, device, 3)[1] / len(narrow)
    table = pd.DataFrame(
        {
            "measured here": _account(here, pairs, features, rank, dtype, rate),
            "by proportion": _account(users, pairs, features, rank, dtype, rate),
        }
    )
    chunks = max(0, memory - each * len(x))
    kept = [f"{size / 1e9:.2f} GB" for size in (memory, chunks + each * users * pairs)]
    table.loc["memory of its own while training"] = kept
    share = users * pairs * features * BYTES[dtype] / (0.8e9 * device_gigabytes)
    holders = f"devices of {device_gigabytes:g} GB with the features in 80% of it"
    table.loc[holders] = ["", f"{math.ceil(share)}"]
    ram = psutil.virtual_memory().total
    table.loc["memory of this machine"] = [f"{ram / 1e9:.1f} GB", ""]
    return table


def _differences(path: Path, rows: int, features: int, dtype: str) -> Tensor:
    """A file of made-up differences, mapped: one block of noise, shifted by a row each time."""
    size = rows * features
    x = torch.from_file(str(path), shared=True, size=size, dtype=getattr(torch, dtype))
    x = x.view(rows, features)
    noise = torch.randn(min(rows, 4096), features).mul_(30).to(x.dtype)
    for i, part in enumerate(tqdm(x.split(len(noise)), "writing the file", disable=None)):
        part.copy_(noise.roll(i, 0)[: len(part)])
    return x


def _streamed(
    x: Tensor, users: int, pairs: int, rank: int, device: str, steps: int
) -> tuple[float, int]:
    """Median seconds of an iteration, and bytes of the process's own that it takes at the most."""
    with own_memory() as samples:
        data = Comparisons(DenseFeatures(x, device), [pairs] * users)
        model = LoRe(None, 0.0, users, x.shape[1], rank, steps, generator=0)
        seconds = iteration_seconds(lambda: train_together([model], data), device, steps)
    return float(np.median(seconds)), max(samples) - samples[0]


def _account(
    users: int, pairs: int, features: int, rank: int, dtype: str, rate: float
) -> dict[str, str]:
    """Storage, traffic and time at these sizes, if so many bytes are read each second."""
    entries = users * pairs * features
    traffic = entries * BYTES[dtype]
    return {
        "users": f"{users:,}",
        "comparisons": f"{users * pairs:,}",
        "features, rank": f"{features}, {rank}",
        "differences in bfloat16": f"{2 * entries / 1e9:.1f} GB",
        "differences in float32": f"{4 * entries / 1e9:.1f} GB",
        f"read in an iteration ({dtype})": f"{traffic / 1e9:.1f} GB",
        "read in a second": f"{rate / 1e9:.2f} GB",
        "seconds of an iteration": f"{traffic / rate:.3g}",
        "hours of 1000 iterations": f"{traffic / rate / 3.6:.3g}",
        "weights and basis, with Adam's state": f"{12 * rank * (users + features) / 1e6:.1f} MB",
        "summed over processes in an iteration": f"{4 * rank * features / 1e6:.2f} MB",
    }


if __name__ == "__main__":
    cli(main)
