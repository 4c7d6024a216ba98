"""What a device computes against a CPU, or against one at a time: the checks of gpu.py."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from tqdm import tqdm

import planted
from embedding import Writer
from lore import methods as all_methods
from lore.common.devices import backend
from lore.embeddings.prefix_trees import Tokens
from lore.embeddings.reward_model import Engine
from lore.experiments.judging import evaluate
from lore.learning.comparisons import Comparisons
from lore.learning.training import Checkpoint
from measure import made_up_users
from utils import LoRe, LoRe_regularized, PersonalizeBatch, train_together

Row = dict[str, Any]
OF_CORE = 1e-3  # the relative difference that float32 may have after 100 steps
OF_ROWS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
OF_METHODS = 0.02  # of accuracies and log losses
KINDS = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma")
SMALL = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 8192, "num_labels": 1, "initializer_range": 0.05,
}  # fmt: skip


def line(case: str, deviation: float, aim: float, **more: Any) -> Row:
    """A line that says how far two computations are apart, and whether that is near enough."""
    met = "yes" if deviation <= aim else "no"  # not a number is not near
    return {"case": case, **more, "deviation": f"{deviation:.1e}", "aim": f"{aim:g}", "met": met}


def apart(a: Tensor, b: Tensor) -> float:
    """The relative difference of two tensors, on whatever devices."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).norm() / b.norm())


# ----------------------------------------------------------------------------- Core


def _users(tiny: bool) -> list[Tensor]:
    users, pairs, features = (12, 6, 32) if tiny else (200, 20, 1024)
    return made_up_users(users, pairs, features, "cpu", 0)


def _model(kind: type[LoRe], X: list[Tensor], steps: int, **more: Any) -> LoRe:
    alpha = 1.0 if kind is LoRe_regularized else 0.0
    return kind(X[0][0], alpha, len(X), X[0].shape[1], 4, steps, 0.1, generator=0, **more)


def core(device: str, tiny: bool) -> Iterator[Row]:
    """Joint, alternating and few-shot fits here and there."""
    X = _users(tiny)
    there, steps = [x.to(device) for x in X], 10 if tiny else 100
    for name, kind in (("joint", LoRe), ("alternating", LoRe_regularized)):
        here, away = (_model(kind, X, steps).train(some) for some in (X, there))
        worst = max(apart(a, b) for a, b in zip(away, here, strict=True))
        yield line(f"{name}, {steps} steps", worst, OF_CORE)
    V = here[1]
    found = [
        torch.stack(PersonalizeBatch(len(X), len(V), V.shape[1], steps, generator=1).train(
            some, V.to(some[0].device)))
        for some in (there, X)
    ]  # fmt: skip
    yield line(f"few-shot, {steps} steps", apart(*found), OF_CORE)


def resume(device: str, tiny: bool) -> Iterator[Row]:
    """A training that is begun on the CPU and ended on the device, against one on the CPU alone."""
    X = _users(tiny)
    half, steps = (5, 10) if tiny else (50, 100)
    for name, kind in (("joint", LoRe), ("alternating", LoRe_regularized)):
        with tempfile.TemporaryDirectory() as folder:
            first, state = _model(kind, X, steps), Checkpoint(Path(folder) / "state", half)
            whole = train_together([first], Comparisons.from_list(X), state)[0]
            last = Path(folder) / f"state.0.{steps}.pt"
            last.unlink()  # as if killed between the two
            there = Comparisons.from_list([x.to(device) for x in X])
            again = train_together([_model(kind, X, steps)], there, state)[0]
        worst = max(apart(a, b) for a, b in zip(again, whole, strict=True))
        yield line(f"{name}, from step {half} of {steps}", worst, OF_CORE)


def processes(device: str, tiny: bool) -> Iterator[Row]:
    """A fit in a group of one process, with nccl on a GPU, against one without a group."""
    X = [x.to(device) for x in _users(tiny)]
    alone = _model(LoRe, X, 20, shrinkage=1.0).train(X)
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group(backend(), init_method=meeting, rank=0, world_size=1)
        try:
            joined = _model(LoRe, X, 20, shrinkage=1.0, distributed=True).train(X)
            dist.all_reduce(torch.ones(1))  # as counts are, which stay on the CPU
            dist.barrier()
        finally:
            dist.destroy_process_group()
    worst = max(apart(a, b) for a, b in zip(joined, alone, strict=True))
    yield line(f"joint, shrinkage, {backend()}", worst, OF_CORE)


