"""`Sampler`, all between noise and sample but the network, and solvers by name."""

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from solvers.classic import DPM2, EDM, IPNDM, Euler, Heun, IPNDMv
from solvers.epd import EPD, ParallelMultistep, step_rates
from solvers.exponential import DEIS, DPMpp, UniPC
from solvers.field import Condition, Field, Guided, Rates, Tally
from solvers.integrate import Loop, Solver, advance, integrate, levels
from solvers.process import VE, Level, Process
from solvers.schedules import NoiseLevels

Noise = Callable[[int, Tensor], Tensor]


def no_noise(_index: int, x: Tensor) -> Tensor:
    """For a churn of 0, which draws none."""
    raise ValueError(f"churn needs a noise per sample for its {len(x)} samples")


@dataclass(frozen=True)
class SolverOptions:
    """What a named solver can be told; each takes what it knows. Defaults are diffusers'."""

    order: int | None = None  # None: the solver's own default
    process: Process = VE
    predict_x0: bool = True
    lower_order_final: bool = True
    variant: Literal["bh1", "bh2"] = "bh2"
    deis_mode: Literal["tab", "rhoab"] = "tab"
    thresholding: bool = False
    r: float = 0.5
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = float("inf")
    s_noise: float = 1.0
    noise: Noise = no_noise


@dataclass(frozen=True)
class Entry:
    """A solver's constructor, its sequential calls an interval, and the orders it has."""

    make: Callable[[SolverOptions, int], Solver]
    calls: int
    orders: tuple[int, ...]
    default_order: int
    about: str


def make_exponential(kind: type[DPMpp] | type[UniPC]) -> Callable[[SolverOptions, int], Solver]:
    """A constructor of one of the solvers that are exact in the linear part."""

    def make(o: SolverOptions, order: int) -> Solver:
        solver = kind(
            order=order,  # pyright: ignore[reportArgumentType]
            predict_x0=o.predict_x0,
            lower_order_final=o.lower_order_final,
            process=o.process,
            thresholding=o.thresholding,
        )
        return replace(solver, variant=o.variant) if isinstance(solver, UniPC) else solver

    return make


SOLVERS = {
    "euler": Entry(lambda _o, _n: Euler(), 1, (1,), 1, "Euler, the same as DDIM"),
    "heun": Entry(lambda _o, _n: Heun(), 2, (2,), 2, "Heun, EDM without churn"),
    "edm": Entry(
        lambda o, _n: EDM(o.noise, o.s_churn, o.s_min, o.s_max, o.s_noise),
        2, (2,), 2, "Heun with EDM's churn",
    ),
    "dpm2": Entry(lambda o, _n: DPM2(o.r), 2, (2,), 2, "DPM-Solver-2, geometric midpoint"),
    "ipndm": Entry(lambda _o, n: IPNDM(n), 1, (1, 2, 3, 4), 3, "Adams-Bashforth, equal steps"),
    "ipndm_v": Entry(lambda _o, n: IPNDMv(n), 1, (1, 2, 3, 4), 3, "the same, variable steps"),
    "dpmpp": Entry(make_exponential(DPMpp), 1, (1, 2, 3), 2, "DPM-Solver++ multistep"),
    "deis": Entry(lambda o, n: DEIS(n, o.deis_mode), 1, (1, 2, 3, 4), 3, "DEIS (tab)"),  # pyright: ignore[reportArgumentType]
    "unipc": Entry(make_exponential(UniPC), 1, (1, 2, 3), 3, "UniPC, predictor and corrector"),
}  # fmt: skip


def parse_name(name: str) -> tuple[str, int | None]:
    """Split "dpmpp-3" into ("dpmpp", 3), "euler" into ("euler", None).

    Raises ValueError for an unknown name.
    """
    base, dash, order = name.partition("-")
    if base not in SOLVERS or (dash and not order.isdecimal()):
        near = difflib.get_close_matches(base, SOLVERS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(SOLVERS)}"
        raise ValueError(f"unknown solver {name!r}: {hint}")
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
    return entry.make(options, order)


def num_steps_for(name: str, nfe: int, afs: bool) -> int:
    """The grid size with which a solver makes `nfe` sequential calls; ValueError if none does."""
    calls = SOLVERS[parse_name(name)[0]].calls
    intervals, odd = divmod(nfe + afs, calls)
    if odd or intervals < 1:
        kind = "with" if afs else "without"
        raise ValueError(
            f"{name} makes {calls} calls an interval: {nfe} is not to be had {kind} afs"
        )
    return intervals + 1


