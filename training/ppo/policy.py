"""The residual Dirichlet policy over tables (arXiv:2512.22796): it starts as the distilled one.

The places of an interval's K points are the running sums of K + 1 segments on the simplex, its
weights lie on the simplex: a Dirichlet for each, with concentrations exp(log(c mean) + residual).
B tables, N intervals, K points, S factors of an interval (0, K or 2 K).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, Normal, kl_divergence

from solvers.epd import Directions
from solvers.predictor import Table
from src.seeds import generator

HIDDEN = 128
BLOCKS = 2
REACH = 4.0
"""The largest residual: a law can get exp(4) times as narrow, or its mean move freely, but not
collapse, after which the next gradient would throw it anywhere."""
LEAST = 1e-6
"""The least segment or weight: rows of a starting table below it are replaced, draws lifted."""


@dataclass(frozen=True)
class Start:
    """The table that a policy starts from."""

    segments: Tensor  # [N, K + 1] on the simplex
    rank: Tensor  # [N, K], which of the places, from the first to the last, each point takes
    weight: Tensor  # [N, K] on the simplex
    dir_scale: Tensor  # [N, K]
    time_scale: Tensor  # [N, K]
    mix: Tensor  # [N, K], weight * dir_scale of the table, of any sign


@dataclass(frozen=True)
class Draws:
    """What is drawn of tables: B of them, or none of the dimension for one."""

    segments: Tensor  # [B, N, K + 1]
    weight: Tensor  # [B, N, K]
    factors: Tensor  # [B, N, S], logarithms of factors of dir_scale, then of time_scale

    def rows(self, index: Tensor) -> "Draws":
        """Those of these numbers."""
        return Draws(*(getattr(self, f.name)[index] for f in fields(self)))


def stacked(draws: Sequence[Draws]) -> Draws:
    """Draws of one table each -> one of B."""
    names = [f.name for f in fields(Draws)]
    return Draws(*(torch.stack([getattr(d, name) for d in draws]) for name in names))


@dataclass(frozen=True)
class Distribution:
    """Independent laws of every interval's segments, weights and factors."""

    segments: Dirichlet  # [N], over K + 1
    weight: Dirichlet  # [N], over K
    factors: Normal  # [N, S]

    def log_prob(self, draws: Draws) -> Tensor:
        """-> [B], the sum over all intervals and factors."""
        simplex = self.segments.log_prob(draws.segments) + self.weight.log_prob(draws.weight)
        return simplex.sum(-1) + self.factors.log_prob(draws.factors).sum((-1, -2))

    def entropy(self) -> Tensor:
        """-> a number, of the whole table."""
        simplex = self.segments.entropy() + self.weight.entropy()
        return simplex.sum() + self.factors.entropy().sum()

    def kl(self, other: "Distribution") -> Tensor:
        """KL(self || other) -> a number, of the whole table."""
        pairs = (
            (self.segments, other.segments),
            (self.weight, other.weight),
            (self.factors, other.factors),
        )
        return torch.stack([kl_divergence(mine, theirs).sum() for mine, theirs in pairs]).sum()

    def centre(self) -> Draws:
        """The means of the Dirichlets, and the medians of the factors."""
        return Draws(self.segments.mean, self.weight.mean, self.factors.mean)

    @torch.no_grad()
    def draw(self, source: torch.Generator) -> Draws:
        """One table, from this generator alone; entries below LEAST are lifted to it."""
        noise = torch.empty_like(self.factors.mean).normal_(generator=source)
        return Draws(
            on_simplex(self.segments.concentration, source),
            on_simplex(self.weight.concentration, source),
            self.factors.mean + self.factors.stddev * noise,
        )


def on_simplex(concentration: Tensor, source: torch.Generator) -> Tensor:
    """A draw of Dirichlets [N, J] as normalised gamma variates, away from the very edge."""
    gamma = torch.ops.aten._standard_gamma(concentration, source)
    gamma = gamma.clamp(min=torch.finfo(gamma.dtype).tiny)
    lifted = (gamma / gamma.sum(-1, keepdim=True)).clamp(min=LEAST)
    return lifted / lifted.sum(-1, keepdim=True)


@dataclass(frozen=True)
class PolicyOptions:
    """What is drawn, and how widely."""

    concentration: float = 10.0  # c, of each Dirichlet at the start
    dir_scale: bool = False  # log-normal factors of the direction scales
    time_scale: bool = False
    scale_std: float = 0.05  # of the logarithms of the factors

    @property
    def scales(self) -> int:
        """How many factors a point has."""
        return int(self.dir_scale) + int(self.time_scale)


