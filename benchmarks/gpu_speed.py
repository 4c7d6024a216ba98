"""How fast a device embeds and fits: the times of gpu.py."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import core as shapes
import planted
import side
from embedding import LLAMA_8B, made_up
from gpu_checks import OF_ROWS, WAYS, Row, embedded, random_engine
from lore.embeddings.prefix_trees import Tokens
from lore.embeddings.reward_model import Engine
from lore.methods.mixed_logit import MixedLogit
from measure import copy_bandwidth, product_speed, timed

SHARE, TIMES = 0.85, 8  # of the token bound, and of one at a time, that are aimed at
DATASETS = {"a": "Reddit TLDR", "b": "PRISM", "c": "PersonalLLM"}  # cases of embedding.py
AIMED = ("Reddit TLDR", "PersonalLLM")
# Dense bfloat16 operations a second, by the makers' data sheets.
NOMINAL = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
TINY = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


# ------------------------------------------------------------------------ Embedding


def embedding(device: str, tiny: bool) -> Iterator[Row]:
    """Each way of embedding on the lengths of three datasets, beside one at a time."""
    sizes = (1, 1, 1) if tiny else (40, 30, 40)
    model = TINY if tiny else {**LLAMA_8B, "head_dim": 128, "initializer_range": 0.02}
    engine = random_engine("Llama", torch.bfloat16, device, 150 if tiny else 4096, **model)
    peak, source = peak_rate(device, tiny)
    yield {"case": "peak", "tokens/s": "", "note": f"{peak / 1e12:.3g} TFLOP/s, {source}"}
    cases = made_up(model["vocab_size"], *sizes, np.random.default_rng(0))
    for name, conversations in cases.items():
        if tiny:
            conversations = [each[::6] for each in conversations[:4]]  # prefixes stay shared
        tokens = sorted(conversations, key=tuple)
        yield from _ways(DATASETS[name[0]], engine, tokens, peak, device)


def _ways(
    dataset: str, engine: Engine, tokens: list[Tokens], peak: float, device: str
) -> Iterator[Row]:
    """A line for one at a time, then one for each other way."""
    given, warm = sum(map(len, tokens)), tokens[: max(2, len(tokens) // 8)]
    alone, rows_alone = 0.0, None
    for name, (method, flex) in {"one at a time": ("single", False), **WAYS}.items():
        embedded(engine, warm, method, flex)  # compiles, and fills the allocator
        fell_back, flex = engine.flex != flex, engine.flex
        before = engine.tokens_computed
        if torch.device(device).type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found: list[torch.Tensor] = []
        seconds = timed(lambda f=found, m=method, x=flex: f.append(
            embedded(engine, tokens, m, x)), device)  # fmt: skip
        computed, rows = engine.tokens_computed - before, found[0].float()
        if rows_alone is None:
            alone, rows_alone = seconds, rows
        worst = float(((rows - rows_alone).norm(dim=1) / rows_alone.norm(dim=1)).max())
        row = _row(f"{dataset}, {name}", engine, seconds, alone, given, computed, peak)
        note = "fell back to the dense mask" if fell_back else ""
        yield row | {"deviation": f"{worst:.1e}", **_aims(dataset, name, row, worst), "note": note}


def _row(
    case: str, engine: Engine, seconds: float, alone: float, given: int, computed: int, peak: float
) -> Row:
    """What is said of a way. MFU leaves attention out: two operations a weight and token."""
    body = sum(p.numel() for p in engine.model.base_model.layers.parameters())
    row = {
        "case": case, "seconds": f"{seconds:.2f}", "tokens/s": f"{given / seconds:.0f}",
        "times": f"{alone / seconds:.2f}", "token bound": f"{given / computed:.2f}",
        "share": f"{alone / seconds / (given / computed):.2f}",
        "MFU": f"{2 * body * computed / seconds / peak:.1%}",
    }  # fmt: skip
    if engine.model.device.type == "cuda":
        row["peak GiB"] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
    return row


def _aims(dataset: str, name: str, row: Row, worst: float) -> Row:
    """What is aimed at, on every way that shares something, and whether it is met."""
    if name == "one at a time":
        return {"aim": "", "met": ""}
    rows = OF_ROWS[torch.bfloat16]
    aims, met = [f"rows {rows:g}"], [worst <= rows]
    if name == "tree, FlexAttention":
        aims.append(f"share {SHARE:g}")
        met.append(float(row["share"]) >= SHARE)
        if dataset in AIMED:
            aims.append(f"{TIMES} times")
            met.append(float(row["times"]) >= TIMES)
    return {"aim": ", ".join(aims), "met": "yes" if all(met) else "no"}


def peak_rate(device: str, tiny: bool) -> tuple[float, str]:
    """Operations a second that MFU is a share of, and where the number is from."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, rate in NOMINAL.items():
            if known in name:
                return rate, f"nominal of the {known}"
    n = 256 if tiny else 8192
    return product_speed(torch.bfloat16, device, n), f"measured on a product of {n} x {n} matrices"


