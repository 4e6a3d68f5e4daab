"""What flow-matching networks have in common: velocities as denoisers, and their schedules.

x at level sigma is (1 - sigma) x0 + sigma eps, and the network estimates v = eps - x0 (Lipman
et al. 2023, arXiv:2210.02747; Esser et al. 2024, arXiv:2403.03206).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from backends.base import NoiseLevels
from solvers.process import FLOW

CLOCK = 1000
"""The networks are told sigma times this."""
OTHER_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def clean(x: Tensor, sigma: Tensor, velocity: Tensor) -> Tensor:
    """x0 = x - sigma v for x [B, *], sigma [B]."""
    return x - sigma.reshape(-1, *[1] * (x.ndim - 1)) * velocity.to(x.dtype)


@dataclass(frozen=True)
class Shifts:
    """What a FlowMatchEulerDiscreteScheduler's config says of its shift."""

    shift: float = 1.0
    dynamic: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096

    def mu(self, tokens: int) -> float:
        """The dynamic shift for an image of so many tokens, linear between the two ends."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return self.base_shift + slope * (tokens - self.base_tokens)


def flow_levels(config: Mapping[str, Any], tokens: int) -> NoiseLevels:
    """The levels of a network whose scheduler has this config, at so many image tokens.

    Raises ValueError for a scheduler whose spacing is not one of the two shifts.
    """
    other = [name for name in OTHER_SPACINGS if config.get(name)]
    linear = config.get("time_shift_type", "exponential") != "exponential"
    if config.get("shift_terminal") or config.get("invert_sigmas") or other or linear:
        name = (*other, "time_shift_type, shift_terminal or invert_sigmas")[0]
        raise ValueError(f"the scheduler's config has a spacing that is not served: {name}")
    if config.get("num_train_timesteps", CLOCK) != CLOCK:
        raise ValueError(f"num_train_timesteps {config['num_train_timesteps']} is not {CLOCK}")
    shifts = shifts_of(config)
    if shifts.dynamic:
        return NoiseLevels(FLOW, 1 / CLOCK, 1.0, mu=shifts.mu(tokens))
    return NoiseLevels(FLOW, shifted_end(config), 1.0, shift=shifts.shift)


def shifted_end(config: Mapping[str, Any]) -> float:
    """The level of a scheduler's first timestep, the lowest that its model was trained on."""
    end = 1 / config.get("num_train_timesteps", CLOCK)
    shift = config.get("flow_shift" if config.get("use_flow_sigmas") else "shift", 1.0)
    return end if config.get("use_dynamic_shifting") else shift * end / (1 + (shift - 1) * end)


def shifts_of(config: Mapping[str, Any]) -> Shifts:
    """The shifts, by diffusers' names and defaults."""
    return Shifts(
        shift=config.get("shift", 1.0),
        dynamic=config.get("use_dynamic_shifting", False),
        base_shift=config.get("base_shift", 0.5),
        max_shift=config.get("max_shift", 1.15),
        base_tokens=config.get("base_image_seq_len", 256),
        max_tokens=config.get("max_image_seq_len", 4096),
    )
