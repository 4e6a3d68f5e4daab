"""diffusers' schedulers on the same equation and the same levels as ours.

They agree to float precision wherever the formulas are the same. Its DPM-Solver++, UniPC and DEIS
run in the VP variable x / sqrt(1 + sigma^2), which changes no number; its Euler, FlowMatchEuler
and DPM-Solver++ round the state to float32 at every step, which shows at 1e-6. Where they differ,
a test says how and why.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from solvers.classic import Euler, Heun
from solvers.exponential import DEIS, DPMpp, UniPC, gauss_legendre, quadrature
from solvers.field import Denoiser, Field
from solvers.integrate import Step
from solvers.process import FLOW, VE
from solvers.schedules import flowmatch, polynomial
from tests.solvers.gauss import LATENTS, distance, flow, integrate, log_snr, ve

schedulers: Any = pytest.importorskip("diffusers.schedulers")
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array:DeprecationWarning", "ignore:.*dpmsolver:FutureWarning"
)

GRID = polynomial(9, 0.05, 40.0)
LONG = polynomial(18, 0.05, 40.0)
NEARLY_NOISE = torch.cat([torch.tensor([1 - 1e-6]).double(), flowmatch(8, shift=3.0)[1:]])
EXACT, SINGLE = 1e-10, 2e-6


def with_0(grid: Tensor) -> Tensor:
    return torch.cat([grid, grid.new_zeros(1)])


def prepared(scheduler: Any, sigmas: Tensor) -> Any:
    """The scheduler, set to step along these levels in float64."""
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas, scheduler.timesteps = sigmas, torch.arange(len(sigmas) - 1.0).flip(0)
    scheduler.set_begin_index(0)
    return scheduler


def denoised(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
    return denoiser(x, sigma.expand(len(x)), None)


def theirs_ve(scheduler: Any, sigmas: Tensor) -> Tensor:
    """A VP scheduler (DPM-Solver++, UniPC, DEIS) that is told x0, in the VE variable."""
    prepared(scheduler, sigmas)
    scale = 1 / (1 + sigmas**2).sqrt()
    x = scale[0] * LATENTS * sigmas[0]
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(denoised(ve, x / scale[i], sigmas[i]), t, x).prev_sample
    return x / scale[-1]


def theirs_flow(scheduler: Any, sigmas: Tensor) -> Tensor:
    """A flow-matching scheduler, which is told the velocity."""
    prepared(scheduler, sigmas)
    x = LATENTS
    for sigma, t in zip(sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step((x - denoised(flow, x, sigma)) / sigma, t, x).prev_sample
    return x


def ours_ve(solver: Any, sigmas: Tensor, corrected: bool = False) -> Tensor:
    *_, end = integrate(solver, Field(ve), LATENTS * sigmas[0], sigmas, correct=corrected)
    return end


def ours_flow(solver: Any, sigmas: Tensor, corrected: bool = False) -> Tensor:
    *_, end = integrate(solver, Field(flow), LATENTS, sigmas, correct=corrected)
    return end


def dpm(order: int, predict_x0: bool = True, **options: Any) -> Any:
    """diffusers' DPM-Solver++ (data) or DPM-Solver (noise), without its rules for the end."""
    options = {"lower_order_final": False, "final_sigmas_type": "sigma_min"} | options
    return schedulers.DPMSolverMultistepScheduler(
        solver_order=order,
        algorithm_type="dpmsolver++" if predict_x0 else "dpmsolver",
        prediction_type="sample",
        **options,
    )


def unipc(order: int, variant: str, predict_x0: bool = True, **options: Any) -> Any:
    options = {"prediction_type": "sample", "final_sigmas_type": "sigma_min"} | options
    return schedulers.UniPCMultistepScheduler(
        solver_order=order, solver_type=variant, predict_x0=predict_x0, **options
    )


@pytest.mark.parametrize("grid", [GRID, with_0(GRID)], ids=["to_sigma_min", "to_0"])
def test_euler_and_heun_are_euler_discrete_and_heun_discrete(grid: Tensor) -> None:
    """Heun's levels repeat, one for each of the two slopes; the step to 0 is Euler's."""
    scheduler = prepared(schedulers.EulerDiscreteScheduler(), grid)
    x = LATENTS * grid[0]
    for sigma, t in zip(grid, scheduler.timesteps, strict=False):
        scheduler.scale_model_input(x, t)
        x = scheduler.step((x - denoised(ve, x, sigma)) / sigma, t, x).prev_sample
    assert distance(x, ours_ve(Euler(), grid)) < SINGLE
    repeated = torch.cat([grid[:1], grid[1:].repeat_interleave(2)])
    scheduler = prepared(
        schedulers.HeunDiscreteScheduler(), repeated[: -1 if grid[-1] == 0 else None]
    )
    scheduler.sigmas, x = repeated, LATENTS * grid[0]
    asked = [grid[0], *grid[1:-1].repeat_interleave(2)] + [grid[-1]] * bool(grid[-1] > 0)
    for sigma, t in zip(asked, scheduler.timesteps, strict=True):
        x = scheduler.step((x - denoised(ve, x, sigma)) / sigma, t, x).prev_sample
    assert distance(x, ours_ve(Heun(), grid)) < EXACT


