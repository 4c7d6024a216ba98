"""A run's folder: settings before the work starts, results after every method of every repeat."""

import importlib.metadata
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lore.common.files import InputError, read_json, require, write_text
from lore.experiments.results import read_written, write_results

PACKAGES = ("torch", "numpy", "pandas", "transformers", "datasets", "scipy")


@dataclass
class Run:
    """Folder of a run, the settings that its methods share, and what is finished."""

    folder: Path
    settings: dict[str, Any]
    repeats: dict[int, dict[str, Any]]  # by seed, as results.json has them

    @classmethod
    def start(cls, folder: Path, settings: Mapping[str, Any]) -> "Run":
        """Go on with what is in a folder, drafts aside; nothing is written yet. InputError if it
        holds other settings, damaged results, or files that no run wrote."""
        settings = plain(settings)
        found, begun = read_written(folder), read_json(folder / "settings.json")
        empty = not folder.is_dir() or all(file.suffix == ".part" for file in folder.iterdir())
        require(found or begun or empty, f"{folder} holds files that no run wrote: choose another "
                "--name, or move them")  # fmt: skip
        # Either may have been removed, or copied from another run
        for kept in (kept for kept in (found, begun) if kept is not None):
            old = kept.get("settings") if isinstance(kept, dict) else None
            require(isinstance(old, dict), f"{folder}: settings.json is damaged; remove it")
            apart = differences(old, settings)
            why = f"{folder}: holds a run with other settings ({apart}); choose another --name"
            require(not apart, why)
        done = (found or {}).get("seeds") or []
        return cls(folder, settings, {repeat["seed"]: repeat for repeat in done})

    def begin(self) -> None:
        """Make the folder with its settings, once nothing is left that could be refused."""
        path = self.folder / "settings.json"
        if not path.exists():
            found = {package: importlib.metadata.version(package) for package in PACKAGES}
            versions = {"python": sys.version.split()[0], **found}
            text = {"settings": self.settings, "command": sys.argv, "versions": versions}
            write_text(path, json.dumps(text, indent=2))

    def missing(self, seeds: Sequence[int], methods: Mapping[str, Any]) -> dict[int, list[str]]:
        """Seed -> methods that are not finished; InputError if one was fitted with other settings
        than those in ``methods``."""
        missing: dict[int, list[str]] = {}
        for seed in seeds:
            done = self.repeats.get(seed, {"methods": {}})["methods"]
            for name, method in methods.items():
                if name not in done:
                    missing.setdefault(seed, []).append(name)
                elif (old := done[name].get("settings")) != (new := plain(method)):
                    why = f"{name} was fitted with other settings ({differences(old, new)})"
                    raise InputError(f"{self.folder}: {why}; choose another --name")
        return missing

    def add(
        self, seed: int, about: Mapping[str, Any], name: str, method: Mapping[str, Any],
        order: Sequence[str],
    ) -> None:  # fmt: skip
        """Keep a finished method of a repeat: results.json is written again, whole or not at all,
        with its methods in the ``order`` given. InputError for a figure that is NaN or infinite.

        ``about`` has the repeat's users and comparisons, ``method`` its settings, fits, records.
        """
        drawn = [fit.get(k) for fit in method["fits"] for k in ("losses", "spectrum", "weights")]
        try:  # elsewhere infinity is a strength: that of what a fit goes without
            json.dumps([method["records"], drawn], allow_nan=False)
        except ValueError:
            why = "its figures hold NaN or infinity, so that nothing of it is kept"
            todo = "fit it with other settings, such as a lower learning rate"
            raise InputError(f"{name}, seed {seed}: {why}; {todo}") from None
        repeat = self.repeats.setdefault(seed, {"seed": seed, **about, "methods": {}})
        done = {**repeat["methods"], name: {**method, "settings": plain(method["settings"])}}
        repeat["methods"] = {m: done[m] for m in dict.fromkeys([*order, *done]) if m in done}
        kept = read_json(self.folder / "settings.json")
        write_results(self.folder, {**kept, "seeds": list(self.repeats.values())})

    def state(self, seed: int, name: str) -> Path:
        """Where the state of a method's training is kept, with a suffix."""
        return self.folder / f"state-seed{seed}-{name}"

    def forget(self, *patterns: str) -> None:
        """Remove files of the folder by their names."""
        for file in (file for pattern in patterns for file in self.folder.glob(pattern)):
            file.unlink(missing_ok=True)


def plain(settings: Any) -> Any:
    """Settings as JSON values; a dataclass as its fields, anything else unknown as its text, of
    which a function's address, another one in every process, is left out."""

    def fallback(value: Any) -> Any:
        fields = getattr(value, "__dataclass_fields__", None)
        text = re.sub(r" at 0x[0-9a-f]+", "", str(value))
        return {k: getattr(value, k) for k in fields} if fields else text

    return json.loads(json.dumps(settings, default=fallback))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """Names of the settings that differ."""
    apart = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    pairs = [(prefix + key, old.get(key), new.get(key)) for key in apart]
    return ", ".join(
        differences(a, b, f"{name}.") if isinstance(a, dict) and isinstance(b, dict) else name
        for name, a, b in pairs
    )
