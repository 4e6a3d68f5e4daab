"""What a pickle may do to us: nothing."""

import collections
import contextlib
import copyreg
import io
import os
import pickle
import pickletools
import struct
import subprocess
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._utils import _rebuild_tensor_v2

from solvers.persistence import Persistent as Read
from solvers.persistence import read_persistent
from tests import persistence_files as files

PARAMETERS = {"r_params": [[0.25, -1.5]], "weight_s": [[0.0, 1.0]]}
METADATA: dict[str, Any] = {"num_steps": 2, "afs": True, "alpha": 10.0, "nothing": None}
PUBLISHED = files.predictor_bytes(PARAMETERS, METADATA)
Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Bytes -> a file."""

    def to_file(content: bytes) -> Path:
        path = tmp_path / "file.pkl"
        path.write_bytes(content)
        return path

    return to_file


def refusal(path: Path, **options: Any) -> str:
    """The one-line message with which a file is refused."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (every caller looks at the message)
        read_persistent(path, **options)
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


def attacks(sentinel: Path) -> dict[str, Any]:
    """Objects whose unpickling writes the sentinel."""
    code = f"__import__('pathlib').Path({str(sentinel)!r}).write_text('ran')"
    shell = f"echo ran > {sentinel}"
    return {
        "posix.system": Call(os.system, shell),
        "subprocess.check_output": Call(subprocess.check_output, ["sh", "-c", shell]),
        "subprocess.Popen": Call(subprocess.Popen, ["sh", "-c", shell]),
        "builtins.eval": Call(eval, code),
        "builtins.exec": Call(exec, code),
        "builtins.getattr": Call(Call(getattr, Call(__import__, "os"), "system"), shell),
        "builtins.map": Call(list, Call(map, eval, [code])),
        "pathlib": Call(Path.write_text, sentinel, "ran"),
        "torch.load": Call(torch.load, str(sentinel)),
    }


LIVE = ("posix.system", "builtins.eval", "builtins.exec", "builtins.getattr")
NAMED = {
    "posix.system": "posix.system",
    "subprocess.check_output": ".check_output",
    "subprocess.Popen": ".Popen",
    "builtins.eval": ".eval",
    "builtins.exec": ".exec",
    "builtins.getattr": ".getattr",
    "builtins.map": ".list",
    "pathlib": "write_text",
    "torch.load": "torch.serialization.load",
}


@pytest.mark.parametrize("name", LIVE)
def test_the_attacks_do_work_on_the_standard_unpickler(name: str, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    pickle.loads(pickle.dumps(attacks(sentinel)[name], 2))  # noqa: S301 (proves the attack live)
    assert sentinel.exists()


@pytest.mark.parametrize(
    ("name", "protocol"),  # protocols below 4 cannot write a method
    [(n, p) for n in NAMED for p in range(6) if n != "pathlib" or p >= 4],
)
def test_an_attack_is_refused_by_the_name_of_its_global(
    name: str, protocol: int, tmp_path: Path, write: Write
) -> None:
    sentinel = tmp_path / "sentinel"
    message = refusal(write(pickle.dumps(attacks(sentinel)[name], protocol)))
    assert "refused" in message
    assert NAMED[name] in message
    assert not sentinel.exists()


@pytest.mark.parametrize("name", LIVE)
@pytest.mark.parametrize("place", ["model", "state", "parameter", "source", "class_name", "type"])
def test_an_attack_inside_of_a_published_file_is_refused(
    name: str, place: str, tmp_path: Path, write: Write
) -> None:
    sentinel = tmp_path / "sentinel"
    attack = attacks(sentinel)[name]
    model = files.Persistent("EPD_predictor", files.module_state({}, **METADATA))
    if place == "state":
        model.meta["state"]["afs"] = attack
    elif place == "parameter":
        model.meta["state"]["_parameters"]["r_params"] = attack
    elif place != "model":
        model.meta["module_src" if place == "source" else place] = attack
    content = {"model": attack if place == "model" else model}
    assert NAMED[name] in refusal(write(files.dump(content)))
    assert not sentinel.exists()


@pytest.mark.parametrize("name", NAMED)
def test_nothing_runs_even_where_foreign_classes_are_wanted(
    name: str, tmp_path: Path, write: Write
) -> None:
    sentinel = tmp_path / "sentinel"
    path = write(pickle.dumps({"a": attacks(sentinel)[name]}))
    if name == "builtins.getattr":
        assert "may not be called" in refusal(path, foreign="inert")
    else:
        assert isinstance(read_persistent(path, foreign="inert")["a"], Read)
    assert not sentinel.exists()


def test_embedded_source_code_neither_runs_nor_stays(tmp_path: Path, write: Write) -> None:
    sentinel = tmp_path / "sentinel"
    source = f"open({str(sentinel)!r}, 'w').write('ran')"
    value = read_persistent(write(files.dump(files.Persistent("Net", {"a": 1}, source))))
    assert (value.class_name, value.state) == ("Net", {"a": 1})
    assert source not in repr(value)
    assert not sentinel.exists()


def storage_stream(*parts: Any, tail: bytes = b"") -> bytes:
    """What _load_from_bytes gets: pickles one after another, then raw bytes."""
    return b"".join(pickle.dumps(part, 2) for part in parts) + tail


def by_bytes(raw: bytes) -> bytes:
    """A pickle that calls torch.storage._load_from_bytes."""
    return pickle.dumps(Call(torch.storage._load_from_bytes, raw), 4)


MAGIC, LEGACY = 0x1950A86A20F9469CFC6C, 1001
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}


