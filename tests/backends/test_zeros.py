"""One row of zeros in the place of 256: the same numbers, and nothing else is touched."""

from typing import Any

import pytest
import torch

from backends.sd3 import fold_zeros

pytest.importorskip("diffusers")

from backends import pipelines
from tests import twins


@pytest.fixture
def pipe() -> Any:
    pipe = twins.sd3()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(pipe: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return pipe("a", num_inference_steps=2, generator=g, output_type="latent").images


def test_a_pipeline_that_a_backend_shares_serves_its_owner_as_before(pipe: Any) -> None:
    before = stock(pipe)
    backend: Any = pipelines.wrap(pipe, torch.device("cpu"))
    assert backend.encode(["a"]).given["text"].shape[1] == 77 + 1  # one row of zeros for 256
    assert torch.equal(stock(pipe), before)
    again: Any = pipelines.wrap(pipe, torch.device("cpu"))
    assert again.encode(["a"]).given["text"].shape[1] == 77 + 1


def test_the_slope_is_that_of_all_the_rows(pipe: Any) -> None:
    backend: Any = pipelines.wrap(pipe, torch.device("cpu"))
    x = torch.randn(2, *backend.shape, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.9, 0.2])
    text, _, pooled, _ = pipe.encode_prompt("a", None, None, do_classifier_free_guidance=False)
    velocity = pipe.transformer(x, text.repeat(2, 1, 1), pooled.repeat(2, 1), 1000 * sigma)[0]
    ours = backend.denoise(x, sigma, backend.encode(["a", "a"]))
    torch.testing.assert_close(ours, x - sigma[:, None, None, None] * velocity)


def test_attention_of_ones_own_and_few_zeros_are_left_alone(pipe: Any) -> None:
    assert not fold_zeros(pipe.transformer, 256, 4096 + 77)
    processors = pipe.transformer.attn_processors
    pipe.transformer.set_attn_processor(dict.fromkeys(processors, Own()))
    assert not fold_zeros(pipe.transformer, 256, 64)
    left: Any = pipelines.wrap(pipe, torch.device("cpu"))
    assert left.encode(["a"]).given["text"].shape[1] == 77 + 256


class Own:
    """Attention of somebody's own."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states
