"""Settings: what is usual, what does not go together, and the published ones by name."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from backends.base import NoiseLevels
from solvers.field import Field
from solvers.predictor import find_predictor, load_predictor
from solvers.process import FLOW, VE
from solvers.sampler import Sampler, SolverOptions, make_solver
from tests.training.students import curved, model
from training.settings import Settings, at_once, preset, preset_names, recipe_of, resolved
from training.start import make_student, start_of
from training.table import EXACT
from training.teacher import Model, make_problem

LEVELS = NoiseLevels(VE, 0.01, 1.0)


def settings(flow: bool = False, **options: Any) -> Settings:
    return resolved(Settings(**options), flow=flow)


def test_a_preset_makes_the_recipe_of_each_published_predictor() -> None:
    names = preset_names()
    assert len(names) == 43
    assert {"cifar10-5nfe", "ffhq-9nfe-ipndm", "sd3-1024-best", "flux-start"} <= set(names)
    entries = "num_steps num_points schedule_type schedule_rho solver base max_order afs"
    entries += " scale_dir scale_time fcn teacher M guidance_rate"
    for name in names:
        predictor = load_predictor(find_predictor(name))
        published = predictor.recipe
        values = {n: v for n, v in preset(name).items() if n not in ("backend", "resolution")}
        ours = resolved(Settings(**values), flow=published.schedule_type == "flowmatch")
        for entry in entries.split():
            assert getattr(recipe_of(ours), entry) == getattr(published, entry), (name, entry)
        assert ours.nfe == predictor.nfe
        assert preset(name)["backend"] == published.backend
    for name in ("cifar10-5nf", "../../etc/passwd", "fashion-mnist-32", ""):
        with pytest.raises(ValueError, match=r"^[^\n]*did you mean[^\n]*$"):
            preset(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nfe": 0}, "nfe 0 is out of range"),
        ({"nfe": 3.9}, "nfe 3.9 is out of range"),
        ({"points": 9}, "points 9 is out of range"),
        ({"num_steps": 1}, "num_steps 1 is out of range"),
        ({"lr": 0.0}, "lr 0.0 is out of range"),
        ({"objective": "last"}, "objective last is out of range"),
        ({"teacher": "hoin"}, "teacher hoin is out of range"),
        ({"teacher": "euler", "M": 0}, "the teacher must be finer"),
        ({"solver": "epd-unipc"}, "unknown base 'unipc'"),
        ({"solver": "epd-edm"}, "unknown base 'edm'"),
        ({"solver": "epd-ipmdn"}, "did you mean 'ipndm'"),
        ({"solver": "heun"}, "unknown solver 'heun'"),
        ({"solver": "epd-heun", "nfe": 4}, "epd-heun cannot make 4 calls"),
        ({"nfe": 5, "num_steps": 4}, "nfe 5 needs num_steps 6"),
        ({"solver": "epd-ipndm-3", "max_order": 2}, "disagree"),
        ({"solver": "epd-dpmpp", "max_order": 4}, "max_order 4"),
        ({"schedule": "flowmatch"}, "not for a VE model"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'"),
        ({"schedule": "logsnr", "schedule_rho": 5.0}, "schedule_rho 5.0 does nothing on logsnr"),
        ({"method": "gradient", "learn_grid": True}, "does not reach the time grid"),
        ({"method": "gradient", "positions": 33}, "positions 33 are tried in a fit"),
        ({"tick": 0.001}, "tick 0.001 is of a gradient"),
        ({"fcn": True}, "--method gradient"),
        ({"lr": 0.1, "method": "fit"}, "lr 0.1 does nothing in --method fit"),
        ({"method": "gradient", "robust": True}, "robust True does nothing"),
        ({"method": "gradient", "distance": "lpips"}, "unknown distance 'lpips'"),
        ({"method": "gradient", "distance": "reward"}, "no gradient here: give --method fit"),
        ({"solver": "epd-multistep", "scale_dir": 0.1}, "free scales"),
        ({"init": "nowhere.pkl"}, "nowhere.pkl"),
        ({"init": "epd-k2-5nfe", "solver": "epd-ipndm"}, "solver epd-ipndm: epd-k2-5nfe has epd"),
        ({"init": "epd-k2-5nfe", "points": 1}, "points 1: epd-k2-5nfe has 2"),
        ({"init": "unipc-4", "nfe": 5}, "unipc has the orders"),
        ({"init": "heun", "nfe": 4}, "init heun makes 2 calls a step, and a table one"),
        ({"init": "unipc-2", "solver": "epd"}, "solver epd: unipc-2 has epd-multistep"),
        ({"init": "epd-k2-5nfe", "afs": False}, "afs False: epd-k2-5nfe has True"),
        ({"init": "unipc-2", "max_order": 1}, "max_order 1: unipc-2 has 2"),
        ({"schedule": "discrete", "sigma_max": 5.0}, "discrete has the model's own ends"),
        ({"teacher_substeps": 4}, "teacher_substeps 4 does nothing without M"),
        ({"alpha": 1.0}, "alpha 1.0 is for --method gradient"),
        ({"init": "epd-k2-5nfe", "positions": 9}, "positions 9 are tried in a fit"),
        ({"flow": True, "afs": True}, "no analytic first step"),
        ({"flow": True, "sigma_max": 80.0}, r"sigma_max 80.0 is out of range"),
    ],
)
def test_what_does_not_go_together_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        settings(**options)
    assert "\n" not in str(caught.value)


def test_the_usual_student_follows_what_is_counted_and_the_process() -> None:
    assert (settings(num_steps=4).solver, settings(num_steps=4).nfe) == ("epd", 5)
    assert (settings(nfe=5).solver, settings(nfe=5).num_steps) == ("epd-multistep", 6)
    assert (settings(nfe=4, solver="epd").afs, settings(nfe=5, solver="epd").afs) == (False, True)
    assert settings(solver="epd-ipndm-2").max_order == 2
    assert settings(solver="ipndm").solver == "epd-ipndm"
    one = "exps/fashion-mnist-32/epd-multistep-k1-3nfe.pkl"
    assert (settings(num_steps=4).points, settings(init=one).points) == (2, 1)
    assert settings(init=one, points=2).points == 2
    assert (settings(flow=True).afs, settings(flow=True).schedule) == (False, "flowmatch")


def test_a_batch_divides_by_ranks_and_by_what_fits() -> None:
    assert at_once(settings(samples=64, batch=32, batch_gpu=8), 2) == 8
    assert at_once(settings(samples=64, batch=32), 4) == 8
    with pytest.raises(ValueError, match="batch 32 does not divide by 3 ranks"):
        at_once(settings(samples=64, batch=32), 3)
    with pytest.raises(ValueError, match="batch_gpu 5 does not divide"):
        at_once(settings(samples=64, batch=32, batch_gpu=5), 1)


@pytest.mark.parametrize("way", ["ve", "afs", "flow"])
@pytest.mark.parametrize(
    "name", ["euler", "ipndm-4", "ipndm_v-4", "deis-4", "dpmpp-1", "dpmpp-3", "unipc-2", "unipc-3"]
)
def test_a_table_that_starts_from_a_solver_makes_its_steps(name: str, way: str) -> None:
    flow, afs = way == "flow", way == "afs"
    levels = replace(LEVELS, process=FLOW) if flow else LEVELS
    for count, points in ((5, 1), (5, 2), (9, 1)):
        options = Settings(init=name, num_steps=count + 1, points=points, afs=afs)
        s = resolved(options, flow=flow, shape=(1, 3, 3))
        student = make_student(levels, s)
        solver = make_solver(name, SolverOptions(process=levels.process))
        x = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0)).double()
        wanted = Sampler(solver, student.sigmas, levels.process, afs)
        table = student.holding(start_of(student, s))
        ends = [list(one.states(Field(curved), 0.9 * x))[-1] for one in (wanted, table)]
        exact = (count < 6 and points == 1) or name in ("euler", "dpmpp-1")
        assert (ends[0] - ends[1]).abs().max() < (1e-9 if exact else 0.1)
        assert table.calls == wanted.calls


@pytest.mark.parametrize(
    ("name", "reach"), [("cifar10-5nfe", 0.05), ("cifar10-5nfe-ipndm", 0.2), ("epd-k2-5nfe", 0)]
)
def test_a_gradient_starts_from_the_predictor_or_says_that_it_cannot(
    name: str, reach: float
) -> None:
    s, levels = settings(init=name, method="gradient"), NoiseLevels(VE, 0.002, 80.0)
    if not reach:
        with pytest.raises(ValueError, match=r"epd-k2-5nfe is out of reach .* --method fit"):
            make_student(levels, s)
        return
    assert s.scale_time == reach
    with pytest.raises(ValueError, match=rf"^{name} goes from 80 to 0.002, the network knows"):
        make_student(LEVELS, s)
    student = make_student(levels, s)
    table, _ = student.decode(student.encode(start_of(student, s), EXACT))
    given = load_predictor(find_predictor(name)).table
    for ours, theirs in zip(table.tensors(), given.tensors(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-3)


def test_a_teacher_by_m_passes_through_the_levels_of_the_student() -> None:
    """On a scheduler's own levels, which do not refine themselves, as well."""
    own = NoiseLevels(
        FLOW,
        0.001,
        1.0,
        own=lambda n, _mu: [*(1 - i * 0.9 / (n - 2) for i in range(n - 1)), 0.001],
    )
    for levels in (own, NoiseLevels(FLOW, 0.001, 1.0), replace(own, own=None, shift=3.0)):
        backend = replace(model(), levels=levels)
        s = Settings(num_steps=5, solver="epd-multistep", M=3, samples=16, learn_grid=False)
        problem = make_problem(Model(backend), s)
        stops = problem.learned.teacher.stops
        assert stops == pytest.approx(problem.student.sigmas[1:], rel=1e-5)


