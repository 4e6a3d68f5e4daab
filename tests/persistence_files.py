"""Writes pickles in the layout of NVIDIA's `torch_utils.persistence`, for tests.

The globals that such a file names exist only while it is written.
"""

import contextlib
import io
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

SOURCE = "import pathlib; pathlib.Path('/tmp/module-source-ran').write_text('ran')"


class Persistent:
    """An object that is written as a call of `_reconstruct_persistent_obj`."""

    def __init__(self, class_name: str, state: dict[str, Any], module_src: str = SOURCE) -> None:
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": module_src,
            "class_name": class_name,
            "state": state,
        }


def module_state(
    parameters: dict[str, torch.Tensor] | None = None,
    modules: dict[str, Any] | None = None,
    buffers: dict[str, torch.Tensor] | None = None,
    **attributes: Any,
) -> dict[str, Any]:
    """The state of an nn.Module with these parameters, buffers, children and attributes."""
    state = dict(vars(torch.nn.Module()))
    state["_parameters"] = {
        name: torch.nn.Parameter(value, requires_grad=False)
        for name, value in (parameters or {}).items()
    }
    state["_modules"] = modules or {}
    state["_buffers"] = buffers or {}
    return {**state, **attributes}


def module_dict(modules: dict[str, Any]) -> torch.nn.ModuleDict:
    """A real ModuleDict, whose children may be `Persistent`s."""
    container = torch.nn.ModuleDict()
    container._modules.update(modules)
    return container


@contextlib.contextmanager
def stand_in(module: str, name: str) -> Iterator[Callable[..., Any]]:
    """A function that can be imported as module.name, for the time of writing."""

    def function(*_args: Any) -> None:
        raise AssertionError(f"{module}.{name} was called")

    function.__module__, function.__qualname__, function.__name__ = module, name, name
    parts = module.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    before = {n: sys.modules.get(n) for n in names}
    for n in names:
        sys.modules[n] = types.ModuleType(n)
    setattr(sys.modules[module], name, function)
    try:
        yield function
    finally:
        for n, old in before.items():
            sys.modules.pop(n)
            if old is not None:
                sys.modules[n] = old


def dump(value: Any, protocol: int = 4, device: str = "cpu") -> bytes:
    """`pickle.dumps` with `Persistent`s, and storages that say they were on `device`."""
    with stand_in("torch_utils.persistence", "_reconstruct_persistent_obj") as reconstruct:

        class Pickler(pickle.Pickler):
            def reducer_override(self, obj: Any) -> Any:
                if isinstance(obj, Persistent):
                    return reconstruct, (obj.meta,)
                if isinstance(obj, torch.storage.TypedStorage):
                    return torch.storage._load_from_bytes, (storage_bytes(obj, device),)
                return NotImplemented

        file = io.BytesIO()
        Pickler(file, protocol=protocol).dump(value)
        return file.getvalue()


def storage_bytes(storage: Any, device: str = "cpu") -> bytes:
    """What `torch.storage._load_from_bytes` reads: an old torch.save stream."""
    file = io.BytesIO()
    torch.save(storage, file, _use_new_zipfile_serialization=False)
    old, new = (b"X" + len(d).to_bytes(4, "little") + d for d in (b"cpu", device.encode()))
    assert old in file.getvalue()
    return file.getvalue().replace(old, new)


def predictor_bytes(
    parameters: dict[str, Any],
    metadata: dict[str, Any],
    *,
    protocol: int = 4,
    device: str = "cpu",
    with_loss: bool = False,
) -> bytes:
    """A published predictor: {"model": EPD_predictor}, or with a "loss_fn" beside it."""
    tensors = {n: torch.tensor(v, dtype=torch.float32) for n, v in parameters.items()}
    model = Persistent("EPD_predictor", module_state(tensors, **metadata))
    content: dict[str, Any] = {"model": model}
    if with_loss:
        content["loss_fn"] = Persistent("EPD_loss", dict(metadata))
    return dump(content, protocol, device)
