"""No step of sampling waits for the GPU; shown on a pretend one, which is shown to see waits."""

import pytest
import torch

from tests.pretend_gpu import pretend_gpu

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: float(x.max()),
        lambda x: torch.equal(x, x),
        lambda x: torch.zeros(3).copy_(x),
    ],
)
def test_a_wait_is_counted_with_its_line(wait: object) -> None:
    with pretend_gpu() as seen:
        x = torch.arange(3.0, device=CUDA)
        assert not seen.waits
        wait(x)  # pyright: ignore[reportCallIssue]
    assert seen.waits.total() == 1
    assert "tests/test_pretend_gpu.py:" in next(iter(seen.waits))


def test_work_on_the_gpu_waits_for_nothing_and_gives_the_numbers() -> None:
    with pretend_gpu() as seen:
        x = torch.linspace(0, 1, 5).to(CUDA)
        layer = torch.nn.Linear(5, 2).to(CUDA)
        y = layer((x * 2 + 1).softmax(0)[None])
        y[:, 0] = 3.0
        assert y.device == torch.device("cuda:0")
        assert not seen.waits
        assert y.cpu()[0, 0] == 3
    assert seen.uploads.total() >= 2


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(1)]),
        lambda x: torch.ones(3, 3) @ x,
        lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
        lambda x: torch.randn(3, device=x.device, generator=torch.Generator()),
        lambda x: x.numpy(),
    ],
)
def test_what_cuda_refuses_is_refused(mix: object) -> None:
    with pretend_gpu(), pytest.raises((RuntimeError, TypeError), match="cuda"):
        mix(torch.zeros(3, device=CUDA))  # pyright: ignore[reportCallIssue]


def test_a_number_from_the_cpu_is_taken() -> None:
    with pretend_gpu():
        assert (torch.zeros(3, device=CUDA) + torch.tensor(2.0)).device.type == "cuda"
