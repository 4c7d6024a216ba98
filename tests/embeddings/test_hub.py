"""Every default source and model comes from the hub; and what can go wrong on the way."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_rewardbench2 import raw_rows

import hub as hub_module
import models
import running
import worlds
from hub import Hub
from lore.common.files import InputError
from lore.embeddings import store as embeddings
from lore.preparing import tables as preparing
from made_bases import make_basis

pytestmark = pytest.mark.slow

MODEL = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"  # the scripts' default
BENCH = "allenai/reward-bench-2"
SOURCES = {  # the scripts' defaults
    "PersonalLLM": "namkoong-lab/PersonalLLM",
    "RedditTLDR": "openai/summarize_from_feedback",
    "PRISM": "HannahRoseKirk/prism-alignment",
    "CommunityAlignment": "facebook/community-alignment-dataset",
    "PersonalRewardBench": "MichaelR207/prism_personalized_0125",
}
REVISIONS = {SOURCES["RedditTLDR"]: "refs/convert/parquet"}
PATHS = {"RedditTLDR": "comparisons/{}/0000"}  # of a split's table
PUSHED = ("ann/rewards", "ann/rewards", "somebody/else", "no name at all", "ann/more")
TABLES = ("comparisons.parquet", "conversations.parquet", "scores.safetensors", "prepare.json")
CARD = """---
configs:
- config_name: survey
  data_files: survey.jsonl
- config_name: conversations
  data_files: conversations.jsonl
