"""From a predictor's recipe, or a solver's name, to the `Method` that samples."""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from backends.base import Backend, NoiseLevels
from backends.generate import Method
from solvers.catalog import SOLVERS, SolverOptions, make_solver, parse_name
from solvers.multistep import MultistepTable
from solvers.predictor import Predictor
from solvers.recipe import FLOW_BACKENDS, Recipe, for_flow
from solvers.schedules import custom

SAME_SIZE = 0.1
"""By how much the side of a square of the same area may differ, for pictures in other ratios."""


def predictor_method(predictor: Predictor, levels: NoiseLevels) -> Method:
    """The method that a predictor was learned for, on a network with these levels.

    Raises ValueError where the two do not belong together.
    """
    recipe = predictor.recipe
    orders = SOLVERS[recipe.base].orders
    return Method(
        sigmas=recipe_sigmas(recipe, levels),
        solver=recipe.base,
        options=SolverOptions(
            order=recipe.max_order if len(orders) > 1 else None,
            process=levels.process,
            predict_x0=recipe.predict_x0,
            lower_order_final=recipe.lower_order_final,
        ),
        table=predictor.table,
        afs=recipe.afs,
        guidance_rate=recipe.guidance_rate,
    )


def recipe_sigmas(recipe: Recipe, levels: NoiseLevels) -> Tensor:
    """The recipe's grid [num_steps] on these levels; ValueError where it has none there."""
    if for_flow(recipe) != (levels.process.name == "flow"):
        model = f"a {levels.process.name} model"
        raise ValueError(
            f"a predictor for {recipe.backend} ({recipe.schedule_type}) is not for {model}"
        )
    if recipe.sigmas is not None:
        return custom(recipe.sigmas)
    shift = levels.shift if recipe.flowmatch_shift is None else recipe.flowmatch_shift
    mu = levels.mu if recipe.flowmatch_mu is None else recipe.flowmatch_mu
    return replace(levels, shift=shift, mu=mu).schedule(
        recipe.schedule_type,
        recipe.num_steps,
        rho=recipe.schedule_rho,
        sigma_min=recipe.sigma_min,
        sigma_max=recipe.sigma_max,
    )


@dataclass(frozen=True)
class HandMade:
    """A solver without a table, as a command line names it."""

    solver: str
    num_steps: int
    schedule_type: str | None = None  # None: the process's usual one
    schedule_rho: float | None = None  # None: the schedule's own default
    afs: bool = False

    def method(self, levels: NoiseLevels, options: SolverOptions | None = None) -> Method:
        """The method on a network with these levels; ValueError where they do not fit."""
        options = replace(options or SolverOptions(), process=levels.process)
        make_solver(self.solver, options)
        if self.afs and levels.process.name == "flow":
            raise ValueError("afs is for VE models: flow matching has no analytic first step")
        usual = "flowmatch" if levels.process.name == "flow" else "polynomial"
        sigmas = levels.schedule(
            self.schedule_type or usual, self.num_steps, rho=self.schedule_rho
        )
        return Method(sigmas=sigmas, solver=self.solver, options=options, afs=self.afs)


def sequential_calls(method: Method) -> int:
    """Network calls one after another for an image (guidance doubles rows, not calls)."""
    if isinstance(method.table, MultistepTable):
        return len(method.sigmas) - 1 + method.denoise_to_zero
    base = SOLVERS[parse_name(method.solver)[0]].calls
    calls = base + 1 if method.table else base
    return calls * (len(method.sigmas) - 1) - method.afs + method.denoise_to_zero


def check_fit(recipe: Recipe, backend: Backend) -> None:
    """ValueError where a predictor was learned at another resolution than the model's."""
    if recipe.backend == "ldm" or recipe.img_resolution is None:
        return  # the published recipes of LDMs give latents, or a size that is not theirs
    height, width = backend.image_size
    if math.isclose(math.sqrt(height * width), recipe.img_resolution, rel_tol=SAME_SIZE):
        return
    learned = f"the predictor is for {recipe.img_resolution} pixels ({recipe.dataset_name})"
    size = f"{width}" if height == width else f"{height}x{width}"
    flow = recipe.backend in FLOW_BACKENDS
    way = f"add --resolution {recipe.img_resolution}" if flow else "choose one of its size"
    raise ValueError(f"{learned}, the model makes {size}: {way}")
