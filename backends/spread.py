"""One image on several devices: the rows of each network call spread over ranks.

All that is parallel in a call is rows: K points x guidance branches x images. Each rank evaluates
every n-th row and one gather a call brings the answers together; every rank then takes the
(cheap) step itself, so nothing else travels.

Shapes: R rows of a call, n ranks, * one latent.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from backends.base import Backend
from solvers.field import Condition, Denoiser

DIRECT = ("edm", "analytic")
"""Families whose network estimates x0 rather than a slope."""


@dataclass
class SpreadDenoiser:
    """A denoiser whose rows are evaluated by the ranks of a group, each its share.

    Answers travel in `dtype`, the network's own. `as_slope` sends (x - x0) / sigma, what most
    networks estimate, so that half precision loses nothing that the network gave. Every rank
    must ask the same questions in the same order.
    """

    denoiser: Denoiser
    group: dist.ProcessGroup
    dtype: torch.dtype
    as_slope: bool = False
    calls: int = 0
    buffers: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition | None) -> Tensor:
        """x [R, *] at sigma [R] -> x0 [R, *], the same on every rank."""
        self.calls += 1
        ranks, mine = self.group.size(), self.group.rank()
        share = -(-len(x) // ranks)

        def part(rows: Tensor) -> Tensor:
            own = rows[mine::ranks]
            # a rank without a last row takes another again: no rank is later for it
            return own if len(own) == share else torch.cat([own, rows[-1:]])

        own = None
        if cond:
            null = cond.null and {name: part(rows) for name, rows in cond.null.items()}
            own = Condition({name: part(rows) for name, rows in cond.given.items()}, null)
        wide = sigma.reshape(-1, *[1] * (x.ndim - 1))
        answer = self.denoiser(part(x), part(sigma), own)
        if self.as_slope:
            answer = (part(x) - answer) / part(wide)
        rows = self.collect(answer.to(self.dtype).contiguous(), ranks)
        rows = rows.transpose(0, 1).flatten(0, 1)[: len(x)].to(x.dtype, copy=True)
        return x - wide * rows if self.as_slope else rows

    def collect(self, answer: Tensor, ranks: int) -> Tensor:
        """The answers of all ranks [n, R / n, *], from this one's [R / n, *].

        Raises ValueError where a rank has died or is behind by more than the time limit.
        """
        shape = (ranks, *answer.shape)
        if shape not in self.buffers:
            self.buffers[shape] = answer.new_empty(shape)
        buffer = self.buffers[shape]
        try:
            dist.all_gather_into_tensor(buffer.flatten(0, 1), answer, group=self.group)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise ValueError(
                f"rank {dist.get_rank()} waited in vain for the other ranks at network call "
                f"{self.calls}: one has died or is too slow for --timeout ({reason}); images "
                "that are written stay, and the same command goes on"
            ) from error
        return buffer


def spread(backend: Backend, mesh: DeviceMesh | None) -> Backend:
    """The backend with each call's rows spread over the mesh's dimension `points`, if any."""
    if mesh is None:
        return backend
    denoise = SpreadDenoiser(
        backend.denoise,
        mesh.get_group("points"),
        backend.dtype,
        as_slope=backend.dtype.itemsize < 4 and backend.family not in DIRECT,
    )
    return replace(backend, denoise=denoise)