class Policy(nn.Module):
    """An MLP from the number of the interval to the residuals; its last layer starts at zero.

    A residual is REACH tanh(output / REACH), the output itself while it is small.

    On the CPU in float64: it is small, and all ranks then compute the same numbers.
    """

    def __init__(self, start: Start, options: PolicyOptions, seed: int = 0) -> None:
        super().__init__()
        self.start, self.options = start, options
        intervals, points = start.weight.shape
        self.sizes = (points + 1, points, options.scales * points)
        wide = partial(nn.Linear, dtype=torch.float64)
        self.steps = nn.Embedding(intervals, HIDDEN, dtype=torch.float64)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(HIDDEN, dtype=torch.float64), nn.SiLU(), wide(HIDDEN, HIDDEN)
            )
            for _ in range(BLOCKS)
        )
        self.last = wide(HIDDEN, sum(self.sizes))
        self.reset(generator(seed, "policy"))

    @torch.no_grad()
    def reset(self, source: torch.Generator) -> None:
        """Fresh numbers from this generator alone; the last layer is zero."""
        self.steps.weight.normal_(generator=source)
        for name, parameter in self.blocks.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, HIDDEN**-0.5, generator=source)
            elif name.endswith("2.bias"):
                parameter.zero_()
        self.last.weight.zero_()
        self.last.bias.zero_()

    def forward(self) -> Distribution:
        """The policy as it stands."""
        x = self.steps.weight
        for block in self.blocks:
            x = x + block(x)
        residual = REACH * (self.last(x) / REACH).tanh()
        return self.around(*residual.split(self.sizes, -1))

    def initial(self) -> Distribution:
        """The policy before any training, pi_0."""
        size = self.start.weight
        return self.around(*(size.new_zeros(len(size), count) for count in self.sizes))

    def around(self, segments: Tensor, weight: Tensor, factors: Tensor) -> Distribution:
        """The laws of these residuals."""
        start, c = self.start, self.options.concentration
        return Distribution(
            Dirichlet(((c * start.segments).log() + segments).exp()),
            Dirichlet(((c * start.weight).log() + weight).exp()),
            Normal(factors, torch.full_like(factors, self.options.scale_std)),
        )

    def table(self, draws: Draws) -> Directions:
        """The tables [B, N, K], or [N, K] of one."""
        start, points = self.start, self.start.weight.shape[-1]
        places = draws.segments.cumsum(-1)[..., :-1].clamp(max=1)
        r = places.gather(-1, start.rank.expand(places.shape))
        still = torch.zeros_like(r)
        parts = list(draws.factors.split(points, -1)) if self.options.scales else []
        direction = parts.pop(0) if self.options.dir_scale else still
        time = parts.pop(0) if self.options.time_scale else still
        weight, dir_scale = mixed(start, draws.weight)
        scaled = (start.time_scale * time.exp(), dir_scale * direction.exp())
        return Directions(r, weight, *scaled)

    @torch.no_grad()
    def mean_table(self) -> Directions:
        """The table [N, K] that is exported: mean segments summed up, mean weights."""
        return self.table(self().centre())


def mixed(start: Start, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Shares [B, N, K] -> weights on the simplex and direction scales.

    Where the table has weights of both signs, the shares move them by as much as they differ from
    their start. Their sum stays, and with it a step's first order, which no draw may touch.
    """
    signed = (start.mix < 0).any(-1, keepdim=True)
    mix = start.mix + start.mix.abs().sum(-1, keepdim=True) * (shares - start.weight)
    size = mix.abs().sum(-1, keepdim=True).clamp(min=torch.finfo(mix.dtype).tiny)
    weight = torch.where(signed, mix.abs() / size, shares)
    return weight, torch.where(signed, torch.where(mix < 0, -size, size), start.dir_scale)


def start_of(table: Table | None, say: Callable[[str], object]) -> Start:
    """A table as what a policy can start from; the solver stays the same.

    Rows with a segment or a share below LEAST become uniform, which `say` hears, as that does
    change the solver; shares of weights of both signs are those of their sizes.

    Raises ValueError for a table that is not EPD's [N, K].
    """
    if not isinstance(table, Directions) or table.r.ndim != 2:
        kind = type(table).__name__ if table else "no table"
        raise ValueError(f"the policy is over EPD's tables, not {kind}: distil with --solver epd")
    four = (table.r, table.weight, table.time_scale, table.dir_scale)
    r, weight, time_scale, dir_scale = (t.detach().double().cpu() for t in four)
    order = r.argsort(dim=-1, stable=True)
    zero, one = torch.zeros_like(r[:, :1]), torch.ones_like(r[:, :1])
    segments = torch.cat([zero, r.gather(-1, order), one], -1).diff(dim=-1)
    mix = weight * dir_scale
    signed = (mix < 0).any(-1, keepdim=True)
    sizes = torch.where(signed, mix.abs(), weight.abs())
    total = sizes.sum(-1, keepdim=True).clamp(min=torch.finfo(mix.dtype).tiny)
    return Start(
        inner(segments, "positions", say),
        order.argsort(dim=-1),
        inner(sizes / total, "weights", say),
        torch.where(signed, 1.0, dir_scale.abs() * total),
        time_scale,
        mix,
    )


def inner(rows: Tensor, name: str, say: Callable[[str], object]) -> Tensor:
    """Rows [N, J] on the simplex, those at its edge uniform."""
    edge = (rows < LEAST).any(-1)
    for n in edge.nonzero()[:, 0].tolist():
        values = ", ".join(f"{v:.3g}" for v in rows[n].tolist())
        what = "segments" if name == "positions" else "shares"
        say(f"interval {n}: the {what} [{values}] of its {name} reach 0: they start uniform")
    return torch.where(edge[:, None], 1 / rows.shape[-1], rows)
