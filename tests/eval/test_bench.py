"""The bench counts what it should; times themselves are not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from backends.generate import Job, generate
from eval import bench
from eval.bench import main, paired, with_network
from eval.latency import law, simulated
from solvers.sampler import hand_made
from tests import twins
from tests.eval.small import exact, save
from tests.pretend_gpu import pretend_gpu
from tests.tiny import tiny_model


def test_a_network_that_answers_at_once_leaves_all_else_and_two_things_take_turns() -> None:
    backend = exact()
    sampler = hand_made("euler", backend.levels, 4)
    (batch,) = generate(with_network(backend, lambda x, *_: x), sampler, [Job(0)], batch=1)
    start = sampler.sigmas[0] * torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert batch.tally.calls == 3
    assert torch.allclose(batch.latents, start.double(), rtol=1e-6)  # D(x) = x: no slope

    order: list[str] = []
    turns = paired(lambda: order.append("a"), lambda: order.append("b"), 3, torch.device("cpu"))
    assert (len(turns), "".join(order)) == (3, "ba" + "ab" + "ba" + "ab")


def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.bench.BATCHES", (1, 2))
    options = ["--model", str(tiny_model(tmp_path / "model")), "--repeats", "3"]
    options += ["--predictor", str(save(tmp_path, "p")), "--device", "cpu"]
    done = CliRunner().invoke(main, [*options, "--out", str(tmp_path / "b.json")])
    assert done.exit_code == 0, done.output
    timings = json.loads((tmp_path / "b.json").read_text())["timings"]
    assert len(timings) == 2 * 5
    assert {t["calls"] for t in timings} == {3, 5}
    assert all(t["ratio"] > 0 and t["rest"] > 0 for t in timings)
    assert [t["one_by_one"] is not None for t in timings] == [t["calls"] == 3 for t in timings]
    assert "epd K=2" in done.output


def test_the_law_and_the_simulation_are_what_they_say() -> None:
    took = law([1, 8], 4, lambda rows: rows * 1.0, lambda rows: rows / 100)
    assert took == pytest.approx(1 + 2 + 0.09)
    assert law([8], 1, lambda rows: rows * 1.0, lambda _rows: 5.0) == 8
    first = simulated("sd3", 0.5, 1e9)[2]  # K = 2, one image: calls of 2 and of 4 rows
    assert first["on 1"] == pytest.approx(5 * (2 + 4) * 0.5)
    assert first["on 2"] == pytest.approx(5 * (1 + 2) * 0.5)
    assert first["on 4"] == pytest.approx(10 * 0.5)  # a row each
    slow = simulated("flux", 0.5, 64**3 * 2 / 1e9)[2]  # a second for each other's row
    assert slow["on 2"] == pytest.approx(10 * (0.5 + 1))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--suite", "gpu"], "needs a GPU"),
        (["--points_degree", "2"], "--nproc_per_node"),
        (["--simulate", "sd15", "1"], "flux"),
        (["--simulate", "sd3", "-1"], "--simulate"),
    ],
)
def test_refusals(options: list[str], word: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "new/b.json"), "--model", "mixture-3x4x4", "--device", "cpu"]
    done = CliRunner().invoke(main, [*options, *out])
    assert done.exit_code != 0
    assert word in done.output
    assert len(done.output.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_ranks_are_timed_beside_the_law(tmp_path: Path) -> None:
    words = "-m src.ranks --standalone --nproc_per_node=2 -m eval.bench --points_degree 2"
    words += " --model mixture-3x4x4 --repeats 3 --device cpu --out"
    done = subprocess.run(
        [sys.executable, *words.split(), str(tmp_path / "b.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads((tmp_path / "b.json").read_text())
    assert {line["K"] for line in content["samplers"]} == {1, 2, 4}
    assert all(line["shared"] > 0 and line["law"] > 0 for line in content["samplers"])
    assert [line["rows"] for line in content["calls"]] == [1, 2, 4, 8, 16]
    assert "shared / alone" in (tmp_path / "b.txt").read_text()


def test_the_suite_for_a_gpu_runs_on_a_pretend_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for NCCL and whole commands, which stand in for themselves."""
    settings: dict[str, Any] = {"shipped_models": lambda: ["mixture-3x4x4"]}
    settings |= {"MODELS": ("mixture-3x4x4",), "GPU_BATCHES": (1,), "DTYPES": (torch.float32,)}
    settings |= {"COMMANDS": {"a": "-c print(7)", "b": "{count} of them"}}
    ours = bench.one_rank
    settings["one_rank"] = lambda _device: ours(torch.device("cpu"))
    for name, value in settings.items():
        monkeypatch.setattr(bench, name, value)
    with pretend_gpu():
        out = ["--suite", "gpu", "--device", "cuda", "--repeats", "3"]
        out += ["--model", str(twins.saved(tmp_path / "sd", twins.sd()))]
        done = CliRunner().invoke(main, [*out, "--out", str(tmp_path / "b.json"), "--debug"])
    assert done.exit_code == 0, done.exception
    content = json.loads((tmp_path / "b.json").read_text())
    assert [line["waits a step"] for line in content["images"]] == [0] * 2
    assert all(line["rms"] < 1e-5 for line in content["images"])  # in float32
    assert [line["name"] for line in content["times"]][:2] == ["dpm2", "epd K=1"]
    assert content["one rank"][0]["same images"]
    assert content["commands"][0]["last line"] == "7"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="of a GPU")
@pytest.mark.parametrize("family", ["sd", "uncond", "sd3", "flux", "sdxl"])
def test_a_gpu_gives_each_familys_images_of_the_cpu(family: str, tmp_path: Path) -> None:
    folder = twins.saved(tmp_path / family, twins.twin(family))
    lines = bench.gpu_images(str(folder), torch.device("cuda"))
    assert len(lines) == len(bench.DTYPES)
    assert lines[0]["rms"] < 1e-2  # in float32
    assert all(line["rms"] < 1 for line in lines)  # no NaN; bfloat16 of random weights is far off
    assert [line["waits a step"] for line in lines] == [0] * len(lines)