@pytest.mark.parametrize("place", range(5))
def test_a_storage_that_calls_back_is_refused(place: int, tmp_path: Path, write: Write) -> None:
    sentinel = tmp_path / "sentinel"
    parts: list[Any] = [MAGIC, LEGACY, SYSTEM, None, []]
    parts[place] = attacks(sentinel)["posix.system"]
    message = refusal(write(by_bytes(storage_stream(*parts))))
    assert "posix.system" in message or "not a stream of torch.save" in message
    assert not sentinel.exists()


def test_a_storage_within_a_storage_is_refused(write: Write) -> None:
    inner = files.storage_bytes(torch.ones(2)._typed_storage())
    nested = storage_stream(
        MAGIC, LEGACY, SYSTEM, Call(torch.storage._load_from_bytes, inner), [], tail=b""
    )
    assert "torch.storage._load_from_bytes" in refusal(write(by_bytes(nested)))


def reference(kind: str, name: str, count: int) -> bytes:
    """The pickle of a reference to a storage, protocol 2."""
    text = "".join(f"X{struct.pack('<I', len(t)).decode('latin1')}{t}" for t in ("storage",))
    parts = text.encode("latin1") + f"c{kind}\n".encode()
    for t in (name, "cpu"):
        parts += b"X" + struct.pack("<I", len(t)) + t.encode()
    return b"\x80\x02(" + parts + b"\x8a\x08" + struct.pack("<q", count) + b"NtQ."


@pytest.mark.parametrize("count", [1 << 28, 1 << 61, -1])
def test_a_storage_that_claims_more_than_the_file_holds_is_refused_before_it_is_made(
    count: int, write: Write
) -> None:
    stream = storage_stream(MAGIC, LEGACY, SYSTEM) + reference("torch\nFloatStorage", "0", count)
    path = write(by_bytes(stream + pickle.dumps(["0"], 2) + struct.pack("<q", count)))
    tracemalloc.start()
    message = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "claims" in message or "not a count" in message
    assert peak < 1 << 20


def test_a_storage_whose_data_count_differs_is_refused(write: Write) -> None:
    good = files.storage_bytes(torch.ones(5)._typed_storage())
    count = struct.pack("<q", 5)
    assert good.count(count) == 1
    bad = good.replace(count, struct.pack("<q", 1 << 28))
    assert "claims to hold 268435456" in refusal(write(by_bytes(bad)))


