"""All that changes in a run, as plain values and tensors, and the predictor that it stands for."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from solvers.predictor import Predictor, recipe_from_plain, recipe_to_plain, validate
from src.text import digest
from training.ppo.policy import Policy, PolicyOptions, Start
from training.ppo.sections import Ppo
from training.ppo.task import Task

FREE = ("steps", "eval_interval", "early_stop", "nonfinite_budget")
"""The settings that a run may change when it goes on."""


@dataclass
class Progress:
    """Where a run stands, apart from its networks."""

    step: int = 0  # updates done; the position of the stream of prompts follows from it
    evaluated: int = -1  # the step that was evaluated last
    best_step: int = 0
    best_gain: float = 0.0  # on held-out prompts, over the starting table
    without_best: int = 0  # evaluations since
    nonfinite: int = 0  # images left out so far
    start_scores: dict[str, list[float]] = field(default_factory=dict)  # of the held-out images


@dataclass
class State:
    """A run at one moment."""

    policy: Policy
    optimiser: torch.optim.Optimizer
    progress: Progress

    def content(self, task: Task, ppo: Ppo) -> dict[str, Any]:
        """What a checkpoint holds."""
        start = self.policy.start
        return {
            "step": self.progress.step,
            "progress": dataclasses.asdict(self.progress),
            "policy": self.policy.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "start": {f.name: getattr(start, f.name) for f in dataclasses.fields(start)},
            "options": dataclasses.asdict(self.policy.options),
            "recipe": recipe_to_plain(task.recipe),
            "about": about(task, ppo),
        }


def about(task: Task, ppo: Ppo) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    settings = dataclasses.asdict(ppo)
    return {
        "reward": task.reward,
        "seed": task.seed,
        "prompts": digest([str(p) for p in task.prompts]),
        "held_out": digest([str(p) for p in task.held_out]),
        **{f"ppo.{name}": v for name, v in settings.items() if name not in FREE},
    }


def begin(task: Task, ppo: Ppo, start: Start) -> State:
    """A run before its first step."""
    options = PolicyOptions(
        concentration=ppo.dirichlet_concentration,
        dir_scale=ppo.train_scale_dir,
        time_scale=ppo.train_scale_time,
        scale_std=ppo.scale_std,
    )
    policy = Policy(start, options, task.seed)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=ppo.learning_rate)
    return State(policy, optimiser, Progress())


def take_up(state: State, content: Mapping[str, Any], task: Task, ppo: Ppo, name: str) -> None:
    """Go on from a checkpoint's content.

    Raises ValueError, with the `name` of the file, where it is of other settings or another table.
    """
    try:
        check_about(content["about"], about(task, ppo), name)
        check_start(content["start"], state.policy.start, name)
        state.policy.load_state_dict(content["policy"])
        state.optimiser.load_state_dict(content["optimiser"])
        state.progress = Progress(**content["progress"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name} is no checkpoint of this policy: {first(error)}") from error


def check_about(was: Mapping[str, Any], now: Mapping[str, Any], name: str) -> None:
    """ValueError where a checkpoint was made under other settings."""
    for key, value in now.items():
        if was.get(key, value) != value:
            raise ValueError(
                f"{name} was made with {key} {was[key]}, not {value}: set it back, or start anew"
            )


def check_start(was: Mapping[str, Any], start: Start, name: str) -> None:
    """ValueError where a checkpoint's run began with another table."""
    for key, tensor in was.items():
        if not torch.equal(tensor, getattr(start, key)):
            raise ValueError(
                f"{name} began with another table ({key} differs): give its own predictor"
            )


def first(error: Exception) -> str:
    """The first line of an error's message."""
    return f"{type(error).__name__} {error}".splitlines()[0]


def policy_of(content: Mapping[str, Any], name: str) -> Policy:
    """The policy of a checkpoint's content; ValueError, naming the file, where it has none."""
    try:
        policy = Policy(Start(**content["start"]), PolicyOptions(**content["options"]))
        policy.load_state_dict(content["policy"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{name} is no checkpoint of a policy: {first(error)}") from error
    return policy


def exported(content: Mapping[str, Any], name: str) -> Predictor:
    """The predictor that a checkpoint's content stands for: the mean of its policy.

    Raises ValueError, naming the file, for the content of another kind of checkpoint.
    """
    policy = policy_of(content, name)
    try:
        recipe = recipe_from_plain(content["recipe"])
        told = {key: content["about"][key] for key in ("reward", "seed")}
        ppo = {"step": content["step"], **told}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name} is no checkpoint of a policy: {first(error)}") from error
    recipe = dataclasses.replace(recipe, training={**recipe.training, "ppo": ppo})
    return validate(Predictor(policy.mean_table(), recipe))
