"""PEBS (arXiv 2606.27578) for comparisons: one shared reward, and each user's own slope."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lore.common.settings import PositiveFloat
from lore.learning.comparisons import Comparisons, Users
from lore.learning.method import Fitted
from lore.methods.fitting.geometry import Geometry, measure
from lore.methods.fitting.linear import LinearFitted, LinearPeer, project, slopes, solve_users
from lore.methods.fitting.validation import HeldOut, hold_out
from lore.methods.ridge_bt import ROUGH, STRENGTHS, fit_shared

FOLDS = 5  # of each user's dialogues, for rewards that have not seen what they are judged on
LEAST = 0.01  # of the prior's mean: no slope is below, so that none reverses a preference


@dataclass
class Prior:
    """Users' slopes."""

    common: float  # the one that suits all comparisons best, from which they are measured
    mean: float
    variance: float  # tau^2


def own_slopes(t: Tensor, users: Users, common: float) -> tuple[Tensor, Tensor]:
    """Each user's own slope [U] from shared reward differences [N], by one step of Fisher scoring
    from the common one, finite even where the best slope is not, and its sampling variance [U],
    infinite without comparisons."""
    logits = common * t
    score = -users.sum((slopes(users, logits) * t)[:, None])[:, 0]
    information = users.weight * torch.sigmoid(logits) * torch.sigmoid(-logits) * t.square()
    variance = 1 / users.sum(information[:, None])[:, 0]
    return torch.where(variance.isfinite(), common + variance * score, common), variance


def empirical_prior(t: Tensor, users: Users) -> Prior:
    """The slopes' mean and variance between users, by moments.

    Var_u being the sampling variance of a user's own slope a_u, the sum of (a_u - a)^2 / Var_u
    around the common slope a is U - 1 on average if all slopes are the same, and what it has beyond
    that tells tau^2 (DerSimonian and Laird 1986), which is 0 for one user alone. The mean weighs
    slopes by 1 / (Var_u + tau^2). Reward differences [N] are of a reward not fitted to these.
    """
    everyone = Users([len(t)], users.weight)
    weak = t.new_full((1, 1), 1e-9 * float(t.square().sum()) + 1e-30)
    common = float(solve_users(t[:, None], everyone, weak, t.new_zeros(1)))
    own, variance = own_slopes(t, users, common)
    information = 1 / variance
    spread = (information * (own - common).square()).sum() - (information > 0).sum() + 1
    total = information.sum()
    if not total > 0:
        return Prior(common, common, 0.0)
    beyond = total - information.square().sum() / total
    between = float((spread / beyond).clamp(min=0)) if (information > 0).sum() > 1 else 0.0
    weight = 1 / (variance + between)
    return Prior(common, float((weight * own).sum() / weight.sum()), between)


def shrunk_slopes(t: Tensor, users: Users, prior: Prior) -> Tensor:
    """Slopes [U, 1]: mean + w_u (own slope - mean), where w_u = tau^2 / (tau^2 + Var_u)."""
    own, variance = own_slopes(t, users, prior.common)
    weight = prior.variance / (prior.variance + variance)
    slope = prior.mean + weight * (own - prior.mean)
    return slope.clamp(min=LEAST * max(prior.mean, LEAST))[:, None]


class PEBSFitted(LinearFitted):
    """A fit of PEBS: state [1], the slope."""

    describe = Fitted.describe  # one direction has no spectrum


@dataclass(frozen=True)
class PEBS(LinearPeer):
    """Log odds a_u x' v: a ridge Bradley-Terry reward v and slopes a_u > 0 of the users' own.

    A positive slope changes no preference, hence no accuracy: only how sure the probabilities are.
    Own slopes are shrunk to the population's, the prior's mean, by w_u = tau^2 / (tau^2 + Var_u).
    The published calibrators are of ratings, with an offset, which a comparison does not have.
    ``faithful`` fits the reward to most dialogues and the slopes to the others, as published. Its
    ridge is chosen on validation as well, since the published reward models come ready.
    ``converged`` fits the reward to all dialogues; slopes are measured with rewards fitted to four
    fifths of every user's dialogues, so that every comparison tells something of both.

    Args:
        strengths: of the reward's ridge, among features of mean square length 1, from the
            strongest on; chosen on validation if several.
    """

    strengths: tuple[PositiveFloat, ...] = STRENGTHS
    whitens = False
    published = LinearPeer.chosen

    def converged(
        self, data: Comparisons, geometry: Geometry, strength: float, warm: Any, tolerance: float
    ) -> tuple[PEBSFitted, None]:
        """The reward and every user's slope; see ``LinearPeer``."""
        everyone = HeldOut(data, data, torch.arange(data.num_users))
        split = hold_out(data, 0) if self.faithful else everyone
        v, losses = _reward(split.fit, strength, tolerance)
        prior, users = Prior(1.0, 1.0, 0.0), v.new_ones(data.num_users, 1)
        if (held := split.held) is not None:  # what slopes are measured on
            t = project(held, v)[:, 0] if self.faithful else self._unseen(data, strength)
            prior = empirical_prior(t, held)
            users[:] = prior.mean
            users[split.whose.to(v.device)] = shrunk_slopes(t, held, prior)
        mean = v.new_tensor([max(prior.mean, LEAST * LEAST)])
        spread = f"{prior.mean:.2f}, standard deviation {prior.variance**0.5:.2f} between users"
        note = f"ridge {strength:g}; slopes {spread}."
        fitted = PEBSFitted(
            self, "PEBS", {"strength": strength}, v, users, mean,
            lambda view, some, _: shrunk_slopes(view[:, 0], some, prior), losses, note,
        )  # fmt: skip
        fitted.facts["parameters"] += 2  # of the prior
        fitted.facts["slopes"] = users[:, 0].tolist()
        return fitted, None

    def _unseen(self, data: Comparisons, strength: float) -> Tensor:
        """Reward differences [N] by rewards that were fitted to other dialogues of the users."""
        fold = torch.zeros(len(data), dtype=torch.long, device=data.device)
        for units in data.units:  # a user's dialogues in turn
            for place, rows in enumerate(units):
                fold[rows.to(fold.device)] = place % FOLDS
        others = [fold != k if (fold != k).any() else fold == k for k in range(FOLDS)]
        parts = [_reward(data.select(rows), strength, ROUGH)[0] for rows in others]
        return project(data, torch.cat(parts, 1)).gather(1, fold[:, None])[:, 0]


def _reward(data: Comparisons, strength: float, tolerance: float) -> tuple[Tensor, list[float]]:
    """The ridge Bradley-Terry direction [F, 1] and its losses, means over comparisons."""
    geometry = measure(data)
    found = fit_shared(data, geometry, strength, tolerance=tolerance)
    return geometry.raw(found.x).double(), [value / len(data) for value in found.values]
