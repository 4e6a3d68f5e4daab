"""What a student starts from: the levels of its grid, and its first table."""

from dataclasses import replace

from solvers import schedules
from solvers.epd import Directions, Table
from solvers.integrate import levels as as_levels
from solvers.predictor import find_predictor, load_predictor
from solvers.process import FLOW
from solvers.sampler import Sampler, SolverOptions, make_solver
from solvers.schedules import NoiseLevels
from training.settings import Settings, hand_made
from training.student import Student
from training.table import EPDForm, MultistepForm, TimeScales, table_of, widened

OFF = 0.02
"""How far a number may be from a given table's: bounded ones cannot be at their very bounds."""
BEYOND = 1.01
"""By what factor a given predictor may leave the levels that a network knows: by rounding."""


def grid_of(levels: NoiseLevels, settings: Settings, count: int) -> tuple[float, ...]:
    """The grid [count] of the settings' schedule."""
    assert settings.schedule
    low, high = settings.sigma_min, settings.sigma_max
    if levels.process != FLOW:
        ends = {"sigma_min": low or levels.sigma_min, "sigma_max": high or levels.sigma_max}
        grid = replace(levels, **ends).grid(settings.schedule, count, rho=settings.schedule_rho)
        return tuple(grid.tolist())
    return flow_grid(levels, count, low, high)


def flow_grid(
    levels: NoiseLevels, count: int, low: float | None, high: float | None
) -> tuple[float, ...]:
    """The flow's own grid [count], moved and stretched to these ends where they are given."""
    first, *inner, last = levels.grid("flowmatch", count).tolist()
    low, high = last if low is None else low, first if high is None else high
    if (low, high) != (last, first):
        inner = [low + (s - last) / (first - last) * (high - low) for s in inner]
    return (high, *inner, low)


def fine_grid(
    levels: NoiseLevels, settings: Settings, sigmas: tuple[float, ...]
) -> tuple[float, ...]:
    """The grid of the fine solution between the same ends: polynomial 7, or the flow's own."""
    assert settings.fine_steps
    if levels.process == FLOW:
        return flow_grid(levels, settings.fine_steps, sigmas[-1], sigmas[0])
    return tuple(schedules.polynomial(settings.fine_steps, sigmas[-1], sigmas[0]).tolist())


def make_student(levels: NoiseLevels, settings: Settings) -> Student:
    """The student of the settings; ValueError for a base that cannot serve."""
    s, (name, _), base = settings, settings.base, None
    assert s.num_steps
    assert s.points
    off = 0.0 if s.scale_dir is not None else None  # bounded directions, and no word of times
    reach = off if s.scale_time is None else s.scale_time
    shape, time = (s.num_steps - 1, s.points), TimeScales(reach, s.scale_time_ends)
    if s.multistep:
        form = MultistepForm(*shape, time, bool(s.afs))
    else:
        order = s.max_order if name not in ("euler", "heun", "dpm2") else None
        options = SolverOptions(order, levels.process, s.predict_x0, s.lower_order_final)
        base = make_solver(name, options)
        form = EPDForm(*shape, s.scale_dir, time, s.fcn)
    if s.init and not hand_made(s.init):
        sigmas = load_predictor(find_predictor(s.init)).sampler(levels).sigmas
        low, high = levels.sigma_min / BEYOND, levels.sigma_max * BEYOND
        if sigmas[0] > high or 0 < sigmas[-1] < low:
            ends = f"from {sigmas[0]:.4g} to {sigmas[-1]:.4g}"
            knows = f"{levels.sigma_max:.4g} to {levels.sigma_min:.4g}"
            raise ValueError(f"{s.init} goes {ends}, the network knows {knows}: start elsewhere")
    else:
        sigmas = as_levels(grid_of(levels, s, s.num_steps))
    grid = bool(s.learn_grid) and s.num_steps > 2
    student = Student(sigmas, form, base, levels.process, bool(s.afs), grid)
    table = start_of(student, s)
    student.holding(table)  # EPD refuses what cannot be its base
    if s.init:
        check_reach(student, table, s)
    return student


def check_reach(student: Student, table: Table, settings: Settings) -> None:
    """ValueError where bounded numbers cannot be those of a given table."""
    written, _ = replace(student, grid=False).decode(replace(student, grid=False).encode(table))
    (mix, times), (our_mix, our_times) = (
        (t.weight * t.dir_scale if isinstance(t, Directions) else t.weight, t.time_scale)
        for t in (table, written)
    )
    off = max(float((mix - our_mix).abs().max()), float((times - our_times).abs().max()))
    if off > OFF:
        raise ValueError(
            f"{settings.init} is out of reach of scale_dir {settings.scale_dir} and scale_time "
            f"{settings.scale_time}, by {off:.2g}: raise them, or give --method fit without"
        )


def start_of(student: Student, settings: Settings) -> Table:
    """The table that is started from: one by hand, a solver's, or that of another predictor."""
    if settings.init is None:
        return student.even_table()
    if hand_made(settings.init):
        ways = settings.max_order, student.process, settings.predict_x0, settings.lower_order_final
        solver = make_solver(settings.init, SolverOptions(*ways))
        table = table_of(Sampler(solver, student.sigmas, student.process, student.afs))
    else:
        table = load_predictor(find_predictor(settings.init)).table
    assert settings.points
    return widened(table, settings.points)
