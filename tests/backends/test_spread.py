"""The image of a seed is the same whoever evaluates its rows, and a rank that is gone is named."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

SAME = """
import json, random, torch
import torch.distributed as dist
from dataclasses import replace
from backends.base import ModelOptions
from backends.generate import Job, generate
from backends.mixture import Mixture, mixture_backend
from backends.pipelines import wrap
from backends.edm import pixel_backend
from backends.spread import SharedRows, SpreadDenoiser, spread
from eval.latency import even_points
from solvers.epd import MultistepTable, ParallelMultistep
from solvers.process import VE
from solvers.sampler import SOLVERS, Sampler, SolverOptions, hand_made, make_solver
from solvers.schedules import NoiseLevels
from src import ranks
from tests import twins
from tests.tiny import tiny_edm

CPU, LIMIT = torch.device("cpu"), 300
WAYS, FAMILIES, FUZZ = {ways}, {families}, {fuzz}
ranks.init(CPU)
torch.set_num_threads(1)
meshes = {{"2x2": ranks.point_mesh(2, CPU, LIMIT)}} if "2x2" in WAYS else {{}}
GROUPS = {{n: dist.new_group(range(n)) for n in range(1, dist.get_world_size() + 1)}}
results = {{}}


def multistep(levels):
    one = torch.ones(3, 3, dtype=torch.float64)
    table = MultistepTable(0.2 * one, 0.3 * one, one / 3, 0 * one, one)
    usual = "flowmatch" if levels.process.name == "flow" else "polynomial"
    grid = tuple(levels.grid(usual, 4).tolist())
    return Sampler(ParallelMultistep(table, levels.process), grid, levels.process)


def backend_of(name):
    if name == "mixture":
        means = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
        flat = torch.full((4,), 0.25).double()
        return mixture_backend(Mixture(means, flat, flat), NoiseLevels(VE, 0.002, 80.0)), 3
    if name == "edm":
        return pixel_backend(tiny_edm(), CPU), 1
    kind, _, half = name.partition(" in ")
    pipe = getattr(twins, dict(ldm="sd").get(kind, kind))()
    pipe, small = pipe.to(torch.bfloat16) if half else pipe, ModelOptions(size=(16, 16))
    return wrap(pipe, CPU, small), "a"


def shared(backend, way):
    if way in meshes:
        return spread(backend, meshes[way])
    if dist.get_rank() >= way:
        return None
    how = SharedRows(GROUPS[way]), backend.dtype, backend.dtype.itemsize < 4
    return replace(backend, denoise=SpreadDenoiser(backend.denoise, *how))


def compare(name, backend, prompt, sampler, batch, ways, chunk=None, alone_chunk=None):
    def latents(on, chunk):
        jobs = [Job(seed, prompt) for seed in range(batch)]
        return next(generate(on, sampler, jobs, batch=batch, points_chunk=chunk)).latents

    alone = latents(backend, alone_chunk or chunk) if ranks.is_first() else None
    for way in ways:
        on = shared(backend, way)
        ours = on and latents(on, chunk)
        all_of_them = ranks.of_each_process(ours)
        if ranks.is_first():
            assert all(x is None or x.equal(ours) for x in all_of_them), name
            error = (ours - alone).abs().max() / alone.abs().max()
            results[f"{{name}}, {{way}} ranks"] = error.item()


for family in FAMILIES:
    backend, prompt = backend_of(family)
    levels = backend.levels
    rate = 1.0 if family == "flux" else 3.0
    samplers = {{f"epd {{k}}": even_points(levels, k, 4, rate) for k in (1, 2, 3)}}
    samplers["multistep 3"] = replace(multistep(levels), guidance_rate=rate)
    samplers["unipc-2"] = hand_made("unipc-2", levels, 4, guidance_rate=rate)
    for name, sampler in samplers.items():
        for batch in (1, 3) if name == "epd 2" else (3,):
            case = f"{{family}}, {{name}}, batch {{batch}}"
            compare(case, backend, prompt, sampler, batch, WAYS)
    if "16" not in family:  # a rank sees one row at a time, and so does one process by chunks
        unguided = replace(samplers["epd 2"], guidance_rate=1.0)
        compare(f"{{family}}, bits", backend, prompt, unguided, 1, [2], alone_chunk=1)

draw = random.Random(0)
nets = {{name: backend_of(name) for name in ("edm", "sd3") if FUZZ}}
for index in range(FUZZ):
    family = draw.choice(list(nets))
    backend, prompt = nets[family]
    flow = family == "sd3"
    n, k, batch = draw.randint(1, 4), draw.randint(1, 4), draw.randint(1, 5)
    rate, chunk = draw.choice([1.0, 1.5, 4.0]), draw.choice([None, None, 1, 2])
    solver = draw.choice(["epd", "epd", "multistep", *SOLVERS])
    if solver == "epd":
        sampler = even_points(backend.levels, k, 4, rate)
    elif solver == "multistep":
        sampler = replace(multistep(backend.levels), guidance_rate=rate)
    else:
        options = SolverOptions(s_churn=5.0 if solver == "edm" and not flow else 0.0)
        afs = not flow and draw.random() < 0.3
        sampler = hand_made(
            solver, backend.levels, 4, afs=afs, guidance_rate=rate, options=options
        )
    if draw.random() < 0.2:
        sampler = sampler.with_rates((1.0, 4.0, 2.0))
    name = f"{{index}}: {{family}} {{solver}} K={{k}} batch={{batch}} rate={{rate}} {{chunk}}"
    compare(name, backend, prompt, sampler, batch, [n], chunk)