# ----------------------------------------------------------------------------- Core


def core(device: str, tiny: bool) -> Iterator[Row]:
    """The core at the datasets' shapes: a line for each case of core.py, timed side by side."""
    small = {
        "features": 32, "joint": (12, 4), "ranks": (1, 2), "alternating": (9, 5, 4),
        "sweep": (2, 3), "few_shot": (1, 2, 3, 2), "few_shot_iterations": 3,
    }  # fmt: skip
    for case in shapes.cases(device, steps=4, **(small if tiny else {})):
        seconds, size = _seconds(case.settings, device, 4 if tiny else 200), case.floor_bytes()
        floor = size / copy_bandwidth(size, device)
        row = {"case": case.name, "ms": f"{1000 * seconds:.3g}", "floor ms": f"{1000 * floor:.3g}"}
        row["of the floor"] = f"{seconds / floor:.1f}"
        if case.plain:
            plain = float(np.median(side.answer(case.settings, True)["seconds"]))
            row |= {"plain ms": f"{1000 * plain:.3g}", "plain / ours": f"{plain / seconds:.1f}"}
        if case.name.startswith("joint") and case.plain:
            row |= {"aim": "a thousand in a second", "met": "yes" if seconds <= 1e-3 else "no"}
        yield row
    side.made_up.cache_clear()


def _seconds(case: dict[str, Any], device: str, steps: int) -> float:
    """Seconds of an iteration, or of a whole sweep.

    The device is not waited for between iterations: what more of them take longer is divided.
    """
    if "shots" in case:
        return timed(lambda: side.sweep(case), device)
    took = [timed(lambda n=n: side.train({**case, "steps": n}), device) for n in (2, 2, 2 + steps)]
    return max(took[2] - took[1], 1e-9) / steps


def mixed_logit(device: str, tiny: bool) -> Iterator[Row]:
    """The mixed logit with its choice at PersonalLLM's shape, on planted tastes."""
    sizes: dict[str, Any] = {"users": 10, "shots": 10, "held_out": 2, "features": 12, "rows": 50}
    if not tiny:
        sizes = {"users": 1000, "shots": 47, "held_out": 2, "features": 4096, "rows": 8000}
    task = planted.moved(planted.task(**sizes), device)
    pairs = len(task.local_train)  # read once, before the clock starts
    assert pairs == sizes["users"] * sizes["shots"]
    found: list[Any] = []
    seconds = timed(lambda: found.extend(MixedLogit().fit(task)), device)
    yield {
        "case": f"{sizes['users']} users x {sizes['shots']}, F = {sizes['features']}",
        "seconds": f"{seconds:.1f}", "aim": "10 seconds", "met": "yes" if seconds <= 10 else "no",
        "chosen": found[-1].describe()["note"],
    }  # fmt: skip
