"""A pickle reader that runs nothing.

It walks the opcodes (`pickletools.genops` decodes them) on a stack machine of its own. The
only things it can call are the `Constructor`s that the caller's `find` hands out, so a global
that `find` refuses never becomes an object, and no foreign `__setstate__` or `__new__` exists.
What a stream claims is checked against the bytes that are there before anything is allocated.
"""

import pickletools
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from typing import IO, Any, BinaryIO, Protocol, cast

import torch

MAX_OPERATIONS = 5_000_000  # a network pickle has about 20 to 60 opcodes a parameter
HIGHEST_PROTOCOL = 5
SPARE = 1 << 20  # bytes that constructors may handle beyond four times the size of the stream
BROKEN = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError)
PLAIN_KEYS = (str, bytes, int, float, bool, type(None), torch.dtype)


@dataclass(frozen=True)
class Constructor:
    """Stands for a global of the file; `build` is our own code and takes its arguments."""

    name: str
    build: Callable[..., object] = field(compare=False)


@dataclass(frozen=True)
class Marker:
    """Stands for a global that may be named in the file but never called."""

    name: str


@dataclass(frozen=True, eq=False)
class Persistent:
    """An object of a class that was not imported: its name and its attributes, inert.

    `class_name` is the bare name for objects of `torch_utils.persistence` and the dotted name
    for the others. `args` are the arguments of its call, `items` what was put into it as into
    a dict or (with the keys 0, 1, ...) a list.
    """

    class_name: str
    state: dict[str, Any]
    args: tuple[Any, ...] = ()
    items: dict[Any, Any] = field(default_factory=dict)


class Find(Protocol):
    """The list of what may be built."""

    def __call__(self, module: str, name: str) -> object:
        """-> a Constructor, a Marker or a value; ValueError where the name is not allowed."""
        ...


def no_references(_reference: object) -> object:
    """Persistent ids are refused where the layout has none."""
    raise ValueError("it refers to storages outside the pickle")


def quoted(text: object, length: int = 160) -> str:
    """Text of a file made fit for one line of a terminal."""
    plain = text if isinstance(text, str) else repr(text)
    return plain[:length].encode("unicode_escape").decode("ascii")[:length]


@dataclass
class Source:
    """A stream of known length: never hands out, nor allocates, more than it holds."""

    file: BinaryIO
    size: int

    def left(self) -> int:
        """Bytes from here to the end."""
        return self.size - self.file.tell()

    def read(self, n: int) -> bytes:
        """The next n bytes, fewer at the very end; ValueError for a large false claim."""
        if n > 16:
            self.require(n)
        return self.file.read(n)

    def require(self, n: int) -> None:
        """ValueError unless n more bytes are there."""
        if n < 0 or n > self.left():
            raise ValueError(f"it claims {n} bytes where only {self.left()} are left")

    def exactly(self, n: int) -> bytes:
        """The next n bytes and no fewer."""
        self.require(n)
        return self.file.read(n)

    def readline(self) -> bytes:
        """The next line, with its end."""
        return self.file.readline()

    def tell(self) -> int:
        """Where the next byte is."""
        return self.file.tell()


@dataclass
class Machine:
    """The state of one walk: a stack of stacks, the memo, and what may still be spent."""

    find: Find
    refer: Callable[[object], object]
    budget: int
    stack: list[Any] = field(default_factory=list)
    below: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def push(self, value: object) -> None:
        """Put one value on the stack."""
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        """Take everything above the latest mark."""
        above, self.stack = self.stack, self.below.pop()
        return above

    def call(self, target: object, args: object) -> object:
        """Call a Constructor, and nothing else."""
        if not isinstance(target, Constructor):
            raise ValueError(f"it calls {described(target)}, which may not be called")
        if not isinstance(args, tuple):
            raise ValueError(f"it calls {quoted(target.name)} with {type(args).__name__}")
        self.budget -= sum(len(a) for a in args if isinstance(a, Sized) and not is_tensor(a))
        if self.budget < 0:
            raise ValueError("it builds far more than the file holds")
        return target.build(*args)


def is_tensor(value: object) -> bool:
    """Tensors are views of storages, which were paid for already."""
    return isinstance(value, torch.Tensor)


def described(target: object) -> str:
    """The name of a stand-in, else the kind of value."""
    if isinstance(target, Marker):
        return quoted(target.name)
    return f"a value of type {type(target).__name__}"


