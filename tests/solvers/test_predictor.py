"""Predictor files: exact, safe, and refused in one line when they are wrong."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from solvers.classic import IPNDM, Euler
from solvers.epd import EPD, Directions
from solvers.field import Field, Tally
from solvers.integrate import levels
from solvers.predictor import (
    Predictor,
    find_predictor,
    load_predictor,
    main,
    save_predictor,
    validate,
)
from solvers.process import FLOW, VE
from solvers.published import decode
from solvers.recipe import Recipe
from solvers.sampler import Sampler
from solvers.schedules import time_uniform
from tests import nvidia as files
from tests.solvers.gauss import LATENTS, flow, ve

DATA = Path(__file__).resolve().parents[1] / "data"
GOLDEN: dict[str, dict[str, Any]] = json.loads((DATA / "predictors.json").read_text())
DECODED = [name for name, entry in GOLDEN.items() if "decoded" in entry]
SAMPLED = [name for name, entry in GOLDEN.items() if "x" in entry]
NAMES = {"r": "position", "weight": "weight", "time_scale": "scale_time", "dir_scale": "scale_dir"}


def published(tmp_path: Path, name: str, **options: Any) -> Path:
    """One of the published predictors in the published layout."""
    entry = GOLDEN[name]
    path = tmp_path / "published.pkl"
    path.write_bytes(files.predictor_bytes(entry["parameters"], entry["metadata"], **options))
    return path


def predictor(num_steps: int = 3, num_points: int = 2, **settings: Any) -> Predictor:
    """A valid predictor with a table of no special shape."""
    n = num_steps - 1
    r = torch.linspace(0.1, 0.9, n * num_points, dtype=torch.float64).reshape(n, num_points)
    one = torch.ones_like(r)
    table = Directions(r, one / num_points, one, one)
    return Predictor(table, Recipe(num_steps, num_points, **settings))


def changed(given: Predictor, **tensors: Tensor) -> Predictor:
    """The predictor with other tensors in its table."""
    return Predictor(dataclasses.replace(given.table, **tensors), given.recipe)


def same(a: Predictor, b: Predictor) -> bool:
    """Equal to the last bit."""
    pairs = zip(a.table.tensors(), b.table.tensors(), strict=True)
    return a.recipe == b.recipe and all(torch.equal(s, t) for s, t in pairs)


def refused(action: Callable[[], object]) -> str:
    """The one-line message of a refusal."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (every caller looks at the message)
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


# --- published predictors -------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODED)
def test_published_parameters_decode_to_the_recorded_values(name: str, tmp_path: Path) -> None:
    table = load_predictor(published(tmp_path, name)).table
    for ours, theirs in NAMES.items():
        recorded = torch.tensor(GOLDEN[name]["decoded"][theirs], dtype=torch.float64)
        assert (getattr(table, ours) - recorded).abs().max() < 1e-8, ours


@pytest.mark.parametrize("name", SAMPLED)
def test_a_published_predictor_gives_the_recorded_sample(name: str, tmp_path: Path) -> None:
    predictor, entry = load_predictor(published(tmp_path, name)), GOLDEN[name]
    is_flow, recipe = entry["process"] == "flow", predictor.recipe
    low, high = recipe.sigma_min or 0.002, recipe.sigma_max or 80.0
    sigmas = entry["sigmas"] if is_flow else time_uniform(recipe.num_steps, low, high)
    process = FLOW if is_flow else VE
    sampler = Sampler(predictor.solver(process), levels(sigmas), process, recipe.afs)
    field, x = Field(flow if is_flow else ve), LATENTS
    *_, last = sampler.states(field, x * sampler.sigmas[0])
    expected = torch.tensor(entry["x"], dtype=torch.float64).reshape(x.shape)
    assert (last - expected).abs().max() < 1e-10 * expected.abs().max()
    assert field.tally == Tally(predictor.nfe, predictor.evaluations * len(x))


