"""A training loop for small networks on CPUs that are shared, resumable to the bit.

All randomness hangs on the seed and the step, and every sum has one order, so that a run that was
stopped, or ran on other cores, ends at the same numbers.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Generator, Tensor, nn

from src.files import append_jsonl, write_atomically

CHECKPOINT = "checkpoint.pt"
LOG_EVERY = 50  # steps
PAUSE = os.environ.get("EPD_PAUSE", "")
"""A file's name: while it exists, trainings sleep."""

Draw = Callable[[int, Generator], tuple[Tensor, ...]]
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Plan:
    """How to train: AdamW, the gradient's norm held at 1, the weights averaged.

    The rate rises over `warmup` steps, stays, and falls to 0 over the last `cooldown`, a share of
    all. Without a cooldown, more steps can be asked for later and nothing before them changes.
    """

    steps: int
    batch: int
    lr: float
    seed: int = 0
    threads: int = 2
    part: int = 16  # rows of a batch that a thread takes at a time
    compiled: bool = False  # by torch.compile, whole batches: three times as fast
    warmup: int = 200
    cooldown: float = 1.0
    weight_decay: float = 0.0
    ema_steps: int = 400  # half-life of the average, at most a twentieth of the steps so far
    save_every: int = 500  # steps


def fit_network(
    network: nn.Module,
    draw: Draw,
    loss: Loss,
    plan: Plan,
    outdir: Path,
    export: Callable[[Any, int], None],
) -> nn.Module:
    """Train the network in place, or go on from OUTDIR/checkpoint.pt; return the average.

    draw(step, generator) gives a step's tensors, all of one length; loss(network, *rows) is the
    mean over rows. export(average, step) is called after every checkpoint with a copy.
    metrics.jsonl in outdir is the log; its seconds are of processor time.
    """
    outdir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(plan.threads if plan.compiled else 1)
    decay = plan.weight_decay
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=plan.lr, betas=(0.9, 0.99), weight_decay=decay, fused=True
    )
    average = deepcopy(network).eval().requires_grad_(False)
    parts = {"network": network, "ema": average, "optimiser": optimiser}
    step, seconds = 0, 0.0
    if (outdir / CHECKPOINT).exists():
        state = torch.load(outdir / CHECKPOINT, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        step, seconds = state["step"], state["seconds"]
    clock = time.process_time() - seconds
    losses: list[Tensor] = []
    called = torch.compile(network, dynamic=False) if plan.compiled else network
    rows = plan.batch if plan.compiled else plan.part
    with ThreadPoolExecutor(plan.threads, "", torch.set_num_threads, (1,)) as pool:
        each = map if plan.compiled else pool.map
        while step < plan.steps:
            while PAUSE and Path(PAUSE).exists():
                time.sleep(5)
            g = Generator().manual_seed(plan.seed * 1_000_000_007 + step)
            losses.append(gradients(called, loss, draw(step, g), rows, each))
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            # a checkpoint of before has its own word of `fused`
            optimiser.param_groups[0].update(lr=lr_at(step, plan), fused=True)
            optimiser.step()
            step += 1
            halflife = min(plan.ema_steps, max(1.0, 0.05 * step))
            with torch.no_grad():
                for mean, p in zip(average.parameters(), network.parameters(), strict=True):
                    mean.lerp_(p, 1 - 0.5 ** (1 / halflife))
            seconds = time.process_time() - clock
            if step % LOG_EVERY == 0:
                line = {"step": step, "seconds": round(seconds, 1), "lr": lr_at(step - 1, plan)}
                mean = round(float(torch.stack(losses).mean()), 6)
                append_jsonl(outdir / "metrics.jsonl", line | {"loss": mean})
                losses.clear()
            if step % plan.save_every == 0 or step == plan.steps:
                state = {name: part.state_dict() for name, part in parts.items()}
                with write_atomically(outdir / CHECKPOINT) as part:
                    torch.save(state | {"step": step, "seconds": seconds}, part)
                export(deepcopy(average), step)
    return average


def gradients(
    network: Any, loss: Loss, rows: tuple[Tensor, ...], part: int, each: Callable[..., Any]
) -> Tensor:
    """Set the gradients of a step and return its loss.

    One-threaded workers take small parts from a queue, so that a core which is busy with other
    work does not hold up the rest; summed in order, so that the result does not depend on them.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]

    def work(some: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        value = loss(network, *some) * (len(some[0]) / len(rows[0]))
        return value.detach(), torch.autograd.grad(value, parameters, materialize_grads=True)

    parts = zip(*(tensor.split(part) for tensor in rows), strict=True)
    losses, grads = zip(*each(work, parts), strict=True)
    for p, *shares in zip(parameters, *grads, strict=True):
        p.grad = torch.stack(shares).sum(0) if len(shares) > 1 else shares[0]
    return torch.stack(losses).sum()


def lr_at(step: int, plan: Plan) -> float:
    """The rate of a step: up in a line, level, down in a line to 0."""
    last = plan.cooldown * plan.steps
    return plan.lr * min(1.0, (step + 1) / plan.warmup, (plan.steps - step) / last if last else 1)


Work = Callable[[Path, Path, Path | None, Plan], None]


def training(defaults: Plan, data: Path | None = None) -> Callable[[Work], click.Command]:
    """Make a command of work(data, outdir, start, plan), with the options of a training.

    What a network is untrained hangs on the seed as well.
    """
    folder = click.Path(path_type=Path, file_okay=False)
    kinds = {"steps": click.IntRange(1), "batch": click.IntRange(2), "lr": click.FloatRange(0)}
    kinds |= {"seed": click.IntRange(0), "threads": click.IntRange(1)}
    kinds |= {"cooldown": click.FloatRange(0, 1)}

    def decorate(work: Work) -> click.Command:
        @click.option("--data", type=folder, default=data, required=data is None)
        @click.option("--outdir", type=folder, required=True)
        @click.option("--start", type=folder, help="Weights to go on from, in place of none.")
        @click.option("--compile", "compiled", is_flag=True, help="Thrice as fast.")
        def command(data: Path, outdir: Path, start: Path | None, **changes: Any) -> None:
            torch.manual_seed(changes["seed"])
            try:
                work(data, outdir, start, replace(defaults, **changes))
            except ValueError as error:
                raise click.ClickException(str(error)) from error

        for name, kind in kinds.items():
            option = click.option(f"--{name}", type=kind, default=getattr(defaults, name))
            command = option(command)
        return click.command(help=work.__doc__, context_settings={"show_default": True})(command)

    return decorate
