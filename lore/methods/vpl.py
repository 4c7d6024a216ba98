"""VPL (Poddar, Wan, Ivison, Gupta, Jaques, NeurIPS 2024) on fixed embeddings, in single precision:
an encoder reads a user's comparisons into a latent vector, on which the reward depends. U users,
N comparisons, n of a batch, F features, H hidden units, L latent, R rows, G contexts."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, softplus

from lore.common.settings import Epochs, Latent, NonNegativeFloat, Width
from lore.learning.comparisons import Comparisons, Pairs, Seed, Users
from lore.learning.method import Task
from lore.methods.fitting import networks
from lore.methods.fitting.networks import Grid, Network, Networked, batches, linear, outputs
from lore.methods.fitting.validation import HeldOut, hold_out

ACTIVE = 0.005  # variance over users from which a unit of the latent is active
CYCLE = 10_000  # steps of the published cyclical weight of the KL term
UNITS, CONTEXT, BATCH, EPOCHS = 512, 8, 32, 2  # published, as are:
RATE, DECAY, WARM_UP = 1e-4, 1e-3, 0.03


class FittedVPL(Network):
    """A fitted VPL. A user's state is the mean [L] of the latent given that user's comparisons, the
    population's is 0; with ``variant`` 1 states are put on the sphere of the training."""

    def __init__(self, method: "VPL", data: Comparisons, beta: float, task: Task) -> None:
        super().__init__("VPL", method, data, task)
        hidden = method.hidden or (UNITS if self.faithful else 64)
        latent = method.latent if method.latent >= 0 else (UNITS if self.faithful else 32)
        self.net = Net(data.num_features, hidden, latent, self.generator).to(data.device)
        self.outputs, self.batch = self.net.first, BATCH if self.faithful else 64
        self.population_state = torch.zeros(latent, device=data.device)
        self.beta, self.seed, self.steps = beta, task.seed, itertools.count()
        self.longest = max(1, *task.shots) if task.shots else 50  # context

    def optimizer(self) -> torch.optim.Optimizer:
        rate, decay = (RATE, DECAY) if self.faithful else (3e-3, 1e-2)
        return torch.optim.AdamW(self.net.parameters(), lr=rate, weight_decay=decay)

    def share(self, step: int, total: int) -> float:
        warm = max(1, round(WARM_UP * total))
        return networks.cosine(step, warm, total) if self.faithful else 1.0

    def losses_of_pass(self, data: Comparisons, pairs: Pairs, weight: Tensor) -> Iterator[Tensor]:
        g, faithful = self.generator, self.faithful
        if not self.net.latent:
            for some in batches(len(data), self.batch, g):
                some = some.to(data.device)
                first, nobody = outputs(self.outputs, pairs[some]), torch.zeros_like(some)
                logits = self.net.decode(first, self.population_state[None], nobody)
                yield weight[some] @ softplus(-logits) / len(some)
            return
        most, sizes, batch = (1, (1, CONTEXT), BATCH) if faithful else (16, (0, self.longest), 8)
        for targets, *others in grouped(data, most, sizes, batch, g):
            logits, kl = self.net(pairs, targets, *others, g)
            turn = math.cos(math.pi * (next(self.steps) % CYCLE) / CYCLE)
            slope = 0.1 + 0.9 * (1 - turn) / 2 if faithful else 1.0  # up, again and again
            yield weight[targets] @ softplus(-logits) / len(targets) + self.beta * slope * kl

    def states(self, data: Comparisons) -> Tensor:
        return self.adapt(self.view(data), data, self.seed)

    def train(self, data: Comparisons, held: HeldOut | None, epochs: int) -> None:
        """Train, and read how much of the latent is alive: accuracy on some training comparisons
        with contexts of others: a user's own, the same swapped, another user's, none. A collapsed
        latent makes no difference."""
        super().train(data, held, epochs)
        self.latents, view, seed = {}, self.view(data), self.seed
        if not self.net.latent:
            return
        kl = divergence(*self._latents(view, data)).mean()
        active = (self.users.var(0) > ACTIVE).sum() if len(self.users) > 1 else 0
        self.latents = {"active_units": int(active), "units": self.net.latent, "kl": float(kl)}
        parts = hold_out(data, seed)
        if parts.held is None:
            return
        context, held = self.view(parts.fit), self.view(parts.held)
        swapped = Pairs(context.values, context.rejected, context.chosen)
        own, other = (self.adapt(each, parts.fit, seed) for each in (context, swapped))
        states = {"own": own, "swapped": other, "another": own.roll(1, 0), "none": 0 * own}
        for name, state in states.items():
            logits = self.logits(held, state[parts.whose.to(own.device)], parts.held.user)
            accuracy = float(parts.held.accuracies(logits).mean())
            self.latents[f"accuracy_{name}_context"] = accuracy

    def describe(self) -> dict[str, Any]:
        return super().describe() | self.latents

    def note(self) -> str:
        about = "; {active_units} of {units} latent units active, training accuracy "
        about += "{accuracy_own_context:.1%} with a user's context, "
        about += "{accuracy_swapped_context:.1%} with it swapped"
        known = "accuracy_own_context" in self.latents
        return super().note() + (about.format(**self.latents) if known else "")

    @torch.no_grad()
    def adapt(self, view: Pairs, users: Users, seed: Seed) -> Tensor:
        """Means [U', L] of the latents, by one pass through the encoder."""
        if not self.net.latent or len(users) == 0:
            return self.population_state.repeat(users.num_users, 1)
        means = self._latents(view, users)[0]
        return torch.where(users.counts[:, None] > 0, means, self.population_state)

    def _latents(self, view: Pairs, users: Users) -> list[Tensor]:
        some = users.user_blocks(networks.BLOCK, padded=True)
        parts = [self.net.encode(view[rows], users.counts[who]) for who, rows in some]
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    @torch.no_grad()
    def logits(self, view: Pairs, state: Tensor, user: Tensor) -> Tensor:
        """Difference of the decoder's rewards [N]."""
        z = on_sphere(state) if self.variant else state
        parts = torch.arange(len(view), device=user.device).split(1 << 16)
        return torch.cat([self.net.decode(view[some], z, user[some]) for some in parts])


