import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Dirichlet, Normal, kl_divergence

from backends.base import Backend
from solvers.epd import EPD, Directions, MultistepTable
from solvers.field import Field
from solvers.integrate import integrate
from src.seeds import generator, randn
from tests.training.students import SHAPE, model
from training.ppo.policy import LEAST, REACH, Policy, PolicyOptions, stacked, start_of


def quiet(_text: str) -> None:
    raise AssertionError(_text)


def table(free: bool = False) -> Directions:
    """Three intervals, two points, out of order; with `free`, weights of any sign and slopes."""
    r = torch.tensor([[0.7, 0.2], [0.3, 0.9], [0.5, 0.4]]).double()
    share = torch.tensor([[0.25, 0.75], [0.6, 0.4], [0.5, 0.5]]).double()
    time = torch.tensor([[1.01, 0.98], [1.0, 1.0], [0.97, 1.02]]).double()
    one = torch.ones_like(r)
    if not free:
        return Directions(r, share, time, one)
    weight = torch.tensor([[-0.5, 1.4], [0.6, 0.4], [0.3, 0.3]]).double()
    known = torch.tensor([[0.1, 0.0], [0.05, -0.05], [0.2, 0.1]]).double()
    return Directions(r, weight, time, one, known)


def policy(free: bool = False, **options: float) -> Policy:
    made = PolicyOptions(**{"concentration": 10.0, **options})  # type: ignore[arg-type]
    return Policy(start_of(table(free), quiet), made, seed=1)


def moved(one: Policy, size: float = 0.1) -> Policy:
    """The policy with other numbers in its last layer."""
    with torch.no_grad():
        one.last.weight.normal_(0, size, generator=generator(0, "moved"))
    return one


def end(backend: Backend, tables: Directions) -> Tensor:
    sigmas = backend.levels.grid("polynomial", 4)
    x = randn(range(5), SHAPE, dtype=torch.float64) * sigmas[0]
    return list(integrate(EPD(tables), Field(backend), x, sigmas))[-1]


@pytest.mark.parametrize("free", [False, True])
def test_training_starts_at_the_distilled_table_whatever_its_order_and_signs(free: bool) -> None:
    found, backend = policy(free).mean_table(), model()
    assert bool((found.weight >= 0).all())
    assert torch.allclose(found.weight.sum(-1), torch.ones(3).double())
    assert torch.allclose(found.r, table(free).r, rtol=0, atol=1e-15)
    assert torch.allclose(end(backend, found), end(backend, table(free)), rtol=1e-12, atol=1e-12)


def test_a_sample_has_its_own_table() -> None:
    one, backend = policy(True), model()
    draws = stacked([one().draw(generator(i)) for i in range(5)])
    together = end(backend, one.table(draws))
    for i in range(5):
        alone = end(backend, one.table(draws.rows(torch.tensor(i))))
        assert torch.allclose(together[i], alone[i], rtol=1e-12, atol=1e-12)


def test_the_probability_of_a_table_is_that_of_its_intervals_and_factors() -> None:
    one = moved(policy(dir_scale=True, time_scale=True))
    draws = stacked([one().draw(generator(i)) for i in range(2)])
    residual = REACH * torch.tanh(one.last(hidden(one)) / REACH)
    segments, weight, factors = residual.split((3, 2, 4), -1)
    start = one.start
    for b in range(2):
        total = 0.0
        for n in range(3):
            alpha = torch.exp(torch.log(10 * start.segments[n]) + segments[n])
            total += Dirichlet(alpha).log_prob(draws.segments[b, n]).item()
            alpha = torch.exp(torch.log(10 * start.weight[n]) + weight[n])
            total += Dirichlet(alpha).log_prob(draws.weight[b, n]).item()
            total += Normal(factors[n], 0.05).log_prob(draws.factors[b, n]).sum().item()
        assert one().log_prob(draws)[b].item() == pytest.approx(total, rel=1e-12)


def hidden(one: Policy) -> Tensor:
    x = one.steps.weight
    for block in one.blocks:
        x = x + block(x)
    return x


def test_a_density_of_dirichlets_agrees_with_a_number_by_hand() -> None:
    r = torch.tensor([[0.2, 0.5]], dtype=torch.float64)
    one = Policy(start_of(Directions(r, ONE / 2, ONE, ONE), quiet), PolicyOptions())
    draws = stacked([one().centre()])
    log_gamma = math.lgamma
    by_hand = log_gamma(10) - log_gamma(2) - log_gamma(3) - log_gamma(5)
    by_hand += math.log(0.2) + 2 * math.log(0.3) + 4 * math.log(0.5)
    by_hand += log_gamma(10) - 2 * log_gamma(5) + 8 * math.log(0.5)
    assert one().log_prob(draws).item() == pytest.approx(by_hand, rel=1e-12)


