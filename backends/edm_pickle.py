"""NVIDIA's network pickles, read without running anything in them, and written.

Layout: {"ema": <object>, ...}, each object a call of `torch_utils.persistence.
_reconstruct_persistent_obj` on a dict (type, version, module_src, class_name, state), its state
holding `_init_args`, `_init_kwargs` and the `_parameters`, `_buffers`, `_modules` of nn.Module.
`solvers.persistence` turns that into plain data; here it becomes arguments and tensors, and back.
"""

import io
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from backends.edm_precond import PRECONDS
from solvers.persistence import Persistent, read_persistent

__all__ = ["Network", "pickled", "read_network"]

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
    content = read_persistent(path)
    ema: object = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(ema, Persistent):
        raise ValueError(f'{path}: no network under "ema"; it is not an EDM network pickle')
    if ema.class_name not in PRECONDS:
        known = ", ".join(PRECONDS)
        raise ValueError(f"{path}: a network of class {ema.class_name!r}; known: {known}")
    try:
        arguments = init_arguments(ema)
        return Network(ema.class_name, arguments, dict(tensors(ema)))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def init_arguments(ema: Persistent) -> dict[str, Any]:
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
    if isinstance(model, Persistent):
        arguments["model_type"] = model.class_name
    return arguments


def tensors(module: Persistent, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers of a pickled nn.Module under their dotted names."""
    if depth > 16:
        raise ValueError(f"modules are nested too deep at {prefix[:80]}")
    for name, value in _present(module, ("_parameters", "_buffers")):
        if not isinstance(value, Tensor):
            raise ValueError(f"{prefix}{name} is no tensor but {type(value).__name__}")
        yield f"{prefix}{name}", value
    for name, child in _present(module, ("_modules",)):
        if not isinstance(child, Persistent):
            raise ValueError(f"{prefix}{name} is no module but {type(child).__name__}")
        yield from tensors(child, f"{prefix}{name}.", depth + 1)


def _present(module: Persistent, groups: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The members of a pickled nn.Module that are not None."""
    for group in groups:
        for name, value in _mapping(module, group).items():
            if value is not None:
                yield name, value


def _mapping(module: Persistent, group: str) -> Mapping[str, Any]:
    found = module.state.get(group, {})
    if not isinstance(found, dict):
        raise ValueError(f"{group} of a {module.class_name} is no dict")
    return found


# Writing: the data of the layout. NVIDIA's own tools rebuild a network by running the source code
# that its pickle carries; ours carry none.
SOURCE = "# no source code: the class name, the init arguments and the tensors say it all"
VERSION = 6


def pickled(module: nn.Module, class_name: str, arguments: dict[str, Any]) -> bytes:
    """{"ema": ...} in NVIDIA's layout, of a module with its raw network under `model`."""
    content = {"ema": _persistent(module, class_name, arguments)}
    return b"\x80\x03" + _opcodes(content) + b"."


def _persistent(module: nn.Module, class_name: str, init: dict[str, Any]) -> Persistent:
    """A module and its children as the data of their pickle."""
    kept = module.state_dict()
    children = {
        name: _persistent(child, type(child).__name__, {})
        for name, child in module.named_children()
    }
    state = {
        "training": False,
        "_parameters": {k: v.detach().cpu() for k, v in module.named_parameters(recurse=False)},
        "_buffers": {k: v.cpu() for k, v in module.named_buffers(recurse=False) if k in kept},
        "_modules": children,
        "_init_args": (),
        "_init_kwargs": init,
    }
    return Persistent(class_name, state)


def _opcodes(value: Any) -> bytes:
    """The pickle opcodes of plain data, tensors and Persistent objects, without a memo."""
    if isinstance(value, Persistent) and value.class_name == "ModuleDict":
        state = {"training": False, "_parameters": {}, "_buffers": {}}
        state["_modules"] = value.state["_modules"]
        return b"ctorch.nn.modules.container\nModuleDict\n)\x81" + _opcodes(state) + b"b"
    if isinstance(value, Persistent):
        meta = {
            "type": "class",
            "version": VERSION,
            "module_src": SOURCE,
            "class_name": value.class_name,
            "state": value.state,
        }
        call = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
        return call + _opcodes(meta) + b"\x85R"
    if isinstance(value, dict):
        return b"}(" + b"".join(_opcodes(x) for item in value.items() for x in item) + b"u"
    if isinstance(value, list | tuple):
        start, end = (b"](", b"e") if isinstance(value, list) else (b"(", b"t")
        return start + b"".join(map(_opcodes, value)) + end
    return _fragment(value.contiguous().clone() if isinstance(value, Tensor) else value)


def _fragment(value: Any) -> bytes:
    """What pickle writes for a value, without header, memo and stop, so that parts can join."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=3)
    pickler.fast = True
    pickler.dump(value)
    return file.getvalue()[2:-1]
