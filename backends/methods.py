"""Former ways: from a predictor's recipe, or a solver's name, to the `Method` that samples."""

from dataclasses import dataclass, replace

from backends.base import NoiseLevels
from backends.generate import Method
from backends.load import check_fit
from solvers.epd import MultistepTable
from solvers.predictor import Predictor, recipe_sigmas
from solvers.sampler import SOLVERS, SolverOptions, make_solver, parse_name

__all__ = ["HandMade", "check_fit", "predictor_method", "recipe_sigmas", "sequential_calls"]


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
        sigmas = levels.grid(self.schedule_type or usual, self.num_steps, rho=self.schedule_rho)
        return Method(sigmas=sigmas, solver=self.solver, options=options, afs=self.afs)


def sequential_calls(method: Method) -> int:
    """Network calls one after another for an image (guidance doubles rows, not calls)."""
    if isinstance(method.table, MultistepTable):
        return len(method.sigmas) - 1 + method.denoise_to_zero
    base = SOLVERS[parse_name(method.solver)[0]].calls
    calls = base + 1 if method.table else base
    return calls * (len(method.sigmas) - 1) - method.afs + method.denoise_to_zero
