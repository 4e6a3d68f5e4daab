"""Reads pickles of networks and predictors by an allow-list: no code of a file ever runs.

Three layouts, told apart by their first bytes:

* `pickle.dump` of objects made persistent by NVIDIA's `torch_utils.persistence` (the published
  EDM networks and EPD predictors): each becomes a `Persistent` with its class name and state;
  the source code that the file carries is dropped unread;
* the zip archive of `torch.save` (`archive/data.pkl` and `archive/data/N`);
* the older stream of `torch.save`, five pickles and then the storages.

Tensors come out on the CPU, whatever device they were saved from. Parameters come out as plain
tensors, OrderedDict and EasyDict as dict. Everything else that a file names is refused by name.
"""

import io
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from solvers.unpickle import (
    BROKEN,
    Constructor,
    Find,
    Marker,
    Persistent,
    Source,
    key,
    quoted,
    run,
)

__all__ = ["Persistent", "read_persistent"]

MAX_FILE = 8 << 30
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
DTYPES = (
    *("float16", "float32", "float64", "bfloat16", "half", "float", "double"),
    *("uint8", "int8", "int16", "int32", "int64", "short", "int", "long", "bool"),
    *("complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64"),
)
# Modules of torch that hold others without being persistent classes: inert, like the rest.
CONTAINERS = ("Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict")


@dataclass(frozen=True)
class StorageType:
    """A storage class of torch; only named, in references to storages."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """The numbers of a storage, [n]."""

    values: Tensor


def read_persistent(path: str | Path, *, foreign: Literal["refuse", "inert"] = "refuse") -> Any:
    """The content of a pickle or torch.save file as plain data, tensors and `Persistent`s.

    With `foreign="inert"`, classes that are not on the list become `Persistent`s too (dotted
    class name, arguments, state), still without running anything: for whole pickled modules
    and checkpoints that carry the objects of a training framework.

    Raises ValueError in one line with the path: no such file, not a pickle, truncated, a size
    claimed that the file does not hold, or a global that is not allowed, by name.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise ValueError("it is a folder, not a file")
        if size == 0:
            raise ValueError("the file is empty")
        if size > MAX_FILE:
            raise ValueError(f"{size} bytes is more than the {MAX_FILE} that are read at most")
        with path.open("rb") as file:
            return read_stream(Source(file, size), allowed(foreign))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (*BROKEN, zipfile.BadZipFile, RuntimeError, MemoryError, struct.error) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """What went wrong, for people."""
    text = quoted(str(error), 300)
    if text.startswith("at position "):
        return f"this is no pickle of a predictor or a network ({text})"
    return text if type(error) is ValueError else f"the file is broken ({text})"


def read_stream(source: Source, find: Find) -> Any:
    """The object of a file in any of the three layouts."""
    if source.read(4) == b"PK\x03\x04":
        return read_zip(source, find)
    source.file.seek(0)
    head = source.file.read(64)
    source.file.seek(0)
    if is_legacy(head):
        return read_legacy(source, find)
    value = run(source, find)
    if source.left():
        raise ValueError(f"{source.left()} bytes follow the end of the pickle")
    return value


# --- torch.save ---------------------------------------------------------------------------


def is_legacy(head: bytes) -> bool:
    """Whether the stream starts with the pickled magic number of old torch.save files."""
    return LEGACY_MAGIC.to_bytes(10, "little") in head[:20]


def read_legacy(source: Source, find: Find) -> Any:
    """The older torch.save: magic, version, system, object, storage names, then storages."""
    if run(source, nothing_allowed) != LEGACY_MAGIC:
        raise ValueError("it does not start with the magic number of torch.save")
    if run(source, nothing_allowed) != LEGACY_PROTOCOL:
        raise ValueError("its version of the torch.save layout is unknown")
    system = run(source, nothing_allowed)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("it was saved on a big-endian machine")
    storages = Storages(left=source.size)
    value = run(source, find, storages.claim)
    names = run(source, nothing_allowed)
    if not isinstance(names, list) or names != list(dict.fromkeys(names)):
        raise ValueError("its list of storages is broken")
    if set(names) != set(storages.known):
        raise ValueError("its list of storages is not that of its tensors")
    for name in names:
        values = storages.known[name].values
        (count,) = struct.unpack("<q", source.exactly(8))
        if count != len(values):
            raise ValueError(f"a storage of {len(values)} numbers claims to hold {count}")
        values.copy_(from_bytes(source.exactly(values.nbytes), values.dtype))
    return value


