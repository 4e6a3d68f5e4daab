"""Parallel multistep: identities with known methods, what it asks of the network, its files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from solvers.classic import IPNDM, Euler
from solvers.epd import MultistepTable, ParallelMultistep
from solvers.field import Condition, Field
from solvers.integrate import Step
from solvers.predictor import Predictor, load_predictor, save_predictor, validate
from solvers.process import VE
from solvers.recipe import Recipe
from solvers.schedules import NoiseLevels
from tests.solvers.gauss import integrate

SIGMAS = (10.0, 4.0, 1.5, 0.5, 0.1)
N = len(SIGMAS) - 1


def gaussian(x: Tensor, sigma: Tensor, _cond: Condition | None) -> Tensor:
    """The exact denoiser of data with a standard deviation that grows along the first axis."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    scale = torch.linspace(0.5, 2, x.shape[1], dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 2))
    return x * scale**2 / (scale**2 + sigma**2) + 0.1 * torch.sin(x) / (1 + sigma)


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * SIGMAS[0]


def table(r: float = 0.0, points: int = 1) -> MultistepTable:
    """Equal weights of points at one place along the free slope."""
    one = torch.ones(N, points, dtype=torch.float64)
    flat = torch.zeros(N, 5, dtype=torch.float64)
    a = flat.clone()
    a[:, 0] = 1
    return MultistepTable(a, r * one, one / points, flat, one)


def ends(solver: object, x: Tensor) -> list[Tensor]:
    return list(integrate(solver, Field(gaussian), x, SIGMAS))  # pyright: ignore[reportArgumentType]


def test_euler_and_adams_bashforth_are_tables() -> None:
    new = rows([1], [3 / 2], [23 / 12], [55 / 24])
    old = rows([0] * 5, [0, -1 / 2, 0, 0, 0], [0, -16 / 12, 5 / 12, 0, 0])
    old = torch.cat([old, rows([0, -59 / 24, 37 / 24, -9 / 24, 0])])
    t, x = table(), noise(3, 4, 2)
    bashforth = MultistepTable(t.a, t.r, new, old, t.time_scale)
    for own, other in ((t, Euler()), (bashforth, IPNDM(4))):
        for a, b in zip(ends(ParallelMultistep(own), x), ends(other, x), strict=True):
            assert torch.allclose(a, b, rtol=1e-12)


def test_an_interval_costs_one_call_of_k_rows() -> None:
    field = Field(gaussian)
    list(integrate(ParallelMultistep(table(0.5, 3)), field, noise(2, 4), SIGMAS))
    assert (field.tally.calls, field.tally.rows) == (N, N * 3 * 2)


def test_the_newest_slope_is_that_of_the_last_point() -> None:
    seen: list[Step] = []
    solver = ParallelMultistep(table(0.5, 2))

    def watching(field: Field, step: Step) -> Tensor:
        seen.append(step)
        return solver(field, step)

    heard: list[Tensor] = []
    field = Field(lambda x, s, c: heard.append(x) or gaussian(x, s, c))
    list(integrate(watching, field, noise(1, 4), SIGMAS))
    assert [len(step.slopes) for step in seen] == [0, 2, 4, 4]
    last = heard[0][1:2]  # rows are tiled, all samples at point 1 first
    sigma = (SIGMAS[0] * SIGMAS[1]) ** 0.5
    d = (last - gaussian(last, torch.tensor([sigma]), None)) / sigma
    assert torch.allclose(seen[1].slopes[0][:, 0], d, rtol=1e-9)


def predictor(**settings: object) -> Predictor:
    recipe = Recipe(N + 1, 2, solver="epd-multistep", schedule_type="custom", sigmas=SIGMAS)
    changed = {**recipe.__dict__, **settings}
    return Predictor(table(0.5, 2), Recipe(**changed))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["p.pkl", "p.json"])
def test_its_predictor_survives_a_file(tmp_path: Path, name: str) -> None:
    given = predictor()
    save_predictor(given, tmp_path / name)
    loaded = load_predictor(tmp_path / name)
    assert loaded.recipe == given.recipe
    assert isinstance(loaded.table, MultistepTable)
    for ours, theirs in zip(loaded.table.tensors(), given.table.tensors(), strict=True):
        assert torch.equal(ours, theirs)


def test_with_afs_the_first_step_is_free() -> None:
    free = predictor(afs=True)
    assert (free.nfe, free.evaluations) == (N - 1, 2 * (N - 1))
    sampler = validate(free).sampler(NoiseLevels(VE, 0.002, 80.0))
    assert (sampler.calls, sampler.rows) == (free.nfe, free.evaluations)


def test_tables_of_too_many_slopes_or_of_another_kind_are_refused() -> None:
    t = table(0.5, 2)
    wide = MultistepTable(torch.zeros(N, 6), t.r, t.weight, t.b, t.time_scale)
    with pytest.raises(ValueError, match=r"a has the shape \[4, 6\]"):
        validate(Predictor(wide, predictor().recipe))
    with pytest.raises(ValueError, match="epd cannot read a table of MultistepTable"):
        validate(predictor(solver="epd"))
