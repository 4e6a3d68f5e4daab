"""A denoiser that remembers a trajectory, so that a change near its end costs only the end."""

from dataclasses import dataclass, field

from torch import Tensor

from solvers.field import Condition, Denoiser


@dataclass
class Memo:
    """A denoiser that remembers one trajectory and recomputes only rows that differ from it."""

    denoiser: Denoiser
    calls: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    at: int = 0
    learning: bool = True

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        """x [B, *] at sigma [B] -> x0 [B, *]."""
        if self.learning:
            x0 = self.denoiser(x, sigma, cond)
            self.calls.append((x, sigma, x0))
            return x0
        seen, told, known = self.calls[self.at]
        self.at += 1
        new = ((x != seen).flatten(1).any(1) | (sigma != told)).nonzero()[:, 0]
        if not len(new):
            return known
        if len(new) == len(x):
            return self.denoiser(x, sigma, cond)
        return known.index_copy(0, new, self.denoiser(x[new], sigma[new], rows(cond, new)))

    def again(self) -> None:
        """From now on compare with what was learned, from its start."""
        self.at, self.learning = 0, False


def rows(cond: Condition | None, index: Tensor | slice) -> Condition | None:
    """Some rows of a condition."""
    if cond is None:
        return None
    null = cond.null and {name: v[index] for name, v in cond.null.items()}
    return Condition({name: v[index] for name, v in cond.given.items()}, null)