def read_zip(source: Source, find: Find) -> Any:
    """The torch.save of today: a zip with `<root>/data.pkl` and `<root>/data/<name>`."""
    with zipfile.ZipFile(source.file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        roots = [n.removesuffix("data.pkl") for n in entries if n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("it is a zip without one data.pkl, so not from torch.save")
        root = roots[0]

        def content(name: str) -> bytes:
            info = entries.get(root + name)
            if info is None:
                raise ValueError(f"the entry {quoted(root + name)} is missing")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > source.size:
                raise ValueError(f"the entry {quoted(root + name)} is compressed or too large")
            return archive.read(info)

        if root + "byteorder" in entries and content("byteorder") != b"little":
            raise ValueError("it was saved on a big-endian machine")
        storages = Storages(left=source.size, content=content)
        pickled = content("data.pkl")
        return run(Source(io.BytesIO(pickled), len(pickled)), find, storages.claim)


@dataclass
class Storages:
    """The storages that a torch.save pickle refers to, each allocated once and within reach."""

    left: int  # bytes that may still be claimed
    content: Callable[[str], bytes] | None = None  # of a zip; the older layout fills in later
    known: dict[Any, Storage] = field(default_factory=dict)

    def claim(self, reference: Any) -> object:
        """("storage", type, name, device, count) -> the storage; the device is ignored.

        ("module", class, file, source), of the older layout, is the class; the rest is dropped.
        """
        match reference:
            case ("module", Constructor() as kind, _, _):
                return kind
            case ("storage", StorageType() as kind, str(name), _, int(count), *view):
                return self.storage(name, kind.dtype, count, view)
        raise ValueError("it has a reference that is not one to a storage")

    def storage(self, name: str, dtype: torch.dtype, count: int, view: list[Any]) -> Storage:
        """The storage of that name, new or known."""
        if view not in ([], [None]):
            raise ValueError("it has views of storages, which only very old files have")
        if name not in self.known:
            self.known[name] = self.load(name, dtype, count)
        found = self.known[name].values
        if found.dtype != dtype or len(found) != count:
            raise ValueError(f"the storage {quoted(name)} is claimed in two ways")
        return self.known[name]

    def load(self, name: str, dtype: torch.dtype, count: Any) -> Storage:
        """A new storage: zeros for now, or the content of its entry."""
        claimed = whole(count) * dtype.itemsize
        self.left -= claimed
        if self.left < 0:
            raise ValueError(f"a storage claims {claimed} bytes, more than the file holds")
        if self.content is None:
            return Storage(torch.zeros(count, dtype=dtype))
        raw = self.content(f"data/{name}")
        if len(raw) != claimed:
            raise ValueError(f"a storage of {len(raw)} bytes claims to hold {claimed}")
        return Storage(from_bytes(raw, dtype))


def from_bytes(raw: bytes, dtype: torch.dtype) -> Tensor:
    """Little-endian bytes as a tensor [n] of its own."""
    if not raw:
        return torch.empty(0, dtype=dtype)
    if dtype == torch.bool:
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8) != 0
    return torch.frombuffer(bytearray(raw), dtype=dtype)


# --- the list: our own constructors for what a file may name ------------------------------


def nothing_allowed(module: str, name: str) -> object:
    """The list for parts of a file that hold plain numbers and text."""
    raise ValueError(f"it asks for {quoted(f'{module}.{name}')} where only plain data belongs")


def storages_only(module: str, name: str) -> object:
    """The list for a storage inside of a pickle: it can name the kind of storage."""
    found = ALLOWED.get((module, name))
    if not isinstance(found, StorageType):
        raise ValueError(f"refused: a storage asks for {quoted(f'{module}.{name}')}")
    return found


def allowed(foreign: Literal["refuse", "inert"]) -> Find:
    """The list itself, with or without inert stand-ins for what is not on it."""

    def find(module: str, name: str) -> object:
        dotted = f"{module}.{name}"
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if foreign == "inert":
            return Constructor(dotted, stand_in(dotted))
        raise ValueError(f"refused: it asks for {quoted(dotted)}, which is not allowed in it")

    return find


def stand_in(dotted: str) -> Callable[..., Persistent]:
    """A constructor of inert objects of a class that stays unknown."""
    return lambda *args: Persistent(dotted, {}, args)


def persistent(meta: Any) -> Persistent:
    """`torch_utils.persistence._reconstruct_persistent_obj`: keeps the name and the state."""
    if not isinstance(meta, dict) or meta.get("type") != "class":
        raise ValueError("a persistent object has no description of its class")
    name, state = meta.get("class_name"), meta.get("state")
    if not isinstance(name, str) or not isinstance(state, dict | None):
        raise ValueError("a persistent object has no class name or no state")
    return Persistent(quoted(name), {} if state is None else state)


def storage_from_bytes(raw: Any) -> Storage:
    """`torch.storage._load_from_bytes`: an old torch.save stream with one storage in it."""
    if not isinstance(raw, bytes):
        raise ValueError(f"a storage is a {type(raw).__name__}, not bytes")
    source = Source(io.BytesIO(raw), len(raw))
    if not is_legacy(raw[:64]):
        raise ValueError("a storage is not a stream of torch.save")
    value = read_legacy(source, storages_only)
    if not isinstance(value, Storage) or source.left():
        raise ValueError("a storage holds something else than a storage")
    return value


def whole(value: Any) -> int:
    """A count: an int, not negative."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{quoted(value)} is not a count")
    return value


def tensor(storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`: a view of a storage, inside of it."""
    if not isinstance(storage, Storage) or len(size) != len(stride):
        raise ValueError("a tensor has no storage, or a shape that is broken")
    size, stride = [whole(n) for n in size], [whole(n) for n in stride]
    values = storage.values
    count, last = 1, whole(offset)
    for n, step in zip(size, stride, strict=True):
        count, last = count * n, last + (n - 1) * step
    if count and (last >= len(values) or count > len(values)):
        raise ValueError(f"a tensor of shape {tuple(size)} reaches beyond its storage")
    if not count:
        if len(size) > 64 or any(n > 1 << 40 for n in size):
            raise ValueError(f"a tensor of shape {quoted(str(size))} is out of bounds")
        return torch.empty(size, dtype=values.dtype)
    return values.as_strided(size, stride, offset)


def tensor_of_dtype(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v3`: as v2, with the dtype apart from the storage."""
    _grad, _hooks, dtype, *_ = rest
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor has no storage or no dtype")
    values = storage.values
    if values.nbytes % dtype.itemsize or values.dtype == torch.bool:
        raise ValueError(f"a storage of {values.nbytes} bytes does not hold {dtype}")
    return tensor(Storage(values.view(torch.uint8).view(dtype)), offset, size, stride)


def parameter(data: Any, *_rest: Any) -> Tensor:
    """`torch._utils._rebuild_parameter`: the tensor itself."""
    if not isinstance(data, Tensor):
        raise ValueError(f"a parameter is a {type(data).__name__}, not a tensor")
    return data


def tensor_with_state(rebuild: Any, _kind: Any, args: Any, _state: Any) -> Tensor:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with Python attributes, which we drop."""
    if not isinstance(rebuild, Constructor) or rebuild.name not in TENSORS:
        raise ValueError("a tensor is made by something that makes no tensors")
    return parameter(rebuild.build(*args))


def dict_of_pairs(entries: Iterable[Any] = ()) -> dict[Any, Any]:
    """`collections.OrderedDict`, `dnnlib.util.EasyDict`: a plain dict."""
    if isinstance(entries, dict):
        return dict(entries)
    return {key(k): v for k, v in entries}


def set_of(entries: Iterable[Any] = ()) -> set[Any]:
    """`builtins.set`."""
    return {key(v) for v in entries}


def encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """`_codecs.encode`: how protocols 0 to 2 write bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes are not written as latin1 text")
    return text.encode("latin1")


def instance(target: Any, base: Any, state: Any) -> Any:
    """`copyreg._reconstructor`: how protocols 0 and 1 write instances."""
    if not isinstance(target, Constructor) or not isinstance(base, Marker):
        raise ValueError("it makes an instance of something that is not a class")
    return target.build() if state is None else target.build(state)


def size_of(sizes: Iterable[Any] = ()) -> tuple[int, ...]:
    """`torch.Size`."""
    return tuple(whole(n) for n in sizes)


def device_name(*args: Any) -> str:
    """`torch.device`: its name only."""
    return ":".join(quoted(str(a)) for a in args)


NUMPY_SCALARS = {"b1": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I"}
NUMPY_SCALARS |= {"i8": "q", "u8": "Q", "f2": "e", "f4": "f", "f8": "d"}


def numpy_scalar(dtype: Any, raw: Any = None) -> Any:
    """`numpy.core.multiarray.scalar`: a Python number."""
    code = dtype.args[0] if isinstance(dtype, Persistent) and dtype.args else None
    if not isinstance(code, str) or code not in NUMPY_SCALARS or not isinstance(raw, bytes):
        raise ValueError("a numpy scalar is not a plain number")
    _version, order, *_ = dtype.state.get("") or (3, "<")
    return struct.unpack((">" if order == ">" else "<") + NUMPY_SCALARS[code], raw)[0]


def constructors(entries: dict[str, Callable[..., object]]) -> dict[tuple[str, str], object]:
    """A table by (module, name) from one by dotted name."""
    return {split(dotted): Constructor(dotted, build) for dotted, build in entries.items()}


def split(dotted: str) -> tuple[str, str]:
    """Module and name."""
    module, _, name = dotted.rpartition(".")
    return module, name


TENSORS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_tensor_v3": tensor_of_dtype,
    "torch._utils._rebuild_parameter": parameter,
    "torch._utils._rebuild_parameter_with_state": parameter,
}
ALLOWED: dict[tuple[str, str], object] = {
    **constructors(TENSORS),
    **constructors(
        {
            "torch_utils.persistence._reconstruct_persistent_obj": persistent,
            "torch.storage._load_from_bytes": storage_from_bytes,
            "torch._tensor._rebuild_from_type_v2": tensor_with_state,
            "torch.Size": size_of,
            "torch.device": device_name,
            "collections.OrderedDict": dict_of_pairs,
            "dnnlib.util.EasyDict": dict_of_pairs,
            "builtins.set": set_of,
            "__builtin__.set": set_of,
            "_codecs.encode": encoded,
            "copyreg._reconstructor": instance,
            "copy_reg._reconstructor": instance,
            "numpy.dtype": stand_in("numpy.dtype"),
        }
    ),
    **constructors(
        {
            f"numpy.{core}.multiarray.{name}": build
            for core in ("core", "_core")
            for name, build in (
                ("scalar", numpy_scalar),
                ("_reconstruct", lambda *_args: Persistent("numpy.ndarray", {})),
            )
        }
    ),
    **constructors(
        {
            f"torch.nn.modules.container.{name}": stand_in(f"torch.nn.modules.container.{name}")
            for name in CONTAINERS
        }
    ),
    **{("torch", name): getattr(torch, name) for name in DTYPES if name in vars(torch)},
    **{
        (module, name): StorageType(dtype)
        for module in ("torch", "torch.cuda", "torch.storage")
        for name, dtype in STORAGES.items()
    },
    **{
        split(dotted): Marker(dotted)
        for dotted in (
            "builtins.object",
            "builtins.dict",
            "__builtin__.object",
            "__builtin__.dict",
            "torch.Tensor",
            "torch.nn.parameter.Parameter",
            "numpy.ndarray",
        )
    },
}
