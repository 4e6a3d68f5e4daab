"""The predictors that others published: the very files, forks of them, and DyWeight's."""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from solvers.epd import MultistepTable
from solvers.field import Field
from solvers.predictor import Predictor, load_predictor, main
from solvers.process import VE
from solvers.schedules import NoiseLevels, polynomial
from tests import nvidia
from tests.solvers.gauss import ve

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((ROOT / "tests" / "data" / "predictors.json").read_text())
THEIRS = ROOT.parent / "shared" / "golden" / "published"
"""Six of the authors' own files, where they lie beside the repository."""


@functools.cache
def shipped() -> dict[str, Predictor]:
    """Our predictors by the names of the published files that they were made of."""
    loaded = [load_predictor(path) for path in (ROOT / "exps").glob("*/*.pkl")]
    named = [(re.search(r"file (\S+?\.pkl)", p.recipe.source), p) for p in loaded]
    return {match[1]: predictor for match, predictor in named if match}


def equal(a: Predictor, b: Predictor) -> bool:
    """Whether two have the same table, to the bit."""
    pairs = zip(a.table.tensors(), b.table.tensors(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.skipif(not THEIRS.is_dir(), reason="the authors' files are not here")
def test_the_authors_own_files_hold_the_shipped_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(THEIRS.glob("*.pkl"))
    assert files
    for path in files:
        theirs = load_predictor(path)
        name = path.name.replace("__", "/")
        (ours,) = (ours for source, ours in shipped().items() if source.endswith(name))
        assert equal(theirs, ours), path.name
        assert main(["convert", str(path), str(tmp_path / "ours.json")]) == 0
        again = load_predictor(tmp_path / "ours.json")
        assert again.recipe == theirs.recipe
        assert main(["show", str(path)]) == 0
        assert f"{theirs.nfe} sequential" in capsys.readouterr().out


@pytest.mark.parametrize("name", GOLDEN)
def test_all_43_read_from_the_layout_of_their_authors(name: str, tmp_path: Path) -> None:
    entry = GOLDEN[name]
    path = tmp_path / "published.pkl"
    written = {"device": "cuda:0", "with_loss": "iccv" in name}
    path.write_bytes(nvidia.predictor_bytes(entry["parameters"], entry["metadata"], **written))
    theirs, ours = load_predictor(path), shipped()[name]
    assert equal(theirs, ours)
    assert replace(theirs.recipe, source=ours.recipe.source) == ours.recipe


@nvidia.persistent
class Branch(nvidia.EPD_predictor):
    """A fork's predictor, with more of everything."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.register_buffer("table", torch.randn(100_000))
        self.register_parameter("more", nn.Parameter(torch.ones(3)))
        self.net = nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.LayerNorm(2))
        self.function = torch.nn.functional.softplus
        self.nested = {"path": Path("a/b"), "size": torch.Size([3]), "deep": [[[[[[1]]]]]]}


def test_a_fork_may_add_attributes_modules_and_buffers(tmp_path: Path) -> None:
    entry = next(iter(GOLDEN.values()))
    raw = {n: torch.tensor(v) for n, v in entry["parameters"].items()}
    paths = [tmp_path / "plain.pkl", tmp_path / "branch.pkl"]
    for path, kind in zip(paths, (nvidia.EPD_predictor, Branch), strict=True):
        model = kind(raw, **entry["metadata"], student="mine")
        path.write_bytes(nvidia.dumps({"model": model, "optimizer": nn.Identity()}))
    plain, branch = (load_predictor(path) for path in paths)
    assert paths[1].stat().st_size > 400_000
    assert branch.recipe == plain.recipe
    assert equal(branch, plain)


# --- DyWeight -------------------------------------------------------------------------------


@nvidia.persistent
class DyWeightPredictor(nn.Module):
    """Weights of all slopes so far in every step, and what the network is told."""

    mask: Tensor

    def __init__(self, n: int, seed: int, window: int = 3, **settings: Any) -> None:
        super().__init__()
        vars(self).update(settings)
        rng = torch.Generator().manual_seed(seed)
        weights = 0.05 * torch.randn(n, n, generator=rng, dtype=torch.float64) + 0.9 * torch.eye(n)
        self.hybrid_weights = nn.Parameter(weights)
        self.t_scale = nn.Parameter(0.8 + 0.3 * torch.rand(n - 1, generator=rng).double())
        self.register_buffer("mask", torch.ones(n, n).tril().triu(1 - window))

    def sample(self, noise: Tensor) -> Tensor:
        """The formulas as they stand in the paper (arXiv:2603.11607)."""
        n, w = len(self.mask), self.hybrid_weights.detach() * self.mask
        t = polynomial(n + 1, 0.002, 80)
        x, tau = noise * t[0], t[0]
        slopes = [x / (1 + tau**2).sqrt()]
        for i in range(n):
            if i:
                slopes.append((x - ve(x, (self.t_scale[i - 1].detach() * tau).expand(1))) / tau)
            x = x + (t[i + 1] - tau) * sum(w[i, j] * slopes[j] for j in range(i + 1))
            tau = tau + w[i].sum() * (t[i + 1] - tau)
        return x


SETTINGS = {"schedule_type": "polynomial", "schedule_rho": 7, "dataset_name": "cifar10"}
NOISE = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("n", "window"), [(2, 3), (4, 3), (5, 5), (8, 3), (8, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_dyweights_predictors_become_parallel_multistep(
    n: int, window: int, seed: int, tmp_path: Path
) -> None:
    model = DyWeightPredictor(n, seed, window, num_steps=n + 1, **SETTINGS)
    (tmp_path / "dy.pkl").write_bytes(nvidia.dumps({"predictor": model}))
    predictor = load_predictor(tmp_path / "dy.pkl")
    assert isinstance(predictor.table, MultistepTable)
    assert (predictor.nfe, predictor.evaluations) == (n - 1, n - 1)
    sampler = predictor.sampler(NoiseLevels(VE, 0.002, 80.0))
    *_, x = sampler.states(Field(ve), NOISE * sampler.sigmas[0])
    expected = model.sample(NOISE)
    assert (x - expected).abs().max() < 1e-11 * expected.abs().max()
    assert main(["convert", str(tmp_path / "dy.pkl"), str(tmp_path / "dy.json")]) == 0


def dyweight(**tensors: Tensor) -> DyWeightPredictor:
    """One of 4 steps that is damaged."""
    model = DyWeightPredictor(4, 0, **SETTINGS)
    for name, values in tensors.items():
        getattr(model, name).data = values
    return model


SHARED = [[0] * 3000] * 3000
SHAPES = r"hybrid_weights \[N, N\]"
REFUSED = {
    "a window of six": (DyWeightPredictor(8, 0, 6, **SETTINGS), "more than 4 earlier slopes"),
    "no analytic start": (DyWeightPredictor(4, 0, afs=False, **SETTINGS), "afs on"),
    "afs by a number": (DyWeightPredictor(4, 0, afs=0, **SETTINGS), "afs on"),
    "another num_steps": (DyWeightPredictor(4, 0, num_steps=4, **SETTINGS), "num_steps 4"),
    "a setting of lists that are shared": (
        nvidia.EPD_predictor({}, num_steps=[SHARED] * 3000),
        "num_steps holds more than [0-9]+ values",
    ),
    "nothing learned": (nvidia.EPD_predictor({}, num_steps=4), "no parameters of EPD-Solver"),
    "weights of no square": (dyweight(hybrid_weights=torch.ones(4, 3)), SHAPES),
    "one weight": (dyweight(hybrid_weights=torch.ones(())), SHAPES),
    "no weights": (dyweight(hybrid_weights=torch.ones(0, 0)), SHAPES),
    "a mask of another size": (dyweight(mask=torch.ones(3, 3)), SHAPES),
    "weights of NaN": (dyweight(hybrid_weights=torch.full((4, 4), torch.nan)), "falling levels"),
    "a number": (3, 'nor a published one with a "model"'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_predictor_that_can_be_served_says_why(name: str, tmp_path: Path) -> None:
    model, expected = REFUSED[name]
    (tmp_path / "a.pkl").write_bytes(nvidia.dumps({"model": model}))
    with pytest.raises(ValueError, match=expected) as error:
        load_predictor(tmp_path / "a.pkl")
    assert str(error.value).startswith(str(tmp_path))
