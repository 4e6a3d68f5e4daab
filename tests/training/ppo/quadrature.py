"""A model whose slope is known, so that the best table is, and what a short run of it takes.

dx/dsigma = 2 HEIGHT sigma from 1 down to 0.1: the midpoint rule is exact, so that with K = 1 the
best position is where sigma is 0.55. All pixels of an image are 1/2 plus the error of the solver
(noise is negligible), and the reward is less their square.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from backends.base import Backend, NoiseLevels
from solvers.epd import EPD, Directions
from solvers.field import Condition
from solvers.process import VE
from solvers.recipe import Recipe
from solvers.sampler import Sampler
from training.ppo.config import Logging, Ppo
from training.ppo.rollout import Task
from training.ppo.trainer import Outcome, train

HEIGHT = 1e4
SIGMAS = (1.0, 0.1)
BEST = math.log(0.55) / math.log(0.1)
START = 0.5


def denoise(x: Tensor, sigma: Tensor, _cond: Condition | None) -> Tensor:
    return x - 2 * HEIGHT * (sigma**2).reshape(-1, 1, 1, 1)


def decode(latents: Tensor) -> Tensor:
    exact = HEIGHT * (SIGMAS[-1] ** 2 - SIGMAS[0] ** 2)
    return (0.5 + (latents - exact) / HEIGHT / 2).float()


def quadrature() -> Backend:
    """The backend; a prompt is a text that changes nothing but the reward."""
    return Backend(
        family="analytic",
        denoise=denoise,
        encode=lambda _prompts: None,
        decode=decode,
        guide=lambda network, _rate, _cond: network,
        levels=NoiseLevels(VE, 0.1, 1.0),
        shape=(3, 2, 2),
        size=(2, 2),
        device=torch.device("cpu"),
        dtype=torch.float64,
    )


def reward(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """-(2 x - 1)^2, more for longer prompts, and the mean as another head."""
    size = torch.tensor([float(len(p)) for p in prompts])
    return {"near": size - (2 * images.mean((1, 2, 3)) - 1) ** 2, "mean": images.mean((1, 2, 3))}


def task(r: float = START) -> Task:
    one = torch.ones(1, 1).double()
    sampler = Sampler(EPD(Directions(r * one, one, one, one)), SIGMAS)
    recipe = Recipe(2, 1, schedule_type="custom", sigmas=SIGMAS, backend="analytic")
    prompts, held_out = (tuple(letter * n for n in range(1, 6)) for letter in "ph")
    return Task(
        quadrature(), sampler, recipe, reward, "near", (*prompts, "p" * 6, "p" * 7), held_out,
        seed=3, batch=5, decode_batch=2,
    )  # fmt: skip


SHORT = Ppo(steps=4, rollout_batch_size=8, learning_rate=0.01, eval_interval=2, eval_prompts=6)
EVERY = Logging(save_interval=1, keep_last=9, tensorboard=False)


def short_run(folder: Path, ppo: Ppo = SHORT, resume: Path | None = None) -> Outcome:
    return train(task(), ppo, EVERY, folder, resume=resume)
