"""Limited-memory BFGS with a given first curvature, for smooth functions of one tensor."""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

MEMORY = 20
ARMIJO = 1e-4
Inverse = Callable[[Tensor], Tensor]  # applies an estimate of the inverse curvature
Memory = deque[tuple[Tensor, Tensor, float]]  # steps, what they changed the gradient by, and s . y


class Minimum(NamedTuple):
    """Where a minimisation ended, with the values at all points accepted, which never rise."""

    x: Tensor
    values: list[float]


def minimise(
    function: Callable[[Tensor], tuple[float, Tensor]], x: Tensor, inverse: Inverse,
    tolerance: float, iterations: int,
) -> Minimum:  # fmt: skip
    """Minimise by L-BFGS with backtracking (Nocedal and Wright, algorithm 7.5), from x on, until
    the next step promises less than a share ``tolerance`` of the value.

    The function gives value and gradient. ``inverse`` applies an estimate of the inverse curvature,
    whose size the last step corrects and whose shape the memory does.
    """
    value, g = function(x)
    values, memory = [value], Memory(maxlen=MEMORY)
    for _ in range(iterations):
        step, slope = _descent(g, memory, inverse)
        if -slope <= 2 * tolerance * (1 + abs(value)):
            break
        size = 1.0
        for _ in range(30):
            new, g_new = function(x + size * step)
            if new <= value + ARMIJO * size * slope:
                break
            bend = new - value - slope * size  # of the parabola through both values
            lowest = -slope * size / (2 * bend) if bend > 0 else 1.0
            size *= min(0.5, max(0.1, lowest))
        else:  # the value is known no more exactly than this
            break
        s, y = size * step, g_new - g
        curvature = float((s * y).sum())
        if curvature > 1e-10 * float((y * y).sum()) ** 0.5 * float((s * s).sum()) ** 0.5:
            memory.append((s, y, curvature))
        x, value, g = x + s, new, g_new
        values.append(value)
    return Minimum(x, values)


def _descent(g: Tensor, memory: Memory, inverse: Inverse) -> tuple[Tensor, float]:
    """A step that goes down, and its slope: by rounding the memory's, or a given curvature's own,
    may go up, which is no sign of a minimum. Then the memory is dropped, and then both."""
    for step in (lambda: _two_loops(g, memory, inverse), lambda: inverse(g), lambda: g):
        found = -step()
        slope = float((g * found).sum())
        if slope < 0:
            break
        memory.clear()
    return found, slope


def _two_loops(g: Tensor, memory: Memory, inverse: Inverse) -> Tensor:
    q, shares = g, []
    for s, y, sy in reversed(memory):
        shares.append(float((s * q).sum()) / sy)
        q = q - shares[-1] * y
    q = inverse(q)
    if memory:
        s, y, sy = memory[-1]
        q = q * (sy / float((y * inverse(y)).sum()))
    for (s, y, sy), share in zip(memory, reversed(shares), strict=True):
        q = q + (share - float((y * q).sum()) / sy) * s
    return q
