"""The recorded outputs of the public reference implementations, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from solvers import schedules
from solvers.classic import DPM2, IPNDM, Euler, Heun, IPNDMv
from solvers.epd import EPD, Directions
from solvers.exponential import DEIS, DPMpp, UniPC
from solvers.field import Field
from solvers.integrate import Solver
from solvers.process import Process
from tests.solvers import mixture

CASES: list[dict[str, Any]] = mixture.RECORDED["cases"]
TOLERANCE = {"deis": 1e-3}  # recorded by numerical integration
OTHERWISE = 1e-8


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def grid(case: dict[str, Any]) -> Tensor:
    n, kind = case["num_steps"], case["schedule_type"]
    if kind == "flowmatch":
        return schedules.flowmatch(n, shift=case["flow_shift"])
    low, high = case.get("sigma_min", 0.002), case.get("sigma_max", 80.0)
    if kind == "logsnr":
        return schedules.log_snr(n, low, high)
    spaced = {"polynomial": schedules.polynomial, "time_uniform": schedules.time_uniform}[kind]
    return spaced(n, low, high, case["schedule_rho"])


def table(case: dict[str, Any]) -> Directions:
    raw = {name: tensor(values) for name, values in case["table"].items()}

    def factor(name: str) -> Tensor:
        return 1 + case[name] * (2 * torch.sigmoid(raw[f"{name}_params"] / 2) - 1)

    return Directions(
        torch.sigmoid(raw["r_params"]),
        torch.softmax(raw["weight_s"], -1),
        factor("scale_time"),
        factor("scale_dir"),
    )


def exponential(case: dict[str, Any]) -> dict[str, Any]:
    """Dynamic thresholding was on wherever data is predicted."""
    predict_x0 = case["predict_x0"]
    final = case["lower_order_final"]
    return {"predict_x0": predict_x0, "lower_order_final": final, "thresholding": predict_x0}


def solver(case: dict[str, Any]) -> Solver:
    make = {
        "euler": lambda: Euler(),
        "heun": lambda: Heun(),
        "dpm2": lambda: DPM2(),
        "ipndm": lambda: IPNDM(case["max_order"]),
        "ipndm_v": lambda: IPNDMv(case["max_order"]),
        "deis": lambda: DEIS(case["max_order"], case["deis_mode"]),
        "dpmpp": lambda: DPMpp(case["max_order"], **exponential(case)),
        "unipc": lambda: UniPC(case["max_order"], case["variant"], **exponential(case)),
        "epd": lambda: EPD(table(case)),
        "ipndm-epd": lambda: EPD(table(case), IPNDM(case["max_order"])),
    }
    return make[case["solver"]]()


def name(case: dict[str, Any]) -> str:
    parts = ("solver", "max_order", "process", "schedule_type", "num_steps")
    return "-".join(str(case[part]) for part in parts if part in case)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_recorded_sample_and_its_evaluations_are_met(case: dict[str, Any]) -> None:
    process, method = Process(case["process"]), solver(case)
    field = Field(mixture.ve if process.name == "ve" else mixture.flow)
    x = mixture.LATENTS * case["sigma_max"] if process.name == "ve" else mixture.LATENTS
    *_, end = mixture.integrate(method, field, x, grid(case), afs=case["afs"], correct=True)
    expected = tensor(case["x"]).reshape(end.shape)
    assert mixture.distance(end, expected) < TOLERANCE.get(case["solver"], OTHERWISE)
    assert field.tally.rows == case["evaluations"] * len(x)


@pytest.mark.parametrize(
    "case", mixture.RECORDED["schedules"] + [c for c in CASES if "sigmas" in c], ids=name
)
def test_a_recorded_schedule_is_met(case: dict[str, Any]) -> None:
    expected = tensor(case["sigmas"])
    assert ((grid(case) - expected).abs() / expected).max() < 1e-10


def test_every_solver_of_the_method_is_recorded() -> None:
    assert {case["solver"] for case in CASES} == {
        *("euler", "heun", "dpm2", "ipndm", "ipndm_v", "dpmpp", "deis", "unipc"),
        *("epd", "ipndm-epd"),
    }
