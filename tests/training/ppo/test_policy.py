import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Dirichlet, Normal

from solvers.classic import IPNDM, Euler
from solvers.epd import EPD, Directions, MultistepTable, ParallelMultistep
from solvers.field import Field
from solvers.integrate import Solver
from solvers.predictor import named_tensors
from solvers.sampler import Sampler
from src.seeds import generator, randn
from tests.training.students import SHAPE, model
from training.ppo.config import Ppo
from training.ppo.learners import Clipped
from training.ppo.policy import REACH, Policy, stacked, start_of

NONE = Ppo(train_points=False, train_weights=False)
ALL = Ppo(train_grid=True, train_scale_dir=True, train_scale_time=True, train_guidance=True)


def quiet(text: str) -> None:
    raise AssertionError(text)


def table(signed: bool = False) -> Directions:
    """Three intervals, two points, out of order; with `signed`, weights of any sign."""
    r = torch.tensor([[0.7, 0.2], [0.3, 0.9], [0.5, 0.4]]).double()
    share = torch.tensor([[0.25, 0.75], [0.6, 0.4], [0.5, 0.5]]).double()
    time = torch.tensor([[1.01, 0.98], [1.0, 1.0], [0.97, 1.02]]).double()
    if not signed:
        return Directions(r, share, time, torch.ones_like(r))
    mix = torch.tensor([[-0.5, 1.4], [0.6, 0.4], [0.3, 0.3]]).double()
    size = mix.abs().sum(-1, keepdim=True)
    return Directions(r, mix.abs() / size, time, mix.sign() * size)


def multistep() -> MultistepTable:
    """Three intervals, two points, two known slopes; places at the very edge."""
    a = torch.tensor([[1.0, 0.0], [0.3, 0.8], [0.2, 0.7]]).double()
    r = torch.tensor([[0.0, 0.5], [0.1, 1.0], [0.0, 0.7]]).double()
    return MultistepTable(a, r, r * 0 + 0.45, a * 0.1, r * 0 + 1.01)


def sampler(solver: Solver) -> Sampler:
    return Sampler(solver, tuple(model().levels.grid("polynomial", 4).tolist()))


EPD_ONE, SIGNED = sampler(EPD(table())), sampler(EPD(table(True)))
PLUG_IN, MULTISTEP = sampler(EPD(table(), IPNDM(2))), sampler(ParallelMultistep(multistep()))


def policy(of: Sampler = EPD_ONE, actions: Ppo | None = None) -> Policy:
    return Policy(start_of(of, actions or Ppo(), quiet), seed=1)


def test_a_step_without_any_reward_changes_nothing() -> None:
    one = Clipped(start_of(EPD_ONE, Ppo(), quiet), Ppo(), 0)
    draws, before = one.draw(0, ["a", "b"]), one.mean()
    lost = torch.full((2,), math.nan).double()
    assert one.update(0, draws, lost, lost) == {}
    assert one.mean().simplex["weight"].equal(before.simplex["weight"])


@pytest.mark.parametrize("minibatch_size", [2, 6])
def test_a_step_tells_how_far_all_its_updates_moved_the_policy(minibatch_size: int) -> None:
    ppo = replace(ALL, minibatch_size=minibatch_size, learning_rate=1e-5, clip_range=0.05)
    one = Clipped(start_of(EPD_ONE, ppo, quiet), ppo, 0)
    draws, before = one.draw(0, list("abcdef")), one.policy()
    gains = torch.linspace(-1, 1, 6).double()
    measured = one.update(0, draws, gains, gains)
    log_ratio = (one.policy().log_prob(draws) - before.log_prob(draws)).detach()
    ratio = log_ratio.exp()
    assert ratio.max() > 1.05
    assert measured["ratio"] == pytest.approx(ratio.mean().item())
    assert measured["ratio_max"] == pytest.approx(ratio.max().item())
    assert measured["approx_kl"] == pytest.approx((ratio - 1 - log_ratio).mean().item())
    outside = ((ratio - 1).abs() > 0.05).double().mean()
    assert measured["clip_fraction"] == pytest.approx(outside.item())


def test_one_point_has_no_weights_to_train_and_one_step_no_grid() -> None:
    one = Directions(*(t[:1, :1] for t in table().tensors()))
    single = replace(sampler(EPD(one)), sigmas=(80.0, 0.002))
    for action in ({"train_weights": True}, {"train_grid": True}):
        with pytest.raises(ValueError, match="nothing to train"):
            policy(single, replace(NONE, **action))


def moved(one: Policy, size: float = 0.1) -> Policy:
    """The policy with other numbers in its last layer."""
    with torch.no_grad():
        one.last.weight.normal_(0, size, generator=generator(0, "moved"))
    return one


