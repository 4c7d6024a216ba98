"""Settings that make no sense, and files that would run code: refused in one line, before work."""

import functools
import importlib
import json
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from test_scripts import SCRIPTS

import running
from lore.common.files import InputError
from lore.common.flags import Flags
from lore.embeddings.reward_model import ModelChoice
from running import Outcome

TRAIN = "PRISM/train_basis.py"


def assert_refused(outcome: Outcome, *words: str) -> None:
    """Status 2 and one line on stderr, which has the words."""
    assert outcome.status == 2, outcome
    assert outcome.err.count("\n") == 1 and outcome.err.startswith("error: "), outcome.err
    assert outcome.out == "" and [word for word in words if word not in outcome.err] == []


# What ended in a traceback, or was taken without a word, and the flag that the line must name.
REFUSED = {
    TRAIN: """
        --iterations 0 | --iterations 1.5 | --iterations true | --iterations 100000000000000000000
        --iterations 3 4 | --few-shot-iterations 0 | --learning-rate 0
        --few-shot-learning-rate inf | --alpha [.inf] | --alpha -1 | --alpha [] | --alpha 0 0.0
        --shrinkage 1 nan
        --ranks 2 2 | --ranks [] | --ranks 1 x | --ranks 1.5 | --ranks | --seeds 0 0 0 | --seeds []
        --seeds 1180591620717411303424 | --seeds true | --checkpoint-every x | --methods []
        --methods lore lore | --methods lore2 | --reference heads | --estimator sgd | --stream maybe
        --results= | --data= | --mlp.ranks 0 | --mlp.hidden 0 | --pal.layers 0 | --pal.layers 2000
        --pal.width 100000 | --vpl.latent 1000000 | --vpl.latent -2 | --vpl.epochs -1
        --rbd.rank 100000 | --mixed-logit.directions 0 | --mixed-logit.l-mu -1
        --ridge-bt.strength 0 | --pebs.strengths 1 1 | --pref.strengths nan
        --rbd.strengths [[1,0]] | --rbd.strengths 1 2 | --mrm.inner-steps 0
        --optimizer torch.optim.SparseAdam | --optimizer torch.optim.Optimizer
        --optimizer torch.optim.AdamW --optimizer.lr -1 | --optimizer torch.optim.Adagrad2
        --optimizer torch.optim.SGD --optimizer.lr .nan | --optimizer.lr 0.1 | --optimizer.lr
        --optimizer torch.optim.SGD --optimizer.momentum [1,"x"] | --optimizer torch
        --name ../../../evil | --name /tmp/evil | --name . | --name .. | --name= | --name a/../b
        --name a\\b | --run ../evil | --run .hidden
        """,
    "PRISM/vary_fewshot.py": "--shots [] | --shots 1 1 | --shots 0.5 | --trials 0",
    "PersonalLLM/train_basis.py": """
        --users 0 | --unseen-users 0 | --pairs-per-user 0 | --few-shot-pairs -1
        --dirichlet-alpha 0
        """,
    "PersonalLLM/vary_fewshot.py": "--users 0 | --shots [] | --trials 0",
    "RedditTLDR/train_basis.py": "--seen-fraction 0 | --seen-fraction 1 | --few-shot-pairs 0",
    "RedditTLDR/prepare.py": """
        --min-annotations 0 | --source= | --out= | --device abacus | --shard 0/3 | --max-length 0
        --shard-size 0 | --dtype float7 | --pool layer:0 | --pool first
        """,
    "PRISM/prepare.py": "--seen-fraction 1.5 | --rejected some",
    "PersonalLLM/demo_world.py": "--train-prompts 0 | --head-prompts 0",
    "PRISM/eval_rb2.py": "--top-k 0 | --batch-size 0",
    "tools/score.py": "--max-length 0 | --dtype float7",
    "tools/serve.py": "--max-queries 0",
    "tools/ukpconvarg.py": "--min-judgments 0 | --seed x",
}
CASES = []
for script, lines in REFUSED.items():
    CASES += [(script, words) for words in re.split(r"\s*[|\n]\s*", lines.strip())]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "words"), CASES)
def test_a_senseless_value_is_refused_by_its_flag(tmp_path, monkeypatch, script, words):
    monkeypatch.chdir(tmp_path)
    outcome = running.invoke(script, {}, *words.split())
    flag = words.split()[0].split("=")[0].removesuffix(".lr").replace("--run", "--name")
    assert_refused(outcome, f"error: {flag}")
    assert not list(tmp_path.iterdir())


