"""NVIDIA's network pickles, read without running anything in them.

Layout: {"ema": <object>, ...}, each object a call of `torch_utils.persistence.
_reconstruct_persistent_obj` on a dict (type, version, module_src, class_name, state), its state
holding `_init_args`, `_init_kwargs` and the `_parameters`, `_buffers`, `_modules` of nn.Module.
`src.pickles` turns that into plain data; here it becomes arguments and tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from backends.edm_precond import PRECONDS
from src.pickles import Inert, read_pickle

__all__ = ["Network", "read_network"]

POSITIONS = ("img_resolution", "img_channels", "label_dim", "use_fp16")
"""The first arguments of every preconditioned class; its own follow, then `model_type`."""


@dataclass(frozen=True)
class Network:
    """What a network file says: a class, its arguments, and tensors under published names."""

    class_name: str
    arguments: dict[str, Any]
    state: dict[str, Tensor]


def read_network(path: Path) -> Network:
    """The network under "ema" of an NVIDIA pickle.

    Raises ValueError, in one line with the path, on a broken or hostile file, and on one whose
    "ema" is missing or is not a preconditioned network that we know.
    """
    content = read_pickle(path)
    ema: object = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(ema, Inert):
        raise ValueError(f'{path}: no network under "ema"; it is not an EDM network pickle')
    if ema.class_name not in PRECONDS:
        known = ", ".join(PRECONDS)
        raise ValueError(f"{path}: a network of class {ema.class_name!r}; known: {known}")
    try:
        arguments = init_arguments(ema)
        return Network(ema.class_name, arguments, dict(tensors(ema)))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def init_arguments(ema: Inert) -> dict[str, Any]:
    """The arguments that the object was made with, by name, plain enough for JSON."""
    own = [field.name for field in fields(PRECONDS[ema.class_name])]
    names = [*POSITIONS, *own, "model_type"]
    given, named = ema.state.get("_init_args", ()), ema.state.get("_init_kwargs", {})
    if not isinstance(given, list | tuple) or not isinstance(named, dict):
        raise ValueError(f"the {ema.class_name} does not tell its init arguments")
    if len(given) > len(names):
        raise ValueError(f"{ema.class_name} takes {len(names)} arguments by position at most")
    arguments = {**dict(zip(names, given, strict=False)), **named}
    model = _mapping(ema, "_modules").get("model")
    if isinstance(model, Inert):
        arguments["model_type"] = model.class_name
    return arguments


def tensors(module: Inert, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers of a pickled nn.Module under their dotted names."""
    if depth > 16:
        raise ValueError(f"modules are nested too deep at {prefix[:80]}")
    for name, value in _present(module, ("_parameters", "_buffers")):
        if not isinstance(value, Tensor):
            raise ValueError(f"{prefix}{name} is no tensor but {type(value).__name__}")
        yield f"{prefix}{name}", value
    for name, child in _present(module, ("_modules",)):
        if not isinstance(child, Inert):
            raise ValueError(f"{prefix}{name} is no module but {type(child).__name__}")
        yield from tensors(child, f"{prefix}{name}.", depth + 1)


def _present(module: Inert, groups: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The members of a pickled nn.Module that are not None."""
    for group in groups:
        for name, value in _mapping(module, group).items():
            if value is not None:
                yield name, value


def _mapping(module: Inert, group: str) -> Mapping[str, Any]:
    found = module.state.get(group, {})
    if not isinstance(found, dict):
        raise ValueError(f"{group} of a {module.class_name} is no dict")
    return found
