"""State dicts: read without running anything, checked name by name, put into networks.

Networks are built on the meta device, so that nothing is initialised that a file then replaces,
and a full-size network can be checked against a list of names and shapes without its memory.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from src.pickles import read_tensors

M = TypeVar("M", bound=nn.Module)
State = Mapping[str, Tensor]
PRODUCTS = {nn.Linear: "weight", nn.Conv2d: "weight", nn.MultiheadAttention: "in_proj_weight"}
"""The matrices, which are nearly all numbers of a network."""
BUFFERS: dict[str, Callable[[torch.Size, torch.device], Tensor]] = {
    "position_ids": lambda shape, on: torch.arange(shape[-1], device=on).expand(shape),
    "token_type_ids": lambda shape, on: torch.zeros(shape, dtype=torch.int64, device=on),
    "attn_mask": lambda shape, on: torch.full(shape, float("-inf"), device=on).triu(1),
}


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name: .safetensors, torch.save, a whole module, TorchScript.

    Nothing of a file is run, see src.pickles. They may lie under the key `state_dict`.
    ValueError, in one line with the path, for another file.
    """
    if path.suffix != ".safetensors":
        return read_tensors(path)
    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def renamed(state: State, names: Mapping[str, str], unused: tuple[str, ...] = ()) -> State:
    """The same tensors; prefixes in `names` are replaced, first match first.

    Names that end in one of `unused` are left out.
    """
    new = {}
    for name, value in state.items():
        if not name.endswith(unused or ("\0",)):
            old = next((old for old in names if name.startswith(old)), "")
            new[names.get(old, "") + name[len(old) :]] = value
    return new


def within(state: State, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def fill(
    build: Callable[[], M],
    state: State,
    source: str,
    device: torch.device,
    half: torch.dtype | None = None,
) -> M:
    """The network of `build` with all of the state and nothing else, float32, for inference.

    half: the type of the matrices, which autocast would turn into it at every call; all else
    stays float32. ValueError, in one line that starts with `source`, where names or shapes
    differ.
    """
    with torch.device("meta"):
        network = build()
    _check(state, network.state_dict(), source)
    matrices = {
        f"{name}.{weight}"
        for name, module in network.named_modules()
        for kind, weight in PRODUCTS.items()
        if half and isinstance(module, kind)
    }

    def ready(name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value.to(device)
        return value.to(device, half if name in matrices else torch.float32)

    network.load_state_dict({n: ready(n, v) for n, v in state.items()}, assign=True, strict=True)
    for name, buffer in list(network.named_buffers()):
        if buffer.is_meta and device.type != "meta":  # no file holds it
            owner, _, last = name.rpartition(".")
            setattr(network.get_submodule(owner), last, BUFFERS[last](buffer.shape, device))
    return network.eval().requires_grad_(False)


def _check(state: State, wanted: State, source: str) -> None:
    """ValueError, in one line, unless both have the same names and shapes."""
    shape = {name: list(v.shape) for name, v in state.items()}
    differ = [n for n, v in wanted.items() if n in shape and shape[n] != list(v.shape)]
    faults = {
        "missing": [name for name in wanted if name not in state],
        "not known": [name for name in state if name not in wanted],
        "of another shape": [f"{n} {shape[n]}, not {list(wanted[n].shape)}" for n in differ],
    }
    said = [f"{len(names)} {what} ({names[0]})" for what, names in faults.items() if names]
    if said:
        raise ValueError(f"{source}: these are other weights: {', '.join(said)}")
