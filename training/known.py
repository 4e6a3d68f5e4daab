"""What `training.api` learns from: settings, students to try, and noises with their solutions."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solvers import schedules
from solvers.catalog import SOLVERS, SolverOptions, make_solver, parse_name
from solvers.classic import Heun
from solvers.field import Condition, Denoiser, Field
from solvers.integrate import levels
from solvers.process import FLOW, Process
from solvers.recipe import BASES, one_of
from src.seeds import randn
from training.distill import Batch, Plan, teacher_states
from training.search import HISTORY

Conditions = Callable[[Sequence[int]], Condition | None]
"""(numbers of samples) -> what the network is told of them, B rows."""
MANY, AT_ONCE, SMALL = 1 << 27, 1 << 17, 1 << 10
FLOW_SCHEDULES = ("flowmatch", "logit")
VE_SCHEDULES = ("time_uniform", "polynomial", "logsnr")


@dataclass(frozen=True)
class Settings:
    """What to distil, and from how much; the defaults are what measured best.

    Raises ValueError for values that cannot be served.
    """

    nfe: int = 5  # sequential calls
    points: int = 2  # K
    solver: str = "epd-multistep"  # or epd, or epd-<base>, as epd-ipndm
    known: int = 0  # of EPD: slopes already evaluated that join the mixture
    sigma_min: float | None = None  # None: 0.002 (ve), 0.001 (flow)
    sigma_max: float | None = None  # None: 80 (ve), 1 (flow)
    schedule: str | None = None  # None: the best of several; the levels are learned from there
    guidance_rate: float = 1.0
    samples: int | None = None  # noises to learn from; None: 64 to 4096, by the latent's size
    judges: int | None = None  # other noises, to choose by; None: half as many
    batch: int | None = None  # noises at once; None: 16 to 1024, by the latent's size
    positions: int = 17  # G
    robust: bool | None = None  # refine also by a loss for stray samples; None: small latents
    rounds: int | None = None  # of each refinement; None: 15 for small latents, else 4
    fine_steps: int = 48  # intervals of the solution that is learned
    seed: int = 0
    device: str = "cpu"
    name: str = "unknown"  # of the data, for the predictor's recipe

    def __post_init__(self) -> None:
        for name in ("nfe", "points", "samples", "judges", "batch", "fine_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} is out of range: 1 or more")
        if self.rounds is not None and self.rounds < 0:
            raise ValueError(f"rounds {self.rounds} is out of range: 0 or more")
        most = HISTORY if self.base else 0  # parallel multistep has them anyway
        if not 0 <= self.known <= most:
            raise ValueError(f"known {self.known} is out of range: 0 to {most} for {self.solver}")
        self.intervals(afs=False)

    @property
    def base(self) -> str | None:
        """The solver that EPD stands on; None for parallel multistep."""
        if self.solver == "epd-multistep":
            return None
        if self.solver != "epd" and not self.solver.startswith("epd-"):
            raise ValueError(f"unknown solver {self.solver!r}: epd-multistep, epd or epd-<base>")
        name = "euler" if self.solver == "epd" else self.solver.removeprefix("epd-")
        one_of("base", parse_name(name)[0], BASES)
        return name

    def intervals(self, afs: bool) -> int:
        """How many intervals the calls buy; ValueError where they do not come out even."""
        if self.base is None:
            return self.nfe
        calls = 1 + SOLVERS[parse_name(self.base)[0]].calls
        count, odd = divmod(self.nfe + afs, calls)
        return 0 if odd else count


@dataclass(frozen=True)
class Effort:
    """How much work a fit is given."""

    samples: int
    judges: int
    batch: int
    rounds: int
    robust: bool


def effort(settings: Settings, shape: Sequence[int]) -> Effort:
    """What the settings leave open, by the latent's size.

    Small latents need many noises and rounds: their error lies in the few samples that pass
    near a fork of the flow, and those are what a table that generalises must have seen enough
    of. Large ones need few, whose numbers are many and whose evaluations are dear.
    """
    numbers = math.prod(shape)
    small = numbers < SMALL
    samples = settings.samples or within(64, MANY // numbers**2, 4096)
    return Effort(
        samples,
        settings.judges or samples // 2 or 1,
        settings.batch or within(16, AT_ONCE // numbers, 1024),
        (15 if small else 4) if settings.rounds is None else settings.rounds,
        small if settings.robust is None else settings.robust,
    )


def within(least: int, value: int, most: int) -> int:
    """The value, held within bounds."""
    return max(least, min(value, most))


def ends_of(settings: Settings, process: Process) -> tuple[float, float]:
    """sigma_min and sigma_max; ValueError for flow levels above 1."""
    low, high = (0.001, 1.0) if process == FLOW else (0.002, 80.0)
    low = low if settings.sigma_min is None else settings.sigma_min
    high = high if settings.sigma_max is None else settings.sigma_max
    if process == FLOW and high > 1:
        raise ValueError(f"sigma_max {high} is out of range: flow matching starts at 1 or below")
    return low, high


def grid_of(name: str, num_steps: int, low: float, high: float) -> tuple[float, ...]:
    """The levels [num_steps] of a schedule by its name; ValueError for an unknown name."""
    match name:
        case "polynomial":
            grid = schedules.polynomial(num_steps, low, high)
        case "logsnr":
            grid = schedules.log_snr(num_steps, low, high)
        case "time_uniform":
            grid = schedules.time_uniform(num_steps, low, high)
        case "flowmatch":
            grid = torch.linspace(high, low, num_steps, dtype=torch.float64)
        case "logit":
            ends = torch.tensor([min(high, 1 - low), low], dtype=torch.float64).logit().tolist()
            grid = torch.linspace(ends[0], ends[1], num_steps, dtype=torch.float64).sigmoid()
        case _:
            names = ", ".join((*VE_SCHEDULES, *FLOW_SCHEDULES))
            raise ValueError(f"unknown schedule {name!r}: choose from {names}")
    return (high, *grid[1:-1].tolist(), low)


def fine_grid(settings: Settings, process: Process) -> tuple[float, ...]:
    """The levels of the solution that is learned."""
    low, high = ends_of(settings, process)
    name = "logit" if process == FLOW else "polynomial"
    return grid_of(name, settings.fine_steps + 1, low, high)


def plans(settings: Settings, process: Process) -> dict[str, Plan]:
    """A student for every schedule to be tried; ValueError where the calls do not come out."""
    low, high = ends_of(settings, process)
    usual = FLOW_SCHEDULES if process == FLOW else VE_SCHEDULES
    names = (settings.schedule,) if settings.schedule else usual
    base = settings.base
    afs = base is not None and process != FLOW and bool(settings.intervals(afs=True))
    count = settings.intervals(afs)
    if not count:
        raise ValueError(f"{settings.solver} cannot make {settings.nfe} calls: change nfe by 1")
    solver = base and make_solver(base, SolverOptions(process=process))
    grids = {name: grid_of(name, count + 1, low, high) for name in names}
    return {name: Plan(levels(grid), process, solver or None, afs) for name, grid in grids.items()}


@dataclass(frozen=True)
class Known:
    """A batch and the fine solution of its noise at the levels of all plans."""

    batch: Batch
    states: tuple[tuple[Tensor, ...], ...]  # for each plan, on the CPU


def at(known: Known, plan: int) -> Batch:
    """The batch with the targets of one plan."""
    targets = tuple(state.to(known.batch.x) for state in known.states[plan])
    return dataclasses.replace(known.batch, targets=targets)


@dataclass(frozen=True)
class Views(Sequence[Batch]):
    """The batches of one plan, their targets on the device only while they are looked at."""

    known: Sequence[Known]
    plan: int

    def __len__(self) -> int:
        return len(self.known)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Views(self.known[index], self.plan)
        return at(self.known[index], self.plan)


@torch.no_grad()
def check_answer(batch: Batch) -> None:
    """ValueError for a network that does not answer with a tensor of x's shape."""
    x = batch.x
    answer = batch.field.denoiser(x, x.new_ones(len(x)), batch.field.cond)
    shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
    if shape != tuple(x.shape):
        raise ValueError(f"the denoiser gives {shape} for x {tuple(x.shape)}: give one like x")