def grouped(
    data: Comparisons, most: int, sizes: tuple[int, int], batch: int, generator: torch.Generator
) -> Iterator[list[Tensor]]:
    """Every comparison once, ``batch`` groups at a time: targets [n], their groups [n], contexts
    [c] and the sizes of these [G]. A group are at most ``most`` comparisons, or a quarter, of a
    user; its context are others of the user, from the first to the second of ``sizes`` many."""
    groups = [
        (rows, rows[places])
        for rows in torch.arange(len(data)).split(data.counts.tolist())
        for places in batches(len(rows), max(1, min(most, len(rows) // 4)), generator)
    ]
    dialogs = torch.arange(len(data)) if data.dialogs is None else data.dialogs.cpu()
    for some in batches(len(groups), batch, generator):
        picked = [groups[i] for i in some.tolist()]
        targets = [own for _, own in picked]
        contexts = [_context(*group, dialogs, sizes, generator) for group in picked]
        group, counts = Users(list(map(len, targets))).user, list(map(len, contexts))
        parts = torch.cat(targets), group, torch.cat(contexts), torch.tensor(counts)
        yield [part.to(data.device) for part in parts]


def _context(
    rows: Tensor, targets: Tensor, dialogs: Tensor, sizes: tuple[int, int], g: torch.Generator
) -> Tensor:
    """Some of a user's comparisons, of other dialogues than the targets' if there are any."""
    size = int(torch.randint(sizes[0], sizes[1] + 1, (1,), generator=g))
    others = rows[~torch.isin(rows, targets)]
    apart = others[~torch.isin(dialogs[others], dialogs[targets])]
    others = apart if len(apart) else others
    return others[torch.randperm(len(others), generator=g)[:size]]


class Net(nn.Module):
    """Encoder of contexts, where there is a latent, and decoder of rewards. Each begins with a
    layer that is linear in the embedding, whose products ``first`` forms."""

    def __init__(self, F: int, H: int, L: int, g: torch.Generator) -> None:
        super().__init__()
        self.latent = L
        self.item = linear(F, H, g, fan=F + L)
        self.hidden, self.reward = linear(H, H, g), linear(H, 1, g)
        self.taste = linear(L, H, g, bias=False, fan=F + L)
        if L:
            self.chosen = linear(F, H, g, fan=2 * F)
            self.rejected = linear(F, H, g, bias=False, fan=2 * F)
            self.pair_hidden, self.pair = linear(H, H, g), linear(H, L, g)
            self.query, self.key, self.value = (linear(L, L, g) for _ in range(3))
            self.mean, self.log_variance = linear(L, L, g), linear(L, L, g)

    def first(self, e: Tensor) -> Tensor:
        """First-layer products of rows e [R, F]: [R, 3 H], or the item's [R, H] if no latent."""
        layers = [self.item, self.chosen, self.rejected] if self.latent else [self.item]
        return torch.cat([layer(e) for layer in layers], 1)

    def encode(self, first: Pairs, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [G, L] of the latent, from contexts of so many comparisons [G]."""
        _, chosen, rejected = first.values.chunk(3, 1)
        h = leaky_relu(chosen[first.chosen] + rejected[first.rejected], 0.2)
        h = self.pair(leaky_relu(self.pair_hidden(h), 0.2))
        place = torch.arange(max(1, int(counts.max())), device=counts.device)
        real = place < counts[:, None]
        padded = h.new_zeros(*real.shape, self.latent)
        padded[real] = h
        scores = self.query(padded) @ self.key(padded).mT / math.sqrt(self.latent)
        attention = scores.masked_fill(~real[:, None], -1e9).softmax(2)  # finite if all is empty
        read = (attention @ self.value(padded)) * real[:, :, None]
        o = read.sum(1) / counts.clamp(min=1)[:, None]
        return self.mean(o).clamp(-1, 1), self.log_variance(o).clamp(-1, 1)

    def decode(self, first: Pairs, z: Tensor, group: Tensor) -> Tensor:
        """Difference of rewards [n] between chosen and rejected, the latents being z [G, L]."""
        items = first.values[:, : self.hidden.in_features]
        taste = self.taste(z)[group]
        chosen, rejected = (
            self.reward(leaky_relu(self.hidden(leaky_relu(items[side] + taste, 0.2)), 0.2))[:, 0]
            for side in (first.chosen, first.rejected)
        )
        return chosen - rejected

    def forward(
        self, pairs: Pairs, targets: Tensor, group: Tensor, contexts: Tensor, counts: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Logits [n] of targets with latents drawn from their contexts, and the mean KL term."""
        first, n = outputs(self.first, pairs[torch.cat([targets, contexts])]), len(targets)
        mean, log_variance = self.encode(first[n:], counts)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        known = (counts > 0).float()[:, None]
        z = on_sphere(mean + (log_variance / 2).exp() * noise) * known
        kl = divergence(mean, log_variance) * known[:, 0]
        return self.decode(first[:n], z, group), kl[group].mean()


def on_sphere(z: Tensor) -> Tensor:
    """Latents [G, L] scaled to norm sqrt(L); 0 stays 0."""
    return z * (math.sqrt(z.shape[1]) / z.norm(dim=1, keepdim=True).clamp(min=1e-12))


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence from N(0, I) of the latents [G]."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2


@dataclass(frozen=True)
class VPL(Networked):
    """VPL, repaired.

    ``faithful`` keeps the published constants, as above: rows as they are, a cosine rate, the KL
    term times the first of ``betas`` on a rising cycle; the latent lies on a sphere in training and
    not afterwards. ``converged`` scales rows, draws contexts of 0 to the largest number of shots,
    which up to 16 comparisons share, trains until the held-out log loss falls no more, and tries
    the sphere afterwards too. Without a context the latent is 0.

    Args:
        betas: weights of the KL term to try; ``faithful`` takes the first.
        hidden: hidden units H; 0 for 512 if faithful, else 64.
        latent: units L of the latent; -1 for 512 if faithful, else 32; 0 for none, which leaves
            Bradley-Terry on a network.
        epochs: passes over the data, at most; 0 for 2 if faithful, else 60.
    """

    betas: tuple[NonNegativeFloat, ...] = (3e-6, 3e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    hidden: Width = 0
    latent: Latent = -1
    epochs: Epochs = 0
    network, passes = FittedVPL, EPOCHS

    @property
    def grid(self) -> Grid:
        """Betas, and whether states are put on the sphere; one of each without a latent."""
        count = None if self.latent else 1
        return ("beta", self.betas[:count]), ("sphere", (0.0, 1.0)[:count])