@pytest.mark.parametrize("more", [{"predict_x0": False}, {"lower_order_final": False}, {}])
def test_a_table_that_starts_from_a_solver_heeds_what_that_is_given(more: dict[str, Any]) -> None:
    s = settings(init="dpmpp", max_order=3, num_steps=5, points=1, **more)
    student = make_student(LEVELS, s)
    x = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    wanted = Sampler(make_solver("dpmpp", SolverOptions(3, **more)), student.sigmas)
    table = student.holding(start_of(student, s))
    ends = [list(one.states(Field(curved), 0.9 * x))[-1] for one in (wanted, table)]
    assert (ends[0] - ends[1]).abs().max() < 1e-9


def test_a_table_keeps_the_guidance_of_the_one_that_it_starts_from_unless_told() -> None:
    for given, rate in ((None, 4.0), (2.0, 2.0), (1.0, 1.0)):
        asked = Settings(init="epd-k2-10nfe", guidance_rate=given)
        assert resolved(asked, flow=True).guidance_rate == rate
    assert settings().guidance_rate == 1.0


@pytest.mark.parametrize("more", [{}, {"method": "gradient"}, {"M": 2}])
def test_a_teacher_of_another_predictor_stops_at_the_levels_of_that_one(
    more: dict[str, Any],
) -> None:
    init = "epd-multistep-k2-3nfe"
    problem = make_problem(Model(model()), Settings(init=init, **more))
    recipe = load_predictor(find_predictor(init)).recipe
    assert problem.student.sigmas == recipe.sigmas
    assert problem.learned.teacher.stops == problem.student.sigmas[1:]
