"""Python's unpickler as a reader of inert data: nothing that a stream names is imported or called.

A global stays its name. A call of one of `MAKERS` runs our code (tensors, dicts, numbers), of any
other class gives an `Inert`, of a function is refused by its name; persistent objects of NVIDIA's
`torch_utils.persistence` become an `Inert`, and the source code that they carry is dropped unread.
"""

import pickle
import struct
import sys
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

MOST_OPERATIONS = 5_000_000  # a network has about 20 to 60 a parameter
SPARE = 1 << 16  # values that calls may handle beyond four times the bytes of the stream
RENAMED = {**IMPORT_MAPPING, "numpy._core.multiarray": "numpy.core.multiarray"}  # Python 2's first
STANDARD = {*sys.stdlib_module_names, "nt", "posix"}
VALUES = {
    *("abc", "argparse", "collections", "dataclasses", "datetime", "decimal", "enum", "fractions"),
    *("functools", "logging", "math", "numbers", "pathlib", "string", "time", "typing", "uuid"),
}
"""Modules of the standard library that may be named, as what they hold are values."""
BUILTINS = {
    *("object", "type", "bool", "int", "float", "complex", "str", "bytes", "bytearray", "long"),
    *("tuple", "list", "set", "frozenset", "dict", "range", "slice", "unicode"),
}
LOWERCASE = {
    *("functools.partial", "collections.deque", "collections.defaultdict", "logging.getLogger"),
    *("datetime.datetime", "datetime.date", "datetime.timedelta", "types.SimpleNamespace"),
    *("numpy.dtype", "numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"),
    *(f"builtins.{n}" for n in ("object", "complex", "range", "slice", "bytearray", "frozenset")),
}
"""What makes objects that stay inert, and has the name of a function; so has all of FACTORIES."""
FACTORIES = ("numpy.random.", "torch._utils._rebuild_")
NUMPY_SCALARS = {"b1": "?", "i4": "i", "i8": "q", "u8": "Q", "f2": "e", "f4": "f", "f8": "d"}
COPIED = (str, bytes, list, tuple, dict, set, frozenset)
PLAIN = (str, bytes, int, float, type(None), torch.dtype)
INSTANCES = {"copyreg._reconstructor": 2, "copyreg.__newobj__": 1}
"""How protocols 0 and 1 write instances: the class first, its arguments from there on."""


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


@dataclass(frozen=True, eq=False)
class Storage:
    """The numbers of a storage, [n]."""

    values: Tensor


def quoted(text: object, length: int = 160) -> str:
    """Text of a file made fit for one line of a terminal."""
    return str(text)[:length].encode("unicode_escape").decode("ascii")[:length]


def no_storages(_what: object) -> object:
    """For layouts, and parts of them, in which no storage belongs."""
    raise ValueError("it has a storage where none belongs")


class Operations(dict[int, Any]):
    """Methods by their codes, for as many operations as a file of tensors may have."""

    left = MOST_OPERATIONS

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it has more than {MOST_OPERATIONS} operations")
        return super().__getitem__(code)