def run(source: Source, find: Find, refer: Callable[[object], object] = no_references) -> Any:
    """The object of the pickle that starts here; the source is left right behind it.

    Raises ValueError, or another of `BROKEN`, for a broken stream or a refused global.
    """
    machine = Machine(find, refer, budget=4 * source.size + SPARE)
    operations = pickletools.genops(cast(IO[bytes], source))  # needs read, readline, tell
    for count, (opcode, arg, _) in enumerate(operations):
        if count >= MAX_OPERATIONS:
            raise ValueError(f"it has more than {MAX_OPERATIONS} operations")
        if opcode.name == "FRAME":
            source.require(cast(int, arg))
        elif opcode.name in WITH_ARGUMENT:
            WITH_ARGUMENT[opcode.name](machine, arg)
        elif opcode.name in PLAIN:
            PLAIN[opcode.name](machine)
        elif opcode.name != "STOP":  # extension codes, out-of-band buffers
            raise ValueError(f"refused: it uses the pickle operation {opcode.name}")
    if len(machine.stack) != 1 or machine.below:
        raise ValueError("the pickle leaves its stack in disorder")
    return machine.stack.pop()


Operation = Callable[[Machine], None]


def protocol(_machine: Machine, arg: Any) -> None:
    """PROTO: the version of what follows."""
    if arg > HIGHEST_PROTOCOL:
        raise ValueError(f"it is of pickle protocol {arg}, the highest known is 5")


def literal(machine: Machine, arg: Any) -> None:
    """Numbers and text, decoded already."""
    machine.push(arg)


def constant(make: Callable[[], object]) -> Operation:
    """A new value without arguments."""
    return lambda machine: machine.push(make())


def mark(machine: Machine) -> None:
    """MARK: start a new stack."""
    machine.below.append(machine.stack)
    machine.stack = []


def pop(machine: Machine) -> None:
    """POP: drop the top, or an empty mark."""
    if machine.stack:
        machine.stack.pop()
    else:
        machine.since_mark()


def pop_mark(machine: Machine) -> None:
    """POP_MARK: drop everything above the mark."""
    machine.since_mark()


def dup(machine: Machine) -> None:
    """DUP: the top once more."""
    machine.push(machine.stack[-1])


def put(machine: Machine, arg: Any) -> None:
    """PUT: remember the top under a number."""
    machine.memo[arg] = machine.stack[-1]


def memoize(machine: Machine) -> None:
    """MEMOIZE: remember the top under the next number."""
    machine.memo[len(machine.memo)] = machine.stack[-1]


def get(machine: Machine, arg: Any) -> None:
    """GET: a remembered value."""
    if arg not in machine.memo:
        raise ValueError(f"it asks for the remembered value {arg}, which does not exist")
    machine.push(machine.memo[arg])


def list_of(machine: Machine) -> None:
    """LIST: all above the mark."""
    machine.push(machine.since_mark())


def tuple_of(machine: Machine) -> None:
    """TUPLE: all above the mark."""
    machine.push(tuple(machine.since_mark()))


def tuple_of_top(n: int) -> Operation:
    """TUPLE1 to TUPLE3."""

    def operation(machine: Machine) -> None:
        if len(machine.stack) < n:
            raise ValueError("the stack of the pickle runs empty")
        machine.stack[-n:] = [tuple(machine.stack[-n:])]

    return operation


def key(value: Any, depth: int = 3) -> Any:
    """A value that may be a key: plain, or a short and shallow tuple of plain values."""
    if isinstance(value, tuple) and depth and len(value) <= 16:
        return tuple(key(v, depth - 1) for v in value)
    if not isinstance(value, (*PLAIN_KEYS, Marker, Constructor, Persistent)):
        raise ValueError(f"a {type(value).__name__} cannot be a key")
    return value


def pairs(values: list[Any]) -> dict[Any, Any]:
    """A flat list key, value, key, value, ... as a dict."""
    if len(values) % 2:
        raise ValueError("a dict has a key without a value")
    return {key(k): v for k, v in zip(values[::2], values[1::2], strict=True)}


def dict_of(machine: Machine) -> None:
    """DICT: pairs above the mark."""
    machine.push(pairs(machine.since_mark()))


def fill(target: Any, entries: dict[Any, Any]) -> None:
    """Put entries into a dict, or beside the state of a stand-in."""
    mapping = target.items if isinstance(target, Persistent) else target
    if not isinstance(mapping, dict):
        raise ValueError(f"it sets entries of {described(target)}")
    mapping.update(entries)


def set_item(machine: Machine) -> None:
    """SETITEM: one pair."""
    value, name = machine.stack.pop(), machine.stack.pop()
    fill(machine.stack[-1], {key(name): value})


def set_items(machine: Machine) -> None:
    """SETITEMS: pairs above the mark."""
    entries = pairs(machine.since_mark())
    fill(machine.stack[-1], entries)


def extend(target: Any, values: list[Any]) -> None:
    """Put values at the end of a list, or beside the state of a stand-in."""
    if isinstance(target, Persistent):
        target.items.update(enumerate(values, len(target.items)))
    elif isinstance(target, list):
        target.extend(values)
    else:
        raise ValueError(f"it appends to {described(target)}")


