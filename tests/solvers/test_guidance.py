"""Guidance in tables: a rate for each call or point, and no null row where it is 1."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from solvers.classic import Euler, Heun
from solvers.epd import EPD, Directions, MultistepTable, ParallelMultistep, Table
from solvers.field import Condition, Field, Guided
from solvers.predictor import Predictor, load_predictor, save_predictor
from solvers.process import VE
from solvers.recipe import Recipe
from solvers.sampler import Sampler, make_solver
from src.text import guidance_rates

SIGMAS = (10.0, 3.0, 1.0, 0.2)
B = 3


def network(rows: list[int] | None = None) -> Callable[..., Tensor]:
    """A denoiser that pulls to its condition; `rows` hears how many rows each call has."""

    def denoise(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        assert cond is not None
        if rows is not None:
            rows.append(len(x))
        s = sigma.reshape(-1, 1)
        return (x + s**2 * cond.given["mean"]) / (1 + s**2)

    return denoise


def condition() -> Condition:
    mean = torch.arange(2.0 * B).double().reshape(B, 2)
    return Condition({"mean": mean}, {"mean": torch.zeros_like(mean)})


def end(sampler: Sampler, rows: list[int] | None = None, chunk: int | None = None) -> Tensor:
    field = Field(Guided(network(rows), sampler.guidance_rate), condition(), chunk)
    x = torch.linspace(-1, 1, 2 * B).double().reshape(B, 2) * SIGMAS[0]
    return list(sampler.states(field, x))[-1]


def directions(guidance: Tensor | None = None) -> Directions:
    r = torch.tensor([[0.3, 0.7], [0.2, 0.9], [0.5, 0.6]]).double()
    one = torch.ones_like(r)
    return Directions(r, one * torch.tensor([0.4, 0.6]), one, one, guidance=guidance)


def multistep(guidance: Tensor | None = None) -> MultistepTable:
    a = torch.tensor([[1.0, 0.0], [0.3, 0.8], [0.2, 0.7]]).double()
    r = torch.tensor([[0.0, 0.5], [0.1, 0.6], [0.0, 0.7]]).double()
    return MultistepTable(a, r, r * 0 + 0.45, a * 0.1, r * 0 + 1.01, guidance)


def sampler(table: Table, **more: float) -> Sampler:
    solver = EPD(table) if isinstance(table, Directions) else ParallelMultistep(table)
    return Sampler(solver, SIGMAS, VE, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [directions, multistep])
@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_equal_rates_are_a_constant_guidance(make: Callable[..., Table], shape: tuple) -> None:
    wanted = end(sampler(make(), guidance_rate=4.0))
    rates = torch.full(shape, 4.0).double()
    assert torch.allclose(end(sampler(make(rates))), wanted, rtol=1e-13, atol=1e-13)
    of_each = replace(make(), guidance=rates.reshape(3, -1).expand(B, 3, -1))
    assert torch.allclose(end(sampler(of_each)), wanted, rtol=1e-13, atol=1e-13)


def test_each_point_has_its_rate_and_the_first_slope_their_mean() -> None:
    rates = torch.tensor([[1.0, 5.0], [2.0, 2.0], [4.0, 1.0]]).double()
    table, x = directions(rates), torch.linspace(-1, 1, 2 * B).double().reshape(B, 2) * SIGMAS[0]

    def slope(x: Tensor, sigma: float, rate: float) -> Tensor:
        null, given = condition().null, condition().given
        assert null is not None
        s = torch.full((B,), sigma, dtype=torch.float64)
        pair = [network()(x, s, Condition(c)) for c in (null, given)]
        return (x - (pair[0] + rate * (pair[1] - pair[0]))) / sigma

    for n, (t, s) in enumerate(pairwise(SIGMAS)):
        d, total = slope(x, t, rates[n].mean().item()), torch.zeros_like(x)
        for r, w, rate in zip(table.r[n], table.weight[n], rates[n], strict=True):
            at = t * (s / t) ** r.item()
            total = total + w * slope(x + (at - t) * d, at, rate.item())
        x = x + (s - t) * total
    for chunk in (None, 1):
        assert torch.allclose(end(sampler(table), chunk=chunk), x, rtol=1e-12, atol=1e-12)


def test_rows_at_rate_1_have_no_null_row() -> None:
    rows: list[int] = []
    end(sampler(directions(torch.tensor([[1.0, 1.0], [1.0, 3.0], [4.0, 4.0]]))), rows)
    assert rows == [B, 2 * B, 2 * B, 3 * B, 2 * B, 4 * B]
    rows.clear()
    end(sampler(multistep(torch.tensor([1.0, 4.0, 1.0]))), rows)
    assert rows == [2 * B, 4 * B, 2 * B]
    rows.clear()
    of_each = torch.rand(B, 3, 1, generator=torch.Generator().manual_seed(0)) + 2
    of_each[:, 0] = 1  # as in a policy's draws outside of its interval
    end(sampler(multistep(of_each.double())), rows)
    assert rows == [2 * B, 4 * B, 4 * B]


def test_images_of_their_own_rates_are_those_of_each_alone() -> None:
    rates = torch.rand(B, 3, 2, generator=torch.Generator().manual_seed(0)).double() * 5
    for make in (directions, multistep):
        together = end(sampler(replace(make(), guidance=rates)))
        for i in range(B):
            alone = end(sampler(make(rates[i])))
            assert torch.allclose(together[i], alone[i], rtol=1e-12, atol=1e-12)


def test_hand_made_solvers_take_a_rate_for_each_step() -> None:
    rows: list[int] = []
    end(Sampler(Euler(), SIGMAS, VE, rates=(1.0, 4.0, 1.0)), rows)
    assert rows == [B, 2 * B, B]
    constant = end(Sampler(Heun(), SIGMAS, VE, rates=(3.0, 3.0, 3.0)))
    assert torch.allclose(constant, end(Sampler(Heun(), SIGMAS, VE, guidance_rate=3.0)))


@pytest.mark.parametrize(
    ("text", "rates"),
    [("4", [4, 4, 4]), ("1.3,4,6", [1.3, 4, 6]), ("4@0.5-5", [1, 4, 4]), ("4@9-99", [4, 1, 1])],
)
def test_rates_by_hand_are_one_one_a_step_or_those_of_an_interval(text: str, rates: list) -> None:
    assert guidance_rates(text, SIGMAS[:-1]) == tuple(rates)
    wanted = [Sampler(Euler(), SIGMAS, rates=tuple(map(float, rates)))]
    exact = torch.tensor(rates, dtype=torch.float64)
    wanted += [sampler(make(exact)) for make in (directions, multistep)]
    plain = (Sampler(Euler(), SIGMAS), sampler(directions()), sampler(multistep()))
    for own, guided in zip(plain, wanted, strict=True):
        by_hand = replace(own, guidance_rate=2.0).with_rates(guidance_rates(text, SIGMAS[:-1]))
        assert torch.equal(end(by_hand), end(guided))


def test_images_of_their_own_grids_are_those_of_each_alone() -> None:
    rows = [[10, 3, 1, 0.2], [10, 5, 2, 0.2], [10, 1, 0.5, 0.2]]
    grids = torch.tensor(rows, dtype=torch.float64)
    bases = [make_solver(name) for name in ("euler", "ipndm-3", "dpmpp-2", "dpmpp-3", "deis-3")]
    epds = [EPD(directions(), base) for base in bases]
    for solver in (*epds, ParallelMultistep(multistep()), Euler()):
        whole = Sampler(solver, SIGMAS, VE)
        together = end(replace(whole, grids=grids))
        for i, grid in enumerate(rows):
            alone = end(replace(whole, sigmas=tuple(grid)))
            assert torch.allclose(together[i], alone[i], rtol=1e-6, atol=1e-6)


def test_guidance_is_saved_as_version_2_and_files_without_stay_version_1(tmp_path: Path) -> None:
    recipe = Recipe(4, 2)
    for path in (tmp_path / "p.pkl", tmp_path / "p.json"):
        for shape in ((3,), (3, 2)):
            rates = torch.linspace(1, 3, math.prod(shape)).double().reshape(shape)
            save_predictor(Predictor(directions(rates), recipe), path)
            guidance = load_predictor(path).table.guidance
            assert guidance is not None
            assert torch.equal(guidance, rates)
    assert '"format_version": 2' in path.read_text()
    save_predictor(Predictor(directions(), recipe), path)
    assert '"format_version": 1' in path.read_text().partition("table")[0]
    for rates, words in (
        (torch.ones(2), "guidance has the shape"),
        (torch.ones(3, 4), "guidance has the shape"),
        (torch.tensor([1.0, math.nan, 1.0]), "must be finite"),
        (torch.tensor([1.0, -1.0, 1.0]), "finite and 0 to inf"),
    ):
        with pytest.raises(ValueError, match=words):
            save_predictor(Predictor(directions(rates), recipe), tmp_path / "p.pkl")
