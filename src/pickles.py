"""Pickles and torch.save files as inert data: nothing that a file names is imported or called.

Plain pickles, as those of NVIDIA's `torch_utils.persistence`; both layouts of torch.save; and
TorchScript archives, whose code stays where it is. Tensors come out on the CPU, whatever device
they were saved from. Nothing is allocated that a file claims and does not hold.
"""

import io
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from src.unpickler import Global, Inert, Reader, Storage, quoted, whole

__all__ = ["Global", "Inert", "module_tensors", "read_pickle", "read_tensors"]

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the older torch.save
MAPPED = 64 << 20  # larger files are mapped, so that their tensors are read when they are used
NO_VIEW = ([], [None])  # of a storage in another one
MOST_MODULES = 100_000
STORAGES = {
    **{"Float": torch.float32, "Double": torch.float64, "Half": torch.float16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8},
    **{"Byte": torch.uint8, "Untyped": torch.uint8, "Bool": torch.bool},
    **{"BFloat16": torch.bfloat16, "ComplexFloat": torch.complex64},
    "ComplexDouble": torch.complex128,
}
BROKEN = (
    *(ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError),
    *(EOFError, MemoryError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile),
    struct.error,
)


def read_pickle(path: str | Path) -> Any:
    """The content of a pickle or torch.save file: plain data, tensors, `Global`s and `Inert`s.

    OrderedDict and EasyDict come out as dict, parameters as plain tensors. Raises ValueError, in
    one line with the path: not there, not a pickle, cut short, a size claimed that the file does
    not hold, or a call that is not allowed, by its name.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return read_file(file, path.stat().st_size)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ValueError(f"{path}: {reason or error}") from None
    except BROKEN as error:
        text = "".join(c if c.isprintable() else "?" for c in str(error)[:300])
        if isinstance(error, EOFError | struct.error):
            text = "it is empty or cut short"
        elif type(error) is not ValueError:
            text = f"no pickle, or a broken one ({type(error).__name__}: {text})"
        raise ValueError(f"{path}: {text}") from None


def read_tensors(path: str | Path, inside: str = "state_dict") -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: of a state dict, a pickled module, a TorchScript file.

    A state dict may lie under the key `inside`; what is no tensor is left out. Raises ValueError
    in one line with the path: as `read_pickle`, and where there is no tensor.
    """
    content = read_pickle(path)
    for _ in range(4):
        if isinstance(content, dict) and inside in content:
            content = content[inside]
    kind = type(content).__name__
    if isinstance(content, dict):
        content = Inert("dict", state=content)
    elif isinstance(content, Inert) and content.items:  # a dict of a class of its own
        content = Inert("dict", state=content.items)
    tensors = module_tensors(content) if isinstance(content, Inert) else {}
    if not tensors:
        raise ValueError(f"{path}: it holds a {kind} and no tensors by name")
    return tensors


def module_tensors(module: Inert) -> dict[str, Tensor]:
    """Parameters and buffers of a pickled or scripted module and those in it, by dotted name."""
    tensors: dict[str, Tensor] = {}
    rest = [("", module)]
    for _ in range(MOST_MODULES):
        if not rest:
            return tensors
        prefix, part = rest.pop()
        groups = [part.state.get(name) for name in ("_parameters", "_buffers", "_modules")]
        groups = [group for group in groups if isinstance(group, dict)] or [part.state]
        named = [(prefix + n, v) for g in groups for n, v in g.items() if isinstance(n, str)]
        tensors |= {name: value for name, value in named if isinstance(value, Tensor)}
        children = [(f"{name}.", value) for name, value in named if isinstance(value, Inert)]
        rest += reversed(children if len(prefix) < 1000 else [])
    raise ValueError(f"it has more than {MOST_MODULES} modules within each other")


# --- layouts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A file of known size, of which no more is asked for than it holds."""

    file: BinaryIO
    size: int

    def read(self, n: int) -> bytes:
        """The next n bytes, or all that are left."""
        return self.file.read(n if n < 4096 else min(n, self.size - self.file.tell()))

    def readline(self) -> bytes:
        """The next line, with its end."""
        return self.file.readline()


def read_file(file: BinaryIO, size: int) -> Any:
    """The object of a file in any of the layouts, told apart by their first bytes."""
    head = file.read(32)
    file.seek(0)
    if head.startswith(b"PK\x03\x04"):
        return read_zip(file, size)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError("it is a git-lfs pointer, not the file itself: `git lfs pull` fetches it")
    source = Source(file, size)
    if MAGIC.to_bytes(10, "little") in head:
        return read_legacy(source, size)
    value = Reader(source, size, load=storage_from_bytes).load()
    if source.read(1):
        raise ValueError("more bytes follow the end of the pickle")
    return value


