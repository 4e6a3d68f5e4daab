import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Dirichlet, Normal

from training.ppo.objectives import (
    Coefficients,
    Taken,
    advantages,
    groups,
    loss,
    rloo,
    standardised,
    surrogate,
)
from training.ppo.policy import Distribution, Draws

NAN = math.nan


def same(found: Tensor, wanted: list[object]) -> bool:
    expected = torch.tensor(wanted, dtype=found.dtype)
    return torch.allclose(found, expected, rtol=0, atol=1e-12, equal_nan=True)


def test_the_baseline_is_the_mean_of_the_others() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
    first = [1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3]
    assert same(rloo(rewards), [first, [0, 0, 0, 0]])


def test_a_reward_that_is_no_number_is_no_part_of_its_group() -> None:
    rewards = torch.tensor(
        [[1.0, NAN, 4.0], [NAN, 7.0, NAN], [1.0, math.inf, 2.0]], dtype=torch.float64
    )
    assert same(rloo(rewards), [[-3, NAN, 3], [NAN, NAN, NAN], [-1, NAN, 1]])


def test_groups_are_of_one_prompt_but_for_the_published_ones() -> None:
    assert groups(8, 4, "crn").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups(8, 4, "prompt").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups(8, 4, "mixed").tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_prompts_own_level_cancels_in_groups_of_one_prompt_and_not_in_mixed_ones() -> None:
    table = torch.tensor([1.0, 2.0, 3.0, 6.0] * 2).double()
    level = torch.tensor([0.0] * 4 + [100.0] * 4).double()
    for grouping, cancels in (("crn", True), ("prompt", True), ("mixed", False)):
        found = advantages(table + level, 4, grouping)
        assert torch.allclose(found, advantages(table, 4, grouping)) is cancels


def test_standardised_advantages_have_mean_0_and_deviation_1_over_what_is_known() -> None:
    found = standardised(torch.tensor([1.0, NAN, 3.0, 8.0], dtype=torch.float64))
    spread = math.sqrt((9 + 1 + 16) / 3)
    assert same(found, [-3 / spread, NAN, -1 / spread, 4 / spread])


def test_equal_rewards_teach_nothing() -> None:
    assert same(advantages(torch.full((4,), 0.3).double(), 4, "crn"), [0, 0, 0, 0])


def test_advantages_stay_in_the_order_of_the_images_in_mixed_groups() -> None:
    rewards = torch.tensor([1.0, 10.0, 2.0, 30.0], dtype=torch.float64)
    raw = torch.tensor([-1.0, -20.0, 1.0, 20.0], dtype=torch.float64)
    assert torch.allclose(advantages(rewards, 2, "mixed"), raw / raw.std(correction=0))


@pytest.mark.parametrize(
    ("ratio", "gain", "wanted"),
    [(1.1, 2.0, -2.2), (1.5, 2.0, -2.4), (0.5, 2.0, -1.0), (1.5, -2.0, 3.0), (0.5, -2.0, 1.6)],
)
def test_the_surrogate_is_clipped_from_the_side_that_would_gain(
    ratio: float, gain: float, wanted: float
) -> None:
    found = surrogate(
        torch.tensor([ratio], dtype=torch.float64), torch.tensor([gain], dtype=torch.float64), 0.2
    )
    assert found.item() == pytest.approx(wanted, abs=1e-12)


def law(segments: list[float], weight: list[float], centre: float) -> Distribution:
    def one(values: list[float]) -> Dirichlet:
        return Dirichlet(torch.tensor([values], dtype=torch.float64))

    location = torch.tensor([[centre, centre]], dtype=torch.float64)
    return Distribution(one(segments), one(weight), Normal(location, 0.1))


def drawn() -> Draws:
    segments = torch.tensor([[[0.2, 0.3, 0.5]], [[0.4, 0.4, 0.2]]], dtype=torch.float64)
    weight = torch.tensor([[[0.25, 0.75]], [[0.6, 0.4]]], dtype=torch.float64)
    return Draws(
        segments, weight, torch.tensor([[[0.1, -0.1]], [[0.0, 0.05]]], dtype=torch.float64)
    )


def test_the_loss_is_the_surrogate_and_its_penalties() -> None:
    now, first = law([2, 3, 4], [2, 2], 0.02), law([3, 3, 3], [1, 2], 0.0)
    gains = torch.tensor([1.0, -0.5], dtype=torch.float64)
    taken = Taken(
        drawn(), now.log_prob(drawn()) - torch.tensor([0.5, 0.1], dtype=torch.float64), gains
    )
    found = loss(now, first, taken, Coefficients(0.2, kl=0.3, entropy=0.7))
    clipped = -(1.2 * 1.0 + math.exp(0.1) * -0.5) / 2
    wanted = clipped + 0.3 * now.kl(first).item() - 0.7 * now.entropy().item()
    assert found.value.item() == pytest.approx(wanted, abs=1e-12)
    assert found.measured["clip_fraction"] == 0.5
    assert found.measured["ratio"] == pytest.approx((math.exp(0.5) + math.exp(0.1)) / 2)
    kl = (math.exp(0.5) - 1.5 + math.exp(0.1) - 1.1) / 2
    assert found.measured["approx_kl"] == pytest.approx(kl)


def test_a_loss_that_is_no_number_is_refused() -> None:
    now = law([2, 3, 4], [2, 2], 0.0)
    taken = Taken(
        drawn(), torch.tensor([-math.inf, 0.0], dtype=torch.float64), torch.ones(2).double()
    )
    with pytest.raises(ValueError, match="lower ppo"):
        loss(now, now, taken, Coefficients())
