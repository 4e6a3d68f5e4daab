"""`parallel` with what its users load into a pipeline: IP-Adapters, LoRA, other text encoders."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.parallel import parallel
from backends.scheduler import EPDScheduler
from tests import twins
from tests.backends.test_families import drawn, learned

TEXT = "a red fox"
MAKERS = {"SD1.5": twins.sd, "SDXL": twins.sdxl}
kinds = pytest.mark.parametrize("name", MAKERS)
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}Warning")
    for kind in ("Deprecation", "Future", "User")
]


def opened(name: str) -> Any:
    pipe = MAKERS[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_both(pipe: Any, **given: Any) -> Tensor:
    """Latents by `parallel`, which are those of the pipeline with the raw scheduler."""
    given = {"prompt": TEXT, "height": 16, "width": 16, "output_type": "latent", **given}
    predictor, own = learned(pipe, "epd"), pipe.scheduler
    fast = parallel(pipe, predictor)(**given, generator=drawn(3))[0]
    pipe.scheduler = EPDScheduler.from_predictor(predictor, like=own)
    slow = pipe(**given, generator=drawn(3), num_inference_steps=predictor.evaluations)[0]
    pipe.scheduler = own
    assert (fast - slow).norm() <= 1e-5 * slow.norm()
    return fast


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@kinds
def test_an_ip_adapter_by_diffusers_own_loader(name: str) -> None:
    pipe, layers = opened(name), {}
    for i, place in enumerate(n for n in pipe.unet.attn_processors if "attn2" in n):
        shape = pipe.unet.get_submodule(place.removesuffix(".processor")).to_k.weight.shape
        layers |= {f"{2 * i + 1}.to_{kind}_ip.weight": random(*shape) for kind in "kv"}
    width = pipe.unet.config.cross_attention_dim
    proj = {"proj.weight": random(4 * width, width), "proj.bias": random(4 * width)}
    proj |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    before = by_both(pipe)
    pipe.load_ip_adapter(
        {"image_proj": proj, "ip_adapter": layers},
        subfolder="", weight_name="", image_encoder_folder=None,
    )  # fmt: skip
    weak, strong = (
        by_both(pipe, ip_adapter_image_embeds=[scale * random(2, 1, width)]) for scale in (1, -4)
    )
    assert not torch.allclose(weak, before, atol=1e-2)
    assert not torch.allclose(weak, strong, atol=1e-2)


@kinds
def test_a_lora_by_diffusers_own_loader(name: str) -> None:
    """Of the network and of a text encoder: loaded, at another strength, fused, let go."""
    pytest.importorskip("peft")  # without it diffusers loads no LoRA
    pipe, state, rank = opened(name), {}, 2
    for part in ("unet", "text_encoder"):
        for place, layer in getattr(pipe, part).named_modules():
            if place.endswith(("attn2.to_q", "self_attn.q_proj")):
                high, low = layer.weight.shape
                state[f"{part}.{place}.lora_A.weight"] = random(rank, low)
                state[f"{part}.{place}.lora_B.weight"] = random(high, rank)
    fast = parallel(pipe, learned(pipe, "epd"))

    def latents() -> Tensor:
        given = {"height": 16, "width": 16, "output_type": "latent", "generator": drawn(3)}
        return fast(TEXT, **given)[0]

    before = latents()
    assert torch.equal(latents(), before)
    pipe.load_lora_weights(state, adapter_name="one")
    results = [before, latents()]
    assert torch.equal(by_both(pipe), results[1])
    pipe.set_adapters("one", 0.3)
    results.append(latents())
    assert torch.equal(by_both(pipe), results[2])
    pipe.fuse_lora(lora_scale=2.0)
    results.append(latents())
    assert torch.allclose(by_both(pipe), results[3], atol=1e-5)
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in pairwise(results))
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.allclose(latents(), before, atol=1e-4)


@kinds
@pytest.mark.parametrize("change", ["in place", "through .data", "another"])
def test_a_prompt_is_encoded_once_while_its_encoder_is_the_same(name: str, change: str) -> None:
    pipe, rows = opened(name), []
    pipe.text_encoder.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    fast = parallel(pipe, learned(pipe, "epd"))

    def latents(*texts: str) -> Tensor:
        given = {"height": 16, "width": 16, "output_type": "latent", "guidance_scale": 1.0}
        return fast(list(texts), generator=drawn(*range(len(texts))), **given)[0]

    before = latents(TEXT, "b", TEXT)
    assert torch.equal(latents(TEXT, "b")[1], before[1])
    assert sum(rows) == 2
    weight = pipe.text_encoder.get_submodule("encoder.layers.0.mlp.fc1").weight
    with torch.no_grad():
        if change == "in place":
            weight.mul_(-9)
        elif change == "through .data":
            weight.data[1:] += 3
        else:
            pipe.text_encoder = twins.clip(type(pipe.text_encoder).__name__, 9, 0.5)
    assert not torch.allclose(latents(TEXT)[0], before[0], atol=1e-3)
