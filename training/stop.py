"""How a run is stopped by a signal: in good order, and on all ranks at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch

from src.ranks import all_reduce_sum


class Stopped(Exception):
    """The run was asked to stop, and may: its state can be written down."""


@dataclass
class Stop:
    """Whether a signal came; `held` while a tick's results are written."""

    signal: int | None = None
    held: bool = False

    def poll(self) -> None:
        """Raise Stopped where a signal came, once the other ranks are about to reduce.

        Every reduction of a job begins with `agree`, which is what this one meets there.
        """
        if self.signal is not None and not self.held:
            self.agree()

    def agree(self) -> None:
        """Raise Stopped on all ranks where one is asked to stop; all ranks must call this."""
        asked = 0.0 if self.signal is None or self.held else 1.0
        if all_reduce_sum(torch.tensor([asked])).item():
            raise Stopped

    def hear(self, number: int, _frame: FrameType | None) -> None:
        """A signal handler."""
        self.signal = number

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop the run in good order meanwhile."""
        before = {n: signal.signal(n, self.hear) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
