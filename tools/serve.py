"""Rewards of a file's users over HTTP, as OpenRLHF's --remote_rm_url asks for them.

    python tools/serve.py --basis results/PRISM/<run>/mixed_logit.safetensors
    curl http://127.0.0.1:5000/get_reward -d '{"query": [[{"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"}]], "user": "ann"}'

A query is a conversation, or the text that the chat template makes of one; "user" is one name or
one for each query, null the average user, and OpenRLHF's "labels" are taken where it is missing.
"""

import json
import logging
import queue
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import bottle

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.files import InputError, require
from lore.common.settings import Port, PositiveInt
from lore.elicitation.scoring import Scorer
from lore.elicitation.web import Server, listen
from lore.embeddings.reward_model import OF_BASIS, Conversation, ModelChoice
from lore.methods.saved import load_learned

log = logging.getLogger(__name__)

Query = str | Conversation
Waiting = tuple[Sequence[Query], Sequence[str | None], Future[list[float]]]  # of one request
LARGEST = 16 << 20  # bytes of a body
TOGETHER = 256  # queries in one pass through the model


def main(
    basis: Path, host: str = "127.0.0.1", port: Port = 5000, max_queries: PositiveInt = 1024,
    lm: ModelChoice = OF_BASIS, **loading: Any,
) -> None:  # fmt: skip
    """Answer POST /get_reward until interrupted. There is no password: keep it to this machine.

    Args:
        basis: basis file of a run, or mixed_logit file.
        host: address to listen at; 0.0.0.0 lets other machines ask.
        port: to listen at; 0 for a free one.
        max_queries: most queries of a request.
        lm: the reward model.
    """
    scorer = Scorer(load_learned(basis), basis, lm=lm, **loading)
    server = start(scorer, host, port, max_queries)
    log.info("POST http://%s:%d/get_reward; Ctrl-C ends it", host, server.server_port)
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()
    log.info("stopped")


def start(scorer: Scorer, host: str, port: int, max_queries: int) -> Server:
    """A server that is bound but does not serve yet; InputError where the address is taken."""
    app, batches = bottle.Bottle(), Batches(scorer)
    app.route("/get_reward", "POST", partial(answer, batches, max_queries))
    app.default_error_handler = _as_json
    server = listen(app, host, port)
    server.daemon_threads, server.silence = True, 60
    return server


def _as_json(error: bottle.HTTPError) -> str:
    bottle.response.content_type = "application/json"
    return json.dumps({"error": str(error.body)})


def answer(batches: "Batches", max_queries: int) -> dict[str, list[float]]:
    """The rewards of a request's queries, or an error that says what is wrong with it."""
    request = bottle.request
    if request.content_length < 0 or request.chunked:
        raise bottle.HTTPError(411, "Content-Length is missing")
    if request.content_length > LARGEST:
        left = min(request.content_length, 8 * LARGEST)
        while left > 0 and (read := request.environ["wsgi.input"].read(min(left, 1 << 16))):
            left -= len(read)  # so that the client hears the answer
        raise bottle.HTTPError(413, f"the body has more than {LARGEST} bytes")
    try:
        queries, users = read_request(request.body.read(), max_queries)
        return {"rewards": batches.score(queries, users)}
    except InputError as error:
        raise bottle.HTTPError(400, str(error)) from None
    except OSError:
        raise bottle.HTTPError(408, "the body did not arrive") from None
    except Exception as error:
        log.exception("a request failed")
        raise bottle.HTTPError(500, f"{type(error).__name__}; see the server's log") from error


def read_request(body: bytes, max_queries: int) -> tuple[list[Query], list[str | None]]:
    """Queries, and the user of each; InputError for anything else."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    require(isinstance(found, dict), 'the body is not JSON such as {"query": [..], "user": ..}')
    queries = found.get("query")
    fine = isinstance(queries, list) and bool(queries) and all(map(_is_query, queries))
    require(fine, '"query" must be a list of texts or of lists of role and content')
    few = len(queries) <= max_queries
    require(few, f'"query" has {len(queries)} entries, more than --max-queries')
    users = found.get("user", found.get("labels"))
    users = users if isinstance(users, list) else [users] * len(queries)
    fine = len(users) == len(queries) and all(isinstance(user, str | None) for user in users)
    require(fine, f'"user" must be one name, or one for each of the {len(queries)} queries')
    return queries, [user or None for user in users]  # OpenRLHF's labels are "" where it has none


def _is_query(query: Any) -> bool:
    if isinstance(query, str):
        return bool(query.strip())
    fits = isinstance(query, list) and bool(query) and all(isinstance(m, dict) for m in query)
    return fits and all(isinstance(m.get(key), str) for m in query for key in ("role", "content"))


class Batches:
    """Queries of all requests, scored by one thread that takes what waits together."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.waiting = scorer, queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def score(self, queries: Sequence[Query], users: Sequence[str | None]) -> list[float]:
        """Wait for the rewards of queries, each for its user; InputError for one not known."""
        for user in set(users) - {None}:
            self.scorer.learned.direction(user, "user")
        rewards: Future[list[float]] = Future()
        self.waiting.put((queries, users, rewards))
        return rewards.result()

    def _work(self) -> None:
        while True:
            batch = [self.waiting.get()]
            while sum(len(some) for some, *_ in batch) < TOGETHER and not self.waiting.empty():
                batch.append(self.waiting.get())
            self._answer(batch)

    def _answer(self, batch: list[Waiting]) -> None:
        """Give every request its rewards, or say what is wrong with it."""
        users = [user for _, some, _ in batch for user in some]
        try:
            rows = self.scorer.embed([query for queries, *_ in batch for query in queries])
            rewards = rows.new_empty(len(rows))
            for user in set(users):
                own = [place for place, other in enumerate(users) if other == user]
                rewards[own] = self.scorer.score(rows[own], user)[0]
            parts = rewards.split([len(queries) for queries, *_ in batch])
            for (*_, future), part in zip(batch, parts, strict=True):
                future.set_result(part.tolist())
        except Exception as error:
            if len(batch) == 1:  # whatever it is, the client must not wait for ever
                batch[0][-1].set_exception(error)
            else:
                for one in batch:  # one by one, so that a mistake harms no other request
                    self._answer([one])


if __name__ == "__main__":
    cli(main, short="lm")
