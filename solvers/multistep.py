"""Former place of parallel multistep."""

from solvers.epd import (
    MultistepTable,
    ParallelMultistep,
    combined,
    known_slopes,
    placed,
)

__all__ = ["MultistepTable", "ParallelMultistep", "combined", "known_slopes", "placed"]