@torch.no_grad()
def end(of: Sampler) -> Tensor:
    x = randn(range(5), SHAPE, dtype=torch.float64) * of.sigmas[0]
    return list(of.states(Field(model().denoise), x))[-1]


def numbers_of(of: Sampler) -> dict[str, Tensor]:
    """All that an action may move."""
    solver: Any = of.solver
    return named_tensors(solver.table) | {"grid": torch.tensor(of.sigmas).double()}


MOVES = {
    "points": {"r"},
    "weights": {"weight"},
    "scale_dir": {"dir_scale"},
    "scale_time": {"time_scale"},
    "guidance": {"guidance"},
    "grid": {"grid"},
}


@pytest.mark.parametrize("action", [*MOVES, "all"])
@pytest.mark.parametrize("of", [EPD_ONE, SIGNED, PLUG_IN, MULTISTEP])
@torch.no_grad()
def test_an_action_starts_exactly_at_the_table_and_moves_its_own_numbers_alone(
    of: Sampler, action: str
) -> None:
    more: dict[str, Any] = {f"train_{action}": True}
    actions = ALL if action == "all" else replace(NONE, **more)
    moves = MOVES | {"all": set.union(*MOVES.values())}
    if of is SIGNED:
        moves["weights"] = {"weight", "dir_scale"}
    if of is MULTISTEP:
        moves["weights"] = {"a", "weight", "b"}
        moves["all"] = moves["all"] - {"dir_scale"} | {"a", "b"}
        if action == "scale_dir":
            with pytest.raises(ValueError, match="nothing to train"):
                policy(of, actions)
            return
    one = policy(of, actions)
    zero = one.start.draws(torch.zeros(one.start.size).double())
    begun = one.start.sampler_of(one().mean())
    for first in (begun, one.start.sampler_of(zero)):
        assert first.sigmas == pytest.approx(of.sigmas, rel=1e-14)
        assert torch.allclose(end(first), end(of), rtol=1e-12, atol=1e-12)
    drawn, still = one.start.sampler_of(one().draw(generator(0))), numbers_of(begun)
    now = numbers_of(drawn)
    assert {n for n, t in now.items() if not torch.allclose(t, still[n])} == moves[action]
    assert (drawn.sigmas[0], drawn.sigmas[-1]) == (of.sigmas[0], of.sigmas[-1])


@pytest.mark.parametrize("of", [SIGNED, MULTISTEP])
@torch.no_grad()
def test_a_sample_has_its_own_table_and_grid(of: Sampler) -> None:
    one = policy(of, replace(ALL, train_guidance=False))
    draws = stacked([one().draw(generator(i)) for i in range(5)])
    together = end(one.start.sampler_of(draws))
    for i in range(5):
        alone = end(one.start.sampler_of(draws.rows(torch.tensor(i))))
        assert torch.allclose(together[i], alone[i], rtol=1e-6, atol=1e-6)


def test_the_probability_of_a_table_is_that_of_its_intervals_and_factors() -> None:
    actions = Ppo(train_scale_dir=True, train_scale_time=True, train_grid=True)
    one = moved(policy(actions=actions))
    draws = stacked([one().draw(generator(i)) for i in range(2)])
    x = one.steps.weight
    for block in one.blocks:
        x = x + block(x)
    residual = REACH * torch.tanh(one.last(x) / REACH)
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
    far = moved(one, size=1e6)  # no training can make a law collapse
    concentration = far().simplex["segments"].concentration
    assert bool(concentration.isfinite().all())
    assert concentration.max().item() <= 10 * math.exp(REACH)
    draws = stacked([far().draw(generator(i)) for i in range(5)])
    assert bool(far().log_prob(draws).isfinite().all())


def test_a_row_at_the_edge_starts_uniform_and_no_policy_is_over_nothing() -> None:
    for other, actions, words in (
        (sampler(Euler()), Ppo(), "has none"),
        (EPD_ONE, NONE, "nothing"),
    ):
        with pytest.raises(ValueError, match=words):
            policy(other, actions)
    heard: list[str] = []
    r = torch.tensor([[0.0, 0.6], [0.2, 0.6], [0.2, 0.6]]).double()
    weight = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]).double()
    one = torch.ones_like(r)
    of = sampler(EPD(Directions(r, weight, one, one)))
    alpha = start_of(of, Ppo(), heard.append).alpha
    assert torch.allclose(alpha["segments"][0], torch.full((3,), 10 / 3).double())
    assert torch.allclose(alpha["segments"][1], torch.tensor([2.0, 4.0, 4.0]).double())
    assert alpha["weight"][:2].tolist() == [[5, 5], [5, 5]]
    assert [text.split(":")[0] for text in heard] == ["interval 0", "interval 1"]


