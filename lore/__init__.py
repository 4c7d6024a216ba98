"""What the scripts share. Two things come before all imports: Python's version, and ``--help``.

Help computes nothing, so that in place of the libraries that take seconds to import it gets
modules that have every name, as documentation builders do (Sphinx's ``autodoc_mock_imports``).
"""

import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HEAVY = ("torch", "pandas", "pyarrow", "scipy", "sklearn", "safetensors", "transformers",
         "datasets", "matplotlib")  # fmt: skip


class _Anything(type):
    """Classes that may stand in hints and among bases, can be called and have every attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})

    def __call__(cls, *_: Any, **__: Any) -> Any:
        return cls


class _Finder(Loader):
    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        heavy = name.partition(".")[0] in HEAVY
        return ModuleSpec(name, self, is_package=True) if heavy else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _Anything(module.__name__, (), {}).__getattr__


if sys.version_info < (3, 11):  # noqa: UP036 (whoever has an older one is told so)
    raise SystemExit(f"error: Python 3.11 or newer is needed; this is {sys.version.split()[0]}")
if "--help" in sys.argv and "torch" not in sys.modules:
    sys.meta_path.insert(0, _Finder())
