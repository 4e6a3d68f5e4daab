import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Dirichlet, Normal

from solvers.classic import Euler
from solvers.epd import EPD, Directions, MultistepTable, ParallelMultistep, Table
from solvers.field import Field
from solvers.predictor import named_tensors
from solvers.sampler import Sampler
from src.seeds import generator, randn
from tests.training.students import SHAPE, model
from training.ppo.config import Ppo
from training.ppo.policy import (
    REACH,
    Policy,
    Start,
    stacked,
    start_of,
)

ONE = torch.ones(1, 2).double()
NONE = Ppo(train_points=False, train_weights=False)
ALL = Ppo(train_grid=True, train_scale_dir=True, train_scale_time=True, train_guidance=True)


def quiet(_text: str) -> None:
    raise AssertionError(_text)


def table(free: bool = False) -> Directions:
    """Three intervals, two points, out of order; with `free`, weights of any sign."""
    r = torch.tensor([[0.7, 0.2], [0.3, 0.9], [0.5, 0.4]]).double()
    share = torch.tensor([[0.25, 0.75], [0.6, 0.4], [0.5, 0.5]]).double()
    time = torch.tensor([[1.01, 0.98], [1.0, 1.0], [0.97, 1.02]]).double()
    one = torch.ones_like(r)
    if not free:
        return Directions(r, share, time, one)
    mix = torch.tensor([[-0.5, 1.4], [0.6, 0.4], [0.3, 0.3]]).double()
    size = mix.abs().sum(-1, keepdim=True)
    return Directions(r, mix.abs() / size, time, mix.sign() * size)


def multistep() -> MultistepTable:
    """Three intervals, two points, two known slopes; places at the very edge."""
    a = torch.tensor([[1.0, 0.0], [0.3, 0.8], [0.2, 0.7]]).double()
    r = torch.tensor([[0.0, 0.5], [0.1, 1.0], [0.0, 0.7]]).double()
    return MultistepTable(a, r, r * 0 + 0.45, a * 0.1, r * 0 + 1.01)


def sampler(of: Table) -> Sampler:
    levels = model().levels
    solver = EPD(of) if isinstance(of, Directions) else ParallelMultistep(of)
    return Sampler(solver, tuple(levels.grid("polynomial", 4).tolist()))


def start(of: Table | None = None, actions: Ppo | None = None) -> Start:
    return start_of(sampler(of or table()), actions or Ppo(), quiet)


def policy(of: Table | None = None, actions: Ppo | None = None) -> Policy:
    return Policy(start(of, actions), seed=1)


def moved(one: Policy, size: float = 0.1) -> Policy:
    """The policy with other numbers in its last layer."""
    with torch.no_grad():
        one.last.weight.normal_(0, size, generator=generator(0, "moved"))
    return one


@torch.no_grad()
def end(of: Sampler) -> Tensor:
    x = randn(range(5), SHAPE, dtype=torch.float64) * of.sigmas[0]
    return list(of.states(Field(model().denoise), x))[-1]


