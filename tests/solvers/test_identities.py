"""Where two methods are the same, they give the same numbers."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from solvers.classic import DPM2, EDM, IPNDM, Euler, Heun, IPNDMv
from solvers.epd import EPD, Directions
from solvers.exponential import DEIS, DPMpp, UniPC
from solvers.field import Condition, Field
from solvers.integrate import Point, Solver, Step
from solvers.process import FLOW
from solvers.schedules import flowmatch, polynomial, time_uniform
from tests.solvers.gauss import LATENTS, directions, distance, flow, integrate, learned, run, ve

GRID = polynomial(7, 0.01, 40.0)
STEPS = len(GRID) - 1
EXACT = 1e-12


def noise(index: int, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype)


def same(a: Solver, b: Solver, grid: Tensor = GRID) -> bool:
    """Whether two VE solvers end at the same place."""
    return distance(run(a, grid), run(b, grid)) < EXACT


WEIGHTS = torch.tensor([[-2 / 3, 5 / 3]], dtype=torch.float64).expand(STEPS, 2)
EVEN = torch.linspace(4, 0.5, 9, dtype=torch.float64)
SAME: list[tuple[Solver, Solver, Tensor]] = [
    *((s, Euler(), GRID) for s in (IPNDM(1), IPNDMv(1), DEIS(1), DEIS(1, "rhoab"), DPMpp(1))),
    *((s, Euler(), GRID) for s in (DPMpp(1, predict_x0=False), UniPC(1))),
    (UniPC(1, "bh1", predict_x0=False), Euler(), GRID),
    (EPD(directions([[0.0]] * STEPS)), Euler(), GRID),
    (EPD(directions([[0.5]] * STEPS)), DPM2(), GRID),
    (EPD(directions([[0.0, 1.0]] * STEPS)), Heun(), GRID),
    (EPD(directions([[0.0, 0.3]] * STEPS, weight=WEIGHTS)), DPM2(0.3), GRID),
    (EDM(noise, s_churn=0.0), Heun(), GRID),
    (DPMpp(2), UniPC(2), GRID),  # without its corrector
    *((IPNDMv(order), IPNDM(order), EVEN) for order in (1, 2, 3)),
    *((DEIS(order, "rhoab"), IPNDM(order), EVEN) for order in (2, 3, 4)),
]


@pytest.mark.parametrize(("one", "other", "grid"), SAME, ids=lambda v: type(v).__name__)
def test_two_methods_are_the_same(one: Solver, other: Solver, grid: Tensor) -> None:
    assert same(one, other, grid)


@pytest.mark.parametrize("solver", [DPMpp(1, process=FLOW), UniPC(1, process=FLOW)], ids=repr)
def test_order_1_is_euler_on_flow_matching_too(solver: Solver) -> None:
    grid = flowmatch(7, shift=3.0)
    assert distance(run(solver, grid, flow), run(Euler(), grid, flow)) < EXACT


def test_amed_is_epd_with_one_point_and_a_scaled_slope() -> None:
    """AMED (Zhou et al. 2024): one learned place and a scale of the slope there."""
    r, scale = learned(STEPS, 1).r, learned(STEPS, 1).dir_scale

    def amed(field: Field, step: Step) -> Tensor:
        now, place = step.now, float(r[step.index, 0])
        middle = now.sigma ** (1 - place) * float(step.sigma_next) ** place
        d = field(now.x + (middle - now.sigma) * now.d, middle)
        return now.x + step.h * float(scale[step.index, 0]) * d

    assert same(EPD(directions(r.tolist(), dir_scale=scale)), amed)


def test_ipndm_v_of_order_4_as_published_misses_adams_bashforth_by_a_twelfth() -> None:
    """On equal steps the published weight of the third difference is 11/24, for 3/8.

    So the weights (1, -3, 3, -1) / 12 stand beside Adams-Bashforth's.
    """
    *_, x = integrate(IPNDMv(4), Field(cubic), torch.zeros(1, 1).double(), [5.0, 4, 3, 2, 1])
    *_, y = integrate(IPNDM(4), Field(cubic), torch.zeros(1, 1).double(), [5.0, 4, 3, 2, 1])
    assert math.isclose((x - y).item(), (2**3 - 3 * 3**3 + 3 * 4**3 - 5**3) / -12)


def cubic(x: Tensor, sigma: Tensor, _cond: Condition | None = None) -> Tensor:
    """The slope is sigma^3, whatever x."""
    return x - (sigma**4).reshape(-1, 1)


def test_dpmpp_2m_is_the_formula_of_k_diffusion() -> None:
    """DPM++(2M): x' = (s'/s) x - (e^-h - 1) ((1 + h/2h1) D - (h/2h1) D1), h in -log sigma."""
    x, old, before = LATENTS * GRID[0], None, 0.0
    for sigma, after in pairwise(GRID.tolist()):
        h = math.log(sigma / after)
        x0 = ve(x, x.new_full((len(x),), sigma))
        mixed = x0 if old is None else (1 + h / (2 * before)) * x0 - h / (2 * before) * old
        x = after / sigma * x - math.expm1(-h) * mixed
        old, before = x0, h
    assert distance(run(DPMpp(2, lower_order_final=False), GRID), x) < EXACT


@pytest.mark.parametrize("predict_x0", [True, False])
def test_the_variants_of_unipc_differ_only_below_order_3(predict_x0: bool) -> None:
    """From three points on, the order conditions have one solution, whatever B(h) is."""
    one, two = (UniPC(3, variant, predict_x0, False) for variant in ("bh1", "bh2"))
    points = [Point(s, LATENTS * s, lambda s=s: LATENTS * math.sin(s)) for s in (3.0, 5.0, 9.0)]
    step = Step(2, (9.0, 5.0, 3.0, 2.0), points[0], 2.0, tuple(points[1:]))
    assert distance(one(Field(ve), step), two(Field(ve), step)) < EXACT
    step = dataclasses.replace(step, past=step.past[:1])
    assert distance(one(Field(ve), step), two(Field(ve), step)) > 1e-3


def test_each_sample_follows_its_own_table_and_the_order_of_points_does_not_matter() -> None:
    tables = [learned(STEPS, seed=seed) for seed in (1, 2)]
    each = Directions(*(torch.stack(t) for t in zip(*(t.tensors() for t in tables), strict=True)))
    both = run(EPD(each), GRID)
    for i, table in enumerate(tables):
        alone = run(EPD(table), GRID, x=LATENTS[i : i + 1] * GRID[0])
        assert distance(both[i : i + 1], alone) < EXACT
        assert same(EPD(Directions(*(t.flip(-1) for t in table.tensors()))), EPD(table))


@pytest.mark.parametrize("order", [2, 3, 4])
def test_the_plug_in_with_every_point_at_the_end_is_its_base_seen_once_more(order: int) -> None:
    """At r = 1 the point is the base's own step, and the slope there makes the step."""
    table = directions([[1.0]] * STEPS)

    def by_hand(field: Field, step: Step) -> Tensor:
        return step.now.x + step.h * field(IPNDM(order)(field, step), step.sigma_next)

    assert same(EPD(table, IPNDM(order)), by_hand)


