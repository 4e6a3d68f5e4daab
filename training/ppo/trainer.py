"""Stage 2, from top to bottom: draw, roll out, score, update; now and then evaluate and save.

A run's folder, of which only the first rank writes: configs/, logs/ (metrics.jsonl, log.txt,
TensorBoard's events), checkpoints/ (the last few, and best.pt), samples/ (pictures of the same
prompts and noises at every save), and export/ (a predictor of every save, and the best).
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solvers.predictor import Predictor, named_tensors, save_predictor, to_content, validate
from solvers.recipe import fitted_on
from src import ranks
from src.files import copy_whole
from src.images import grid, save_png
from src.runs import Run, Stop, Stopped, read_sealed, write_sealed
from src.stats import Estimate
from src.text import digest
from training.plots import draw_gains
from training.ppo.config import Logging, Ppo
from training.ppo.learners import METHODS, Learner
from training.ppo.objectives import advantages
from training.ppo.policy import Start, start_of
from training.ppo.rollout import (
    Task,
    by_prompt,
    compared,
    features_of,
    fine_sampler,
    fixed_jobs,
    held_out_scores,
    images_of,
    measured_unit,
    pull_to_fine,
    score_jobs,
    step_jobs,
)

SETTINGS = "configs/resolved_config.yaml"
SHOWN = 8
"""Pictures in samples/ at each save."""
FORMAT = 2
MAY_CHANGE = ("steps", "eval_interval", "early_stop", "nonfinite_budget")
"""The settings that a run may change when it goes on."""
OF_SOLVER = ("solver", "base", "max_order", "afs", "predict_x0", "lower_order_final", "process")
"""What a table is stepped by, as its recipe says."""
BEST = "best"
BEST_STEP = "eval/best_step"
"""A number that every line of an evaluation has, and no other line."""
PULL = "pull"


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    steps: int  # done in all
    predictor: Predictor  # the policy's mean at the end
    best: Path | None  # the export that gained most on held-out prompts, if any was evaluated
    stopped_early: bool = False


@dataclass
class Progress:
    """Where a run stands, apart from what it has learned."""

    step: int = 0  # updates done; the position of the stream of prompts follows from it
    evaluated: int = -1  # the step that was evaluated last
    best_step: int = 0
    best_gain: float = 0.0  # on held-out prompts, over the starting table
    without_best: int = 0  # evaluations since
    nonfinite: int = 0  # images left out so far
    start_scores: dict[str, list[float]] = field(default_factory=dict)  # of the held-out images


@dataclass(frozen=True)
class Session:
    """A run at work: what every part of it leans on."""

    task: Task
    ppo: Ppo
    logging: Logging
    start: Start
    learner: Learner
    progress: Progress
    run: Run
    stop: Stop
    board: Any = None  # TensorBoard's writer, where it is installed and wanted
    fine: list[Tensor] = field(default_factory=list)  # features of the fine solution, once made

    def write(self, numbers: Mapping[str, float | None]) -> None:
        """A line of metrics.jsonl, and the same for TensorBoard."""
        finite = {n: v for n, v in numbers.items() if v is not None and math.isfinite(v)}
        self.run.measure(self.progress.step, finite)
        if self.board is not None:
            for name, value in finite.items():
                self.board.add_scalar(name, value, self.progress.step)

    def predictor(self, *, given: bool = False) -> Predictor:
        """The mean of what is learned, or the table that was given, as a predictor.

        Raises ValueError where it is no valid one.
        """
        sampler: Any = self.start.sampler
        sampler = sampler if given else self.start.sampler_of(self.learner.mean())
        step = 0 if given else self.progress.step
        about = {"step": step, "reward": self.task.reward, "seed": self.task.seed}
        recipe = self.task.recipe
        ppo = self.ppo
        used = [self.task.reward, *([ppo.features] * bool(ppo.pull_coef)), ppo.watch or ""]
        names = [n for n in dict.fromkeys([*fitted_on(recipe.training), *used]) if n]
        training = recipe.training | {"ppo": about, "fitted_on": names}
        recipe = replace(recipe, training=training)
        if sampler.sigmas != self.start.sampler.sigmas:
            recipe = replace(recipe, schedule_type="custom", sigmas=sampler.sigmas)
        return validate(Predictor(sampler.solver.table, recipe))

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "format": FORMAT,
            "step": self.progress.step,
            "progress": dataclasses.asdict(self.progress),
            "learner": self.learner.state(),
            "start": {"unit": self.start.unit, "numbers": numbers_of(self.start)},
            "predictor": to_content(self.predictor()),
            "about": about(self.task, self.ppo),
        }


# --- the loop -----------------------------------------------------------------------------


def train(
    task: Task,
    ppo: Ppo,
    logging: Logging,
    folder: Path,
    *,
    resume: Path | None = None,
    until: int | None = None,
    settings: Any = None,
    stop: Stop | None = None,
    say: Callable[[str], object] = lambda _text: None,
) -> Outcome:
    """Train the table of `task` for `ppo.steps` steps in all, in `folder`, on all ranks.

    Every rank calls this with the same arguments, after `src.ranks.init`. `resume` is a
    checkpoint, or a run's folder, whose newest whole checkpoint is taken; the run that goes on is
    bit for bit the one that was never stopped. `until` is a step at which this call ends early.
    `settings`, a dataclass, is written into the folder once they are found to be those of the run.
    `stop` is asked on the way: on a signal a checkpoint is written and Stopped raised, on all
    ranks; what fails while images are made and scored goes on after a checkpoint too. `say` hears
    lines for people.

    Raises ValueError, in one line, for a table or settings that cannot be trained, a checkpoint
    of another task, and more rewards that are no numbers than `ppo.nonfinite_budget`.
    """
    run = Run(folder, say, ranks.is_first(), SETTINGS, "logs", "checkpoints", logging.keep_last)
    try:
        session = begin(task, ppo, logging, run, resume, stop or Stop())
    except Stopped:
        run.log("stopped before there was anything to go on from: start anew")
        raise
    progress, board = session.progress, session.board
    end = min(until or ppo.steps, ppo.steps)
    if settings is not None:
        run.write_settings(settings)
    try:
        with ranks.progress(end, "step", "ppo") as bar:
            bar.update(progress.step)
            while True:
                with kept(session):
                    evaluate(session)
                    early = 0 < ppo.early_stop <= progress.without_best
                    last = early or progress.step >= end
                    if last or progress.step % logging.save_interval == 0:
                        save(session)
                if last:
                    break
                bar.set_postfix(reward=iterate(session), refresh=False)
                bar.update()
    finally:
        if board is not None:
            board.close()
    if early:
        run.log(f"stopped early: no new best in {ppo.early_stop} evaluations")
    best = export_path(run.folder, BEST)
    return Outcome(progress.step, session.predictor(), best if best.exists() else None, early)


@contextmanager
def kept(session: Session) -> Iterator[None]:
    """Write a checkpoint before what ends the run within goes on; nothing is learned within."""
    try:
        yield
    except Exception as error:
        step, run = session.progress.step, session.run
        run.save(step, session.content())
        ended = "stopped" if isinstance(error, Stopped) else "failed"
        run.log(f"{ended} at step {step} of {session.ppo.steps}: go on with --resume")
        raise


def iterate(session: Session) -> float | None:
    """One iteration: draw tables, roll out, score, take advantages, update -> the mean reward.

    Raises Stopped before anything has changed, and ValueError for more images without a reward
    than the budget.
    """
    task, ppo, learner, progress = session.task, session.ppo, session.learner, session.progress
    began, step, count, k = time.perf_counter(), progress.step, ppo.rollout_batch_size, ppo.rloo_k
    grouping, mixed = ppo.grouping, ppo.grouping == "mixed"
    jobs, streams = step_jobs(task.prompts, task.seed, step, count=count, k=k, grouping=grouping)
    draws = learner.draw(step, streams)
    scorings = {task.reward: by_prompt(task.score)}
    if ppo.pull_coef:
        scorings[PULL] = pull_to_fine(task)
    with kept(session):
        scored = score_jobs(task, session.start.sampler_of(draws), jobs, scorings, session.stop)
        none = torch.full((count,), math.nan, dtype=torch.float64)
        rewards = scored.scores.get(task.reward, none)
        rewards = rewards - (ppo.pull_coef * scored.scores.get(PULL, none) if ppo.pull_coef else 0)
        nonfinite = progress.nonfinite + int((~rewards.isfinite()).sum())
        if nonfinite > ppo.nonfinite_budget:  # which may be raised to go on
            said = f"{nonfinite} images had no finite reward, and ppo.nonfinite_budget is"
            raise ValueError(f"{said} {ppo.nonfinite_budget}: {scored.reason(*scorings)}")
    progress.nonfinite = nonfinite
    updating = time.perf_counter()
    gains = advantages(rewards, k, "mixed" if mixed else ppo.baseline)
    measured = learner.update(step, draws, rewards, gains)
    ended = time.perf_counter()
    progress.step += 1
    numbers: dict[str, float | None] = {"reward": None, "reward_std": None}
    for name, scores in scored.scores.items():
        numbers |= spread(f"reward/{name}", scores)
        numbers |= spread("reward", scores) if name == task.reward else {}
    numbers["advantage"] = spread("advantage", gains.abs())["advantage"]
    numbers |= measured
    numbers["nonfinite"] = float(progress.nonfinite)
    numbers["images_per_second"] = count / (ended - began)
    numbers |= {f"seconds/{part}": spent for part, spent in scored.seconds.items()}
    numbers |= {"seconds/update": ended - updating, "seconds/step": ended - began}
    if progress.step % session.logging.log_interval == 0:
        session.write(numbers)
    return numbers["reward"]


def spread(name: str, values: Tensor) -> dict[str, float | None]:
    """Mean and standard deviation of the finite ones, None without any."""
    finite = values[values.isfinite()]
    if not len(finite):
        return {name: None, f"{name}_std": None}
    return {name: finite.mean().item(), f"{name}_std": finite.std(correction=0).item()}


# --- evaluating and saving ----------------------------------------------------------------


def evaluate(session: Session) -> None:
    """The mean against the start, where it is due and not done; the best is kept.

    The first best is the predictor that was given, whose gain is 0. Step 0 is that itself, unless
    laws of actions cannot begin at it. Raises ValueError where no image has the reward.
    """
    task, ppo, progress, stop = session.task, session.ppo, session.progress, session.stop
    due = ppo.eval_interval and progress.step % ppo.eval_interval == 0
    if not due or progress.evaluated == progress.step:
        return
    jobs = fixed_jobs(task.held_out, task.seed, ppo.eval_prompts * ppo.eval_seeds)
    if ppo.eval_seeds > 1 and not session.fine:
        session.fine.append(features_of(task, fine_sampler(task.sampler), jobs, stop))
    fine = session.fine[0] if session.fine else None
    now: dict[str, Tensor] = {}
    lacking: dict[str, str] = {}
    has_moved = bool(progress.step) or session.start.is_moved
    if has_moved:
        sampler = session.start.sampler_of(session.learner.mean())
        now, lacking = held_out_scores(task, sampler, jobs, stop, fine, ppo.watch)
    of_start = progress.start_scores
    if not now or now.keys() - lacking.keys() - of_start.keys():  # at first, or a judge was added
        scores, why = held_out_scores(task, session.start.sampler, jobs, stop, fine, ppo.watch)
        new = scores.keys() - why.keys() - of_start.keys()
        of_start |= {name: values.tolist() for name, values in scores.items() if name in new}
        lacking = why | lacking
    start = {n: torch.tensor(v, dtype=torch.float64) for n, v in of_start.items()}
    numbers = compared(start, now or start, jobs)
    watched = ppo.watch or task.reward
    gain = numbers.get(f"eval/{watched}_gain", -math.inf)
    is_first, gained = progress.evaluated < 0, gain > progress.best_gain
    progress.evaluated = progress.step
    progress.without_best = 0 if is_first or gained else progress.without_best + 1
    if gained:
        progress.best_step, progress.best_gain = progress.step, gain
    if session.run.writes and (is_first or gained):
        folder, best = session.run.folder, session.predictor(given=has_moved and not gained)
        content = session.content() | {"predictor": to_content(best)}
        write_sealed(folder / "checkpoints" / f"{BEST}.pt", content)
        save_predictor(best, export_path(folder, BEST))
    session.write(numbers | {BEST_STEP: float(progress.best_step)})
    for name, why in lacking.items():
        said = f"step {progress.step}: {name} has no score of any held-out image"
        session.run.log(f"{said}: {why}")
    if has_moved and gain > -math.inf:
        ends = (numbers[f"eval/{watched}_gain_{end}"] for end in ("low", "high"))
        said = f"step {progress.step}: {watched} gained {Estimate(gain, *ends)} over the start"
        session.run.log(f"{said}, on {len(jobs)} held out")


def save(session: Session) -> None:
    """Write the export, pictures and, last of all, the checkpoint."""
    task, run, step = session.task, session.run, session.progress.step
    if ranks.rank():
        return
    sampler = session.start.sampler_of(session.learner.mean())
    images = images_of(task, sampler, fixed_jobs(task.held_out, task.seed, SHOWN))
    if not run.writes:  # one that shares the rows of the images
        return
    save_predictor(session.predictor(), export_path(run.folder, step))
    shown = grid(images.float().cpu().nan_to_num(0.0), gap=2)
    save_png(run.folder / "samples" / f"step{step:06d}.png", shown)
    draw_gains(run.metrics.read(), run.folder / "learning.png")
    run.save(step, session.content())


def export_path(folder: Path, step: int | str) -> Path:
    """Where the predictor of a step lies, or the best one; its folder is made."""
    name = f"step{step:06d}" if isinstance(step, int) else step
    (folder / "export").mkdir(parents=True, exist_ok=True)
    return folder / "export" / f"network-snapshot-export-{name}.pkl"


def open_board(run: Run, step: int) -> Any:
    """TensorBoard's writer; None, and a line in the log, where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (slow, and optional)
    except ImportError:
        run.log("no TensorBoard here (pip install tensorboard): metrics.jsonl has its numbers")
        return None
    return SummaryWriter(str(run.folder / run.logs), purge_step=step + 1 if step else None)