---
"""
Jobs = dict[str, tuple[str, running.Flags]]


class Hubbed(NamedTuple):
    """What a hub offered, and how the scripts that were run on it ended."""

    hub: Hub
    folder: Path
    online: dict[str, running.Outcome]
    offline: dict[str, running.Outcome]
    between: int  # requests before the hub could no longer be reached


def publish(hub: Hub, folder: Path) -> None:
    """What the scripts ask for by default, in the layouts of the repositories, and repositories
    with something wrong."""
    raw = folder / "raw"
    worlds.personalllm(raw / "PersonalLLM", train=6, test=3)
    worlds.tldr(raw / "RedditTLDR", workers=4, annotations=50)
    worlds.prism(folder / SOURCES["PRISM"])
    shutil.copytree(folder / SOURCES["PRISM"], raw / "PRISM")
    (folder / SOURCES["PRISM"] / "README.md").write_text(CARD)
    worlds.community(raw / "CommunityAlignment", annotators=4, conversations=20)
    worlds.rewardbench(raw / "PersonalRewardBench")
    worlds.write(folder / BENCH / "data/test-00000-of-00001.parquet", raw_rows())
    for dataset in SOURCES.keys() - {"PRISM"}:
        for table in (raw / dataset).iterdir():
            path = PATHS.get(dataset, "data/{}-00000-of-00001").format(table.name.split(".")[0])
            worlds.write(folder / SOURCES[dataset] / f"{path}.parquet", worlds.read(table))
    for name in (*SOURCES.values(), BENCH):
        hub.add("datasets", name, folder / name, REVISIONS.get(name, "main"))
    hub.add("models", MODEL, models.tiny_llama(folder / "model", vocab_size=200_000))  # 26 MB
    hub.add("models", MODEL, models.tiny_llama(folder / "older", seed=1), "v0.1")
    hub.add("models", "somebody/flaky", models.tiny_llama(folder / "flaky", seed=2))
    hub.add("models", "somebody/gated", folder / "flaky")
    hub.add("datasets", "somebody/flaky-data", worlds.own(folder / "own", users=4, count=10))
    hub.add("datasets", "somebody/gated-data", folder / "own")
    hub.gated = {"somebody/gated", "somebody/gated-data"}
    # The client tries six times to go on; the seventh request comes from the next run.
    hub.cut = {"somebody/flaky/model.safetensors": 6, "somebody/flaky-data/mine.jsonl": 6}
    hub.cut[f"{MODEL}/model.safetensors"] = 1
    make_basis(folder, folder / "flaky")
    hub.add("models", "somebody/else", folder / "own")
    hub.full = {"ann/more"}


def jobs(out: Path) -> Jobs:
    """Scripts with their default sources and models, then with mistakes; name -> job."""

    def prepare(dataset: str, name: str, **settings: str) -> tuple[str, running.Flags]:
        return f"{dataset}/prepare.py", {"out": out / name, **settings}

    own = partial(prepare, "OwnData", source="somebody/flaky-data")
    llm = partial(prepare, "PersonalLLM")
    results = {"data": out / "PersonalRewardBench", "results": out / "results", "iterations": 50}
    export = {"basis": out.parent / "basis.safetensors", "users": ["ann"]}
    return {
        **{name: prepare(name, name) for name in SOURCES},  # the first one's log is seen
        "PRISM embeddings": ("PRISM/generate-prism-embeddings.py", {"data": out / "PRISM"}),
        "personal results": ("PersonalRewardBench/train_basis.py", results | {"ranks": 2}),
        "RewardBench 2": ("PRISM/eval_rb2.py",
                          {"results": out / "rb2", "embeddings": out / "rb2" / "embeddings"}),
        "pinned": llm("pinned", revision="v0.1"),
        "no such revision": llm("none", revision="v9"),
        "no such model": llm("none", model="somebody/typo"),
        "gated model": llm("none", model="somebody/gated"),
        "cut data": own("none"),
        "cut model": own("none", model="somebody/flaky"),
        "resumed": own("own", model="somebody/flaky"),
        "no such dataset": own("none", source="somebody/typo"),
        "gated dataset": own("none", source="somebody/gated-data"),
        **{f"push {i}": ("tools/export.py", {**export, "out": out / f"export-{i}", "push": name})
           for i, name in enumerate(PUSHED)},
    }  # fmt: skip


def client(jobs: Jobs, file: Path, env: dict[str, str]) -> dict[str, running.Outcome]:
    """Run the jobs in one process of their own."""
    script = Path(hub_module.__file__).with_name("hub_client.py")
    file.write_text(json.dumps(list(jobs.values()), default=str), encoding="utf-8")
    command = [sys.executable, str(script), str(file)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    return {name: running.Outcome(*each) for name, each in zip(jobs, found, strict=True)}


@pytest.fixture(scope="module")
def hubbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hubbed]:
    """Everything is run once: with the hub, and again with its cache alone."""
    folder = tmp_path_factory.mktemp("hub")
    with hub_module.serve() as hub:
        publish(hub, folder)
        env = hub.env(folder / "home", HF_TOKEN="hf_made")
        online = client(jobs(folder / "out"), folder / "jobs.json", env)
        between = len(hub.requests)
        wanted = ("PersonalLLM", "RedditTLDR", "no such model", "no such dataset")
        again = {name: jobs(folder / "again")[name] for name in wanted}
        offline = client(again, folder / "jobs.json", env | {"HF_HUB_OFFLINE": "1"})
        yield Hubbed(hub, folder, online, offline, between)


def store(hubbed: Hubbed, name: str) -> embeddings.Store:
    """What a job, which went well, embedded."""
    assert hubbed.online[name].status == 0, hubbed.online[name].err
    return embeddings.Store(hubbed.folder / "out" / name / "embeddings")


@pytest.mark.parametrize("name", SOURCES)
def test_default_sources_give_what_local_files_give(hubbed, tmp_path, name):
    embedded, settings = store(hubbed, name), {} if name == "PRISM" else {"embed": False}
    info = worlds.prepare(name, hubbed.folder / "raw" / name, tmp_path, **settings)
    made = preparing.read_info(hubbed.folder / "out" / name)
    assert made["data_sha256"] == info["data_sha256"]
    embedded.check(preparing.read_info(tmp_path)["conversations_sha256"])
    assert embedded.manifest["model"] == MODEL and embedded.manifest["weights_sha256"] is None
    assert embedded.manifest["revision"] == hubbed.hub.held["models", MODEL]["main"].commit


def test_what_is_made_of_the_hubs_benchmarks(hubbed):
    rewards, results = hubbed.online["RewardBench 2"], hubbed.online["personal results"]
    assert rewards.status == results.status == 0, rewards.err + results.err
    assert "Factuality" in rewards.out
    printed = running.table(results.out)
    assert {"BT", "Ridge BT", "LoRe, chosen", "Mixed logit"} <= set(printed)
    assert set(printed["BT"]) == {"seen", "train"}


def test_a_revision_is_pinned(hubbed):
    pinned, latest = (store(hubbed, name) for name in ("pinned", "PersonalLLM"))
    assert pinned.manifest["revision"] == hubbed.hub.held["models", MODEL]["v0.1"].commit
    some = torch.arange(3)
    assert not pinned.rows(some).allclose(latest.rows(some))


def test_what_is_asked_for_and_that_requests_are_not_logged(hubbed):
    asked = hubbed.hub.requests
    assert any("/summarize_from_feedback" in a and "refs%2Fconvert%2Fparquet" in a for a in asked)
    commit = hubbed.hub.held["models", MODEL]["main"].commit
    file = f"/{MODEL}/resolve/{commit}/model.safetensors"
    whole, rest = [line for line in asked if line.startswith("GET") and file in line]
    assert "bytes=" not in whole and "bytes=10485760-" in rest  # where it was cut; chunks are whole
    said = hubbed.online["PersonalLLM"].err  # the first job's, for later ones find the log set up
    assert "HTTP Request" not in said and "embedding method" in said
    assert any("somebody/typo" in line for line in asked[: hubbed.between])
    wrong = hubbed.online["no such model"]  # is noticed before the data are downloaded
    assert "reading" not in wrong.err and "train prompts" not in wrong.out


@pytest.mark.parametrize("name", ["PersonalLLM", "RedditTLDR"])
def test_a_warm_cache_is_enough_without_the_hub(hubbed, name):
    assert hubbed.offline[name].status == 0, hubbed.offline[name].err
    one, other = (hubbed.folder / folder / name for folder in ("out", "again"))
    files = sorted((one / "embeddings").glob("*.safetensors"))
    assert files
    for file in files + [one / table for table in TABLES if (one / table).exists()]:
        assert file.read_bytes() == (other / file.relative_to(one)).read_bytes()
    assert len(hubbed.hub.requests) == hubbed.between  # nothing was asked for


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("no such revision", [MODEL, "v9"]),
        ("no such model", ["somebody/typo"]),
        ("gated model", ["somebody/gated", "gated", "hf auth login"]),
        ("no such dataset", ["--source somebody/typo", "give a file"]),
        ("gated dataset", ["--source somebody/gated-data", "gated", "hf auth login"]),
        ("cut data", ["--source somebody/flaky-data", "peer closed connection", "run it again"]),
        ("cut model", ["somebody/flaky", "peer closed connection", "run it again"]),
        *((f"push {i}", [f"error: --push {PUSHED[i]}: "]) for i in range(1, len(PUSHED))),
        ("offline: no such model", ["somebody/"]),
        ("offline: no such dataset", ["somebody/"]),
    ],
)
def test_what_cannot_be_had_is_one_clear_line(hubbed, job, words):
    name = job.removeprefix("offline: ")
    outcome = (hubbed.online if name == job else hubbed.offline)[name]
    assert outcome.status == 2, outcome
    *lines, last = outcome.err.splitlines()
    assert last.startswith("error: ") and "Traceback" not in outcome.err
    assert not any(line.startswith("error: ") for line in lines)
    assert all(word in last for word in words), last


def test_nothing_half_written_is_believed(hubbed):
    """The runs after a cut one find its leavings in the cache."""
    made = hubbed.folder / "out" / "own"
    assert preparing.read_info(made)["counts"]["comparisons"] == 40
    talks, local = preparing.read_conversations(made), str(hubbed.folder / "flaky")
    plain = embeddings.embed(talks, hubbed.folder / "plain", model=local, progress=False)
    some, resumed = torch.arange(len(talks)), embeddings.Store(made / "embeddings")
    assert len(talks) == 20 and plain.rows(some).equal(resumed.rows(some))
    with pytest.raises(InputError, match="no finished embeddings"):
        embeddings.Store(hubbed.folder / "out" / "none" / "embeddings")


def test_an_export_is_pushed_to_a_new_private_repository_and_to_no_other(hubbed):
    hub, outs = hubbed.hub, [hubbed.folder / "out" / f"export-{i}" for i in range(len(PUSHED))]
    done = hubbed.online["push 0"]
    assert done.status == 0 and "uploaded to ann/rewards" in done.out, done.err
    held = hub.held["models", "ann/rewards"]["main"].files
    ours = {path.name: path.read_bytes() for path in outs[0].iterdir()}
    assert {name: held[name] for name in ours} == ours
    assert hub.private == {"ann/rewards", "ann/more"}
    assert [out.exists() for out in outs] == [True, False, False, False, True]
    assert hub.held["models", "somebody/else"]["main"].files.keys() == {"mine.jsonl"}
    assert (outs[-1] / "config.json").exists()  # the last one had no room