def read_zip(file: BinaryIO, size: int) -> Any:
    """The torch.save of today: a zip with `ROOT/data.pkl` and `ROOT/data/NAME`."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    file.seek(0)
    if size > MAPPED:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    else:
        data = memoryview(bytearray(file.read(size)))
    roots = [n[:-8] for n in entries if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(roots) != 1:
        raise ValueError("it is a zip without one data.pkl, so not from torch.save")

    def content(name: str) -> memoryview:
        entry = entries.get(roots[0] + name)
        if entry is None:
            raise ValueError(f"the entry {quoted(roots[0] + name)} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(data):
            raise ValueError(f"the entry {quoted(roots[0] + name)} is compressed or too large")
        start = entry.header_offset + 30  # then its name and an extra field, whose lengths are
        start += sum(struct.unpack_from("<HH", data, start - 4))
        return data[start : start + entry.file_size]

    if roots[0] + "byteorder" in entries and content("byteorder") != b"little":
        raise ValueError("it was saved on a big-endian machine")
    pickled = content("data.pkl")
    storages = Storages(len(data), content)
    return Reader(io.BytesIO(pickled), len(pickled), refer=storages.claim).load()


def read_legacy(stream: Any, size: int) -> Any:
    """The older torch.save: magic, version, system, object, storage names, then storages."""
    magic, version, system = (Reader(stream, size).load() for _ in range(3))
    if not isinstance(magic, int) or not isinstance(version, int) or version != VERSION:
        raise ValueError("its version of the torch.save layout is not one that is read")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("it was saved on a big-endian machine")
    storages = Storages(size)
    value = Reader(stream, size, refer=storages.claim).load()
    names = Reader(stream, size).load()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its list of storages is broken")
    if len(names) != len(set(names)) or set(names) != set(storages.storages):
        raise ValueError("its list of storages is not that of its tensors")
    for name in names:
        values = storages.storages[name].values
        (count,) = struct.unpack("<q", stream.read(8))
        raw = stream.read(values.nbytes)
        if count != len(values) or len(raw) != values.nbytes:
            raise ValueError(f"a storage of {len(values)} numbers claims {count}, or is cut short")
        values.copy_(from_bytes(raw, values.dtype))
    return value


@dataclass
class Storages:
    """The storages that a torch.save pickle refers to, each made once and within reach."""

    left: int  # bytes that may still be claimed
    content: Callable[[str], memoryview] | None = None  # of a zip; the older layout fills in later
    storages: dict[str, Storage] = field(default_factory=dict)

    def claim(self, reference: Any) -> object:
        """("storage", type, name, device, count) -> the storage; the device is ignored.

        ("module", class, file, source), of the older layout, is the class; the rest is dropped.
        """
        match reference:
            case ("module", Global() as kind, _, _):
                return kind
            case ("storage", Global(kind), str(name), _, count, *view) if view in NO_VIEW:
                dtype = STORAGES.get(kind.rpartition(".")[2].removesuffix("Storage"))
                if dtype is None or not kind.startswith("torch."):
                    raise ValueError(f"it has a storage of the kind {quoted(kind)}")
                return self.storage(name, dtype, whole(count))
        raise ValueError("it has a reference that is not one to a storage")

    def storage(self, name: str, dtype: torch.dtype, count: int) -> Storage:
        """The storage of that name; a new one is zeros for now, or its entry's content."""
        claimed = count * dtype.itemsize
        if name not in self.storages:
            self.left -= claimed
            if self.left < 0:
                raise ValueError(f"a storage claims {claimed} bytes, more than the file holds")
            raw = self.content(f"data/{name}") if self.content else None
            if raw is not None and len(raw) != claimed:
                raise ValueError(f"a storage of {len(raw)} bytes claims to hold {claimed}")
            values = torch.zeros(count, dtype=dtype) if raw is None else from_bytes(raw, dtype)
            self.storages[name] = Storage(values)
        values = self.storages[name].values
        if (values.dtype, len(values)) != (dtype, count):
            raise ValueError(f"the storage {quoted(name)} is claimed in two ways")
        return self.storages[name]


def from_bytes(raw: bytes | memoryview, dtype: torch.dtype) -> Tensor:
    """Little-endian bytes as a tensor [n]; an aligned memoryview is not copied."""
    if not raw:
        return torch.empty(0, dtype=dtype)
    view = raw if isinstance(raw, memoryview) else bytearray(raw)
    if dtype == torch.bool:
        return torch.frombuffer(view, dtype=torch.uint8) != 0
    values = torch.frombuffer(view, dtype=dtype)
    return values.clone() if values.data_ptr() % 16 else values


def storage_from_bytes(raw: Any) -> Storage:
    """`torch.storage._load_from_bytes`: a stream of the older torch.save with one storage."""
    if not isinstance(raw, bytes):
        raise ValueError(f"a storage is a {type(raw).__name__}, not bytes")
    value = read_legacy(io.BytesIO(raw), len(raw))
    if not isinstance(value, Storage):
        raise ValueError("a storage holds something else than a storage")
    return value
