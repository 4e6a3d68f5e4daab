"""EPD's mixture with the slopes that it has anyway: by hand, in order, and in files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from solvers.classic import IPNDM, Euler, Heun
from solvers.epd import EPD, Directions, evaluated
from solvers.field import Condition, Field
from solvers.integrate import MAX_SLOPES, Solver, Step, integrate
from solvers.predictor import (
    Predictor,
    Recipe,
    described,
    load_predictor,
    save_predictor,
    validate,
)
from solvers.process import VE
from solvers.schedules import log_snr
from tests.solvers.mixture import LATENTS, distance, learned, run, ve

GRID = log_snr(4, 0.1, 20.0)
N, K, H = len(GRID) - 1, 2, 1 + MAX_SLOPES


def with_known(table: Directions | None = None, count: int = H, scale: float = 0.1) -> Directions:
    generator = torch.Generator().manual_seed(5)
    known = torch.randn(N, count, dtype=torch.float64, generator=generator) * scale
    return replace(table or learned(N, K), known=known)


def predictor(count: int = H) -> Predictor:
    return Predictor(with_known(count=count), Recipe(num_steps=N + 1, num_points=K, afs=True))


def slope(x: Tensor, sigma: float, told: float | None = None) -> Tensor:
    return (x - ve(x, x.new_full((len(x),), sigma if told is None else told))) / sigma


# --- the step -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, H])
@pytest.mark.parametrize("base", [Euler(), IPNDM(3)], ids=repr)
def test_none_or_zeros_of_known_slopes_change_no_bit(base: Solver, count: int) -> None:
    table = learned(N, K)
    zeros = replace(table, known=torch.zeros(N, count, dtype=torch.float64))
    assert torch.equal(run(EPD(zeros, base), GRID), run(EPD(table, base), GRID))


def test_two_steps_by_hand() -> None:
    """Both steps written out; the second knows its own slope, then points 2 and 1, then d_0."""
    table, grid = with_known(), [5.0, 2.0, 0.5]
    x, slopes = LATENTS * 5, []
    for n in range(2):
        t, s = grid[n], grid[n + 1]
        d_n = slope(x, t)
        mix = torch.zeros_like(x)
        heard = [d_n]
        for k in range(K):
            r, w, c, o = (float(tensor[n, k]) for tensor in table.tensors()[:4])
            t_k = s**r * t ** (1 - r)
            d = slope(x + (t_k - t) * d_n, t_k, c * t_k)
            mix, heard = mix + w * o * d, [d, *heard]
        for b, d in zip(table.known[n].tolist(), [d_n, *slopes], strict=False):
            mix = mix + b * d
        slopes = heard
        x = x + (s - t) * mix
    first = Directions(*(t[:2] for t in table.tensors()))
    assert distance(run(EPD(first), torch.tensor(grid)), x) < 1e-12


def steps_of(base: Solver, *, afs: bool = False) -> list[tuple[Step, tuple[Tensor, ...]]]:
    """Every step with what it has evaluated."""
    found: list[tuple[Step, tuple[Tensor, ...]]] = []
    solver = EPD(with_known(), base)

    def watching(field: Field, step: Step) -> Tensor:
        found.append((step, evaluated(step)))
        return solver(field, step)

    first = VE.first_slope if afs else None
    list(integrate(watching, Field(ve), LATENTS * GRID[0], GRID, first_slope=first))
    return found


def test_the_slope_where_it_stands_comes_first_and_those_of_earlier_calls_follow() -> None:
    (one, first), (_, second), (_, third) = steps_of(Euler())
    assert [len(s) for s in (first, second, third)] == [1, 4, 5]
    assert first[0] is one.now.d
    assert torch.equal(second[-1], first[0])
    assert torch.equal(third[3], second[0])


def test_the_analytic_slope_of_afs_serves_its_own_step_alone() -> None:
    (one, first), (_, second), *_ = steps_of(Euler(), afs=True)
    assert torch.equal(first[0], VE.first_slope(one.now.x, one.now.sigma))
    assert len(second) == 1 + K


@pytest.mark.parametrize("base", [Euler(), IPNDM(3), Heun()], ids=repr)
@pytest.mark.parametrize("afs", [False, True])
def test_no_slope_is_known_twice(base: Solver, afs: bool) -> None:
    for _, slopes in steps_of(base, afs=afs):
        assert not any(torch.equal(a, b) for i, a in enumerate(slopes) for b in slopes[:i])


def test_known_slopes_cost_no_call() -> None:
    plain, more = Field(ve), Field(ve)
    for field, table in ((plain, learned(N, K)), (more, with_known())):
        list(integrate(EPD(table, IPNDM(2)), field, LATENTS * GRID[0], GRID))
    assert more.tally == plain.tally


def test_coefficients_of_slopes_that_are_not_known_yet_are_not_used() -> None:
    table = with_known()
    wild = table.known.clone()
    wild[0, 1:], wild[1, 1 + 1 + K :] = 1e9, 1e9
    assert torch.equal(run(EPD(replace(table, known=wild)), GRID), run(EPD(table), GRID))


def test_a_table_for_each_sample_steps_each_by_its_own() -> None:
    tables = [with_known(), with_known(learned(N, K, seed=1), scale=0.3)]
    each = Directions(*(torch.stack(t) for t in zip(*(t.tensors() for t in tables), strict=True)))
    x = LATENTS[:2] * GRID[0]
    assert each.known.shape == (2, N, H)
    both = run(EPD(each), GRID, x=x)
    alone = torch.cat([run(EPD(t), GRID, x=x[i : i + 1]) for i, t in enumerate(tables)])
    assert distance(both, alone) < 1e-12


def test_the_gradient_reaches_the_coefficients() -> None:
    table = with_known()
    known = table.known.requires_grad_()
    run(EPD(replace(table, known=known)), GRID).sum().backward()
    assert known.grad is not None
    assert (known.grad != 0).sum().item() == 1 + (2 + K) + H


def test_a_row_and_a_move_keep_the_coefficients() -> None:
    table = with_known()
    row = table.row(1, 5)
    assert row.known.shape == (1, H, 1, 1, 1)
    assert torch.equal(row.known.flatten(), table.known[1])
    assert table.to(torch.zeros(1)).known.dtype == torch.float32


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pkl", ".json"])
def test_known_slopes_are_saved_and_loaded_bit_for_bit(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    save_predictor(predictor(), path)
    found = load_predictor(path)
    assert found.recipe == predictor().recipe
    assert isinstance(found.table, Directions)
    pairs = zip(found.table.tensors(), predictor().table.tensors(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_file_without_known_slopes_has_no_entry_for_them(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    save_predictor(predictor(count=0), path)
    names = set(torch.load(path, weights_only=True)["table"])
    assert names == {"r", "weight", "time_scale", "dir_scale"}
    assert len(load_predictor(path).table.tensors()) == 4


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (torch.zeros(N, H + 1), rf"known has the shape \[{N}, {H + 1}\]"),
        (torch.zeros(N + 1, 1), rf"known has the shape \[{N + 1}, 1\]"),
        (torch.full((N, 1), torch.inf), r"known\[0, 0\] is inf: it must be a finite number"),
    ],
)
def test_coefficients_that_cannot_be_are_refused(known: Tensor, message: str) -> None:
    wrong = replace(predictor(), table=replace(learned(N, K), known=known))
    with pytest.raises(ValueError, match=message):
        validate(wrong)


def test_coefficients_of_any_sign_and_sum_are_served() -> None:
    assert validate(replace(predictor(), table=with_known(scale=10.0)))


def test_the_coefficients_are_shown() -> None:
    text = described(predictor())
    assert "known, of the slopes known before each interval" in text
    assert "known, of" not in described(predictor(count=0))


def test_latents_may_have_any_shape() -> None:
    def linear(x: Tensor, sigma: Tensor, _cond: Condition | None) -> Tensor:
        return x / (1 + sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2)

    x = torch.ones(3, 7, dtype=torch.float64) * 20
    assert run(EPD(with_known()), GRID, linear, x).shape == x.shape
