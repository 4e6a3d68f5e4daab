"""What a fit can make small: sets, features, rewards, each by hand, and what is refused."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.features import load_space, spaces_of, synonyms
from solvers.classic import Heun
from solvers.field import Condition, Field
from solvers.predictor import find_predictor, load_predictor, save_predictor
from solvers.recipe import fitted_on
from solvers.sampler import Sampler
from solvers.schedules import polynomial
from src.functions import name_of
from src.ranks import all_reduce_sum
from training.api import Settings, distill, sample
from training.distances import (
    HUBER,
    NAMES,
    FeatureDistance,
    distance_named,
    energy,
    frechet,
    huber,
    load_network,
    parse_terms,
)
from training.refine import Lens, Linearised, Objective
from training.student import Trajectories

POINTS = torch.tensor([[1.5, 0.0], [-1.0, 1.2], [-0.8, -1.4]])
FEW = Settings(
    nfe=3, samples=160, judges=80, positions=7, rounds=2, fine_steps=17, robust=False,
    schedule="logsnr",
)  # fmt: skip


def cloud(x: Tensor, sigma: Tensor, _cond: Condition | None) -> Tensor:
    """The posterior mean of three points with a little width."""
    sigma = sigma[:, None]
    variance = 0.2**2 + sigma**2
    share = (-(x[:, None] - POINTS).square().sum(-1) / (2 * variance)).softmax(1)
    return (share @ POINTS * sigma**2 + x * 0.2**2) / variance


def waves(x: Tensor) -> Tensor:
    """Six features of points in the plane."""
    return torch.cat([torch.sin(k * x) for k in (1, 2, 3)], 1)


def near_first(x: Tensor, _numbers: object) -> Tensor:
    return -(x - POINTS[0]).square().sum(1).sqrt()


def noise(count: int = 400) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(3))


def test_distances_are_those_of_closed_forms() -> None:
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]])
    assert energy(a, b).item() == pytest.approx(2 * (1 + 3 + 1 + 1) / 4 - 1 - 1)
    x = noise(500)
    assert frechet(x, x).item() == pytest.approx(0, abs=1e-5)
    assert frechet(x + 2, x).item() == pytest.approx(8, rel=1e-4)
    spread = frechet(3 * x, x).item()
    assert spread == pytest.approx(4 * (torch.cov(x.T).trace() + x.mean(0).square().sum()).item())
    assert frechet(x[:, :1] + 2, x[:, :1]).item() == pytest.approx(4, rel=1e-4)
    for distance in (energy, frechet):
        moved = (x + 0.1).requires_grad_()
        (slope,) = torch.autograd.grad(distance(moved, x), moved)
        assert bool(slope.isfinite().all())
    near = huber(torch.full((1, 4), 1e-6), torch.zeros(1, 4)).item()
    assert near == pytest.approx(4e-12 / (4 * HUBER), rel=1e-2, abs=3e-9)
    far = huber(torch.full((1, 4), 50.0), torch.zeros(1, 4)).item()
    assert far == pytest.approx(100 - 2 * HUBER)


def test_features_follow_the_formula_the_published_code_weighs_it_and_all_have_gradients() -> None:
    x, y = (noise(12).reshape(2, 3, 2, 2) * size for size in (1, 1.1))

    def by_waves(x: Tensor) -> Tensor:
        return waves(x.flatten(1))

    by_formula = FeatureDistance(by_waves, 10.0)(x, y)
    assert torch.allclose(by_formula, 10 * (by_waves(x) - by_waves(y)).square().sum(1))
    published = FeatureDistance(by_waves, 10.0, as_published=True)(x, y)
    scalar = torch.nn.functional.mse_loss(by_waves(x), by_waves(y))
    broadcast = (10 * scalar * torch.ones_like(x)).sum() / len(x)
    assert published.mean().item() == pytest.approx(broadcast.item(), rel=1e-5)
    for name in NAMES:
        moving = x.clone().requires_grad_()
        loss = distance_named(name, by_waves)(moving, y)
        assert loss.shape == (2,)
        (slope,) = torch.autograd.grad(loss.sum(), moving)
        assert bool(slope.isfinite().all())
        assert slope.abs().sum() > 0


def test_what_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    assert parse_terms("l2+0.1*distribution") == ((1.0, "l2"), (0.1, "distribution"))
    (tmp_path / "f.pt").write_text("no")
    cpu = torch.device("cpu")
    for call, message in [
        (lambda: parse_terms("l3"), "unknown distance 'l3'"),
        (lambda: parse_terms("-1*l2"), "weight -1"),
        (lambda: parse_terms("0*l2"), "weight 0"),
        (lambda: parse_terms(""), "unknown"),
        (lambda: parse_terms("1e*l2"), "unknown distance '1e*l2'"),
        (lambda: distance_named("l3"), "choose from l2"),
        (lambda: distance_named("inception"), "--features FILE"),
        (lambda: load_network("no/such.pt", cpu), "no/such.pt"),
        (lambda: load_network(tmp_path / "f.pt", cpu), "f.pt is no TorchScript"),
    ]:
        with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
            call()
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("solver", "distance", "look"),
    [
        ("epd-ipndm", "features", lambda x, t: (waves(x) - waves(t)).square().sum(1).mean()),
        ("epd-multistep", "l2+10*distribution", lambda x, t: frechet(waves(x), waves(t))),
        ("epd", "energy", lambda x, t: energy(waves(x), waves(t))),
        ("epd-multistep", "reward", lambda x, _t: -near_first(x, ()).mean()),
    ],
)
def test_each_objective_lowers_itself_on_fresh_noise(
    solver: str, distance: str, look: Callable[[Tensor, Tensor], Tensor]
) -> None:
    predictors = [
        distill(
            cloud, "ve", shape=(2,), settings=replace(FEW, solver=solver, distance=name),
            features=waves, reward=near_first,
        )
        for name in ("l2", distance)
    ]  # fmt: skip
    grid = tuple(polynomial(65, 0.002, 80.0).tolist())
    *_, target = Sampler(Heun(), grid).states(Field(cloud), noise() * 80)
    before, after = (look(sample(p, cloud, noise()), target).item() for p in predictors)
    assert after < before + 0.02 * abs(before)
    looked = f"{__name__}:{'near_first' if distance == 'reward' else 'waves'}"
    assert predictors[1].recipe.training["fitted_on"] == [looked]


def test_what_the_start_was_fitted_on_stays_in_the_recipe(tmp_path: Path) -> None:
    few = replace(FEW, nfe=3, rounds=1, samples=32)
    start = distill(
        cloud, "ve", shape=(2,), settings=replace(few, distance="energy"), features=waves
    )
    save_predictor(start, tmp_path / "start.pkl")
    more = replace(
        few,
        init=str(tmp_path / "start.pkl"),
        rounds=0,
        schedule=None,
        positions=Settings.positions,
    )
    after = distill(cloud, "ve", shape=(2,), settings=more)
    assert after.recipe.training["fitted_on"] == [f"{__name__}:waves"]


def test_a_step_of_squares_is_that_of_gauss_newton() -> None:
    moves = torch.randn(40, 3, 2, generator=torch.Generator().manual_seed(0))
    best = torch.tensor([0.5, -1.0, 2.0])
    targets = torch.einsum("npd,p->nd", moves, best)
    columns = torch.cat([moves, targets[:, None]], 1).transpose(0, 1).flatten(1).double()
    linear = Linearised(torch.zeros(40, 2), moves, targets, columns @ columns.T, 80)
    for name in ("l2", "features"):
        objective = Objective(((1.0, name),), (2,), (1.0,))
        assert torch.allclose(linear.step(objective, 1e-9).float(), best, atol=1e-2)


REFUSED = [
    ("features", {}, "'features' needs its network"),
    ("l2+reward", {}, "needs its reward"),
    ("lpips", {}, "unknown distance 'lpips'"),
    ("features", {"features": lambda x: x[:, :, 9]}, "features fails on .*IndexError"),
    ("energy", {"features": lambda x: x * torch.nan}, "features gives numbers that are not"),
    (
        "features",
        {"features": lambda x: (x + 1).squeeze(0)},
        r"features gives \(2,\) for 1 sample",
    ),
    ("l2", {"conditions": lambda _n: Condition({"y": torch.zeros(1)})}, r"y of \[1\]: 2 samples"),
    ("l2", {"conditions": lambda n: Condition({"y": n[0]}, {"y": torch.zeros(2)})}, "y of int: 2"),
    ("features", {"features": lambda x: x.sum()}, r"features gives \(\) for 2 samples"),
    ("frechet", {"features": lambda x: x[:, :0]}, r"features gives \(2, 0\): there is nothing"),
    ("l2", {"conditions": lambda n: torch.zeros(len(n))}, "give a Tensor, not a .*Condition"),
    ("reward", {"reward": lambda x, _n: x}, r"reward gives \(2, 2\) for 2 samples"),
    ("reward", {"reward": lambda _x, _n: {}["x"]}, "the reward fails on .*KeyError"),
    ("huber", {}, "unknown distance 'huber'"),
    ("features", {"features": lambda x: 0 * x}, "gives the same for any sample"),
    ("features", {"features": lambda x: x.long()}, "gives torch.int64, which is not of floats"),
    ("l2", {"denoiser": lambda x, _s, _c: x.mul_(0.5)}, "changes its x"),
    ("l2", {"denoiser": lambda x, _s, _c: x + 0j}, "gives torch.complex64, which is not"),
    ("l2", {"denoiser": lambda x, _s: x}, r"called .* fails on float32 \[2, 2\]: TypeError"),
    ("l2", {"denoiser": lambda x, _s, _c: x.double() @ x.T}, "the denoiser, .*RuntimeError"),
    ("l2", {"shape": 6}, "shape 6 is no sizes"),
    ("l2", {"shape": (2.0, 3)}, "is no sizes of a latent"),
    ("l2", {"levels": 5}, "levels 5 are none"),
    ("l2", {"device": "cuda:77"}, "device 'cuda:77' is not here"),
]


@pytest.mark.parametrize(("distance", "more", "says"), REFUSED)
def test_what_cannot_be_looked_at_is_one_line_before_any_work(
    distance: str, more: dict[str, Any], says: str
) -> None:
    calls = []

    def counted(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        calls.append(len(x))
        return cloud(x, sigma, cond)

    settings = replace(FEW, distance=distance, device=more.pop("device", "cpu"))
    given = {"denoiser": counted, "levels": "ve", "shape": (2,), **more}
    with pytest.raises(ValueError, match=says):
        distill(**given, settings=settings)
    assert len(calls) <= 1


@pytest.mark.parametrize(
    ("distance", "calls"),
    [
        ("l2", 20),
        ("l2", 60),
        ("l2", 100),
        ("distribution", 60),
        ("distribution", 130),
        ("reward", 130),
    ],
)
def test_a_network_that_breaks_on_the_way_crashes_nothing(distance: str, calls: int) -> None:
    """One sample is not a number after so many calls: in a fit, a Jacobian, a comparison."""
    count = []

    def picky(x: Tensor, numbers: object) -> Tensor:
        assert x.isfinite().all()
        return near_first(x, numbers)

    def breaking(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        count.append(1)
        x0 = cloud(x, sigma, cond)
        return x0.index_fill(0, torch.tensor([0]), math.nan) if len(count) > calls else x0

    settings = replace(FEW, distance=distance, samples=16, judges=8, rounds=3)
    with contextlib.suppress(ValueError):
        more = {"features": waves, "reward": picky}
        table = distill(breaking, "ve", shape=(2,), settings=settings, **more).table
        assert all(bool(t.isfinite().all()) for t in table.tensors())
    assert len(count) > calls


def of_waves(x: Tensor, scale: float = 1.0) -> Tensor:
    return waves(x.mul_(scale))


def test_features_that_work_in_place_change_nothing_else() -> None:
    settings = replace(FEW, distance="l2+features", samples=32, judges=16)
    tables = [
        distill(cloud, "ve", shape=(2,), settings=settings, features=features).table
        for features in (partial(of_waves, scale=0.5), lambda x: waves(x * 0.5))
    ]
    for one, other in zip(tables[0].tensors(), tables[1].tensors(), strict=True):
        assert torch.equal(one, other)


def test_what_looks_is_tried_on_the_teachers_samples_before_the_fit() -> None:
    calls = [0]

    def counted(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        calls[0] += 1
        return cloud(x, sigma, cond)

    def late(x: Tensor, numbers: Sequence[int]) -> Tensor:
        return x[:, 0].where(torch.tensor(numbers) != 20, math.nan)

    settings = replace(FEW, distance="features", samples=32, judges=17, batch=16)
    for features, reward, words in (
        (
            lambda x: waves(x.where(x < 1, math.nan)),
            None,
            "features, of samples 0 to 15, gives",
        ),
        (lambda x: waves(x).squeeze(), None, r"features gives \(6,\) for 1 sample"),
        (None, late, "the reward, of samples 16 to 31, gives numbers that are"),
        (None, lambda x, _n: x[:, 0] * 0, "the same for every sample"),
    ):
        own = replace(settings, distance="features" if features else "reward")
        calls[0] = 0
        with pytest.raises(ValueError, match=words):
            distill(counted, "ve", shape=(2,), settings=own, features=features, reward=reward)
        assert calls[0] <= 51 * 4  # of what is kept for later
    quiet = replace(FEW, method="gradient", distance="features", rounds=None, robust=None)
    quiet = replace(quiet, positions=Settings.positions, fine_steps=Settings.fine_steps)
    for network, features in (
        (cloud, torch.no_grad()(waves)),
        (cloud, lambda x: torch.from_numpy(waves(x).numpy())),
        (torch.no_grad()(cloud), waves),
    ):
        with pytest.raises(ValueError, match=r"has no gradient \(.*\): take --method fit"):
            distill(network, "ve", shape=(2,), settings=quiet, features=features)


def test_numpy_and_half_precision_are_features_of_a_fit_like_any() -> None:
    settings = replace(FEW, distance="l2+features", samples=32, judges=16)
    weight = torch.nn.Parameter(torch.ones(()))
    tables = [
        distill(network, "ve", shape=(2,), settings=settings, features=features).table
        for network, features in (
            (cloud, waves),
            (cloud, lambda x: torch.from_numpy((weight * waves(x)).numpy())),
            (lambda x, s, c: cloud(x, s, c).half(), lambda x: waves(x) @ torch.eye(6)),
        )
    ]
    for one, other in zip(tables[0].tensors(), tables[1].tensors(), strict=True):
        assert torch.equal(one, other)


def test_what_a_table_was_fitted_on_has_the_name_that_comparisons_use() -> None:
    space = SimpleNamespace(name="fashion-judge", network=waves)
    for function in (waves, partial(waves), partial(partial(waves)), torch.no_grad()(waves)):
        assert name_of(function) == f"{__name__}:waves"
    assert name_of(space) == "fashion-judge"
    assert name_of(torch.compile(torch.nn.Identity())).endswith(":Identity")
    network = load_space("efficientnet", torch.device("cpu")).network
    assert spaces_of([name_of(network)]) == ("efficientnet",)
    assert synonyms("operator:add") == {"operator:add", "_operator:add"}
    assert spaces_of(["my_inception.feats:f", "a/inception.v3/b.ts"])[0] == "my_inception.feats:f"
    assert spaces_of(["a/inception.v3/b.ts"]) == ("a/inception.v3/b.ts",)
    published = load_predictor(find_predictor("cifar10-5nfe")).recipe.training
    assert fitted_on(published) == ["inception"]
    assert spaces_of(["/x/nvidia-Inception.pt"]) == ("inception",)


def test_directions_are_those_of_the_same_first_samples_in_whatever_parts() -> None:
    ends = noise(1200)
    bases = []
    for size in (48, 16, 1200):
        parts = [tuple(range(i, min(i + size, 1200))) for i in range(0, 1200, size)]
        parts += [tuple(range(48))]  # of the judges, which have numbers of their own
        batches = [Trajectories(Field(cloud), ends[[*p]], (ends[[*p]],), p) for p in parts]
        bases.append(Lens(waves, None).on(batches, all_reduce_sum).bases)
    for other in bases[1:]:
        for one, two in zip(bases[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
