"""The fit of the judge of emoji: a closed form, and how retrieval is counted."""

import pytest
import torch

from exps.build.fit_emoji_judge import retrieval, ridge


def test_the_ridge_has_no_downhill_left() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, d, generator=g, dtype=torch.float64) for d in (6, 3))
    weight, bias = (t.requires_grad_() for t in ridge(x, y, 0.1))
    loss = (x @ weight.T + bias - y).square().sum() + 20 * 0.1 * weight.square().sum()
    loss.backward()
    for part in (weight, bias):
        torch.testing.assert_close(part.grad, torch.zeros_like(part), rtol=0, atol=1e-10)


def test_retrieval_counts_how_often_the_own_one_comes_first() -> None:
    scores = retrieval(torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.2, 0.1, 0.6]]))
    assert scores["name_of_picture_first"] == pytest.approx(2 / 3)
    assert scores["picture_of_name_first"] == 1
    assert scores["own_above_other"] == pytest.approx(5 / 6)
    assert scores["cosine_own"] == pytest.approx(1.9 / 3)