# --- beginning and going on ---------------------------------------------------------------


def begin(
    task: Task, ppo: Ppo, logging: Logging, run: Run, resume: Path | None, stop: Stop
) -> Session:
    """A run before its first step, or where its checkpoint left it.

    Raises ValueError, with the checkpoint's name, where it is of other settings or another table.
    """
    start, progress = start_of(task.sampler, ppo, run.log, task.backend.least_rate), Progress()
    if resume is None:
        unit = measured_unit(task, start, ppo.effect, stop, run.log)
        start = replace(start, unit=unit)
        learner = METHODS[ppo.method](start, ppo, task.seed)
    else:
        path, content = read_checkpoint(resume, run.log)
        check_content(content, about(task, ppo), numbers_of(start), str(path))
        try:
            start = replace(start, unit=content["start"]["unit"])
            progress = Progress(**content["progress"])
            learner = METHODS[ppo.method](start, ppo, task.seed)
            learner.load(content["learner"])
        except (KeyError, TypeError, RuntimeError) as error:
            said = f"{type(error).__name__} {error}".splitlines()[0]
            raise ValueError(f"{path} is no checkpoint of this policy: {said}") from error
        run.log(f"going on from {path} at step {progress.step}")
    run.rewind(progress.step, BEST_STEP if progress.evaluated != progress.step else "")
    board = open_board(run, progress.step) if run.writes and logging.tensorboard else None
    session = Session(task, ppo, logging, start, learner, progress, run, stop, board)
    if run.writes and resume is not None:
        drop_later_best(session)
    return session