ONE = torch.ones(1, 2).double()


def test_entropy_and_divergence_are_the_sums_of_those_of_torch() -> None:
    one = moved(policy(time_scale=True))
    now, first = one(), one.initial()
    pairs = [(getattr(now, n), getattr(first, n)) for n in ("segments", "weight", "factors")]
    kl = sum(kl_divergence(p, q).sum().item() for p, q in pairs)
    assert now.kl(first).item() == pytest.approx(kl, rel=1e-12)
    assert now.entropy().item() == pytest.approx(sum(p.entropy().sum().item() for p, _ in pairs))
    assert first.kl(first).item() == 0


def test_draws_have_the_means_and_spreads_of_their_law() -> None:
    one = policy(dir_scale=True)
    draws = stacked([one().draw(generator(i, "law")) for i in range(4000)])
    mean, c = one.start.segments, 10.0
    assert torch.allclose(draws.segments.mean(0), mean, atol=0.01)
    assert torch.allclose(draws.segments.var(0), mean * (1 - mean) / (c + 1), rtol=0.12)
    assert torch.allclose(draws.weight.mean(0), one.start.weight, atol=0.01)
    assert draws.factors.std().item() == pytest.approx(0.05, rel=0.03)


def test_a_draw_hangs_on_its_generator_alone() -> None:
    first = policy()().draw(generator(4, "table/0/1/2"))
    torch.rand(3, generator=generator(4))
    again = policy()().draw(generator(4, "table/0/1/2"))
    other = policy()().draw(generator(4, "table/0/1/3"))
    assert torch.equal(first.segments, again.segments)
    assert not torch.equal(first.segments, other.segments)


def test_draws_of_a_lopsided_law_stay_off_the_edge_and_likely() -> None:
    r = torch.tensor([[1e-3]]).double()
    one = torch.ones_like(r)
    lopsided = Policy(start_of(Directions(r, one, one, one), quiet), PolicyOptions())
    draws = stacked([lopsided().draw(generator(i)) for i in range(50)])
    assert draws.segments.min().item() >= 0.9 * LEAST
    assert bool(lopsided().log_prob(draws).isfinite().all())
    assert bool((draws.weight == 1).all())


def test_no_training_can_make_a_law_collapse() -> None:
    far = moved(policy(), size=1e6)
    assert bool(far().segments.concentration.isfinite().all())
    assert far().segments.concentration.max().item() <= 10 * math.exp(REACH)
    draws = stacked([far().draw(generator(i)) for i in range(5)])
    assert bool(far().log_prob(draws).isfinite().all())


def test_a_row_at_the_edge_starts_uniform_and_is_told() -> None:
    heard: list[str] = []
    r = torch.tensor([[0.0, 0.6], [0.2, 0.6]]).double()
    weight = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).double()
    one = torch.ones_like(r)
    start = start_of(Directions(r, weight, one, one), heard.append)
    assert torch.allclose(start.segments[0], torch.full((3,), 1 / 3).double())
    assert torch.allclose(start.segments[1], torch.tensor([0.2, 0.4, 0.4]).double())
    assert start.weight.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert [text.split(":")[0] for text in heard] == ["interval 0", "interval 1"]


def test_scales_are_kept_unless_they_are_trained() -> None:
    kept = policy()
    draw = kept.table(kept().draw(generator(0)))
    assert torch.allclose(draw.dir_scale, table().dir_scale, rtol=1e-7)
    assert torch.equal(draw.time_scale, table().time_scale)
    trained = policy(dir_scale=True, time_scale=True)
    drawn = trained().draw(generator(0))
    factors = trained.table(drawn).dir_scale / table().dir_scale
    assert torch.allclose(factors.log(), drawn.factors[:, :2])
    factors = trained.table(drawn).time_scale / table().time_scale
    assert torch.allclose(factors.log(), drawn.factors[:, 2:])


def test_draws_keep_the_sum_of_weights_of_both_signs() -> None:
    one, start = policy(True), table(True)
    draws = one.table(stacked([one().draw(generator(i)) for i in range(20)]))
    mix, wanted = draws.weight * draws.dir_scale, start.weight * start.dir_scale
    assert torch.allclose(mix.sum(-1), wanted.sum(-1).expand(20, 3))
    assert mix[:, 0].std(0).min().item() > 0.05
    assert torch.allclose(draws.weight.sum(-1), torch.ones(20, 3).double())


def test_a_table_of_another_solver_is_refused() -> None:
    rows = [torch.ones(2, 1).double()] * 5
    with pytest.raises(ValueError, match="MultistepTable: distil with --solver epd"):
        start_of(MultistepTable(*rows), quiet)
    with pytest.raises(ValueError, match="no table"):
        start_of(None, quiet)
