"""What stands in for the classes that a pickle names, and the plain values made of its calls."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Global:
    """A class or function that a file names."""

    name: str


@dataclass(eq=False, repr=False)
class Inert:
    """An object of a class that was not imported.

    `class_name` is the bare name for objects of `torch_utils.persistence`, else the dotted one;
    `args` are the arguments of its call, `state` its attributes (under "" if they are no dict),
    `items` what was put into it as into a dict or, under 0, 1, ..., a list.
    """

    class_name: str
    args: tuple[Any, ...] = ()
    state: dict[Any, Any] = field(default_factory=dict)
    items: dict[Any, Any] = field(default_factory=dict)

    def append(self, value: object) -> None:
        """What a list would do."""
        self.items[len(self.items)] = value


def quoted(value: object, length: int = 160) -> str:
    """A file's text or number made fit for one line of a terminal; of others, their kind."""
    text = str(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text[:length].encode("unicode_escape").decode("ascii")[:length]


def shown(value: object) -> str:
    """A file's plain value, or a short tuple of some, as Python writes it; else its kind."""
    plain = (str, int, float, type(None))
    short = (
        isinstance(value, tuple) and len(value) < 10 and all(isinstance(v, plain) for v in value)
    )
    return repr(value)[:160] if short or isinstance(value, plain) else type(value).__name__


def whole(value: Any) -> int:
    """A count: an int, not negative; else ValueError."""
    if type(value) is not int or value < 0:
        raise ValueError("a count is negative or not a whole number")
    return value


def key(value: Any) -> Any:
    """A plain value or a tuple of some; in it no wide int, none below 0, no float: of one hash."""
    plain = (str, bytes, int, float, type(None), torch.dtype, Global, Inert)
    for v in value if (inside := isinstance(value, tuple)) else (value,):
        wide = isinstance(v, int) and (
            v.bit_length() > (31 if inside else 64) or (inside and v < 0)
        )
        if not isinstance(v, plain) or wide or (inside and isinstance(v, float)):
            raise ValueError(f"a {type(v).__name__}, wide or with values in it, cannot be a key")
    return value


def dict_of(entries: Any = ()) -> dict[Any, Any]:
    """`collections.OrderedDict` and its like: a plain dict. ValueError as `key`."""
    return {key(k): v for k, v in (entries.items() if isinstance(entries, dict) else entries)}


def persistent(meta: Any) -> Inert:
    """`torch_utils.persistence._reconstruct_persistent_obj`: keeps the name and the state."""
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str):
        raise ValueError("a persistent object has no class name")
    state = meta.get("state")
    return Inert(quoted(meta["class_name"]), state=state if isinstance(state, dict) else {})


def tensor(storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`: a view of a storage [n], inside of it, or ValueError."""
    if not isinstance(storage, Tensor) or len(size) != len(stride) or len(size) > 64:
        raise ValueError("a tensor has no storage, or a shape that is broken")
    count, last = 1, whole(offset)
    for n, step in zip(size, stride, strict=True):
        count, last = count * whole(n), last + (n - 1) * whole(step)
    if count and (last >= len(storage) or count > len(storage)):
        raise ValueError("a tensor reaches beyond its storage")
    return storage.as_strided(size, stride, offset) if count else storage.new_empty(size)


def tensor_of_dtype(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v3`: as v2, with the dtype apart; ValueError for booleans."""
    if not isinstance(storage, Tensor) or torch.bool in (rest[2], storage.dtype):
        raise ValueError("a tensor has no storage that holds its dtype")
    return tensor(storage.view(rest[2]), offset, size, stride)


def encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """`_codecs.encode`: how protocols 0 to 2 write bytes. ValueError for another encoding."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes are not written as latin1 text")
    return text.encode("latin1")


def numpy_scalar(dtype: Any, raw: Any = None) -> Any:
    """`numpy.core.multiarray.scalar`: a Python number. ValueError for another kind."""
    code = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else None
    if code not in ("b1", "i4", "i8", "u8", "f2", "f4", "f8") or not isinstance(raw, bytes):
        raise ValueError("a numpy scalar is not a plain number")
    return np.frombuffer(raw, f"<{code}")[0].item()


def first(value: Any, *_rest: Any) -> Any:
    """The first argument, of what only says its type."""
    return value
