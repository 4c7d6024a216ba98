"""Settings that make no sense, and files that would run code: refused in one line, before work."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import running
from running import Outcome
from test_scripts import SCRIPTS, parser_of

TRAIN = "PRISM/train_basis.py"


def assert_refused(outcome: Outcome, *words: str) -> None:
    """Status 2 and one line on stderr, which has the words."""
    assert outcome.status == 2, outcome
    assert outcome.err.count("\n") == 1 and outcome.err.startswith("error: "), outcome.err
    assert outcome.out == ""
    for word in words:
        assert word in outcome.err


# ------------------------------------------------------------------- Code execution

TOUCH = "touch ran"  # a shell command that leaves a trace
MODULE = "from pathlib import Path\nPath('ran').touch()\nfrom torch.optim import SGD as Trap\n"
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "ran"]}}
EVAL = {"class_path": "builtins.eval", "init_args": {"source": "open('ran', 'w')"}}
SYSTEM = {"class_path": "os.system", "init_args": {"command": TOUCH}}


def asked(spec: dict) -> str:
    return f"--optimizer={json.dumps(spec)}"


ATTACKS = {
    "system": [asked(SYSTEM)],
    "system by flags": ["--optimizer", "os.system", "--optimizer.command", TOUCH],
    "Popen": [asked(POPEN)],
    "Popen without arguments": ["--optimizer", "subprocess.Popen"],
    "eval": [asked(EVAL)],
    "a class that is imported": ["--optimizer", "trap.Trap", "--optimizer.lr", "0.1"],
    "a class that is explained": ["--optimizer.help", "trap.Trap"],
    "a class in the place of LoRe": ["--lore", "trap.Trap"],
    "a class among LoRe's settings": ['--lore={"class_path": "trap.Trap"}'],
    "a class in the place of a method": ["--mlp", "trap.Trap"],
}
FILES = {
    "system": {"lore": {"optimizer": SYSTEM}},
    "Popen": {"lore": {"optimizer": POPEN}},
    "eval": {"lore": {"optimizer": EVAL}},
    "a class that is imported": {"lore": {"optimizer": "trap.Trap"}},
    "a class in the place of LoRe": {"lore": {"class_path": "trap.Trap"}},
    "LoRe as a class": {"lore": "trap.Trap"},
    "a method as a class": {"pal": {"class_path": "trap.Trap", "init_args": {}}},
    "a class in the place of a number": {"seeds": SYSTEM, "checkpoint_every": SYSTEM},
}
TAGS = {
    "apply": f"name: !!python/object/apply:os.system ['{TOUCH}']\n",
    "new": "name: !!python/object/new:trap.Trap []\n",
    "name": "lore:\n  optimizer: !!python/name:trap.Trap\n",
    "module": "name: !!python/module:trap\n",
}


@pytest.fixture
def trap(dataset, tmp_path, monkeypatch) -> Path:
    """A folder with a module that leaves a trace when it is imported; and data to train on."""
    dataset("PRISM")
    (tmp_path / "trap.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trap", raising=False)
    return tmp_path


def assert_nothing_ran(trap: Path, dataset, *words: str) -> None:
    """The words end in a refusal, and neither the command nor the module left its trace."""
    where = {"data": dataset("PRISM").data, "results": trap / "results", "ranks": 2}
    quick = {"iterations": 2, "few_shot_iterations": 2, "progress": "false"}
    outcome = running.invoke(TRAIN, where | quick, *words)
    assert not (trap / "ran").exists() and "trap" not in sys.modules
    assert_refused(outcome)
    assert not (trap / "results").exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_flag_runs_or_imports_anything(trap, dataset, attack):
    assert_nothing_ran(trap, dataset, *ATTACKS[attack])


@pytest.mark.parametrize("attack", FILES)
def test_no_config_file_runs_or_imports_anything(trap, dataset, attack):
    (trap / "config.yaml").write_text(json.dumps(FILES[attack]))  # JSON is YAML
    assert_nothing_ran(trap, dataset, "--config", "config.yaml")


@pytest.mark.parametrize("attack", TAGS)
def test_no_yaml_tag_runs_or_imports_anything(trap, dataset, attack):
    (trap / "config.yaml").write_text(TAGS[attack])
    assert_nothing_ran(trap, dataset, "--config", "config.yaml")


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_of_any_script_takes_a_class(script):
    hints = [str(getattr(action, "_typehint", "")) for action in parser_of(script)._actions]
    assert not [hint for hint in hints if "Callable" in hint or "Any" in hint or "type[" in hint]


def test_the_trap_works(trap):
    __import__("trap")
    assert (trap / "ran").exists()
    del sys.modules["trap"]
