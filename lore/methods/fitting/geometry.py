"""The features' scale and leading directions, found by products with the features alone. Shape
letters: N comparisons, F features, D leading directions, C columns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lore.common.devices import sum_over_processes
from lore.common.files import require
from lore.learning.comparisons import Comparisons, DenseFeatures

DIRECTIONS = 64
ROUNDS = 4  # of the subspace iteration; the spectra of language models fall fast
PROBES = 16
SMALL = 1000  # features F of which an F x F matrix costs less than the passes it saves


@dataclass
class Geometry:
    """Second moments of the feature differences of N comparisons, of all processes.

    The mean of x x^T / scale^2, the scale being the root mean square norm of x, has leading
    eigenvalues [D], falling, eigenvectors [F, D], and a mean of the others, the rest. Features are
    stretched by 1 / sqrt(e + floor e_max) along the direction with eigenvalue e, and scaled back to
    a root mean square norm of 1; not if the floor is None.
    """

    scale: float
    values: Tensor
    directions: Tensor
    rest: float
    count: int
    floor: float | None = None

    def _spectrum(self) -> Tensor:
        """Eigenvalues [D + 1], the last one of the rest."""
        return torch.cat([self.values, self.values.new_tensor([self.rest])])

    def stretch(self) -> Tensor:
        """Factors along the leading directions and of the rest [D + 1], scale included."""
        e = self._spectrum()
        if self.floor is None:
            return torch.full_like(e, 1 / self.scale)
        factor = (e + self.floor * e[0]).rsqrt()
        many = torch.ones_like(e)
        many[-1] = len(self.directions) - len(self.values)
        return factor / ((many * e * factor.square()).sum().sqrt() * self.scale)

    def apply(self, factors: Tensor, V: Tensor) -> Tensor:
        """Matrices with these eigenvalues [D + 1, C], the last one of the rest, times V [F, C]."""
        Q = self.directions
        return factors[-1] * V + Q @ ((factors[:-1] - factors[-1]) * (Q.T @ V))

    def raw(self, V: Tensor) -> Tensor:
        """Directions V [F, C] among scaled and stretched features, as ones among raw features."""
        return V / self.scale if self.floor is None else self.apply(self.stretch()[:, None], V)

    def stretched(self, V: Tensor) -> Tensor:
        """Directions V [F, C] among raw features, as ones among scaled and stretched features."""
        return V * self.scale if self.floor is None else self.apply(1 / self.stretch()[:, None], V)

    def curvature(self) -> Tensor:
        """Eigenvalues [D + 1] of sum x x^T in the stretched features."""
        return self.count * self._spectrum() * (self.stretch() * self.scale).square()


def measure(data: Comparisons, processes: int = 1, directions: int = DIRECTIONS) -> Geometry:
    """Scale and leading directions of the differences, in about ten passes over the features.

    Randomised subspace iteration, then Rayleigh and Ritz (Halko, Martinsson and Tropp 2011); what
    the leading directions leave of the trace is estimated with random signs (Hutch++, Meyer et
    al. 2021), always the same, to about one per cent of the scale. An F x F matrix is formed only
    where F is small: else it takes 2 N F D operations a pass over this process's comparisons.
    InputError where all differences are zero.
    """
    generator = torch.Generator().manual_seed(0)
    F, D = data.num_features, min(directions, data.num_features)
    Q = torch.randn(F, min(F, D + 8), generator=generator).to(data.device)
    count = int(sum_over_processes(torch.tensor(float(len(data))), processes))

    whole = None  # one product, where it costs less than the passes below
    if isinstance(data.features, DenseFeatures) and F <= SMALL:
        whole = sum_over_processes(data.features.squared(), processes)

    def moment(V: Tensor) -> Tensor:
        if whole is not None:
            return whole @ V / count
        return sum_over_processes(data.backproject(data.project(V)), processes) / count

    Q = torch.linalg.qr(Q)[0]
    for _ in range(ROUNDS if Q.shape[1] < F else 0):
        Q = torch.linalg.qr(moment(Q))[0]
    values, vectors = torch.linalg.eigh((Q.T @ moment(Q)).double())
    values = values.flip(0)[:D].clamp(min=0)
    Q = torch.linalg.qr((Q.double() @ vectors.flip(1))[:, :D])[0]  # orthonormal in double too
    signs = torch.randint(2, (F, PROBES), generator=generator).to(Q) * 2 - 1
    signs = signs - Q @ (Q.T @ signs)
    left = 0.0 if D == F else float((signs * moment(signs.float()).double()).sum() / PROBES)
    square = float(values.sum()) + left
    require(square > 0, "the two embeddings of every training comparison are equal: the model does "
            "not tell these responses apart")  # fmt: skip
    rest = left / (F - D) / square if D < F else float(values[-1]) / square
    return Geometry(square**0.5, values / square, Q, rest, count)
