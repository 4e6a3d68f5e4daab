"""Features by an ONNX file: what goes in, which numbers come out, over ranks and in parts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor

from eval.features import load_space
from eval.fid import main
from eval.onnx_features import MEAN, STD, load_onnx, prepared
from src.images import to_bytes
from tests.eval.pictures import fill

ROOT = Path(__file__).parents[2]
Axis = int | str


def projection(width: int = 6) -> np.ndarray:
    g = np.random.default_rng(0)
    return g.normal(size=(width, 3, 8, 8)).astype(np.float32)


def write_network(
    path: Path, shape: tuple[Axis, ...] = ("n", 3, "h", "w"), *, ends: str = "tokens"
) -> Path:
    """Patches of 8x8, embedded: a map, the tokens behind one of their mean, or that mean."""
    weight = numpy_helper.from_array(projection(), "w")
    flat = numpy_helper.from_array(np.array([0, 0, -1]), "flat")
    nodes = [
        helper.make_node("Conv", ["pixels", "w"], ["map"], strides=[8, 8]),
        helper.make_node("Reshape", ["map", "flat"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["rows"], perm=[0, 2, 1]),
        helper.make_node("ReduceMean", ["rows"], ["first"], axes=[1], keepdims=1),
        helper.make_node("Concat", ["first", "rows"], ["tokens"], axis=1),
        helper.make_node("ReduceMean", ["rows"], ["mean"], axes=[1], keepdims=0),
    ]
    rank = {"map": 4, "tokens": 3, "mean": 2}[ends]
    entry = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, shape)
    output = helper.make_tensor_value_info(ends, TensorProto.FLOAT, [None] * rank)
    graph = helper.make_graph(nodes, "small", [entry], [output], [weight, flat])
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def images(count: int = 3, height: int = 40, width: int = 28) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def by_torch(pixels: Tensor) -> Tensor:
    return F.conv2d(pixels, torch.from_numpy(projection()), stride=8).mean((2, 3))


def by_pillow(image: Tensor, side: int) -> Tensor:
    levels = to_bytes(image).permute(1, 2, 0).numpy()
    square = Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC)
    seen = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
    middle, spread = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (seen - middle) / spread


def test_images_are_squeezed_by_pillows_bicubic_and_normalised_as_imagenets() -> None:
    given = images(3, 40, 52)
    ours = prepared(given, 24)
    theirs = torch.stack([by_pillow(image, 24) for image in given])
    level = 1 / 255 / min(STD)
    assert (ours - theirs).abs().max() < 1.01 * level
    assert ((ours - theirs).abs() > 0.01 * level).float().mean() < 1e-3


@pytest.mark.parametrize("ends", ["tokens", "mean"])
def test_the_features_are_the_first_token_or_the_vector(tmp_path: Path, ends: str) -> None:
    network = load_onnx(write_network(tmp_path / "net.onnx", ends=ends))
    found = network(images())
    assert torch.allclose(found, by_torch(prepared(images(), 224)), rtol=1e-4, atol=1e-5)
    assert found.shape == (3, 6)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (2, 3, 32, 32), ("n", 3, 32, 32)])
def test_a_fixed_side_and_batch_are_kept_to(tmp_path: Path, shape: tuple[Axis, ...]) -> None:
    network = load_onnx(write_network(tmp_path / "net.onnx", shape))
    expected = by_torch(prepared(images(), 32))
    assert torch.allclose(network(images()), expected, rtol=1e-4, atol=1e-5)


def test_grey_is_repeated_to_three_channels(tmp_path: Path) -> None:
    network = load_onnx(write_network(tmp_path / "net.onnx", ("n", 3, 32, 32)))
    grey = images()[:, :1]
    assert torch.equal(network(grey), network(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match="1 or 3"):
        network(torch.zeros(1, 4, 8, 8))


def test_what_the_features_are_hangs_on_the_file_and_not_on_its_place(tmp_path: Path) -> None:
    paths = [write_network(tmp_path / f"{name}.onnx") for name in "ab"]
    other = write_network(tmp_path / "c.onnx", ends="mean")
    told = [load_space("onnx", torch.device("cpu"), path).about for path in (*paths, other)]
    assert told[0] == told[1] != told[2]
    assert "token 0 of tokens; input resized to 224x224" in told[0]


@pytest.mark.parametrize(
    ("shape", "ends", "said"),
    [
        (("n", 3, 32, 24), "mean", "not images"),
        (("n", 1, 32, 32), "mean", "not images"),
        (("n", 3, 32, 32), "map", r"gives \[1, 6, 4, 4\], not \[N, D\] or \[N, T, D\]"),
        (("n", 3, 4, 4), "mean", "net.onnx: .*ONNXRuntimeError"),
    ],
)
def test_another_network_is_refused_in_a_line(
    tmp_path: Path, shape: tuple[Axis, ...], ends: str, said: str
) -> None:
    path = write_network(tmp_path / "net.onnx", shape, ends=ends)
    with pytest.raises(ValueError, match=said) as error:
        load_onnx(path)(images(1))
    assert "\n" not in str(error.value)


def run(*options: object) -> Result:
    return CliRunner().invoke(main, [*map(str, options), "--device", "cpu"])


@pytest.mark.parametrize("content", [None, b"", b"no network"])
def test_a_broken_or_missing_file_is_an_error_of_one_line(
    tmp_path: Path, content: bytes | None
) -> None:
    folder, path = fill(tmp_path / "a", 3), tmp_path / "net.onnx"
    if content is not None:
        path.write_bytes(content)
    options = ["calc", "--images", folder, "--ref", folder, "--features", "onnx"]
    for done in (run(*options), run(*options, "--weights", path)):
        assert done.exit_code == 1
        (line,) = done.output.splitlines()
        assert "onnx" in line


def test_onnxruntime_is_asked_for_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_network(tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"pip install onnxruntime$"):
        load_onnx(path)


def test_a_distance_is_the_same_in_parts_by_any_batch_and_from_a_kept_reference(
    tmp_path: Path,
) -> None:
    a, b = fill(tmp_path / "a", 9), fill(tmp_path / "b", 11, 100)
    network, found = write_network(tmp_path / "net.onnx", ("n", 3, 32, 32)), []
    own = ["--features", "onnx", "--weights", network]
    done = run("ref", "--data", b, "--dest", tmp_path / "b.npz", *own)
    assert done.exit_code == 0, done.output
    cache = ["--cache", tmp_path / "cache"]
    for other in ([b], [tmp_path / "b.npz", "--batch", 2], [b, *cache], [b, *cache]):
        out = tmp_path / "out.json"
        done = run("calc", "--images", a, "--ref", *other, *own, "--out", out)
        assert done.exit_code == 0, done.output
        found.append(json.loads(out.read_text())["fid"])
    assert found == pytest.approx([found[0]] * 4, rel=1e-5)
    assert found[0] > 0
    assert "Frechet distance (onnx)" in done.output
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 2


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    a, b = fill(tmp_path / "a", 300), fill(tmp_path / "b", 270, 300)
    network = write_network(tmp_path / "net.onnx", ("n", 3, 32, 32))
    own = ["--features", "onnx", "--weights", str(network), "--device", "cpu"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    found = []
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        words = [sys.executable, "-m", "eval.fid", "calc", "--images", str(a), "--ref", str(b)]
        started = [
            subprocess.Popen(
                [*words, *own, "--out", str(out)],
                cwd=ROOT,
                env={**shared, "WORLD_SIZE": str(count), "RANK": str(r), "LOCAL_RANK": str(r)},
            )
            for r in range(count)
        ]
        assert [process.wait(120) for process in started] == [0] * count
        found.append(json.loads(out.read_text()))
    assert found[0]["fid"] == pytest.approx(found[1]["fid"], rel=1e-6)
    assert (found[1]["count"], found[1]["ref_count"]) == (300, 270)