@pytest.mark.parametrize("final", [False, True], ids=["", "lower_order_final"])
@pytest.mark.parametrize("predict_x0", [True, False], ids=["data", "noise"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmpp_is_dpmsolver_multistep(order: int, predict_x0: bool, final: bool) -> None:
    """The last steps are those of diffusers below 15 steps."""
    theirs = theirs_ve(dpm(order, predict_x0, lower_order_final=final), GRID)
    assert distance(theirs, ours_ve(DPMpp(order, predict_x0, final), GRID)) < SINGLE


def test_the_ends_of_dpmpp_to_sigma_min_and_to_0() -> None:
    """Ours counts the steps left on the levels above 0, diffusers counts the step to 0 as well.

    So its default for order 2 is ours without `lower_order_final`: the last step of the two is the
    one to 0, which is of order 1 by itself.
    """
    at_final = theirs_ve(dpm(2, euler_at_final=True), LONG)
    assert distance(at_final, ours_ve(DPMpp(2), LONG)) < SINGLE
    scheduler = dpm(2, lower_order_final=True, final_sigmas_type="zero")
    theirs = theirs_ve(scheduler, with_0(GRID))
    assert distance(theirs, ours_ve(DPMpp(2, True, False), with_0(GRID))) < SINGLE
    assert distance(theirs, ours_ve(DPMpp(2, True, True), with_0(GRID))) > 1e-4


@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("predict_x0", [True, False], ids=["data", "noise"])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_unipc_multistep(
    order: int, variant: str, predict_x0: bool, lower_order_final: bool
) -> None:
    """At 15 steps and more too: its rule for the last steps does not look at their number."""
    ours = UniPC(order, variant, predict_x0, lower_order_final)  # pyright: ignore[reportArgumentType]
    for grid in (GRID, LONG):
        scheduler = unipc(order, variant, predict_x0, lower_order_final=lower_order_final)
        assert distance(theirs_ve(scheduler, grid), ours_ve(ours, grid, corrected=True)) < EXACT


def test_unipc_without_corrections_and_to_0() -> None:
    """It counts the step to 0 among the last ones, and ours does not."""
    scheduler = unipc(3, "bh2", disable_corrector=list(range(20)))
    assert distance(theirs_ve(scheduler, GRID), ours_ve(UniPC(3), GRID)) < EXACT
    theirs = theirs_ve(unipc(2, "bh2", final_sigmas_type="zero"), with_0(GRID))
    ours = UniPC(2, lower_order_final=False)
    assert distance(theirs, ours_ve(ours, with_0(GRID), corrected=True)) < EXACT


def log_rho(order: int) -> Callable[[Field, Step], Tensor]:
    """DEIS with our quadrature in log sigma, the clock that diffusers' DEIS has."""

    def solver(_field: Field, step: Step) -> Tensor:
        points = [step.now, *step.past[: order - 1]]
        knots = [math.log(p.sigma) for p in points]
        nodes = gauss_legendre(32, knots[0], math.log(float(step.sigma_next)))
        weights = quadrature(knots, [(u, w * math.exp(float(u))) for u, w in nodes])
        return step.now.x + sum(w * p.d for w, p in zip(weights, points, strict=True))

    return solver


def deis(order: int) -> Any:
    return schedulers.DEISMultistepScheduler(
        solver_order=order,
        solver_type="logrho",
        prediction_type="sample",
        lower_order_final=False,
    )


@pytest.mark.parametrize("order", [2, 3])
def test_deis_differs_from_deis_multistep_in_its_clock_alone(order: int) -> None:
    """diffusers interpolates the slopes in log sigma; "tab" does in the VP time, "rhoab" in sigma.

    Our quadrature in their clock gives their numbers.
    """
    theirs = theirs_ve(deis(order), GRID)
    assert distance(theirs, ours_ve(log_rho(order), GRID)) < EXACT
    for mode in ("tab", "rhoab"):
        ours = DEIS(order, mode)  # pyright: ignore[reportArgumentType]
        assert 1e-4 < distance(theirs, ours_ve(ours, GRID)) < 0.2


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_on_flow_matching_is_flow_match_euler_discrete(shift: float) -> None:
    grid = with_0(flowmatch(8, shift=shift))
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(shift=shift)
    assert distance(theirs_flow(scheduler, grid), ours_flow(Euler(), grid)) < SINGLE


FLOWS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmpp_and_unipc_on_flow_matching_are_those_with_flow_sigmas(order: int) -> None:
    scheduler = dpm(order)
    scheduler.register_to_config(**FLOWS)
    ours: Any = DPMpp(order, lower_order_final=False, process=FLOW)
    assert distance(theirs_flow(scheduler, NEARLY_NOISE), ours_flow(ours, NEARLY_NOISE)) < SINGLE
    for variant in ("bh1", "bh2"):
        theirs = theirs_flow(unipc(order, variant, **FLOWS), NEARLY_NOISE)
        ours = UniPC(order, variant, process=FLOW)
        assert distance(theirs, ours_flow(ours, NEARLY_NOISE, corrected=True)) < EXACT


def test_a_start_at_pure_noise_is_where_diffusers_moves_it_to() -> None:
    """At sigma = 1 there is no log(alpha): diffusers' UniPC starts at 1 - 1e-6 instead.

    Ours stays at 1 and takes log(1e-6) there, so the clocks agree and x is not moved.
    """
    scheduler = schedulers.UniPCMultistepScheduler(flow_shift=3.0, **FLOWS)
    scheduler.set_timesteps(7)
    assert math.isclose(1 - scheduler.sigmas[0].item(), 1e-6, rel_tol=0.1)
    grid = torch.cat([torch.ones(1).double(), NEARLY_NOISE[1:]])
    for solver in (UniPC(3, process=FLOW), DPMpp(3, process=FLOW)):
        corrected = isinstance(solver, UniPC)
        moved = ours_flow(solver, NEARLY_NOISE, corrected)
        assert distance(ours_flow(solver, grid, corrected), moved) < 1e-6


def test_dynamic_thresholding_is_that_of_diffusers() -> None:
    """Up to its `sample_max_value`, which bounds the threshold too; ours leaves it free."""
    options = {"thresholding": True, "sample_max_value": 1e6}
    ours = DPMpp(2, lower_order_final=False, thresholding=True)
    assert distance(theirs_ve(dpm(2, **options), GRID), ours_ve(ours, GRID)) < SINGLE
    assert distance(ours_ve(ours, GRID), ours_ve(replace(ours, thresholding=False), GRID)) > 1e-3


def test_the_clock_is_that_of_diffusers_in_both_processes() -> None:
    sigmas = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    for options, process in (({}, VE), (FLOWS, FLOW)):
        scheduler = schedulers.UniPCMultistepScheduler(**options)
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigmas)
        clock = torch.as_tensor(process.half_log_snr(sigmas))
        assert torch.allclose(clock, alpha.log() - sigma.log(), atol=1e-14)


@pytest.mark.parametrize("n", [2, 4, 5, 7, 9, 11, 28, 51])
def test_grids_are_those_of_diffusers(n: int) -> None:
    """Flow matching's to the last bit."""
    kind = schedulers.FlowMatchEulerDiscreteScheduler
    for shift in (1.0, 3.0, 6.0):
        scheduler = kind(shift=shift)
        scheduler.set_timesteps(n)
        assert torch.equal(flowmatch(n, shift=shift).float(), scheduler.sigmas[:-1])
    for mu in (0.5, 0.8, 1.15, 2.0):
        scheduler = kind(shift=3.0, use_dynamic_shifting=True)
        scheduler.set_timesteps(n, mu=mu)
        assert torch.equal(flowmatch(n, mu=mu).float(), scheduler.sigmas[:-1])
    for ours, name in ((polynomial, "use_karras_sigmas"), (log_snr, "use_exponential_sigmas")):
        options = {"sigma_min": 0.002, "sigma_max": 80.0, name: True}
        scheduler = schedulers.EulerDiscreteScheduler(**options)
        scheduler.set_timesteps(n)
        assert torch.allclose(ours(n, 0.002, 80.0).float(), scheduler.sigmas[:-1], rtol=3e-7)


@given(n=st.integers(2, 60), shift=st.floats(0.2, 20))
def test_flowmatch_is_diffusers_for_any_shift(n: int, shift: float) -> None:
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(n)
    assert torch.allclose(flowmatch(n, shift=shift).float(), scheduler.sigmas[:-1], rtol=2e-7)
