"""What is compared: hand-made solvers on their schedules, and learned predictors.

A candidate's `nfe` is its number of sequential network calls an image.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from backends.base import Backend, NoiseLevels
from backends.generate import Method
from backends.methods import HandMade, check_fit, predictor_method, sequential_calls
from solvers.catalog import num_steps_for
from solvers.epd import Directions
from solvers.predictor import find_predictor, load_predictor

SOLVERS = (
    *("euler", "heun", "dpm2", "ipndm-2", "ipndm-3", "ipndm-4", "ipndm_v-3"),
    *("dpmpp-2", "dpmpp-3", "unipc-2", "unipc-3", "deis-3"),
)
"""The hand-made solvers that a learned one has to beat."""
SCHEDULES = {"ve": ("polynomial", "logsnr", "time_uniform"), "flow": ("flowmatch", "polynomial")}
RHO = {"polynomial": 7.0, "time_uniform": 1.0}
FINE_STEPS = 64


@dataclass(frozen=True)
class Candidate:
    """One way to sample, by name."""

    name: str
    method: Method
    schedule: str
    points: int = 1  # K
    source: str | None = None  # the file of a learned one, from the current folder

    @property
    def nfe(self) -> int:
        """Network calls one after another for an image."""
        return sequential_calls(self.method)


def fine_solution(
    levels: NoiseLevels, steps: int = FINE_STEPS, guidance_rate: float = 1.0
) -> Candidate:
    """Heun in `steps` steps, two calls each: on polynomial, rho 7, or flow's own schedule."""
    schedule = SCHEDULES[levels.process.name][0]
    return hand_made(HandMade("heun", steps + 1, schedule), levels, guidance_rate)


def usual_end(levels: NoiseLevels) -> NoiseLevels:
    """These levels with the end that predictors have: that of flow's own schedule."""
    if levels.process.name != "flow":
        return levels
    return replace(levels, sigma_min=levels.grid("flowmatch", 2)[-1].item())


def hand_made(choice: HandMade, levels: NoiseLevels, guidance_rate: float = 1.0) -> Candidate:
    """The candidate of a hand-made solver; ValueError where it does not fit these levels.

    On flow, every schedule ends where flow's own does, so that all solve one problem.
    """
    method = replace(choice.method(usual_end(levels)), guidance_rate=guidance_rate)
    return Candidate(
        choice.solver, method, schedule_label(choice.schedule_type, choice.schedule_rho)
    )


def schedule_label(schedule: str | None, rho: float | None) -> str:
    """The name with its exponent, if it has one: polynomial-7, logsnr."""
    rho = RHO.get(schedule or "") if rho is None else rho
    return f"{schedule}-{rho:g}" if schedule in RHO else str(schedule)


def variants(
    solver: str,
    nfe: int,
    schedules: Sequence[str],
    levels: NoiseLevels,
    guidance_rate: float = 1.0,
) -> list[Candidate]:
    """A solver with this many sequential calls on each schedule, without AFS and with it.

    On a single schedule AFS is there only where the calls do not come out without it (a solver
    of two calls an interval at an odd number). Empty where they cannot come out.
    """
    found: list[Candidate] = []
    for afs in (False, True) if levels.process.name == "ve" else (False,):
        if afs and found and len(schedules) == 1:
            break
        try:
            num_steps = num_steps_for(solver, nfe, afs)
        except ValueError:
            continue
        choices = [HandMade(solver, num_steps, schedule, afs=afs) for schedule in schedules]
        found += [hand_made(choice, levels, guidance_rate) for choice in choices]
    return found


def learned(paths: Sequence[Path], backend: Backend) -> list[Candidate]:
    """Predictors, the fewest calls first; ValueError for one that does not belong here.

    Two of one kind, K and number of calls are told apart by their files.
    """
    found = sorted((learned_one(path, backend) for path in paths), key=lambda c: (c.nfe, c.name))
    return told_apart(told_apart(found, short_name), str)


def told_apart(found: Sequence[Candidate], tell: Callable[[Path], str]) -> list[Candidate]:
    """Those of one name and number of calls with what `tell` says of their files."""
    seen = Counter((c.name, c.nfe) for c in found)
    return [
        replace(c, name=f"{c.name} ({tell(Path(c.source or ''))})")
        if seen[c.name, c.nfe] > 1
        else c
        for c in found
    ]


def short_name(path: Path) -> str:
    """The name of a predictor's file, or of the run's folder where it is "predictor"."""
    return path.parent.name if path.stem == "predictor" else path.stem


def learned_one(path: Path, backend: Backend) -> Candidate:
    """One predictor, named by its kind, base and K: "epd K=2", "epd-ipndm K=2".

    "+known" where slopes that are known anyway join the mixture.
    """
    predictor = load_predictor(path)
    recipe, table = predictor.recipe, predictor.table
    check_fit(recipe, backend)
    kind = recipe.solver if recipe.base == "euler" else f"{recipe.solver}-{recipe.base}"
    known = "+known" if isinstance(table, Directions) and table.history else ""
    return Candidate(
        f"{kind}{known} K={recipe.num_points}",
        predictor_method(predictor, backend.levels),
        schedule_label(recipe.schedule_type, recipe.schedule_rho),
        recipe.num_points,
        from_here(path),
    )


def from_here(path: Path | str) -> str:
    """A path as seen from the current folder, so that what is written holds no machine's."""
    return Path(os.path.relpath(path)).as_posix() if Path(path).is_absolute() else str(path)


def predictor_files(patterns: Sequence[str]) -> list[Path]:
    """Paths, names in exps/ and patterns with * -> files; ValueError for what finds nothing."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        files = (
            matching(pattern) if "*" in pattern or "?" in pattern else [find_predictor(pattern)]
        )
        if not files:
            raise ValueError(f"no predictor is named {pattern!r}")
        found |= dict.fromkeys(files)
    return list(found)


def matching(pattern: str) -> list[Path]:
    """The files that a pattern names, in order."""
    path = Path(pattern)
    root = Path(path.anchor or ".")
    return sorted(p for p in root.glob(str(path.relative_to(path.anchor))) if p.is_file())
