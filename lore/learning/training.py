"""Training: models side by side on the same comparisons, and states to go on from after a kill. The
models' columns form one tensor, so that one pass over the features serves all; ``ranks[m]`` are
model m's. U users, N comparisons, F features, C columns of all models, M models."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from lore.common.devices import gather_rows, rows_before, sum_over_processes
from lore.common.files import InputError, require, write_whole
from lore.common.tensors import checksum
from lore.learning.comparisons import CACHE_BYTES, Comparisons, DenseFeatures, Users

Model = Any  # utils.LoRe or utils.LoRe_regularized, which stand above

log = logging.getLogger(__name__)

DIVERGED = ("numbers became NaN or infinite; lower the learning rate (--learning-rate) or --alpha, "
            "or choose another --optimizer")  # fmt: skip
OptimizerFactory = Callable[[Iterable[Tensor]], Optimizer]
Loss = Callable[[Tensor, Tensor], Tensor]  # products [N, M], coefficients [N] -> losses [M]
# Their update of an entry depends on that entry alone, so that models trained side by side in one
# tensor, or split over processes, follow the trajectories they follow alone.
ELEMENTWISE = (
    torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop,
    torch.optim.Adagrad, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax,
)  # fmt: skip


def make_optimizer(
    optimizer: type[Optimizer] | OptimizerFactory | None, parameters: Iterable[Tensor],
    learning_rate: float,
) -> Optimizer:  # fmt: skip
    """The paper's Adam, or a class made with lr=learning_rate, or what a function with its own
    settings makes, such as ``functools.partial(torch.optim.SGD, lr=1.0)``."""
    if isinstance(optimizer, type) or optimizer is None:
        return (optimizer or torch.optim.Adam)(parameters, lr=learning_rate)
    return optimizer(parameters)


def simplex(logits: Tensor, ranks: Sequence[int]) -> Tensor:
    """Weights [U, C] on the simplex: the softmax of each model's logits [U, C]."""
    return torch.cat([part.softmax(1) for part in logits.split(ranks, 1)], 1)


