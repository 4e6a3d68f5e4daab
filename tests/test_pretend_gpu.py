"""No step of sampling waits for the GPU; shown on a pretend one, which is shown to see waits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from backends.base import Backend, ModelOptions
from backends.edm import pixel_backend
from backends.generate import Job, generate
from backends.pipelines import wrap
from solvers.predictor import find_predictor, load_predictor
from solvers.sampler import SOLVERS, Sampler, hand_made
from tests import twins
from tests.pretend_gpu import Seen, pretend_gpu
from tests.tiny import tiny_edm

CUDA = torch.device("cuda")
EPDS = ("epd-k2-5nfe", "epd-ipndm-k2-5nfe", "epd-multistep-k2-5nfe")
PIPELINES: dict[str, Callable[[], Any]] = {
    name: getattr(twins, name) for name in ("sd", "uncond", "sd3", "flux")
}


def edm() -> Backend:
    return pixel_backend(tiny_edm().to(CUDA), CUDA)


def seen_in(
    make: Callable[[], Backend], sampler: Callable[[Backend], Sampler], prompt: Any
) -> Seen:
    """What two batches wait for and send, apart from making the backend and encoding texts."""
    with pretend_gpu() as seen:
        backend = make()
        backend.encode([prompt])
        seen.waits.clear()
        seen.uploads.clear()
        for _ in generate(backend, sampler(backend), [Job(i, prompt) for i in range(4)], batch=2):
            pass
    return seen


WAITS: tuple[Callable[[Any], object], ...] = (
    lambda x: x.sum().item(),
    lambda x: bool(x[0] > 0),
    lambda x: x.tolist(),
    lambda x: x.cpu(),
    lambda x: x.nonzero(),
    lambda x: x[x > 0],
    lambda x: float(x.max()),
    lambda x: torch.equal(x, x),
    lambda x: torch.zeros(3).copy_(x),
)
MIXES: tuple[Callable[[Any], object], ...] = (
    lambda x: x + torch.ones(3),
    lambda x: torch.cat([x, torch.ones(1)]),
    lambda x: torch.ones(3, 3) @ x,
    lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    lambda x: torch.randn(3, device=x.device, generator=torch.Generator()),
    lambda x: x.numpy(),
)


def test_a_wait_is_counted_with_its_line_and_what_cuda_refuses_is_refused() -> None:
    for wait in WAITS:
        with pretend_gpu() as seen:
            x = torch.arange(3.0, device=CUDA)
            assert not seen.waits
            wait(x)
        assert seen.waits.total() == 1
        assert "tests/test_pretend_gpu.py:" in next(iter(seen.waits))
    for mix in MIXES:
        with pretend_gpu(), pytest.raises((RuntimeError, TypeError), match="cuda"):
            mix(torch.zeros(3, device=CUDA))


def test_work_on_the_gpu_waits_for_nothing_and_gives_the_numbers() -> None:
    with pretend_gpu() as seen:
        x = torch.linspace(0, 1, 5).to(CUDA)
        layer = torch.nn.Linear(5, 2).to(CUDA)
        y = layer((x * 2 + 1).softmax(0)[None])
        y[:, 0] = 3.0
        assert (y + torch.tensor(2.0)).device == torch.device("cuda:0")
        assert not seen.waits
        assert y.cpu()[0, 0] == 3
    assert seen.uploads.total() >= 2


@pytest.mark.parametrize("name", SOLVERS)
def test_no_solver_waits_or_sends(name: str) -> None:
    short, long = (
        seen_in(edm, lambda b, n=n: hand_made(name, b.levels, n, afs=True), 2) for n in (3, 5)
    )
    assert not short.waits + long.waits
    assert short.uploads == long.uploads  # noise and classes, once a batch


@pytest.mark.parametrize("name", EPDS)
def test_no_learned_solver_waits_and_its_table_is_sent_once_a_batch(name: str) -> None:
    predictor = load_predictor(find_predictor(f"fashion-mnist-32/{name}"))
    seen = seen_in(edm, lambda b: predictor.sampler(b.levels), 2)
    assert not seen.waits
    assert max(seen.uploads.values()) <= 2 * 8  # tensors of a table, in two batches


@pytest.mark.parametrize("name", PIPELINES)
def test_no_pipeline_waits_or_sends_in_a_step(name: str) -> None:
    pipe = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    prompt = None if name == "uncond" else "a"
    rate = 1.0 if name in ("uncond", "flux") else 5.0
    options = ModelOptions() if name == "uncond" else ModelOptions(size=(32, 32))
    short, long = (
        seen_in(
            lambda: wrap(pipe.to(CUDA), CUDA, options),
            lambda b, n=n: hand_made("ipndm", b.levels, n, guidance_rate=rate),
            prompt,
        )
        for n in (3, 5)
    )
    assert not short.waits + long.waits
    assert short.uploads == long.uploads
