"""The loop of stage 2: roll out, score, update, now and then evaluate and save."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from solvers.predictor import Predictor
from training.ppo.config import Logging, Ppo
from training.ppo.task import Task
from training.stop import Stop


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    steps: int  # done in all
    predictor: Predictor  # the policy's mean at the end
    best: Path | None  # the export that gained most on held-out prompts, if any was evaluated
    stopped_early: bool = False


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
    raise NotImplementedError
