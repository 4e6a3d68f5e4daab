"""Least squares by Gram matrices: the best K of G columns, weights free or on the simplex.

Columns are directions over all numbers of all samples; only their products are kept, so sums
over batches and ranks are sums of small matrices. M columns, the last one is the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

RIDGE = 1e-6
ROWS = 8
"""Samples that are multiplied at a time, in float64."""


def gram(columns: Sequence[Tensor]) -> Tensor:
    """The products [M, M], in float64 where they are, of M columns [B, k, *] counted by their k.

    A sample with a number that is not finite is left out. Nothing waits for a GPU.
    """
    total = columns[0].new_zeros((), dtype=torch.float64)
    for part in zip(*(c.split(ROWS) for c in columns), strict=True):
        flat = torch.cat([p.flatten(2) for p in part], 1).double()
        products = flat @ flat.mT
        good = products.isfinite().all(2, keepdim=True).all(1, keepdim=True)
        total = total + products.where(good, 0).sum(0)
    return total


@dataclass(frozen=True)
class Normal:
    """The quadratic error(c) = c A c - 2 q c + y of coefficients c."""

    a: Tensor  # [M, M]
    q: Tensor  # [M]
    y: Tensor  # []

    @classmethod
    def of(cls, products: Tensor) -> "Normal":
        """From the products of the columns, the target's last."""
        return cls(products[:-1, :-1], products[:-1, -1], products[-1, -1])

    def solve(self) -> Tensor:
        """The best coefficients [M], with a ridge relative to each column's own size."""
        return torch.linalg.lstsq(ridged(self.a), self.q[:, None]).solution[:, 0]

    def take(self, rows: Tensor) -> "Normal":
        """The same with fewer columns."""
        return Normal(self.a[rows][:, rows], self.q[rows], self.y)

    def without(self, held: Tensor, rest: Tensor) -> "Normal":
        """The columns `rest` after `held` have done what they can (a Schur complement)."""
        across = self.a[held][:, rest]
        inner = ridged(self.a[held][:, held])
        solved = torch.linalg.lstsq(inner, torch.cat([across, self.q[held, None]], 1)).solution
        a = self.a[rest][:, rest] - across.T @ solved[:, :-1]
        q = self.q[rest] - across.T @ solved[:, -1]
        return Normal(a, q, self.y - self.q[held] @ solved[:, -1])


def ridged(a: Tensor) -> Tensor:
    """A with its diagonal [..., M, M] raised by a part of itself."""
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    floor = diagonal.amax(-1, keepdim=True) * RIDGE * 1e-6 + 1e-300
    return a + torch.diag_embed(RIDGE * diagonal.clamp(min=0) + floor)


@dataclass(frozen=True)
class Mix:
    """Which columns, with what coefficients [K], and the error that is left."""

    columns: tuple[int, ...]
    coefficients: Tensor
    error: float


def best_free(normal: Normal, choices: Tensor) -> Mix:
    """The best of the choices [n, K] of columns with coefficients of any sign."""
    a, q = blocks(normal, choices)
    c = torch.linalg.solve(ridged(a), q[..., None])[..., 0]
    return pick(normal, choices, c)


def best_shares(normal: Normal, choices: Tensor, sums: tuple[float, float] = (1.0, 1.0)) -> Mix:
    """The best of the choices [n, K] with coefficients >= 0 whose sum lies within `sums`.

    Each face of the simplex is its own equality-constrained problem: a choice is good where
    its solution has no negative entry, and faces of fewer columns are choices of their own.
    """
    size, (low, high), mixes = choices.shape[1], sums, []
    for k in range(1, size + 1):
        faces = choices[:, list(combinations(range(size), k))].reshape(-1, k).unique(dim=0)
        a, q = blocks(normal, faces)
        inner = torch.linalg.solve(ridged(a), torch.stack([q, torch.ones_like(q)], -1))
        free, pull = inner[..., 0], inner[..., 1]
        for total in {low, high}:
            c = free + ((total - free.sum(-1)) / pull.sum(-1))[:, None] * pull
            mixes.append(pick(normal, faces, c, (c >= 0).all(-1)))
        inside = (free >= 0).all(-1) & (free.sum(-1) >= low) & (free.sum(-1) <= high)
        mixes.append(pick(normal, faces, free, inside))
    return min(mixes, key=lambda mix: mix.error)


def blocks(normal: Normal, choices: Tensor) -> tuple[Tensor, Tensor]:
    """The parts [n, K, K] and [n, K] of the choices."""
    return normal.a[choices[:, :, None], choices[:, None, :]], normal.q[choices]


def pick(normal: Normal, choices: Tensor, c: Tensor, allowed: Tensor | None = None) -> Mix:
    """The choice with the least error that is a number and allowed, at coefficients c [n, K]."""
    a, q = blocks(normal, choices)
    quadratic = (c[:, None, :] @ a @ c[:, :, None])[:, 0, 0]
    error = normal.y - 2 * (c * q).sum(-1) + quadratic
    good = error.isfinite() if allowed is None else error.isfinite() & allowed
    error = torch.where(good, error, torch.inf)
    best = int(error.argmin())
    return Mix(tuple(choices[best].tolist()), c[best], error[best].item())