if ranks.is_first():
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
if not ranks.is_first():
    if "{how}" == "dead":
        sys.exit(3)
    time.sleep(60)
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


def measured(count: int, **what: Any) -> dict[str, float]:
    """The errors that so many ranks saw, by what was made how."""
    ends = [p.communicate(timeout=900) for p in started(SAME.format(**what), count)]
    assert ends[0][0], "".join(err[-2000:] for _, err in ends)
    return json.loads(ends[0][0].splitlines()[-1])


QUICK = ("mixture", "edm", "sd3")
ALL = (*QUICK, "ldm", "flux", "sd3 in bfloat16")
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "two ranks": (2, {"ways": [2], "families": QUICK, "fuzz": 0}),
    "any ranks": (4, {"ways": [2, 3, 4, "2x2"], "families": ALL, "fuzz": 0}),
    "fuzz": (4, {"ways": [], "families": (), "fuzz": 50}),
}


@pytest.mark.parametrize(
    "name", ["two ranks", *(pytest.param(n, marks=pytest.mark.slow) for n in list(WAYS)[1:])]
)
def test_an_image_is_the_same_on_any_number_of_ranks(name: str) -> None:
    count, what = WAYS[name]
    errors = measured(count, **what)
    assert len(errors) >= max(6 * len(what["ways"]) * len(what["families"]), what["fuzz"])
    for case, error in errors.items():
        assert error <= (2e-2 if "bfloat16" in case else 2e-5), f"{case}: {error}"
        assert error == 0 or "bits" not in case, case


@pytest.mark.parametrize("how", ["dead", "slow"])
def test_a_rank_that_is_gone_ends_the_others_with_one_line(how: str) -> None:
    first, second = started(GONE.format(how=how), 2)
    try:
        out, _ = first.communicate(timeout=300)
    finally:
        second.kill()
        second.communicate()
    assert "rank 0 waited in vain" in out
    assert "network call 1" in out
    assert len(out.splitlines()) == 1


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    task = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in task.read_text().split()] if task.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_and_the_same_command_goes_on(
    tmp_path: Path, victim: int
) -> None:
    words = "-m src.ranks --standalone --nproc_per_node=2 sample.py --model mixture-3x4x4"
    words += " --solver euler --points_degree 2 --timeout 20 --batch 2 --device cpu --seeds 0-"

    def run(last: int) -> subprocess.Popen[str]:
        command = [sys.executable, *f"{words}{last} --outdir {tmp_path / 'out'}".split()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, env=environment, cwd=ROOT, text=True, stdout=pipe, stderr=pipe
        )

    launcher = run(20000)
    while len(list(tmp_path.glob("out/[0-9]*.png"))) < 10:
        assert launcher.poll() is None
        time.sleep(0.2)
    workers = children(launcher.pid)
    ours = next(p for p in workers if f"RANK={victim}" in environment_of(p))
    os.kill(ours, signal.SIGKILL)
    began = time.monotonic()
    _, err = launcher.communicate(timeout=120)
    assert time.monotonic() - began < 90
    assert launcher.returncode not in (0, None)
    said = [line for line in err.splitlines() if "Error" in line]
    assert said == err.splitlines()[-1:], err
    assert f"rank {victim} was killed by SIGKILL at network call " in said[0]
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    written = len(list(tmp_path.glob("out/[0-9]*.png")))
    again = run(written + 3)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err[-2000:]
    assert len(list(tmp_path.glob("out/[0-9]*.png"))) == written + 4


def environment_of(pid: int) -> list[str]:
    """The variables of a process."""
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


PIPELINES = """
import json, torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch.distributed.device_mesh import init_device_mesh
from backends.parallel import parallel
from src import ranks
from tests.backends.test_families import call, learned, twin

ranks.init(torch.device("cpu"))
torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("points", "ring", "ulysses"))
results = {}
for name in ("sd3", "sdxl", "z_image", "wan", "flux"):
    pipe = twin(name)
    predictor = learned(pipe, "epd", k=3)
    alone = call(pipe, name, parallel(pipe, predictor))
    if name == "flux":
        torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and a CPU has none
        config = ContextParallelConfig(ulysses_degree=2, mesh=mesh["ring", "ulysses"])
        pipe.transformer.enable_parallelism(config=config)
    ours = call(pipe, name, parallel(pipe, predictor, mesh=mesh))
    results[name] = ((ours - alone).norm() / alone.norm()).item()
if ranks.is_first():
    print(json.dumps(results))
dist.barrier()
"""


@pytest.mark.slow
def test_a_pipeline_s_rows_are_shared_beside_its_context() -> None:
    """2 x 2 ranks; FLUX's tokens are shared by diffusers' ContextParallelConfig as well."""
    ends = [p.communicate(timeout=900) for p in started(PIPELINES, 4)]
    assert ends[0][0], "".join(err[-2000:] for _, err in ends)
    errors = json.loads(ends[0][0].splitlines()[-1])
    assert len(errors) == 5
    assert max(errors.values()) < 1e-5, errors
