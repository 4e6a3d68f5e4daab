"""How long images take on several devices: a law, what is measured, and a simulation.

The calls of a sampler go one after another, n ranks share the rows of each, and one gather a
call brings the answers together:

    seconds = sum over calls of t(rows / n) + gather(rows)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from math import ceil
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from backends.base import Backend
from backends.generate import Job, generate
from backends.spread import SharedRows, spread
from eval.machine import clock
from solvers.epd import EPD, Directions
from solvers.field import Condition
from solvers.sampler import Sampler
from solvers.schedules import NoiseLevels
from src import ranks

Table: TypeAlias = list[dict[str, Any]]
Tables: TypeAlias = dict[str, Table]
"""Lines by the names of tables, each line its cells by the names of columns."""
POINTS, IMAGES, RATE = (1, 2, 4), (1, 4), 4.0
NUM_STEPS = 3
ROWS = (1, 2, 4, 8, 16)
SIZES = {"sd3": (2, 16 * 128 * 128 * 2), "flux": (1, 64 * 64 * 64 * 2)}
"""Of a model at 1024 pixels in half precision: guidance branches, and bytes of an answer."""
DEVICES = (1, 2, 4, 8, 16, 32, 64)


def even_points(levels: NoiseLevels, points: int, num_steps: int, rate: float = 1.0) -> Sampler:
    """EPD with K evenly spaced points, whose figures do not matter where time is measured."""
    r = torch.linspace(0, 1, points + 2, dtype=torch.float64)[1:-1].repeat(num_steps - 1, 1)
    one = torch.ones_like(r)
    usual = "flowmatch" if levels.process.name == "flow" else "polynomial"
    sigmas = tuple(levels.grid(usual, num_steps).tolist())
    table = Directions(r, one / points, one, one)
    return Sampler(EPD(table), sigmas, levels.process, guidance_rate=rate)


def law(
    rows: Sequence[int],
    devices: int,
    seconds: Callable[[int], float],
    answers: Callable[[int], float],
) -> float:
    """Seconds of calls of so many rows, from those of a call and of joining its answers."""
    return sum(seconds(ceil(r / devices)) + (answers(r) if devices > 1 else 0.0) for r in rows)


def simulated(name: str, row_seconds: float, gigabytes: float) -> Table:
    """Seconds of 10 calls of EPD on 1 to 64 devices that share all rows, for a model of `SIZES`.

    From two measured numbers: seconds of a row, which a large network is busy with, and the
    gigabytes a second that a rank receives in a gather.
    """
    branches, size = SIZES[name]
    lines: Table = []
    for points, images in ((k, images) for k in POINTS for images in (1, 8)):
        rows = [images * branches * k for k in (1, points) * 5]
        line: dict[str, Any] = {"model": name, "K": points, "images": images}
        for n in DEVICES:

            def answers(r: int, n: int = n) -> float:
                return ceil(r / n) * (n - 1) * size / gigabytes / 1e9

            line[f"on {n}"] = law(rows, n, lambda r: r * row_seconds, answers)
        lines.append(line)
    return lines


def time_shared(backend: Backend, mesh: DeviceMesh, repeats: int) -> Tables:
    """Median seconds by one rank alone and by all that share the rows; calls by their rows.

    `n threads` is alone as well, with as many threads as there are ranks, on a CPU. All ranks call
    it, and the first one's numbers count.
    """
    n, device, threads = mesh["points"].size(), backend.device, torch.get_num_threads()
    shared = spread(backend, mesh)
    rows_of_all = SharedRows(mesh.get_group("points"))

    def timed(work: Callable[[], object]) -> float:
        ranks.barrier()
        started = clock(device)
        work()
        return clock(device) - started

    @cache
    @torch.no_grad()
    def seconds(rows: int) -> float:
        cond = backend.encode([backend.usual_prompt(seed) for seed in range(rows)])
        dtype = torch.promote_types(backend.dtype, torch.float32)
        x = torch.zeros(rows, *backend.shape, device=device, dtype=dtype)
        sigma = x.new_full((rows,), backend.levels.sigma_max / 2)
        times = [timed(lambda: backend.denoise(x, sigma, cond)) for _ in range(repeats + 1)]
        return median(times[1:])

    @cache
    def answers(rows: int) -> float:
        own = torch.zeros(ceil(rows / n), *backend.shape, device=device, dtype=backend.dtype)
        return median(timed(lambda: rows_of_all.all_of(own, rows)) for _ in range(repeats))

    def combination(points: int, rate: float, batch: int) -> dict[str, Any]:
        sampler = even_points(backend.levels, points, NUM_STEPS, rate)
        jobs = [Job(seed, backend.usual_prompt(seed)) for seed in range(batch)]
        rows: list[int] = []

        def counted(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
            rows.append(len(x))
            return backend.denoise(x, sigma, cond)

        def sample(on: Backend) -> None:
            next(generate(on, sampler, jobs, batch=batch))

        def alone(count: int) -> None:
            if ranks.is_first():
                torch.set_num_threads(count)
                sample(backend)
                torch.set_num_threads(threads)

        sample(replace(backend, denoise=counted))
        ways = [lambda: alone(threads), lambda: sample(shared)]
        ways += [lambda: alone(n)] if device.type == "cpu" else []
        turns = [[timed(way) for way in ways] for _ in range(max(3, repeats // batch) + 1)][1:]
        one, many, *wide = map(median, zip(*turns, strict=True))
        kinds = "+".join(str(r) for r in sorted(set(rows)))
        line = {"K": points, "guidance": rate, "batch": batch, "rows": kinds, "alone": one}
        line |= {"n threads": wide[0] if wide else None, "shared": many}
        return line | {"law": law(rows, n, seconds, answers), "shared / alone": many / one}

    cond = backend.encode([backend.usual_prompt(0)])
    rates = (1.0, RATE) if cond and cond.null else (1.0,)
    samplers = [combination(k, rate, b) for k in POINTS for rate in rates for b in IMAGES]
    calls: Table = []
    for rows in ROWS:
        whole, part, together = seconds(rows), seconds(ceil(rows / n)), answers(rows)
        pays = {"pays": part + together < whole}
        calls.append({"rows": rows, "t": whole, "t of a share": part, "gather": together} | pays)
    return {"samplers": samplers, "calls": calls}
