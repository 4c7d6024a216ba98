"""The mixed logit: everyone shares a reward and departs from it as far as the choices warrant.

The log odds of user u's choice are y . (mu + d_u), where y are the features, whitened partly, and
d_u ~ N(0, S) in their D leading directions. mu is that of ridge Bradley-Terry, S is estimated by EM
(Yu, Tresp and Schwaighofer 2005), d_u is the posterior's mode, which predictions plug in.
Shape letters: U users, N comparisons, F features, D directions.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from lore.common.devices import gather_rows, sum_over_processes
from lore.common.files import require, write_whole
from lore.common.settings import NonNegativeFloat, PositiveFloat, PositiveInt
from lore.common.tensors import expect, read_tensors, require_finite
from lore.learning.basis import look_up
from lore.learning.comparisons import Comparisons, Users
from lore.learning.method import Fitted, Task
from lore.methods.fitting.geometry import measure
from lore.methods.fitting.posterior import Evidence, Lazy, Posterior, Prior, deviations, posteriors
from lore.methods.fitting.validation import Scores, Split, Tries, Validation
from lore.methods.ridge_bt import FINE, ROUGH, choose_ridge, fit_shared, precision

log = logging.getLogger(__name__)

FLOORS = (0.01, 0.1, 0.001, None)  # the first is where the search begins
STEP = 10**0.5  # between neighbouring strengths
FIRST_TAU2, FIRST_PI, FIRST_RANK = 3.0, 10.0, 4
# A deviation of 100 standard log odds is a choice without noise, and more says no more.
RANGES = {"l_mu": (1e-3, 1e3), "tau2": (1e-3, 1e4), "pi": (1.0, 300.0), "rank": (1, 64)}
RISE = 10.0  # EM of a given rank begins with so many times tau2
ROUNDS, LOW_ROUNDS, FEW_ROUNDS = 5, 8, 2  # of EM: full rank, a given one, from a neighbour's S
SCALES = (0.8, 0.9, 1.1, 1.25)  # of all log odds, beside 1
# Standard errors by which validation has to be better: a personal part than none, EM than an
# isotropic S, another scale of the log odds than 1.
PERSONAL, RICHER, SCALED = 2.0, 1.0, 2.0
SHOWN = 8  # directions in reports
MOST = 1 << 25  # numbers of users' evidence that a file keeps; of more it keeps none
HELD, LITTLE = 1 << 22, 0.05  # numbers of a view, or their share of the features, that EM holds
FORMAT = "mixed-logit 2"


@dataclass(frozen=True)
class Candidate:
    """The strengths of a fit, see ``MixedLogit``; EM begins with ``start`` times I."""

    floor: float | None
    l_mu: float
    tau2: float = 0.0
    pi: float = math.inf
    rank: int | None = None
    start: float | None = None


@dataclass(frozen=True)
class MixedLogit:
    """The mixed logit with its settings; strengths that are None are chosen on validation.

    Args:
        directions: D, leading directions of the features in which users may differ.
        floor: f of the whitening y = (C + f e_max I)^(-1/2) x; 0 is plain features.
        l_mu: precision of the shared reward's prior; all four strengths are given, or none.
        tau2: prior variance of a user's deviation in every direction; 0 is ridge BT.
        pi: how many users' worth of prior holds their covariance to tau2; 1e9 is isotropic.
        rank: so many directions have a variance of their own above tau2; all of them if None.
    """

    directions: PositiveInt = 100
    floor: NonNegativeFloat | None = None
    l_mu: PositiveFloat | None = None
    tau2: NonNegativeFloat | None = None
    pi: PositiveFloat | None = None
    rank: PositiveInt | None = None

    def check(self, task: Task) -> None:
        """Refuse some of the strengths without the others."""
        given = [x is not None for x in (self.floor, self.l_mu, self.tau2, self.pi)]
        require(all(given) or not any(given) and self.rank is None, "--mixed_logit.floor, .l_mu, "
                ".tau2 and .pi: give all four, with .rank or without, or none")  # fmt: skip

    def fit(self, task: Task) -> list[Fitted]:
        """Choose the strengths, then fit all training comparisons."""
        chosen, scale, tried = self._strengths(task)
        data, processes = task.local_train, task.processes
        geometry = replace(measure(data, processes, self.directions), floor=chosen.floor)
        shared = fit_shared(data, geometry, chosen.l_mu, processes=processes, tolerance=FINE)
        facts = {
            "chosen": vars(chosen) | {"scale": scale}, "tried": tried, "scale": geometry.scale,
            "losses": [value / geometry.count for value in shared.values],
            "parameters": data.num_features, "note": _note(chosen, scale, bool(tried)),
        }  # fmt: skip
        directions = geometry.directions * geometry.stretch()[:-1]  # among raw features
        fit = MixedFit(geometry.raw(shared.x)[:, 0], directions, None, facts, scale)
        fit.users = fit.mu.new_zeros(task.train.num_users, 0)
        if chosen.tau2:
            D, F = directions.shape[1], data.num_features
            few = len(data) * D <= HELD or D <= LITTLE * F
            view = fit.view(data) if few else Lazy(data, fit.all_directions().to(precision(data)))
            fit.prior, found = estimate(view, data, chosen, processes=processes)
            fit.users = gather_rows(found.mode, processes).float()
            facts["spectrum"] = fit._principal()[1].square().tolist()
            facts["parameters"] += fit.users.numel()
        log.info("mixed logit: %s", facts["note"])
        return [fit]

    def _strengths(self, task: Task) -> tuple[Candidate, float, list[dict[str, Any]]]:
        """Those given or chosen, the scale of the log odds, and a record of every candidate."""
        if self.l_mu is not None:
            strengths = self.floor or None, self.l_mu, self.tau2, self.pi, self.rank
            return Candidate(*strengths), 1.0, []
        data = Validation(task, self.directions)
        if data.possible:
            return Search(data).run()
        log.warning("no user has two dialogues: the strengths are not chosen, as nothing can be "
                    "held out")  # fmt: skip
        return Candidate(None, 1.0, 1.0), 1.0, []


def estimate(
    view: Tensor | Lazy, users: Users, strengths: Candidate, prior: Prior | None = None,
    found: Posterior | None = None, rounds: int | None = None, processes: int = 1,
    rough: bool = False,
) -> tuple[Prior, Posterior]:  # fmt: skip
    """The users' distribution of tastes N(0, S), by EM, and their posteriors, by Laplace's method.

    S maximises the probability of the users' choices, given the view [N, 1 + D] of this process's
    users, times an inverse Wishart prior: S = (sum_u E[d_u d_u^T] + pi tau2 I) / (U + pi), every
    expectation given the last S. Of a given rank, S is B B^T + tau2 I: leading eigenvectors alone
    are kept (Tipping and Bishop 1999). All steps but the last are twice as long, as EM's are short,
    with no variance below the least that S can have. It begins with a prior and what was found
    under it or, if ``prior`` is None, as the strengths say, and Newton's method with the latter.
    """
    D = view.shape[1] - 1
    eye = torch.eye(D, dtype=torch.float64, device=view.device)
    isotropic, mean, em = strengths.tau2 * eye, eye.new_zeros(D), strengths.pi < math.inf
    if prior is None:
        first = strengths.start or strengths.tau2 * (RISE if strengths.rank else 1)
        prior = Prior(mean, first * eye)
        found = posteriors(view, users, prior, found and found.push, em, rough)
    count = sum_over_processes(eye.new_tensor(float(users.num_users)), processes)
    least = strengths.tau2
    if not strengths.rank:
        least *= strengths.pi / (float(count) + strengths.pi)
    if rounds is None:
        rounds = LOW_ROUNDS if strengths.rank else ROUNDS
    for left in reversed(range(rounds if em else 0)):
        moments = sum_over_processes(found.moment.double(), processes)
        S = (moments + strengths.pi * isotropic) / (count + strengths.pi)
        S = prior.cov + (2 if left else 1) * ((S + S.T) / 2 - prior.cov)
        prior, push = Prior(mean, _leading(S, strengths.rank or D, least)), found.push
        del found  # its memory is needed
        found = posteriors(view, users, prior, push, rough or left > 0, rough)
    return prior, found


def _leading(S: Tensor, rank: int, rest: float) -> Tensor:
    """S [D, D] in so many of its leading directions, and the variance ``rest`` in all others."""
    values, vectors = torch.linalg.eigh(S)
    more, kept = (values[-rank:] - rest).clamp(min=0), vectors[:, -rank:]
    return (kept * more) @ kept.T + rest * torch.eye(len(S)).to(S)


class Rough(NamedTuple):
    """A candidate fitted to a split."""

    candidate: Candidate
    mu: Tensor  # shared reward among raw features [F]
    prior: Prior | None = None
    found: Posterior | None = None  # the users', where those of a neighbour may begin


class Search:
    """The choice of the strengths: each walks by half decades to where validation is best; ridge BT
    first, then an isotropic S on all floors, then EM of full or low rank, whichever begins better;
    the richer has to be better by the standard errors above."""

    def __init__(self, data: Validation) -> None:
        self.data = data
        self.tries = Tries(data, self._fit, _apart)
        self.plain: dict[int, Rough] = {}  # ridge BT on plain features, by split
        self.projected: dict[int, Tensor] = {}  # features along the directions, by set

    def run(self) -> tuple[Candidate, float, list[dict[str, Any]]]:
        """The chosen strengths, the scale of the log odds, and a record of every candidate."""
        first = choose_ridge(self.data)
        l_mu = first.candidate
        ridge = best = Candidate(None, l_mu)
        kept = [Rough(ridge, mu[:, 0]) for mu in first.kept]
        self.plain = {id(s): each for s, each in zip(self.data.splits, kept, strict=True)}
        isotropic = self._isotropic(l_mu)
        if self.tries(isotropic) < self.tries(ridge):
            full = replace(isotropic, pi=FIRST_PI, start=isotropic.tau2)
            rest = max(RANGES["tau2"][0], isotropic.tau2 / RISE)
            low = replace(isotropic, pi=RANGES["pi"][0], rank=FIRST_RANK, tau2=rest)
            rich, best = min(full, low, key=self.tries), isotropic
            if self.tries(rich) < self.tries(isotropic):
                rich = self._walk(rich, ("rank" if rich.rank else "pi", "tau2"))
                best = rich if self._earns(rich, isotropic, RICHER) else isotropic
            best = best if self._earns(best, ridge, PERSONAL) else ridge
        return best, self._scale(best), first.tried + self.tries.tried

    def _isotropic(self, l_mu: float) -> Candidate:
        """The best floor, tau2 and l_mu of an isotropic S."""
        best = self._walk(Candidate(FLOORS[0], l_mu, FIRST_TAU2), ("tau2",))
        best = self._walk(self._floor(best), ("tau2", "l_mu"))
        other = self._floor(best)
        return best if other == best else self._walk(other, ("tau2", "l_mu"))

    def _floor(self, best: Candidate) -> Candidate:
        return min((replace(best, floor=floor) for floor in FLOORS), key=self.tries)

    def _walk(self, best: Candidate, names: Sequence[str]) -> Candidate:
        """From a candidate to one whose neighbours in each strength are no better. None is returned
        to: which of three is the best may depend on which two are compared, see ``Try``."""
        moved, left = True, set()
        while moved:
            moved = False
            for name in names:
                step = 2 if name == "rank" else STEP
                for factor in (step, 1 / step):
                    other = _stepped(best, name, factor)
                    while other and other not in left and self.tries(other) < self.tries(best):
                        left.add(best)
                        best, moved = other, True
                        other = _stepped(best, name, factor)
            moved = moved and len(names) > 1
        return best

    def _earns(self, richer: Candidate, simpler: Candidate, errors: float) -> bool:
        gain, error = self.tries(richer).gain(self.tries(simpler))
        return gain > errors * error

    def _scale(self, best: Candidate) -> float:
        """A factor of all log odds, 1 unless another is better by two standard errors."""
        plain, splits = self.tries(best).scores(), self.data.splits
        fits = map(self._fit, splits, [best] * len(splits), self.tries(best).kept)
        found = [split.logits(fit) for split, (fit, _) in zip(splits, fits, strict=True)]

        def scaled(scale: float) -> Scores:
            return Scores.mean([
                split.scores(None if held is None else scale * held, [scale * x for x in new])
                for split, (held, new) in zip(splits, found, strict=True)
            ])

        scored = {scale: scaled(scale) for scale in SCALES}
        scale = min(scored, key=lambda s: scored[s].loss)
        gain, error = scored[scale].gain(plain)
        return scale if gain > SCALED * error else 1.0

    def _fit(
        self, split: Split, candidate: Candidate, near: Rough | None
    ) -> "tuple[MixedFit, Rough]":
        """The candidate fitted to a split's comparisons, roughly, from the nearest one's fit."""
        near = near or self.plain[id(split)]
        geometry = replace(split.geometry, floor=candidate.floor)
        data, processes = split.fit, split.processes
        alike = near.candidate.floor == candidate.floor
        mu = near.mu if alike else self.plain[id(split)].mu
        if not alike or near.candidate.l_mu != candidate.l_mu:
            start = geometry.stretched(mu[:, None])
            mu = fit_shared(data, geometry, candidate.l_mu, start, processes, ROUGH).x
            mu = geometry.raw(mu)[:, 0]
        Q, factors = geometry.directions, geometry.stretch()[:-1]
        fit = MixedFit(mu, Q * factors, None, {}, read=partial(self._read, Q, factors))
        fit.users = mu.new_zeros(data.num_users, 0)
        fit.settings = {k: None if v == math.inf else v for k, v in vars(candidate).items()}
        if not candidate.tau2:
            return fit, Rough(candidate, mu)
        by_em = all(x.pi < math.inf and not x.rank for x in (near.candidate, candidate))
        prior = near.prior if alike and by_em else None
        fit.prior, found = near.prior, near.found
        if near.candidate != candidate:
            given = prior, near.found, FEW_ROUNDS if prior else None, processes, True
            fit.prior, found = estimate(fit.view(data), data, candidate, *given)
        fit.users, fit.rough = found.mode, True
        return fit, Rough(candidate, mu, fit.prior, found)

    def _read(self, directions: Tensor, factors: Tensor, data: Comparisons) -> Tensor:
        """Features along stretched directions [N, D], from memory, the first time from data."""
        if id(data) not in self.projected:
            self.projected[id(data)] = data.project(directions.to(precision(data)))
        return self.projected[id(data)] * factors.to(self.projected[id(data)])


def _apart(one: Candidate, other: Candidate) -> float:
    """How far two candidates are apart, for the choice of where a fit begins."""

    def places(some: Candidate) -> list[float]:
        strengths = max(some.tau2, 1e-9), min(some.pi, 1e3), some.l_mu, some.rank or 1e9
        return [math.log(strength) for strength in strengths]

    far = sum(abs(a - b) for a, b in zip(places(one), places(other), strict=True))
    return far + 100 * (one.floor != other.floor)


def _stepped(candidate: Candidate, name: str, factor: float) -> Candidate | None:
    """The candidate with one strength times a factor; None beyond the range."""
    low, high = RANGES[name]
    value = type(low)(float(f"{getattr(candidate, name) * factor:.6g}"))
    return replace(candidate, **{name: value}) if low <= value <= high else None


def _note(chosen: Candidate, scale: float, free: bool) -> str:
    kind = "plain features" if chosen.floor is None else f"features whitened, floor {chosen.floor}"
    how = ", chosen on validation" if free else ""
    scaled = "" if scale == 1 else f", log odds times {scale}"
    if not chosen.tau2:
        return f"no personal part (ridge BT), l_mu {chosen.l_mu:.3g}, {kind}{scaled}{how}"
    prior = "isotropic" if math.isinf(chosen.pi) else f"by EM, pi {chosen.pi:.3g}"
    prior += f", rank {chosen.rank}" if chosen.rank else ""
    return f"S {prior}, tau2 {chosen.tau2:.3g}, l_mu {chosen.l_mu:.3g}, {kind}{scaled}{how}"


class MixedFit(Fitted):
    """A fitted mixed logit; a user's weights are the deviation d [D], the posterior's mode.

    Among raw features: the shared reward mu [F], and directions [F, D] along which users differ by
    N(0, S), the prior, which is None where nothing is personal. ``scale`` is of all log odds;
    ``read`` gives comparisons' features along the directions [N, D], by a product if None.
    """

    def __init__(
        self, mu: Tensor, directions: Tensor, prior: Prior | None, facts: dict[str, Any],
        scale: float = 1.0, read: Callable[[Comparisons], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.label, self.settings, self.file = "Mixed logit", {}, "mixed_logit"
        self.mu, self.directions, self.prior = mu, directions, prior
        self.facts, self.scale, self.read = facts, scale, read
        self.rough = False
        self.users = mu.new_zeros(0, 0 if prior is None else directions.shape[1])

    @property
    def population_state(self) -> Tensor:
        """The population average: no deviation."""
        return self.users.new_zeros(self.users.shape[1])

    def view(self, data: Comparisons) -> Tensor:
        """Shared reward difference, then the features along the directions [N, 1 + D]."""
        dtype = precision(data)
        if self.read is None:
            return data.project(self.all_directions().to(dtype))
        return torch.cat([data.project(self.mu[:, None].to(dtype)), self.read(data).to(dtype)], 1)

    def all_directions(self) -> Tensor:
        """mu and the directions [F, 1 + D]."""
        return torch.cat([self.mu[:, None], self.directions], 1)

    def adapt(self, view: Tensor, users: Users, seed: int = 0) -> Tensor:
        """Deviations [U', D] given the users' comparisons; nothing is random."""
        if self.prior is None:
            return view.new_zeros(users.num_users, 0)
        return posteriors(view, users, self.prior, rough=self.rough).mode

    def spread(self, data: Comparisons) -> Evidence | None:
        """Users' evidence; None where nothing is personal or there is too much of it."""
        if self.prior is None or len(data) * self.users.shape[1] > MOST:
            return None
        view = self.view(data)
        return Evidence.of(view, data, posteriors(view, data, self.prior))

    def logits(self, view: Tensor, state: Tensor, user: Tensor) -> Tensor:
        """Log odds [N] that the chosen response is preferred, the deviation plugged in."""
        if not state.shape[1]:
            return self.scale * view[:, 0]
        return self.scale * (view[:, 0] + (view[:, 1:] * state.to(view)[user]).sum(1))

    def population(self) -> Prior | None:
        """The prior of the deviations."""
        return self.prior

    def questions(self, view: Tensor) -> Tensor:
        """The view [N, 1 + D] itself."""
        return view.double()

    def reward(self, state: Tensor) -> Tensor:
        """The direction [F] of a user's reward, in log odds, from the user's deviation [D]."""
        personal = self.directions @ state.to(self.directions) if len(state) else 0
        return self.scale * (self.mu + personal)

    def _principal(self) -> tuple[Tensor, Tensor, Tensor]:
        """Orthogonal directions of reward [F, D] with their standard deviations [D], the widest
        first, and their weights in a deviation [D, D]."""
        L = self.prior.factor.to(self.directions)
        left, sizes, right = torch.linalg.svd(self.directions @ L, full_matrices=False)
        whole = torch.linalg.solve_triangular(L.T, right, upper=True, left=False)
        return left * sizes, sizes, whole.T

    def tastes(self) -> Tensor | None:
        """The widest principal directions of users' rewards [F, 8]."""
        return None if self.prior is None else self._principal()[0][:, :SHOWN]

    def places(self) -> Tensor:
        """What turns deviations [U, D] into standardised places along the tastes [D, 8]."""
        return self._principal()[2].double()[:, :SHOWN]

    def portrait(self) -> Tensor | None:
        """The seen users' standardised places along these [U, 8]."""
        return None if self.prior is None else self.users.double() @ self.places()

    def save(self, path: Path, new: Tensor, facts: Mapping[str, Any]) -> None:
        """Keep mu, directions, prior and every user's deviation by name in a safetensors file."""
        facts = dict(facts)
        tensors = {"mu": self.mu, "directions": self.directions, "users": self.users}
        tensors |= {"users_unseen": new, "center": facts.pop("center", None)}
        for end in ("", "_unseen"):
            if (known := facts.pop(f"known{end}", None)) is not None:
                tensors |= {f"evidence{end}": known.rows, f"evidence_counts{end}": known.counts}
        if self.prior is not None:
            tensors["covariance"] = self.prior.cov
        about = {"format": FORMAT, "scale": repr(self.scale)}
        about |= {"facts": json.dumps(facts), "fit": json.dumps(self.facts)}
        tensors = {k: x.cpu().contiguous() for k, x in tensors.items() if x is not None}
        write_whole(path, lambda draft: draft.write_bytes(save(tensors, about)))


class Saved:
    """A mixed logit read from its file: the fit, the new users' deviations [U', D], the facts
    (dataset, model, seed and more), the conversations' mean embedding [F], see ``Basis``, and seen
    and new users' evidence, if any. ``names`` are those whose rewards can be asked for, seen users
    first, ``known`` their rows of evidence [n, D], ``settings`` the fit's, and the other facts."""

    method = "a mixed logit"
    use = "Users' rewards are the shared reward plus their own parts along the tastes and others."

    def __init__(
        self, fit: MixedFit, new: Tensor, facts: dict[str, Any], center: Tensor | None = None,
        evidence: Sequence[Evidence | None] = (None, None),
    ) -> None:  # fmt: skip
        self.fit, self.new, self.facts, self.center = fit, new, facts, center
        self.states, self.known = {}, {}
        people = {"users": (fit.users, evidence[0]), "users_unseen": (new, evidence[1])}
        for key, (states, found) in people.items():
            self.states |= zip(facts.get(key, ()), states, strict=False)
            if found is not None:
                rows = found.rows.split(found.counts.tolist())
                self.known |= zip(facts.get(key, ()), rows, strict=False)
        about = {key: facts[key] for key in facts if key not in people}
        self.settings = {"estimator": "mixed logit", **fit.facts.get("chosen", {}), **about}
        self.names = list(self.states)

    def columns(self) -> dict[str, Tensor]:
        """The shared reward and the widest tastes [F] in log odds, by name."""
        tastes = self.fit.tastes()
        found = {"shared reward": self.fit.mu}
        if tastes is not None:
            found |= {f"taste {k}": x for k, x in enumerate(tastes.T, start=1)}
        return {key: (self.fit.scale * x).float() for key, x in found.items()}

    def direction(self, user: str | None = None, flag: str = "user") -> Tensor:
        """Direction [F] of a user's reward, in log odds; of the population average if None.
        InputError where the file knows no such user."""
        known = self.fit.population_state if user is None else look_up(self.states, user, flag)
        return self.fit.reward(known).float()

    def deviations(self, rows: Tensor, user: str | None = None) -> Tensor | None:
        """Standard deviations [n] of the reward of embeddings [n, F], less the center; those of the
        average user are how far users' rewards lie apart."""
        prior = self.fit.prior
        if prior is None or self.center is None or (user is not None and user not in self.known):
            return None
        cov = prior.cov if user is None else prior.given(self.known[user])
        z = self.fit.scale * (rows.double() @ self.fit.directions.double())
        return deviations(z, cov).float()


def load(path: Path) -> Saved:
    """Read what ``MixedFit.save`` wrote; InputError for no, a damaged or another kind of file."""
    remedy = "it is no mixed logit's file"
    text, found = read_tensors(Path(path), remedy)
    require(text.get("format") == FORMAT, f"{path}: not a mixed logit's file")
    require_finite(path, found, remedy)

    def tensor(name: str, *shape: int | None) -> Tensor:
        kind = torch.float32 if name not in found else found[name].dtype
        return expect(path, found, remedy, name, kind, *shape)

    mu, prior, size = tensor("mu", None), None, 0
    directions = tensor("directions", len(mu), None)
    center = tensor("center", len(mu)) if "center" in found else None
    if "covariance" in found:
        size = directions.shape[1]
        S = tensor("covariance", size, size).double()
        fine = torch.allclose(S, S.T, rtol=1e-6) and float(torch.linalg.eigvalsh(S).min()) > 0
        require(fine, f"{path}: its covariance is not symmetric and positive definite")
        prior = Prior(mu.new_zeros(size).double(), S)
    notes = {}
    for name in ("fit", "facts"):
        with suppress(ValueError, RecursionError):
            notes[name] = json.loads(text.get(name, ""))
        fine = isinstance(notes.get(name), dict)
        require(fine, f"{path}: its {name} are not readable; remove the file")
    facts, states, evidence, scale = notes["facts"], [], [], math.nan
    for end in ("", "_unseen"):
        key = f"users{end}"
        states.append(tensor(key, None, size))
        names = facts.get(key, [""] * len(states[-1]))
        fits = isinstance(names, list) and all(isinstance(name, str) for name in names)
        fits = fits and len(names) == len(states[-1])
        require(fits, f"{path}: its {key} are not as expected; {remedy}")
        evidence.append(None)
        if f"evidence{end}" in found:
            counts = tensor(f"evidence_counts{end}", len(states[-1]))
            total = int(counts.sum()) if counts.dtype == torch.long and (counts >= 0).all() else -1
            require(total >= 0, f"{path}: evidence_counts{end} are no counts; {remedy}")
            evidence[-1] = Evidence(tensor(f"evidence{end}", total, size), counts)
    with suppress(ValueError):
        scale = float(text.get("scale", ""))
    require(0 < scale < math.inf, f"{path}: its scale is not a positive number; {remedy}")
    mixed = MixedFit(mu, directions, prior, notes["fit"], scale)
    mixed.users = states[0]
    return Saved(mixed, states[1], facts, center, evidence)
