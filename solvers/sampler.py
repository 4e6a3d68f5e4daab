"""`Sampler`, all between noise and sample but the network, and solvers by name."""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from solvers.classic import DPM2, EDM, IPNDM, Euler, Heun, IPNDMv
from solvers.epd import EPD, ParallelMultistep, Table, step_rates
from solvers.exponential import DEIS, DPMpp, UniPC
from solvers.field import Field, Rates, Tally
from solvers.integrate import MAX_PAST, MAX_SLOPES, Loop, Point, Solver, Step, levels
from solvers.process import FLOW, VE, Level, Process
from solvers.schedules import NO_EXPONENT, NoiseLevels, one_of

LEARNED = (EPD, ParallelMultistep)


def no_noise(_index: int, x: Tensor) -> Tensor:
    """For a churn of 0, which draws none."""
    raise ValueError(f"churn needs a noise per sample for its {len(x)} samples")


@dataclass(frozen=True)
class SolverOptions:
    """What a named solver may be given; each takes what it has. Defaults are diffusers'."""

    order: int | None = None  # None: the solver's own default
    process: Process = VE
    predict_x0: bool = True
    lower_order_final: bool = True
    count_zero: bool = False
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    noise: Callable[[int, Tensor], Tensor] = no_noise


@dataclass(frozen=True)
class Entry:
    """A solver's class, its sequential calls an interval, and the orders it has."""

    kind: Callable[..., Solver]
    calls: int
    orders: tuple[int, ...]
    default_order: int


SOLVERS = {
    "euler": Entry(Euler, 1, (1,), 1),
    "heun": Entry(Heun, 2, (2,), 2),
    "edm": Entry(EDM, 2, (2,), 2),
    "dpm2": Entry(DPM2, 2, (2,), 2),
    "ipndm": Entry(IPNDM, 1, (1, 2, 3, 4), 3),
    "ipndm_v": Entry(IPNDMv, 1, (1, 2, 3, 4), 3),
    "dpmpp": Entry(DPMpp, 1, (1, 2, 3), 2),
    "deis": Entry(DEIS, 1, (1, 2, 3, 4), 3),
    "unipc": Entry(UniPC, 1, (1, 2, 3), 3),
}


def parse_name(name: str) -> tuple[str, int | None]:
    """The solver and the order in a name: ("dpmpp", 3) for "dpmpp-3", ("euler", None) for "euler".

    Raises ValueError for an unknown name.
    """
    base, dash, order = name.partition("-")
    one_of("solver", name if dash and not order.isdecimal() else base, tuple(SOLVERS))
    return base, int(order) if dash else None


def make_solver(name: str, options: SolverOptions | None = None) -> Solver:
    """The solver of that name ("ipndm", "dpmpp-3"); the order in the name wins over none.

    Raises ValueError for an unknown name, an order that it lacks, or two orders that disagree.
    """
    options = options or SolverOptions()
    base, named = parse_name(name)
    entry = SOLVERS[base]
    if named is not None and options.order not in (None, named):
        raise ValueError(f"solver {name!r} and order {options.order} disagree: give one of them")
    asked = options.order if named is None else named
    order = entry.default_order if asked is None else asked
    if order not in entry.orders:
        raise ValueError(f"{base} has the orders {entry.orders}, not {order}")
    taken = inspect.signature(entry.kind).parameters
    given = vars(options) | {"order": order}
    return entry.kind(**{name: value for name, value in given.items() if name in taken})


