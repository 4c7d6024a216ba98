"""Which processor computes, and which processes share the work."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

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


def pick_device(name: str) -> torch.device:
    """The device that a flag names; auto takes a GPU where there is one.

    Raises:
        InputError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(0, device=name).device.type in ("cpu", "cuda"):
            return torch.device(name)
    except (RuntimeError, AssertionError):
        pass
    raise InputError(f"--device {name}: not available here; use cpu")