@pytest.mark.parametrize("with_loss", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("protocol", range(6))
def test_the_published_layout_loads_whoever_wrote_it(
    protocol: int, device: str, with_loss: bool, tmp_path: Path
) -> None:
    path = published(tmp_path, SAMPLED[0], protocol=protocol, device=device, with_loss=with_loss)
    raw = {k: torch.tensor(v).float() for k, v in GOLDEN[SAMPLED[0]]["parameters"].items()}
    expected = decode(raw, scale_dir=0.05, scale_time=0.05)
    assert torch.equal(load_predictor(path).table.r, expected.r)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_steps": 9}, "num_steps 9"),
        ({"num_points": 3}, "num_points 3"),
        ({"sampler_stu": "amed"}, "amed"),
        ({"schedule_type": "polynomail"}, "did you mean 'polynomial'"),
        ({"schedule_type": None}, "schedule_type"),
        ({"scale_dir": "wide"}, "wide"),
        ({"afs": "yes"}, "'yes'"),
        ({"backend_config": [1]}, "backend_config"),
        ({"schedule_type": "flowmatch", "afs": True}, "afs"),
        ({"parameters": {"r_params": [[0.0, math.nan], *[[0.0, 0.0]] * 4]}}, "r[0, 1] is nan"),
        ({"guidance_rate": math.nan, "guidance_type": "cfg"}, "guidance_rate holds nan"),
        ({"sigma_max": math.inf}, "sigma_max holds inf"),
        ({"parameters": {"r_params": 1.0}}, "r_params has the shape"),
        ({"parameters": {"weight_s": [[0.0]]}}, "weight_s has the shape"),
    ],
)
def test_a_published_file_with_a_wrong_setting_is_refused(
    settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    entry = GOLDEN[SAMPLED[0]]
    path = tmp_path / "published.pkl"
    settings = {**entry["metadata"], **settings}
    parameters = entry["parameters"] | settings.pop("parameters", {})
    path.write_bytes(files.predictor_bytes(parameters, settings))
    message = refused(lambda: load_predictor(path))
    assert expected in message
    assert message.startswith(str(path))


# --- raw parameters -------------------------------------------------------------------------


def test_decoding_by_hand_and_fcn_switches_off_the_last_direction_scale_alone() -> None:
    raw = {"r_params": torch.tensor([[0.0, 1.0986122886681098]], dtype=torch.float64)}
    raw["weight_s"] = raw["scale_dir_params"] = raw["scale_time_params"] = raw["r_params"]
    table = decode(raw, scale_dir=0.1)
    assert table.r.tolist()[0] == pytest.approx([0.5, 0.75])
    assert table.weight.tolist()[0] == pytest.approx([0.25, 0.75])
    # sigmoid(log(3) / 2) = sqrt(3) / (1 + sqrt(3))
    assert table.dir_scale.tolist()[0] == pytest.approx([1, 0.9 + 0.2 * 3**0.5 / (1 + 3**0.5)])
    assert table.time_scale.tolist()[0] == [1.0, 1.0]
    raw = {name: torch.ones(3, 2) for name in ("r_params", "weight_s", "scale_dir_params")}
    free, fixed = (decode(raw, scale_dir=0.1, fcn=fcn).dir_scale for fcn in (False, True))
    assert torch.equal(free[:-1], fixed[:-1])
    assert (free[-1] != 1).all()
    assert (fixed[-1] == 1).all()


# --- validation -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("r", float("nan"), "r[1, 0] is nan: it must be finite and 0 to 1"),
        ("r", 1.2, "r[1, 0] is 1.2: it must be finite and 0 to 1"),
        ("r", -0.01, "r[1, 0] is -0.01"),
        ("weight", 0.6, "sum of weight[1] is 1.1"),
        ("weight", -0.5, "weight[1, 0] is -0.5"),
        ("weight", 0.5002, "sum of weight[1] is 1.0002"),
        ("time_scale", 0.0, "time_scale[1, 0] is 0"),
        ("dir_scale", float("inf"), "dir_scale[1, 0] is inf"),
    ],
)
def test_a_wrong_number_in_a_table_is_refused_by_its_place(
    name: str, value: float, expected: str
) -> None:
    given = predictor()
    tensor = getattr(given.table, name).clone()
    tensor[1, 0] = value
    assert expected in refused(lambda: validate(changed(given, **{name: tensor})))
    as_float32 = torch.tensor([[0.3, 0.70005], [0.5, 0.5]])  # sums to 1 as that does
    assert validate(changed(given, weight=as_float32)).recipe


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_steps": 1}, "num_steps 1"),
        ({"num_steps": 4}, "num_steps 4 and num_points 2 need [3, 2]"),
        ({"num_points": 3}, "need [2, 3]"),
        ({"num_points": 0}, "num_points 0"),
        ({"solver": "epdd"}, "did you mean 'epd'"),
        ({"base": "unipc"}, "unknown base 'unipc'"),
        ({"base": "ipndm", "max_order": 5}, "max_order 5"),
        ({"base": "dpmpp", "max_order": 4}, "max_order 4"),
        ({"schedule_type": "cosine"}, "unknown schedule_type 'cosine'"),
        ({"schedule_rho": 0.0}, "schedule_rho 0.0"),
        ({"sigma_min": 0.0}, "sigma_min 0.0"),
        ({"sigma_min": 80.0, "sigma_max": 0.002}, "below sigma_max 0.002"),
        ({"sigma_max": float("nan")}, "sigma_max nan"),
        ({"schedule_type": "flowmatch", "afs": True}, "afs True"),
        ({"backend": "sd3", "afs": True}, "afs True"),
        ({"flowmatch_shift": -3.0}, "flowmatch_shift -3.0"),
        ({"schedule_type": "custom"}, "a list for the custom schedule"),
        ({"schedule_type": "custom", "sigmas": (3.0, 2.0)}, "must be 3 levels"),
        ({"schedule_type": "custom", "sigmas": (3.0, 2.0, 2.0)}, "falling levels"),
        ({"scale_dir": 1.5}, "scale_dir 1.5"),
        ({"guidance_rate": float("inf")}, "guidance_rate inf"),
        ({"format_version": 3}, "format_version 3"),
        ({"training": {"loss": float("nan")}}, "training.loss holds nan"),
        ({"training": {"object": object()}}, "holds a object"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_value(settings: dict[str, Any], expected: str) -> None:
    given = predictor()
    wrong = Predictor(given.table, dataclasses.replace(given.recipe, **settings))
    assert expected in refused(lambda: validate(wrong))


@pytest.mark.parametrize(
    ("settings", "nfe", "evaluations"),
    [
        ({"num_steps": 4, "afs": True}, 5, 8),
        ({"num_steps": 11}, 20, 30),
        ({"num_steps": 3, "num_points": 1}, 4, 4),
        ({"num_steps": 3, "base": "heun"}, 6, 10),
    ],
)
def test_calls_and_evaluations_are_counted_by_hand(
    settings: dict[str, Any], nfe: int, evaluations: int
) -> None:
    given = predictor(**settings)
    assert (given.nfe, given.evaluations) == (nfe, evaluations)
    solvers = [predictor(base=b, max_order=n).solver() for b, n in (("ipndm", 2), ("euler", 3))]
    assert [s.base for s in solvers if isinstance(s, EPD)] == [IPNDM(2), Euler()]


# --- files ----------------------------------------------------------------------------------


def rich() -> Predictor:
    """A predictor whose recipe has something in every kind of field."""
    settings: dict[str, Any] = {
        "schedule_type": "custom",
        "sigmas": (14.0, 1.0 / 3, 0.002),
        "backend_config": {
            "name": 'a "quoted" [ 1, 2 ] name',
            "sizes": [1, 2],
            "deep": {"x": None},
        },
        "training": {"loss": [0.1, 1e-300], "seed": 2**40, "note": "é\n2"},
        "guidance_type": "cfg",
        "guidance_rate": 7.5,
        "img_resolution": 512,
    }
    return predictor(**settings)


@pytest.mark.parametrize("suffix", [".pkl", ".json"])
def test_a_saved_predictor_loads_bit_for_bit(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    save_predictor(rich(), path)
    assert same(load_predictor(path), rich())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == ".pkl":
        content = torch.load(path, weights_only=True)
        assert content["format_version"] == 1
        assert torch.equal(content["table"]["r"], rich().table.r)
        assert content["recipe"]["guidance_rate"] == 7.5


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    values=st.lists(st.floats(0, 1), min_size=12, max_size=12),
    scale=st.floats(1e-300, 1e300),
)
def test_pickle_to_json_to_pickle_changes_no_byte(
    shape: tuple[int, int],
    values: list[float],
    scale: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("files")
    n, k = shape
    given = predictor(n + 1, k)
    r = torch.tensor(values[: n * k], dtype=torch.float64).reshape(n, k)
    given = changed(given, r=r, dir_scale=torch.full_like(r, -scale))
    for name in ("a.pkl", "b.json", "c.pkl"):
        save_predictor(given, folder / name)
        given = load_predictor(folder / name)
    assert (folder / "a.pkl").read_bytes() == (folder / "c.pkl").read_bytes()


def test_what_is_not_valid_or_cannot_be_written_is_refused(tmp_path: Path) -> None:
    good = predictor()
    save_predictor(good, tmp_path / "a.pkl")
    before = (tmp_path / "a.pkl").read_bytes()
    bad = changed(good, r=good.table.r * 9)
    assert "r[0, 1]" in refused(lambda: save_predictor(bad, tmp_path / "a.pkl"))
    assert (tmp_path / "a.pkl").read_bytes() == before
    (tmp_path / "file").touch()
    where = tmp_path / "file" / "a.pkl"
    assert "cannot make the folder" in refused(lambda: save_predictor(good, where))
    assert "ends in" in refused(lambda: save_predictor(good, tmp_path / "a.bin"))


def json_with(tmp_path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A predictor's JSON after an edit."""
    path = tmp_path / "a.json"
    save_predictor(predictor(), path)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda c: c.update(format_version=3), "version '3' is unknown"),
        (lambda c: c.update(format_version="1"), "version '1' is unknown"),
        (lambda c: c.pop("format"), "neither"),
        (lambda c: c.pop("table"), "no table"),
        (lambda c: c["recipe"].pop("num_steps"), "no num_steps"),
        (lambda c: c["recipe"].update(num_stepz=3), "did you mean 'num_steps'"),
        (lambda c: c["recipe"].update(num_steps="3"), "num_steps is '3', where int belongs"),
        (lambda c: c["recipe"].update(num_steps=True), "num_steps is 'True'"),
        (lambda c: c["recipe"].update(afs=1), "afs is '1', where bool belongs"),
        (lambda c: c["recipe"].update(sigma_min="low"), "float or nothing"),
        (lambda c: c["recipe"].update(sigmas=["a"]), "sigmas is 'a'"),
        (lambda c: c["table"].pop("r"), "it needs r, weight"),
        (lambda c: c["table"].update(s=[[1]]), "it needs r, weight"),
        (lambda c: c["table"].update(r=[[0.1, 0.2], [0.3]]), "r is not a table"),
        (lambda c: c["table"].update(r=[["a", "b"]]), "r is not a table"),
        (lambda c: c["table"].update(r=[]), "r has the shape [0]"),
        (lambda c: c["table"]["r"][0].__setitem__(0, float("nan")), "NaN is not a JSON number"),
        (lambda c: c["table"].update(r=[[0.1, 0.2]]), "r has the shape [1, 2]"),
    ],
)
def test_a_broken_json_is_refused(
    edit: Callable[[dict[str, Any]], object], expected: str, tmp_path: Path
) -> None:
    path = json_with(tmp_path, edit)
    message = refused(lambda: load_predictor(path))
    assert expected in message
    assert message.startswith(str(path))


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    path, pickle = tmp_path / "a.json", tmp_path / "a.pkl"
    for text in ("", "{", "[1]", '"text"', "{" * 100_000, "[" * 100_000, "{}"):
        path.write_text(text)
        assert refused(lambda: load_predictor(path)).startswith(str(path))
    ones = torch.ones(2)
    for content in ({"model": ones}, ones, {"a": 1}, {"format": "epd-predictor"}):
        torch.save(content, pickle)
        assert refused(lambda: load_predictor(pickle)).startswith(str(pickle))


