"""Killed at any moment, the same command ends where an undisturbed run ends."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import killed
import running
from people import repeats, saved


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., Any]]:
    """Give a job to a process that kills and resumes trainings; its answer."""
    process = running.start("tests/helpers/killed.py", {}, stderr=None)  # nobody reads it meanwhile

    def answer(**job: Any) -> Any:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield answer
    process.kill()  # and its children, where a test has given up
    process.communicate()


def assert_same(run: Path, whole: Path, moment: str) -> None:
    """The same files, results, and learned tensors."""
    assert sorted(f.name for f in run.iterdir()) == sorted(f.name for f in whole.iterdir()), moment
    assert repeats(run) == repeats(whole), moment
    assert saved(run)["settings"] == saved(whole)["settings"]
    for file in run.glob("*.safetensors"):
        found, expected = load_file(file), load_file(whole / file.name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found), (moment, file)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", killed.CASES)
def test_killed_at_any_moment_it_ends_as_if_undisturbed(ask, tmp_path, case, processes):
    answer = ask(case=case, processes=processes, folder=str(tmp_path))
    assert "moments" in answer, answer["error"]
    whole = tmp_path / "whole/planted/here"
    assert not [*whole.glob("state-*"), *whole.glob("*.part")]
    assert len(set(answer["moments"])) == killed.MOMENTS
    for number, moment in enumerate(answer["moments"]):
        assert_same(tmp_path / f"{number}" / "planted/here", whole, moment)