def drop_later_best(session: Session) -> None:
    """Delete the best of a step that the run, now shorter, will not come to again.

    The best before it takes its place, where its export is there; while nothing gained that is
    the predictor given. A damaged one is left alone.
    """
    run, progress, steps = session.run, session.progress, session.ppo.steps
    sealed, best = run.folder / "checkpoints" / f"{BEST}.pt", export_path(run.folder, BEST)
    there = 0
    with suppress(ValueError):
        there = int(read_sealed(sealed)["step"]) if sealed.exists() else 0
    if there <= max(steps, progress.step):
        return
    for path in (sealed, best):
        path.unlink(missing_ok=True)
    before = export_path(run.folder, progress.best_step)
    is_there = not progress.best_gain or before.exists()
    if not progress.best_gain:
        save_predictor(session.predictor(given=True), best)
    elif is_there:
        copy_whole(before, best)
    now = f"that of step {progress.best_step} is" if is_there else "there is none"
    run.log(f"the best was of step {there}, which this run does not come to: {now} in its place")


def numbers_of(start: Start) -> dict[str, Tensor]:
    """The numbers that a run starts from, by name."""
    sigmas = torch.tensor(start.sampler.sigmas, dtype=torch.float64)
    return named_tensors(start.table) | {"sigmas": sigmas}


