"""VPL's network, and the contexts it is trained on.

Shape letters: F features, H hidden units, L latent, R distinct rows, G contexts, n comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from lore.learning.comparisons import Comparisons, Pairs, Users
from lore.methods.fitting.networks import batches, distinct, linear


class Groups:
    """Training comparisons of one user at a time, with a context of the same user's others.

    Args:
        data: training comparisons.
        most: comparisons of a group at most, and at most a quarter of the user's.
        sizes: least and greatest size of a context, equally likely; smaller where a user has few.
    """

    def __init__(self, data: Comparisons, most: int, sizes: tuple[int, int]) -> None:
        self.rows = torch.arange(len(data)).split(data.counts.tolist())
        self.dialogs = None if data.dialogs is None else data.dialogs.cpu()
        self.most, self.sizes, self.device = most, sizes, data.device

    def epoch(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
        """Every comparison once: targets [n], their groups [n], contexts [c], sizes [G] of these.

        Args:
            size: groups in a batch.
            generator: of order and contexts.
        """
        groups = [
            (rows, rows[places])
            for rows in self.rows
            for places in batches(len(rows), max(1, min(self.most, len(rows) // 4)), generator)
        ]
        for some in batches(len(groups), size, generator):
            picked = [groups[i] for i in some.tolist()]
            targets = [own for _, own in picked]
            contexts = [self._context(rows, own, generator) for rows, own in picked]
            group, counts = Users(list(map(len, targets))).user, list(map(len, contexts))
            parts = torch.cat(targets), group, torch.cat(contexts), torch.tensor(counts)
            yield tuple(part.to(self.device) for part in parts)

    def _context(self, rows: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Some of a user's comparisons, of other dialogues than the targets' if there are any."""
        low, high = self.sizes
        size = int(torch.randint(low, high + 1, (1,), generator=generator))
        others = rows[~torch.isin(rows, targets)]
        if self.dialogs is not None:
            apart = ~torch.isin(self.dialogs[others], self.dialogs[targets])
            others = others[apart] if bool(apart.any()) else others
        return others[torch.randperm(len(others), generator=generator)[:size]]


class Net(nn.Module):
    """Encoder of contexts and decoder of rewards.

    Each begins with a layer that is linear in the embedding; ``first`` forms these products for
    distinct rows, and everything else starts from them.

    Args:
        features, hidden, latent: F, H, L; without a latent there is no encoder.
        generator: of initial values.
    """

    def __init__(
        self, features: int, hidden: int, latent: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        F, H, L, g = features, hidden, latent, generator
        self.latent = L
        self.item = linear(F, H, g, fan=F + L)
        self.hidden, self.reward = linear(H, H, g), linear(H, 1, g)
        if L:
            self.taste = linear(L, H, g, bias=False, fan=F + L)
            self.chosen = linear(F, H, g, fan=2 * F)
            self.rejected = linear(F, H, g, bias=False, fan=2 * F)
            self.pair_hidden, self.pair = linear(H, H, g), linear(H, L, g)
            self.query, self.key, self.value = (linear(L, L, g) for _ in range(3))
            self.mean, self.log_variance = linear(L, L, g), linear(L, L, g)

    def first(self, e: Tensor) -> Tensor:
        """First-layer products of rows e [R, F]: item, chosen and rejected below each other
        [R, 3 H]; of the item alone [R, H] without a latent."""
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

    def decode(self, first: Pairs, z: Tensor | None, group: Tensor | None) -> Tensor:
        """Difference of rewards [n] between chosen and rejected, the latents being z [G, L]."""
        items = first.values[:, : self.hidden.in_features]
        taste = 0 if z is None else self.taste(z)[group]
        chosen, rejected = (
            self.reward(leaky_relu(self.hidden(leaky_relu(items[side] + taste, 0.2)), 0.2))[:, 0]
            for side in (first.chosen, first.rejected)
        )
        return chosen - rejected

    def plain(self, pairs: Pairs) -> Tensor:
        """Logits [n] without a latent, from scaled rows."""
        rows, (chosen, rejected) = distinct(pairs.chosen, pairs.rejected)
        return self.decode(Pairs(self.first(pairs.values[rows]), chosen, rejected), None, None)

    def forward(
        self, pairs: Pairs, targets: Tensor, group: Tensor, contexts: Tensor, counts: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Logits [n] of targets with latents drawn from their contexts, and the mean KL term."""
        some = pairs[torch.cat([targets, contexts])]
        rows, (chosen, rejected) = distinct(some.chosen, some.rejected)
        first, n = Pairs(self.first(pairs.values[rows]), chosen, rejected), len(targets)
        place = torch.arange(len(chosen), device=chosen.device)
        mean, log_variance = self.encode(first[place[n:]], counts)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        known = (counts > 0).float()[:, None]
        z = on_sphere(mean + (log_variance / 2).exp() * noise) * known
        kl = divergence(mean, log_variance) * known[:, 0]
        return self.decode(first[place[:n]], z, group), kl[group].mean()


def on_sphere(z: Tensor) -> Tensor:
    """Latents [G, L] scaled to norm sqrt(L); 0 stays 0."""
    return z * (math.sqrt(z.shape[1]) / z.norm(dim=1, keepdim=True).clamp(min=1e-12))


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence from N(0, I) of the latents [G]."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
