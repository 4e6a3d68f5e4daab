"""The loop of stage 2: roll out, score, update, now and then evaluate and save."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from solvers.predictor import Predictor
from src import ranks
from src.seeds import generator
from training.ppo.evaluate import Evaluation, as_tensors, held_out_scores
from training.ppo.files import BEST, Files, export_path, open_files, read_checkpoint
from training.ppo.objectives import Taken, advantages, groups, rloo
from training.ppo.policy import stacked, start_of
from training.ppo.prompts import fixed_jobs, shots
from training.ppo.rollout import Clock, Scored, batches, score_jobs
from training.ppo.sections import Logging, Ppo
from training.ppo.state import State, begin, exported, take_up
from training.ppo.task import Task
from training.ppo.update import update
from training.stop import Stop, Stopped

SHOWN = 8
"""Pictures in samples/ at each save."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    steps: int  # done in all
    predictor: Predictor  # the policy's mean at the end
    best: Path | None  # the export that gained most on held-out prompts, if any was evaluated
    stopped_early: bool = False


@dataclass(frozen=True)
class Session:
    """What every part of a run leans on."""

    task: Task
    ppo: Ppo
    logging: Logging
    state: State
    files: Files
    stop: Stop


def train(
    task: Task,
    ppo: Ppo,
    logging: Logging,
    folder: Path,
    *,
    resume: Path | None = None,
    stop: Stop | None = None,
    say: Callable[[str], object] = lambda _text: None,
) -> Outcome:
    """Train the table of `task` for `ppo.steps` steps in all, in `folder`, on all ranks.

    Every rank calls this with the same arguments, after `src.ranks.init`; the first one writes:
    logs/metrics.jsonl, TensorBoard's events and log.txt in logs/, checkpoints/, samples/ and
    export/network-snapshot-export-step%06d.pkl. `resume` is a checkpoint, or a run's folder,
    whose newest whole checkpoint is taken; the run that goes on is bit for bit the one that was
    never stopped. `stop` is asked on the way: on a signal a checkpoint is written and Stopped
    raised, on all ranks. `say` hears lines for people.

    Raises ValueError, in one line, for a table or settings that cannot be trained, a checkpoint
    of another task, and more rewards that are no numbers than `ppo.nonfinite_budget`.
    """
    heard: list[str] = []
    start = start_of(task.method.table, heard.append)
    state = begin(task, ppo, start)
    from_file = None
    if resume is not None:
        from_file, content = read_checkpoint(resume, heard.append)
        take_up(state, content, task, ppo, str(from_file))
    step = state.progress.step
    board = logging.tensorboard
    files = open_files(folder, say, step, writes=ranks.is_first(), board=board)
    for text in heard:
        files.log.log(text)
    if from_file is not None:
        files.log.log(f"going on from {from_file} at step {step}")
    session = Session(task, ppo, logging, state, files, stop or Stop())
    try:
        return run(session)
    except Stopped:
        files.keep(state.content(task, ppo), logging.keep_last)
        files.log.log(f"stopped at step {state.progress.step} of {ppo.steps}: go on with --resume")
        raise
    finally:
        files.close()


def run(session: Session) -> Outcome:
    """Do what is left of a run."""
    ppo, progress = session.ppo, session.state.progress
    bar = tqdm(
        total=ppo.steps,
        initial=progress.step,
        desc="ppo",
        unit="step",
        disable=None if ranks.is_first() else True,
    )
    with bar:
        while True:
            evaluate(session)
            early = 0 < ppo.early_stop <= progress.without_best
            last = early or progress.step >= ppo.steps
            save(session, last=last)
            if last:
                break
            bar.set_postfix(reward=advance(session))
            bar.update()
    if early:
        session.files.log.log(f"stopped early: no new best in {ppo.early_stop} evaluations")
    content = session.state.content(session.task, ppo)
    best = export_path(session.files.folder, BEST) if progress.evaluated >= 0 else None
    return Outcome(progress.step, exported(content, "this run"), best, early)