def read_checkpoint(path: Path, say: Callable[[str], object]) -> tuple[Path, dict[str, Any]]:
    """A checkpoint, or the newest whole one of a run's folder; `say` hears of damaged ones.

    Raises ValueError where there is none, or it is of an earlier version.
    """
    if path.is_file() or path.suffix == ".pt":
        content = read_sealed(path)
    else:
        inner = "checkpoints" if (path / "checkpoints").is_dir() else "."
        path, content = Run(path, say, checkpoints=inner).newest(say)
    if content.get("format") != FORMAT:
        said = f"{path} is no checkpoint of this version of stage 2"
        raise ValueError(f"{said}: start anew from a predictor, such as those in its export/")
    return path, content


def check_content(
    content: Mapping[str, Any], now: Mapping[str, Any], table: Mapping[str, Tensor], name: str
) -> None:
    """ValueError where a checkpoint's run began with another table, or has other settings."""
    for key, value in now.items():
        was = content["about"].get(key, value)
        if was != value:
            said = f"{name} was made with {key} {was}, not {value}: set it back, or start anew"
            raise ValueError(said)
    first = content["start"]["numbers"]
    for key, tensor in table.items():
        if key not in first or not torch.equal(tensor, first[key]):
            said = f"{name} began with another table ({key} differs): give its own predictor"
            raise ValueError(said)


def about(task: Task, ppo: Ppo) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    settings = dataclasses.asdict(ppo)
    return {
        "reward": task.reward,
        "seed": task.seed,
        "prompts": digest([str(p) for p in task.prompts]),
        "held_out": digest([str(p) for p in task.held_out]),
        **task.about,
        **{f"the predictor's {name}": getattr(task.recipe, name) for name in OF_SOLVER},
        **{f"ppo.{name}": v for name, v in settings.items() if name not in MAY_CHANGE},
    }
