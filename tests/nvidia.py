"""Objects made persistent as NVIDIA's `torch_utils.persistence` does it, and their pickles.

An object of such a class pickles as a call of `_reconstruct_persistent_obj` on its class's name,
its source code and its state. That global exists only while a file is written.
"""

import functools
import io
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

SOURCE = "import pathlib; pathlib.Path('/tmp/module-source-ran').write_text('ran')"


def reconstruct(_meta: Any) -> Any:
    """Stands for NVIDIA's, which would run the source code."""
    raise AssertionError("_reconstruct_persistent_obj was called")


reconstruct.__module__ = "torch_utils.persistence"
reconstruct.__qualname__ = reconstruct.__name__ = "_reconstruct_persistent_obj"


def persistent(cls: Any) -> Any:
    """The class, whose objects remember their init arguments and pickle by name and source."""
    begin = cls.__init__

    @functools.wraps(begin)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self._init_args, self._init_kwargs = args, kwargs

    def reduce(self: Any) -> Any:
        meta = {"type": "class", "version": 6, "module_src": SOURCE}
        return reconstruct, ({**meta, "class_name": cls.__name__, "state": dict(vars(self))},)

    return type(cls)(cls.__name__, (cls,), {"__init__": init, "__reduce__": reduce})


def dumps(value: Any, protocol: int = 4, device: str = "cpu") -> bytes:
    """`pickle.dumps`, of storages that say they were on `device`."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, torch.storage.TypedStorage):
                return torch.storage._load_from_bytes, (storage_bytes(obj, device),)
            return NotImplemented

    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    vars(module)["_reconstruct_persistent_obj"] = reconstruct
    file = io.BytesIO()
    names = {"torch_utils": package, "torch_utils.persistence": module}
    with mock.patch.dict(sys.modules, names):
        Pickler(file, protocol).dump(value)
    return file.getvalue()


def storage_bytes(storage: Any, device: str = "cpu") -> bytes:
    """What `torch.storage._load_from_bytes` reads: a stream of the older torch.save."""
    file = io.BytesIO()
    torch.save(storage, file, _use_new_zipfile_serialization=False)
    old, new = (b"X" + len(d).to_bytes(4, "little") + d for d in (b"cpu", device.encode()))
    assert old in file.getvalue()
    return file.getvalue().replace(old, new)


@persistent
class EPD_predictor(nn.Module):
    """A published predictor: settings, raw parameters, and the modules that decode them."""

    def __init__(self, parameters: dict[str, Tensor], **settings: Any) -> None:
        super().__init__()
        vars(self).update(settings)
        for name, values in parameters.items():
            self.register_parameter(name, nn.Parameter(values))
        self.sigmoid, self.softmax = nn.Sigmoid(), nn.Softmax(dim=-1)


@persistent
class EPD_loss:
    """What lies beside it: settings, the functions that it was trained with, buffers."""

    def __init__(self, solver: Callable[..., Any] | None = None, **settings: Any) -> None:
        vars(self).update(settings, solver_stu=solver, buffer_model=[torch.randn(4, 3, 8, 8)])


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
    content: dict[str, Any] = {"model": EPD_predictor(tensors, **metadata)}
    if with_loss:
        content["loss_fn"] = EPD_loss(torch.nn.functional.silu, **metadata)
    return dumps(content, protocol, device)