@functools.cache
def flags_of(script: str) -> Flags:
    """The flags that a script takes."""
    with (
        mock.patch.object(Flags, "read", autospec=True, side_effect=EOFError) as read,
        pytest.raises(EOFError),
    ):
        running.invoke(script, {})
    return read.call_args.args[0]


def numbers(hint: object) -> set[type]:
    """The types of numbers within a type."""
    if isinstance(hint, type) and issubclass(hint, int | float) and hint is not bool:
        return {hint}
    return set().union(*map(numbers, typing.get_args(hint)))


def filled(hint: object, value: str) -> str:
    """A value of a flag in the form that its type has, each number being the value."""
    if typing.get_origin(hint) is not tuple:
        return value
    parts = (filled(part, value) for part in typing.get_args(hint) if part is not Ellipsis)
    return f"[{','.join(parts)}]"


@pytest.mark.slow
def test_every_number_of_every_script_has_a_range():
    tried = set()
    for script in SCRIPTS:
        flags = flags_of(script)
        for name, hint in flags.types.items():
            for kind in numbers(hint) if (name, hint) not in tried else ():
                assert kind not in (int, float), (script, name)
                for value in ("nan", f"-{2**100}", f"{2**100}"):
                    with pytest.raises(InputError) as error:
                        flags.read([f"--{name}", filled(hint, value)])
                    assert str(error.value).startswith(flags.flag(name))
                    assert kind.__name__ in str(error.value) and "\n" not in str(error.value)
            tried.add((name, hint))
    assert len(tried) > 100


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_each_flag_and_says_what_a_number_may_be(script):
    flags = flags_of(script)
    assert all(action.help for action in flags.actions.values())
    grouped = {name for name in flags.types if name.partition(".")[0] in flags.short}
    twice = {name for name in grouped if "." in flags.flag(name)}  # the script has that flag too
    assert twice <= {"columns.split", "columns.user"}
    text = " ".join(" ".join(map(flags.help, ["", *flags.groups])).split())
    kinds = set().union(*map(numbers, flags.types.values()))
    assert [kind.__name__ for kind in kinds if kind.__name__ not in text] == []


WORDS = {
    "--rank 3": "there is no flag --rank; is it --ranks?",
    "--lore.rank 3": "there is no flag --lore.rank; is it --",
    "--iter=3": "there is no flag --iter; is it --iterations?",
    "--optimizers x": "there is no flag --optimizers; is it --optimizer?",
    "--xyzzy": "there is no flag --xyzzy; see --help",
    "--optimizer subprocess.Popen": "Popen: is not a subclass of torch.optim.Optimizer",
    "stray --seeds 1": "stray: no flag stands before it",
}


@pytest.mark.parametrize("words", WORDS)
def test_flags_are_not_abbreviated(words):
    assert_refused(running.invoke(TRAIN, {}, *words.split()), WORDS[words])


def test_several_groups_flags_may_go_without_their_names():
    words = "--basis b --choices c --candidates d --chosen x --model m"
    read = flags_of("tools/rank_responses.py").read(words.split())
    assert read["columns"].chosen == "x" and read["lm"] == ModelChoice("m")
    shown = running.invoke("tools/rank_responses.py", {}, "--help").out
    assert " --chosen " in shown and " --any-model " in shown and "--lm." not in shown


CONFIGS = {
    "settings: 3": "there is no flag --settings",
    "rank: 3": "there is no flag --rank; is it --ranks?",
    "lore: {rank: 3}": "there is no flag --lore.rank",
    "lore: 3": "lore has settings, not a value",
    "lore: {alpha: [.inf]}": "error: --alpha [Infinity]: a number from 0 to 1e12 is expected",
    "seeds: [0, 0]": "error: --seeds: 0 stands there twice",
    "seeds: []": "error: --seeds: at least one value is needed",
    "seeds: {a: 1}": "error: --seeds",
    "[1, 2]": "settings with names are expected",
    "a: b: c": "not readable as YAML",
    "[" * 500: "not readable as YAML",
    "name: ../evil": "error: --name ../evil: a name is expected, not a path",
}


def test_a_config_file_is_held_to_the_same(tmp_path):
    for number, text in enumerate(CONFIGS):
        (tmp_path / f"{number}").write_text(text)
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    others = {"bytes": "YAML", "nothing": "No such file", ".": "Is a directory"}
    for file, said in (dict(enumerate(CONFIGS.values())) | others).items():
        assert_refused(running.invoke(TRAIN, {"config": tmp_path / f"{file}"}), said)


