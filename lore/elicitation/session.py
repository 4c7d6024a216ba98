"""A session of questions: what is asked next, how sure the answers make us, and the profile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from lore.common.files import digest, write_text
from lore.elicitation.answers import Answers, Side
from lore.elicitation.criteria import Criterion, Pool, next_question
from lore.elicitation.outlook import look_ahead, same_prompt_pairs, thinned
from lore.elicitation.pool import Pair
from lore.elicitation.ranking import directed_rewards, rank
from lore.elicitation.taste import Taste
from lore.embeddings.reward_model import OF_BASIS, ModelChoice
from lore.preparing.messages import Conversation

SPEAKERS = {"user": "You", "assistant": "Answer", "system": "Instructions"}


class Question(NamedTuple):
    """What a person is shown.

    Attributes:
        number: of the question, from 1.
        history: the dialogue so far.
        shown: the responses a and b.
        pair: that they come from.
    """

    number: int
    history: Conversation
    shown: tuple[str, str]
    pair: Pair


@dataclass
class Material:
    """All that a session is about, and the rewards of it.

    Attributes:
        pairs: the pool.
        pool: the pairs' differences, first text minus second [N, 1 + K].
        drafts: candidate responses to be put in order; may be none.
        offered: their rewards [D, 1 + K].
        known: rewards of every conversation [1 + K], by its digest.
    """

    pairs: list[Pair]
    pool: Tensor
    drafts: list[Conversation]
    offered: Tensor
    known: dict[str, Tensor]

    def differences(self, pairs: Sequence[tuple[Conversation, Conversation]]) -> Tensor:
        """First minus second of pairs of known conversations [n, 1 + K]."""
        rows = [self.known[digest(one)] - self.known[digest(other)] for one, other in pairs]
        return torch.stack(rows) if rows else self.pool[:0]

    def targets(self, rng: torch.Generator) -> Tensor:
        """Pairs whose order matters [T, 1 + K]: of candidates, or of the pool without them."""
        prompts = [digest(history) for *history, _ in self.drafts]
        one, other = same_prompt_pairs(prompts, rng).unbind(1)
        if len(one):
            return self.offered[one] - self.offered[other]
        return self.pool[thinned(len(self.pool), rng)]


def gather(
    taste: Taste,
    basis: Path,
    pairs: list[Pair],
    answers: Answers,
    drafts: list[Conversation],
    embeddings: Path | None = None,
    lm: ModelChoice = OF_BASIS,
    **embedding: Any,
) -> Material:
    """Embed the pool, the candidates and what was answered before.

    What was answered usually stands in the pool, and is then not embedded again.

    Args:
        taste: how people differ.
        basis: the file that says so.
        pairs: the pool.
        answers: those that were given before.
        drafts: the candidates' conversations.
        embeddings: folder to keep the embeddings of pool and candidates in, for another time.
        lm: the reward model.
        embedding: more arguments of ``embeddings.embed``.
    """
    source = lm.of_basis(taste.settings, basis)

    def rewards(texts: list[Conversation], folder: Path | None) -> Tensor:
        return directed_rewards(taste.directions, source, texts, folder, **embedding).double()

    ours = [conversation for pair in pairs for conversation in pair.conversations]
    found = rewards([*ours, *drafts], embeddings)
    known = dict(zip(map(digest, [*ours, *drafts]), found, strict=True))
    before = {digest(c): c for both in answers.pairs for c in both}
    foreign = {key: c for key, c in before.items() if key not in known}
    if foreign:
        known |= zip(foreign, rewards(list(foreign.values()), None), strict=True)
    pool, offered = found.split([len(ours), len(drafts)])
    return Material(pairs, pool[::2] - pool[1::2], drafts, offered, known)


class Session:
    """Questions to one person, one after the other; nothing is known here of how they are put.

    Args:
        taste: how people differ.
        material: what may be asked, and what is to be put in order.
        answers: those that were given before; new ones are kept there at once.
        criterion: by which the next question is chosen, see ``criteria.score``.
        tolerance: stop once as many questions as are looked ahead to would raise the expected
            accuracy by less.
        most: stop after as many answers; 0 for no such limit.
        seed: of all that is random: which response is shown first, which of several equally good
            questions is asked, and LoRe's initial weights.

    Attributes:
        belief: what is known of the person.
        outlook: how sure that is, and how sure it may become.
        insist: ask on where the outlook says stop.
    """

    def __init__(
        self, taste: Taste, material: Material, answers: Answers,
        criterion: Criterion = "information", tolerance: float = 0.005, most: int = 0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.taste, self.material, self.answers = taste, material, answers
        self.criterion, self.tolerance, self.most, self.seed = criterion, tolerance, most, seed
        self.pool, self.insist = Pool(material.pool), False
        self.targets = material.targets(torch.Generator().manual_seed(seed))
        nothing = taste.belief(material.pool[:0])
        moments = nothing.mean, nothing.covariance
        self.before = look_ahead(moments, self.targets, material.pool[:0], tolerance).now
        self._learn()

    def _learn(self) -> None:
        """Take in the answers as they now are."""
        settled = self.answers.settled
        keys = [pair.key for pair in self.material.pairs]
        self.settled = [i for i, key in enumerate(keys) if key in settled]
        self.left = torch.tensor([i for i, key in enumerate(keys) if key not in settled]).long()
        self.Z = self.material.differences(self.answers.pairs)
        self.belief = self.taste.belief(self.Z)
        moments = self.belief.mean, self.belief.covariance
        pool = self.material.pool[self.left]
        self.outlook = look_ahead(moments, self.targets, pool, self.tolerance)
        self._next: Question | None = None

    # ------------------------------------------------------------------ Questions

    @property
    def reason(self) -> str:
        """Why nothing more is asked; empty while something is."""
        if not len(self.left):
            return "every pair of the pool was asked"
        if self.insist:
            return ""
        if self.most and len(self.answers) >= self.most:
            return f"{len(self.answers)} answers were given, and --most is {self.most}"
        if self.tolerance and self.outlook.useful == 0:
            ahead, little = len(self.outlook.accuracy) - 1, 100 * self.tolerance
            gain = f"raise the expected accuracy by less than {little:g} points"
            return f"{ahead} more answers would {gain}"
        return ""

    def question(self) -> Question | None:
        """The question that waits for an answer; None where asking is over."""
        if self.reason:
            return None
        if self._next is None:
            pair = self.material.pairs[self._choose()]
            turned = int(digest([self.seed, pair.key])[0], 16) % 2  # again so after a restart
            shown = pair.texts[::-1] if turned else pair.texts
            self._next = Question(self.answers.asked + 1, pair.history, shown, pair)
        return self._next

    def _choose(self) -> int:
        """The number of the next pair; the same one again after a restart."""
        seed = int(digest([self.seed, self.answers.asked])[:12], 16)
        return next_question(self.belief, self.pool, self.criterion, self.settled, seed)

    def answer(self, side: Side) -> None:
        """Keep that response a or b is the better one."""
        if question := self.question():
            self.answers.answer(question.pair, question.shown, side)
            self._learn()

    def skip(self) -> None:
        """Leave the question unanswered, for good."""
        if question := self.question():
            self.answers.skip(question.pair)
            self._learn()

    def undo(self) -> bool:
        """Take back the last answer or skip; False if there is none."""
        if done := self.answers.undo():
            self._learn()
        return done

    # ---------------------------------------------------------------- What is known

    @property
    def told(self) -> list[str]:
        """How far we are and how sure, in sentences."""
        skipped, look = len(self.answers.skips), self.outlook
        ahead, useful = len(look.accuracy) - 1, look.useful
        more = f"; after {ahead} more {look.best:.1%}" if ahead else ""
        many = "or more " if useful == ahead > 0 else ""
        return [
            f"{len(self.answers)} answered, {skipped} skipped",
            f"expected accuracy {look.now:.1%} (without answers {self.before:.1%}{more})",
            f"{useful} {many}questions still useful" if useful != 1 else "1 question still useful",
        ]

    def ranking(self, weights: Tensor) -> pd.DataFrame:
        """The candidates in order, see ``ranking.rank``."""
        logits = self.taste.logits(weights.double(), self.material.offered)
        return rank(self.material.drafts, logits)

    def profile(self) -> dict[str, Any]:
        """The person's weights, posterior and, where there are candidates, the ranking."""
        weights = self.taste.weights(self.Z, self.belief, self.seed)
        profile = {
            "user": self.answers.user,
            "method": self.taste.method,
            "answers": len(self.answers),
            "skipped": len(self.answers.skips),
            "weights": weights.tolist(),
            "posterior": {
                "mean": self.belief.mean.tolist(),
                "covariance": self.belief.covariance.tolist(),
            },
            "expected_accuracy": self.outlook.now,
            "expected_accuracy_without_answers": self.before,
            "questions_still_useful": self.outlook.useful,
        }
        if self.material.drafts:
            table = self.ranking(weights).astype(object)
            profile["ranking"] = table.where(table.notna(), None).to_dict("records")
        return profile

    def save(self, path: Path) -> dict[str, Any]:
        """Write the profile, and return it."""
        profile = self.profile()
        write_text(path, json.dumps(profile, indent=2))
        return profile
