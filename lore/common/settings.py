"""What a setting may be: numbers with a range, names of folders, optimisers.

A flag of such a type says in ``--help`` and in its error what it takes.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jsonargparse.typing import extend_base_type, register_type
from torch import Tensor
from torch.optim import Optimizer

NAME = re.compile(r"\w[\w .,+=-]{0,99}")  # a name that cannot lead out of its folder


def _number(base: type, rule: str, low: float, high: float, open_ends: bool = False) -> Any:
    """A type of numbers within a range; NaN is in none.

    Args:
        base: int or float.
        rule: the range in words, the type's name.
        low, high: its ends.
        open_ends: the ends themselves are outside.
    """

    def check(_: type, value: Any) -> None:
        try:
            whole = base is float or float(value).is_integer()
            number = base(value)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"{rule} is expected") from None
        inside = low < number < high if open_ends else low <= number <= high
        if isinstance(value, bool) or not whole or not inside:
            raise ValueError(f"{rule} is expected")

    return extend_base_type(rule, base, check, register_key=(rule, base))


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
Fraction = _number(float, "a number above 0 and below 1", 0, 1, open_ends=True)
# Single precision squares these without overflow, and keeps the small ones apart from 0.
Rate = _number(float, "a number from 1e-12 to 1000", 1e-12, 1e3)
PositiveFloat = _number(float, "a number from 1e-12 to 1e12", 1e-12, 1e12)
NonNegativeFloat = _number(float, "a number from 0 to 1e12", 0, 1e12)
Concentration = _number(float, "a number from 1e-6 to 1e6", 1e-6, 1e6)


def _check_name(_: type, value: Any) -> None:
    if not (isinstance(value, str) and NAME.fullmatch(value)):
        raise ValueError(
            "a name is expected, not a path: at most 100 letters, digits, spaces or _.,+=- "
            "that begin with a letter, a digit or _"
        )


Name = extend_base_type("name", str, _check_name, register_key=("name of a folder", str))


class OptimizerChoice:
    """A class of optimisers with its arguments; called with parameters, it makes one of them.

    Attributes:
        path: where the class is found, such as torch.optim.AdamW.
        arguments: of the class, beside the parameters: numbers, truth values, lists of numbers.
    """

    def __init__(self, path: str, arguments: Mapping[str, Any]) -> None:
        """Find the class, and try it with its arguments on a parameter of no importance.

        Nothing is imported and nothing but an optimiser is ever called: the class must be in a
        module that is loaded already, as torch.optim is.

        Raises:
            ValueError: no such class or arguments, or it cannot take a plain step.
        """
        module, _, name = path.rpartition(".")
        found = vars(sys.modules[module]).get(name) if module in sys.modules else None
        if not (isinstance(found, type) and issubclass(found, Optimizer)):
            raise ValueError(
                f"{path:.60} is not a subclass of torch.optim.Optimizer in torch.optim, such as "
                "torch.optim.AdamW, or in a module that the script imports"
            )
        self.path, self.arguments = path, {k: _argument(k, v) for k, v in arguments.items()}
        self._class: type[Optimizer] = found
        self._try()

    def _try(self) -> None:
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
        return self._class(parameters, **self.arguments)

    def __str__(self) -> str:
        return f"{self.path}({', '.join(f'{k}={v}' for k, v in self.arguments.items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OptimizerChoice) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @classmethod
    def read(cls, given: Any) -> OptimizerChoice:
        """From a path, or from {"class_path": path, "init_args": {name: number}}, also as JSON."""
        return cls(*_path_and_arguments(given))

    @staticmethod
    def with_arguments(given: str, more: Mapping[str, str]) -> str:
        """What ``read`` takes, with further arguments, whose values are JSON."""
        path, arguments = _path_and_arguments(given)
        for name, value in more.items():
            try:
                arguments = {**arguments, name: json.loads(value)}
            except ValueError:  # refused with all else that is no number
                arguments = {**arguments, name: value}
        return json.dumps({"class_path": path, "init_args": arguments})

    def spec(self) -> dict[str, Any]:
        """What ``read`` makes the same choice of."""
        return {"class_path": self.path, "init_args": self.arguments}


def _path_and_arguments(given: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(given, str) and given.startswith("{"):
        given = json.loads(given)
    given = {"class_path": given} if isinstance(given, str) else given
    if isinstance(given, dict) and given.keys() <= {"class_path", "init_args"}:
        path, arguments = given.get("class_path"), given.get("init_args") or {}
        if isinstance(path, str) and isinstance(arguments, dict):
            return path, arguments
    raise ValueError("the path of an optimiser is expected, such as torch.optim.AdamW")


def _argument(name: str, value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    if all(isinstance(x, bool | int | float) and math.isfinite(x) for x in values):
        return value
    raise ValueError(f"its argument {name} must be a number, not {value!r:.40}")


register_type(
    OptimizerChoice,
    serializer=OptimizerChoice.spec,
    deserializer=OptimizerChoice.read,
)
