"""Rewards over HTTP: many clients at once, and what is refused."""

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import Tensor

import models
import running
from lore.common.files import require
from lore.elicitation.scoring import Scorer
from lore.embeddings.reward_model import render_text
from made_bases import CHATS, make_basis, scorer_of
from tools import serve

USERS = ["ann", "new"]


class Served(NamedTuple):
    """A server, and the users' rewards of what it may be asked, computed beforehand."""

    port: int
    scorer: Scorer
    passes: list[int]
    basis: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of a basis with users ann, 17 and new, whose passes are counted."""
    folder = tmp_path_factory.mktemp("served")
    basis = make_basis(folder, models.tiny_qwen(folder / "model"))
    scorer = scorer_of(basis)
    passes, embed = [], scorer.embed
    scorer.embed = lambda texts: (passes.append(len(texts)), embed(texts))[1]
    server = serve.start(scorer, "127.0.0.1", 0, max_queries=100)
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    yield Served(server.server_port, scorer, passes, basis)
    server.shutdown()
    server.server_close()


def post(port: int, body: Any, path: str = "/get_reward") -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        assert error.headers["Content-Type"].startswith("application/json")
        return error.code, json.load(error)


def test_sixty_four_clients_at_once_lose_nothing_and_mix_no_users(served):
    texts = [f"answer {i} {'very ' * (i % 5)}good" for i in range(128)]
    chats = [[CHATS[0][0], {"role": "assistant", "content": text}] for text in texts]
    rows, users = served.scorer.embed(chats), ("ann", "17", "new", None)
    expected = {user: served.scorer.score(rows, user)[0] for user in users}
    gaps = [(expected["ann"] - expected[user]).abs().max() for user in users[1:]]
    assert min(gaps) > 1e-3  # or else a mixture would go unnoticed
    served.passes.clear()
    together = threading.Barrier(64)

    def ask(client: int) -> None:
        own, user = list(range(client, 128, 64)), users[client % 4]
        together.wait()
        for _ in range(2):
            status, found = post(served.port, {"query": [chats[i] for i in own], "user": user})
            wanted = pytest.approx(expected[user][own].tolist(), abs=1e-5, rel=1e-4)
            assert status == 200 and found["rewards"] == wanted

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(ask, range(64))) == [None] * 64
    assert sum(served.passes) == 2 * 128 and len(served.passes) < 128  # some went together


def test_texts_users_of_each_query_and_openrlhfs_labels(served):
    texts = [render_text(served.scorer.tokenizer, chat) for chat in CHATS[:2]]
    rows = served.scorer.embed(CHATS[:2])
    mine = [float(served.scorer.score(rows[i : i + 1], user)[0]) for i, user in enumerate(USERS)]
    average = served.scorer.score(rows)[0].tolist()
    cases = [({"user": USERS}, mine), ({"labels": USERS, "prompts": ["", ""]}, mine)]
    cases += [(given, average) for given in ({}, {"labels": ["", ""]}, {"user": None})]
    for query in (CHATS[:2], texts, [text.rstrip() for text in texts]):
        for given, wanted in cases:
            status, found = post(served.port, {"query": query, **given})
            assert status == 200 and found["rewards"] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        *((body, 400, "body is not JSON") for body in (b"no JSON", b"[" * 100_000, b"\xff\xfe")),
        *(({"query": query}, 400, '"query" must be a list of texts or of lists of role and')
          for query in (None, [], [5], ["  "], [[]], [[{"role": "user"}]])),
        ({"query": ["hi"] * 101}, 400, "101 entries, more than --max-queries"),
        ({"query": ["hi"], "user": "bob"}, 400, "user bob is not in the basis, which has 3 users"),
        ({"query": ["hi"], "user": ["ann", "ann"]}, 400, "one for each of the 1 queries"),
        ({"query": ["hi"], "user": [["ann"]]}, 400, "one for each of the 1 queries"),
        (b"x" * ((16 << 20) + 1), 413, "more than 16777216 bytes"),
    ],
)
def test_a_bad_request_is_one_json_error(served, body, status, message):
    found = post(served.port, body)
    assert found[0] == status and list(found[1]) == ["error"], found
    assert message in found[1]["error"] and "\n" not in found[1]["error"]
    assert "--list-users" not in found[1]["error"]  # a flag that a client cannot give
    assert post(served.port, {"query": [CHATS[0]], "user": "ann"})[0] == 200  # it goes on


def test_nothing_is_read_without_a_length_and_other_paths_are_not_there(served):
    for header in ("Transfer-Encoding: chunked", "User-Agent: nobody"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as client:
            client.sendall(f"POST /get_reward HTTP/1.1\r\nHost: a\r\n{header}\r\n\r\n".encode())
            head, _, body = client.makefile("rb").read().partition(b"\r\n\r\n")
        assert b" 411 " in head and "Content-Length" in json.loads(body)["error"]
    assert post(served.port, {}, "/elsewhere")[0] == 404


def test_a_request_that_the_template_refuses_spoils_no_other_of_its_batch(served, monkeypatch):
    embed = served.scorer.embed

    def refusing(texts: list[Any]) -> Tensor:
        require("!" not in texts, "the chat template cannot write this")
        return embed(texts)

    monkeypatch.setattr(served.scorer, "embed", refusing)
    batch = [([query], ["ann"], Future()) for query in "abc!defg"]
    serve.Batches(served.scorer)._answer(batch)
    failed = [rewards.exception(timeout=60) for *_, rewards in batch]
    assert failed[:3] == failed[4:7] == [None] * 3 and "cannot write this" in str(failed[3])


@pytest.mark.slow
def test_the_command_serves_until_it_is_ended_unless_the_port_is_taken(served):
    done = running.invoke("tools/serve.py", {"basis": served.basis, "port": served.port})
    assert done.status == 2 and "cannot be had" in done.err and done.err.count("error: ") == 1
    process = running.start("tools/serve.py", {"basis": served.basis, "port": 0})
    line = next(line for line in process.stderr if "/get_reward" in line)
    port = int(line.split(":")[2].split("/")[0])
    try:
        assert post(port, {"query": [CHATS[0]], "user": "ann"})[0] == 200
    finally:
        process.terminate()
    assert running.end(process).status in (0, 143)