def test_draws_keep_the_sum_of_weights_of_both_signs() -> None:
    one, first = policy(SIGNED), table(True)
    draws = one.start.table_of(stacked([one().draw(generator(i)) for i in range(20)]))
    assert isinstance(draws, Directions)
    mix, wanted = draws.weight * draws.dir_scale, first.weight * first.dir_scale
    assert torch.allclose(mix.sum(-1), wanted.sum(-1).expand(20, 3))
    assert mix[:, 0].std(0).min().item() > 0.05
    assert torch.allclose(draws.weight.sum(-1), torch.ones(20, 3).double())


@pytest.mark.parametrize("points", [0, 2])
@pytest.mark.parametrize("of", [EPD_ONE, MULTISTEP])
def test_guidance_starts_at_the_rates_that_there_are_and_is_a_factor(
    of: Sampler, points: int
) -> None:
    """Those of the table, [N, K], or of all its predictor, as [N]."""
    solver: Any = of.solver
    rates = torch.tensor([[4.0, 2.0]]).double().expand(3, 2) if points else None
    solver = replace(solver, table=replace(solver.table, guidance=rates))
    of = replace(of, solver=solver, guidance_rate=4.0)
    one = policy(of, replace(NONE, train_guidance=True, guidance_std=0.2))
    begun = one.start.table_of(one().mean()).guidance
    assert begun is not None
    assert begun.tolist() == ([[4.0, 2.0]] * 3 if points else [4.0] * 3)
    drawn = one.start.table_of(stacked([one().draw(generator(i)) for i in range(3000)])).guidance
    assert drawn is not None
    assert drawn.shape == (3000, 3, points or 1)
    assert (drawn[..., 0] / 4).log().std().item() == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("of", [EPD_ONE, MULTISTEP])
def test_rates_outside_of_the_guidance_interval_stay_as_they_are(of: Sampler) -> None:
    of = replace(of, guidance_rate=1.5)
    guided = replace(NONE, train_guidance=True, guidance_interval=[0.0, of.sigmas[1]])
    start = policy(of, guided).start
    rates = start.table_of(start.draws(torch.ones(start.size).double())).guidance
    assert rates is not None
    assert (rates[0], bool((rates[1:] > 1.6).all())) == (1.5, True)
    with pytest.raises(ValueError, match="no step begins in ppo"):
        policy(of, replace(guided, guidance_interval=[1e-6, 1e-5]))


@pytest.mark.parametrize("of", [EPD_ONE, MULTISTEP])
def test_no_rate_is_drawn_below_what_the_model_takes(of: Sampler) -> None:
    start = start_of(
        replace(of, guidance_rate=1.5), replace(NONE, train_guidance=True), print, 1.0
    )
    tables = [
        start.table_of(start.draws(torch.full((start.size,), by).double())) for by in (-9, 1)
    ]
    least, more = (t.guidance for t in tables)
    assert least is not None
    assert more is not None
    assert (least.max().item(), bool((more > 1.5).all())) == (1.0, True)


@pytest.mark.parametrize("of", [EPD_ONE, MULTISTEP])
def test_a_rate_of_zero_which_no_factor_moves_is_told_and_refused_where_all_are(
    of: Sampler,
) -> None:
    solver: Any = of.solver
    rates, heard = torch.tensor([[2.0], [0.0], [0.0]]).double(), []
    of = replace(of, solver=replace(solver, table=replace(solver.table, guidance=rates)))
    guided = replace(ALL, guidance_interval=[of.sigmas[1], of.sigmas[0]])
    start_of(of, guided, heard.append)
    assert heard == ["interval 1: a guidance rate of 0 stays 0, as draws are factors of it"]
    with pytest.raises(ValueError, match="all that it may move are 0: give a predictor"):
        policy(of, replace(guided, guidance_interval=[0.0, of.sigmas[1]]))


def test_an_intervals_learning_scales_how_far_it_moves() -> None:
    plain, scaled = policy(), Policy(policy().start, 1, [1.0, 0.0, 0.1])
    with torch.no_grad():
        plain.last.weight.normal_(0, 1e-3, generator=generator(0))
    scaled.load_state_dict(plain.state_dict())
    moved = []
    for one in (plain, scaled):
        ends = [law.simplex["weight"].concentration.log() for law in (one(), one.initial())]
        moved.append((ends[0] - ends[1]).detach())
    assert moved[0].abs().min() > 0
    torch.testing.assert_close(
        moved[1], moved[0] * torch.tensor([[1.0], [0.0], [0.1]]), rtol=1e-3, atol=0
    )