class Reader(pickle._Unpickler):
    """The unpickler of a stream of `size` bytes, every operation replaced that touches an object.

    `refer` gives the storage of a persistent id, `load` that of a torch.save stream in bytes. It
    is the one written in Python: the one in C allocates what a file claims, keeps extension codes
    in a cache, and hashes keys that take forever or overflow its stack.
    """

    methods: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    dispatch: Any
    stack: list[Any]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def __init__(
        self,
        stream: Any,
        size: int,
        *,
        refer: Callable[[Any], object] = no_storages,
        load: Callable[[Any], object] = no_storages,
    ) -> None:
        super().__init__(stream, encoding="latin1")
        self.dispatch = Operations(self.methods)
        self.refer, self.load_storage = refer, load
        self.budget = 4 * size + SPARE

    def persistent_load(self, pid: Any) -> Any:
        """The storage that is referred to."""
        return self.refer(pid)

    def find_class(self, module: str, name: str) -> Any:
        """The name itself, or a dtype; ValueError for what no file of tensors has to name."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("it names a global by something that is not text")
        dotted = f"{RENAMED.get(module, module)}.{name}"
        root, _, rest = dotted.partition(".")
        allowed = root in VALUES or (root == "builtins" and rest in BUILTINS)
        if root in STANDARD and not allowed and dotted not in NAMED:
            asked = quoted(f"{module}.{name}")
            raise ValueError(f"refused: it asks for {asked}, which is not allowed in it")
        dtype = vars(torch).get(rest) if root == "torch" else None
        return dtype if isinstance(dtype, torch.dtype) else Global(dotted)

    def call(self, target: object, args: object, is_class: bool = False) -> object:
        """What a call gives: what our own code makes of it, else an `Inert` of a class."""
        if not isinstance(target, Global):
            raise ValueError(f"refused: it calls a {type(target).__name__}, not a class")
        if not isinstance(args, tuple):
            raise ValueError(f"refused: it calls {quoted(target.name)} without a tuple")
        self.spend(args, *args)
        last = target.name.rpartition(".")[2].lstrip("_")
        if target.name in INSTANCES:
            given = args[INSTANCES[target.name] :]
            return self.call(args[0], tuple(a for a in given if a is not None), True)
        if last == "reconstruct_persistent_obj":
            return persistent(*args)
        if target.name == "torch.storage._load_from_bytes":
            return self.load_storage(*args)
        if target.name in MAKERS:
            return MAKERS[target.name](*args)
        is_class = is_class and target.name.partition(".")[0] not in STANDARD
        is_class = is_class or last[:1].isupper() or target.name.startswith(FACTORIES)
        if is_class or target.name in LOWERCASE:
            return Inert(target.name, args)
        raise ValueError(f"refused: it calls {quoted(target.name)}, which is not allowed in it")

    def spend(self, *values: object) -> None:
        """Count what is about to be copied; ValueError where a small stream grows without end."""
        self.budget -= sum(len(v) for v in values if isinstance(v, COPIED))
        if self.budget < 0:
            raise ValueError("it builds far more than the file holds")

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args)

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args, True)

    def load_newobj_ex(self) -> None:
        names = self.stack.pop()
        self.load_newobj()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].args += (names,)
        elif names:
            raise ValueError("it calls with keyword arguments")

    def _instantiate(self, klass: Any, args: Any) -> None:
        """INST and OBJ: the class, and its arguments above a mark."""
        self.append(self.call(klass, tuple(args), True))

    def load_build(self) -> None:
        """Attributes: kept by an `Inert`, dropped for a dict, refused for the rest."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert):
            self.spend(state)
            target.state.update(state if isinstance(state, dict) else {"": state})
        elif not isinstance(target, dict):
            raise ValueError(f"it sets attributes of a {type(target).__name__}")

    def fill(self, pairs: list[Any]) -> None:
        """Put key, value, key, value, ... into the dict or `Inert` on top."""
        target = self.stack[-1]
        mapping = target.items if isinstance(target, Inert) else target
        if not isinstance(mapping, dict) or len(pairs) % 2:
            raise ValueError(f"it sets entries of a {type(target).__name__}")
        mapping.update((key(k), v) for k, v in zip(pairs[::2], pairs[1::2], strict=True))

    def load_setitem(self) -> None:
        pair = [self.stack.pop(), self.stack.pop()]
        self.fill(pair[::-1])

    def load_setitems(self) -> None:
        self.fill(self.pop_mark())

    def load_dict(self) -> None:
        pairs = self.pop_mark()
        self.append({})
        self.fill(pairs)

    def load_additems(self) -> None:
        values, target = self.pop_mark(), self.stack[-1]
        if not isinstance(target, set):
            raise ValueError(f"it adds to a {type(target).__name__}")
        target.update(map(key, values))

    def load_frozenset(self) -> None:
        self.append(frozenset(map(key, self.pop_mark())))

    def load_bytearray8(self) -> None:
        self.append(self.read(*struct.unpack("<Q", self.read(8))))

    def refuse(self) -> None:
        raise ValueError("refused: it uses extension codes or buffers outside of it")


REPLACED = "REDUCE NEWOBJ NEWOBJ_EX BUILD SETITEM SETITEMS DICT ADDITEMS FROZENSET BYTEARRAY8"
REFUSED = "EXT1 EXT2 EXT4 NEXT_BUFFER READONLY_BUFFER"
for name in REPLACED.split():
    Reader.methods[getattr(pickle, name)[0]] = getattr(Reader, f"load_{name.lower()}")
for name in REFUSED.split():
    Reader.methods[getattr(pickle, name)[0]] = Reader.refuse


def key(value: Any) -> Any:
    """A value that may be a key: plain, or a tuple of plain values."""
    parts = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, (*PLAIN, Global, Inert)) for part in parts):
        raise ValueError(f"a {type(value).__name__} with other values in it cannot be a key")
    return value