@dataclass(frozen=True)
class Sampler:
    """A solver on its grid: everything between noise and sample but the network.

    `sigmas` falls from the level of the noise; a last level of 0 is a step by denoising alone.
    `afs` replaces the first call by the analytic slope of the VE process, and `guidance_rate`
    (1 is none) is for whoever makes the field; `rates` of the steps take its place, and a table's
    guidance that of both. `grids` [B, N + 1] give each sample levels of its own between the first
    and the last. Raises ValueError for a grid that does not fall, or AFS on flow matching.
    """

    solver: Solver
    sigmas: tuple[float, ...]
    process: Process = VE
    afs: bool = False
    guidance_rate: float = 1.0
    rates: tuple[float, ...] | None = None
    grids: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", levels(self.sigmas))
        if self.afs and self.process == FLOW:
            raise ValueError("afs is for VE models: flow matching has no analytic first step")

    def states(self, field: Field, x: Tensor, *, detach: bool = False) -> Iterator[Tensor]:
        """The states x [B, *] at sigmas[1], sigmas[2], ..., from x at sigmas[0].

        x is standard normal noise times sigmas[0]; the state is float32 at least. A table moves
        to the device of x, once. At a last level of 0 it is what the network says the one before
        it. `detach` cuts the gradient between steps, so that each step learns alone.
        `field.tally` counts calls and rows.
        """
        loop, at = Loop.start(x), self.at(x)
        while loop.index < len(self.sigmas) - 1:
            loop = at.advance(field, loop)
            yield loop.x.squeeze(1)
            loop = loop.detached() if detach else loop

    def advance(self, field: Field, loop: Loop) -> Loop:
        """The loop after one step of `states`, for whoever cannot call the network from inside."""
        answers: list[Tensor] = []
        i, x, grid, rates = loop.index, loop.x, self.grid(loop.x[:, 0]), self.own_rates
        own = rates[min(i, len(rates) - 1)] if rates else field.rates
        field = replace(field, record=answers.append, rates=own)
        (sigma, sigma_next), last = grid[i : i + 2], self.sigmas[i + 1] == 0
        slope: Callable[..., Tensor] = self.process.free_slope if self.afs and i == 0 else field
        now = Point(sigma, x, partial(slope, x, sigma))
        if isinstance(self.solver, UniPC) and loop.step:
            now = self.solver.correct(loop.step, now)
        above_0 = grid[:-1] if self.sigmas[-1] == 0 else grid
        step = Step(i, above_0, now, sigma_next, loop.past, loop.slopes, self.sigmas[-1] == 0)
        begin = self.solver.churned(field, step) if isinstance(self.solver, EDM) and last else now
        x = begin.x0 if last else self.solver(field, step)
        points = [point for d in answers for point in d.split(1, 1)]  # of [B, K, *], oldest first
        slopes = (*reversed(points), *loop.slopes)[:MAX_SLOPES]
        return Loop(x, i + 1, (now, *loop.past)[:MAX_PAST], slopes, step)

    @property
    def table(self) -> Table | None:
        """The table of a learned solver."""
        return self.solver.table if isinstance(self.solver, LEARNED) else None

    def with_table(self, table: Table) -> "Sampler":
        """The sampler of a learned solver with another table."""
        solver: Any = self.solver
        return replace(self, solver=replace(solver, table=table))

    def at(self, x: Tensor) -> "Sampler":
        """The same sampler with its table where x is."""
        return self if self.table is None else self.with_table(self.table.to(x))

    def grid(self, x: Tensor) -> tuple[Level, ...]:
        """The levels of the samples x [B, *], floats where all have the same."""
        if self.grids is None:
            return self.sigmas
        inner = self.grids[:, 1:-1].to(x).reshape(len(x), -1, *[1] * x.ndim)
        return (self.sigmas[0], *inner.unbind(1), self.sigmas[-1])

    @property
    def own_rates(self) -> tuple[Rates, ...] | None:
        """The guidance rates of the steps' own slopes, where they are not `guidance_rate`."""
        rates = None if self.rates is None else tuple((rate,) for rate in self.rates)
        return (step_rates(self.table) if self.table else None) or rates

    @property
    def extreme_rates(self) -> tuple[float, float]:
        """The smallest and the largest guidance rate: a model has to take both."""
        rates = self.rates or (self.guidance_rate,)
        if self.table and self.table.guidance is not None:
            rates = self.table.guidance.flatten().tolist()
        return min(rates), max(rates)

    @property
    def calls(self) -> int:
        """The network calls one after another for an image; guidance widens calls, adds none."""
        return self.cost.calls

    @property
    def rows(self) -> int:
        """The network evaluations for an image: every point counts, guidance does not."""
        return self.cost.rows

    @cached_property
    def cost(self) -> Tally:
        """Calls and rows for an image, counted on a network that answers with nothing."""
        images = len(self.table.r) if self.table and self.table.r.ndim == 3 else 1
        sampler, field = self, Field(lambda x, _sigma, _cond: torch.zeros_like(x))
        if isinstance(self.solver, EDM):
            quiet = replace(self.solver, noise=lambda _index, x: torch.zeros_like(x))
            sampler = replace(self, solver=quiet)
        with torch.no_grad():
            list(sampler.states(field, torch.zeros(images, 1)))
        return Tally(field.tally.calls, field.tally.rows // images)

    def with_rates(self, rates: tuple[float, ...]) -> "Sampler":
        """The sampler at these guidance rates, one a step."""
        if self.table:
            guidance = torch.tensor(rates, dtype=torch.float64)
            return self.with_table(replace(self.table, guidance=guidance))
        return replace(self, rates=rates)


def hand_made(
    name: str,
    levels: NoiseLevels,
    num_steps: int,
    *,
    schedule: str | None = None,
    rho: float | None = None,
    afs: bool = False,
    guidance_rate: float = 1.0,
    options: SolverOptions | None = None,
) -> Sampler:
    """The sampler of a solver without a table ("dpmpp-3") on a network with these levels.

    num_steps are grid points. `schedule` None is the process's usual one, `rho` None the
    schedule's own. Raises ValueError for unknown names, for AFS on a flow model, and for an
    exponent (but 1) of a schedule that has none.
    """
    process = levels.process
    schedule = schedule or ("flowmatch" if process == FLOW else "polynomial")
    solver = make_solver(name, replace(options or SolverOptions(), process=process))
    if rho not in (None, 1) and schedule in NO_EXPONENT:
        raise ValueError(f"schedule_rho {rho:g} does nothing on {schedule}: leave it out")
    sigmas = tuple(levels.grid(schedule, num_steps, rho=rho).tolist())
    return Sampler(solver, sigmas, process, afs, guidance_rate)