@pytest.mark.parametrize(
    "claim",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 30),
        b"\x80\x04B" + struct.pack("<I", 1 << 30),
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 30),
        b"\x80\x04X" + struct.pack("<I", 1 << 30),
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 30),
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 30),
        b"\x80\x02\x8b" + struct.pack("<i", 1 << 30),
        b"\x80\x02T" + struct.pack("<i", 1 << 30),
    ],
    ids=["bytes8", "bytes", "text8", "text", "frame", "bytearray", "long", "string"],
)
def test_a_claim_of_a_gigabyte_is_refused_without_allocating_it(
    claim: bytes, write: Write
) -> None:
    path = write(claim + b"x" * 100)
    tracemalloc.start()
    message = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "1073741824" in message
    assert peak < 1 << 20


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
    raw = files.storage_bytes(torch.ones(6)._typed_storage())
    storage = Call(torch.storage._load_from_bytes, raw)
    made = Call(_rebuild_tensor_v2, storage, offset, size, stride, False, None)
    message = refusal(write(pickle.dumps(made)))
    assert "reaches beyond its storage" in message or "not a count" in message


CRAFTED = {
    "extension 1": (b"\x80\x02\x82\xf0.", "EXT1"),
    "extension 2": (b"\x80\x02\x83\xf0\xf0.", "EXT2"),
    "extension 4": (b"\x80\x02\x84\xf0\xf0\xf0\x00.", "EXT4"),
    "windows": (b"cnt\nsystem\n(S'echo'\ntR.", "nt.system"),
    "os by line": (b"cos\nsystem\n(S'echo'\ntR.", "os.system"),
    "inst": (b"(S'echo'\nios\nsystem\n.", "os.system"),
    "obj": (b"(cos\nsystem\nS'echo'\no.", "os.system"),
    "python 2 names": (b"c__builtin__\neval\n(S'1'\ntR.", "__builtin__.eval"),
    "dotted name": (b"\x80\x04\x8c\x05torch\x8c\x0ahub.loaded\x93.", "torch.hub.loaded"),
    "attribute of an allowed one": (
        b"\x80\x04\x8c\x06_codec\x8c\x0eencode.__self_\x93.",
        "_codec.encode.__self_",
    ),
    "call of text": (b"\x80\x02U\x04evalU\x011\x85R.", "may not be called"),
    "call of a marker": (b"\x80\x02cbuiltins\nobject\n)R.", "may not be called"),
    "call with a list": (b"\x80\x02ccollections\nOrderedDict\n]R.", "with list"),
    "keywords": (b"\x80\x04ccollections\nOrderedDict\n)}U\x01aK\x01s\x92.", "keyword"),
    "attributes of a list": (b"\x80\x02]}U\x01aK\x01sb.", "sets attributes"),
    "attributes of a set": (b"\x80\x04\x8f}b.", "sets attributes"),
    "attributes of a function": (b"\x80\x02c_codecs\nencode\n}b.", "sets attributes"),
    "entries of text": (b"\x80\x02U\x01aU\x01aU\x01bs.", "sets entries"),
    "appends to a dict": (b"\x80\x02}U\x01aa.", "appends"),
    "global by number": (b"\x80\x04K\x01K\x02\x93.", "not text"),
    "codec other than latin1": (
        b"\x80\x02c_codecs\nencode\nU\x01aU\x05rot13\x86R.",
        "latin1",
    ),
    "persistent id": (b"\x80\x02U\x01aQ.", "storages outside"),
    "persistent id by line": (b"Pabc\n.", "PERSID"),
    "out of band": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "protocol 9": (b"\x80\x09N.", "protocol 9"),
    "unknown memo": (b"\x80\x02h\x05.", "does not exist"),
    "empty stack": (b"\x80\x02.", "disorder"),
    "too full a stack": (b"\x80\x02NN.", "disorder"),
    "no mark": (b"\x80\x02t.", "broken"),
    "list as a key": (b"\x80\x02}]K\x01s.", "cannot be a key"),
    "more after the end": (b"\x80\x02N.garbage", "follow the end"),
    "reconstructor of a function": (
        b"ccopyreg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR.",
        "os.system",
    ),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_pickle_is_refused(name: str, write: Write) -> None:
    content, expected = CRAFTED[name]
    assert expected in refusal(write(content))


def test_registered_extension_codes_are_not_looked_up(write: Write) -> None:
    copyreg.add_extension("posix", "system", 240)
    try:
        assert "EXT1" in refusal(write(pickle.dumps(os.system, 2)))
    finally:
        copyreg.remove_extension("posix", "system", 240)


def test_terminal_escapes_of_a_file_do_not_reach_the_terminal(write: Write) -> None:
    message = refusal(write(b"c\x1b[31mos\nsy\x07stem\n."))
    assert "\x1b" not in message
    assert "\x07" not in message


def test_half_a_file_is_refused_wherever_it_is_cut(write: Write) -> None:
    for cut in range(0, len(PUBLISHED), 13):
        refusal(write(PUBLISHED[:cut]))


def test_half_a_zip_is_refused_wherever_it_is_cut(write: Write) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer)
    for cut in range(0, len(buffer.getvalue()), 29):
        refusal(write(buffer.getvalue()[:cut]))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"hello, world\n", ""),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 50, ""),
        (b"PK\x03\x04", ""),
    ],
)
def test_a_file_that_is_no_pickle_is_refused(content: bytes, expected: str, write: Write) -> None:
    assert expected in refusal(write(content))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nowhere.pkl")
    assert "folder" in refusal(tmp_path)


