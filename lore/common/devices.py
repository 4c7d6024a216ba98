"""Which processor computes, which processes share the work, and sums over them."""

import os
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lore.common.files import InputError


def processes() -> tuple[int, int]:
    """This process's number and how many share the work (torchrun); joins them on first use."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group(backend(), timeout=timedelta(hours=2))
    return dist.get_rank(), world


def backend() -> str:
    """What processes talk by: nccl for tensors on a GPU, gloo for those that stay on the CPU."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def wait_for_all() -> None:
    """Let every process reach this line."""
    if processes()[1] > 1:
        dist.barrier()


def sum_over_processes(x: Tensor, processes: int) -> Tensor:
    """Sum of x over the processes, which all get it; x itself where there is one."""
    if processes > 1:
        x = x.contiguous().clone()
        dist.all_reduce(x)
    return x


def rows_before(rows: int, processes: int) -> tuple[int, int]:
    """How many rows the processes before this one have, and how many all have."""
    if processes == 1:
        return 0, rows
    counts = torch.zeros(processes, dtype=torch.long)
    counts[dist.get_rank()] = rows
    counts = sum_over_processes(counts, processes)
    return int(counts[: dist.get_rank()].sum()), int(counts.sum())


def gather_rows(rows: Tensor, processes: int) -> Tensor:
    """The rows [n, ...] of all processes, in order, which all get them; uncopied where one is."""
    if processes == 1:
        return rows
    first, count = rows_before(len(rows), processes)
    whole = rows.new_zeros(count, *rows.shape[1:])
    whole[first : first + len(rows)] = rows
    return sum_over_processes(whole, processes)


def pick_device(name: str) -> torch.device:
    """The device that a flag names, or InputError; auto takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with suppress(RuntimeError, AssertionError):
        if torch.empty(0, device=name).device.type in ("cpu", "cuda"):
            return torch.device(name)
    raise InputError(f"--device {name}: not available here; use cpu")