def advance(session: Session) -> float | None:
    """One step: roll out, score, update -> the mean reward.

    Raises Stopped before anything has changed.
    """
    task, ppo, state = session.task, session.ppo, session.state
    step, began = state.progress.step, time.perf_counter()
    k, count = ppo.rloo_k, ppo.rollout_batch_size
    plan = shots(task.prompts, task.seed, step, count=count, k=k, grouping=ppo.grouping)
    with torch.no_grad():
        now = state.policy()
        draws = stacked([now.draw(generator(task.seed, shot.stream)) for shot in plan])
        log_prob = now.log_prob(draws)
        method = replace(task.method, table=state.policy.table(draws))
    scored = score_jobs(task, method, [s.job for s in plan], [task.score], session.stop)
    rewards = scored.scores.get(task.reward, torch.full((count,), math.nan))
    check_budget(session, rewards, scored)
    updating = time.perf_counter()
    gained = advantages(rewards, k, ppo.grouping)
    valid = gained.isfinite().nonzero()[:, 0]
    taken = Taken(draws, log_prob, gained).rows(valid)
    measured = update(state, taken, ppo, task.seed)
    ended = time.perf_counter()
    state.progress.step += 1
    raw = rloo(rewards[groups(count, k, ppo.grouping)])
    told = {
        **spreads(scored, task.reward),
        "advantage": mean(raw.abs()),
        **measured,
        "nonfinite": float(state.progress.nonfinite),
        "images_per_second": count / (ended - began),
        **{f"seconds/{part}": spent for part, spent in scored.seconds.items()},
        "seconds/update": ended - updating,
        "seconds/step": ended - began,
    }
    if state.progress.step % session.logging.log_interval == 0:
        known = {name: v for name, v in told.items() if v is not None and math.isfinite(v)}
        session.files.tell(state.progress.step, known)
    return told["reward"]


def check_budget(session: Session, rewards: Tensor, scored: Scored) -> None:
    """Count the images without a reward; ValueError where they are more than the budget."""
    progress, budget = session.state.progress, session.ppo.nonfinite_budget
    progress.nonfinite += int((~rewards.isfinite()).sum())
    if progress.nonfinite > budget:
        why = scored.reasons[0] if scored.reasons else f"no score is called {session.task.reward}"
        raise ValueError(
            f"{progress.nonfinite} images had no finite reward, and ppo.nonfinite_budget is "
            f"{budget}: {why}"
        )


def spreads(scored: Scored, reward: str) -> dict[str, float | None]:
    """Mean and standard deviation of the reward, and of each one that was scored."""
    told: dict[str, float | None] = {"reward": None, "reward_std": None}
    for name, scores in scored.scores.items():
        told |= {f"reward/{name}": mean(scores), f"reward/{name}_std": deviation(scores)}
    told["reward"], told["reward_std"] = (told.get(f"reward/{reward}{e}") for e in ("", "_std"))
    return told


def mean(values: Tensor) -> float | None:
    """The mean of the finite ones, None without any."""
    known = values[values.isfinite()]
    return known.mean().item() if len(known) else None


def deviation(values: Tensor) -> float | None:
    """Their standard deviation, None without any."""
    known = values[values.isfinite()]
    return known.std(correction=0).item() if len(known) else None


def evaluate(session: Session) -> None:
    """The policy's mean against the start, where it is due and not done; the best is kept.

    Step 0 is the start itself, the first best.
    """
    task, ppo, state = session.task, session.ppo, session.state
    progress = state.progress
    due = ppo.eval_interval and progress.step % ppo.eval_interval == 0
    if not due or progress.evaluated == progress.step:
        return
    if not progress.start_scores:
        scores = held_out_scores(task, task.method.table, ppo.eval_prompts, session.stop)
        progress.start_scores = {name: values.tolist() for name, values in scores.items()}
    start = as_tensors(progress.start_scores)
    now = start
    if progress.step:
        table = state.policy.mean_table()
        now = held_out_scores(task, table, ppo.eval_prompts, session.stop)
    found = Evaluation(start, now)
    gain = found.gain(task.reward)
    value = gain.value if gain else -math.inf
    is_best = not progress.step or value > progress.best_gain
    progress.evaluated = progress.step
    progress.without_best = 0 if is_best else progress.without_best + 1
    if is_best:
        progress.best_step, progress.best_gain = progress.step, max(value, 0.0)
        session.files.keep_best(state.content(task, ppo))
    told = found.told() | {"eval/best_step": float(progress.best_step)}
    session.files.tell(progress.step, told)
    if gain and progress.step:
        session.files.log.log(
            f"step {progress.step}: {task.reward} {gain.value:+.5g} "
            f"[{gain.low:+.5g}, {gain.high:+.5g}] over the start, on {ppo.eval_prompts} held out"
        )


def save(session: Session, *, last: bool) -> None:
    """Export, pictures and, last of all, the checkpoint, where they are due."""
    task, state, logging = session.task, session.state, session.logging
    step = state.progress.step
    if step % logging.save_interval and not last:
        return
    content = state.content(task, session.ppo)
    session.files.export(content, step)
    if ranks.is_first():
        jobs = fixed_jobs(task.held_out, task.seed, SHOWN)
        method = replace(task.method, table=state.policy.mean_table())
        clock = Clock(task.backend.device)
        shown = [batch.images.cpu() for batch in batches(task, method, jobs, clock, lambda: None)]
        session.files.show(torch.cat(shown), step)
    session.files.keep(content, logging.keep_last)
