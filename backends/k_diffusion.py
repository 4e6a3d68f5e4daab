"""Learned solvers in the style of k-diffusion, which ComfyUI's sampler nodes call.

The K points of a step are rows of one call, all samples at the first point, then all at the
second and so on: a model that repeats its conditions by tiling needs nothing else. A model that
keeps tensors of B rows (ComfyUI's masks) is called point by point.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import trange

from solvers.classic import Euler
from solvers.epd import EPD, Directions, MultistepTable, restarted
from solvers.field import Condition, Field
from solvers.integrate import Loop
from solvers.predictor import Predictor, levels_of, named_tensors
from solvers.process import FLOW, VE
from solvers.recipe import for_flow
from solvers.sampler import Sampler

KModel = Callable[..., Tensor]
"""(x [B, *], sigma [B], **extra_args) -> denoised [B, *]."""
Callback = Callable[[dict[str, Any]], object]
EVEN = (1 / 3, 2 / 3)
"""The places of a table that nobody learned."""
SAME_LEVEL = 0.01
"""By how much a level may differ from the one that a table was learned on."""


@torch.no_grad()
def sample_epd(
    model: KModel,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    predictor: Predictor | None = None,
    denoise_last: bool = True,
    points: str = "rows",
) -> Tensor:
    """x [B, *] at sigmas[0] -> x at sigmas[-1]; of no level or one, x as it is.

    A final 0 is a step by denoising alone, or, without `denoise_last`, stands for the last level
    before it. `callback` gets x, i, sigma, sigma_hat and denoised of every step; `disable` hides
    the bar. Without a predictor, two points a step at a third and two thirds on the log-sigma
    axis, with equal weights. `sigmas` may be a part of the predictor's own (`learned_sigmas`),
    one after another: then the rows of that part are taken. Levels that it was not learned on
    give a warning. points="sequence" asks for one point after another.

    Raises ValueError for levels that do not fall, another number of them than the predictor's,
    or a predictor that guides by itself.
    """
    grid = [float(sigma) for sigma in sigmas]
    to_image = bool(grid) and grid[-1] == 0
    grid = grid[:-1] if to_image and not denoise_last else grid
    if len(grid) < 2:
        return x
    loop = Loop.start(x)
    sampler = sampler_on(grid, predictor).at(loop.x)
    ask: Any = Field(Tiled(model, dict(extra_args or {}), len(x), points != "rows"))
    for i in trange(len(grid) - 1, disable=disable):
        loop = sampler.advance(ask, loop)
        if callback:
            now, sigma = loop.past[0], sigmas[i]
            # of x0 at the start of the step, without a call for the caller's sake; hosts give
            # the last one out as the image
            has_slope = "d" in vars(now) or not loop.slopes  # the free slope of afs costs none
            x0 = now.x0 if has_slope else now.x - now.sigma * loop.slopes[0]
            x0 = loop.x if to_image and i == len(grid) - 2 else x0
            report = {"i": i, "sigma": sigma, "sigma_hat": sigma, "x": now.x.squeeze(1)}
            callback(report | {"denoised": x0.squeeze(1)})
    return loop.x.squeeze(1)


def epd_sampler(predictor: Predictor) -> Callable[..., Tensor]:
    """`sample_epd` with this predictor, for callers that give its first six arguments alone."""
    return partial(sample_epd, predictor=predictor)


def learned_sigmas(predictor: Predictor) -> tuple[float, ...] | None:
    """The levels that a predictor was learned on; None where they are its model's alone."""
    levels = levels_of(predictor.recipe)
    return None if levels is None else predictor.sampler(levels).sigmas


def sampler_on(grid: list[float], predictor: Predictor | None) -> Sampler:
    """A predictor on a host's levels, or an even table; ValueError for another number of them."""
    steps = sum(sigma > 0 for sigma in grid) - 1
    if predictor is None:
        r = torch.tensor(EVEN, dtype=torch.float64).repeat(max(steps, 1), 1)
        one = torch.ones_like(r)
        return Sampler(EPD(Directions(r, one / len(EVEN), one, one)), tuple(grid))
    process = FLOW if for_flow(predictor.recipe) else VE
    if predictor.table.guidance is not None:
        raise ValueError("this predictor guides by itself, and here the host does")
    if not steps:  # what is left is to denoise
        return Sampler(Euler(), tuple(grid), process)
    own, rows = learned_sigmas(predictor), predictor.recipe.num_steps - 1

    def same(cut: int) -> bool:
        pairs = zip(grid, (own or ())[cut : cut + steps + 1], strict=False)
        return own is not None and all(math.isclose(a, b, rel_tol=SAME_LEVEL) for a, b in pairs)

    cuts = list(filter(same, range(rows - steps + 1)))
    if steps != rows and not cuts:
        raise ValueError(
            f"{steps + 1} levels above 0 for a predictor of {rows + 1}: take its own, "
            "learned_sigmas(predictor), or a part of them"
        )
    if not cuts:
        text = "none that are written down" if own is None else ", ".join(f"{s:.4g}" for s in own)
        warnings.warn(f"the predictor was learned on other levels: {text}", stacklevel=3)
    cut = cuts[0] if cuts else 0
    table = predictor.table
    if cut and isinstance(table, MultistepTable):
        table = restarted(table, cut)
    part = {name: t[cut : cut + steps] for name, t in named_tensors(table).items()}
    solver = replace(predictor.solver(process), table=replace(table, **part))
    return Sampler(solver, tuple(grid), process, predictor.recipe.afs and not cut)


@dataclass
class Tiled:
    """The model at k times the rows, its tensors of B rows repeated by tiling.

    Where it cannot be, as it keeps tensors of B rows itself, it is called for B rows at a time.
    """

    model: KModel
    extra_args: dict[str, Any]
    rows: int
    apart: bool = False

    def __call__(self, x: Tensor, sigma: Tensor, _cond: Condition | None) -> Tensor:
        """x [k * B, *] at sigma [k * B] -> x0."""
        k = len(x) // self.rows
        if k > 1 and not self.apart:
            tiled = {
                name: v.repeat(k, *[1] * (v.ndim - 1))
                if isinstance(v, Tensor) and v.ndim and len(v) == self.rows
                else v
                for name, v in self.extra_args.items()
            }
            try:
                return self.model(x, sigma, **tiled)
            except RuntimeError:  # shapes that do not meet, or no memory for so many rows
                self.apart = True
        parts = zip(x.split(self.rows), sigma.split(self.rows), strict=True)
        return torch.cat([self.model(*part, **self.extra_args) for part in parts])
