"""One image on several devices: the rows of each network call spread over ranks.

All that is parallel in a call is rows: K points x guidance branches x images. Each rank evaluates
every n-th row and one gather a call brings the answers together; every rank then takes the
(cheap) step itself, so nothing else travels.

Shapes: R rows of a call, n ranks, * one latent.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from backends.base import ON_PIXELS, Backend
from solvers.field import Condition, Denoiser
from src.ranks import at_call


@dataclass
class SharedRows:
    """Rows of calls that the ranks of a group share.

    Every rank must ask the same questions in the same order.
    """

    group: dist.ProcessGroup
    calls: int = 0
    buffers: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def own(self, rows: Any) -> Any:
        """Rows [R, *] -> this rank's [R / n, *], rounded up; of a list of rows, a list."""
        ranks = self.group.size()
        own, last = rows[self.group.rank() :: ranks], rows[-1:]
        if len(own) * ranks >= len(rows):
            return own
        # a rank without a last row takes another again: no rank is later for it
        return own + last if isinstance(rows, list) else torch.cat([own, last])

    def all_of(self, own: Tensor, count: int) -> Tensor:
        """Own answers [R / n, *] -> those of all R = count rows, in their order.

        Raises ValueError where a rank has died or is behind by more than the time limit.
        """
        self.calls += 1
        at_call(self.calls)
        shape = (self.group.size(), *own.shape)
        if shape not in self.buffers:
            self.buffers[shape] = own.new_empty(shape)
        buffer = self.buffers[shape]
        try:
            dist.all_gather_into_tensor(buffer.flatten(0, 1), own.contiguous(), group=self.group)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:200]
            here = dist.get_rank()
            others = [f"rank {r}" for r in dist.get_process_group_ranks(self.group) if r != here]
            raise ValueError(
                f"rank {here} waited in vain for {' or '.join(others)} at network call "
                f"{self.calls}: it has died or is too slow for --timeout ({reason}); images "
                "that are written stay, and the same command goes on"
            ) from error
        # never a view of the buffer, which the next call fills
        return buffer.transpose(0, 1).reshape(-1, *own.shape[1:])[:count].clone()


@dataclass
class SpreadDenoiser:
    """A denoiser whose rows are evaluated by the ranks of a group, each its share.

    Answers travel in `dtype`, the network's own. `as_slope` sends (x - x0) / sigma, what most
    networks estimate, so that half precision loses nothing that the network gave.
    """

    denoiser: Denoiser
    rows: SharedRows
    dtype: torch.dtype
    as_slope: bool = False

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        """x [R, *] at sigma [R] -> x0 [R, *], the same on every rank."""
        part, own = self.rows.own, None
        if cond:
            null = cond.null and {name: part(rows) for name, rows in cond.null.items()}
            own = Condition({name: part(rows) for name, rows in cond.given.items()}, null)
        wide = sigma.reshape(-1, *[1] * (x.ndim - 1))
        answer = self.denoiser(part(x), part(sigma), own)
        if self.as_slope:
            answer = (part(x) - answer) / part(wide)
        rows = self.rows.all_of(answer.to(self.dtype), len(x)).to(x.dtype)
        return x - wide * rows if self.as_slope else rows


def spread(backend: Backend, mesh: DeviceMesh | None) -> Backend:
    """The backend with each call's rows spread over the mesh's dimension `points`, if any."""
    if mesh is None:
        return backend
    denoise = SpreadDenoiser(
        backend.denoise,
        SharedRows(mesh.get_group("points")),
        backend.dtype,
        as_slope=backend.dtype.itemsize < 4 and backend.family not in ON_PIXELS,
    )
    return replace(backend, denoise=denoise)
