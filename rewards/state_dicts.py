"""State dicts: read without running anything, and put into networks that take them whole.

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
MATRICES = {nn.Linear: "weight", nn.Conv2d: "weight", nn.MultiheadAttention: "in_proj_weight"}
"""Nearly all numbers of a network."""
BUFFERS: dict[str, Callable[[torch.Size, torch.device], Tensor]] = {
    "position_ids": lambda shape, on: torch.arange(shape[-1], device=on).expand(shape),
    "token_type_ids": lambda shape, on: torch.zeros(shape, dtype=torch.int64, device=on),
    "attn_mask": lambda shape, on: torch.full(shape, float("-inf"), device=on).triu(1),
}
"""Those that no file holds."""


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
        if not name.endswith(unused):
            old = next((old for old in names if name.startswith(old)), "")
            new[names.get(old, "") + name[len(old) :]] = value
    return new


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
    modules = network.named_modules()
    halved = {f"{n}.{w}" for n, m in modules for k, w in MATRICES.items() if isinstance(m, k)}
    ready = {}
    for name, value in state.items():
        kind = (half if name in halved else None) or torch.float32
        ready[name] = value.to(device, dtype=kind if value.is_floating_point() else None)
    try:
        network.load_state_dict(ready, assign=True, strict=True)
    except RuntimeError as error:
        _, _, faults = " ".join(str(error).split()).partition(": ")
        raise ValueError(f"{source}: these are other weights: {faults[:300]}") from error
    for name, buffer in list(network.named_buffers()):
        if buffer.is_meta and device.type != "meta":
            owner, _, last = name.rpartition(".")
            setattr(network.get_submodule(owner), last, BUFFERS[last](buffer.shape, device))
    return network.eval().requires_grad_(False)
