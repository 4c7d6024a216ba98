"""Small prepared datasets, made once for all tests by the datasets' own scripts."""

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from filelock import FileLock

import models
import running
import worlds

gc.disable()  # until all is imported, see pytest_collection_finish

# How a world is written, and settings of its scripts.
WORLDS = {
    "PersonalLLM": (worlds.personalllm, {}, {}),
    "RedditTLDR": (worlds.tldr, {"workers": 12, "annotations": 40}, {"min_annotations": 20}),
    "PRISM": (worlds.prism, {"users": 16}, {}),
    "CommunityAlignment": (worlds.community, {"annotators": 10}, {"min_comparisons": 10}),
    "PersonalRewardBench": (worlds.rewardbench, {"users": 12}, {}),
}
# Runs as a user runs it, although its imports take seconds; prepare.py does so in test_hub.py and
# train_basis.py in test_torchrun.py.
OWN_PROCESS = ("RedditTLDR", "vary_fewshot")


class Dataset(NamedTuple):
    """A dataset's raw world, its prepared folder and how the scripts that made it ended."""

    source: Path
    data: Path
    outcomes: list[running.Outcome]


def pytest_collection_finish() -> None:
    """Every round of the garbage collector would look at half a million imported objects."""
    gc.freeze()
    gc.enable()


def once(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]
) -> tuple[Path, Any]:
    """A folder and what making it gave, as JSON; the first test process that needs it makes it."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, given = root / f"shared-{name}", root / f"shared-{name}.json"
    with FileLock(f"{folder}.lock"):
        if not given.exists():
            given.write_text(json.dumps(make(folder), default=str), encoding="utf-8")
    return folder, json.loads(given.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reward model."""
    return once(tmp_path_factory, "model", models.tiny_llama)[0]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Callable[[str], Dataset]:
    """A dataset by its name, prepared and embedded on first use; no test changes it."""

    def get(name: str) -> Dataset:
        folder, ends = once(tmp_path_factory, name, lambda folder: _prepare(name, folder, model))
        return Dataset(folder / "raw", folder / "data", [running.Outcome(*end) for end in ends])

    return get


def _prepare(name: str, folder: Path, model: Path) -> list[running.Outcome]:
    """Run a dataset's scripts; the raw world and what is prepared lie in the folder."""
    write, size, settings = WORLDS[name]
    source, data = write(folder / "raw", **size), folder / "data"
    embedding = {"model": model, "progress": "false"}
    settings = {"source": source, "out": data, **settings}
    if name == "PRISM":
        steps = [("prepare", settings), ("generate-prism-embeddings", {"data": data, **embedding})]
    else:
        steps = [("prepare", {**settings, **embedding})]
    return [carry_out(name, script, given) for script, given in steps]


def carry_out(name: str, script: str, given: running.Flags) -> running.Outcome:
    """Run a dataset's script, within this process or in one of its own."""
    how = running.fresh if (name, script) == OWN_PROCESS else running.invoke
    return how(f"{name}/{script}.py", given)


@contextmanager
def without_plots() -> Iterator[None]:
    """Runs within this process write tables alone: plots and pages take far longer."""
    module = "lore.experiments.report.tables"
    with mock.patch.multiple(module, write_plots=lambda *_: [], write_report=lambda *_: None):
        yield


@pytest.fixture
def no_plots() -> Iterator[None]:
    """The whole test without plots and pages."""
    with without_plots():
        yield
