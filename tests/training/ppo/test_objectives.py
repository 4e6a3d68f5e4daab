import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Dirichlet, Normal

from training.ppo.objectives import (
    Taken,
    advantages,
    diversity,
    frechet,
    james_stein,
    loss,
    rloo,
    standardised,
    surrogate,
)
from training.ppo.policy import Draws, Law

NAN = math.nan


def double(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(result: Tensor, wanted: list) -> bool:
    return torch.allclose(result, double(wanted), rtol=0, atol=1e-12, equal_nan=True)


def test_baselines_are_their_formulas_by_hand() -> None:
    rewards = double([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]])
    assert same(rloo(rewards), [[11 / 3, 10 / 3, 3, 2], [5, 5, 5, 5]])
    noise = ((1 + 1) + (4 + 4)) / 2 / 1  # s2 over k - 1, s2 with 2 degrees of freedom
    a = noise / (noise + (2 - 6) ** 2 / 2)
    assert same(
        james_stein(double([[1.0, 3.0], [4.0, 8.0]])),
        [[(1 - a) * 3 + a * 4, (1 - a) * 1 + a * 4], [(1 - a) * 8 + a * 4, (1 - a) * 4 + a * 4]],
    )


def test_advantages_leave_out_nan_and_cancel_a_prompts_level_unless_groups_are_mixed() -> None:
    rewards = double([1.0, NAN, 4.0, NAN, 7.0, NAN, 1.0, math.inf, 2.0])
    assert same(advantages(rewards, 3, "rloo"), [-3, NAN, 3, NAN, NAN, NAN, -1, NAN, 1])
    assert advantages(rewards, 3, "james-stein").isfinite().tolist() == [
        *(True, False, True, False, False, False, True, False, True)
    ]
    table = double([1.0, 2.0, 3.0, 6.0] * 2)
    level = double([0.0] * 4 + [100.0] * 4)
    for baseline, cancels in (("rloo", True), ("mixed", False)):
        shifted = advantages(table + level, 4, baseline)
        assert torch.allclose(shifted, advantages(table, 4, baseline)) is cancels
    spread = math.sqrt((9 + 1 + 16) / 3)
    wanted = [-3 / spread, NAN, -1 / spread, 4 / spread]
    assert same(standardised(double([1.0, NAN, 3.0, 8.0])), wanted)
    assert same(standardised(double([0.3] * 4)), [0] * 4)


def law(segments: list[float], weight: list[float], centre: float) -> Law:
    rows = {"segments": Dirichlet(double([segments])), "weight": Dirichlet(double([weight]))}
    return Law(rows, Normal(double([[centre, centre]]), 0.1))


def test_the_loss_is_the_clipped_surrogate_and_its_penalties() -> None:
    for ratio, gain, wanted in (
        *((1.1, 2.0, -2.2), (1.5, 2.0, -2.4), (0.5, 2.0, -1.0)),
        *((1.5, -2.0, 3.0), (0.5, -2.0, 1.6)),
    ):
        assert surrogate(double([ratio]), double([gain]), 0.2).item() == pytest.approx(wanted)
    rows = {
        "segments": double([[[0.2, 0.3, 0.5]], [[0.4, 0.4, 0.2]]]),
        "weight": double([[[0.25, 0.75]], [[0.6, 0.4]]]),
    }
    draws = Draws(rows, double([[[0.1, -0.1]], [[0.0, 0.05]]]))
    now, first = law([2, 3, 4], [2, 2], 0.02), law([3, 3, 3], [1, 2], 0.0)
    taken = Taken(draws, now.log_prob(draws) - double([0.5, 0.1]), double([1.0, -0.5]))
    value, measured = loss(now, first, taken, clip=0.2, kl_coef=0.3, entropy=double([0.7]))
    clipped = -(1.2 * 1.0 + math.exp(0.1) * -0.5) / 2
    wanted = clipped + 0.3 * now.kl(first).item() - 0.7 * now.entropy().sum().item()
    assert value.item() == pytest.approx(wanted, abs=1e-12)
    assert measured["clip_fraction"] == 0.5
    assert measured["ratio"] == pytest.approx((math.exp(0.5) + math.exp(0.1)) / 2)
    assert measured["approx_kl"] == pytest.approx((math.exp(0.5) - 1.5 + math.exp(0.1) - 1.1) / 2)


def test_sets_are_compared_as_gaussians_and_by_distances_within_a_prompt() -> None:
    source = torch.Generator().manual_seed(0)
    one = torch.randn(400, 3, generator=source).double()
    other = one * 2 + 1
    assert frechet(one, one).item() == pytest.approx(0, abs=1e-9)
    variance = one.var(0).sum().item()
    moved = (other.mean(0) - one.mean(0)).square().sum().item()
    assert frechet(one, other).item() == pytest.approx(moved + variance * (1 + 4 - 2 * 2))
    few = torch.randn(5, 100, generator=source).double()
    assert frechet(few, few + 1).item() == pytest.approx(100)
    points = double([[0.0], [3.0], [10.0], [4.0], [NAN]])
    result = diversity(points, ["a", "a", "b", "a", "b"])
    assert same(result, [3.5, 2.0, NAN, 2.5, NAN])