@dataclass(frozen=True)
class Sampler:
    """A solver on its grid: everything between noise and sample but the network.

    `sigmas` falls from the level of the noise; a last level of 0 is a step by denoising alone.
    `afs` replaces the first call by the analytic slope of the VE process, and `guidance_rate`
    (1 is none) is for whoever makes the field; `rates` of the steps take its place, and a table's
    guidance that of both. `grids` [B, N + 1] give each sample levels of its own between the first
    and the last. Raises ValueError for a grid that does not fall.
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

    def states(self, field: Field, x: Tensor, *, detach: bool = False) -> Iterator[Tensor]:
        """The states x [B, *] at sigmas[1], sigmas[2], ..., from x at sigmas[0].

        x is standard normal noise times sigmas[0]. A table moves to the device of x, once.
        `detach` cuts the gradient between steps. `field.tally` counts calls and rows.
        """
        at = self.at(x)
        first, correct, rates = at.hooks()
        return integrate(
            at.solver,
            field,
            x,
            at.grid(x),
            first_slope=first,
            correct=correct,
            rates=rates,
            detach=detach,
        )

    def advance(self, field: Field, loop: Loop) -> Loop:
        """One step of `states`, for whoever cannot call the network from inside; see `Loop`."""
        at = self.at(loop.x)
        first, correct, rates = at.hooks()
        grid = at.grid(loop.x[:, 0])
        return advance(
            loop, at.solver, field, grid, first_slope=first, correct=correct, rates=rates
        )

    def at(self, x: Tensor) -> "Sampler":
        """The same with its table where x is."""
        if not isinstance(self.solver, EPD | ParallelMultistep):
            return self
        return replace(self, solver=replace(self.solver, table=self.solver.table.to(x)))

    def grid(self, x: Tensor) -> tuple[Level, ...]:
        """The levels of the samples x [B, *], floats where all have the same."""
        if self.grids is None:
            return self.sigmas
        inner = self.grids[:, 1:-1].to(x).reshape(len(x), -1, *[1] * x.ndim)
        return (self.sigmas[0], *inner.unbind(1), self.sigmas[-1])

    def hooks(self) -> tuple[Any, Any, tuple[Rates, ...] | None]:
        """What the loop is told besides: the free first slope, the corrector, rates by step."""
        rates = None if self.rates is None else tuple((rate,) for rate in self.rates)
        if isinstance(self.solver, EPD | ParallelMultistep):
            rates = step_rates(self.solver.table) or rates
        correct = self.solver.correct if isinstance(self.solver, UniPC) else None
        return self.process.first_slope if self.afs else None, correct, rates

    @property
    def own_rates(self) -> bool:
        """Whether steps or points have guidance rates of their own."""
        return self.rates is not None or self.hooks()[2] is not None

    @property
    def strongest(self) -> float:
        """The guidance rate that is furthest from 1, which says whether "nothing" is needed."""
        table = self.solver.table if isinstance(self.solver, EPD | ParallelMultistep) else None
        rates = [self.guidance_rate] if self.rates is None else self.rates
        if table is not None and table.guidance is not None:
            rates = table.guidance.flatten().tolist()
        return max(rates, key=lambda rate: abs(rate - 1))

    @property
    def calls(self) -> int:
        """Network calls one after another for an image; guidance widens calls, adds none."""
        return self.cost.calls

    @property
    def rows(self) -> int:
        """Evaluations of the network for an image, each of the K points counted."""
        return self.cost.rows

    @property
    def branches(self) -> int:
        """The same with the rows of "nothing" that classifier-free guidance adds."""
        return self.cost.branches

    @cached_property
    def cost(self) -> Tally:
        """Calls and rows for an image, counted on a network that answers with nothing."""
        images, seen = 1, []
        sampler = self
        if isinstance(self.solver, EDM):
            quiet = replace(self.solver, noise=lambda _index, x: torch.zeros_like(x))
            sampler = replace(self, solver=quiet)
        elif isinstance(self.solver, EPD | ParallelMultistep) and self.solver.table.r.ndim == 3:
            images = len(self.solver.table.r)

        def nothing(x: Tensor, _sigma: Tensor, _cond: Condition | None) -> Tensor:
            seen.append(len(x))
            return torch.zeros_like(x)

        field = Field(Guided(nothing, self.guidance_rate), Condition({}, {}))
        with torch.no_grad():
            for _ in sampler.states(field, torch.zeros(images, 1)):
                pass
        return Tally(field.tally.calls, field.tally.rows // images, sum(seen) // images)

    def with_guidance(self, text: str) -> "Sampler":
        """The sampler at rates by hand: "4", one a step "1,4,6,4", or "4@0.2-0.8".

        The last is rate 4 at the levels of an interval and none elsewhere (Kynkaanniemi et al.
        2024, arXiv:2404.07724). Raises ValueError for anything else.
        """
        before = [level for level in self.sigmas if level > 0][: len(self.sigmas) - 1]
        if isinstance(self.solver, EPD | ParallelMultistep):
            before = before[: self.solver.table.r.shape[-2]]
        rate, at, interval = text.partition("@")
        try:
            rates = [float(part) for part in rate.split(",")]
            low, high = map(float, interval.split("-")) if at else (0.0, math.inf)
        except ValueError:
            rates, low, high = [], 0.0, math.inf
        if len(rates) == 1:
            rates = [rates[0] if low <= level <= high else 1.0 for level in before]
        wrong = len(rates) != len(before) or (at and "," in rate)
        if wrong or not all(0 <= rate < math.inf for rate in rates):
            forms = f"one rate, {len(before)} with commas between, or RATE@LOW-HIGH"
            raise ValueError(f"guidance {text!r}: write {forms}")
        if isinstance(self.solver, EPD | ParallelMultistep):
            table = replace(self.solver.table, guidance=torch.tensor(rates).double())
            return replace(self, solver=replace(self.solver, table=table))
        return replace(self, rates=tuple(rates))


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
    schedule's own. Raises ValueError for unknown names, and for AFS on a flow model.
    """
    process = levels.process
    if afs and process.name == "flow":
        raise ValueError("afs is for VE models: flow matching has no analytic first step")
    solver = make_solver(name, replace(options or SolverOptions(), process=process))
    usual = "flowmatch" if process.name == "flow" else "polynomial"
    sigmas = tuple(levels.grid(schedule or usual, num_steps, rho=rho).tolist())
    return Sampler(solver, sigmas, process, afs, guidance_rate)
