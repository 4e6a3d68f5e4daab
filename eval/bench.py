"""What sampling costs beyond its bare network calls, and K points in one call or one by one.

Only ratios within one run: what is compared takes turns, and the median of the turns counts.

    python -m eval.bench
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import click
import torch
from torch import Tensor

from backends.base import Backend
from backends.generate import Job, generate
from backends.load import load_backend
from eval.machine import clock, provenance
from solvers.field import Condition
from solvers.predictor import find_predictor, load_predictor
from solvers.sampler import Sampler, hand_made
from src import ranks
from src.files import write_json
from src.options import Device, OneLineCommand
from src.stats import aligned

SOLVERS = ("euler", "ipndm-3", "dpmpp-3", "unipc-3")
NUM_STEPS = 6
PREDICTOR = "cifar10-5nfe"
BATCHES = (1, 16)
HEAD = (
    *("solver", "batch", "NFE", "sample ms", "network ms", "rest ms"),
    *("beyond", "rest", "K one by one"),
)


@dataclass(frozen=True)
class Timing:
    """One method at one batch size; seconds are medians, ratios medians of adjacent pairs."""

    name: str
    batch: int
    calls: int
    sample: float  # seconds of generate(), latents left undecoded
    network: float  # seconds of the same network calls alone
    ratio: float  # sample / network, 1 being no overhead; a small difference of large times
    rest: float  # seconds of generate() on a network that answers at once: all but the network
    one_by_one: float | None = None  # sampling with a call a point / all K in one call

    @property
    def cells(self) -> tuple[str, ...]:
        """A line of the table."""
        times = (f"{seconds * 1e3:.2f}" for seconds in (self.sample, self.network, self.rest))
        shares = (f"{100 * (self.ratio - 1):+.1f} %", f"{100 * self.rest / self.network:.1f} %")
        chunked = "-" if self.one_by_one is None else f"{self.one_by_one:.2f}"
        return self.name, str(self.batch), str(self.calls), *times, *shares, chunked


def instant(x: Tensor, _sigma: Tensor, _cond: Condition | None) -> Tensor:
    """A network that takes no time: x itself for the clean sample."""
    return x


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
) -> Timing:
    """One sampler at one batch size; points is the K of its table."""
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
    device, quick = backend.device, with_network(backend, instant)
    pairs = paired(sample, replay, repeats, device)
    nothing = paired(lambda: sample(quick), lambda: None, repeats, device)
    apart = paired(lambda: sample(chunk=1), sample, repeats, device) if points > 1 else []
    return Timing(
        name=name,
        batch=batch,
        calls=sampler.calls,
        sample=median(a for a, _ in pairs),
        network=median(b for _, b in pairs),
        ratio=median(a / b for a, b in pairs),
        rest=median(a for a, _ in nothing),
        one_by_one=median(a / b for a, b in apart) if apart else None,
    )


@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--model", default="fashion-mnist-32", help="Folder, EDM .pkl, or a shipped name.")
@click.option("--predictor", default=PREDICTOR, help="Any table: its figures do not matter here.")
@click.option("--repeats", type=click.IntRange(3), default=40, help="Turns of each.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/bench.json")
@click.option("--device", type=Device(), default="auto")
def main(model: str, predictor: str, repeats: int, out: Path, device: torch.device) -> None:
    """Time sampling against its own network calls, replayed, at batch 1 and 16.

    "beyond" is sampling over the bare calls, the difference of two large times; "rest" is
    sampling with a network that answers at once, in per cent of the calls: the same, with less
    noise. "K one by one" is sampling with a call for every point over that with all K in one.
    Latents are not decoded.
    Prints a table and writes JSON.
    """
    backend = replace(load_backend(model, device=device), decode=lambda latents: latents)
    table = load_predictor(find_predictor(predictor))
    points = table.recipe.num_points
    samplers = {name: (hand_made(name, backend.levels, NUM_STEPS), 1) for name in SOLVERS}
    samplers[f"epd K={points}"] = table.sampler(backend.levels), points
    timings: list[Timing] = []
    bar = ranks.progress(len(BATCHES) * len(samplers), "solver")
    for batch in BATCHES:
        for name, (sampler, k) in samplers.items():
            turns = max(3, repeats // batch)
            timings.append(time_sampler(name, backend, sampler, batch, turns, k))
            bar.update()
    bar.close()
    click.echo(aligned([HEAD, *(timing.cells for timing in timings)]))
    click.echo("Medians of turns in one run; only the ratios mean something on another machine.")
    about = {"model": model, "predictor": predictor, "repeats": repeats, **provenance(device)}
    write_json(out, {"about": about, "timings": [asdict(t) for t in timings]})
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
