"""The kernel distance against brute force, and precision and recall of known sets."""

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.kid import kernel_distance, precision_recall


def normal(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)) + shift


def by_pairs(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate, pair by pair."""

    def k(a: Tensor, b: Tensor) -> float:
        return (float(np.dot(a.double().numpy(), b.double().numpy())) / len(a) + 1) ** 3

    def within(s: Tensor) -> float:
        pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if i != j]
        return sum(k(s[i], s[j]) for i, j in pairs) / len(pairs)

    between = [k(a, b) for a in x for b in y]
    return within(x) + within(y) - 2 * sum(between) / len(between)


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_the_kernel_distance_is_that_of_all_pairs(rows: int) -> None:
    x, y = normal(9, 0), normal(13, 1, 0.5)
    found = kernel_distance(x, y, rows=rows)
    assert found.value == pytest.approx(by_pairs(x, y), rel=1e-10)


def test_its_interval_is_the_jackknife_over_both_sets() -> None:
    x, y = normal(7, 2), normal(6, 3, 1.0)
    less_x = np.array([by_pairs(x[torch.arange(7) != i], y) for i in range(7)])
    less_y = np.array([by_pairs(x, y[torch.arange(6) != i]) for i in range(6)])
    variance = sum((len(t) - 1) / len(t) * ((t - t.mean()) ** 2).sum() for t in (less_x, less_y))
    found = kernel_distance(x, y)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * np.sqrt(variance), rel=1e-4)
    assert (found.high + found.low) / 2 == pytest.approx(found.value)


def test_it_is_unbiased_and_its_interval_covers_the_truth() -> None:
    """For x ~ N(0, 1), y ~ N(1, 1) in one dimension, E (xy + 1)^3 in closed form.

    E (xx' + 1)^3 = 1 + 3 m^2 + 3 s^2 + t^2, with m, s, t the first three moments: 4 for x, and
    for y 1 + 3 + 3 * 4 + 16 = 32; between them 1 + 0 + 3 * 1 * 2 + 0 = 7.
    """
    truth = 4 + 32 - 2 * 7
    drawn = torch.randn(400, 2, 60, 1, generator=torch.Generator().manual_seed(0))
    found = [kernel_distance(x, y + 1) for x, y in drawn]
    values = torch.tensor([one.value for one in found])
    assert abs(values.mean().item() - truth) < 3 * values.std().item() / 20
    share = sum(one.low <= truth <= one.high for one in found) / len(found)
    assert 0.88 < share < 0.99


def test_two_samples_of_one_kind_are_at_no_distance_within_the_interval() -> None:
    found = kernel_distance(normal(300, 4), normal(300, 5))
    assert found.low < 0 < found.high


def test_too_few_images_and_features_of_two_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="3 images of each set, not 2 and 5"):
        kernel_distance(normal(2, 0), normal(5, 1))
    with pytest.raises(ValueError, match="two kinds"):
        kernel_distance(normal(5, 0), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="NaN"):
        kernel_distance(normal(5, 0), torch.full((5, 4), float("nan")))
    with pytest.raises(ValueError, match="4 images of each set, not 3 and 9"):
        precision_recall(normal(3, 0), normal(9, 0))


def line(*places: float) -> Tensor:
    return torch.tensor(places)[:, None]


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_precision_and_recall_of_points_on_a_line(rows: int) -> None:
    """Third neighbours: of 0 1 2 3 at 3 2 2 3, which reach -3 to 6; of 4 5 6 20 at 16 15 14 16.

    Of 4 5 6 20 three lie in -3 to 6; of 0 1 2 3 all lie in 4 - 16 to 36.
    """
    real, made = line(0, 1, 2, 3), line(4, 5, 6, 20)
    assert precision_recall(made, real, rows=rows) == (0.75, 1.0)


def test_one_neighbour_reaches_less() -> None:
    """Those of 0 1 10 11 are at 1: 2 and 9 are in. Of 2 3 9 5 at 1 1 4 2: all but 0 is in."""
    real, made = line(0, 1, 10, 11), line(2, 3, 9, 5)
    precision, recall = precision_recall(made, real, k=1)
    assert precision == 0.5
    assert recall == 0.75


def test_a_set_covers_itself_and_sets_far_apart_cover_nothing() -> None:
    x = normal(20, 6)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)


def test_one_image_again_and_again_is_precise_but_recalls_nothing() -> None:
    real = line(0, 1, 2, 3, 4, 5)
    assert precision_recall(line(2, 2, 2, 2), real) == (1.0, 1 / 6)
