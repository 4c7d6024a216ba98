"""Methods for personal rewards: each is one file here and one line of ``METHODS``."""

from __future__ import annotations

from methods.base import Fitted, Method, Task, View

METHODS: dict[str, type[Method]] = {}

__all__ = ["METHODS", "Fitted", "Method", "Task", "View"]
