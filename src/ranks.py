"""torch.distributed in a few functions. Without torchrun, one process and nothing to do.

Ranks that share the rows of each image (`point_mesh`) do the same work and count as one: shares,
sums and gathers are over those.

`python -m src.ranks` is torchrun, but that what ends a run is one line: a rank's error, or which
rank was killed, and at which network call.
"""

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from tqdm import tqdm

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # one rank may score while the others wait
EVERY = 5.0  # seconds between lines of progress in a log
CALLS = "EPD_CALLS"  # in the environment: the folder where ranks write which call they are at
MESHES: list[DeviceMesh] = []  # the one of `point_mesh`, if any


def init(device: torch.device) -> torch.device:
    """Join the group that torchrun describes in the environment -> this rank's device.

    CPU tensors travel by gloo, GPU tensors by NCCL; `device` "cuda" becomes this rank's GPU.
    ValueError where the machine has fewer GPUs than ranks.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or dist.is_initialized():
        return device
    # its functions have the group as a default: imported later they would hold it, and with it
    # threads that abort a process that ends
    import_module("torch.distributed.nn.functional")
    if device.type != "cuda":
        dist.init_process_group("gloo", timeout=PATIENCE)
        return device
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= gpus:
        raise ValueError(f"rank {local} has no GPU, {gpus} are here: lower --nproc_per_node")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE)
    return device


def close() -> None:
    """Leave the group."""
    MESHES.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Which process this is, from 0; the same for all that share rows."""
    return dist.get_rank() // degree() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are, those that share rows counting as one."""
    return dist.get_world_size() // degree() if dist.is_initialized() else 1


def degree() -> int:
    """How many processes share the rows of an image."""
    return MESHES[-1]["points"].size() if MESHES else 1


def is_first() -> bool:
    """Whether this is the process that prints and writes the common files."""
    return rank() == 0 and writes()


def writes() -> bool:
    """Whether this process, of those that share images, writes them."""
    return not MESHES or MESHES[-1].get_local_rank("points") == 0


def share(items: Sequence[T]) -> list[T]:
    """The part of this rank: every n-th item."""
    return list(items[rank() :: world_size()])


def point_mesh(points: int, device: torch.device, timeout: float = 600.0) -> DeviceMesh | None:
    """The ranks as a mesh of `data` x `points`, so many of them sharing each image's rows.

    None for 1. From then on, until `close`, those count as one. A gather over `points` that takes
    longer than `timeout` seconds fails instead of waiting for ever. ValueError where the ranks
    do not divide by `points`.
    """
    world = world_size()
    if world % points:
        hint = f"start a multiple of {points} with --nproc_per_node"
        raise ValueError(f"points_degree {points} does not divide the {world} ranks: {hint}")
    if points == 1:
        return None
    grid = torch.arange(world).reshape(-1, points)
    limit = timedelta(seconds=timeout)
    data = [dist.new_group(column, timeout=PATIENCE) for column in grid.T.tolist()]
    rows = [dist.new_group(row, timeout=limit) for row in grid.tolist()]
    row, column = divmod(rank(), points)
    mine: Any = [data[column], rows[row]]
    names = ("data", "points")
    MESHES.append(DeviceMesh.from_group(mine, device.type, mesh=grid, mesh_dim_names=names))
    return MESHES[-1]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, on every rank; `tensor` stays as it is."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(total, group=MESHES[-1].get_group("data") if MESHES else None)
    return total


def any_of(here: bool) -> bool:
    """Whether it holds on any process, on every one."""
    held = torch.tensor([float(here)])
    if dist.is_initialized():
        dist.all_reduce(held)
    return held.item() > 0


def barrier() -> None:
    """Wait until every process is here."""
    any_of(False)


def of_each_rank(item: Any) -> list[Any]:
    """The items of all ranks in their order, on every rank (pickled among our own ranks)."""
    return of_each_process(item)[:: degree()]


def of_each_process(item: Any) -> list[Any]:
    """Those of all processes."""
    if not dist.is_initialized():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


@contextmanager
def together() -> Iterator[None]:
    """A ValueError within, on any rank, is one on every rank: none waits for one that went."""
    failed = ""
    try:
        yield
    except ValueError as error:
        failed = str(error)
    reasons = [reason for reason in of_each_process(failed) if reason]
    if reasons:
        raise ValueError(reasons[0])


def on_first(work: Callable[[], None]) -> None:
    """Do the work on the first rank; what is wrong there is a ValueError on all."""
    with together():
        if is_first():
            try:
                work()
            except OSError as error:
                raise ValueError(str(error)) from error


class Lines:
    """A file for tqdm where there is no terminal: each new state of the bar as a line."""

    said = ""

    def write(self, text: str) -> None:
        """Say a state, unless it is the last one again."""
        if text.strip() not in ("", self.said):
            self.said = text.strip()
            sys.stderr.write(self.said + "\n")

    def flush(self) -> None:
        """Let others see it."""
        sys.stderr.flush()


def progress(total: int | None, unit: str, desc: str | None = None) -> tqdm:
    """A bar on the first rank's terminal; in a log, a line every few seconds and at the end."""
    if sys.stderr.isatty():
        return tqdm(total=total, unit=unit, desc=desc, disable=not is_first())
    count = "{n_fmt}" if total is None else "{n_fmt}/{total_fmt}"
    return tqdm(
        total=total,
        unit=f" {unit}s",
        desc=f"{desc}: " if desc else None,
        disable=not is_first(),
        bar_format=f"{{desc}}{count}{{unit}} in {{elapsed}}{{postfix}}",
        file=Lines(),
        mininterval=EVERY,
        delay=0.1,
    )


def at_call(number: int) -> None:
    """Let the launcher know at which network call this rank is, should it be killed.

    One write of a fixed length over the last, so that no moment finds half a number.
    """
    if folder := os.environ.get(CALLS):
        os.pwrite(opened(Path(folder, os.environ["RANK"])), f"{number:20}".encode(), 0)


@cache
def opened(path: Path) -> int:
    """A file to write to, kept open: there is a call of the network every few milliseconds."""
    return os.open(path, os.O_CREAT | os.O_WRONLY)


def await_launcher() -> None:
    """Before a rank's error is told: wait until the run ends, if that is for another's sake.

    The first rank says what all have, and the launcher which was killed: others are ended by it.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(15)
    elif CALLS in os.environ:
        time.sleep(4)


def torchrun(arguments: list[str]) -> int:
    """Run a script in many processes, with torchrun's arguments -> the exit status.

    What a rank says of its error stands in the output already; torchrun would tell the exit
    status again in twenty lines below it.
    """
    from torch.distributed import run  # noqa: PLC0415 (slow, and for this alone)

    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as calls:
        os.environ[CALLS] = calls
        try:
            run.main(arguments)
        except ChildFailedError as error:
            for rank, failure in error.failures.items():
                if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # torchrun's own
                    place = Path(calls, str(rank))
                    call = place.read_text().strip() if place.exists() else ""
                    where = f" at network call {call}" if call else ""
                    ended = f"rank {rank} was killed by {failure.signal_name()}{where}"
                    sys.stderr.write(f"Error: {ended}; what is written stays\n")
                    return 128 - failure.exitcode
            return error.get_first_failure()[1].exitcode
    return 0


if __name__ == "__main__":
    sys.exit(torchrun(sys.argv[1:]))
