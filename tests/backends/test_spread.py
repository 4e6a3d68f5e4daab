"""The image of a seed is the same whoever evaluates its rows, and a rank that is gone is named."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

SAME = """
import json, torch
from backends.base import ModelOptions
from backends.generate import Job, generate
from backends.mixture import Mixture, mixture_backend
from backends.pipelines import wrap
from backends.edm import pixel_backend
from backends.spread import spread
from solvers.epd import EPD, Directions, MultistepTable, ParallelMultistep
from solvers.process import VE
from solvers.sampler import Sampler, SolverOptions, make_solver
from solvers.schedules import NoiseLevels
from src import ranks
from tests import twins
from tests.tiny import tiny_edm

CPU = torch.device("cpu")
DEGREE, FAMILIES = {degree}, {families}
ranks.init(CPU)
torch.set_num_threads(1)
mesh = ranks.point_mesh(DEGREE, CPU, 60)


def solvers(n, process):
    one = torch.ones(n, 3, dtype=torch.float64)
    for k in (1, 2, 3):
        r = torch.linspace(0.2, 0.8, k, dtype=torch.float64).repeat(n, 1)
        yield f"epd {{k}}", EPD(Directions(r, one[:, :k] / k, one[:, :k], one[:, :k]))
    table = MultistepTable(0.2 * one, 0.3 * one, one / 3, 0 * one, one)
    yield "multistep 3", ParallelMultistep(table, process)
    yield "unipc-2", make_solver("unipc-2", SolverOptions(process=process))


def backends():
    means = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    flat = torch.full((4,), 0.25).double()
    yield "mixture", mixture_backend(Mixture(means, flat, flat), NoiseLevels(VE, 0.002, 80.0)), 3
    yield "edm", pixel_backend(tiny_edm(), CPU), 1
    yield "ldm", wrap(twins.sd(), CPU), "a"
    yield "sd3", wrap(twins.sd3(), CPU), "a"
    yield "flux", wrap(twins.flux(), CPU, ModelOptions(size=(32, 32))), "a"
    yield "sd3 in bfloat16", wrap(twins.sd3().to(torch.bfloat16), CPU), "a"


def latents(backend, sampler, batch, chunk=None):
    jobs = [Job(seed, prompt) for seed in range(batch)]
    return next(generate(backend, sampler, jobs, batch=batch, points_chunk=chunk)).latents


results = {{}}
for family, backend, prompt in backends():
    if family not in FAMILIES:
        continue
    levels = backend.levels
    grid = levels.grid("flowmatch" if levels.process.name == "flow" else "polynomial", 4)
    rate = 3.0 if family != "flux" else 1.0
    for name, solver in solvers(3, levels.process):
        for batch in (1, 3) if name == "epd 2" else (3,):
            sampler = Sampler(solver, grid, levels.process, guidance_rate=rate)
            ours = latents(spread(backend, mesh), sampler, batch)
            alone = latents(backend, sampler, batch)
            error = (ours - alone).abs().max() / alone.abs().max()
            results[f"{{family}}, {{name}}, batch {{batch}}"] = error.item()
    epd = Sampler(dict(solvers(3, levels.process))["epd 2"], grid, levels.process)
    if DEGREE == 2:  # each rank sees one row at a time, and so does one process with chunks
        ours, alone = latents(spread(backend, mesh), epd, 1), latents(backend, epd, 1, chunk=1)
        results[f"{{family}}, to the bit"] = float("16" not in family and not ours.equal(alone))
print(json.dumps(results))
ranks.close()
"""

GONE = """
import sys, time, torch
from backends.mixture import load_mixture
from backends.generate import Job, generate
from backends.load import find_model
from backends.spread import spread
from solvers.classic import Euler
from solvers.sampler import Sampler
from src import ranks

ranks.init(torch.device("cpu"))
mesh = ranks.point_mesh(2, torch.device("cpu"), 3)
backend = load_mixture(find_model("mixture-3x4x4"))
sampler = Sampler(Euler(), backend.levels.grid("polynomial", 6))
if ranks.rank() == 1:
    if "{how}" == "dead":
        sys.exit(3)
    time.sleep(8)
try:
    next(generate(spread(backend, mesh), sampler, [Job(0), Job(1)], batch=2))
except ValueError as error:
    print(str(error).replace("\\n", "|"), flush=True)
    import os
    os._exit(1)
"""


def started(work: str, count: int) -> list[subprocess.Popen[str]]:
    """So many ranks of a script."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", work],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


QUICK = ("mixture", "edm", "sd3")
ALL = (*QUICK, "ldm", "flux", "sd3 in bfloat16")


def results(count: int, degree: int, families: tuple[str, ...]) -> list[dict[str, Any]]:
    """What every rank measured."""
    ends = [
        p.communicate(timeout=300)
        for p in started(SAME.format(degree=degree, families=families), count)
    ]
    assert all(out for out, _ in ends), ends[0][1][-2000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in ends]


@pytest.mark.parametrize(
    ("count", "degree", "families"),
    [
        (2, 2, QUICK),
        pytest.param(2, 2, ALL, marks=pytest.mark.slow),
        pytest.param(3, 3, ALL, marks=pytest.mark.slow),
        pytest.param(4, 4, ALL, marks=pytest.mark.slow),
        pytest.param(4, 2, ALL, marks=pytest.mark.slow),
    ],
)
def test_an_image_is_the_same_on_any_number_of_ranks(
    count: int, degree: int, families: tuple[str, ...]
) -> None:
    ranks = results(count, degree, families)
    assert all(rank == ranks[0] for rank in ranks)  # every rank holds the same image
    for name, error in ranks[0].items():
        assert error <= (2e-2 if "bfloat16" in name else 2e-5), f"{name}: {error}"
        assert error == 0 or "bit" not in name, name


@pytest.mark.parametrize("how", ["dead", "slow"])
def test_a_rank_that_is_gone_ends_the_others_with_one_line(how: str) -> None:
    began = time.monotonic()
    first, second = started(GONE.format(how=how), 2)
    try:
        out, _ = first.communicate(timeout=60)
    finally:
        second.kill()
        second.communicate()
    assert "rank 0 waited in vain" in out
    assert "network call 1" in out
    assert len(out.splitlines()) == 1
    assert time.monotonic() - began < 50
