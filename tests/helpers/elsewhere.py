"""A pretended second device: tensors that say they lie elsewhere, and refuse to meet CPU ones.

They compute on the CPU and refuse what a GPU's tensors refuse: arithmetic of two devices (numbers
of no dimension aside), CPU tensors indexed by others, CPU generators, conversion to NumPy. The
device calls itself meta, for which autograd needs no hardware.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
# Of their tensors, only the first must be on the device: the indices may be anywhere.
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default,
            aten.index_put.default}  # fmt: skip


class Elsewhere(Tensor):
    """A tensor on the pretended device, ``inner`` on the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Elsewhere":
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=DEVICE,
        )  # fmt: skip

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Lets tensors be made on the pretended device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Lists become tensors, and tensors lists, on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.new_tensor and args[0].device == DEVICE:
            kwargs = {"dtype": args[0].dtype, "device": DEVICE, **kwargs}
            func, args = torch.tensor, args[1:]
        if func in (torch.repeat_interleave, Tensor.repeat_interleave) and args[0].device == DEVICE:
            repeats = args[1] if len(args) > 1 else args[0]  # no real device must be told the size
            kwargs.setdefault("output_size", int(repeats.sum()))
        if func in (Tensor.tolist, Tensor.item, Tensor.__format__):
            return func(args[0].cpu(), *args[1:])
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    away = [isinstance(x, Elsewhere) for x in tensors]
    asked = kwargs.get("device")
    there = any(away) if asked is None else torch.device(asked) == DEVICE
    _refuse(func, tensors, away, kwargs.get("generator") is not None and there)
    inner = tree_map_only(Elsewhere, lambda x: x.inner, (args, kwargs))
    if asked is not None:
        inner[1]["device"] = torch.device("cpu")
    out = func(*inner[0], **inner[1])
    if func is aten.copy_.default or not there:
        return args[0] if func is aten.copy_.default else out
    out = tree_map_only(Tensor, Elsewhere, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _refuse(func: Any, tensors: list[Tensor], away: list[bool], random: bool) -> None:
    """RuntimeError where a GPU would raise one."""
    if random:
        raise RuntimeError(f"{func}: a CPU generator on another device")
    if func in MOVES or not any(away):
        return
    if func in INDEXING:
        mixed = not away[0] or (func is not aten.index.Tensor and not away[-1] and tensors[-1].ndim)
    else:
        mixed = any(x.ndim and not far for x, far in zip(tensors, away, strict=True))
    if mixed:
        shapes = [f"{tuple(x.shape)} on {x.device}" for x in tensors]
        raise RuntimeError(f"{func}: tensors on two devices: {', '.join(shapes)}")


@contextmanager
def pretended() -> Iterator[torch.device]:
    """The pretended device, for a while."""
    with _Literals(), _Factories():
        yield DEVICE
