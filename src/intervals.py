"""The old name of `src.stats`."""

from src.stats import Estimate, mean_of, win_rate

__all__ = ["Estimate", "mean_of", "win_rate"]