def test_what_the_documents_say_of_torchrun_is_a_command():
    """Every line with torchrun in README and docs keeps its flags from torchrun."""
    from torch.distributed.run import get_args_parser

    pages = [running.ROOT / "README.md", *(running.ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    for line in re.findall(r"^ *torchrun .*|`torchrun [^`]*`", text, re.M):
        words = line.strip("` ").replace("N", "2").split()[1:]
        read = get_args_parser().parse_args([*words, "--name", "a"])
        assert read.training_script.endswith(".py") and "--name" in read.training_script_args


def test_what_the_page_on_clusters_says_are_flags():
    """Every flag after a script's name in its batch files is one of the script in that folder."""
    text = (running.ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    assert len(blocks) == 3
    for block in blocks:
        folder = re.search(r"^cd ~/LoRe/(\w+)", block, re.M)[1]
        script, words = re.search(r"^(?:python|torchrun .*?) ?(\S+\.py) (.*)", block, re.M).groups()
        words = words.replace("$SLURM_ARRAY_TASK_ID", "1").split()
        assert len(words) > 4
        flags_of(f"{folder}/{script}").read(words)


@pytest.mark.parametrize("script", ["train_basis", "vary_fewshot"])
@pytest.mark.parametrize("name", ["RedditTLDR", "PersonalLLM", "CommunityAlignment", "OwnData"])
def test_another_datasets_script_names_the_right_folder(dataset, name, script):
    outcome = running.invoke(f"{name}/{script}.py", {"data": dataset("PRISM").data})
    assert_refused(outcome, f"holds PRISM, not {name}: use the scripts in the folder PRISM")


def test_a_datasets_name_is_no_path(tmp_path):
    (tmp_path / "prepare.json").write_text(json.dumps({"dataset": "../../x", "files": {}}))
    assert_refused(running.invoke(TRAIN, {"data": tmp_path}), "prepare.json")


TOUCH = "touch ran"  # a shell command that leaves a trace
MODULE = "from pathlib import Path\nPath('ran').touch()\nfrom torch.optim import SGD as Trap\n"
CALLS = [
    {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "ran"]}},
    {"class_path": "builtins.eval", "init_args": {"source": "open('ran', 'w')"}},
    {"class_path": "os.system", "init_args": {"command": TOUCH}},
]
WORDS_GIVEN = (
    "--optimizer subprocess.Popen | --optimizer trap.Trap --optimizer.lr 0.1 | --mlp trap.Trap | "
    '--optimizer.help trap.Trap | --lore trap.Trap | --lore={"class_path":"trap.Trap"}'
)
GIVEN = [  # words of a command line, or what stands in a config file
    *([f"--optimizer={json.dumps(call)}"] for call in CALLS),
    ["--optimizer", "os.system", "--optimizer.command", TOUCH],
    *map(str.split, WORDS_GIVEN.split(" | ")),
    *(json.dumps({"lore": {"optimizer": call}}) for call in CALLS),  # JSON is YAML
    "lore: {optimizer: trap.Trap}",
    "lore: {class_path: trap.Trap}",
    "lore: trap.Trap",
    "pal: {class_path: trap.Trap, init_args: {}}",
    json.dumps({"seeds": CALLS[2], "checkpoint_every": CALLS[2]}),
    f"name: !!python/object/apply:os.system ['{TOUCH}']",
    "name: !!python/object/new:trap.Trap []",
    "lore: {optimizer: !!python/name:trap.Trap }",
    "name: !!python/module:trap",
]


@pytest.fixture
def trap(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with a module that leaves a trace when it is imported."""
    (tmp_path / "trap.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("trap", None)


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_nothing_that_is_given_is_run_or_imported(dataset, trap, given):
    (trap / "config.yaml").write_text(given if isinstance(given, str) else "")
    words = given if isinstance(given, list) else []
    where = {"data": dataset("PRISM").data, "results": trap / "results", "config": "config.yaml"}
    outcome = running.invoke(TRAIN, {**where, "ranks": 2, "iterations": 2}, *words)
    assert not (trap / "ran").exists() and "trap" not in sys.modules
    assert_refused(outcome)
    assert not (trap / "results").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_of_any_script_takes_a_class(script):
    hints = [getattr(action, "_typehint", "") for action in flags_of(script).parser._actions]
    assert not re.search(r"Callable|Any|type\[", str(hints))


def test_the_trap_works(trap):
    importlib.import_module("trap")
    assert (trap / "ran").exists()
