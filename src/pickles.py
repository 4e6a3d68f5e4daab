"""Pickles and torch.save files as inert data: nothing that a file names is imported or called.

Plain pickles, as those of NVIDIA's `torch_utils.persistence`; both layouts of torch.save; and
TorchScript archives. Tensors come out on the CPU, and nothing is allocated that a file claims and
does not hold.
"""

import io
import mmap
import pickle
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from src.inert import (
    Global,
    Inert,
    dict_of,
    encoded,
    first,
    key,
    numpy_scalar,
    persistent,
    quoted,
    tensor,
    tensor_of_dtype,
    whole,
)

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the older torch.save
MOST_NAMES = 200_000
SPARE = 1 << 16  # values that calls may copy beyond four times the bytes of the file
DTYPES = {
    **{"Float": torch.float32, "Double": torch.float64, "Half": torch.float16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8},
    **{"Byte": torch.uint8, "Untyped": torch.uint8, "Bool": torch.bool},
    **{"ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
    "BFloat16": torch.bfloat16,
}
RENAMED = {**IMPORT_MAPPING, "numpy._core.multiarray": "numpy.core.multiarray"}  # Python 2's first
STANDARD = {*sys.stdlib_module_names, "nt", "posix"}
VALUES = {
    *("abc", "argparse", "collections", "dataclasses", "datetime", "decimal", "enum", "fractions"),
    *("functools", "logging", "math", "numbers", "pathlib", "string", "types", "typing", "uuid"),
}
"""Modules of the standard library that may be named, as what they hold are values."""
BUILTINS = {
    *("object", "type", "bool", "int", "float", "complex", "str", "bytes", "bytearray", "long"),
    *("tuple", "list", "set", "frozenset", "dict", "range", "slice", "unicode"),
}
FACTORIES = (
    *("torch._utils._rebuild_", "torch.device", "numpy.dtype", "numpy.random."),
    *("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"),
)
"""What makes objects that stay inert, and has the name of a function."""
BROKEN = (
    *(ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError, struct.error),
    *(AssertionError, MemoryError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile),
)
"""What reading raises on a file that is none, or is damaged."""


def read_pickle(path: str | Path) -> Any:
    """The content of a pickle or torch.save file: plain data, tensors, `Global`s and `Inert`s.

    OrderedDict and EasyDict come out as dict, parameters as plain tensors. Raises ValueError, in
    one line with the path: not there, not a pickle, cut short, a size claimed that the file does
    not hold, or a global that is not allowed, by its name.
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


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: of a state dict, a pickled module, a TorchScript file.

    A state dict may lie under the key `state_dict`; what is no tensor is left out. Raises
    ValueError in one line with the path: as `read_pickle`, and where there is no tensor.
    """
    content = read_pickle(path)
    for _ in range(4):
        if isinstance(content, dict) and "state_dict" in content:
            content = content["state_dict"]
    kind = type(content).__name__
    content = content.items or content if isinstance(content, Inert) else content
    content = Inert("dict", state=content) if isinstance(content, dict) else content
    tensors = module_tensors(content) if isinstance(content, Inert) else {}
    if not tensors:
        raise ValueError(f"{path}: it holds a {kind} and no tensors by name")
    return tensors


def module_tensors(module: Inert) -> dict[str, Tensor]:
    """Parameters and buffers of a module and those in it, by name; ValueError for too many."""
    tensors, rest, names = dict[str, Tensor](), [("", module)], 0
    while rest and names <= MOST_NAMES:
        prefix, part = rest.pop()
        groups = [part.state.get(name) for name in ("_parameters", "_buffers", "_modules")]
        groups = [group for group in groups if isinstance(group, dict)] or [part.state]
        named = [(prefix + n, v) for g in groups for n, v in g.items() if isinstance(n, str)]
        tensors |= {name: value for name, value in named if isinstance(value, Tensor)}
        children = [(f"{name}.", value) for name, value in named if isinstance(value, Inert)]
        names += 1 + len(named)
        rest += reversed(children if len(prefix) < 1000 else [])
    if rest:
        raise ValueError(f"it has more than {MOST_NAMES} modules or tensors within each other")
    return tensors


# --- layouts ----------------------------------------------------------------------------------


def read_file(file: BinaryIO, size: int) -> Any:
    """The object of a file in any layout, by its first bytes; raises one of BROKEN for others."""
    if not size:
        raise EOFError
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # read where it is used
    if data[:4] == b"PK\x03\x04":
        return read_zip(file, data)
    if data[:23] == b"version https://git-lfs":
        raise ValueError("it is a git-lfs pointer, not the file itself: `git lfs pull` fetches it")
    if MAGIC.to_bytes(10, "little") in data[:32]:
        return read_legacy(data, size)
    value = Reader(data, size).load()
    if data.tell() != size:
        raise ValueError("more bytes follow the end of the pickle")
    return value


def read_zip(file: BinaryIO, data: mmap.mmap | bytearray) -> Any:
    """The torch.save of today: a zip with `ROOT/data.pkl` and `ROOT/data/NAME`, and its bytes.

    Raises one of BROKEN for another.
    """
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
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
        return memoryview(data)[start : start + entry.file_size]

    def storage(name: str, dtype: torch.dtype, size: int) -> Tensor:
        raw = content(f"data/{name}")
        if len(raw) != size:
            raise ValueError(f"a storage of {len(raw)} bytes claims to hold {size}")
        return from_bytes(raw, dtype)

    if roots[0] + "byteorder" in entries and content("byteorder") != b"little":
        raise ValueError("it was saved on a big-endian machine")
    return Reader(io.BytesIO(content("data.pkl")), len(data), storage).load()


def read_legacy(stream: Any, size: int) -> Any:
    """The older torch.save: magic, version, system, object, storage names, then storages."""

    def zeros(_name: str, dtype: torch.dtype, size: int) -> Tensor:
        return torch.zeros(size // dtype.itemsize, dtype=dtype)

    reader = Reader(stream, size, zeros)
    magic, version, system, value, names = (reader.load() for _ in range(5))
    if not isinstance(magic, int) or not isinstance(version, int) or version != VERSION:
        raise ValueError("its version of the torch.save layout is not one that is read")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("it was saved on a big-endian machine")
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not texts or sorted(names) != sorted(reader.storages):
        raise ValueError("its list of storages is not that of its tensors")
    for name in names:
        values = reader.storages[name]
        (count,) = struct.unpack("<q", stream.read(8))
        raw = stream.read(values.nbytes)
        if count != len(values) or len(raw) != values.nbytes:
            raise ValueError(f"a storage of {len(values)} numbers claims {count}, or is cut short")
        values.copy_(from_bytes(raw, values.dtype))
    return value


def from_bytes(raw: bytes | memoryview, dtype: torch.dtype) -> Tensor:
    """Little-endian bytes as a tensor [n]; an aligned memoryview is not copied."""
    if not raw:
        return torch.empty(0, dtype=dtype)
    view = raw if isinstance(raw, memoryview) else bytearray(raw)
    if dtype == torch.bool:
        return torch.frombuffer(view, dtype=torch.uint8) != 0
    values = torch.frombuffer(view, dtype=dtype)
    return values.clone() if values.data_ptr() % 16 else values


# --- the unpickler ----------------------------------------------------------------------------


class Reader(pickle._Unpickler):
    """Python's unpickler, for a stream of `size` bytes, with inert values for what it names.

    `content` (name, dtype, bytes) gives a storage of a torch.save file; a plain pickle has none.
    It is the unpickler written in Python: the one in C allocates what a file claims, and hashes
    keys that take for ever or overflow its stack.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    append: Callable[[object], None]

    def __init__(
        self,
        stream: Any,
        size: int,
        content: Callable[[str, torch.dtype, int], Tensor] | None = None,
    ) -> None:
        super().__init__(stream, encoding="latin1")
        self.content, self.storages = content, dict[str, Tensor]()
        self.room, self.budget = size, 4 * size + SPARE

    def load(self) -> Any:
        """The next object of the stream."""
        self.memo: dict[int, Any] = {}
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        """The name itself, or a dtype; ValueError for what no file of tensors has to name."""
        dotted = f"{RENAMED.get(module, module)}.{name}"
        root, _, rest = dotted.partition(".")
        allowed = root in VALUES or (root == "builtins" and rest in BUILTINS)
        if root in STANDARD and not allowed and dotted not in MAKERS and dotted not in INSTANCES:
            asked = quoted(f"{module}.{name}")
            raise ValueError(f"refused: it asks for {asked}, which is not allowed in it")
        if dotted == "torch.storage._load_from_bytes" and self.content:
            raise ValueError("it has a storage where none belongs")
        dtype = vars(torch).get(rest) if root == "torch" else None
        return dtype if isinstance(dtype, torch.dtype) else Global(dotted)

    def persistent_load(self, pid: Any) -> Any:
        """("storage", type, name, device, count) -> the storage; the device is ignored.

        ("module", class, file, source), of the older layout, is the class; the rest is dropped.
        """
        if self.content is None:
            raise ValueError("it has a storage where none belongs")
        match pid:
            case ("module", Global() as kind, _, _):
                return kind
            case ("storage", Global(kind), str(name), _, count, *view) if view in ([], [None]):
                dtype = DTYPES.get(kind.rpartition(".")[2].removesuffix("Storage"))
            case _:
                raise ValueError("it has a reference that is not one to a storage")
        if dtype is None or not kind.startswith("torch."):
            raise ValueError(f"it has a storage of the kind {quoted(kind)}")
        if name not in self.storages:
            claimed = whole(count) * dtype.itemsize
            self.room -= claimed
            if self.room < 0:
                raise ValueError(f"a storage claims {claimed} bytes, more than the file holds")
            self.storages[name] = self.content(name, dtype, claimed)
        values = self.storages[name]
        if (values.dtype, len(values)) != (dtype, count):
            raise ValueError(f"the storage {quoted(name)} is claimed in two ways")
        return values

    def spend(self, *values: object) -> None:
        """Count what is about to be copied; ValueError where a small file grows without end."""
        copied = (str, bytes, list, tuple, dict, set, frozenset)
        self.budget -= sum(len(v) for v in values if isinstance(v, copied))
        if self.budget < 0:
            raise ValueError("it builds far more than the file holds")

    def call(self, target: object, args: object, is_class: bool = False) -> object:
        """What a call gives: what our own code makes of it, else an `Inert`, or ValueError."""
        if not isinstance(target, Global):
            raise ValueError(f"refused: it calls a {type(target).__name__}, not a class")
        name, last = target.name, target.name.rpartition(".")[2].lstrip("_")
        if not isinstance(args, tuple):
            raise ValueError(f"refused: it calls {quoted(name)} without a tuple")
        self.spend(args, *args)
        if name in INSTANCES:
            given = args[INSTANCES[name] :]
            return self.call(args[0], tuple(a for a in given if a is not None), True)
        if last == "reconstruct_persistent_obj":
            return persistent(*args)
        if name in MAKERS:
            return MAKERS[name](*args)
        standard = name.partition(".")[0] in STANDARD
        is_class = name.count(".") == 1 if standard else is_class  # a value, by `find_class`
        if is_class or last[:1].isupper() or name.startswith(FACTORIES):
            return Inert(name, args)
        raise ValueError(f"refused: it calls {quoted(name)}, which is not allowed in it")

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args)

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args, True)

    def load_newobj_ex(self) -> None:
        names = self.stack.pop()
        self.stack[-1] += (names,) if names else ()
        self.load_newobj()

    def _instantiate(self, klass: Any, args: Any) -> None:
        """INST and OBJ: the class, and its arguments above a mark."""
        self.append(self.call(klass, tuple(args), True))

    def load_build(self) -> None:
        """Attributes: kept by an `Inert`, dropped for a dict, refused for the rest."""
        state, target = self.stack.pop(), self.stack[-1]
        self.spend(state)
        if isinstance(target, Inert):
            target.state.update(state if isinstance(state, dict) else {"": state})
        elif not isinstance(target, dict):
            raise ValueError(f"it sets attributes of a {type(target).__name__}")

    def fill(self, values: list[Any]) -> None:
        """Put values into the set on top, or key, value, ... into the dict; else ValueError."""
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(map(key, values))
        elif isinstance(target, dict | Inert) and len(values) % 2 == 0:
            mapping = target if isinstance(target, dict) else target.items
            mapping.update(dict_of(zip(values[::2], values[1::2], strict=True)))
        else:
            raise ValueError(f"it sets entries of a {type(target).__name__}")

    def load_setitem(self) -> None:
        self.fill([self.stack.pop(-2), self.stack.pop()])  # key and value

    def load_setitems(self) -> None:
        self.fill(self.pop_mark())

    load_additems = load_setitems

    def load_dict(self) -> None:
        pairs = self.pop_mark()
        self.append({})
        self.fill(pairs)

    def load_frozenset(self) -> None:
        self.append(frozenset(map(key, self.pop_mark())))

    def load_put(self) -> None:
        index = int(self.readline()[:-1])
        if not 0 <= index < 1 << 31:  # wider ones can share a hash
            raise ValueError("it counts what it holds by numbers that are too wide")
        self.memo[index] = self.stack[-1]

    def load_bytearray8(self) -> None:
        self.append(self.read(*struct.unpack("<Q", self.read(8))))

    def get_extension(self, code: int) -> None:
        raise ValueError(f"refused: it uses the extension code {code}")


for code, load in Reader.dispatch.items():  # the methods above in the place of Python's own
    Reader.dispatch[code] = getattr(Reader, load.__name__)


# --- what our own code makes of a call --------------------------------------------------------


def load_from_bytes(raw: Any) -> Tensor:
    """`torch.storage._load_from_bytes`: the older torch.save of one storage, or ValueError."""
    if not isinstance(raw, bytes):
        raise ValueError(f"a storage is a {type(raw).__name__}, not bytes")
    value = read_legacy(io.BytesIO(raw), len(raw))
    if not isinstance(value, Tensor):
        raise ValueError("a storage holds something else than a storage")
    return value


INSTANCES = {"copyreg._reconstructor": 2, "copyreg.__newobj__": 1}
"""How protocols 0 and 1 write instances: the class first, its arguments from there on."""
TENSORS: dict[Global, Callable[..., Tensor]] = {
    Global("torch._utils._rebuild_tensor"): tensor,
    Global("torch._utils._rebuild_tensor_v2"): tensor,
    Global("torch._utils._rebuild_tensor_v3"): tensor_of_dtype,
    Global("torch._utils._rebuild_parameter"): first,
    Global("torch._utils._rebuild_parameter_with_state"): first,
}
MAKERS: dict[str, Callable[..., object]] = {
    **{kind.name: make for kind, make in TENSORS.items()},
    "torch._tensor._rebuild_from_type_v2": lambda make, _kind, args, _state: TENSORS[make](*args),
    "torch.storage._load_from_bytes": load_from_bytes,
    "torch.Size": lambda sizes=(): tuple(whole(n) for n in sizes),
    **{f"torch.jit._pickle.build_{n}list": first for n in ("int", "double", "bool", "tensor")},
    "torch.jit._pickle.restore_type_tag": first,
    "collections.OrderedDict": dict_of,
    "dnnlib.util.EasyDict": dict_of,
    "builtins.dict": dict_of,
    "builtins.set": lambda entries=(): {key(v) for v in entries},
    "_codecs.encode": encoded,
    "numpy.core.multiarray.scalar": numpy_scalar,
    "numpy.core.multiarray._reconstruct": lambda *_args: Inert("numpy.ndarray"),
}
