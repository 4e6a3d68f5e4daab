"""torch.distributed in a few functions. Without torchrun, one process and nothing to do."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # one rank may score while the others wait


def init(device: torch.device) -> torch.device:
    """Join the group that torchrun describes in the environment -> this rank's device.

    CPU tensors travel by gloo, GPU tensors by NCCL; `device` "cuda" becomes this rank's GPU.
    ValueError where the machine has fewer GPUs than ranks.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or dist.is_initialized():
        return device
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
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """-> which process this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """-> how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """-> whether this is the process that prints and writes the common files."""
    return rank() == 0


def share(items: Sequence[T]) -> list[T]:
    """-> this rank's part: every item belongs to exactly one rank, every n-th to this one."""
    return list(items[rank() :: world_size()])


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """-> the sum over ranks, on every rank; `tensor` stays as it is."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def barrier() -> None:
    """Wait until every rank is here."""
    all_reduce_sum(torch.zeros(1))


def gather_objects(item: Any) -> list[Any]:
    """-> the items of all ranks in their order, on every rank (pickled among our own ranks)."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items
