"""A training loop for small networks on CPUs that are shared: resumable, seeded, averaged.

Everything random hangs on the seed and the step. A limit on processor time moves the learning
rate as much as the number of steps does, so that a run on a slow machine also ends at rate 0.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from src.files import append_jsonl, write_atomically

CHECKPOINT = "checkpoint.pt"
SAVE_EVERY = 180.0  # seconds
LOG_EVERY = 50  # steps

Draw = Callable[[int, Generator], tuple[Tensor, ...]]
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Plan:
    """How to train; a step's batch is worked on in parts of so many rows, one per thread.

    minutes are of processor time, all threads together: what a busy machine takes is not counted.
    """

    steps: int
    minutes: float
    lr: float
    seed: int = 0
    part: int = 16
    warmup: int = 200
    weight_decay: float = 0.0
    ema_share: float = 0.05  # the average's half-life, as a part of the steps so far
    ema_most: int = 400  # and at most so many steps
    threads: int = 2


@dataclass
class Run:
    """A training run as far as it has come."""

    network: nn.Module
    ema: nn.Module
    optimiser: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0

    def averaged(self) -> Any:
        """A copy of the average on the CPU, for what is exported."""
        return deepcopy(self.ema).cpu()

    def save(self, outdir: Path) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        with write_atomically(outdir / CHECKPOINT) as part:
            torch.save(state, part)

    def restore(self, outdir: Path) -> None:
        """Go on from the checkpoint in outdir, if there is one."""
        if not (outdir / CHECKPOINT).exists():
            return
        state = torch.load(outdir / CHECKPOINT, weights_only=True, map_location="cpu")
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds = state["step"], state["seconds"]


def fit(
    network: nn.Module,
    draw: Draw,
    loss: Loss,
    plan: Plan,
    outdir: Path,
    export: Callable[[Run], None],
) -> Run:
    """Train, or go on; checkpoint.pt and metrics.jsonl go to outdir, `export` sees every save.

    draw(step, generator) gives a step's tensors, all of one length; loss(network, *rows) is the
    mean over rows, which lie where the network is. The network is changed in place.
    """
    outdir.mkdir(parents=True, exist_ok=True)
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=plan.lr, betas=(0.9, 0.99), weight_decay=plan.weight_decay
    )
    run = Run(network, deepcopy(network).eval().requires_grad_(False), optimiser)
    run.restore(outdir)
    saved, clock = run.seconds, time.process_time() - run.seconds
    losses: list[Tensor] = []
    with ThreadPoolExecutor(plan.threads) as pool:
        while (progress := max(run.step / plan.steps, run.seconds / 60 / plan.minutes)) < 1:
            g = Generator().manual_seed(plan.seed * 1_000_000_007 + run.step)
            losses.append(gradients(network, loss, draw(run.step, g), plan.part, pool))
            advance(run, progress, plan)
            run.seconds = time.process_time() - clock
            if run.step % LOG_EVERY == 0:
                append_jsonl(outdir / "metrics.jsonl", record(run, losses))
                losses.clear()
            if run.seconds - saved > SAVE_EVERY:
                run.save(outdir)
                export(run)
                saved = run.seconds
    run.save(outdir)
    export(run)
    return run


def gradients(
    network: nn.Module, loss: Loss, drawn: tuple[Tensor, ...], part: int, pool: ThreadPoolExecutor
) -> Tensor:
    """Set the gradients of a step, return its loss.

    One-threaded workers take small parts from a queue, so that a core which is busy with other
    work does not hold up the rest; summed in order, so that the result does not depend on them.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    device = parameters[0].device

    def work(rows: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        torch.set_num_threads(1)
        value = loss(network, *(row.to(device) for row in rows)) * (len(rows[0]) / len(drawn[0]))
        grads = torch.autograd.grad(value, parameters, materialize_grads=True)
        return value.detach(), grads

    parts = zip(*(tensor.split(part) for tensor in drawn), strict=True)
    losses, grads = zip(*pool.map(work, parts), strict=True)
    for p, *shares in zip(parameters, *grads, strict=True):
        p.grad = shares[0] if len(shares) == 1 else torch.stack(shares).sum(0)
    return torch.stack(losses).sum()


def advance(run: Run, progress: float, plan: Plan) -> None:
    """One step of the optimiser at the rate of this moment, then of the average."""
    torch.nn.utils.clip_grad_norm_(run.network.parameters(), 1.0)
    for group in run.optimiser.param_groups:
        group["lr"] = lr_at(progress, run.step, plan)
    run.optimiser.step()
    run.step += 1
    halflife = min(plan.ema_most, max(1.0, plan.ema_share * run.step))
    pull = 1 - 0.5 ** (1 / halflife)
    with torch.no_grad():
        for averaged, p in zip(run.ema.parameters(), run.network.parameters(), strict=True):
            averaged.lerp_(p, pull)


def part_of(batch: int, device: str) -> int:
    """How many rows a worker takes: half of them, but all on anything but the CPU."""
    return max(1, batch // 2) if device == "cpu" else batch


def initialise(network: nn.Module, seed: int, zero: tuple[str, ...] = ()) -> None:
    """Fill the weights in place, every draw from the seed.

    Matrices and kernels uniform with variance 1 / (3 fan-in), embeddings and single vectors small
    normal, biases 0, gains left at 1; what has one of `zero` in its name starts at 0.
    """
    g = Generator().manual_seed(seed)
    norms = (nn.LayerNorm, nn.GroupNorm)
    kept = {id(p) for m in network.modules() if isinstance(m, norms) for p in m.parameters()}
    tables = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, p in network.named_parameters():
            if id(p) in kept or p.ndim == 0 or (p.ndim == 1 and name.endswith("weight")):
                continue
            if name.endswith("bias") or any(part in name for part in zero):
                p.zero_()
            elif p.ndim == 1 or id(p) in tables or "embedding" in name.rsplit(".", 1)[-1]:
                p.copy_(0.02 * torch.randn(p.shape, generator=g))
            else:
                bound = p[0].numel() ** -0.5
                p.copy_((torch.rand(p.shape, generator=g) * 2 - 1) * bound)


def lr_at(progress: float, step: int, plan: Plan) -> float:
    """Linear warm-up, then a cosine down to 0 at progress 1."""
    return plan.lr * min(1.0, (step + 1) / plan.warmup) * (1 + cos(pi * min(progress, 1.0))) / 2


def record(run: Run, losses: list[Tensor]) -> dict[str, float]:
    """A line of the log: the mean loss since the last line."""
    return {
        "step": run.step,
        "seconds": round(run.seconds, 1),
        "loss": round(float(torch.stack(losses).mean()), 6),
        "lr": run.optimiser.param_groups[0]["lr"],
        "load": round(os.getloadavg()[0], 1),
    }