def persistent(meta: Any) -> Inert:
    """`torch_utils.persistence._reconstruct_persistent_obj`: keeps the name and the state."""
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str):
        raise ValueError("a persistent object has no class name")
    state = meta.get("state")
    return Inert(quoted(meta["class_name"]), state=state if isinstance(state, dict) else {})


def whole(value: Any) -> int:
    """A count: an int, not negative."""
    if type(value) is not int or value < 0:
        raise ValueError("a count is negative or not a whole number")
    return value


def tensor(storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`: a view of a storage, inside of it."""
    if not isinstance(storage, Storage) or len(size) != len(stride) or len(size) > 64:
        raise ValueError("a tensor has no storage, or a shape that is broken")
    values, count, last = storage.values, 1, whole(offset)
    for n, step in zip(size, stride, strict=True):
        count, last = count * whole(n), last + (n - 1) * whole(step)
    if count and (last >= len(values) or count > len(values)):
        raise ValueError("a tensor reaches beyond its storage")
    if not count:
        return torch.empty(size, dtype=values.dtype)
    return values.as_strided(size, stride, offset)


def tensor_of_dtype(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v3`: as v2, with the dtype apart from the storage."""
    dtype = rest[2]
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor has no storage or no dtype")
    if storage.values.nbytes % dtype.itemsize or torch.bool in (dtype, storage.values.dtype):
        raise ValueError(f"a storage of {storage.values.nbytes} bytes does not hold {dtype}")
    return tensor(Storage(storage.values.view(dtype)), offset, size, stride)


def parameter(data: Any, *_rest: Any) -> Tensor:
    """`torch._utils._rebuild_parameter`: the tensor itself."""
    if not isinstance(data, Tensor):
        raise ValueError(f"a parameter is a {type(data).__name__}, not a tensor")
    return data


def tensor_with_state(rebuild: Any, _kind: Any, args: Any, _state: Any) -> Tensor:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with Python attributes, which we drop."""
    if not isinstance(rebuild, Global) or rebuild.name not in TENSORS:
        raise ValueError("a tensor is made by something that makes no tensors")
    return TENSORS[rebuild.name](*args)


def dict_of(entries: Any = ()) -> dict[Any, Any]:
    """`collections.OrderedDict` and its like: a plain dict."""
    pairs = entries.items() if isinstance(entries, dict) else entries
    return {key(k): v for k, v in pairs}


def encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """`_codecs.encode`: how protocols 0 to 2 write bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes are not written as latin1 text")
    return text.encode("latin1")


def numpy_scalar(dtype: Any, raw: Any = None) -> Any:
    """`numpy.core.multiarray.scalar`: a Python number."""
    code = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else None
    if not isinstance(code, str) or code not in NUMPY_SCALARS or not isinstance(raw, bytes):
        raise ValueError("a numpy scalar is not a plain number")
    return struct.unpack(f"<{NUMPY_SCALARS[code]}", raw)[0]


def first(value: Any, *_rest: Any) -> Any:
    """The first argument, of what only says its type."""
    return value


WRAPPERS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
WRAPPERS += ("restore_type_tag",)
TENSORS: dict[str, Callable[..., Tensor]] = {
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_tensor_v3": tensor_of_dtype,
    "torch._utils._rebuild_parameter": parameter,
    "torch._utils._rebuild_parameter_with_state": parameter,
}
MAKERS: dict[str, Callable[..., object]] = {
    **TENSORS,
    "torch._tensor._rebuild_from_type_v2": tensor_with_state,
    "torch.Size": lambda sizes=(): tuple(whole(n) for n in sizes),
    "torch.device": lambda *args: ":".join(quoted(a) for a in args if isinstance(a, str | int)),
    **{f"torch.jit._pickle.{wrapper}": first for wrapper in WRAPPERS},
    "collections.OrderedDict": dict_of,
    "dnnlib.util.EasyDict": dict_of,
    "builtins.dict": dict_of,
    "builtins.set": lambda entries=(): {key(v) for v in entries},
    "_codecs.encode": encoded,
    "numpy.core.multiarray.scalar": numpy_scalar,
    "numpy.core.multiarray._reconstruct": lambda *_args: Inert("numpy.ndarray"),
}
NAMED = {*MAKERS, *INSTANCES, *LOWERCASE}