def methods(device: str, tiny: bool) -> Iterator[Row]:
    """Every method on planted users: accuracies and log losses here and there."""
    names = ("ridge_bt", "lore") if tiny else tuple(all_methods.METHODS)
    sizes = {"users": 10, "shots": 10, "held_out": 6} if tiny else {}
    for name in names:
        found = []
        for where in ("cpu", device):
            task = planted.moved(planted.task(**sizes), where)
            fit = all_methods.METHODS[name]().fit(task)[-1]
            own = fit.adapt(fit.view(task.few), task.few, task.seed)
            records = [r for r in evaluate(fit, task, own) if not r["control"]]
            found.append([np.mean(r[key]) for r in records for key in ("accuracy", "log_loss")])
        yield line(fit.label, float(np.abs(np.subtract(*found)).max()), OF_METHODS)


# ----------------------------------------------------------------------- Embeddings


def random_engine(
    kind: str, dtype: torch.dtype, device: str, batch_tokens: int, **sizes: Any
) -> Engine:
    """An engine of random weights of an architecture, such as "Llama"."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **sizes}, pad_token_id=0)
    config.sliding_window = None
    with torch.device(device):
        make = transformers.AutoModelForSequenceClassification.from_config
        model = make(config, dtype=dtype, attn_implementation="sdpa")
    model.config.pad_token_id = -1
    return Engine(model.to(device, dtype).eval(), True, "tree", batch_tokens)


def embedded(engine: Engine, tokens: list[Tokens], method: str, flex: bool = False) -> Tensor:
    """Rows by a method. On a CPU FlexAttention is not compiled, which takes minutes there."""
    engine.method, engine.flex = method, flex
    stance = "force_eager" if engine.model.device.type == "cpu" else "default"
    with torch.compiler.set_stance(stance):
        return engine.embed(tokens, tqdm(disable=True))


WAYS = {
    "tree, FlexAttention": ("tree", True),
    "tree, dense mask": ("tree", False),
    "sorted": ("sorted", False),
}


def texts(vocabulary: int, tiny: bool) -> list[Tokens]:
    """Sorted conversations with shared prefixes."""
    write = Writer(vocabulary, np.random.default_rng(0))
    prompts, mean = (2, 12) if tiny else (12, 150)
    groups = [write.answers(write.prompt(mean), 4, mean // 2) for _ in range(prompts)]
    return sorted(sum(groups, []), key=tuple)


def rows(device: str, tiny: bool) -> Iterator[Row]:
    """Every architecture that takes trees, each way of embedding, in both precisions."""
    tokens = texts(SMALL["vocab_size"], tiny)
    for kind in KINDS[: 1 if tiny else None]:
        for dtype, aim in OF_ROWS.items():
            engine = random_engine(kind, dtype, device, 120 if tiny else 4096)
            alone = embedded(engine, tokens, "single").float()
            for name, (method, flex) in WAYS.items():
                found = embedded(engine, tokens, method, flex).float()
                worst = float(((found - alone).norm(dim=1) / alone.norm(dim=1)).max())
                case = f"{kind}, {str(dtype).removeprefix('torch.')}, {name}"
                note = "" if engine.flex == flex else "fell back to the dense mask"
                yield line(case, worst, aim, note=note)


class _Messages(logging.Handler):
    """Keeps what a logger says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def memory(device: str, tiny: bool) -> Iterator[Row]:
    """Passes that do not fit are halved: the allocator itself is given too little."""
    if torch.device(device).type != "cuda":
        yield {"case": "passes are halved", "note": "left out: it takes a GPU"}
        return
    tokens = texts(SMALL["vocab_size"], tiny)
    engine = random_engine("Llama", torch.float32, device, 512, intermediate_size=1 << 15)
    expected = embedded(engine, tokens, "sorted")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    embedded(engine, tokens, "sorted")
    enough = 1.3 * torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    heard = _Messages()
    logging.getLogger("lore.embeddings.reward_model").addHandler(heard)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(enough / total)
    try:
        engine.batch_tokens = 1 << 13
        found = embedded(engine, tokens, "sorted")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        logging.getLogger("lore.embeddings.reward_model").removeHandler(heard)
    row = line("passes are halved", apart(found, expected), OF_ROWS[torch.float32])
    halved = sum("memory is full" in each for each in heard.lines)
    row["note"] = f"halved {halved} times, to {engine.batch_tokens} tokens"
    yield row | {"met": row["met"] if halved else "no"}
