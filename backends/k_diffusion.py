"""EPD as a sampler in the style of k-diffusion, which ComfyUI's sampler nodes can call.

The K points of a step are rows of one call, all samples at the first point, then all at the
second and so on: a model that repeats its conditions by tiling needs to know nothing of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from solvers.epd import EPD, Directions, ParallelMultistep
from solvers.field import Condition, Field
from solvers.integrate import Solver, Step, integrate
from solvers.predictor import Predictor, for_flow
from solvers.process import FLOW, VE

Model = Callable[..., Tensor]
"""(x [B, *], sigma [B], **extra_args) -> denoised [B, *]."""
Callback = Callable[[dict[str, Any]], object]
EVEN = (1 / 3, 2 / 3)
"""The places of a table that nobody learned."""


@torch.no_grad()
def sample_epd(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    predictor: Predictor | None = None,
) -> Tensor:
    """x [B, *] at sigmas[0] -> x at sigmas[-1]; a final 0 is a step by denoising alone.

    `callback` gets x, i, sigma, sigma_hat and denoised of every step; `disable` hides the
    bar. Without a predictor, two points a step at a third and two thirds on the log-sigma axis,
    with equal weights. Raises ValueError where the predictor has another number of steps than
    `sigmas` has, the final 0 not counted, or learned an analytic first step.
    """
    if predictor and predictor.recipe.afs:
        raise ValueError("sample_epd asks the model at every step: this predictor has afs on")
    steps = int((sigmas > 0).sum()) - 1
    solver = solver_of(predictor) if predictor else EPD(even_table(steps))
    tell = partial(report, callback) if callback else None
    bar = tqdm(total=len(sigmas) - 1, disable=disable)
    denoiser = partial(tiled_call, model, dict(extra_args or {}), len(x))
    telling = Telling(replace(solver, table=solver.table.to(x)), tell)
    for i, state in enumerate(integrate(telling, Field(denoiser), x, sigmas)):
        if sigmas[i + 1] == 0 and tell:
            tell(i, x, float(sigmas[i]), state)
        x = state
        bar.update()
    bar.close()
    return x


def epd_sampler(predictor: Predictor) -> Callable[..., Tensor]:
    """`sample_epd` with this predictor, for callers that know its first six arguments alone."""
    return partial(sample_epd, predictor=predictor)


def solver_of(predictor: Predictor) -> EPD | ParallelMultistep:
    """A predictor's solver, for the process that it was learned for."""
    return predictor.solver(FLOW if for_flow(predictor.recipe) else VE)


def even_table(steps: int) -> Directions:
    """The same two points in every step, nothing learned."""
    r = torch.tensor(EVEN, dtype=torch.float64).repeat(steps, 1)
    one = torch.ones_like(r)
    return Directions(r, one / len(EVEN), one, one)


def tiled_call(
    model: Model,
    extra_args: Mapping[str, Any],
    b: int,
    x: Tensor,
    sigma: Tensor,
    _cond: Condition | None,
) -> Tensor:
    """The model at k times the rows, its tensors of B rows repeated by tiling."""
    k = len(x) // b
    arguments = {
        name: v.repeat(k, *[1] * (v.ndim - 1)) if is_rows(v, b) else v
        for name, v in extra_args.items()
    }
    return model(x, sigma, **arguments)


def is_rows(value: Any, b: int) -> bool:
    """Whether it is a tensor with a row for each of B samples."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == b


def report(callback: Callback, i: int, x: Tensor, sigma: float, denoised: Tensor) -> None:
    """Tell what k-diffusion's samplers tell."""
    callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})


@dataclass(frozen=True)
class Telling:
    """A solver that tells where it stands at every step."""

    solver: Solver
    tell: Callable[[int, Tensor, float, Tensor], None] | None

    def __call__(self, field: Field, step: Step) -> Tensor:
        following, now = self.solver(field, step), step.now
        if self.tell:
            known = now.x0 if "d" in vars(now) else now.x  # no call for the caller's sake
            self.tell(step.index, now.x.squeeze(1), now.sigma, known.squeeze(1))
        return following
