"""The policy over the numbers of a table, any table; it starts exactly as the predictor given.

Rows on the simplex are Dirichlets of concentrations exp(log(c start) + residual), as in residual
Dirichlet policy optimisation (arXiv:2512.22796): the K + 1 segments between an interval's points,
its K weights, and the N steps of the grid in log sigma. All other numbers are moved by Gaussians
from where they are. B tables, N intervals, K points, S Gaussian numbers of an interval.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from scipy.special import gammaincinv
from torch import Tensor, nn
from torch.distributions import Dirichlet, Normal, kl_divergence

from solvers.epd import EPD, Directions, MultistepTable, ParallelMultistep, Table
from solvers.predictor import named_tensors
from solvers.sampler import Sampler
from src.seeds import generator
from training.ppo.config import Ppo

HIDDEN = 128
BLOCKS = 2
REACH = 4.0
"""The largest residual: a law can get exp(4) times as narrow, or its mean move freely, but not
collapse, after which the next gradient would throw it anywhere."""
LEAST = 1e-6
"""The least segment or weight: rows of a starting table below it are replaced, draws lifted."""
OFF = 1e-4
"""By how much numbers of a table may differ and be the same."""
WIDTH = 0.3
"""Standard deviation of a Gaussian number in the unit that the network moves it by."""
FREE = ("r", "a", "weight", "b")
"""Numbers of a multistep table, which are moved by addition."""
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Draws:
    """What is drawn of tables: B of them, or none of the dimension for one."""

    simplex: Mapping[str, Tensor]  # segments [B, N, K + 1], weight [B, N, K], grid [B, 1, N]
    gauss: Tensor  # [B, N, S]

    def rows(self, index: Tensor) -> "Draws":
        """Those of these numbers."""
        return Draws({n: t[index] for n, t in self.simplex.items()}, self.gauss[index])


def stacked(draws: Sequence[Draws]) -> Draws:
    """Draws of one table each -> one of B."""
    names = draws[0].simplex
    simplex = {n: torch.stack([d.simplex[n] for d in draws]) for n in names}
    return Draws(simplex, torch.stack([d.gauss for d in draws]))


@dataclass(frozen=True)
class Law:
    """Independent distributions of every row on the simplex, and of every other number."""

    simplex: Mapping[str, Dirichlet]
    gauss: Normal  # [N, S]

    def log_prob(self, draws: Draws) -> Tensor:
        """-> [B], the sum over all numbers of a table."""
        rows = [law.log_prob(draws.simplex[n]).sum(-1) for n, law in self.simplex.items()]
        return sum(rows, self.gauss.log_prob(draws.gauss).sum((-1, -2)))

    def entropy(self) -> Tensor:
        """-> [N], of each interval; that of the grid is shared out."""
        count = len(self.gauss.mean)
        rows = [
            law.entropy().expand(count) / (count // len(law.mean)) for law in self.simplex.values()
        ]
        return sum(rows, self.gauss.entropy().sum(-1))

    def kl(self, other: "Law") -> Tensor:
        """KL(self || other) -> a number, of the whole table."""
        pairs = [(law, other.simplex[n]) for n, law in self.simplex.items()]
        both = [kl_divergence(p, q).sum() for p, q in (*pairs, (self.gauss, other.gauss))]
        return torch.stack(both).sum()

    def mean(self) -> Draws:
        """What is exported: means of the Dirichlets, medians of factors."""
        return Draws({n: law.mean for n, law in self.simplex.items()}, self.gauss.mean)

    @torch.no_grad()
    def draw(self, source: torch.Generator, mirror: bool | None = None) -> Draws:
        """One table, from this generator alone; entries of rows below LEAST are lifted to it.

        With `mirror` by quantiles: True has those opposite to False, of an equal generator.
        """
        noise = torch.empty_like(self.gauss.mean).normal_(generator=source)
        rows = {
            name: on_simplex(law.concentration, source, mirror)
            for name, law in self.simplex.items()
        }
        sign = -1 if mirror else 1
        return Draws(rows, self.gauss.mean + sign * self.gauss.stddev * noise)


def on_simplex(alpha: Tensor, source: torch.Generator, mirror: bool | None) -> Tensor:
    """A draw of Dirichlets [N, J] as normalised gamma variates, away from the very edge."""
    if mirror is None:
        gamma = torch.ops.aten._standard_gamma(alpha, source)
    else:
        u = torch.rand(alpha.shape, generator=source, dtype=alpha.dtype)
        gamma = torch.from_numpy(gammaincinv(alpha.numpy(), (1 - u if mirror else u).numpy()))
    gamma = gamma.clamp(min=torch.finfo(gamma.dtype).tiny)
    return lifted(gamma / gamma.sum(-1, keepdim=True))


def lifted(rows: Tensor) -> Tensor:
    """Rows on the simplex, no entry below LEAST."""
    rows = rows.clamp(min=LEAST)
    return rows / rows.sum(-1, keepdim=True)


# --- the start ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """The sampler that a policy starts from, and which of its numbers are drawn."""

    sampler: Sampler
    table: Table  # float64, on the CPU
    alpha: Mapping[str, Tensor]  # concentrations of the rows that are drawn, by name
    columns: Mapping[str, int]  # how many of the S columns each kind of Gaussian number has
    unit: Tensor  # [N, S], how far a draw of 1 moves each
    std: Tensor  # [S]
    least_rate: float = -math.inf  # of guidance, which the model takes

    @property
    def size(self) -> int:
        """P, how many numbers are drawn."""
        return sum(a.numel() for a in self.alpha.values()) + self.unit.numel()

    @property
    def is_moved(self) -> bool:
        """Whether training begins at another table than the sampler's: rows at the edge do so."""
        mean = self.table_of(self.draws(torch.zeros(self.size, dtype=torch.float64)))
        if not isinstance(self.table, Directions) or not isinstance(mean, Directions):
            return False
        mix, new = (t.weight * t.dir_scale for t in (self.table, mean))
        return bool((mix - new).abs().max() > OFF or (self.table.r - mean.r).abs().max() > OFF)

    def draws(self, free: Tensor) -> Draws:
        """Free numbers [..., P], of which 0 is the start and 1 about a standard deviation."""
        sizes = [a.numel() for a in self.alpha.values()]
        *rows, rest = free.split([*sizes, self.unit.numel()], -1)
        simplex = {
            name: lifted((a.log() + part.unflatten(-1, a.shape) / a.sqrt()).softmax(-1))
            for (name, a), part in zip(self.alpha.items(), rows, strict=True)
        }
        return Draws(simplex, rest.unflatten(-1, self.unit.shape) * self.std)

    def sampler_of(self, draws: Draws) -> Sampler:
        """The sampler of draws: a table, and a grid where it is drawn, for each of the B."""
        solver: Any = self.sampler.solver
        sampler = replace(self.sampler, solver=replace(solver, table=self.table_of(draws)))
        if "grid" not in draws.simplex:
            return sampler
        first, last = (math.log(self.sampler.sigmas[i]) for i in (0, -1))
        way = draws.simplex["grid"].squeeze(-2).cumsum(-1)[..., :-1]
        inner = (first + way * (last - first)).exp()
        if inner.ndim == 1:
            ends = self.sampler.sigmas
            return replace(sampler, sigmas=(ends[0], *inner.tolist(), ends[-1]))
        ends = (inner.new_full((len(inner), 1), self.sampler.sigmas[i]) for i in (0, -1))
        return replace(sampler, grids=torch.cat([next(ends), inner, next(ends)], 1))

    def table_of(self, draws: Draws) -> Table:
        """The tables [B, N, K] of draws, or the table [N, K] of one."""
        table = self.table
        parts = (draws.gauss * self.unit).split(list(self.columns.values()), -1)
        moved = dict(zip(self.columns, parts, strict=True))
        new = named_tensors(table)
        if "segments" in draws.simplex:
            places = draws.simplex["segments"].cumsum(-1)[..., :-1].clamp(max=1)
            rank = table.r.argsort(dim=-1, stable=True).argsort(dim=-1)
            new["r"] = places.gather(-1, rank.expand(places.shape))
        if "weight" in draws.simplex:
            shares = draws.simplex["weight"]
            new["weight"], new["dir_scale"] = mixed(table, shares, self.alpha["weight"])
        for name, by in moved.items():
            new[name] = new[name] + by if name in FREE else new[name] * by.exp()
        if "r" in moved:
            new["r"] = new["r"].clamp(0, 1)
        if "guidance" in moved:
            new["guidance"] = new["guidance"].clamp(min=self.least_rate)
        many = draws.gauss.shape[:-2]
        if "guidance" in new and not many and new["guidance"].shape[1] == 1:
            return replace(table, **new | {"guidance": new["guidance"][:, 0]})
        shared = {"guidance"} - set(moved)  # calls at a rate of 1 that all share need no "nothing"
        wide = {n: t.expand(*many, *t.shape[-2:]) for n, t in new.items() if n not in shared}
        return replace(table, **wide)


