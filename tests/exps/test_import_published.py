"""The shipped predictors are the published ones."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from exps.import_published import (
    ROOT,
    documented,
    from_numbers,
    import_all,
    main,
    name_of,
    with_table,
)
from solvers.predictor import decode, load_predictor
from tests import nvidia as files

SOURCE = ROOT / "tests" / "data" / "predictors.json"
GOLDEN = json.loads(SOURCE.read_text())


def test_all_43_are_shipped_as_the_script_writes_them(tmp_path: Path) -> None:
    written = import_all(SOURCE, tmp_path)
    assert len(written) == len(GOLDEN) == 43
    for name in written:
        shipped = (ROOT / "exps" / f"{name}.pkl").read_bytes()
        assert shipped == (tmp_path / f"{name}.pkl").read_bytes(), name


@pytest.mark.parametrize("published", GOLDEN)
def test_a_shipped_predictor_holds_the_published_numbers(published: str) -> None:
    entry = GOLDEN[published]
    shipped = load_predictor(ROOT / "exps" / f"{name_of(published)}.pkl")
    metadata = entry["metadata"]
    raw = {n: torch.tensor(v, dtype=torch.float64) for n, v in entry["parameters"].items()}
    table = decode(raw, scale_dir=metadata["scale_dir"], scale_time=metadata["scale_time"])
    for a, b in zip(shipped.table.tensors(), table.tensors(), strict=True):
        assert (a - b).abs().max() < 1e-7
    assert shipped.recipe.training["metadata"] == metadata
    assert published in shipped.recipe.source
    assert "arXiv" in shipped.recipe.source


@pytest.mark.parametrize(
    ("published", "name"),
    [
        (
            "iccv/00002-cifar10-4-5-epd-uni1.0-afs/network-snapshot-000010.pkl",
            "cifar10/cifar10-5nfe",
        ),
        (
            "iccv/00032-lsun_bedroom_ldm-6-9-ipndm-uni1.0-afs/network-snapshot-000010.pkl",
            "lsun-bedroom/lsun-bedroom-9nfe-ipndm",
        ),
        ("tpami/sd3-512/sd3-512-best.pkl", "sd3-512/sd3-512-best"),
    ],
)
def test_names_say_data_set_calls_and_kind(published: str, name: str) -> None:
    assert name_of(published) == name


def test_the_name_tells_the_true_number_of_calls() -> None:
    for published, predictor in from_numbers(SOURCE):
        if published.startswith("iccv"):
            assert f"-{predictor.nfe}nfe" in name_of(published)


def test_the_table_of_the_readme_is_the_one_that_the_script_writes() -> None:
    readme = (ROOT / "exps" / "README.md").read_text()
    written = {name_of(p): documented(v, p) for p, v in from_numbers(SOURCE)}
    assert with_table(readme, written) == readme
    assert all(f"`{name}`" in readme for name in written)


def test_a_folder_of_published_pickles_gives_the_same_files(tmp_path: Path) -> None:
    chosen = [n for n in GOLDEN if "00004" in n or "flux-best" in n]
    for name in chosen:
        path = tmp_path / "published" / name
        path.parent.mkdir(parents=True)
        entry = GOLDEN[name]
        content = files.predictor_bytes(entry["parameters"], entry["metadata"], device="cuda:0")
        path.write_bytes(content)
    arguments = ["--source", str(tmp_path / "published"), "--target", str(tmp_path / "ours")]
    result = CliRunner().invoke(main, arguments)
    assert result.output == f"wrote 2 predictors under {tmp_path / 'ours'}\n"
    for name in chosen:
        ours = (tmp_path / "ours" / f"{name_of(name)}.pkl").read_bytes()
        assert ours == (ROOT / "exps" / f"{name_of(name)}.pkl").read_bytes()


def test_a_source_that_is_not_one_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    result = CliRunner().invoke(main, ["--source", str(tmp_path / "a.json")])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1