@dataclass(frozen=True)
class Source:
    """Noises by their numbers, and where they go."""

    denoiser: Denoiser
    shape: tuple[int, ...]
    conditions: Conditions | None
    settings: Settings
    size: int  # of a batch
    first: float  # the level where noise starts

    def batches(
        self,
        purpose: str,
        count: int,
        fine: tuple[float, ...],
        grids: Sequence[tuple[float, ...]],
    ) -> list[Known]:
        """`count` noises of a purpose and their solutions, through the union of all levels."""
        every = sorted({*fine, *(level for grid in grids for level in grid)}, reverse=True)
        found = []
        for first in range(0, count, self.size):
            batch = self.start(purpose, range(first, min(first + self.size, count)))
            if not found:
                check_answer(batch)
            states = teacher_states(Heun(), batch.field, batch.x, every)
            if not bool(states[-1].isfinite().all()):
                raise ValueError("the denoiser gives numbers that are not finite")
            by_level = dict(zip(every[1:], states, strict=True))
            kept = tuple(tuple(by_level[s].cpu() for s in grid[1:]) for grid in grids)
            found.append(Known(batch, kept))
        return found

    def start(self, purpose: str, numbers: Sequence[int]) -> Batch:
        """Noise at the first level, and what the network is told."""
        settings = self.settings
        cond = self.conditions(numbers) if self.conditions else None
        if settings.guidance_rate != 1 and (cond is None or cond.null is None):
            raise ValueError(
                f"guidance_rate {settings.guidance_rate} needs conditions with a null"
            )
        stream = f"{purpose}/{settings.seed}"
        noise = randn(numbers, self.shape, stream=stream, device=settings.device)
        return Batch(Field(self.denoiser, cond), noise * self.first, ())
