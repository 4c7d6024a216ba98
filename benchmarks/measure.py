"""What the benchmarks share: made-up users, clocks, peak memory, memory bandwidth."""

import ctypes
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

OUT = Path(__file__).resolve().parent / "out"


def made_up_users(users: int, pairs: int, features: int, device: str, seed: int) -> list[Tensor]:
    """Random comparisons, U tensors [pairs, F]: views of one tensor made in place, at no peak."""
    x = torch.empty(users * pairs, features, device=device)
    x.normal_(0, 30, generator=torch.Generator(device).manual_seed(seed))
    return list(x.view(users, pairs, features))


def now(device: str) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds that some work takes."""
    begin = now(device)
    work()
    return now(device) - begin


def iteration_seconds(work: Callable[[], object], device: str, iterations: int) -> np.ndarray:
    """Seconds of every iteration but the first, of work that steps any torch optimisers.

    Args:
        work: runs the iterations, each with as many optimiser steps.
        device: cpu or cuda.
        iterations: how many it runs.
    """
    stamps: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: stamps.append(now(device)))
    try:
        work()
    finally:
        hook.remove()
    steps = len(stamps) // iterations
    return np.diff(stamps[steps - 1 :: steps])


def extra_memory(work: Callable[[], object], device: str) -> int:
    """Bytes by which the peak memory of this process, or on CUDA of the device, rises in work.

    On a CPU free memory is given back first, and the peak forgotten, where the system can; else it
    is of the process's life: run it before anything that needs more.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError, AttributeError):  # as on Linux with glibc
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _peak()
    work()
    return _peak() - before


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's peak may be that of the process that started this one
        return int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def own_memory() -> Iterator[list[int]]:
    """A list that ends as samples of the process's own memory in bytes, files' pages left out.

    Mapped files count in a process's peak memory though the system drops their pages at need.
    """
    samples, done = [_anonymous()], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            samples.append(_anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def _anonymous() -> int:
    """Bytes of this process that no file backs, as Linux tells them."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def copy_bandwidth(size: int, device: str) -> float:
    """Bytes read and written each second by copying so many bytes to another place."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = [timed(lambda: target.copy_(source), device) for _ in range(7)]
    return 2 * size / float(np.median(seconds))


def product_speed(dtype: torch.dtype, device: str, size: int = 2048) -> float:
    """Floating-point operations a second of one product of two square matrices."""
    x = torch.randn(size, size, dtype=dtype, device=device)
    seconds = [timed(lambda: x @ x, device) for _ in range(7)]
    return 2 * size**3 / float(np.median(seconds))
