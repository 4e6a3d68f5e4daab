"""The tour's second half: the shipped text-to-image model, its own Euler beside EPD.

The same prompts and seeds at fewer and fewer calls, and how far each ends from 100 steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backends.base import Backend
from backends.generate import Job, generate
from backends.load import load_backend
from backends.methods import HandMade
from eval.candidates import Candidate, hand_made, learned, variants
from eval.report import aligned, number
from src.text import read_prompts

MODEL = "tiny-sd3"
ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = ROOT / "src" / "prompts" / "emoji-heldout.txt"
GUIDANCE_RATE = 4.0
FINE_STEPS = 100
EULER = (28, 20, 10, 6)
LEARNED = (20, 10, 6)
SHOWN = ("red apple", "smiling face", "rocket", "dog face", "pizza", "red heart", "sun", "fire")
"""Beside some of the prompts that no training saw."""
UNSEEN = 4


@dataclass(frozen=True)
class Row:
    """What one solver made of all jobs."""

    name: str
    nfe: int
    latents: Tensor  # [N, *]
    images: Tensor  # [N, 3, H, W] in [0, 1]


def candidates(backend: Backend, folder: Path) -> list[Candidate]:
    """Euler on the pipeline's own schedule, then the EPD predictors of the folder."""
    found = [
        c
        for n in EULER
        for c in variants("euler", n, ["flowmatch"], backend.levels, GUIDANCE_RATE)
    ]
    epd = learned(sorted(folder.glob("epd-k2-*.pkl")), backend)
    return [*found, *(c for n in LEARNED for c in epd if c.nfe == n)]


def chosen_jobs() -> list[Job]:
    """Usual prompts and some that no training saw, prompt i from seed i."""
    unseen = read_prompts(HELD_OUT)
    prompts = [*SHOWN, *(unseen[i * len(unseen) // UNSEEN] for i in range(UNSEEN))]
    return [Job(seed, prompt) for seed, prompt in enumerate(prompts)]


def drawn(backend: Backend, candidate: Candidate, jobs: Sequence[Job]) -> Row:
    """The jobs in one batch."""
    batch = next(generate(backend, candidate.method, jobs, batch=len(jobs)))
    return Row(candidate.name, candidate.nfe, batch.latents, batch.images)


def fine(backend: Backend) -> Candidate:
    """100 steps of Euler on the pipeline's schedule."""
    choice = HandMade("euler", FINE_STEPS + 1, "flowmatch")
    return hand_made(choice, backend.levels, GUIDANCE_RATE)


def text_rows(model: str, exps: Path, device: torch.device) -> tuple[list[Row], list[str]]:
    """-> a row for each solver, the 100 steps last, and the prompts.

    Raises ValueError where the model is not there.
    """
    backend, jobs = load_backend(model, device=device), chosen_jobs()
    ways = [*candidates(backend, exps / model), fine(backend)]
    return [drawn(backend, way, jobs) for way in ways], [str(job.prompt) for job in jobs]


def error_table(rows: Sequence[Row]) -> str:
    """How far each row's latents end from the last's."""
    *others, last = rows
    head = ["solver", "calls", f"RMSE to {last.nfe} calls"]
    return aligned([head, *([r.name, str(r.nfe), number(error(r, last))] for r in others)])


def error(row: Row, last: Row) -> float:
    """The root of the mean squared difference of the latents, over all numbers."""
    return (row.latents - last.latents).double().square().mean().sqrt().item()
