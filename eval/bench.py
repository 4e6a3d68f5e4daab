"""What sampling costs beyond its bare network calls, on one device, several ranks, or a GPU.

Only ratios within one run: what is compared takes turns, and the median of the turns counts.

    python -m eval.bench
    torchrun --nproc_per_node=2 -m eval.bench --model tiny-sd3 --points_degree 2
    python -m eval.bench --simulate sd3 0.022 --simulate flux 0.19 --gather_gbs 20
    python -m eval.bench --suite gpu
"""

import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh

from backends.base import Backend
from backends.generate import ImageBatch, Job, generate
from backends.load import load_backend, shipped_models
from backends.spread import spread
from eval.latency import POINTS, SIZES, Table, Tables, even_points, simulated, time_shared
from eval.machine import ROOT, clock, provenance
from solvers.field import Condition
from solvers.predictor import find_predictor, load_predictor
from solvers.process import FLOW
from solvers.recipe import for_flow
from solvers.sampler import Sampler, hand_made
from src import ranks
from src.files import check_writable, write_json, write_text
from src.options import Device, Number, OneLineCommand
from src.text import aligned, number

SOLVERS = ("euler", "ipndm-3", "dpmpp-3", "unipc-3")
NUM_STEPS = 6
PREDICTOR = "cifar10-5nfe"
BATCHES = (1, 16)
ROW_SECONDS = (click.Choice(list(SIZES)), Number(0, min_open=True))
GPU_BATCHES = (1, 4, 16, 64)
MODELS = ("fashion-mnist-32", "tiny-sd3")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMMANDS = {
    "fit": "train_distill.py --num_steps 4 --num_points 2 --outdir {folder}/fit",
    "PPO step": "-m training.ppo.launch --config training/ppo/cfgs/tiny_sd3.yaml --max-steps 1 "
    "--override run.output_root={folder}",
    "ranks": "-m src.ranks --standalone --nproc_per_node={count} -m eval.bench --model tiny-sd3 "
    "--points_degree {count} --repeats 5 --out exps/devices/ranks.json",
}
"""What the suite for a GPU runs as a whole; the last where there are several."""


def with_network(backend: Backend, network: Callable[..., Tensor]) -> Backend:
    """The backend with this network in place of its own, guided already."""
    return replace(backend, denoise=network, guide=lambda denoise, _rate, _cond: denoise)


def paired(
    first: Callable[[], object], second: Callable[[], object], repeats: int, device: torch.device
) -> list[tuple[float, float]]:
    """The seconds of two things that take turns, the one that starts changing every time."""
    turns: list[tuple[float, float]] = []
    for turn in range(repeats + 1):
        seconds = [0.0, 0.0]
        for which in (0, 1) if turn % 2 else (1, 0):
            started = clock(device)
            (first, second)[which]()
            seconds[which] = clock(device) - started
        turns.append((seconds[0], seconds[1]))
    return turns[1:]  # the first warms up