def append(machine: Machine) -> None:
    """APPEND: one value."""
    value = machine.stack.pop()
    extend(machine.stack[-1], [value])


def appends(machine: Machine) -> None:
    """APPENDS: all above the mark."""
    values = machine.since_mark()
    extend(machine.stack[-1], values)


def add_items(machine: Machine) -> None:
    """ADDITEMS: all above the mark, into a set."""
    values = machine.since_mark()
    if not isinstance(machine.stack[-1], set):
        raise ValueError(f"it adds to {described(machine.stack[-1])}")
    machine.stack[-1].update(key(v) for v in values)


def frozen_set(machine: Machine) -> None:
    """FROZENSET: all above the mark."""
    machine.push(frozenset(key(v) for v in machine.since_mark()))


def named(machine: Machine, module: Any, name: Any) -> object:
    """What stands for a global."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("it names a global by something that is not text")
    return machine.find(module, name)


def global_by_line(machine: Machine, arg: Any) -> None:
    """GLOBAL: module and name are in the opcode."""
    machine.push(named(machine, *arg.split(" ", 1)))


def global_by_stack(machine: Machine) -> None:
    """STACK_GLOBAL: module and name are on the stack."""
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.push(named(machine, module, name))


def reduce(machine: Machine) -> None:
    """REDUCE and NEWOBJ: a call."""
    args, target = machine.stack.pop(), machine.stack.pop()
    machine.push(machine.call(target, args))


def new_with_names(machine: Machine) -> None:
    """NEWOBJ_EX: a call with keyword arguments, of which we allow none."""
    names, args = machine.stack.pop(), machine.stack.pop()
    target = machine.stack.pop()
    if names:
        raise ValueError("it calls with keyword arguments")
    machine.push(machine.call(target, args))


def call_of_mark(machine: Machine) -> None:
    """OBJ: the class and its arguments above the mark."""
    target, *args = machine.since_mark()
    machine.push(machine.call(target, tuple(args)))


def call_by_line(machine: Machine, arg: Any) -> None:
    """INST: the class in the opcode, its arguments above the mark."""
    target = named(machine, *arg.split(" ", 1))
    machine.push(machine.call(target, tuple(machine.since_mark())))


def build(machine: Machine) -> None:
    """BUILD: attributes. Kept for stand-ins, dropped for plain dicts, refused for the rest."""
    state = machine.stack.pop()
    target = machine.stack[-1]
    if isinstance(target, Persistent):
        target.state.update(attributes(state))
    elif not isinstance(target, dict):
        raise ValueError(f"it sets attributes of {described(target)}")


def attributes(state: Any) -> dict[str, Any]:
    """A pickled state, a dict or a pair (dict, dict of slots), as one dict."""
    parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    dicts = [p for p in parts if isinstance(p, dict)]
    if len(dicts) + parts.count(None) < len(parts):
        return {"": state}
    return {k: v for d in dicts for k, v in d.items()}


def refer(machine: Machine) -> None:
    """BINPERSID: a reference to a storage."""
    machine.push(machine.refer(machine.stack.pop()))


WITH_ARGUMENT: dict[str, Callable[[Machine, Any], None]] = {
    **{
        name: literal
        for names in (
            ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
            ("FLOAT", "BINFLOAT"),
            ("STRING", "BINSTRING", "SHORT_BINSTRING"),
            ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
            ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        )
        for name in names
    },
    "PROTO": protocol,
    "PUT": put,
    "BINPUT": put,
    "LONG_BINPUT": put,
    "GET": get,
    "BINGET": get,
    "LONG_BINGET": get,
    "GLOBAL": global_by_line,
    "INST": call_by_line,
}
PLAIN: dict[str, Operation] = {
    "NONE": constant(lambda: None),
    "NEWTRUE": constant(lambda: True),
    "NEWFALSE": constant(lambda: False),
    "EMPTY_LIST": constant(list),
    "EMPTY_TUPLE": constant(tuple),
    "EMPTY_DICT": constant(dict),
    "EMPTY_SET": constant(set),
    "TUPLE1": tuple_of_top(1),
    "TUPLE2": tuple_of_top(2),
    "TUPLE3": tuple_of_top(3),
    "MARK": mark,
    "POP": pop,
    "POP_MARK": pop_mark,
    "DUP": dup,
    "MEMOIZE": memoize,
    "LIST": list_of,
    "TUPLE": tuple_of,
    "DICT": dict_of,
    "SETITEM": set_item,
    "SETITEMS": set_items,
    "APPEND": append,
    "APPENDS": appends,
    "ADDITEMS": add_items,
    "FROZENSET": frozen_set,
    "STACK_GLOBAL": global_by_stack,
    "REDUCE": reduce,
    "NEWOBJ": reduce,
    "NEWOBJ_EX": new_with_names,
    "OBJ": call_of_mark,
    "BUILD": build,
    "BINPERSID": refer,
}
