"""Former place of solvers by name."""

from solvers.sampler import (
    SOLVERS,
    SolverOptions,
    make_solver,
    no_noise,
    num_steps_for,
    parse_name,
)

__all__ = ["SOLVERS", "SolverOptions", "make_solver", "no_noise", "num_steps_for", "parse_name"]
