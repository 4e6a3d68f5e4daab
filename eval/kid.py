"""Distances between two sets of features that need the features themselves.

Kernel distance (Binkowski et al. 2018, arXiv:1801.01401) and precision and recall (Kynkaanniemi
et al. 2019, arXiv:1904.06991). Computed in float64, block by block, on the features' device.

Shapes: x [M, D] and y [N, D], M and N images, D features.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from src.intervals import Estimate

ROWS = 1024  # of a block; memory is ROWS times the larger set
NEIGHBOURS = 3
NORMAL_95 = 1.959963984540054


def kernel_distance(x: Tensor, y: Tensor, *, rows: int = ROWS) -> Estimate:
    """The squared maximum mean discrepancy under k(a, b) = (a . b / D + 1)^3.

    The unbiased U-statistic over all pairs, where the published code averages it over random
    subsets: the same expectation with less noise, and nothing drawn. It may fall below zero. The
    interval is normal, by the jackknife over the images of both sets, whose variance is not
    too small in expectation (Efron & Stein 1981). Raises ValueError for fewer than 3 images.
    """
    check_pair(x, y, 3)
    x, y = x.double(), y.double()
    m, n = len(x), len(y)
    xx, _ = kernel_sums(x, x, rows)
    yy, _ = kernel_sums(y, y, rows)
    xy, yx = kernel_sums(x, y, rows)
    xx, yy = xx - own_kernel(x), yy - own_kernel(y)
    within_x, within_y, between = xx.sum(), yy.sum(), xy.sum()
    mean_x, mean_y, mean_xy = within_x / (m * (m - 1)), within_y / (n * (n - 1)), between / (m * n)
    value = mean_x + mean_y - 2 * mean_xy
    less_x = (within_x - 2 * xx) / ((m - 1) * (m - 2)) - 2 * (between - xy) / ((m - 1) * n)
    less_y = (within_y - 2 * yy) / ((n - 1) * (n - 2)) - 2 * (between - yx) / (m * (n - 1))
    error = (spread(less_x) + spread(less_y)).sqrt()
    half = NORMAL_95 * error.item()
    return Estimate(value.item(), value.item() - half, value.item() + half)


def own_kernel(x: Tensor) -> Tensor:
    """k(x_i, x_i) [M]."""
    return (x.square().sum(1) / x.shape[1] + 1) ** 3


def kernel_sums(x: Tensor, y: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """sum_j k(x_i, y_j) [M] and sum_i k(x_i, y_j) [N]."""
    over_y, over_x = [], y.new_zeros(len(y))
    for part in x.split(rows):
        block = (part @ y.T / x.shape[1] + 1) ** 3
        over_y.append(block.sum(1))
        over_x += block.sum(0)
    return torch.cat(over_y), over_x


def spread(without_one: Tensor) -> Tensor:
    """The jackknife's variance of a mean: (n - 1) / n sum (t_i - mean t)^2."""
    n = len(without_one)
    return (without_one - without_one.mean()).square().sum() * (n - 1) / n


def precision_recall(
    generated: Tensor, real: Tensor, *, k: int = NEIGHBOURS, rows: int = ROWS
) -> tuple[float, float]:
    """The shares of generated images near real ones, and of real ones near generated ones.

    Near is within the ball of one of the others, which reaches its k-th nearest neighbour in
    its own set. Raises ValueError for k images or fewer.
    """
    check_pair(generated, real, k + 1)
    generated, real = generated.double(), real.double()
    near_real = covered(generated, real, radii(real, k, rows), rows)
    near_generated = covered(real, generated, radii(generated, k, rows), rows)
    return near_real, near_generated


def radii(x: Tensor, k: int, rows: int) -> Tensor:
    """The squared distance [M] of each to its k-th nearest other."""
    found = []
    for start, block in squared_distances(x, x, rows):
        place = torch.arange(len(block), device=x.device)
        block[place, place + start] = torch.inf
        found.append(block.kthvalue(k, 1).values)
    return torch.cat(found)


def covered(x: Tensor, y: Tensor, reach: Tensor, rows: int) -> float:
    """The share of x within the squared `reach` [N] of some y."""
    inside = sum(int((d <= reach).any(1).sum()) for _, d in squared_distances(x, y, rows))
    return inside / len(x)


def squared_distances(x: Tensor, y: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    """|x_i - y_j|^2 in blocks [rows, N], each with the place of its first row."""
    norms = y.square().sum(1)
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        block = part.square().sum(1, keepdim=True) + norms - 2 * part @ y.T
        yield start, block.clamp(min=0)


def check_pair(x: Tensor, y: Tensor, least: int) -> None:
    """ValueError unless both are features of one size, finite, `least` or more."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features {list(x.shape)} and {list(y.shape)} are of two kinds")
    if min(len(x), len(y)) < least:
        raise ValueError(f"this needs {least} images of each set, not {len(x)} and {len(y)}")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("the features hold NaN or infinity")