@pytest.mark.parametrize("of", [table(), table(True), multistep()])
@pytest.mark.parametrize("actions", [Ppo(), ALL])
def test_training_starts_exactly_at_the_predictor(of: Table, actions: Ppo) -> None:
    one = policy(of, actions)
    with torch.no_grad():
        mean = one.start.sampler_of(one().mean())
    assert mean.sigmas == pytest.approx(sampler(of).sigmas, rel=1e-14)
    assert torch.allclose(end(mean), end(sampler(of)), rtol=1e-12, atol=1e-12)
    free = one.start.sampler_of(one.start.draws(torch.zeros(one.start.size).double()))
    assert torch.allclose(end(free), end(sampler(of)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("of", [table(True), multistep()])
def test_a_sample_has_its_own_table_and_grid(of: Table) -> None:
    one = policy(of, replace(ALL, train_guidance=False))
    draws = stacked([one().draw(generator(i)) for i in range(5)])
    together = end(one.start.sampler_of(draws))
    for i in range(5):
        alone = end(one.start.sampler_of(draws.rows(torch.tensor(i))))
        assert torch.allclose(together[i], alone[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("points", {"r"}),
        ("weights", {"weight"}),
        ("scale_dir", {"dir_scale"}),
        ("scale_time", {"time_scale"}),
        ("guidance", {"guidance"}),
        ("grid", set()),
    ],
)
def test_an_action_moves_its_own_numbers_alone(name: str, tensors: set[str]) -> None:
    more: dict[str, Any] = {f"train_{name}": True}
    one = policy(actions=replace(NONE, **more))
    drawn = one.start.sampler_of(one().draw(generator(0)))
    new: Table = drawn.solver.table  # type: ignore[attr-defined]
    still = named_tensors(one.start.table)
    changed = {n for n, t in named_tensors(new).items() if not torch.allclose(t, still[n])}
    assert changed == tensors
    assert (drawn.sigmas != one.start.sampler.sigmas) is (name == "grid")
    assert (drawn.sigmas[0], drawn.sigmas[-1]) == sampler(table()).sigmas[:: len(drawn.sigmas) - 1]


def test_the_probability_of_a_table_is_that_of_its_intervals_and_factors() -> None:
    one = moved(policy(actions=Ppo(train_scale_dir=True, train_scale_time=True, train_grid=True)))
    draws = stacked([one().draw(generator(i)) for i in range(2)])
    residual = REACH * torch.tanh(one.last(hidden(one)) / REACH)
    segments, weight, factors, grid = residual.split((3, 2, 4, 1), -1)
    alpha = one.start.alpha
    for b in range(2):
        drawn = {name: rows[b] for name, rows in draws.simplex.items()}
        law = Dirichlet((alpha["grid"].log() + grid.t()).exp())
        total = law.log_prob(drawn["grid"]).sum().item()
        for n in range(3):
            law = Dirichlet(alpha["segments"][n] * segments[n].exp())
            total += law.log_prob(drawn["segments"][n]).item()
            law = Dirichlet(alpha["weight"][n] * weight[n].exp())
            total += law.log_prob(drawn["weight"][n]).item()
            total += Normal(factors[n], 0.05).log_prob(draws.gauss[b, n]).sum().item()
        assert one().log_prob(draws)[b].item() == pytest.approx(total, rel=1e-12)


def hidden(one: Policy) -> Tensor:
    x = one.steps.weight
    for block in one.blocks:
        x = x + block(x)
    return x


def test_a_density_of_dirichlets_agrees_with_a_number_by_hand() -> None:
    r = torch.tensor([[0.2, 0.5]], dtype=torch.float64)
    levels = replace(sampler(table()), solver=EPD(Directions(r, ONE / 2, ONE, ONE)))
    one = Policy(start_of(replace(levels, sigmas=levels.sigmas[:2]), Ppo(), quiet))
    log_gamma = math.lgamma
    by_hand = log_gamma(10) - log_gamma(2) - log_gamma(3) - log_gamma(5)
    by_hand += math.log(0.2) + 2 * math.log(0.3) + 4 * math.log(0.5)
    by_hand += log_gamma(10) - 2 * log_gamma(5) + 8 * math.log(0.5)
    assert one().log_prob(stacked([one().mean()])).item() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("mirrors", [(None,), (False, True)])
def test_draws_have_the_means_and_spreads_of_their_law(mirrors: tuple[bool | None, ...]) -> None:
    one = policy(actions=Ppo(train_scale_dir=True))
    sources = [(i, mirror) for i in range(4000 // len(mirrors)) for mirror in mirrors]
    draws = stacked([one().draw(generator(i, "law"), mirror) for i, mirror in sources])
    mean, c = one.start.alpha["segments"] / 10, 10.0
    segments = draws.simplex["segments"]
    assert torch.allclose(segments.mean(0), mean, atol=0.01)
    assert torch.allclose(segments.var(0), mean * (1 - mean) / (c + 1), rtol=0.12)
    assert torch.allclose(draws.simplex["weight"].mean(0), table().weight, atol=0.01)
    assert draws.gauss.std().item() == pytest.approx(0.05, rel=0.03)


def test_no_training_can_make_a_law_collapse() -> None:
    far = moved(policy(), size=1e6)
    concentration = far().simplex["segments"].concentration
    assert bool(concentration.isfinite().all())
    assert concentration.max().item() <= 10 * math.exp(REACH)
    draws = stacked([far().draw(generator(i)) for i in range(5)])
    assert bool(far().log_prob(draws).isfinite().all())


def test_a_row_at_the_edge_starts_uniform_and_is_told() -> None:
    heard: list[str] = []
    r = torch.tensor([[0.0, 0.6], [0.2, 0.6], [0.2, 0.6]]).double()
    weight = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]).double()
    one = torch.ones_like(r)
    alpha = start_of(sampler(Directions(r, weight, one, one)), Ppo(), heard.append).alpha
    assert torch.allclose(alpha["segments"][0], torch.full((3,), 10 / 3).double())
    assert torch.allclose(alpha["segments"][1], torch.tensor([2.0, 4.0, 4.0]).double())
    assert alpha["weight"][:2].tolist() == [[5, 5], [5, 5]]
    assert [text.split(":")[0] for text in heard] == ["interval 0", "interval 1"]


def test_draws_keep_the_sum_of_weights_of_both_signs() -> None:
    one, first = policy(table(True)), table(True)
    draws = one.start.table_of(stacked([one().draw(generator(i)) for i in range(20)]))
    assert isinstance(draws, Directions)
    mix, wanted = draws.weight * draws.dir_scale, first.weight * first.dir_scale
    assert torch.allclose(mix.sum(-1), wanted.sum(-1).expand(20, 3))
    assert mix[:, 0].std(0).min().item() > 0.05
    assert torch.allclose(draws.weight.sum(-1), torch.ones(20, 3).double())


def test_guidance_starts_at_the_rate_of_the_predictor_and_is_a_factor() -> None:
    whole = replace(sampler(table()), guidance_rate=4.0)
    first = start_of(whole, Ppo(train_guidance=True, guidance_std=0.2), quiet)
    one = Policy(first)
    assert one.start.table_of(one().mean()).guidance.tolist() == [4.0] * 3  # type: ignore[union-attr]
    draws = stacked([one().draw(generator(i)) for i in range(3000)])
    rates = one.start.table_of(draws).guidance
    assert rates is not None
    assert rates.shape == (3000, 3, 1)
    assert (rates / 4).log().std().item() == pytest.approx(0.2, rel=0.05)


def test_an_intervals_learning_scales_its_gradient() -> None:
    plain, scaled = policy(), Policy(start(), 1, [1.0, 0.0, 3.0])
    draws = stacked([plain().draw(generator(i)) for i in range(4)])
    for one in (plain, scaled):
        one().simplex["weight"].log_prob(draws.simplex["weight"]).sum(0).backward(torch.eye(3)[1])
    assert plain.last.weight.grad is not None
    assert scaled.last.weight.grad is not None
    assert plain.last.weight.grad.abs().max().item() > 0
    assert scaled.last.weight.grad.abs().max().item() == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: start_of(replace(sampler(table()), solver=Euler()), Ppo(), quiet),
            "has none",
        ),
        (lambda: start(actions=NONE), "nothing to train"),
        (
            lambda: start(multistep(), replace(NONE, train_scale_dir=True)),
            "nothing to train",
        ),
    ],
)
def test_what_no_policy_can_be_over_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