def test_deep_nesting_and_self_reference_do_no_harm(write: Write) -> None:
    assert read_persistent(write(b"\x80\x02" + b"]" + b"]" * 100_000 + b"a" * 100_000 + b"."))
    itself = read_persistent(write(b"\x80\x02]q\x00h\x00a."))
    assert itself[0] is itself
    deep = b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns."
    assert "cannot be a key" in refusal(write(deep))


def test_a_small_file_cannot_build_a_large_object(write: Write) -> None:
    grow = b"\x80\x02]cbuiltins\nset\nq\x00(" + b"K\x01" * 2000 + b"tq\x01"
    bomb = grow + b"h\x00h\x01\x85R0" * 3000
    message = refusal(write(bomb + b"0."))
    assert "more than the file holds" in message


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
        read_persistent(path)
        return
    refusal(path)


# --- what it does read ----------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_published_file_reads_in_every_protocol_and_from_any_device(
    protocol: int, device: str, write: Write
) -> None:
    content = files.predictor_bytes(
        PARAMETERS, METADATA, protocol=protocol, device=device, with_loss=True
    )
    value = read_persistent(write(content))
    model = value["model"]
    assert model.class_name == "EPD_predictor"
    assert value["loss_fn"].state["alpha"] == 10.0
    assert {k: model.state[k] for k in METADATA} == METADATA
    read = model.state["_parameters"]["r_params"]
    assert torch.equal(read, torch.tensor(PARAMETERS["r_params"]))
    assert (read.device.type, read.dtype, type(read)) == ("cpu", torch.float32, torch.Tensor)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_modules_within_modules_read_down_to_their_tensors(protocol: int, write: Write) -> None:
    weight = torch.arange(6.0).reshape(2, 3).half()
    layer = files.Persistent("Conv2d", files.module_state({"weight": weight}, {}, {"b": weight}))
    net = files.Persistent(
        "SongUNet", files.module_state({}, {"enc": files.module_dict({"a": layer})})
    )
    value = read_persistent(write(files.dump({"ema": net, "labels": {1, 2}}, protocol)))
    enc = value["ema"].state["_modules"]["enc"]
    assert enc.class_name == "torch.nn.modules.container.ModuleDict"
    read = enc.state["_modules"]["a"].state
    assert torch.equal(read["_parameters"]["weight"], weight)
    assert torch.equal(read["_buffers"]["b"], weight)
    assert value["labels"] == {1, 2}


def samples() -> dict[str, Any]:
    """Values of every kind that torch.save is met with."""
    base = torch.arange(12.0)
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    return {
        **{str(kind): torch.tensor([0, 1, 3]).to(kind) for kind in kinds},
        "uint16": torch.tensor([1, 65535]).to(torch.uint16),
        "complex": torch.tensor([1 + 2j]),
        "transposed": base.reshape(3, 4).t(),
        "part": base[3:7],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


@pytest.mark.parametrize("as_zip", [True, False])
def test_both_layouts_of_torch_save_read_bit_for_bit(as_zip: bool, tmp_path: Path) -> None:
    path, tensors = tmp_path / "file.pt", samples()
    plain = {"dtype": torch.float32, "size": torch.Size([1, 2]), "list": [1, 2.5, "a", None, b"b"]}
    torch.save({**tensors, **plain}, path, _use_new_zipfile_serialization=as_zip)
    read = read_persistent(path)
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor.detach()), name
        assert read[name].dtype == tensor.dtype
    assert {name: read[name] for name in plain} == plain


