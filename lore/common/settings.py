"""What a setting may be: ``--help`` of such a flag says it, and so does its error."""

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from jsonargparse.typing import register_type
from torch import Tensor
from torch.optim import Optimizer


def _type(base: type, name: str, is_allowed: Callable[[Any], bool], error: str = "") -> Any:
    """A type of flags, whose values are the base's own; its name or an error says which."""
    kind = type(name, (base,), {})

    def read(value: Any) -> Any:
        with suppress(ValueError, TypeError, OverflowError):
            found = base(value)
            same = isinstance(value, str) if base is str else found == float(value)
            if same and not isinstance(value, bool) and is_allowed(found):
                return found
        raise ValueError(error or f"{name} is expected")

    register_type(kind, base, read, uniqueness_key=(name, base))
    return kind


def _number(base: type, rule: str, low: float, high: float) -> Any:
    """Numbers from low to high; NaN is in no range."""
    return _type(base, rule, lambda number: low <= number <= high)


PositiveInt = _number(int, "a whole number from 1 to 1e9", 1, 10**9)
NonNegativeInt = _number(int, "a whole number from 0 to 1e9", 0, 10**9)
# Sizes of networks and ranks: with more, memory or the time of a life runs out.
Layers = _number(int, "a whole number from 1 to 100", 1, 100)
Rank = _number(int, "a whole number from 1 to 1000", 1, 1000)
Steps = Rank
Width = _number(int, "a whole number from 0 to 16384", 0, 2**14)
PositiveWidth = _number(int, "a whole number from 1 to 16384", 1, 2**14)
Latent = _number(int, "a whole number from -1 to 16384", -1, 2**14)
Epochs = _number(int, "a whole number from 0 to 100000", 0, 10**5)
Port = _number(int, "a whole number from 0 to 65535", 0, 65535)
SeedNumber = _number(int, "a whole number from 0 to 4294967295", 0, 2**32 - 1)
Fraction = _type(float, "a number above 0 and below 1", lambda number: 0 < number < 1)
# Single precision squares these without overflow, and keeps the small ones apart from 0.
Rate = _number(float, "a number from 1e-12 to 1000", 1e-12, 1e3)
PositiveFloat = _number(float, "a number from 1e-12 to 1e12", 1e-12, 1e12)
NonNegativeFloat = _number(float, "a number from 0 to 1e12", 0, 1e12)
Concentration = _number(float, "a number from 1e-6 to 1e6", 1e-6, 1e6)
Pool = _type(str, "last, mean or a layer such as layer:12",
             re.compile(r"last|mean|layer:[1-9]\d{0,2}").fullmatch)  # fmt: skip
Name = _type(
    str, "name", re.compile(r"\w[\w .,+=-]{0,99}").fullmatch,
    "a name is expected, not a path: at most 100 letters, digits, spaces or _.,+=- "
    "that begin with a letter, a digit or _",
)  # fmt: skip


class OptimizerChoice:
    """A class of optimisers with its arguments; called with parameters, it makes one of them.

    Nothing is imported and nothing but an optimiser is ever called: the class must be in a module
    that is loaded already, as torch.optim is.
    """

    def __init__(self, class_path: str, init_args: Mapping[str, Any]) -> None:
        """Arguments are numbers, truth values and lists; ValueError where no plain step is made."""
        module, _, name = class_path.rpartition(".")
        self._class = vars(sys.modules[module]).get(name) if module in sys.modules else None
        if not (isinstance(self._class, type) and issubclass(self._class, Optimizer)):
            raise ValueError(f"{class_path:.60} is not a subclass of torch.optim.Optimizer in "
                             "torch.optim, such as torch.optim.AdamW, or in a module that the "
                             "script imports")  # fmt: skip
        for name, value in init_args.items():
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(x, bool | int | float) and math.isfinite(x) for x in values):
                raise ValueError(f"its argument {name} must be a number, not {value!r:.40}")
        self.given = {"class_path": class_path, "init_args": dict(init_args)}
        parameter = torch.zeros(2, 2, requires_grad=True)
        parameter.grad = torch.ones(2, 2)
        try:
            self([torch.zeros(1)])
            self([parameter]).step(lambda: parameter.sum())
        except Exception as error:  # whatever an optimiser says to arguments it does not take
            said = " ".join(str(error).split())
            raise ValueError(f"{self} cannot be used: {said or type(error).__name__}") from None

    def __call__(self, parameters: Iterable[Tensor]) -> Optimizer:
        """The optimiser of the parameters."""
        return self._class(parameters, **self.given["init_args"])

    def __str__(self) -> str:
        path, arguments = self.given.values()
        return f"{path}({', '.join(f'{k}={v}' for k, v in arguments.items())})"

    @staticmethod
    def parts(given: Any) -> dict[str, Any]:
        """{"class_path": path, "init_args": {name: number}}, of a path or of this, also as JSON."""
        given = json.loads(given) if isinstance(given, str) and given[:1] == "{" else given
        given = {"class_path": given} if isinstance(given, str) else given
        if isinstance(given, dict) and given.keys() <= {"class_path", "init_args"}:
            path, arguments = given.get("class_path"), given.get("init_args") or {}
            if isinstance(path, str) and isinstance(arguments, dict):
                return {"class_path": path, "init_args": arguments}
        raise ValueError("the path of an optimiser is expected, such as torch.optim.AdamW")


register_type(OptimizerChoice, lambda choice: choice.given,
              lambda given: OptimizerChoice(**OptimizerChoice.parts(given)))  # fmt: skip
