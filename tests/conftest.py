"""Small prepared datasets, made once for all tests by the datasets' own scripts."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

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


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reward model."""
    return models.tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Callable[[str], Dataset]:
    """A dataset by its name, prepared and embedded on first use."""
    made: dict[str, Dataset] = {}

    def get(name: str) -> Dataset:
        if name not in made:
            made[name] = _prepare(name, tmp_path_factory.mktemp(name), model)
        return made[name]

    return get


def _prepare(name: str, folder: Path, model: Path) -> Dataset:
    write, size, settings = WORLDS[name]
    source, data = write(folder / "raw", **size), folder / "data"
    embedding = {"model": model, "progress": "false"}
    settings = {"source": source, "out": data, **settings}
    if name == "PRISM":
        steps = [("prepare", settings), ("generate-prism-embeddings", {"data": data, **embedding})]
    else:
        steps = [("prepare", {**settings, **embedding})]
    outcomes = [carry_out(name, script, given) for script, given in steps]
    return Dataset(source, data, outcomes)


def carry_out(name: str, script: str, given: running.Flags) -> running.Outcome:
    """Run a dataset's script, within this process or in one of its own."""
    how = running.fresh if (name, script) == OWN_PROCESS else running.invoke
    return how(f"{name}/{script}.py", given)


@contextmanager
def without_plots() -> Iterator[None]:
    """Runs within this process write tables alone: plots and pages take far longer."""
    with (
        mock.patch("lore.experiments.report.tables.write_plots", lambda *given: []),
        mock.patch("lore.experiments.report.tables.write_report", lambda *given: None),
    ):
        yield


@pytest.fixture
def no_plots() -> Iterator[None]:
    """The whole test without plots and pages."""
    with without_plots():
        yield
