"""What a pickle may do to us: nothing."""

import collections
import contextlib
import copyreg
import functools
import io
import logging
import os
import pickle
import struct
import subprocess
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._utils import _rebuild_tensor_v2

from solvers.predictor import load_predictor
from src.inert import Global, Inert
from src.pickles import VERSION, read_pickle, read_tensors
from tests import nvidia

PARAMETERS = {"r_params": [[0.25, -1.5]], "weight_s": [[0.0, 1.0]]}
METADATA: dict[str, Any] = {"num_steps": 2, "afs": True, "alpha": 10.0, "nothing": None}
PUBLISHED = nvidia.predictor_bytes(PARAMETERS, METADATA, with_loss=True)
Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Bytes -> a file."""

    def to_file(content: bytes) -> Path:
        path = tmp_path / "file.pkl"
        path.write_bytes(content)
        return path

    return to_file


def refusal(path: Path) -> str:
    """The one-line message with which a file is refused."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (every caller looks at the message)
        read_pickle(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 400
    return message.removeprefix(str(path))


class Calls:
    """Pickles as a call of anything, with a state if given."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced

    def __call__(self) -> None:
        """Only callables may stand first in what __reduce__ returns."""


def attacks(sentinel: Path) -> dict[str, Any]:
    """Objects whose unpickling writes the sentinel, by a word of each refusal."""
    code = f"__import__('pathlib').Path({str(sentinel)!r}).write_text('ran')"
    shell = f"echo ran > {sentinel}"
    return {
        "system": Calls(os.system, shell),
        "check_output": Calls(subprocess.check_output, ["sh", "-c", shell]),
        "Popen": Calls(subprocess.Popen, ["sh", "-c", shell]),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "getattr": Calls(Calls(getattr, Calls(__import__, "os"), "system"), shell),
        "map": Calls(list, Calls(map, eval, [code])),
        "builtin": Calls(functools.partial, print, state=(os.system, (shell,), {}, {})),
        "torch.serialization.load": Calls(torch.load, str(sentinel)),
        "write_text": Calls(Path.write_text, sentinel, "ran"),
    }


@pytest.mark.parametrize("word", attacks(Path()))
@pytest.mark.parametrize("layout", ["plain", "argument", "zip", "legacy", "storage"])
def test_an_attack_is_refused_by_the_name_of_its_global(
    word: str, layout: str, tmp_path: Path
) -> None:
    sentinel, path = tmp_path / "ran", tmp_path / "file.pkl"
    attack = attacks(sentinel)[word]
    if word in ("system", "eval", "exec", "getattr"):
        pickle.loads(pickle.dumps(attack, 2))  # noqa: S301 (proves that the attack is a live one)
        sentinel.unlink()
    for protocol in range(
        4 if word == "write_text" else 2 if layout in ("zip", "legacy") else 0, 6
    ):
        if layout in ("zip", "legacy"):
            options = {"_use_new_zipfile_serialization": layout == "zip"}
            torch.save([attack], path, pickle_protocol=protocol, **options)
        elif layout == "storage":
            path.write_bytes(by_bytes(stream(MAGIC, LEGACY, SYSTEM, attack, [])))
        else:
            inside = Calls(collections.OrderedDict, [(1, attack)])
            path.write_bytes(pickle.dumps(attack if layout == "plain" else inside, protocol))
        message = refusal(path)
        assert "refused" in message
        assert word in message
        assert not sentinel.exists()


def test_the_source_code_inside_of_a_published_file_is_not_run(
    tmp_path: Path, write: Write
) -> None:
    sentinel = tmp_path / "ran"
    source = f"open({str(sentinel)!r}, 'w').write('ran')"
    meta = {"type": "class", "module_src": source, "class_name": "Net", "state": {"a": 1}}
    value = read_pickle(write(nvidia.dumps(Calls(nvidia.reconstruct, meta))))
    assert (value.class_name, value.state, value.args) == ("Net", {"a": 1}, ())
    meta["module_src"] = attacks(sentinel)["system"]
    assert "system" in refusal(write(nvidia.dumps(Calls(nvidia.reconstruct, meta))))
    assert not sentinel.exists()


# --- sizes, storages, crafted streams -------------------------------------------------------

MAGIC, LEGACY = 0x1950A86A20F9469CFC6C, 1001
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
GIGABYTE = 1 << 30


def stream(*parts: Any) -> bytes:
    """What _load_from_bytes gets: pickles one after another."""
    return b"".join(pickle.dumps(part, 4) for part in parts)


def by_bytes(raw: bytes) -> bytes:
    """A pickle that calls torch.storage._load_from_bytes."""
    return pickle.dumps(Calls(torch.storage._load_from_bytes, raw), 4)


def reference(kind: str, name: str, count: int) -> bytes:
    """The pickle of a reference to a storage, protocol 2."""
    texts = [b"X" + struct.pack("<I", len(t)) + t.encode() for t in ("storage", name, "cpu")]
    parts = texts[0] + f"c{kind}\n".encode() + texts[1] + texts[2]
    return b"\x80\x02(" + parts + b"\x8a\x08" + struct.pack("<q", count) + b"NtQ."


def claimed(count: int) -> bytes:
    """A storage that says to hold so many numbers."""
    parts = stream(MAGIC, LEGACY, SYSTEM) + reference("torch\nFloatStorage", "0", count)
    return by_bytes(parts + stream(["0"]) + struct.pack("<q", count))


STATE = b"}(" + b"".join(b"K%cN" % i for i in range(255)) + b"u"


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(write: Write) -> None:
    raw = nvidia.storage_bytes(torch.ones(6)._typed_storage())
    storage = Calls(torch.storage._load_from_bytes, raw)
    views = [(0, (7,), (1,)), (5, (2,), (1,)), (0, (1 << 40,), (0,)), (1, (2, 2), (4, 1))]
    for view in (*views, (0, (-1,), (1,))):
        message = refusal(
            write(pickle.dumps(Calls(_rebuild_tensor_v2, storage, *view, False, {})))
        )
        assert "reaches beyond its storage" in message or "count" in message


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip with these entries under a/."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(f"a/{name}", content)
    return buffer.getvalue()


ONE = reference("torch\nFloatStorage", "0", 1)
GIANT = reference("torch\nFloatStorage", "0", 1 << 28)
GOOD = nvidia.storage_bytes(torch.ones(5)._typed_storage())
NESTED = stream(MAGIC, LEGACY, SYSTEM, Calls(torch.storage._load_from_bytes, GOOD), [])
DEEP = b")" + b"\x85" * 100_000
WIDE = b")q\x00" + b"0h\x00h\x00\x86q\x00" * 80  # a tuple of 2^80 parts
SIZE, MORE = struct.pack("<I", GIGABYTE), b"x" * 100
LONG = struct.pack("<Q", GIGABYTE) + MORE
CRAFTED = {
    "bytes8": (b"\x80\x04\x8e" + LONG, "cut short"),
    "bytes": (b"\x80\x04B" + SIZE + MORE, "cut short"),
    "text8": (b"\x80\x04\x8d" + LONG, "cut short"),
    "text4": (b"\x80\x04X" + SIZE + MORE, "cut short"),
    "frame": (b"\x80\x04\x95" + LONG, "broken"),
    "bytearray": (b"\x80\x05\x96" + LONG, "cut short"),
    "long": (b"\x80\x02\x8b" + SIZE + MORE, ""),
    "string": (b"\x80\x02T" + SIZE + MORE, "cut short"),
    "memo": (b"\x80\x02Nr" + SIZE + b"h\x07.", "broken"),
    "storage": (claimed(1 << 28), "claims 1073741824 bytes"),
    "vast storage": (claimed(1 << 61), "claims"),
    "negative storage": (claimed(-1), "negative"),
    "a set": (b"cbuiltins\nset\nq\0(" + b"N" * 2000 + b"tq\1" + b"h\0h\1\x85R0" * 3000, "more"),
    "a state": (b"ca\nB\nq\0" + STATE + b"q\1" + b"h\0)\x81h\1b" * 9000, "far more"),
    "extension 1": (b"\x80\x02\x82\xf0.", "extension"),
    "windows": (b"cnt\nsystem\n(S'echo'\ntR.", "nt.system"),
    "os by line": (b"cos\nsystem\n(S'echo'\ntR.", "os.system"),
    "named and not called": (b"cos\nsystem\n.", "os.system"),
    "inst": (b"(S'echo'\nios\nsystem\n.", "os.system"),
    "obj": (b"(cos\nsystem\nS'echo'\no.", "os.system"),
    "by memo": (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93.", "os.system"),
    "reconstructor": (b"ccopyreg\n_reconstructor\n(cos\nsystem\nNNtR.", "os.system"),
    "method of a module": (b"\x80\x04\x8c\x05torch\x8c\x08hub.load\x93)R.", "torch.hub.load"),
    "call of text": (b"\x80\x02U\x04evalU\x011\x85R.", "calls a str"),
    "call of an object": (b"\x80\x02ca\nB\n)\x81)R.", "calls a Inert"),
    "attributes of a list": (b"\x80\x02]}U\x01aK\x01sb.", "sets attributes"),
    "attributes of a function": (b"\x80\x02c_codecs\nencode\n}b.", "sets attributes"),
    "entries of text": (b"\x80\x02U\x01aU\x01aU\x01bs.", "sets entries"),
    "appends to a dict": (b"\x80\x02}U\x01aa.", "no attribute 'append'"),
    "global by number": (b"\x80\x04K\x01K\x02\x93.", "STACK_GLOBAL requires str"),
    "persistent id": (b"\x80\x02U\x01aQ.", "storage where none"),
    "persistent id by line": (b"Pabc\n.", "storage where none"),
    "out of band": (b"\x80\x05\x97.", "out-of-band"),
    "empty stack": (b"\x80\x02.", "broken"),
    "no mark": (b"\x80\x02t.", "broken"),
    "wide int as a key": (b"\x80\x02}\x8a\x09" + b"\0" * 8 + b"\x01Ns.", "cannot be a key"),
    "wide ints as a key": (pickle.dumps({(1 << 40, 1): None}), "cannot be a key"),
    "list as a key": (b"\x80\x02}]K\x01s.", "cannot be a key"),
    "deep key": (b"\x80\x02}" + DEEP + b"Ns.", "cannot be a key"),
    "wide key": (b"\x80\x02}" + WIDE + b"Ns.", "cannot be a key"),
    "wide member": (b"\x80\x04\x8f(" + WIDE + b"\x90.", "cannot be a key"),
    "wide entry": (b"ccollections\nOrderedDict\n]" + WIDE + b"N\x86a\x85R.", "cannot be a key"),
    "wide count": (b"\x80\x04ctorch\nSize\n" + WIDE + b"\x85R.", "count"),
    "more after the end": (b"\x80\x02N.garbage", "follow the end"),
    "terminal escapes": (b"cos\nsy\x1b[31mst\x07em\n(tR.", r"sy\x1b[31mst\x07em"),
    "empty": (b"", "empty"),
    "text": (b"hello, world\n", "broken"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "picture": (b"\x89PNG\r\n\x1a\n" + b"x" * 50, "none belongs"),
    "storage in a storage": (by_bytes(NESTED), "storage where none belongs"),
    "storage of another count": (by_bytes(GOOD.replace(b"\x05" + b"\0" * 7, b"\6" * 8)), "claims"),
    "zip": (b"PK\x03\x04", "zip"),
    "zip without a pickle": (zipped({"other": b""}), "without one data.pkl"),
    "zip without storage": (zipped({"data.pkl": ONE}), "missing"),
    "zip of 8 bytes": (zipped({"data.pkl": ONE, "data/0": b"12345678"}), "8 bytes claims"),
    "zip of big ends": (zipped({"data.pkl": ONE, "byteorder": b"big"}), "big-endian"),
    "zip of a gigabyte": (zipped({"data.pkl": GIANT}), "1073741824 bytes"),
    "zip of no kind": (zipped({"data.pkl": reference("_codecs\nencode", "0", 1)}), "kind"),
    "zip bomb": (zipped({"data.pkl": ONE * 1000}, zipfile.ZIP_DEFLATED), "compressed"),
}  # fmt: skip


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_pickle_is_refused_and_nothing_that_it_claims_is_allocated(
    name: str, write: Write
) -> None:
    content, word = CRAFTED[name]
    path = write(content)
    tracemalloc.start()
    message = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert word in message
    assert peak < 24 << 20


def test_half_a_file_no_file_and_registered_codes_are_refused(write: Write) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer)
    for content, step in ((PUBLISHED, 97), (buffer.getvalue(), 29)):
        for cut in range(0, len(content), step):
            refusal(write(content[:cut]))
    assert "no such file" in refusal(Path("nowhere.pkl"))
    assert "directory" in refusal(Path("tests"))
    copyreg.add_extension("posix", "system", 240)  # which the file names by its number alone
    try:
        assert "extension" in refusal(write(pickle.dumps(os.system, 2)))
    finally:
        copyreg.remove_extension("posix", "system", 240)


def test_deep_nesting_and_self_reference_do_no_harm(write: Write) -> None:
    assert read_pickle(write(b"\x80\x02]" + b"]" * 100_000 + b"a" * 100_000 + b"."))
    itself = read_pickle(write(b"\x80\x02]q\x00h\x00a."))
    assert itself[0] is itself
    module = b"\x80\x02ca\nB\n)\x81q\x00}U\x08_modules}(U\x01ah\x00U\x01bh\x00usb."
    with pytest.raises(ValueError, match="modules or tensors"):
        read_tensors(write(module))
    leaf, root = torch.nn.Module(), torch.nn.Module()
    leaf._parameters = dict.fromkeys(map(str, range(1000)), torch.nn.Parameter(torch.ones(1)))
    root._modules = dict.fromkeys(map(str, range(1000)), leaf)  # a million names in 40 kB
    buffer = io.BytesIO()
    torch.save(root, buffer)
    with pytest.raises(ValueError, match="modules or tensors"):
        read_tensors(write(buffer.getvalue()))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(PUBLISHED) - 1), st.integers(0, 255)), min_size=1))
def test_a_file_with_wrong_bytes_reads_or_is_refused_in_one_line(
    write: Write, edits: list[tuple[int, int]]
) -> None:
    content = bytearray(PUBLISHED)
    for place, value in edits[:4]:
        content[place] = value
    path = write(bytes(content))
    with contextlib.suppress(ValueError):
        read_pickle(path)
        return
    refusal(path)


# --- what it does read ----------------------------------------------------------------------


def nested(depth: int) -> bytes:
    """A list in which each list holds the one before twice: 2^depth to whoever walks it."""
    return b"]q\x00" + b"0](h\x00h\x00eq\x00" * depth


SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
MODULE = b"ca\nB\n)\x81q\x00}U\x08_modules}("
MODULE += b"".join(b"U\x04%04dh\x00" % i for i in range(3000)) + b"usb"
LASTING = {
    "names compared": stream(MAGIC, VERSION, SYSTEM, None)
    + b"\x80\x02]("
    + nested(40) * 2
    + b"e.",
    "keys of one hash": b"\x80\x04J\xff\xff\xff\xffq\x00J\xfe\xff\xff\xffq\x01}("
    + b"".join(
        b"(" + b"".join(b"h" + bytes([i >> k & 1]) for k in range(14)) + b"tN" for i in range(9999)
    )
    + b"u.",
    "counts of one hash": b"\x80\x04N"
    + b"".join(b"p%d\n" % (k * (2**61 - 1)) for k in range(20_000))
    + b".",
}


@pytest.mark.parametrize("name", LASTING)
def test_a_small_file_takes_a_short_time(write: Write, name: str) -> None:
    """Each of them took minutes, or for ever."""
    begun = time.process_time()
    refusal(write(LASTING[name]))
    assert time.process_time() - begun < 10


def test_what_a_small_file_nests_is_neither_walked_nor_printed(write: Write) -> None:
    bomb = b"\x80\x02}(X\x06\x00\x00\x00format" + nested(40) + b"U\x0eformat_versionK\x01u."
    with pytest.raises(ValueError, match="format 'list' version '1' is unknown"):
        load_predictor(write(bomb))
    with pytest.raises(ValueError, match="modules or tensors within each other"):
        read_tensors(write(b"\x80\x02" + MODULE + b"."))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_published_file_reads_in_every_protocol_and_from_any_device(
    protocol: int, device: str, write: Write
) -> None:
    options = {"protocol": protocol, "device": device, "with_loss": True}
    value = read_pickle(write(nvidia.predictor_bytes(PARAMETERS, METADATA, **options)))
    model, loss = value["model"], value["loss_fn"]
    assert model.class_name == "EPD_predictor"
    assert {k: model.state[k] for k in METADATA} == METADATA
    assert model.state["_modules"]["softmax"].class_name == "torch.nn.modules.activation.Softmax"
    assert loss.state["solver_stu"] == Global("torch.nn.functional.silu")
    assert loss.state["buffer_model"][0].shape == (4, 3, 8, 8)
    read = model.state["_parameters"]["r_params"]
    assert torch.equal(read, torch.tensor(PARAMETERS["r_params"]))
    assert (read.device.type, read.dtype, type(read)) == ("cpu", torch.float32, torch.Tensor)


@pytest.mark.parametrize("as_zip", [True, False])
def test_both_layouts_of_torch_save_read_bit_for_bit(as_zip: bool, tmp_path: Path) -> None:
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    base, tagged = torch.arange(12.0), torch.nn.Parameter(torch.ones(2))
    vars(tagged)["tag"] = 1
    tensors = {
        **{str(kind): torch.tensor([0, 1, 3]).to(kind) for kind in kinds},
        "uint16": torch.tensor([1, 65535]).to(torch.uint16),
        "complex": torch.tensor([1 + 2j]),
        "transposed": base.reshape(3, 4).t(),
        "part": base[3:7],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "with attributes": tagged,
    }
    plain = {"dtype": torch.float32, "size": torch.Size([1, 2]), "list": [1, 2.5, "a", None, b"b"]}
    path = tmp_path / "file.pt"
    torch.save({**tensors, **plain}, path, _use_new_zipfile_serialization=as_zip)
    read = read_pickle(path)
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor.detach()), name
        assert read[name].dtype == tensor.dtype
    assert {name: read[name] for name in plain} == plain
    assert read_tensors(path).keys() == tensors.keys()


class Callback(collections.OrderedDict):
    """Something of a training framework."""

    best = 0


def test_foreign_classes_stay_inert_and_numpy_numbers_are_numbers(write: Write) -> None:
    mine = Callback(
        a=1, path=Path("a"), log=logging.getLogger("a"), rng=numpy.random.RandomState()
    )
    mine.best = 2
    numbers = {"a": numpy.float64(1.5), "b": numpy.int32(-3), "c": numpy.bool_(True)}
    content = {Callback: mine, **numbers, "array": numpy.ones(3), "set": {1, (2, 3)}}
    read = read_pickle(write(pickle.dumps({"five": numpy.ones(3)}, 5)))
    assert read["five"].class_name.endswith("_frombuffer")
    read = read_pickle(write(pickle.dumps(content)))
    value = read.pop(Global(f"{__name__}.Callback"))
    assert isinstance(value, Inert)
    assert (value.class_name, value.state["best"]) == (f"{__name__}.Callback", 2)
    assert value.items["a"] == 1
    assert read.pop("array").class_name == "numpy.ndarray"
    assert read == {"a": 1.5, "b": -3, "c": True, "set": {1, (2, 3)}}


@pytest.mark.parametrize("layout", ["state dict", "training", "zip", "legacy", "script"])
def test_the_tensors_of_a_checkpoint_come_out_by_name(layout: str, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.GELU())
    path, state = tmp_path / "module.pt", module.state_dict()
    if layout == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated
            torch.jit.script(module).save(str(path))
    elif layout == "training":
        adam = torch.optim.Adam(module.parameters())
        torch.save({"epoch": 3, "state_dict": state, "optimizer": adam, "best": Callback()}, path)
    else:
        value = state if layout == "state dict" else module
        torch.save(value, path, _use_new_zipfile_serialization=layout != "legacy")
    read = read_tensors(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], value) for name, value in state.items())
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="holds a dict and no tensors by name"):
        read_tensors(path)