def time_sampler(
    name: str, backend: Backend, sampler: Sampler, batch: int, repeats: int, points: int = 1
) -> dict[str, Any]:
    """One sampler at one batch size; points is the K of its table.

    sample: seconds of generate(); network: of the same calls alone; rest: of generate() on a
    network that answers at once; one_by_one: with a call a point, over all K in one.
    """
    jobs = [Job(seed, backend.usual_prompt(seed)) for seed in range(batch)]
    cond = backend.encode([job.prompt for job in jobs])
    network = backend.guided(sampler.guidance_rate, cond)
    calls: list[tuple[Tensor, Tensor, Condition | None]] = []

    def record(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        calls.append((x, sigma, cond))
        return network(x, sigma, cond)

    def sample(on: Backend = backend, chunk: int | None = None) -> None:
        next(generate(on, sampler, jobs, batch=batch, points_chunk=chunk))

    @torch.no_grad()
    def replay() -> None:
        for call in calls:
            network(*call)

    sample(with_network(backend, record))
    device, quick = backend.device, with_network(backend, lambda x, _sigma, _cond: x)
    pairs = paired(sample, replay, repeats, device)
    nothing = paired(lambda: sample(quick), lambda: None, repeats, device)
    apart = paired(lambda: sample(chunk=1), sample, repeats, device) if points > 1 else []
    return {
        "name": name,
        "batch": batch,
        "calls": sampler.calls,
        "sample": median(a for a, _ in pairs),
        "network": median(b for _, b in pairs),
        "ratio": median(a / b for a, b in pairs),
        "rest": median(a for a, _ in nothing),
        "one_by_one": median(a / b for a, b in apart) if apart else None,
    }


def bench_solvers(backend: Backend, predictor: str, repeats: int) -> Tables:
    """Solvers by hand and a predictor at batch 1 and 16. ValueError for an unknown predictor."""
    table = load_predictor(find_predictor(predictor))
    points = table.recipe.num_points
    samplers = {name: (hand_made(name, backend.levels, NUM_STEPS), 1) for name in SOLVERS}
    same = for_flow(table.recipe) == (backend.levels.process == FLOW)
    sampler = (
        table.sampler(backend.levels) if same else even_points(backend.levels, points, NUM_STEPS)
    )
    samplers[f"epd K={points}"] = sampler, points
    lines: Table = []
    with ranks.progress(len(BATCHES) * len(samplers), "solver") as bar:
        for batch in BATCHES:
            for name, (sampler, k) in samplers.items():
                turns = max(3, repeats // batch)
                lines.append(time_sampler(name, backend, sampler, batch, turns, k))
                bar.update()
    return {"timings": lines}


def bench_gpu(device: torch.device, repeats: int, models: Iterable[str]) -> Tables:
    """All that is asked of a GPU, with images by these models; ValueError where there is none."""
    if device.type != "cuda":
        raise ValueError("--suite gpu needs a GPU, and there is none here: leave it out")
    images = [line for name in models for line in gpu_images(name, device)]
    tables = {"images": images, "times": gpu_times(device, repeats), "one rank": one_rank(device)}
    with TemporaryDirectory() as folder:
        return {**tables, "commands": run_commands(Path(folder))}


def gpu_images(model: str, device: torch.device) -> Table:
    """How far a model's images are from the CPU's, and how often a step of them waits."""
    reference, lines = sampled(load_backend(model), 4).images, []
    for dtype in DTYPES:
        backend = load_backend(model, device=device, dtype=dtype)
        off = sampled(backend, 4).images.cpu() - reference
        errors = {"rms": off.square().mean().sqrt().item(), "largest": off.abs().max().item()}
        waits = (count_waits(backend, 7) - count_waits(backend, 4)) / 3
        lines.append({"model": model, "dtype": str(dtype)[6:], **errors, "waits a step": waits})
    return lines


def sampled(backend: Backend, num_steps: int) -> ImageBatch:
    """Two images by EPD with two points."""
    jobs = [Job(seed, backend.usual_prompt(seed)) for seed in range(2)]
    return next(generate(backend, even_points(backend.levels, 2, num_steps), jobs, batch=2))


def count_waits(backend: Backend, num_steps: int) -> int:
    """How often the CPU waits for the GPU while two images are made."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        sampled(backend, num_steps)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA" in str(warning.message) for warning in caught)


def gpu_times(device: torch.device, repeats: int) -> Table:
    """EPD with 1, 2 and 4 points against its bare calls, and DPM-Solver-2 at the same steps."""
    lines: Table = []
    for model in MODELS:
        backend = replace(load_backend(model, device=device), decode=lambda latents: latents)
        samplers = {"dpm2": (hand_made("dpm2", backend.levels, NUM_STEPS), 1)}
        samplers |= {f"epd K={k}": (even_points(backend.levels, k, NUM_STEPS), k) for k in POINTS}
        for batch in GPU_BATCHES:
            given = [(name, backend, s, batch, repeats, k) for name, (s, k) in samplers.items()]
            timings = [time_sampler(*each) for each in given]
            dpm2 = timings[0]["sample"]
            lines += [{"model": model, **t, "over dpm2": t["sample"] / dpm2} for t in timings]
    return lines


def one_rank(device: torch.device) -> Table:
    """A group of one rank: whether its images are those of no group, and what a call takes."""
    backend = load_backend(MODELS[0], device=device)
    alone = sampled(backend, 4).latents
    name = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(name, store=HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (1, 1), mesh_dim_names=("data", "points"))
    same = sampled(spread(backend, mesh), 4).latents.equal(alone)
    calls = time_shared(backend, mesh, 3)["calls"]
    ranks.close()
    return [{"group": name, "same images": same, **line} for line in calls]


def run_commands(folder: Path) -> Table:
    """What whole commands take, and how they end."""
    count, lines = torch.cuda.device_count(), []
    for name, command in COMMANDS.items():
        words = command.format(folder=folder, count=count).split()
        if "{count}" in command and count < 2:
            continue
        started = time.perf_counter()
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        seconds, said = time.perf_counter() - started, (done.stdout + done.stderr).splitlines()
        end = {"status": done.returncode, "last line": said[-1][-80:] if said else ""}
        lines.append({"command": name, "seconds": seconds, **end})
    return lines


def as_text(tables: Tables) -> str:
    """Tables with their names above them."""

    def cell(value: object) -> str:
        return number(value) if isinstance(value, float | None) else str(value)

    texts: list[str] = []
    for name, lines in tables.items():
        rows: list[Sequence[str]] = [list(lines[0]), *([*map(cell, r.values())] for r in lines)]
        texts.append(f"{name}\n\n{aligned(rows)}\n")
    return "\n".join(texts)


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--model", default="fashion-mnist-32", help="Folder, EDM .pkl, or a shipped name.")
@click.option("--predictor", default=PREDICTOR, help="Any table: its figures do not matter here.")
@click.option("--repeats", type=click.IntRange(3), default=40, help="Turns of each.")
@click.option("--points_degree", type=click.IntRange(1), default=1, help="Ranks for an image.")
@click.option(
    "--simulate", multiple=True, type=ROW_SECONDS, help="sd3 or flux at 1024, seconds a row."
)
@click.option("--gather_gbs", type=Number(0, min_open=True), default=20.0, help="GB/s of a rank.")
@click.option("--suite", type=click.Choice(["solvers", "gpu"]), default="solvers")
@click.option("--out", type=click.Path(path_type=Path), default="runs/bench.json")
@click.option("--device", type=Device(), default="auto")
def main(device: torch.device, out: Path, **options: Any) -> None:
    """Time sampling against its own network calls, replayed, at batch 1 and 16.

    "ratio" is sampling over the bare calls, the difference of two large times; "rest" is sampling
    with a network that answers at once: the same, with less noise. "one_by_one" is sampling with
    a call for every point over that with all K in one. Latents are not decoded.

    Under torchrun, --points_degree times images whose rows the ranks share. --simulate says what
    1 to 64 devices would take. --suite gpu checks and times a GPU in under 5 minutes, with images
    by the shipped models and by --model.
    Prints tables in seconds, and writes them with JSON beside.
    """
    if out.suffix == ".txt":
        raise ValueError(f"--out {out} is for JSON, the table goes into a .txt beside it")
    check_writable(out)
    kinds = {"--simulate": options["simulate"], "--suite gpu": options["suite"] == "gpu"}
    kinds["--points_degree"] = options["points_degree"] > 1
    if len(asked := [name for name, is_asked in kinds.items() if is_asked]) > 1:
        raise ValueError(f"{asked[0]} and {asked[1]} are benches of their own: give one of them")
    device, repeats = ranks.init(device), options["repeats"]
    if options["simulate"]:
        given, speed = options["simulate"], options["gather_gbs"]
        lines = [line for name, t in given for line in simulated(name, t, speed)]
        tables = {"seconds of 10 calls, by devices": lines}
    elif options["suite"] == "gpu":
        models = dict.fromkeys((options["model"], *shipped_models()))
        tables = bench_gpu(device, min(repeats, 5), models)
    else:
        backend = load_backend(options["model"], device=device)
        backend = replace(backend, decode=lambda latents: latents)
        mesh = ranks.point_mesh(options["points_degree"], device)
        if mesh:
            tables = time_shared(backend, mesh, repeats)
        else:
            tables = bench_solvers(backend, options["predictor"], repeats)
    if ranks.is_first():
        click.echo(text := as_text(tables))
        click.echo("Medians of turns in one run; only the ratios mean something elsewhere.")
        about = {name: options[name] for name in ("model", "predictor", "repeats")}
        write_json(out, {"about": about | provenance(device), **tables})
        write_text(out.with_suffix(".txt"), text)
        click.echo(f"wrote {out}")
    ranks.close()


if __name__ == "__main__":
    main()