@pytest.mark.parametrize(
    "base", [IPNDM(3), IPNDMv(4), DPMpp(3), DPMpp(2, predict_x0=False), DEIS(3), Heun(), DPM2(0.3)]
)
def test_a_point_of_any_base_lies_where_a_step_of_that_base_leads(base: Solver) -> None:
    """K levels at once, as EPD asks for them, against each level in a step of its own."""
    shape = (1, 3, 1, 1, 1)
    targets = torch.tensor([1.5, 1.2, 0.9], dtype=torch.float64)
    sigmas = (9.0, 5.0, 3.0, 2.0, 0.9, 0.4)
    points = [
        Point(s, (LATENTS * s)[:, None], lambda s=s: (LATENTS * math.sin(s))[:, None])
        for s in sigmas[:4]
    ]
    step = Step(3, sigmas, points[3], targets.reshape(shape), tuple(points[2::-1]))
    at_once = base(Field(ve), step)
    for k, target in enumerate(targets.tolist()):
        alone = base(Field(ve), dataclasses.replace(step, sigma_next=target))
        assert distance(at_once[:, k : k + 1], alone) < EXACT


def test_flow_matching_needs_no_solver_of_its_own() -> None:
    """With D = x - sigma v the slope is v, and Euler's step is x + (sigma' - sigma) v."""
    x, grid = LATENTS, flowmatch(6, shift=3.0)
    for sigma, after in pairwise(grid.tolist()):
        x = x + (after - sigma) * torch.tanh(x * sigma)
    assert distance(run(Euler(), grid, velocity, LATENTS), x) < EXACT


def velocity(x: Tensor, sigma: Tensor, _cond: Condition | None = None) -> Tensor:
    """The denoiser of a network whose velocity is tanh(sigma x)."""
    level = sigma.reshape(-1, 1, 1, 1)
    return x - level * torch.tanh(x * level)


def test_scaling_the_noise_levels_and_the_data_scales_the_sample() -> None:
    """The VE equation has no scale of its own, and neither have its solvers."""

    def wider(x: Tensor, sigma: Tensor, _cond: Condition | None = None) -> Tensor:
        return 3 * ve(x / 3, sigma / 3)

    for solver in (Heun(), IPNDMv(3), DPMpp(3), UniPC(3), EPD(learned(STEPS))):
        assert distance(run(solver, 3 * GRID, wider) / 3, run(solver, GRID)) < EXACT


def test_lower_order_final_takes_the_last_step_by_euler() -> None:
    grid = time_uniform(6, 0.01, 40.0)
    *_, before, end = integrate(DPMpp(3), Field(ve), LATENTS * grid[0], grid)
    last = run(Euler(), grid[-2:], x=before)
    assert distance(end, last) < EXACT
