"""Images by tables, and their scores, on all ranks: rollouts and evaluations both come here.

B images of a call, b of them this rank's.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from backends.base import Backend, Prompt, Wrapped
from backends.generate import Batch, Job, Method, generate
from solvers.epd import Directions
from solvers.field import Condition
from src import ranks
from training.ppo.task import Scorer, Task
from training.stop import Stop

T = TypeVar("T")
Row: TypeAlias = dict[str, float]
"""The scores of an image by name."""
PARTS = ("text", "denoise", "decode", "reward")


@dataclass
class Clock:
    """Seconds by what they were spent on."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def now(self) -> float:
        """The time once the device is done with what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Count what happens meanwhile, apart from what is counted within."""
        before, within = self.now(), sum(self.seconds.values())
        yield
        others = sum(self.seconds.values()) - within
        self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - before - others


def timed(backend: Backend, clock: Clock, decode_batch: int) -> Wrapped:
    """The backend, its ends timed; it decodes so many latents at once."""

    def encode(prompts: Sequence[Prompt]) -> Condition | None:
        with clock.on("text"):
            return backend.encode(prompts)

    def decode(latents: Tensor) -> Tensor:
        with clock.on("decode"):
            return torch.cat([backend.decode(part) for part in latents.split(decode_batch)])

    return Wrapped(backend, encoder=encode, decoder=decode)


@dataclass(frozen=True)
class Scored:
    """What B images scored, in their order, on every rank."""

    scores: dict[str, Tensor]  # [B] in float64, NaN where there is none
    reasons: tuple[str, ...]  # why not
    seconds: dict[str, float]  # of the slowest rank, by part


def batches(
    task: Task, method: Method, jobs: Sequence[Job], clock: Clock, poll: Callable[[], object]
) -> Iterator[Batch]:
    """The images of jobs, `task.batch` at once; a table [B, N, K] has a row for each job."""
    backend = timed(task.backend, clock, task.decode_batch)
    for start in range(0, len(jobs), task.batch):
        poll()
        part = jobs[start : start + task.batch]
        own = of_images(method, slice(start, start + len(part)))
        with clock.on("denoise"):
            batch = next(generate(backend, own, part, batch=len(part)))
        yield batch


def of_images(method: Method, images: slice) -> Method:
    """The method with its table's rows of some images; a table [N, K] is all images'."""
    table = method.table
    if not isinstance(table, Directions) or table.r.ndim == 2:
        return method
    cut = (t[images] if t.ndim == 3 else t for t in table.tensors())  # known slopes are [N, H]
    return replace(method, table=Directions(*cut))


def score_jobs(
    task: Task, method: Method, jobs: Sequence[Job], scorers: Sequence[Scorer], stop: Stop
) -> Scored:
    """All jobs' scores, on every rank; each rank makes every n-th image.

    Raises Stopped, on all ranks, where a signal asks for it, and ValueError where no image has
    any score.
    """
    own = of_images(method, slice(ranks.rank(), None, ranks.world_size()))
    clock = Clock(task.backend.device)
    found: list[Row] = []
    reasons: list[str] = []
    for batch in batches(task, own, ranks.share(jobs), clock, stop.poll):
        with clock.on("reward"):
            found += scores_of(batch, scorers, reasons)
    stop.agree()
    told = ranks.gather_objects((found, reasons, clock.seconds))
    images = in_order([mine for mine, _, _ in told])
    why = tuple(reason for _, some, _ in told for reason in some)
    names = dict.fromkeys(name for row in images for name in row)
    if not names:
        raise ValueError(f"no image could be scored: {why[0]}")
    wide = torch.float64
    return Scored(
        {n: torch.tensor([row.get(n, math.nan) for row in images], dtype=wide) for n in names},
        why,
        {part: max(seconds[part] for _, _, seconds in told) for part in PARTS},
    )


def in_order(parts: Sequence[Sequence[T]]) -> list[T]:
    """Every n-th of all from each of n ranks -> all in their order."""
    whole = {
        rank + i * len(parts): v for rank, part in enumerate(parts) for i, v in enumerate(part)
    }
    return [whole[i] for i in range(len(whole))]


def scores_of(batch: Batch, scorers: Sequence[Scorer], reasons: list[str]) -> list[Row]:
    """The scores of each image by all scorers; an image without any, or some, tells why."""
    whole = batch.images.flatten(1).isfinite().all(1)
    good = whole.nonzero()[:, 0].tolist()
    reasons += ["the image holds NaN or infinity: try dtype float32"] * (len(whole) - len(good))
    prompts = ["" if batch.jobs[i].prompt is None else str(batch.jobs[i].prompt) for i in good]
    rows: list[Row] = [{} for _ in batch.jobs]
    for scorer in scorers if good else ():
        scores = singly(scorer, batch.images[whole], prompts, reasons)
        for i, row in zip(good, scores, strict=True):
            rows[i] |= row
    return rows


def singly(
    scorer: Scorer, images: Tensor, prompts: Sequence[str], reasons: list[str]
) -> list[Row]:
    """The finite scores of each image; where all at once have none, of each alone."""
    try:
        columns = {name: values.tolist() for name, values in scorer(images, prompts).items()}
    except ValueError as error:
        if len(images) == 1:
            reasons.append(str(error))
            return [{}]
        pairs = zip(images.split(1), prompts, strict=True)
        return [singly(scorer, image, [prompt], reasons)[0] for image, prompt in pairs]
    rows = [{name: values[i] for name, values in columns.items()} for i in range(len(images))]
    for row in rows:
        reasons += [f"{name} gave {v}" for name, v in row.items() if not math.isfinite(v)]
    return [{name: v for name, v in row.items() if math.isfinite(v)} for row in rows]
