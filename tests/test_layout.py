"""The house: what may import what, how long a module may be, what stands at the top.

    common <- preparing, embeddings, learning <- utils <- methods <- elicitation <- experiments
           <- dataset folders, tools, benchmarks
"""

import ast
import functools
import graphlib
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATASETS = {path.parent.name for path in ROOT.glob("*/prepare.py")}
FLOORS = f"""lore lore.common < lore.preparing lore.embeddings lore.learning < utils < lore.methods
             < lore.elicitation < lore.experiments < tools benchmarks {" ".join(DATASETS)}"""
FLOOR = {wing: n for n, wings in enumerate(FLOORS.split("<")) for wing in wings.split()}
TOP = DATASETS | {
    "utils.py", "requirements.txt", "requirements-dev.txt", "README.md", "LICENSE",
    "CONTRIBUTING.md", "CITATION.cff", "Makefile", "pyproject.toml", ".gitignore", ".ci",
    "lore", "tools", "benchmarks", "docs", "tests",
}  # fmt: skip
LONGEST = 700  # lines of a module
PUBLISHED = [
    "LoRe", "LoRe_regularized", "PersonalizeBatch", "run", "run_regularized",
    "run_few_shot_vary_shots", "solve", "solve_regularized", "solve_regularized_simplex",
    "solve_multi_reward", "learn_multiple", "learn_multiple_few_shot",
    "learn_multiple_few_shot_weighted", "learn_single_reward", "learn_single_reward_regularized",
    "evaluate_model", "eval_multiple", "sample_shots", "simulate_user", "simulate_population",
    "generate_population", "generate_popupulation", "create_sparse_tensor",
    "create_dataset_prism", "create_dataset_prism_shots", "torch", "np", "nn", "F",
]  # fmt: skip


# Every module of the product by the name that it is imported by
FILES = [ROOT / "utils.py", *ROOT.glob("lore/**/*.py")]
FILES += [path for name in (*DATASETS, "tools", "benchmarks") for path in ROOT.glob(f"{name}/*.py")]
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}


def wing_of(module: str) -> str:
    """The wing that a module stands in; every dataset has its own."""
    return ".".join(module.split(".")[: 2 if module.startswith("lore") else 1])


@functools.cache
def imported(module: str) -> set[str]:
    """The product's modules that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    folder = module.rpartition(".")[0]  # scripts import what stands beside them
    beside = {f"{folder}.{name}" for name in names} if not module.startswith("lore") else set()
    names = {name for name in names | beside if name in MODULES}
    packages = {name.rsplit(".", depth)[0] for name in names for depth in (1, 2)}  # run as well
    around = {package for package in packages if f"{module}.".startswith(f"{package}.")}
    return {name for name in names | packages - around if name in MODULES and name != module}


def test_every_import_runs_down_the_wings() -> None:
    pairs = [(module, other) for module in MODULES for other in imported(module)]
    wings = {pair: tuple(map(wing_of, pair)) for pair in pairs}
    assert not [p for p, (a, b) in wings.items() if a != b and FLOOR[b] >= FLOOR[a]]


def test_no_modules_import_each_other_in_a_circle() -> None:
    graphlib.TopologicalSorter({m: imported(m) for m in MODULES}).prepare()  # or a CycleError


def test_every_wing_is_known_and_no_module_is_long() -> None:
    assert {wing_of(module) for module in MODULES} == FLOOR.keys()
    lines = {m: len(path.read_text().splitlines()) for m, path in MODULES.items()}
    assert {m: n for m, n in lines.items() if n > LONGEST} == {}


def test_the_top_level_is_what_a_stranger_expects() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: what belongs to the project is not known")
    assert {name.split("/")[0] for name in listed.stdout.splitlines()} <= TOP


def test_a_star_import_of_utils_gives_the_published_names() -> None:
    names: dict[str, object] = {}
    exec("from utils import *", names)
    assert [name for name in PUBLISHED if name not in names] == []


def test_no_writer_leaves_a_temporary_file_of_its_own_where_it_is_killed() -> None:
    modules = [path.read_text(encoding="utf-8") for path in ROOT.glob("lore/**/*.py")]
    assert not any("draft: save_file(" in text for text in modules)  # safetensors' own would