@pytest.mark.parametrize("as_zip", [True, False])
def test_the_tensors_of_a_whole_pickled_module_come_out_where_that_is_asked_for(
    as_zip: bool, tmp_path: Path
) -> None:
    first = torch.nn.Linear(3, 2)
    module = torch.nn.Sequential(first, torch.nn.GELU())
    path = tmp_path / "module.pt"
    torch.save(module, path, _use_new_zipfile_serialization=as_zip)
    assert "torch.nn.modules.linear.Linear" in refusal(path)
    linear = read_persistent(path, foreign="inert").state["_modules"]["0"]
    assert linear.class_name == "torch.nn.modules.linear.Linear"
    assert torch.equal(linear.state["_parameters"]["weight"], first.weight)


class Callback(collections.OrderedDict):  # a foreign class, also used as a key
    """Something of a training framework."""

    best = 0


def test_foreign_classes_and_containers_stay_inert(write: Write) -> None:
    mine = Callback(a=1)
    mine.best = 2
    read = read_persistent(write(pickle.dumps({Callback: mine})), foreign="inert")
    (value,) = read.values()
    assert isinstance(value, Read)
    assert (value.class_name, value.items) == (f"{__name__}.Callback", {"a": 1})
    assert value.state == {"best": 2}


def test_attributes_of_a_state_dict_are_dropped(tmp_path: Path) -> None:
    state = torch.nn.Linear(2, 1).state_dict()
    torch.save(state, tmp_path / "file.pt")
    read = read_persistent(tmp_path / "file.pt")
    assert type(read) is dict
    assert list(read) == ["weight", "bias"]


def test_numpy_scalars_become_numbers_and_arrays_stay_inert(write: Write) -> None:
    numpy = pytest.importorskip("numpy")
    content = {"a": numpy.float64(1.5), "b": numpy.int32(-3), "c": numpy.bool_(True)}
    assert read_persistent(write(pickle.dumps(content))) == {"a": 1.5, "b": -3, "c": True}
    array = read_persistent(write(pickle.dumps(numpy.ones(3), 4)))
    assert array.class_name == "numpy.ndarray"


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip with these entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


ONE = reference("torch\nFloatStorage", "0", 1)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"a/other": b""}, "without one data.pkl"),
        ({"a/data.pkl": ONE, "b/data.pkl": ONE}, "without one data.pkl"),
        ({"a/data.pkl": ONE}, "missing"),
        ({"a/data.pkl": ONE, "a/data/0": b"12345678"}, "8 bytes claims to hold 4"),
        ({"a/data.pkl": ONE, "a/data/0": b"1234", "a/byteorder": b"big"}, "big-endian"),
        ({"a/data.pkl": reference("torch\nFloatStorage", "0", 1 << 28)}, "1073741824 bytes"),
        ({"a/data.pkl": reference("os\nsystem", "0", 1)}, "os.system"),
        ({"a/data.pkl": reference("_codecs\nencode", "0", 1)}, "not one to a storage"),
    ],
)
def test_a_zip_that_is_not_from_torch_save_is_refused(
    entries: dict[str, bytes], expected: str, write: Write
) -> None:
    assert expected in refusal(write(zipped(entries)))


def test_a_compressed_zip_is_refused_so_that_it_cannot_swell(write: Write) -> None:
    content = zipped({"a/data.pkl": ONE * 1000}, zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(write(content))


def test_every_opcode_of_pickle_is_known_or_refused() -> None:
    from solvers.unpickle import PLAIN, WITH_ARGUMENT  # noqa: PLC0415 (only this test looks inside)

    rest = {op.name for op in pickletools.opcodes} - set(PLAIN) - set(WITH_ARGUMENT)
    refused = {"EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}
    assert rest == {*refused, "STOP", "FRAME"}
