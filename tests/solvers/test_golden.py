"""The recorded outputs of the public reference implementations, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from solvers import schedules
from solvers.classic import DPM2, IPNDM, Euler, Heun, IPNDMv
from solvers.epd import EPD
from solvers.exponential import DEIS, DPMpp, UniPC
from solvers.field import Field
from solvers.integrate import Solver
from solvers.process import Process
from solvers.published import decode
from tests.solvers import gauss

CASES: list[dict[str, Any]] = gauss.RECORDED["cases"]
TOLERANCE = {"deis": 1e-3}  # recorded by numerical integration
OTHERWISE = 1e-8


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def grid(case: dict[str, Any]) -> Tensor:
    n, kind = case["num_steps"], case["schedule_type"]
    low, high = case.get("sigma_min", 0.002), case.get("sigma_max", 80.0)
    match kind:
        case "flowmatch":
            return schedules.flowmatch(n, shift=case["flow_shift"])
        case "logsnr":
            return gauss.log_snr(n, low, high)
        case "polynomial":
            return schedules.polynomial(n, low, high, case["schedule_rho"])
    return schedules.time_uniform(n, low, high, case["schedule_rho"])


def prediction(case: dict[str, Any]) -> dict[str, Any]:
    """x0 was dynamically thresholded wherever it is predicted."""
    x0 = case["predict_x0"]
    return {"predict_x0": x0, "lower_order_final": case["lower_order_final"], "thresholding": x0}


def solver(case: dict[str, Any]) -> Solver:
    order: Any = case.get("max_order")
    match case["solver"]:
        case "epd" | "ipndm-epd":
            raw = {name: tensor(values) for name, values in case["table"].items()}
            reaches = {name: case[name] for name in ("scale_dir", "scale_time")}
            base = Euler() if case["solver"] == "epd" else IPNDM(order)
            return EPD(decode(raw, **reaches), base)
        case "ipndm" | "ipndm_v":
            return {"ipndm": IPNDM, "ipndm_v": IPNDMv}[case["solver"]](order)
        case "deis":
            return DEIS(order, case["deis_mode"])
        case "dpmpp":
            return DPMpp(order, **prediction(case))
        case "unipc":
            return UniPC(order, case["variant"], **prediction(case))
    return {"euler": Euler, "heun": Heun, "dpm2": DPM2}[case["solver"]]()


def name(case: dict[str, Any]) -> str:
    parts = ("solver", "max_order", "process", "schedule_type", "num_steps")
    return "-".join(str(case[part]) for part in parts if part in case)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_recorded_sample_and_its_evaluations_are_met(case: dict[str, Any]) -> None:
    process, denoiser = Process(case["process"]), gauss.flow
    x, sigmas = gauss.LATENTS, grid(case)
    if process.name == "ve":
        denoiser, x = gauss.ve, x * case["sigma_max"]
    field = Field(denoiser)
    *_, end = gauss.integrate(solver(case), field, x, sigmas, afs=case["afs"], correct=True)
    expected = tensor(case["x"]).reshape(end.shape)
    assert gauss.distance(end, expected) < TOLERANCE.get(case["solver"], OTHERWISE)
    assert field.tally.rows == case["evaluations"] * len(x)


def test_the_recorded_schedules_are_met_and_every_solver_of_the_method_is_recorded() -> None:
    for case in gauss.RECORDED["schedules"] + [c for c in CASES if "sigmas" in c]:
        expected = tensor(case["sigmas"])
        assert ((grid(case) - expected).abs() / expected).max() < 1e-10, name(case)
    assert {case["solver"] for case in CASES} == {
        *("euler", "heun", "dpm2", "ipndm", "ipndm_v", "dpmpp", "deis", "unipc"),
        *("epd", "ipndm-epd"),
    }
