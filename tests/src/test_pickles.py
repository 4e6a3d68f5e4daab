"""What a pickle may do to us: nothing."""

import collections
import contextlib
import copyreg
import functools
import io
import os
import pickle
import struct
import subprocess
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._utils import _rebuild_tensor_v2

from src.pickles import Global, Inert, read_pickle, read_tensors
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


class Call:
    """Pickles as a call of anything, with a state if given."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced

    def __call__(self) -> None:
        """Only callables may stand first in what __reduce__ returns."""


def attacks(sentinel: Path) -> dict[str, tuple[Any, str]]:
    """Objects whose unpickling writes the sentinel, and a word of each refusal."""
    code = f"__import__('pathlib').Path({str(sentinel)!r}).write_text('ran')"
    shell = f"echo ran > {sentinel}"
    getattr_chain = Call(Call(getattr, Call(__import__, "os"), "system"), shell)
    return {
        "system": (Call(os.system, shell), "system"),
        "check_output": (Call(subprocess.check_output, ["sh", "-c", shell]), "check_output"),
        "Popen": (Call(subprocess.Popen, ["sh", "-c", shell]), "Popen"),
        "eval": (Call(eval, code), "eval"),
        "exec": (Call(exec, code), "exec"),
        "getattr": (getattr_chain, "getattr"),
        "map": (Call(list, Call(map, eval, [code])), "map"),
        "partial": (Call(functools.partial(os.system, shell)), "system"),
        "state": (Call(functools.partial, print, state=(os.system, (shell,), {}, {})), "print"),
        "argument": (Call(collections.OrderedDict, [(1, Call(os.system, shell))]), "system"),
        "torch.load": (Call(torch.load, str(sentinel)), "torch.serialization.load"),
        "pathlib": (Call(Path.write_text, sentinel, "ran"), "write_text"),
    }


NAMES = [name for name in attacks(Path()) if name != "pathlib"]
LIVE = ("system", "eval", "exec", "getattr", "argument")


@pytest.mark.parametrize("name", LIVE)
def test_the_attacks_do_work_on_the_standard_unpickler(name: str, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    pickle.loads(pickle.dumps(attacks(sentinel)[name][0], 2))  # noqa: S301 (proves it live)
    assert sentinel.exists()


@pytest.mark.parametrize(
    ("name", "protocol"), [*((n, p) for n in NAMES for p in range(6)), ("pathlib", 4)]
)
@pytest.mark.parametrize("layout", ["pickle", "zip", "legacy"])
def test_an_attack_is_refused_by_the_name_of_its_global(
    name: str, protocol: int, layout: str, tmp_path: Path
) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / "file.pkl"
    attack, word = attacks(sentinel)[name]
    if layout == "pickle":
        path.write_bytes(pickle.dumps({"a": [attack]}, protocol))
    elif protocol >= 2:
        is_zip = layout == "zip"
        options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_zip}
        torch.save({"a": attack, "b": torch.ones(1)}, path, **options)
    else:
        return
    message = refusal(path)
    assert "refused" in message
    assert word in message or {"map": "imap", "print": "builtins"}.get(word, "?") in message
    assert not sentinel.exists()


@pytest.mark.parametrize("name", LIVE)
@pytest.mark.parametrize("place", ["model", "state", "parameter", "loss", "source", "class_name"])
def test_an_attack_inside_of_a_published_file_is_refused(
    name: str, place: str, tmp_path: Path, write: Write
) -> None:
    sentinel = tmp_path / "sentinel"
    attack, word = attacks(sentinel)[name]
    model = nvidia.EPD_predictor({}, **METADATA)
    content: dict[str, Any] = {"model": model}
    if place == "state":
        vars(model)["afs"] = attack
    elif place == "parameter":
        model._parameters["r_params"] = attack
    elif place in ("model", "loss"):
        content[place] = attack
    else:
        meta = {"type": "class", "module_src": "", "class_name": "Net", "state": {}}
        key = "module_src" if place == "source" else place
        content["model"] = Call(nvidia.reconstruct, {**meta, key: attack})
    assert word in refusal(write(nvidia.dumps(content)))
    assert not sentinel.exists()


def test_embedded_source_code_neither_runs_nor_stays(tmp_path: Path, write: Write) -> None:
    sentinel = tmp_path / "sentinel"
    source = f"open({str(sentinel)!r}, 'w').write('ran')"
    meta = {"type": "class", "module_src": source, "class_name": "Net", "state": {"a": 1}}
    value = read_pickle(write(nvidia.dumps(Call(nvidia.reconstruct, meta))))
    assert (value.class_name, value.state, value.args) == ("Net", {"a": 1}, ())
    assert not sentinel.exists()


# --- storages and sizes --------------------------------------------------------------------------

MAGIC, LEGACY = 0x1950A86A20F9469CFC6C, 1001
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}


def storage_stream(*parts: Any, tail: bytes = b"") -> bytes:
    """What _load_from_bytes gets: pickles one after another, then raw bytes."""
    return b"".join(pickle.dumps(part, 2) for part in parts) + tail


def by_bytes(raw: bytes) -> bytes:
    """A pickle that calls torch.storage._load_from_bytes."""
    return pickle.dumps(Call(torch.storage._load_from_bytes, raw), 4)


def reference(kind: str, name: str, count: int) -> bytes:
    """The pickle of a reference to a storage, protocol 2."""
    texts = [b"X" + struct.pack("<I", len(t)) + t.encode() for t in ("storage", name, "cpu")]
    parts = texts[0] + f"c{kind}\n".encode() + texts[1] + texts[2]
    return b"\x80\x02(" + parts + b"\x8a\x08" + struct.pack("<q", count) + b"NtQ."


@pytest.mark.parametrize("place", range(5))
def test_a_storage_that_calls_back_is_refused(place: int, tmp_path: Path, write: Write) -> None:
    sentinel = tmp_path / "sentinel"
    parts: list[Any] = [MAGIC, LEGACY, SYSTEM, None, []]
    parts[place] = attacks(sentinel)["system"][0]
    assert "system" in refusal(write(by_bytes(storage_stream(*parts))))
    inner = Call(
        torch.storage._load_from_bytes, nvidia.storage_bytes(torch.ones(2)._typed_storage())
    )
    nested = storage_stream(MAGIC, LEGACY, SYSTEM, inner, [])
    assert "storage where none belongs" in refusal(write(by_bytes(nested)))
    assert not sentinel.exists()


GIGABYTE = 1 << 30
CLAIMS = {
    "bytes8": b"\x80\x04\x8e" + struct.pack("<Q", GIGABYTE),
    "bytes": b"\x80\x04B" + struct.pack("<I", GIGABYTE),
    "text8": b"\x80\x04\x8d" + struct.pack("<Q", GIGABYTE),
    "text": b"\x80\x04X" + struct.pack("<I", GIGABYTE),
    "frame": b"\x80\x04\x95" + struct.pack("<Q", GIGABYTE),
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", GIGABYTE),
    "long": b"\x80\x02\x8b" + struct.pack("<i", GIGABYTE),
    "string": b"\x80\x02T" + struct.pack("<i", GIGABYTE),
    "memo": b"\x80\x02Nr" + struct.pack("<I", GIGABYTE) + b"h\x07.",
    **{
        f"storage of {count}": by_bytes(
            storage_stream(MAGIC, LEGACY, SYSTEM)
            + reference("torch\nFloatStorage", "0", count)
            + pickle.dumps(["0"], 2)
            + struct.pack("<q", count)
        )
        for count in (1 << 28, 1 << 61, -1)
    },
    "a set again and again": (
        b"\x80\x02]cbuiltins\nset\nq\x00(" + b"K\x01" * 2000 + b"tq\x01"
        + b"h\x00h\x01\x85R0" * 3000
    ),
    "a state again and again": (
        b"\x80\x02cnet\nNet\nq\x00}(" + b"".join(b"K%cN" % i for i in range(255)) + b"uq\x01"
        + b"h\x00)\x81h\x01b" * 9000
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_file_claims_is_refused_without_allocating_it(name: str, write: Write) -> None:
    path = write(CLAIMS[name] + b"x" * 100)
    tracemalloc.start()
    refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((7,), (1,), 0),
        ((2,), (1,), 5),
        ((1 << 40,), (0,), 0),
        ((2, 2), (4, 1), 1),
        ((-1,), (1,), 0),
    ],
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int, write: Write
) -> None:
    raw = nvidia.storage_bytes(torch.ones(6)._typed_storage())
    storage = Call(torch.storage._load_from_bytes, raw)
    made = Call(_rebuild_tensor_v2, storage, offset, size, stride, False, None)
    message = refusal(write(pickle.dumps(made)))
    assert "reaches beyond its storage" in message or "count" in message


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip with these entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


ONE = reference("torch\nFloatStorage", "0", 1)
GIANT = reference("torch\nFloatStorage", "0", 1 << 28)
DEEP = b")" + b"\x85" * 100_000
WIDE = b")q\x00" + b"0h\x00h\x00\x86q\x00" * 80  # a tuple of 2^80 parts
GOOD = nvidia.storage_bytes(torch.ones(5)._typed_storage())
CRAFTED = {
    "extension 1": (b"\x80\x02\x82\xf0.", "extension"),
    "extension 2": (b"\x80\x02\x83\xf0\xf0.", "extension"),
    "extension 4": (b"\x80\x02\x84\xf0\xf0\xf0\x00.", "extension"),
    "windows": (b"cnt\nsystem\n(S'echo'\ntR.", "nt.system"),
    "os by line": (b"cos\nsystem\n(S'echo'\ntR.", "os.system"),
    "named and not called": (b"cos\nsystem\n.", "os.system"),
    "inst": (b"(S'echo'\nios\nsystem\n.", "os.system"),
    "obj": (b"(cos\nsystem\nS'echo'\no.", "os.system"),
    "python 2 names": (b"c__builtin__\neval\n(S'1'\ntR.", "__builtin__.eval"),
    "by memo": (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93.", "os.system"),
    "method of a module": (b"\x80\x04\x8c\x05torch\x8c\x08hub.load\x93)R.", "torch.hub.load"),
    "attribute of one of ours": (
        b"\x80\x04\x8c\x05torch\x8c\x0bSize.__eq__\x93)R.",
        "Size.__eq__",
    ),
    "call of text": (b"\x80\x02U\x04evalU\x011\x85R.", "calls a str"),
    "call of an object": (b"\x80\x02ca\nB\n)\x81)R.", "calls a Inert"),
    "call with a list": (b"\x80\x02ccollections\nOrderedDict\n]R.", "without a tuple"),
    "keywords": (b"\x80\x04ccollections\nOrderedDict\n)}U\x01aK\x01s\x92.", "keyword"),
    "attributes of a list": (b"\x80\x02]}U\x01aK\x01sb.", "sets attributes"),
    "attributes of a set": (b"\x80\x04\x8f}b.", "sets attributes"),
    "attributes of a function": (b"\x80\x02c_codecs\nencode\n}b.", "sets attributes"),
    "attributes of a class": (b"\x80\x02ca\nB\n}b.", "sets attributes"),
    "entries of text": (b"\x80\x02U\x01aU\x01aU\x01bs.", "sets entries"),
    "appends to a dict": (b"\x80\x02}U\x01aa.", "no attribute 'append'"),
    "adds to a list": (b"\x80\x04](K\x01\x90.", "adds to a list"),
    "global by number": (b"\x80\x04K\x01K\x02\x93.", "STACK_GLOBAL requires str"),
    "codec": (b"\x80\x02c_codecs\nencode\nU\x01aU\x05rot13\x86R.", "latin1"),
    "persistent id": (b"\x80\x02U\x01aQ.", "storage where none"),
    "persistent id by line": (b"Pabc\n.", "storage where none"),
    "out of band": (b"\x80\x05\x97.", "buffers outside"),
    "protocol 9": (b"\x80\x09N.", "protocol: 9"),
    "unknown memo": (b"\x80\x02h\x05.", "Memo value"),
    "empty stack": (b"\x80\x02.", "broken"),
    "no mark": (b"\x80\x02t.", "broken"),
    "list as a key": (b"\x80\x02}]K\x01s.", "cannot be a key"),
    "deep key": (b"\x80\x02}" + DEEP + b"Ns.", "cannot be a key"),
    "wide key": (b"\x80\x02}" + WIDE + b"Ns.", "cannot be a key"),
    "wide member": (b"\x80\x04\x8f(" + WIDE + b"\x90.", "cannot be a key"),
    "wide frozen member": (b"\x80\x04(" + WIDE + b"\x91.", "cannot be a key"),
    "wide entry": (b"\x80\x04ccollections\nOrderedDict\n]" + WIDE + b"N\x86a\x85R.", "cannot be"),
    "wide count": (b"\x80\x04ctorch\nSize\n" + WIDE + b"\x85R.", "count"),
    "more after the end": (b"\x80\x02N.garbage", "follow the end"),
    "reconstructor": (
        b"ccopyreg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR.",
        "os.system",
    ),
    "terminal escapes": (b"cos\nsy\x1b[31mst\x07em\n(tR.", r"sy\x1b[31mst\x07em"),
    "empty": (b"", "empty"),
    "text": (b"hello, world\n", "broken"),
    "picture": (b"\x89PNG\r\n\x1a\n" + b"x" * 50, "none belongs"),
    "storage of another count": (
        by_bytes(GOOD.replace(struct.pack("<q", 5), struct.pack("<q", 1 << 28))),
        "claims 268435456",
    ),
    "zip": (b"PK\x03\x04", "zip"),
    "zip without a pickle": (zipped({"a/other": b""}), "without one data.pkl"),
    "zip of two": (zipped({"a/data.pkl": ONE, "b/data.pkl": ONE}), "without one data.pkl"),
    "zip without data": (zipped({"a/data.pkl": ONE}), "missing"),
    "zip of 8 bytes": (zipped({"a/data.pkl": ONE, "a/data/0": b"12345678"}), "8 bytes claims"),
    "zip of big ends": (zipped({"a/data.pkl": ONE, "a/byteorder": b"big"}), "big-endian"),
    "zip of a gigabyte": (zipped({"a/data.pkl": GIANT}), "1073741824 bytes"),
    "zip of a call": (zipped({"a/data.pkl": reference("os\nsystem", "0", 1)}), "os.system"),
    "zip of no kind": (zipped({"a/data.pkl": reference("_codecs\nencode", "0", 1)}), "kind"),
    "zip bomb": (zipped({"a/data.pkl": ONE * 1000}, zipfile.ZIP_DEFLATED), "compressed"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_pickle_is_refused(name: str, write: Write) -> None:
    content, expected = CRAFTED[name]
    assert expected in refusal(write(content))


def test_registered_extension_codes_are_not_looked_up(write: Write) -> None:
    copyreg.add_extension("posix", "system", 240)
    try:
        assert "extension" in refusal(write(pickle.dumps(os.system, 2)))
    finally:
        copyreg.remove_extension("posix", "system", 240)


def test_half_a_file_is_refused_wherever_it_is_cut(write: Write) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer)
    for content, step in ((PUBLISHED, 97), (buffer.getvalue(), 29)):
        for cut in range(0, len(content), step):
            refusal(write(content[:cut]))
    assert "no such file" in refusal(Path("nowhere.pkl"))
    assert "directory" in refusal(Path("tests"))


def test_deep_nesting_and_self_reference_do_no_harm(write: Write) -> None:
    assert read_pickle(write(b"\x80\x02]" + b"]" * 100_000 + b"a" * 100_000 + b"."))
    itself = read_pickle(write(b"\x80\x02]q\x00h\x00a."))
    assert itself[0] is itself
    module = b"\x80\x02ca\nB\n)\x81q\x00}U\x08_modules}(U\x01ah\x00U\x01bh\x00usb."
    with pytest.raises(ValueError, match="modules within"):
        read_tensors(write(module))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(PUBLISHED) - 1), st.integers(0, 255)), min_size=1, max_size=4
    )
)
def test_a_file_with_wrong_bytes_reads_or_is_refused_in_one_line(
    edits: list[tuple[int, int]], write: Write
) -> None:
    content = bytearray(PUBLISHED)
    for place, value in edits:
        content[place] = value
    path = write(bytes(content))
    with contextlib.suppress(ValueError):
        read_pickle(path)
        return
    refusal(path)


# --- what it does read ----------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_published_file_reads_in_every_protocol_and_from_any_device(
    protocol: int, device: str, write: Write
) -> None:
    content = nvidia.predictor_bytes(
        PARAMETERS, METADATA, protocol=protocol, device=device, with_loss=True
    )
    value = read_pickle(write(content))
    model, loss = value["model"], value["loss_fn"]
    assert model.class_name == "EPD_predictor"
    assert {k: model.state[k] for k in METADATA} == METADATA
    assert model.state["_modules"]["softmax"].class_name == "torch.nn.modules.activation.Softmax"
    assert loss.state["solver_stu"] == Global("torch.nn.functional.silu")
    assert loss.state["buffer_model"][0].shape == (4, 3, 8, 8)
    read = model.state["_parameters"]["r_params"]
    assert torch.equal(read, torch.tensor(PARAMETERS["r_params"]))
    assert (read.device.type, read.dtype, type(read)) == ("cpu", torch.float32, torch.Tensor)


def samples() -> dict[str, Any]:
    """Values of every kind that torch.save is met with."""
    base = torch.arange(12.0)
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    tagged = torch.nn.Parameter(torch.ones(2))
    vars(tagged)["tag"] = 1
    return {
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


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("mapped", [True, False])
def test_both_layouts_of_torch_save_read_bit_for_bit(
    as_zip: bool, mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.pickles.MAPPED", 0 if mapped else 1 << 20)
    path, tensors = tmp_path / "file.pt", samples()
    plain = {"dtype": torch.float32, "size": torch.Size([1, 2]), "list": [1, 2.5, "a", None, b"b"]}
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
    numpy = pytest.importorskip("numpy")
    mine = Callback(a=1)
    mine.best = 2
    mine["path"] = Path("a")
    numbers = {"a": numpy.float64(1.5), "b": numpy.int32(-3), "c": numpy.bool_(True)}
    content = {Callback: mine, **numbers, "array": numpy.ones(3), "set": {1, (2, 3)}}
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


def test_a_file_without_tensors_is_no_checkpoint(write: Write) -> None:
    with pytest.raises(ValueError, match="holds a dict and no tensors by name"):
        read_tensors(write(pickle.dumps({"a": 1})))
