"""A session of questions: what is asked next, how sure the answers make us, and the profile."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lore.common.files import digest, require, write_text
from lore.elicitation import criteria
from lore.elicitation.choices import Answers, Pair
from lore.elicitation.criteria import Criterion, QuestionPool, UserPosterior
from lore.elicitation.user import FittedFile, User, as_records, view_conversations
from lore.methods.lore import LoreFit
from lore.methods.mixed_logit import MixedFit
from lore.preparing.messages import Conversation

SPEAKERS = {"user": "You", "assistant": "Answer", "system": "Instructions"}
ACTIONS = ("a", "b", "skip", "undo", "more")
MOST_TARGETS = 2000  # pairs


class Question(NamedTuple):
    """What a person is shown: a dialogue, and its two responses as a and b."""

    number: int  # from 1
    pair: Pair
    shown: tuple[str, str]


Views = Mapping[str, Tensor]  # conversations as the fit views them [C], by their digests


def gather(
    found: FittedFile, pairs: list[Pair], answers: Answers, candidates: list[Conversation],
    **embedding: Any,
) -> Views:  # fmt: skip
    """Embed the pool, the candidates and, where it is not among these, what was answered before, by
    ``view_conversations``; InputError for a file that knows no differences between people."""
    alike = f"{found.path} knows no differences between users, so that there is nothing to ask: "
    alike += "it has rank 1, one user, or no personal part"
    require(found.fit.population() is not None, alike)
    texts = [*(one for pair in pairs for one in pair.conversations), *candidates]
    rows = view_conversations(found, texts, **embedding)
    views = dict(zip(map(digest, texts), rows, strict=True))
    answered = {digest(c): c for *both, _ in answers.comparisons for c in both}
    if others := {key: c for key, c in answered.items() if key not in views}:
        rows = view_conversations(found, [*others.values()], **embedding | {"embeddings": None})
        views |= zip(others, rows, strict=True)
    return views


def target_pairs(
    pool: Sequence[Pair], candidates: Sequence[Conversation], generator: torch.Generator
) -> list[Sequence[Conversation]]:
    """Pairs whose order matters: of candidates for the same prompt, or of the pool where there are
    none; ``MOST_TARGETS`` drawn from more."""
    groups = defaultdict(list)
    for one in candidates:
        groups[digest(one[:-1])].append(one)
    pairs = [both for some in groups.values() for both in combinations(some, 2)]
    pairs = pairs or [pair.conversations for pair in pool]
    drawn = torch.randperm(len(pairs), generator=generator)[:MOST_TARGETS].sort().values
    return [pairs[number] for number in drawn.tolist()]


class Session:
    """Questions to one person, one after the other, however they are put. The fit's ``population``
    must not be None; ``views`` has all conversations of the pool, the candidates, which are to be
    ranked, and the answers. Asking stops after ``most`` answers, if not 0, or when
    ``criteria.HORIZON`` more would raise the expected accuracy by less than ``tolerance``. The seed
    is of which response is shown first, which of equally good questions is asked, and LoRe's
    initial weights."""

    def __init__(
        self, fit: LoreFit | MixedFit, pairs: list[Pair], candidates: list[Conversation],
        views: Views, answers: Answers, criterion: Criterion = "d_optimal",
        tolerance: float = 0.005, most: int = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        self.fit, self.pairs, self.candidates, self.views = fit, pairs, candidates, views
        self.answers, self.criterion, self.seed = answers, criterion, seed
        self.tolerance, self.most, self.insist = tolerance, most, False
        pool = fit.questions(self.differences([pair.conversations for pair in pairs]))
        targets = target_pairs(pairs, candidates, torch.Generator().manual_seed(seed))
        self.pool, self.targets = QuestionPool(pool), fit.questions(self.differences(targets))
        nothing = UserPosterior.after(fit.population(), pool[:0])
        self.before = criteria.look_ahead(nothing, self.targets, pool[:0])[0]
        self._learn()

    def differences(self, pairs: Sequence[Sequence[Conversation]]) -> Tensor:
        """First minus second of pairs of these conversations [n, C]."""
        rows = [self.views[digest(one)] - self.views[digest(other)] for one, other in pairs]
        return torch.stack(rows) if rows else torch.empty(0, len(next(iter(self.views.values()))))

    def _learn(self) -> None:
        """Take in the answers as they now are."""
        settled, comparisons = self.answers.settled, self.answers.comparisons
        done = torch.tensor([pair.key in settled for pair in self.pairs])
        self.settled, self.left = done.nonzero()[:, 0].tolist(), self.pool.rows[~done]
        choices = self.differences([both for *both, _ in comparisons])
        weight = torch.tensor([weight for *_, weight in comparisons])
        self.user = User(self.fit, choices, weight, self.seed)
        self.accuracy = criteria.look_ahead(self.user.posterior, self.targets, self.left)
        self.useful = criteria.useful_questions(self.accuracy, self.tolerance)

    @property
    def reason(self) -> str:
        """Why nothing more is asked; empty while something is."""
        if not len(self.left):
            return "every pair of the pool was asked"
        if self.insist:
            return ""
        if self.most and len(self.answers) >= self.most:
            return f"{len(self.answers)} answers were given, and --most is {self.most}"
        if self.tolerance and self.useful == 0:
            gain = f"raise the expected accuracy by less than {100 * self.tolerance:g} points"
            return f"{len(self.accuracy) - 1} more answers would {gain}"
        return ""

    def question(self) -> Question | None:
        """The question that waits for an answer, after a restart the same; None at the end."""
        if self.reason:
            return None
        known, last = self.user.posterior, self.answers.last_question
        seed = int(digest([self.seed, last])[:12], 16)
        place = criteria.next_question(known, self.pool, self.criterion, self.settled, seed)
        pair = self.pairs[place]
        turned = int(digest([self.seed, pair.key])[0], 16) % 2
        return Question(last + 1, pair, pair.texts[::-1] if turned else pair.texts)

    def do(self, word: str) -> bool:
        """Do what the person says, one of ``ACTIONS``; False where there is nothing to do. "skip"
        leaves the question for good, "undo" takes back the last answer or skip, and "more" is to be
        asked on."""
        question, done = self.question(), True
        if word == "more":
            self.insist = True
        elif word == "undo":
            done = self.answers.undo()
        elif question is None:
            done = False
        elif word == "skip":
            self.answers.skip(question.pair)
        else:
            self.answers.answer(question.pair, question.shown, word)
        if done:
            self._learn()
        return done

    @property
    def progress(self) -> list[str]:
        """How far we are and how sure, in sentences."""
        ahead, useful, skips = len(self.accuracy) - 1, self.useful, self.answers.skips
        more = f"; after {ahead} more {max(self.accuracy):.1%}" if ahead else ""
        least = "at least " if useful == ahead > 0 else ""
        return [
            f"{len(self.answers)} answered, {len(skips)} skipped",
            f"expected accuracy {self.accuracy[0]:.1%} (without answers {self.before:.1%}{more})",
            f"{least}{useful} more question{'s are' if useful != 1 else ' is'} expected to help",
        ]

    def save(self, path: Path) -> dict[str, Any]:
        """Write the profile, and return it: weights and the ranking of candidates, if any."""
        user = self.user
        profile = {
            "user": self.answers.user, "method": self.fit.label,
            "answers": len(self.answers), "skipped": len(self.answers.skips),
            "weights": user.weights.tolist(), **user.known(),
            "expected_accuracy": self.accuracy[0],
            "expected_accuracy_without_answers": self.before,
            "questions_still_useful": self.useful,
        }  # fmt: skip
        if self.candidates:
            views = torch.stack([self.views[digest(one)] for one in self.candidates])
            profile["ranking"] = as_records(user.rank(self.candidates, views))
        write_text(path, json.dumps(profile, indent=2))
        return profile
