"""What sampling costs beyond its bare network calls, and K points in one call or one by one.

Only ratios within one run: what is compared takes turns, and the median of the turns counts.

    python -m eval.bench
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import click
import torch
from torch import Tensor
from tqdm import tqdm

from backends.base import Backend, Wrapped
from backends.generate import Job, Method, generate
from backends.load import load_backend
from backends.methods import HandMade, predictor_method, sequential_calls
from eval.machine import clock, provenance
from eval.report import aligned
from solvers.field import Condition, Denoiser
from solvers.predictor import find_predictor, load_predictor
from src.files import write_json
from src.options import Device, OneLineCommand, one_line_errors

SOLVERS = ("euler", "ipndm-3", "dpmpp-3", "unipc-3")
NUM_STEPS = 6
PREDICTOR = "cifar10-5nfe"
BATCHES = (1, 16)

Call = tuple[Tensor, Tensor, Condition | None]


@dataclass(frozen=True)
class Timing:
    """One method at one batch size; seconds are medians, ratios medians of adjacent pairs."""

    name: str
    batch: int
    calls: int
    sample: float  # seconds of generate(), decoding included
    network: float  # seconds of the same network calls alone
    ratio: float  # sample / network, 1 being no overhead; a small difference of large times
    rest: float  # seconds of generate() on a network that answers at once: all but the network
    one_by_one: float | None = None  # sampling with a call a point / all K in one call


class AtOnce:
    """A network that takes no time: x itself for the clean sample."""

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        return x


def recorded_calls(backend: Backend, method: Method, jobs: Sequence[Job]) -> list[Call]:
    """What sampling asks of the network: the arguments of every call."""
    calls: list[Call] = []
    network = backend.guided(method.guidance_rate, backend.encode([job.prompt for job in jobs]))

    def record(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        calls.append((x, sigma, cond))
        return network(x, sigma, cond)

    run(Wrapped(backend, record), method, jobs)
    return calls


def run(backend: Backend, method: Method, jobs: Sequence[Job]) -> None:
    """Sample the jobs as one batch."""
    for _ in generate(backend, method, jobs, batch=len(jobs)):
        pass


@torch.no_grad()
def replay(network: Denoiser, calls: Sequence[Call]) -> None:
    """The network calls alone."""
    for x, sigma, cond in calls:
        network(x, sigma, cond)


def paired(
    first: Callable[[], object], second: Callable[[], object], repeats: int, device: torch.device
) -> list[tuple[float, float]]:
    """The seconds of two things that take turns, the one that starts changing every time."""
    found: list[tuple[float, float]] = []
    for turn in range(repeats + 1):
        seconds = [0.0, 0.0]
        for which in (0, 1) if turn % 2 else (1, 0):
            started = clock(device)
            (first, second)[which]()
            seconds[which] = clock(device) - started
        found.append((seconds[0], seconds[1]))
    return found[1:]  # the first warms up


def time_method(name: str, backend: Backend, method: Method, batch: int, repeats: int) -> Timing:
    """One method at one batch size."""
    jobs = [Job(seed, backend.usual_prompt(seed)) for seed in range(batch)]
    calls = recorded_calls(backend, method, jobs)
    network = backend.guided(method.guidance_rate, backend.encode([job.prompt for job in jobs]))
    device, quick = backend.device, Wrapped(backend, AtOnce())
    pairs = paired(
        lambda: run(backend, method, jobs), lambda: replay(network, calls), repeats, device
    )
    nothing = paired(lambda: run(quick, method, jobs), lambda: None, repeats, device)
    return Timing(
        name=name,
        batch=batch,
        calls=sequential_calls(method),
        sample=median(a for a, _ in pairs),
        network=median(b for _, b in pairs),
        ratio=median(a / b for a, b in pairs),
        rest=median(a for a, _ in nothing),
        one_by_one=one_by_one(backend, method, jobs, repeats) if method.table else None,
    )


def one_by_one(backend: Backend, method: Method, jobs: Sequence[Job], repeats: int) -> float:
    """The time of K points in a call each, over that of all in one call."""
    apart = replace(method, points_chunk=1)
    pairs = paired(
        lambda: run(backend, apart, jobs),
        lambda: run(backend, method, jobs),
        repeats,
        backend.device,
    )
    return median(a / b for a, b in pairs)


def as_row(t: Timing) -> tuple[str, ...]:
    """A line of the table."""
    times = (f"{seconds * 1e3:.2f}" for seconds in (t.sample, t.network, t.rest))
    chunked = "-" if t.one_by_one is None else f"{t.one_by_one:.2f}"
    shares = (f"{100 * (t.ratio - 1):+.1f} %", f"{100 * t.rest / t.network:.1f} %")
    return t.name, str(t.batch), str(t.calls), *times, *shares, chunked


HEAD = (
    *("solver", "batch", "NFE", "sample ms", "network ms", "rest ms"),
    *("beyond", "rest", "K one by one"),
)


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--model", default="fashion-mnist-32", help="Folder, EDM .pkl, or a shipped name.")
@click.option("--predictor", default=PREDICTOR, help="Any table: its figures do not matter here.")
@click.option("--repeats", type=click.IntRange(3), default=40, help="Turns of each.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/bench.json")
@click.option("--device", type=Device(), default="auto")
@one_line_errors
def main(model: str, predictor: str, repeats: int, out: Path, device: torch.device) -> None:
    """Time sampling against its own network calls, replayed, at batch 1 and 16.

    "beyond" is sampling over the bare calls, the difference of two large times; "rest" is
    sampling with a network that answers at once, in per cent of the calls: the same, with less
    noise. "K one by one" is sampling with a call for every point over that with all K in one.
    Latents are not decoded.
    Prints a table and writes JSON.
    """
    backend = Wrapped(load_backend(model, device=device), decoder=lambda latents: latents)
    methods = {s: HandMade(s, NUM_STEPS).method(backend.levels) for s in SOLVERS}
    table = load_predictor(find_predictor(predictor))
    methods[f"epd K={table.recipe.num_points}"] = predictor_method(table, backend.levels)
    todo = [(name, batch) for batch in BATCHES for name in methods]
    timings = [
        time_method(name, backend, methods[name], batch, max(3, repeats // batch))
        for name, batch in tqdm(todo, unit="solver", disable=None)
    ]
    click.echo(aligned([HEAD, *map(as_row, timings)]))
    click.echo("Medians of turns in one run; only the ratios mean something on another machine.")
    about = {"model": model, "predictor": predictor, "repeats": repeats, **provenance(device)}
    write_json(out, {"about": about, "timings": [asdict(t) for t in timings]})
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