def loss_and_slope(loss: Loss, products: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [M] of products [N, M] with coefficients c [N], and their slope in these [N, M]."""
    with torch.enable_grad():
        losses = loss(products.requires_grad_(), c)
        (slope,) = torch.autograd.grad(losses.sum(), products)
    return losses.detach(), slope


def logits_gradient(
    logits: Tensor, dW: Tensor, ranks: Sequence[int],
    target: Tensor | None = None, strength: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient [U, C] through the softmax of a gradient in the weights, and of the pull, which is
    strength [U, C] times KL(target [C] || weights) summed over users; and the pull's losses [M]."""
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        W = simplex(logits, ranks)
        pulls = W.new_zeros(len(ranks))
        if strength is not None:
            ratio = target.clamp_min(1e-30).log() - W.clamp_min(1e-30).log()
            parts = (strength * target * ratio).split(ranks, 1)
            pulls = torch.stack([part.sum() for part in parts])
        (gradient,) = torch.autograd.grad((W * dW).sum() + pulls.sum(), logits)
    return gradient, pulls.detach()


class Training:
    """Several models' weights and bases while they are trained side by side."""

    def __init__(self, models: Sequence[Model], data: Comparisons) -> None:
        self.models, self.data, lead = models, data, models[0]
        wide = f"features are {data.num_features} wide, the model expects {lead.num_features}"
        require(data.num_features == lead.num_features, wide)
        first, users = rows_before(data.num_users, lead.processes)
        wrong = f"{users} users given, the model expects {lead.num_classes}"
        require(users == lead.num_classes, wrong)
        self.own_rows = slice(first, first + data.num_users)  # of W
        self.ranks = [model.rank for model in models]
        self.V = torch.cat([model.V0 for model in models], 1).to(data.device)
        logits = torch.cat([model.W0 for model in models], 1)[self.own_rows]
        self.logits = logits.to(data.device, copy=True)
        per_comparison = lead.per_comparison(data)
        self.c = (data.weight * per_comparison[data.user]).to(self.V)
        self.strength = None
        if any(model.shrinkage for model in models):
            each = torch.cat([torch.full((m.rank,), float(m.shrinkage)) for m in models])
            self.strength = per_comparison.to(self.V)[:, None] * each.to(self.V)
        self.parts = list(data.parts(2 * len(models)))
        self.by_direction = data.device.type == "cpu" and isinstance(data.features, DenseFeatures)
        self.projected: Tensor | None = None  # Z, while the basis stays as it is
        groups = [[self.logits], [self.V]] if lead.alternating else [[self.logits, self.V]]
        self.optimizers = [make_optimizer(lead.optimizer, g, lead.learning_rate) for g in groups]
        wanted = [(True, False), (False, True)] if lead.alternating else [(True, True)]
        self.turns = list(zip(self.optimizers, wanted, strict=True))
        self.losses = self.V.new_zeros(lead.num_iterations, len(models))

    def fit(self, checkpoint: "Checkpoint | None") -> list[tuple[Tensor, Tensor]]:
        """Train to the end: (W, V) of every model, and each model's ``losses``."""
        lead = self.models[0]
        start = checkpoint.restore(self) if checkpoint else 0
        label = f"rank {', '.join(map(str, self.ranks))}"
        bar = tqdm(range(start, lead.num_iterations), label, initial=start,
                   total=lead.num_iterations, disable=not lead.progress or None)  # fmt: skip
        for step in bar:
            for optimizer, wanted in self.turns:  # what the last one starts from is recorded
                self.losses[step] = _step(optimizer, partial(self._set_gradients, step, *wanted))
            if lead.progress and step % 50 == 0:
                bar.set_postfix(loss=" ".join(f"{x:.4f}" for x in self.losses[step].tolist()))
            if checkpoint:
                checkpoint.tick(self, step + 1)
        self.check_finite(lead.num_iterations)
        W = gather_rows(simplex(self.logits, self.ranks), lead.processes)
        for m, model in enumerate(self.models):
            model.losses = self.losses[:, m].cpu().clone()
        parts = zip(self.models, W.split(self.ranks, 1), self.V.split(self.ranks, 1), strict=True)
        return [model.finish(w.contiguous(), v.contiguous()) for model, w, v in parts]

    def check_finite(self, step: int) -> None:
        """Raise InputError if weights or bases are not numbers after a step."""
        finite = bool(self.V.isfinite().all() & self.logits.isfinite().all())
        require(finite, f"by step {step} of training, {DIVERGED}")

    def _set_gradients(self, step: int, of_weights: bool, of_basis: bool) -> Tensor:
        """Put gradients into the logits and the basis; returns every model's objective [M]."""
        W, lead = simplex(self.logits, self.ranks), self.models[0]
        V = self.V.detach().T.contiguous().T  # products are faster with each column in a row
        losses, dW, dV = W.new_zeros(len(self.models)), torch.zeros_like(W), torch.zeros_like(V)
        gradients = self._by_direction if self.by_direction else self._by_projection
        for users, rows, part in self.parts:
            found = gradients(part, V, W[users], self.c[rows], of_weights, of_basis)
            losses += found[0]
            dW[users] += found[1]
            dV += found[2]
        if of_weights:  # through the softmax, with the pull to the population
            mean = None
            if self.strength is not None:
                sums = torch.cat([W.sum(0), W.new_tensor([len(W)])])
                sums = sum_over_processes(sums, lead.processes)
                mean = sums[:-1] / sums[-1]
            given = self.logits, dW, self.ranks, mean, self.strength
            self.logits.grad, pulls = logits_gradient(*given)
            losses = losses + pulls
        if not of_basis:
            return losses
        dV, losses = (sum_over_processes(some, lead.processes) for some in (dV, losses))
        if any(model.alpha for model in self.models):  # with the pull to the reference
            V = self.V.detach().requires_grad_()
            pairs = zip(self.models, V.split(self.ranks, 1), strict=True)
            pulls = [m.penalty(part, step) if m.alpha else part.new_zeros(()) for m, part in pairs]
            pulls = torch.stack(pulls)
            dV, losses = dV + torch.autograd.grad(pulls.sum(), V)[0], losses + pulls.detach()
        self.V.grad = dV.contiguous()
        return losses

    def _by_direction(
        self, data: Comparisons, V: Tensor, W: Tensor, c: Tensor, of_weights: bool, of_basis: bool
    ) -> tuple[Tensor, ...]:
        """Losses [M], and their gradients in W [U, C] and V [F, C], or 0. A comparison's products
        are with its user's directions V w; gradients are H V and H^T W, with H [U, M, F] each
        user's sums of slopes times x."""
        x, vs, ws = data.features.x.to(V.dtype), V.split(self.ranks, 1), W.split(self.ranks, 1)
        directions = V.new_empty(len(W), len(self.ranks), len(V))  # [U, M, F]
        for m, (v, w) in enumerate(zip(vs, ws, strict=True)):
            torch.mm(w, v.T, out=directions[:, m])
        losses, slope = loss_and_slope(self.models[0].loss, data.dots(x, directions), c)
        H, dW, dV = data.sums(x, slope).unbind(1), W.new_zeros(()), W.new_zeros(())
        if of_weights:
            dW = torch.cat([h @ v for h, v in zip(H, vs, strict=True)], 1)
        if of_basis:
            dV = torch.cat([w.T @ h for h, w in zip(H, ws, strict=True)]).T
        return losses, dW, dV

    def _by_projection(
        self, data: Comparisons, V: Tensor, W: Tensor, c: Tensor, of_weights: bool, of_basis: bool
    ) -> tuple[Tensor, ...]:
        """The same by sums over rows of Z = X V [N, C], streamed or on a GPU."""
        Z = data.project(V) if self.projected is None else self.projected
        self.projected = None if of_basis else Z  # serves both steps that alternate
        own, dW, dV = W.index_select(0, data.user), W.new_zeros(()), W.new_zeros(())
        products = torch.stack([part.sum(1) for part in (Z * own).split(self.ranks, 1)], 1)
        losses, slope = loss_and_slope(self.models[0].loss, products, c)
        columns = zip(slope.split(1, 1), self.ranks, strict=True)
        G = torch.cat([s.expand(-1, rank) for s, rank in columns], 1)  # [N, C], no GPU waits
        if of_weights:
            dW = data.sum(G * Z)
        if of_basis:
            dV = data.backproject(G * own)
        return losses, dW, dV


def train_together(
    models: Sequence[Model], data: Comparisons, checkpoint: "Checkpoint | None" = None
) -> list[tuple[Tensor, Tensor]]:
    """(W, V) of models of one kind, with the same iterations, learning rate and optimiser, on the
    comparisons of all users, or this process's share. Each follows the trajectory that it follows
    alone; an optimiser whose update mixes entries (LBFGS) trains one after the other."""
    optimizer = make_optimizer(models[0].optimizer, [torch.zeros(1)], 0.1)
    if isinstance(optimizer, ELEMENTWISE) or len(models) == 1:
        return Training(models, data).fit(checkpoint)
    alone = "this optimiser needs all users in one process: use Adam, AdamW or SGD"
    require(models[0].processes == 1, alone)
    return [Training([model], data).fit(None)[0] for model in models]


def _step(optimizer: Optimizer, gradients: Callable[[], Tensor]) -> Tensor:
    """One step of any optimiser; returns the objectives [M] at the point it started from."""
    found: list[Tensor] = []

    def total() -> Tensor:
        found.append(gradients())
        return found[-1].sum()

    optimizer.step(total)
    return found[0]


def fit_weights(
    Z: Tensor, users: Users, logits: Tensor, loss: Loss, *, num_iterations: int = 500,
    learning_rate: float = 0.1, optimizer: OptimizerFactory | None = None, shrinkage: float = 0.0,
    population: Tensor | None = None, progress: bool = False,
) -> Tensor:  # fmt: skip
    """Weights [U, K] on the simplex for a fixed basis (eq. 11): each user's minimise the mean loss
    of that user's products z^T w, from initial logits [U, K] and comparisons Z = X V [N, K].

    ``shrinkage`` pulls towards the ``population``'s weights [K], in comparisons.
    """
    require(not shrinkage or population is not None, "shrinkage needs the population's weights")
    logits, ranks = logits.detach().to(Z, copy=True), [Z.shape[1]]
    per_comparison = 1 / users.user_weight()
    c = (users.weight * per_comparison[users.user]).to(Z)
    target = strength = None
    if shrinkage:
        target, strength = population.to(Z), shrinkage * per_comparison.to(Z)[:, None]

    def gradient() -> Tensor:
        products = logits.softmax(1).index_select(0, users.user).mul_(Z)  # new memory costs more
        products = products @ products.new_ones(Z.shape[1])  # faster than sums over few columns
        total, slope = loss_and_slope(loss, products[:, None], c)
        dW = users.sum(Z, slope[:, 0])
        logits.grad, pulls = logits_gradient(logits, dW, ranks, target, strength)
        return total + pulls

    steps = make_optimizer(optimizer, [logits], learning_rate)
    hidden = not progress or None  # None is as stderr is: no bars where that is no terminal
    for _ in tqdm(range(num_iterations), "users' weights", disable=hidden, leave=False):
        steps.step(gradient)
    require(bool(logits.isfinite().all()), f"in the fit of users' weights {DIVERGED}")
    return logits.softmax(1)


def own_directions(
    data: Comparisons, loss: Loss, num_iterations: int = 1000, learning_rate: float = 0.5,
    optimizer: OptimizerFactory | None = None, progress: bool = False,
) -> Tensor:  # fmt: skip
    """Every user's own reward direction [U, F], from zero; ``data`` is held in memory, ``loss`` is
    of the products x^T v."""

    def fit(part: Comparisons) -> Tensor:
        x = part.features.x.float()
        V = x.new_zeros(part.num_users, x.shape[1])
        c = (part.weight / part.user_weight()[part.user]).to(x)
        steps = make_optimizer(optimizer, [V], learning_rate)

        def gradient() -> Tensor:
            losses, slope = loss_and_slope(loss, part.dots(x, V[:, None]), c)
            V.grad = part.sums(x, slope)[:, 0]
            return losses.sum()

        for _ in range(num_iterations):
            steps.step(gradient)
        require(bool(V.isfinite().all()), f"in the fit of users' own models {DIVERGED}")
        return V

    parts = [part for _, _, part in data.parts(2, CACHE_BYTES)]
    bar = tqdm(parts, "own models", leave=False, disable=not progress or None)
    return torch.cat([fit(part) for part in bar])


@dataclass
class Checkpoint:
    """The last two states of a training in ``path.<process>.<step>.pt``, so that a killed one goes
    on, from the last step that all processes have; also on another device, or streamed."""

    path: Path
    every: int = 200  # steps

    def tick(self, training: Training, step: int) -> None:
        """Keep the state after a step, if it is time; InputError if it holds NaN or infinity."""
        if step % self.every:
            return
        training.check_finite(step)
        state = {
            "identity": _identity(training), "step": step, "losses": training.losses[:step].clone(),
            "logits": training.logits, "V": training.V,
            "optimizers": [o.state_dict() for o in training.optimizers],
        }  # fmt: skip
        state["sha256"] = checksum(state)
        write_whole(self._file(step), lambda draft: torch.save(state, draft))
        for old in self._steps()[:-2]:
            self._file(old).unlink(missing_ok=True)

    def restore(self, training: Training) -> int:
        """Bring the training to the last kept state; returns the step to go on from. InputError if
        the state is damaged, or of other models, settings or data. Nothing is unpickled."""
        step = max(self._steps(), default=0)
        if training.models[0].processes > 1:
            last = torch.tensor(step, device=training.V.device)
            dist.all_reduce(last, op=dist.ReduceOp.MIN)
            step = int(last)
        if step == 0:
            return 0
        file = self._file(step)
        remedy = "remove it to go on from an earlier state, or from the start"
        try:
            state = torch.load(file, weights_only=True, map_location="cpu")  # Adam counts there
            known = state.pop("sha256")
            whole = known == checksum(state) and state["step"] == step
        except Exception as error:  # torch names no common class for what a damaged file raises
            raise InputError(f"{file}: damaged; {remedy}") from error
        require(whole, f"{file}: is not as it was written; {remedy}")
        same = state["identity"] == _identity(training)
        require(same, f"{file}: belongs to a training with other settings or data; {remedy}")
        training.logits.copy_(state["logits"])
        training.V.copy_(state["V"])
        for optimizer, kept in zip(training.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        training.losses[:step] = state["losses"]
        log.info("going on from step %d of %s", step, file)
        return step

    def _file(self, step: int | str) -> Path:
        process = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return self.path.with_name(f"{self.path.name}.{process}.{step}.pt")

    def _steps(self) -> list[int]:
        """Steps of the kept states; a file of another name is none of them."""
        files = self.path.parent.glob(self._file("*").name)
        return sorted(int(n) for n in (file.name.split(".")[-2] for file in files) if n.isdecimal())


def _identity(training: Training) -> dict[str, Any]:
    """What must agree for a kept state to be of this training, wherever it computes."""
    data, lead = training.data, training.models[0]
    return {
        "kind": type(lead).__name__,
        "models": [(m.rank, m.alpha, m.shrinkage) for m in training.models],
        "iterations": lead.num_iterations,
        "optimizer": str(make_optimizer(lead.optimizer, [torch.zeros(1)], lead.learning_rate)),
        "users": (training.own_rows.start, training.own_rows.stop, lead.num_classes),
        "comparisons": (len(data), data.num_features, f"{float(data.weight.sum()):.9g}"),
        "start": float(sum(m.V0.double().sum() + m.W0.double().sum() for m in training.models)),
    }