# --- names ----------------------------------------------------------------------------------


def test_a_shipped_predictor_is_found_by_its_name_and_others_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cifar10-5nfe", "cifar10/cifar10-5nfe", "exps/cifar10/cifar10-5nfe.pkl"):
        assert find_predictor(name).parts[-3:] == ("exps", "cifar10", "cifar10-5nfe.pkl")
    assert "cifar10-5nfe" in refused(lambda: find_predictor("cifar-5nfe"))
    assert "sd15-best" in refused(lambda: find_predictor("sd15-bets.pkl"))
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        save_predictor(predictor(), tmp_path / folder / "same.pkl")
    assert "one/same or two/same" in refused(lambda: find_predictor("same", tmp_path))
    assert find_predictor("two/same", tmp_path) == tmp_path / "two" / "same.pkl"


# --- command line ---------------------------------------------------------------------------


def test_a_run_is_its_folder_or_its_number(tmp_path: Path) -> None:
    for file in (
        "00002-cifar10-4-5-epd/network-snapshot-000005.pkl",
        "00002-cifar10-4-5-epd/network-snapshot-000010.pkl",
        "00011-ours/predictor-00001.pkl",
        "00011-ours/predictor.pkl",
        "20260101-120000-ppo/export/network-snapshot-export-step000100.pkl",
        "20260101-120000-ppo/export/network-snapshot-export-best.pkl",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert find_predictor("2", tmp_path).name == "network-snapshot-000010.pkl"
    assert find_predictor(f"{tmp_path}/00002-cifar10-4-5-epd/").name.endswith("-000010.pkl")
    assert find_predictor("11", tmp_path) == tmp_path / "00011-ours" / "predictor.pkl"
    stage_2 = find_predictor(str(tmp_path / "20260101-120000-ppo"))
    assert stage_2.name == "network-snapshot-export-best.pkl"
    assert "'3'" in refused(lambda: find_predictor("3", tmp_path))
    (tmp_path / "00002-again").mkdir()
    assert "say which" in refused(lambda: find_predictor("2", tmp_path))


def test_convert_reads_a_published_file_and_show_prints_what_is_shipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = published(tmp_path, SAMPLED[0], device="cuda:0", with_loss=True)
    assert main(["convert", str(source), str(tmp_path / "ours.json")]) == 0
    assert "wrote" in capsys.readouterr().out
    assert same(load_predictor(tmp_path / "ours.json"), load_predictor(source))
    assert main(["show", "sd15-best"]) == 0
    assert "20 sequential, 30 evaluations" in capsys.readouterr().out
    assert main(["show", "epd-multistep-k2-3nfe-guided"]) == 0
    assert "format_version     2\n" in capsys.readouterr().out
    assert main(["show", "cifar10-5nfe", "--sigmas"]) == 0
    assert capsys.readouterr().out.startswith("80, ")


def test_an_error_is_one_line_on_stderr_with_status_1_and_nothing_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / "hostile.pkl"
    path.write_bytes(f"cos\nsystem\n(S'echo > {sentinel}'\ntR.".encode())
    for arguments, words in (
        (["show", "nowhere"], "no file and no shipped predictor"),
        (["convert", "cifar10-5nfe", "README.md/a.pkl"], "README.md"),
        (["show", str(path)], "refused: it asks for os.system, which is not allowed in it"),
    ):
        assert main(arguments) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("Error: ")
        assert words in printed.err
        assert printed.err.count("\n") == 1
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "command"),
        (["shwo"], "invalid choice: 'shwo'"),
        (["show"], "source"),
        (["show", "cifar10-5nfe", "--sigma_s"], "unrecognized arguments: --sigma_s"),
    ],
)
def test_an_error_of_usage_is_one_line_too_with_status_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    printed = capsys.readouterr()
    assert (done.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert printed.err.startswith("Error: ")
    assert words in printed.err