def mixed(table: Any, shares: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Shares [B, N, K] -> weights on the simplex and direction scales.

    Where the table has weights of both signs, the shares move them by as much as they differ from
    their start. Their sum stays, and with it a step's first order, which no draw may touch.
    """
    mix = table.weight * table.dir_scale
    signed = (mix < 0).any(-1, keepdim=True)
    start = alpha / alpha.sum(-1, keepdim=True)
    moved = mix + mix.abs().sum(-1, keepdim=True) * (shares - start)
    size = moved.abs().sum(-1, keepdim=True).clamp(min=TINY)
    weight = torch.where(signed, moved.abs() / size, shares)
    return weight, torch.where(signed, torch.where(moved < 0, -size, size), table.dir_scale)


def start_of(
    sampler: Sampler, ppo: Ppo, say: Callable[[str], object], least_rate: float = -math.inf
) -> Start:
    """A sampler as what a policy can start from; it stays the same.

    Rows with a segment or a share below LEAST become uniform, which `say` hears, as that does
    change the solver; shares of weights of both signs are those of their sizes. No guidance rate
    is drawn below `least_rate`.

    Raises ValueError for a solver without a table, and where there is nothing to draw, or all
    rates of guidance to draw are 0.
    """
    solver = sampler.solver
    if not isinstance(solver, EPD | ParallelMultistep) or solver.table.r.ndim != 2:
        raise ValueError(f"the policy is over tables, and {type(solver).__name__} has none")
    exact = {n: t.detach().double().cpu() for n, t in named_tensors(solver.table).items()}
    exact = {n: t[:, None] if t.ndim == 1 else t for n, t in exact.items()}  # [N, .] each
    table: Table = replace(solver.table, **exact)
    table = canonical(table) if isinstance(table, Directions) else table
    count = len(table.r)
    if ppo.train_guidance and table.guidance is None:
        rate = torch.full((count, 1), float(sampler.guidance_rate), dtype=torch.float64)
        table = replace(table, guidance=rate)
    alpha = concentrations(table, sampler.sigmas, ppo, say)
    columns = {name: getattr(table, name).shape[1] for name in moved_names(table, ppo)}
    if not columns and all(rows.shape[1] == 1 for rows in alpha.values()):
        raise ValueError("there is nothing to train: set ppo.train_points=true, say")
    scales = {"dir_scale": ppo.scale_std, "time_scale": ppo.scale_std}
    std = [scales.get(name, WIDTH) for name, wide in columns.items() for _ in range(wide)]
    low, high = ppo.guidance_interval or (0.0, math.inf)
    guided = torch.tensor([[low <= sigma <= high] for sigma in sampler.sigmas[:-1]]).double()
    if ppo.train_guidance and not guided.any():
        raise ValueError(f"no step begins in ppo.guidance_interval [{low:g}, {high:g}]: widen it")
    if ppo.train_guidance and table.guidance is not None:
        stays = (table.guidance == 0) | (guided == 0)  # draws are factors
        if bool(stays.all()):
            said = "ppo.train_guidance moves rates by factors, and all that it may move are 0"
            raise ValueError(f"{said}: give a predictor of other rates, or leave it out")
        for n in (stays & (guided > 0)).any(1).nonzero()[:, 0].tolist():
            say(f"interval {n}: a guidance rate of 0 stays 0, as draws are factors of it")
    ones = torch.ones(count, 1, dtype=torch.float64)
    step = {"guidance": guided * ppo.guidance_std / WIDTH}
    unit = [step.get(name, ones) for name, wide in columns.items() for _ in range(wide)]
    units = torch.cat([*unit, ones[:, :0]], 1)
    wide = torch.tensor(std, dtype=torch.float64)
    return Start(sampler, table, alpha, columns, units, wide, least_rate)


def concentrations(
    table: Table, sigmas: Sequence[float], ppo: Ppo, say: Callable[[str], object]
) -> dict[str, Tensor]:
    """The Dirichlets of the rows that are drawn, by name, in the order in which they are drawn."""
    alpha: dict[str, Tensor] = {}
    if isinstance(table, Directions) and ppo.train_points:
        ends = torch.zeros_like(table.r[:, :1])
        places = table.r.sort(dim=-1, stable=True).values
        segments = places.diff(dim=-1, prepend=ends, append=ends + 1)  # [N, K + 1]
        alpha["segments"] = ppo.dirichlet_concentration * inner(segments, "positions", say)
    if isinstance(table, Directions) and ppo.train_weights:
        alpha["weight"] = ppo.dirichlet_concentration * inner(table.weight, "weights", say)
    if ppo.train_grid:
        steps = torch.tensor(sigmas, dtype=torch.float64).log().diff()
        alpha["grid"] = ppo.grid_concentration * (steps / steps.sum())[None]
    return alpha


def moved_names(table: Table, ppo: Ppo) -> list[str]:
    """The tensors of a table whose numbers Gaussians move."""
    names = ["dir_scale"] if ppo.train_scale_dir and isinstance(table, Directions) else []
    names += ["time_scale"] if ppo.train_scale_time else []
    names += ["guidance"] if ppo.train_guidance else []
    if isinstance(table, MultistepTable):
        names += ["r"] if ppo.train_points else []
        names += FREE[1:] if ppo.train_weights else ()
    return names


def canonical(table: Directions) -> Directions:
    """The same solver with weights on the simplex, signs and sizes in the direction scales."""
    mix = table.weight * table.dir_scale
    signed = (mix < 0).any(-1, keepdim=True)
    sizes = torch.where(signed, mix.abs(), table.weight.abs())
    total = sizes.sum(-1, keepdim=True).clamp(min=TINY)
    size = torch.where(signed, torch.where(mix < 0, -total, total), table.dir_scale.abs() * total)
    return replace(table, weight=sizes / total, dir_scale=size)


def inner(rows: Tensor, name: str, say: Callable[[str], object]) -> Tensor:
    """Rows [N, J] on the simplex, those at its edge uniform."""
    edge = (rows < LEAST).any(-1)
    for n in edge.nonzero()[:, 0].tolist():
        values = ", ".join(f"{v:.3g}" for v in rows[n].tolist())
        what = "segments" if name == "positions" else "shares"
        say(f"interval {n}: the {what} [{values}] of its {name} reach 0: they start uniform")
    return torch.where(edge[:, None], 1 / rows.shape[-1], rows)


# --- the policy ---------------------------------------------------------------------------


class Policy(nn.Module):
    """An MLP from the number of the interval to the residuals; its last layer starts at zero.

    A residual is REACH tanh(output / REACH), the output itself while it is small. On the CPU in
    float64: it is small, and all ranks then compute the same numbers.
    """

    def __init__(self, start: Start, seed: int = 0, learning: Sequence[float] = ()) -> None:
        super().__init__()
        self.start, count = start, len(start.table.r)
        self.learning = torch.tensor(list(learning) or [1.0] * count, dtype=torch.float64)[:, None]
        rows = {name: a.shape[1] for name, a in start.alpha.items() if name != "grid"}
        self.sizes = (
            rows | {"gauss": len(start.std)} | ({"grid": 1} if "grid" in start.alpha else {})
        )
        wide = partial(nn.Linear, dtype=torch.float64)
        self.steps = nn.Embedding(count, HIDDEN, dtype=torch.float64)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(HIDDEN, dtype=torch.float64), nn.SiLU(), wide(HIDDEN, HIDDEN)
            )
            for _ in range(BLOCKS)
        )
        self.last = wide(HIDDEN, sum(self.sizes.values()))
        source = generator(seed, "policy")
        with torch.no_grad():
            self.steps.weight.normal_(generator=source)
            for name, parameter in self.blocks.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, HIDDEN**-0.5, generator=source)
                elif name.endswith("2.bias"):
                    parameter.zero_()
            self.last.weight.zero_()
            self.last.bias.zero_()

    def forward(self) -> Law:
        """The policy as it stands; `learning` scales how far each interval has moved."""
        x = self.steps.weight
        for block in self.blocks:
            x = x + block(x)
        return self.around(REACH * (self.learning * self.last(x) / REACH).tanh())

    def initial(self) -> Law:
        """The policy before any training, pi_0."""
        return self.around(
            self.last.weight.new_zeros(len(self.learning), sum(self.sizes.values()))
        )

    def around(self, residual: Tensor) -> Law:
        """The laws of these residuals."""
        start = self.start
        parts = dict(zip(self.sizes, residual.split(list(self.sizes.values()), -1), strict=True))
        if "grid" in parts:
            parts["grid"] = parts["grid"].t()
        simplex = {n: Dirichlet((a.log() + parts[n]).exp()) for n, a in start.alpha.items()}
        gauss = parts["gauss"]
        return Law(simplex, Normal(gauss, start.std.expand_as(gauss)))
