"""Distillation: a denoiser in, a predictor of few sequential calls out.

Shapes: B samples, N intervals, K points, P free numbers, * one latent, x [B, *].
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import index
from typing import Any, TypeAlias

import torch
from torch import Tensor

from backends.base import Backend, classifier_free
from rewards.base import looking
from solvers.epd import EPD, ParallelMultistep, Table
from solvers.field import Condition, Denoiser, Field
from solvers.predictor import Predictor, find_predictor, load_predictor, validate
from solvers.process import FLOW, Process
from solvers.recipe import fitted_on
from solvers.sampler import Sampler
from solvers.schedules import NoiseLevels
from src import ranks
from src.functions import name_of
from training.distances import OF_FEATURES, Network, distance_named
from training.fit import fit
from training.gradient import GradientLearner, checkpointed
from training.refine import JACOBIAN_NUMBERS, ROBUST, Lens, Reward, descend, gauss_newton
from training.settings import SMALL, Settings, hand_made, recipe_of
from training.start import start_of
from training.student import Trajectories, rmse
from training.table import EDGE, EXACT
from training.teacher import (
    DENOISER,
    Batches,
    Conditions,
    Model,
    Problem,
    check_ends,
    check_shape,
    make_problem,
    terms_of,
)

OWN = "denoiser"
"""The backend of recipes where the network is the caller's own."""
BY = "refine by "
"""How the name begins of a refinement by another aim than squares."""
Tick: TypeAlias = tuple[str, dict[str, float]]
"""What was done, and its figures by name."""
PARTS = (-0.9, -0.45, 0.0, 0.45, 0.9)
"""Of their reach, where a fit tries time scales."""


def distill(
    denoiser: Denoiser,
    levels: NoiseLevels | Process | str,
    *,
    shape: Sequence[int],
    conditions: Conditions | None = None,
    settings: Settings | None = None,
    features: Network | None = None,
    reward: Reward | None = None,
    report: Callable[[str, float], object] = lambda _what, _error: None,
) -> Predictor:
    """A predictor that samples `denoiser` in a few sequential calls.

    `denoiser(x [B, *shape], sigma [B], cond)` estimates the clean sample. `levels` are the noise
    levels that it knows, or "ve" (x0 + sigma eps, 0.002 to 80) or "flow" ((1 - sigma) x0 +
    sigma eps, as x - sigma v of a velocity v, 0.001 to 1). `conditions` makes what it is told as
    `cond`, and with guidance also what "nothing" is. `features` (latents [B, *], to be decoded
    first where a decoder stands behind them -> [B, F]) and `reward` (latents [B, *] and the
    samples' numbers -> [B], more is better) are for the distances that need them; others leave
    them alone. The recipe keeps what they are called, module:function, or their own `name`.

    A table is fitted greedily (Gram matrices over positions, no gradient), then refined end to
    end with its levels, and all choices are made on noises of their own. `report("refine",
    error)` hears of the way; errors are root mean squares to a Heun solution of `fine_steps`
    levels.

    Raises ValueError for settings that cannot be served, and for a network that gives NaN.
    """
    settings = settings or Settings()
    try:
        sizes, device = tuple(map(index, shape)), torch.device(settings.device)
        torch.empty(0, device=device)
    except TypeError:
        raise ValueError(f"shape {shape!r} is no sizes of a latent, as (4, 64, 64)") from None
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"device {settings.device!r} is not here: {said}") from error
    backend = Backend(
        family=OWN,
        denoise=denoiser,
        encode=lambda _prompts: None,
        decode=lambda latents: latents,
        guide=classifier_free,
        levels=named_levels(levels),
        shape=sizes,
        size=(0, 0),
        device=device,
        dtype=torch.float32,
    )
    theirs, usual = vars(backend.levels), vars(named_levels(FLOW))
    if backend.levels.process == FLOW and backend.levels.own is None:  # a schedule with own ends
        ends = [name for name in ("sigma_min", "sigma_max") if theirs[name] != usual[name]]
        given = {name: theirs[name] for name in ends if vars(settings)[name] is None}
        settings = replace(settings, **given)
    cond = conditions or (lambda _numbers: None)
    names = (name_of(features), name_of(reward))
    problem = make_problem(Model(backend, cond, features, reward, names), settings)
    state: dict[str, Any] = {}
    for what, metrics in learn(problem, state):
        report(what, metrics.get("rmse_judged", math.nan))
    return predictor_of(problem, state)


