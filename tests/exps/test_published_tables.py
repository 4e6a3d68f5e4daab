"""The 43 shipped predictors are the published ones, number by number."""

import json
from pathlib import Path

import torch

from solvers.predictor import load_predictor
from solvers.published import decode

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests" / "data" / "predictors.json").read_text())


def test_every_published_table_is_shipped_and_named_in_the_readme() -> None:
    readme = (ROOT / "exps" / "README.md").read_text()
    shipped = {}
    for path in (ROOT / "exps").glob("*/*.pkl"):
        predictor = load_predictor(path)
        if "; file " in (source := predictor.recipe.source):
            shipped[source.split("; file ")[1].split(";")[0]] = predictor
            assert f"| `{path.parent.name}/{path.stem}` |" in readme
            if "iccv" in source:
                assert f"-{predictor.nfe}nfe" in path.stem
    assert shipped.keys() == GOLDEN.keys()
    for file, entry in GOLDEN.items():
        raw = {n: torch.tensor(v, dtype=torch.float32) for n, v in entry["parameters"].items()}
        said = entry["metadata"]
        reaches = {name: said.get(name) or 0.0 for name in ("scale_dir", "scale_time")}
        table = decode(raw, **reaches, fcn=bool(said.get("fcn")))
        for a, b in zip(shipped[file].table.tensors(), table.tensors(), strict=True):
            assert torch.equal(a, b), file
        assert shipped[file].recipe.num_steps == said["num_steps"]
