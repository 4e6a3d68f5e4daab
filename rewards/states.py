"""State dicts: read without running anything, checked name by name, put into networks.

Networks are built on the meta device, so that nothing is initialised that a file then replaces,
and a full-size network can be checked against a list of names and shapes without its memory.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from solvers.persistence import Persistent, read_persistent

M = TypeVar("M", bound=nn.Module)
State = Mapping[str, Tensor]


def read_state(path: Path, inside: str | None = None) -> dict[str, Tensor]:
    """-> the tensors of a .safetensors or torch.save file by name.

    inside: the key under which a torch.save file has them; they may also be on top. ValueError,
    in one line with the path, for another file.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    found = read_persistent(path)
    if inside is not None and isinstance(found, dict) and inside in found:
        found = found[inside]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{path}: this is no state dict (names of tensors and nothing else)")
    return found


def read_module(path: Path) -> dict[str, Tensor]:
    """-> the state dict of a whole pickled module, nothing of which is run or imported."""
    found = read_persistent(path, foreign="inert")
    if not isinstance(found, Persistent):
        raise ValueError(f"{path}: this is no pickled module, but a {type(found).__name__}")
    return dict(_tensors(found, ""))


def _tensors(module: Any, prefix: str) -> list[tuple[str, Tensor]]:
    """Parameters and buffers under a pickled module, by their dotted names."""
    state = module.state if isinstance(module, Persistent) else {}
    own = {**_entries(state, "_parameters"), **_entries(state, "_buffers")}
    found = [(prefix + name, value) for name, value in own.items() if isinstance(value, Tensor)]
    for name, child in _entries(state, "_modules").items():
        found += _tensors(child, f"{prefix}{name}.")
    return found


def _entries(state: Any, name: str) -> dict[str, Any]:
    found = state.get(name) if isinstance(state, dict) else None
    return found if isinstance(found, dict) else {}


def renamed(state: State, names: Mapping[str, str], unused: tuple[str, ...] = ()) -> State:
    """The same tensors; prefixes in `names` are replaced, first match first.

    Names that end in one of `unused` are left out.
    """
    told = {}
    for name, value in state.items():
        if not name.endswith(unused or ("\0",)):
            old = next((old for old in names if name.startswith(old)), "")
            told[names.get(old, "") + name[len(old) :]] = value
    return told


def within(state: State, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def fill(build: Callable[[], M], state: State, source: str, device: torch.device) -> M:
    """-> the network of `build` with all of the state and nothing else, float32, for inference.

    ValueError, in one line that starts with `source`, where names or shapes differ.
    """
    with torch.device("meta"):
        network = build()
    state = {name: v.to(device, torch.float32) for name, v in state.items()}
    check(state, network.state_dict(), source)
    network.load_state_dict(state, assign=True, strict=True)
    complete(network, device)
    return network.eval().requires_grad_(False)


def check(state: State, wanted: State, source: str) -> None:
    """ValueError, in one line, unless both have the same names and shapes."""
    shape = {name: list(v.shape) for name, v in state.items()}
    differ = [n for n, v in wanted.items() if n in shape and shape[n] != list(v.shape)]
    faults = {
        "missing": [name for name in wanted if name not in state],
        "not known": [name for name in state if name not in wanted],
        "of another shape": [f"{n} {shape[n]}, not {list(wanted[n].shape)}" for n in differ],
    }
    told = [f"{len(names)} {what} ({names[0]})" for what, names in faults.items() if names]
    if told:
        raise ValueError(f"{source}: these are other weights: {', '.join(told)}")


def complete(network: nn.Module, device: torch.device) -> None:
    """Make the buffers that no file holds: positions, and causal masks."""
    for name, buffer in list(network.named_buffers()):
        if buffer.is_meta and device.type != "meta":
            owner, _, last = name.rpartition(".")
            setattr(network.get_submodule(owner), last, _buffer(last, buffer.shape, device))


def _buffer(name: str, shape: torch.Size, device: torch.device) -> Tensor:
    if name == "position_ids":
        return torch.arange(shape[-1], device=device).expand(shape)
    if name == "token_type_ids":
        return torch.zeros(shape, dtype=torch.int64, device=device)
    assert name == "attn_mask", f"the buffer {name} has no rule"
    return torch.full(shape, float("-inf"), device=device).triu(1)