@torch.no_grad()
def sample(
    predictor: Predictor, denoiser: Denoiser, noise: Tensor, cond: Condition | None = None
) -> Tensor:
    """Samples [B, *] of a predictor from `distill`, from standard normal noise [B, *].

    Raises ValueError for a predictor without levels of its own, noise that is no floats [B, *],
    a denoiser that does not answer x [B, *] with floats [B, *], and guidance without a `null`.
    """
    recipe = predictor.recipe
    if recipe.sigmas is None:
        raise ValueError("this predictor's levels are those of its backend: use sample.py")
    levels = named_levels(recipe.process or "ve")
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or not noise.ndim:
        what = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"noise is no tensor of floats [B, *], but {what}")

    def checked(x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        with looking(DENOISER, x):
            answer = denoiser(x, sigma, cond)
        check_shape("the denoiser", answer, tuple(x.shape))
        return answer

    sampler = predictor.sampler(levels)
    for rate in sampler.extreme_rates:  # of a table that guides by itself, too
        classifier_free(checked, rate, cond)
    field = Field(classifier_free(checked, recipe.guidance_rate, cond), cond)
    *_, end = sampler.states(field, noise * recipe.sigmas[0])
    return end


def named_levels(levels: NoiseLevels | Process | str) -> NoiseLevels:
    """The noise levels of a process by its name, or as they are; ValueError for another value."""
    if isinstance(levels, NoiseLevels):
        return levels
    if not isinstance(levels, Process | str):
        raise ValueError(f"levels {levels!r} are none: give 've', 'flow' or NoiseLevels")
    process = Process(levels) if isinstance(levels, str) else levels
    return NoiseLevels(process, *((0.001, 1.0) if process == FLOW else (0.002, 80.0)))


def learn(problem: Problem, state: dict[str, Any]) -> Iterator[Tick]:
    """Yield what was done and its figures, tick by tick, until all is learned.

    `state` holds, at every yield, what `predictor_of` reads and what another call needs to go
    on from there: tensors and plain values. Raises ValueError where what the network, features
    or reward say is nothing to learn from.
    """
    by_gradient = problem.settings.method == "gradient"
    yield from (learn_by_gradient if by_gradient else learn_by_fit)(problem, state)


def learn_by_fit(problem: Problem, state: dict[str, Any]) -> Iterator[Tick]:
    """A greedy fit, then refinements, each of all numbers together, end to end.

    The state's candidates are [what was done, error on the judges, theta]; nothing is
    back-propagated.
    """
    s, student, model = problem.settings, problem.student, problem.model
    candidates, terms, ends = state.setdefault("candidates", []), terms_of(s), ends_of(problem)
    candidates[:] = [[what, *rest[-2:]] for what, *rest in candidates]  # once with a schedule
    names = {name for _, name in terms}
    squares = ["refine", "refine, robust first"][: 1 + bool(s.robust)] if s.rounds else []
    if names != {"l2"} and (s.init or math.prod(model.backend.shape) >= SMALL):
        squares = []  # whose evaluations are dear

    def movable(candidate: Any) -> Tensor:
        """Its vector; of a given table the one whose positions at an edge can leave it."""
        given = s.init and candidate is candidates[0]
        return student.encode(start_of(student, s)) if given else candidate[2]

    plan = ["fit", *squares, *([f"{BY}{s.distance}"] if names != {"l2"} else [])]
    for what in plan[len(candidates) :]:
        metrics: dict[str, float] = {"trajectories": s.samples or 0}
        if what == "fit":
            check_ends(ends, problem.judges, model, s)
            table = start_of(student, s) if s.init else greedy(problem)
            theta = student.encode(table, EXACT if s.init else EDGE)
        elif what.startswith(BY):
            lens = Lens(
                model.features if names & OF_FEATURES else None,
                model.reward if "reward" in names else None,
            )
            theta, metrics["objective"] = descend(
                student,
                movable(best_of(candidates)),
                ends,
                [*ends, *problem.judges],
                terms,
                lens,
                rounds=s.rounds or 0,
                reduce=model.reduce,
            )
        else:
            theta = refined(
                problem, movable(best_of(candidates[:1])), ROBUST if "robust" in what else ()
            )
        error = rmse(student.sampler(theta), problem.judges, model.reduce)
        candidates.append([what, error, theta])
        yield what, {**metrics, "rmse_judged": error}


def greedy(problem: Problem) -> Table:
    """The greedy fit."""
    s = problem.settings

    def scales(reach: float | None) -> tuple[float, ...]:
        """The time scales to try within a reach."""
        return tuple(1 + reach * part for part in PARTS) if reach else (1.0,)

    return fit(
        problem.student,
        problem.learned,
        positions=s.positions,
        scale_dir=s.scale_dir,
        time_scales=scales(s.scale_time),
        time_at_ends=None if s.scale_time_ends is None else scales(s.scale_time_ends),
        reduce=problem.model.reduce,
    )


def refined(problem: Problem, theta: Tensor, robust: tuple[float, ...]) -> Tensor:
    """All numbers together, end to end; judged on other noise as well."""
    s, ends = problem.settings, ends_of(problem)
    assert s.samples
    assert s.batch
    parts = len(ends) * s.batch // s.samples  # of a batch on this rank
    needed = -(-JACOBIAN_NUMBERS // (ends[0].x.numel() * ranks.world_size()))  # batches a round
    return gauss_newton(
        problem.student,
        theta,
        ends,
        judges=[*ends, *problem.judges],
        rounds=s.rounds or 0,
        robust=robust,
        per_round=-(-needed // parts) * parts,
        reduce=problem.model.reduce,
    )


def ends_of(problem: Problem) -> Batches:
    """The batches to learn from with targets at the student's end alone."""
    return replace(problem.learned, levels=problem.learned.teacher.stops[-1:])


def best_of(candidates: Sequence[Any]) -> Any:
    """The candidate with the least error, or one by another aim, which began from that.

    Raises ValueError where none has an error that is a number.
    """
    best = min(candidates, key=lambda each: each[1])
    if best[1] == math.inf:
        raise ValueError("no table was learned: the network gives numbers that are not finite")
    return candidates[-1] if candidates[-1][0].startswith(BY) else best


def learn_by_gradient(problem: Problem, state: dict[str, Any]) -> Iterator[Tick]:
    """Adam, a tick of so many trajectories at a time; the state is the learner's."""
    s, model = problem.settings, problem.model
    assert s.samples
    assert s.batch
    distance, last = (
        distance_named(name, model.features, alpha=s.alpha, as_published=s.published_loss)
        for name in (s.distance or "l2", s.last_distance or "l2")
    )
    student = replace(problem.student, grid=False)
    theta, reduce = student.encode(start_of(student, s)), model.reduce
    how = (s.lr or 0.2, bool(s.coslr), s.objective or "per-step", distance, last, reduce)
    learner = GradientLearner(student, s.samples, theta, *how)
    if "learner" in state:
        learner.load(state["learner"])
    batches = ends_of(problem) if s.objective == "final" else problem.learned
    count = len(batches) * s.batch // s.samples
    size = max(1, round(s.tick * 1000 / s.batch)) * s.batch
    while learner.seen < s.samples:
        losses, until = [], min((learner.seen // size + 1) * size, s.samples)
        while learner.seen < until:
            first = learner.seen // s.batch * count
            parts: list[Trajectories] = batches[first : first + count]
            parts = [checkpointed(part) for part in parts] if s.checkpointing else parts
            losses.append(learner.learn(parts, s.batch))
        learner.judge(problem.judges)
        state["learner"] = learner.state()
        good = [loss for loss in losses if math.isfinite(loss)]
        metrics = {"loss": sum(good) / len(good)} if good else {}
        metrics |= {"trajectories": learner.seen, "skipped": learner.skipped, "lr": learner.lr}
        metrics["rmse_judged"] = learner.error
        yield "gradient", metrics


def best_sampler(problem: Problem, state: Mapping[str, Any]) -> Sampler:
    """The best of what was learned so far; ValueError where its error is no number."""
    if "learner" in state:
        return replace(problem.student, grid=False).sampler(state["learner"]["best"])
    return problem.student.sampler(best_of(state["candidates"])[2])


def predictor_of(problem: Problem, state: Mapping[str, Any]) -> Predictor:
    """The predictor of the best so far.

    Its levels stand in its recipe unless they are a schedule by name on the model's own levels,
    and that model is one of a backend. Raises ValueError where its error is no number.
    """
    s, backend, recipe = problem.settings, problem.model.backend, recipe_of(problem.settings)
    sampler, training = best_sampler(problem, state), {**recipe.training, **problem.model.training}
    if "candidates" in state:
        training |= {"rmse": best_of(state["candidates"])[1]}
    names, (features, reward) = {name for _, name in terms_of(s)}, problem.model.fitted_on
    used = ((features, names & OF_FEATURES), (reward, "reward" in names))
    used_on = [name for name, is_used in used if is_used]
    if s.init and not hand_made(s.init):
        start = load_predictor(find_predictor(s.init)).recipe.training
        used_on += fitted_on(start)
    if used_on:
        training["fitted_on"] = list(dict.fromkeys(used_on))
    levels, flow = backend.levels, backend.levels.process == FLOW
    recipe = replace(
        recipe, process=sampler.process.name, training=training, backend=backend.family
    )
    if backend.family != OWN:
        recipe = replace(
            recipe,
            backend_config=dict(backend.config),
            img_resolution=round(math.sqrt(math.prod(backend.size))),
            sigma_min=levels.sigma_min if s.sigma_min is None else s.sigma_min,
            sigma_max=levels.sigma_max if s.sigma_max is None else s.sigma_max,
            flowmatch_shift=levels.shift if flow else None,
            flowmatch_mu=levels.mu if flow else None,
            source="train_distill.py",
        )
    own = backend.family == OWN or levels.own is not None  # which no name tells of
    own |= flow and (s.sigma_min, s.sigma_max) != (None, None)
    if s.init or own or sampler.sigmas != problem.student.sigmas:
        recipe = replace(recipe, schedule_type="custom", sigmas=sampler.sigmas)
    assert isinstance(sampler.solver, EPD | ParallelMultistep)
    tensors = (t.detach().double().cpu() for t in sampler.solver.table.tensors())
    return validate(Predictor(type(sampler.solver.table)(*tensors), recipe))
